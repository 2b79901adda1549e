//! A machine's file: read within a limit, replaced as a whole.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use snaptree_engine::DomainId;
use snaptree_engine::driver::{DriverError, ErrorClass};
use snaptree_engine::operation::Code;

use super::host::Host;

/// Largest machine file that is read or written.
const FILE_BYTES_MAX: u64 = 64 << 20;

pub(super) struct MachineFile {
    folder: PathBuf,
    path: PathBuf,
}

/// Keeps everyone else from changing the machine, for as long as it is open.
pub(super) struct Lock(#[expect(dead_code, reason = "it is held, not read")] File);

impl MachineFile {
    pub(super) fn new(folder: &Path, domain: DomainId) -> Self {
        Self { folder: folder.to_owned(), path: folder.join(format!("{domain}.json")) }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Waits until nobody else changes the machine. Makes the folder if it is missing.
    ///
    /// The lock has a file of its own, since the machine's is replaced while the lock is held.
    pub(super) fn lock(&self) -> Result<Lock, DriverError> {
        match fs::create_dir(&self.folder) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                return Err(failed("make", &self.folder, &error));
            }
            _ => {}
        }
        let path = self.path.with_extension("lock");
        let lock = || {
            let file = OpenOptions::new().create(true).append(true).mode(0o600).open(&path)?;
            file.lock().map(|()| Lock(file))
        };
        lock().map_err(|error| failed("lock", &path, &error))
    }

    /// The machine; none if there is no file.
    pub(super) fn read<H: Host>(&self) -> Result<Option<H>, DriverError> {
        let mut bytes = Vec::new();
        let read =
            File::open(&self.path).and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes));
        match read {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("read", &self.path, &error)),
            Ok(_) => {}
        }
        if bytes.len() as u64 > FILE_BYTES_MAX {
            return Err(self.damaged(&format!("it is larger than {FILE_BYTES_MAX} bytes")));
        }
        let machine: H = serde_json::from_slice(&bytes).map_err(|error| self.damaged(&error.to_string()))?;
        machine.check().map_err(|contradiction| self.damaged(&contradiction))?;
        Ok(Some(machine))
    }

    /// Replaces the file by a synced one; whoever reads sees the old machine or the new one, whole.
    pub(super) fn write<H: Host>(&self, _lock: &Lock, machine: &H) -> Result<(), DriverError> {
        debug_assert_eq!(
            machine.check(),
            Ok(()),
            "a machine that contradicts itself would not be read again"
        );
        let bytes = serde_json::to_vec(machine).map_err(|error| self.damaged(&error.to_string()))?;
        if bytes.len() as u64 > FILE_BYTES_MAX {
            let message = format!("{} would be larger than {FILE_BYTES_MAX} bytes", self.path.display());
            return Err(DriverError::permanent(Code::NoSpace, message).hint("delete some snapshots first"));
        }
        let prepared = self.path.with_extension("json.tmp");
        let prepare = || {
            let mut file =
                OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&prepared)?;
            file.write_all(&bytes)?;
            file.sync_all()
        };
        prepare().map_err(|error| failed("write", &prepared, &error))?;
        if !self.path.exists() {
            // The folder may be as new as its first machine.
            let parent = self.folder.parent().filter(|parent| !parent.as_os_str().is_empty());
            let parent = parent.unwrap_or(Path::new("."));
            sync(parent).map_err(|error| failed("sync", parent, &error))?;
        }
        fs::rename(&prepared, &self.path).and_then(|()| sync(&self.folder)).map_err(|error| {
            DriverError::unknown(Code::Io, format!("cannot replace {}: {error}", self.path.display()))
        })
    }

    /// Makes what is read now outlast a power cut: a killed process may have renamed the file and not synced.
    pub(super) fn sync(&self) -> Result<(), DriverError> {
        match sync(&self.folder) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(failed("sync", &self.folder, &error)),
            _ => Ok(()),
        }
    }

    fn damaged(&self, why: &str) -> DriverError {
        let message = format!("the machine file {} is damaged: {why}", self.path.display());
        DriverError::permanent(Code::BadImage, message)
            .hint("put it back from a backup; it was left as it is")
    }
}

fn sync(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Something that failed without having had an effect.
fn failed(what: &str, path: &Path, error: &io::Error) -> DriverError {
    let (class, code) = match error.kind() {
        ErrorKind::PermissionDenied => (ErrorClass::Permanent, Code::Permission),
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => (ErrorClass::Permanent, Code::NoSpace),
        _ => (ErrorClass::Transient, Code::Io),
    };
    DriverError::new(class, code, format!("cannot {what} {}: {error}", path.display()))
}
