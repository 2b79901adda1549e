//! What was put right for an operation, written down before it is done: the log has it only when the step is done, and a
//! repair can be cut off as well.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use snaptree_engine::OperationId;
use snaptree_engine::driver::DriverError;
use snaptree_engine::project::DomainState;
use uuid::Uuid;

use crate::failing::{Doing, if_there};

/// Most of a file of notes that is read.
const NOTES_BYTES_MAX: u64 = 1 << 20;

/// The notes of one operation, a JSON string a line; the name has the machine too, so that they are known to be its own.
#[derive(Debug)]
pub(super) struct Notes(PathBuf);

impl Notes {
    pub(super) fn of(run_dir: &Path, machine: Uuid, operation: OperationId) -> Self {
        Self(run_dir.join(format!("{}{operation}", prefix(machine))))
    }

    /// Notes what is about to be put right; on disk when it returns. What is noted already is not noted again.
    pub(super) fn add(&self, what: &str) -> Result<(), DriverError> {
        if self.read()?.iter().any(|noted| noted == what) {
            return Ok(());
        }
        if let Some(folder) = self.0.parent() {
            fs::create_dir_all(folder).doing("make the folder", folder)?;
        }
        let opened = fs::OpenOptions::new().append(true).create(true).mode(0o600).open(&self.0);
        let mut file = opened.doing("open", &self.0)?;
        // Behind a line that was cut off it begins a new one.
        let line = format!("\n{}\n", serde_json::Value::from(what));
        file.write_all(line.as_bytes()).and_then(|()| file.sync_all()).doing("write", &self.0)
    }

    /// All that was noted. A last line that was cut off was not acted upon.
    pub(super) fn read(&self) -> Result<Vec<String>, DriverError> {
        let Some(file) = if_there(fs::File::open(&self.0)).doing("open", &self.0)? else {
            return Ok(Vec::new());
        };
        let mut bytes = Vec::new();
        file.take(NOTES_BYTES_MAX).read_to_end(&mut bytes).doing("read", &self.0)?;
        // Where it was cut off it may be within a character.
        let text = String::from_utf8_lossy(&bytes);
        Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
    }

    /// What the log does not have yet.
    pub(super) fn untold(
        &self,
        state: &DomainState,
        operation: OperationId,
    ) -> Result<Vec<String>, DriverError> {
        let told = state.operation(operation).map(|operation| operation.learnt.repairs.as_slice());
        let told: BTreeSet<&String> = told.unwrap_or_default().iter().collect();
        Ok(self.read()?.into_iter().filter(|noted| !told.contains(noted)).collect())
    }

    /// Removes those of the machine's operations that have ended.
    pub(super) fn sweep(run_dir: &Path, machine: Uuid, state: &DomainState) {
        let prefix = prefix(machine);
        for entry in fs::read_dir(run_dir).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let ours = name.to_str().and_then(|name| name.strip_prefix(&prefix));
            let ended = |id: &str| state.open.iter().all(|operation| operation.id.to_string() != id);
            if ours.is_some_and(ended)
                && let Err(error) = fs::remove_file(entry.path())
            {
                tracing::warn!(path = %entry.path().display(), %error, "notes of repairs stay behind");
            }
        }
    }
}

fn prefix(machine: Uuid) -> String {
    format!("repairs-{machine}-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_that_was_cut_off_within_a_character_is_none_and_keeps_no_other_from_being_read() {
        let folder = tempfile::tempdir().unwrap();
        let notes = Notes::of(folder.path(), Uuid::nil(), OperationId::from_uuid(Uuid::nil()));
        notes.add("ä is put back").unwrap();
        let mut bytes = fs::read(&notes.0).unwrap();
        bytes.extend_from_slice(b"\n\"\xc3");
        fs::write(&notes.0, &bytes).unwrap();
        notes.add("ö is put back").unwrap();
        assert_eq!(notes.read().unwrap(), ["ä is put back", "ö is put back"]);
    }
}
