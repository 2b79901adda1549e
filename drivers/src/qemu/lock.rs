//! Who has a file: QEMU's own locks on image files, and the lock of an operation.
//!
//! QEMU holds byte 100+n of an image while it uses permission n, and byte 200+n while it does not share it
//! (1 is to write, 3 to resize). So byte 101 or 103 tells of a writer, and whoever holds 201 and 203 keeps QEMU and
//! qemu-img from writing. These are locks of an open file description: they vanish with the process.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use snaptree_engine::OperationId;
use snaptree_engine::driver::{DriverError, ErrorClass, InUse};
use snaptree_engine::operation::{Code, Failure};

use super::files::{Doing, if_there, open_image};

const WRITES: libc::off_t = 101;
const RESIZES: libc::off_t = 103;
const LETS_NOBODY_WRITE: libc::off_t = 201;
const LETS_NOBODY_RESIZE: libc::off_t = 203;

/// How long a machine that nobody answers for may take to be gone.
pub(super) const DYING: Duration = Duration::from_secs(5);
/// How long an ended process may take to be gone.
const TERM_WAIT: Duration = Duration::from_secs(3);
const KILL_WAIT: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(50);
const COMMAND_BYTES_MAX: usize = 64;

fn byte(kind: libc::c_int, at: libc::off_t) -> libc::flock {
    #[expect(clippy::cast_possible_truncation, reason = "lock kinds and SEEK_SET are small constants")]
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: at,
        l_len: 1,
        l_pid: 0,
    }
}

/// Whether somebody writes the image.
pub(super) fn has_writer(file: &File) -> io::Result<bool> {
    for at in [WRITES, RESIZES] {
        let mut lock = byte(libc::F_WRLCK, at);
        fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock))?;
        if libc::c_int::from(lock.l_type) != libc::F_UNLCK {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Who writes the image at `path`, if anybody does. A missing file has no writer.
pub(super) fn writer(path: &Path) -> io::Result<Option<InUse>> {
    let Some(file) = if_there(open_image(path))? else { return Ok(None) };
    Ok(has_writer(&file)?.then(|| holder(path, &file)))
}

/// Names the process that has the file open, where it can be found.
fn holder(path: &Path, file: &File) -> InUse {
    let found = file.metadata().ok().and_then(|metadata| {
        processes_with(metadata.dev(), metadata.ino()).into_iter().find(|pid| *pid != std::process::id())
    });
    let command = found
        .and_then(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).ok())
        .map(|name| name.chars().filter(|c| !c.is_control()).take(COMMAND_BYTES_MAX).collect::<String>());
    InUse { file: path.to_path_buf(), pid: found, command }
}

/// The processes that have the inode open.
fn processes_with(device: u64, inode: u64) -> Vec<u32> {
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let has_it = |pid: u32| {
        let Ok(open) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
        open.flatten().any(|entry| {
            fs::metadata(entry.path()).is_ok_and(|file| (file.dev(), file.ino()) == (device, inode))
        })
    };
    processes
        .flatten()
        .filter_map(|entry| entry.file_name().to_str().and_then(|name| name.parse().ok()))
        .filter(|&pid| has_it(pid))
        .collect()
}

/// The processes that have the file open.
pub(super) fn processes_of(path: &Path) -> Vec<u32> {
    let metadata = fs::metadata(path);
    metadata.map(|metadata| processes_with(metadata.dev(), metadata.ino())).unwrap_or_default()
}

/// The refusal that an image in use gets.
pub(super) fn in_use(holder: &InUse) -> Failure {
    let file = holder.file.display();
    let message = match (&holder.command, holder.pid) {
        (Some(command), Some(pid)) => format!("image {file} is in use by {command} (pid {pid})"),
        (None, Some(pid)) => format!("image {file} is in use by process {pid}"),
        _ => format!("image {file} is in use by another process"),
    };
    Failure::new(Code::InUse, message).hint("shut the machine down and try again")
}

/// Refuses an image that somebody writes. A machine may run for months, so there is no waiting for it: the operation
/// goes back, and a merge is put off until it is off.
pub(super) fn check_unused(path: &Path) -> Result<(), DriverError> {
    match writer(path).doing("ask for the locks of", path)? {
        Some(holder) => Err(in_use(&holder).into()),
        None => Ok(()),
    }
}

/// The same, with time for a machine that was killed in this moment to let go of its files.
pub(super) async fn check_unused_soon(path: &Path) -> Result<(), DriverError> {
    let until = Instant::now() + DYING;
    loop {
        match check_unused(path) {
            Err(error) if error.failure.code == Code::InUse && Instant::now() < until => {
                tokio::time::sleep(POLL).await;
            }
            checked => return checked,
        }
    }
}

/// While it lives, nobody can begin to write these images.
#[derive(Debug, Default)]
pub(super) struct QemuLocks {
    files: Vec<(PathBuf, File)>,
}

impl QemuLocks {
    /// Locks every image, then asks for writers: so a writer either is seen here or comes too late.
    pub(super) fn take<'a>(paths: impl IntoIterator<Item = &'a Path>) -> Result<Self, DriverError> {
        let mut files = Vec::new();
        for path in paths {
            let file = open_image(path).doing("open", path)?;
            for at in [LETS_NOBODY_WRITE, LETS_NOBODY_RESIZE] {
                fcntl(&file, FcntlArg::F_OFD_SETLK(&byte(libc::F_RDLCK, at)))
                    .map_err(io::Error::from)
                    .doing("lock", path)?;
            }
            files.push((path.to_path_buf(), file));
        }
        for (path, file) in &files {
            if has_writer(file).doing("ask for the locks of", path)? {
                return Err(in_use(&holder(path, file)).into());
            }
        }
        Ok(Self { files })
    }

    /// The locked images.
    pub(super) fn files(&self) -> impl Iterator<Item = (&Path, &File)> {
        self.files.iter().map(|(path, file)| (path.as_path(), file))
    }
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

    #[test]
    fn our_locks_do_not_look_like_a_writer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        fs::write(&path, vec![0; 512]).unwrap();
        let locks = QemuLocks::take([path.as_path()]).unwrap();
        assert_eq!(locks.files().count(), 1);
        assert_eq!(writer(&path).unwrap(), None);
        let other = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        fcntl(&other, FcntlArg::F_OFD_SETLK(&byte(libc::F_RDLCK, WRITES))).unwrap();
        assert!(writer(&path).unwrap().is_some());
    }
}
