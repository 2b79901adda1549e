//! Who has an image file: QEMU's own locks.
//!
//! QEMU holds byte 100+n of an image while it uses permission n, and byte 200+n while it does not share it
//! (1 is to write, 3 to resize). So byte 101 or 103 tells of a writer, and whoever holds 201 and 203 keeps QEMU and
//! qemu-img from writing. These are locks of an open file description: they vanish with the process.
//!
//! A QEMU with `file.locking=off` takes none, and so does any other program: what they have open for writing tells of them.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use snaptree_engine::driver::{DriverError, InUse};
use snaptree_engine::operation::{Code, Failure};

use super::files::{Doing, if_there, io_error, open_image};
use crate::operation_lock::processes_with;
use crate::process::{Process, writers_of};

const WRITES: libc::off_t = 101;
const RESIZES: libc::off_t = 103;
const LETS_NOBODY_WRITE: libc::off_t = 201;
const LETS_NOBODY_RESIZE: libc::off_t = 203;

/// How long a machine that nobody answers for may take to be gone.
pub(super) const DYING: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(50);
/// How often it is asked who has an image whose user lives.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
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
    Ok(writers(&[path])?.into_iter().next())
}

/// Who writes these images: by their locks or, where none is locked, by what the processes have open.
pub(super) fn writers(paths: &[&Path]) -> io::Result<Vec<InUse>> {
    let mut found = Vec::new();
    let mut unlocked = Vec::new();
    for path in paths {
        let Some(file) = if_there(open_image(path))? else { continue };
        if has_writer(&file)? {
            found.push(holder(path, &file));
        } else {
            unlocked.push((*path, file));
        }
    }
    if found.is_empty() {
        found.extend(open_for_writing(unlocked.iter().map(|(path, file)| (*path, file)))?);
    }
    Ok(found)
}

fn open_for_writing<'a>(files: impl Iterator<Item = (&'a Path, &'a File)>) -> io::Result<Vec<InUse>> {
    let mut inodes = Vec::new();
    for (path, file) in files {
        let metadata = file.metadata()?;
        if metadata.is_file() {
            inodes.push((path, (metadata.dev(), metadata.ino())));
        }
    }
    let wanted: Vec<(u64, u64)> = inodes.iter().map(|(_, inode)| *inode).collect();
    let writers = writers_of(&wanted);
    let held = |(path, inode): &(&Path, (u64, u64))| Some(used_by(path, Some(*writers.get(inode)?)));
    Ok(inodes.iter().filter_map(held).collect())
}

/// Names the process that has the file open, where it can be found.
fn holder(path: &Path, file: &File) -> InUse {
    let found = file.metadata().ok().and_then(|metadata| {
        let inode = (metadata.dev(), metadata.ino());
        let open = || processes_with(inode.0, inode.1).into_iter().find(|pid| *pid != std::process::id());
        writers_of(&[inode]).get(&inode).copied().or_else(open)
    });
    used_by(path, found)
}

/// A file that a process uses.
pub(super) fn used_by(path: &Path, pid: Option<u32>) -> InUse {
    let command = pid
        .and_then(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).ok())
        .map(|name| name.chars().filter(|c| !c.is_control()).take(COMMAND_BYTES_MAX).collect::<String>());
    InUse { file: path.to_path_buf(), pid, command }
}

/// Waits until whoever uses an image has ended, but not for long: it may let go of the image and live on.
pub(super) async fn until_let_go(holder: &InUse, longest: Duration) {
    match holder.pid.and_then(Process::of) {
        Some(process) if process.is_alive() => {
            process.is_gone_within(longest.min(LOOK_AGAIN)).await;
        }
        _ => tokio::time::sleep(longest.min(POLL)).await,
    }
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
    while let Some(holder) = writer(path).doing("ask for the locks of", path)? {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(in_use(&holder).into());
        }
        until_let_go(&holder, left).await;
    }
    Ok(())
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
        let open = open_for_writing(files.iter().map(|(path, file)| (path.as_path(), file)));
        let open = open.map_err(|error| io_error("look at", Path::new("/proc"), error))?;
        match open.first() {
            Some(holder) => Err(in_use(holder).into()),
            None => Ok(Self { files }),
        }
    }

    /// The locked images.
    pub(super) fn files(&self) -> impl Iterator<Item = (&Path, &File)> {
        self.files.iter().map(|(path, file)| (path.as_path(), file))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn who_writes_without_a_lock_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        fs::write(&path, vec![0; 512]).unwrap();
        let file = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").stdin(file).spawn().unwrap();
        let found = (writer(&path).unwrap(), QemuLocks::take([path.as_path()]).is_err());
        child.kill().unwrap();
        child.wait().unwrap();
        let holder = found.0.unwrap();
        assert_eq!((holder.pid, holder.command.as_deref()), (Some(child.id()), Some("sleep")));
        assert!(found.1, "no switch under it");
        assert_eq!(writer(&path).unwrap(), None);
    }
}
