//! Opening files of Snaptree's in folders where somebody else may have been.
//!
//! Snaptree often runs as root, and the images that it works on often lie in a folder of somebody else. Whoever may write
//! a folder can put a link in the place of a file that is about to be opened there, and have root write what it leads to.
//! So: a file of ours is opened without following a link ([`open`]), folders of ours are gone into one by one without
//! following any ([`enter`]), and what lies in them counts only if nobody else may have changed it ([`check_folder`]).

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use nix::unistd::{Uid, User, geteuid};

/// The bits that let the group and all others write.
const OTHERS_WRITE: u32 = 0o022;

/// Why a folder's content cannot be taken for ours.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// It is a link, or a file.
    #[error("{} is not a folder, but {what}", path.display())]
    NotAFolder {
        /// The path.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// Somebody else owns it.
    #[error("the folder {} belongs to {owner}, who may put anything there", path.display())]
    Foreign {
        /// The folder.
        path: PathBuf,
        /// The owner's name, or number.
        owner: String,
    },
    /// Others may write it.
    #[error("the folder {} can be written by {who} (mode {mode:04o})", path.display())]
    Writable {
        /// The folder.
        path: PathBuf,
        /// Who may.
        who: &'static str,
        /// Its permission bits.
        mode: u32,
    },
    /// It cannot be looked at.
    #[error("cannot look at the folder {}", path.display())]
    Io {
        /// The folder.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
}

impl FolderError {
    /// The command that mends it, where one does.
    pub fn mend(&self) -> Option<String> {
        match self {
            Self::Foreign { path, owner } => {
                let us = user(geteuid());
                Some(format!(
                    "run snaptree as {owner}, or give it to {us} if you trust what is in it: \
                     chown -R {us} {}",
                    quoted(path)
                ))
            }
            Self::Writable { path, .. } => {
                Some(format!("let only its owner write it: chmod go-w {}", quoted(path)))
            }
            Self::NotAFolder { .. } | Self::Io { .. } => None,
        }
    }
}

/// The path as a shell takes it.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '-' | '_');
    if text.chars().all(plain) { text } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

/// The name of a user, or the number where there is none.
pub fn user(uid: Uid) -> String {
    User::from_uid(uid).ok().flatten().map_or_else(|| uid.to_string(), |user| user.name)
}

/// Opens a regular file of ours. A link in its place is refused (`ELOOP`), and a pipe or a device is not waited for.
///
/// Flags set on `how` before are replaced.
///
/// # Errors
/// It cannot be opened, or is no regular file.
pub fn open(path: &Path, how: &mut OpenOptions) -> io::Result<File> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let file = match how.custom_flags(flags.bits()).open(path) {
        Err(error) if error.raw_os_error() == Some(Errno::ELOOP as i32) => {
            let message = format!("{} is a symbolic link, and no file of Snaptree's", path.display());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        opened => opened?,
    };
    if !file.metadata()?.is_file() {
        let message = format!("{} is no regular file", path.display());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    Ok(file)
}

/// Opens the folder `below` in `base`, and follows no link on the way from `base` to it. What leads to `base` is the
/// user's own.
///
/// # Errors
/// One of the folders is missing, is a link, or cannot be opened; `below` leads up or is absolute.
pub fn enter(base: &Path, below: &Path) -> Result<File, FolderError> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_RDONLY;
    let failed = |path: &Path, source: io::Error| FolderError::Io { path: path.to_owned(), source };
    let mut path = base.to_owned();
    let mut folder =
        OpenOptions::new().read(true).custom_flags(flags.bits()).open(base).map_err(|e| failed(base, e))?;
    for component in below.components() {
        let name = match component {
            Component::Normal(name) => name,
            Component::CurDir => continue,
            _ => return Err(failed(below, io::ErrorKind::InvalidInput.into())),
        };
        path.push(name);
        let opened = openat(&folder, name, flags | OFlag::O_NOFOLLOW, Mode::empty());
        folder = match opened {
            Ok(opened) => File::from(opened),
            Err(Errno::ENOTDIR | Errno::ELOOP) => return Err(not_a_folder(&path)),
            Err(error) => return Err(failed(&path, error.into())),
        };
    }
    Ok(folder)
}

fn not_a_folder(path: &Path) -> FolderError {
    let is_link = path.symlink_metadata().is_ok_and(|found| found.is_symlink());
    let what = if is_link { "a symbolic link" } else { "a file" };
    FolderError::NotAFolder { path: path.to_owned(), what }
}

/// Whether a folder belongs to us or to root, and nobody else may write it. `path` may lead there by links of the user's.
///
/// # Errors
/// Somebody else may put anything there; or it cannot be looked at.
pub fn check_folder(path: &Path) -> Result<(), FolderError> {
    match path.metadata() {
        Ok(found) => check(path, &found),
        Err(source) => Err(FolderError::Io { path: path.to_owned(), source }),
    }
}

/// The same of folders of ours below `base`, each of which is no link: `below` and all above it, but not `base`.
///
/// # Errors
/// Somebody else may put anything into one of them; or one is missing, a link, or cannot be looked at.
pub fn check_folders(base: &Path, below: &Path) -> Result<(), FolderError> {
    let mut part = PathBuf::new();
    for component in below.components() {
        part.push(component);
        let path = base.join(&part);
        let folder = enter(base, &part)?;
        let found = folder.metadata().map_err(|source| FolderError::Io { path: path.clone(), source })?;
        check(&path, &found)?;
    }
    Ok(())
}

fn check(path: &Path, found: &Metadata) -> Result<(), FolderError> {
    let path = path.to_owned();
    if !found.is_dir() {
        return Err(not_a_folder(&path));
    }
    let owner = Uid::from_raw(found.uid());
    if owner != geteuid() && !owner.is_root() {
        return Err(FolderError::Foreign { path, owner: user(owner) });
    }
    let mode = found.mode() & 0o7777;
    match mode & OTHERS_WRITE {
        0 => Ok(()),
        bits => {
            let who = if bits & 0o002 == 0 { "a group" } else { "everybody" };
            Err(FolderError::Writable { path, who, mode })
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test")]

    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn a_link_in_a_file_s_place_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (victim, lock) = (dir.path().join("victim"), dir.path().join("lock"));
        fs::write(&victim, "precious").unwrap();
        symlink(&victim, &lock).unwrap();
        let mut write = OpenOptions::new();
        write.write(true).create(true).truncate(true);
        let refused = open(&lock, &mut write).unwrap_err();
        assert!(refused.to_string().contains("symbolic link"), "{refused}");
        assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
        assert!(open(&victim, OpenOptions::new().read(true)).is_ok());
    }

    #[test]
    fn a_pipe_in_a_file_s_place_is_refused_and_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("lock");
        nix::unistd::mkfifo(&pipe, Mode::S_IRWXU).unwrap();
        assert!(open(&pipe, OpenOptions::new().read(true)).is_err());
    }

    #[test]
    fn links_are_followed_to_the_base_and_not_below_it() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().join("real");
        fs::create_dir_all(real.join(".snaptree/id")).unwrap();
        symlink(&real, dir.path().join("base")).unwrap();
        let base = dir.path().join("base");
        assert!(enter(&base, Path::new(".snaptree/id")).is_ok());
        check_folders(&base, Path::new(".snaptree/id")).unwrap();
        fs::rename(real.join(".snaptree"), real.join("elsewhere")).unwrap();
        symlink(real.join("elsewhere"), real.join(".snaptree")).unwrap();
        assert!(matches!(enter(&base, Path::new(".snaptree/id")), Err(FolderError::NotAFolder { .. })));
        assert!(enter(&base, Path::new("../real")).is_err());
    }

    #[test]
    fn a_folder_that_others_may_write_is_refused_with_what_mends_it() {
        let dir = tempfile::tempdir().unwrap();
        check_folder(dir.path()).unwrap();
        for (mode, who) in [(0o777, "everybody"), (0o770, "a group"), (0o1777, "everybody")] {
            fs::set_permissions(dir.path(), Permissions::from_mode(mode)).unwrap();
            let refused = check_folder(dir.path()).unwrap_err();
            assert!(refused.to_string().contains(who), "{refused}");
            assert!(refused.mend().unwrap().contains("chmod go-w"), "{refused}");
        }
    }
}
