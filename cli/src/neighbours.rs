//! The other states of this host, which may look after a machine that this one thinks its own.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use snaptree_engine::DomainId;
use snaptree_engine::driver::Head;
use snaptree_engine::log::{EventFilter, EventLog, LogError};
use snaptree_engine::reconcile::keeper::{Standing, States};
use snaptree_store::{DATABASE_FILE, Store};

/// The states beside the one in this directory.
#[derive(Clone, Debug)]
pub struct Neighbours {
    database: PathBuf,
}

impl Neighbours {
    /// Those of the state in `dir`.
    pub fn of(dir: &Path) -> Self {
        Self { database: dir.join(DATABASE_FILE) }
    }
}

#[async_trait]
impl States for Neighbours {
    async fn standing(&self, state: &Path, domain: DomainId, head: Head) -> Standing {
        let database = state.join(DATABASE_FILE);
        // By inode: a directory has many names.
        let inode = |path: &Path| fs::metadata(path).ok().map(|file| (file.dev(), file.ino()));
        if inode(&self.database).is_some_and(|ours| inode(&database) == Some(ours)) {
            return Standing::Here;
        }
        if let Err(error) = File::open(&database) {
            return match error.kind() {
                ErrorKind::PermissionDenied => Standing::Hidden(error.to_string()),
                _ => Standing::Gone,
            };
        }
        // One that cannot be read any more works on nothing.
        let Ok(store) = Store::open_reader(state) else { return Standing::Gone };
        match has(&store, domain, head).await {
            Ok(true) => Standing::There,
            Ok(false) | Err(_) => Standing::Gone,
        }
    }
}

/// Whether the log has the event, and looks after the domain.
async fn has(store: &Store, domain: DomainId, head: Head) -> Result<bool, LogError> {
    if !store.domains(u64::MAX).await?.iter().any(|row| row.id == domain) {
        return Ok(false);
    }
    let Some(before) = head.seq.checked_sub(1) else { return Ok(false) };
    let found = store.read(before, &EventFilter::default(), 1).await?;
    Ok(found.first().is_some_and(|event| event.seq == head.seq && event.hash == head.hash))
}
