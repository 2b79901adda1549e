//! One process at a time writes: an OS lock on the file `lock` in the state directory.
//!
//! The lock is flock(2)'s, so it ends with the process, however that ends. What the file says is only for people:
//! who has the lock.

use std::fmt;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::error::StoreError;

/// The lock's file name in the state directory.
pub const LOCK_FILE: &str = "lock";

/// Longest time between two looks at a lock that somebody else has.
const POLL_MAX: Duration = Duration::from_millis(25);

/// Most bytes of the lock file that are read, and of a command that is written into it.
const HOLDER_BYTES_MAX: usize = 4096;
const COMMAND_CHARS_MAX: usize = 200;

/// How long to wait for the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockWait {
    /// Not longer than this; zero for one try.
    pub timeout: Duration,
}

/// Who has the lock, by what it wrote into the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The process.
    pub pid: u32,
    /// Its command line.
    pub command: String,
    /// Since when.
    pub since: Timestamp,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid {
            0 => f.write_str("another process"),
            pid => write!(f, "process {pid} ({}) since {:.0}", self.command, self.since),
        }
    }
}

impl Holder {
    fn this_process() -> Self {
        let command: Vec<String> =
            std::env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect();
        let command = command.join(" ").chars().filter(|c| !c.is_control()).take(COMMAND_CHARS_MAX).collect();
        Self { pid: std::process::id(), command, since: Timestamp::now() }
    }

    /// What can be said of a holder that has not written the file yet, or whose text cannot be read.
    fn unknown() -> Self {
        Self { pid: 0, command: String::new(), since: Timestamp::UNIX_EPOCH }
    }

    fn read(file: &mut File) -> Self {
        let mut text = String::new();
        let read = file
            .seek(SeekFrom::Start(0))
            .and_then(|_| file.take(HOLDER_BYTES_MAX as u64).read_to_string(&mut text));
        let parsed = read.ok().and_then(|_| serde_json::from_str::<Self>(&text).ok());
        parsed.map_or_else(Self::unknown, |holder| Self {
            command: holder.command.chars().filter(|c| !c.is_control()).take(COMMAND_CHARS_MAX).collect(),
            ..holder
        })
    }
}

/// Who holds the lock of a state directory now; none if nobody does.
///
/// # Errors
/// The file cannot be opened for another reason than that it is not there.
pub fn holder(dir: &Path) -> Result<Option<Holder>, StoreError> {
    let mut file = match snaptree_files::open(&dir.join(LOCK_FILE), OpenOptions::new().read(true)) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(cannot(dir, source)),
    };
    match file.try_lock_shared() {
        Ok(()) => Ok(None),
        Err(TryLockError::WouldBlock) => Ok(Some(Holder::read(&mut file))),
        Err(TryLockError::Error(source)) => Err(cannot(dir, source)),
    }
}

/// The lock, held until it is dropped.
#[derive(Debug)]
pub(crate) struct Lock {
    file: File,
}

impl Lock {
    /// Takes the lock of `dir`, or says who has it.
    pub(crate) fn take(dir: &Path, wait: LockWait) -> Result<Self, StoreError> {
        let mut how = OpenOptions::new();
        how.read(true).write(true).create(true).truncate(false).mode(0o600);
        let mut file =
            snaptree_files::open(&dir.join(LOCK_FILE), &mut how).map_err(|source| cannot(dir, source))?;
        let begun = Instant::now();
        let mut pause = Duration::from_millis(1);
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::Error(source)) => return Err(cannot(dir, source)),
                Err(TryLockError::WouldBlock) => {}
            }
            let left = wait.timeout.saturating_sub(begun.elapsed());
            if left.is_zero() {
                let holder = Holder::read(&mut file);
                return Err(StoreError::Locked { dir: dir.to_owned(), holder, waited: begun.elapsed() });
            }
            std::thread::sleep(pause.min(left));
            pause = (pause * 2).min(POLL_MAX);
        }
        let lock = Self { file };
        // A lock file that cannot be written (a full disk) still locks.
        if let Err(error) = lock.sign() {
            tracing::warn!(%error, "the lock file does not say who has it");
        }
        Ok(lock)
    }

    fn sign(&self) -> std::io::Result<()> {
        let text = serde_json::to_string(&Holder::this_process())?;
        let mut file = &self.file;
        file.set_len(0)?;
        file.seek(SeekFrom::Start(0))?;
        file.write_all(text.as_bytes())
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Emptied before it is released, so that nobody reads the name of a process that let go. Closing the file alone
        // would not release it at once: a child that another thread forks just now has it too, until it execs (seen).
        let _ = self.file.set_len(0);
        let _ = self.file.unlock();
    }
}

fn cannot(dir: &Path, source: std::io::Error) -> StoreError {
    let why = match source.kind() {
        ErrorKind::ReadOnlyFilesystem => Some("on a read-only file system"),
        ErrorKind::PermissionDenied => Some("not writable for this user"),
        _ => None,
    };
    if let Some(why) = why {
        return StoreError::NotWritable { dir: dir.to_owned(), why, source };
    }
    StoreError::Io { what: format!("cannot lock the state directory {}", dir.display()), source }
}
