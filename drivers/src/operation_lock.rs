//! The lock of an operation, which whatever works for it holds.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use snaptree_engine::OperationId;
use snaptree_engine::driver::{DriverError, ErrorClass};
use snaptree_engine::operation::Code;

use crate::failing::{Doing, if_there};

/// How long an ended process may take to be gone.
const TERM_WAIT: Duration = Duration::from_secs(3);
const KILL_WAIT: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(50);

/// Whether a process has one of the inodes open: device and number.
pub(crate) fn has_one_of(pid: u32, wanted: &[(u64, u64)]) -> bool {
    let Ok(open) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    open.flatten()
        .any(|entry| fs::metadata(entry.path()).is_ok_and(|file| wanted.contains(&(file.dev(), file.ino()))))
}

/// The processes that have the inode open.
pub(crate) fn processes_with(device: u64, inode: u64) -> Vec<u32> {
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    processes
        .flatten()
        .filter_map(|entry| entry.file_name().to_str().and_then(|name| name.parse().ok()))
        .filter(|&pid| has_one_of(pid, &[(device, inode)]))
        .collect()
}

/// The lock of one operation: every tool that works for it has the locked file as its stdin, so the lock is free
/// only when none of them is left, also when Snaptree itself died in between.
#[derive(Debug)]
pub(crate) struct OperationLock {
    path: PathBuf,
    file: File,
}

impl OperationLock {
    fn path(run_dir: &Path, operation: OperationId) -> PathBuf {
        run_dir.join(format!("op-{operation}.lock"))
    }

    /// Takes the lock; somebody who has it is still at work.
    pub(crate) fn take(run_dir: &Path, operation: OperationId) -> Result<Self, DriverError> {
        fs::create_dir_all(run_dir).doing("make the folder", run_dir)?;
        let path = Self::path(run_dir, operation);
        match Self::try_take(&path)? {
            Some(lock) => Ok(lock),
            None => Err(DriverError::new(
                ErrorClass::Unknown,
                Code::InUse,
                format!("a tool is still at work for operation {operation} ({} is locked)", path.display()),
            )),
        }
    }

    fn try_take(path: &Path) -> Result<Option<Self>, DriverError> {
        loop {
            let file = fs::OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(path)
                .doing("open", path)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(fs::TryLockError::WouldBlock) => return Ok(None),
                Err(fs::TryLockError::Error(error)) => return Err(error).doing("lock", path),
            }
            // Whoever had it before may have removed the name: then this is a lock that nobody else will meet.
            let ours = file.metadata().doing("look at", path)?;
            match if_there(fs::metadata(path)).doing("look at", path)? {
                Some(named) if (named.dev(), named.ino()) == (ours.dev(), ours.ino()) => {
                    return Ok(Some(Self { path: path.to_path_buf(), file }));
                }
                _ => {}
            }
        }
    }

    /// A handle to give to a child as its stdin.
    pub(crate) fn for_child(&self) -> Result<File, DriverError> {
        self.file.try_clone().doing("duplicate", &self.path)
    }

    /// Lets go of it, and removes the file.
    pub(crate) fn release(self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "an operation's lock file stays behind");
        }
    }

    /// Waits until nobody is at work for the operation, and ends whoever still is after `grace`.
    pub(crate) async fn settle(
        run_dir: &Path,
        operation: OperationId,
        grace: Duration,
    ) -> Result<(), DriverError> {
        let path = Self::path(run_dir, operation);
        if if_there(fs::metadata(&path)).doing("look at", &path)?.is_none() {
            return Ok(());
        }
        for (signal, wait) in
            [(None, grace), (Some(Signal::SIGTERM), TERM_WAIT), (Some(Signal::SIGKILL), KILL_WAIT)]
        {
            if let Some(signal) = signal {
                end_holders(&path, signal)?;
            }
            let until = Instant::now() + wait;
            loop {
                if let Some(lock) = Self::try_take(&path)? {
                    lock.release();
                    return Ok(());
                }
                if Instant::now() >= until {
                    break;
                }
                tokio::time::sleep(POLL).await;
            }
        }
        Err(DriverError::new(
            ErrorClass::Busy,
            Code::InUse,
            format!("a tool is still at work for operation {operation} and could not be ended"),
        )
        .hint(format!("find it with: fuser {}", path.display())))
    }
}

/// Signals every process that has the lock file open, except this one.
fn end_holders(path: &Path, signal: Signal) -> Result<(), DriverError> {
    let metadata = match fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        found => found.doing("look at", path)?,
    };
    for pid in processes_with(metadata.dev(), metadata.ino()) {
        if pid == std::process::id() {
            continue;
        }
        let Ok(raw) = i32::try_from(pid) else { continue };
        tracing::warn!(pid, %signal, "ending a tool that an interrupted operation left behind");
        if let Err(error) = kill(Pid::from_raw(raw), signal) {
            tracing::warn!(pid, %error, "it could not be signalled");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operation() -> OperationId {
        OperationId::from_uuid(uuid::Uuid::now_v7())
    }

    #[test]
    fn an_operation_is_locked_once() {
        let dir = tempfile::tempdir().unwrap();
        let operation = operation();
        let lock = OperationLock::take(dir.path(), operation).unwrap();
        assert!(OperationLock::take(dir.path(), operation).is_err());
        lock.release();
        OperationLock::take(dir.path(), operation).unwrap().release();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn settle_ends_a_tool_that_was_left_behind() {
        let dir = tempfile::tempdir().unwrap();
        let operation = operation();
        let lock = OperationLock::take(dir.path(), operation).unwrap();
        let mut child =
            std::process::Command::new("sleep").arg("60").stdin(lock.for_child().unwrap()).spawn().unwrap();
        drop(lock);
        assert!(OperationLock::take(dir.path(), operation).is_err());
        OperationLock::settle(dir.path(), operation, Duration::from_millis(50)).await.unwrap();
        assert!(!child.wait().unwrap().success());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
