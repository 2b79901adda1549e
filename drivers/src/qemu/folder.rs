//! The lock of a layers folder: flock(2) on the folder itself, held while a step is carried out or taken back.
//!
//! The lock on a state directory keeps two programs from one log; this one keeps two logs from one machine. It is on the
//! folder and not on a file in it, so nothing has to be made for it (the file system may be full) and nobody can put
//! another file in its place. It ends with the process.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::libc;
use snaptree_engine::driver::{DriverError, ErrorClass};
use snaptree_engine::operation::Code;
use snaptree_engine::project::DomainState;

use super::config::QemuConfig;
use super::files::{self, Doing, if_there};
use super::generation;
use super::step::QemuStep;
use crate::operation_lock::processes_with;

/// The lock, held until it is dropped; none where there is no folder, or its file system knows no such locks.
#[derive(Debug)]
pub(super) struct FolderLock(Option<File>);

impl FolderLock {
    /// For a step that is to be carried out. What it does is done to the generation that the log tells of.
    pub(super) async fn of_step(state: &DomainState, step: &QemuStep) -> Result<Self, DriverError> {
        let layers = layers_of(state)?;
        if let QemuStep::Adopt(_) = step {
            files::make_folder(&layers).await?;
        }
        let lock = Self::take(&layers)?;
        match step {
            // These look themselves, and know their own generation.
            QemuStep::Adopt(_) | QemuStep::Switch(_) | QemuStep::Keep(_) => {}
            // These work on no generation, or end it.
            QemuStep::Clean(_)
            | QemuStep::Power(_)
            | QemuStep::Resume(_)
            | QemuStep::Save(_)
            | QemuStep::Load(_)
            | QemuStep::Erase(_) => {}
            QemuStep::Pull(_)
            | QemuStep::Push(_)
            | QemuStep::Drop(_)
            | QemuStep::Flatten(_)
            | QemuStep::Fold(_)
            | QemuStep::Place(_) => {
                let current = generation::current(&layers)?;
                if current != state.layers.generation {
                    let (current, expected) = (current.as_deref(), state.layers.generation.as_deref());
                    return Err(generation::elsewhere(&layers, current, expected));
                }
            }
        }
        Ok(lock)
    }

    /// For a step that is to be taken back.
    pub(super) fn of_undo(state: &DomainState) -> Result<Self, DriverError> {
        Self::take(&layers_of(state)?)
    }

    pub(super) fn take(folder: &Path) -> Result<Self, DriverError> {
        loop {
            let opened = OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_NONBLOCK)
                .open(folder);
            let Some(file) = if_there(opened).doing("open the folder", folder)? else {
                return Ok(Self(None));
            };
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(busy(folder, &file)),
                Err(TryLockError::Error(error)) if knows_no_locks(&error) => {
                    tracing::warn!(folder = %folder.display(), %error, "the layers folder cannot be locked");
                    return Ok(Self(None));
                }
                Err(TryLockError::Error(error)) => {
                    return Err(files::io_error("lock the folder", folder, error));
                }
            }
            let (locked, there) = (file.metadata(), fs::metadata(folder));
            let same = |there: fs::Metadata| {
                locked.is_ok_and(|locked| (locked.dev(), locked.ino()) == (there.dev(), there.ino()))
            };
            // Whoever had it may have removed the folder, and another one may be in its place.
            if there.is_ok_and(same) {
                return Ok(Self(Some(file)));
            }
        }
    }
}

impl Drop for FolderLock {
    fn drop(&mut self) {
        // Closing alone would not do: a child that is forked just now has it too, until it execs.
        if let Some(file) = &self.0 {
            let _ = file.unlock();
        }
    }
}

fn layers_of(state: &DomainState) -> Result<PathBuf, DriverError> {
    Ok(QemuConfig::of(state)?.1.layers)
}

/// A network file system may have locks on files only.
fn knows_no_locks(error: &std::io::Error) -> bool {
    error.kind() == ErrorKind::Unsupported
        || matches!(error.raw_os_error(), Some(libc::EBADF | libc::ENOLCK | libc::EINVAL))
}

fn busy(folder: &Path, file: &File) -> DriverError {
    let others = file.metadata().map(|there| processes_with(there.dev(), there.ino())).unwrap_or_default();
    let other = others.into_iter().find(|pid| *pid != std::process::id());
    let who = other.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"));
    DriverError::new(
        ErrorClass::Busy,
        Code::InUse,
        format!("{who} is at work in the layers folder {}", folder.display()),
    )
    .hint("another state has this machine, too; snaptree domain show of each names its files")
}
