//! Where the daemon listens: a socket that its owner and the group snaptree may use.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use nix::unistd::{Group, chown};

use crate::exit::{Exit, Trouble};

/// The socket's name in a state directory, and in [`SYSTEM_FOLDER`].
pub const SOCKET_FILE: &str = "snaptree.sock";
/// Where the system's daemon listens.
pub const SYSTEM_FOLDER: &str = "/run/snaptree";
/// The state directory of the system's daemon.
pub const SYSTEM_STATE: &str = "/var/lib/snaptree";
/// Who may use it besides its owner.
const GROUP: &str = "snaptree";
const MODE: u32 = 0o660;
/// Longest path of a socket, in bytes: `sun_path` of unix(7), less the final zero.
const PATH_BYTES_MAX: usize = 107;

/// A socket that is listened on; the file goes when this is dropped.
pub struct Bound {
    listener: UnixListener,
    path: PathBuf,
    link: Option<PathBuf>,
}

/// Where a daemon on `state` listens if nothing else is said.
pub fn default_path(state: &Path) -> PathBuf {
    let system = Path::new(SYSTEM_FOLDER);
    if state == Path::new(SYSTEM_STATE) && system.is_dir() {
        return system.join(SOCKET_FILE);
    }
    state.join(SOCKET_FILE)
}

impl Bound {
    /// Listens on `path`. If that is not the state directory's own socket, a link there leads to it. The caller has
    /// the state's lock, so nobody else does this for the same state.
    ///
    /// # Errors
    /// The path is too long, something else is there, somebody answers there, or the operating system refuses.
    pub fn new(path: &Path, state: &Path) -> Result<Self> {
        let length = path.as_os_str().len();
        if length > PATH_BYTES_MAX {
            let message = format!(
                "the socket's path {} has {length} bytes, and a socket's path has at most {PATH_BYTES_MAX}",
                path.display()
            );
            return Err(Trouble::new(Exit::Failed, "usage", message)
                .hint("name a shorter one: `snaptree serve --socket PATH`")
                .into());
        }
        make_way(path)?;
        let listener =
            UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
        let own = state.join(SOCKET_FILE);
        let mut bound = Self { listener, path: path.to_owned(), link: None };
        admit(path)?;
        if own != path {
            make_way(&own)?;
            std::os::unix::fs::symlink(path, &own)
                .with_context(|| format!("cannot link {} to the socket", own.display()))?;
            bound.link = Some(own);
        }
        Ok(bound)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What connections come in by.
    ///
    /// # Errors
    /// The operating system refuses.
    pub fn listener(&self) -> Result<tokio::net::UnixListener> {
        let listener = self.listener.try_clone()?;
        listener.set_nonblocking(true)?;
        Ok(tokio::net::UnixListener::from_std(listener)?)
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        for path in std::iter::once(&self.path).chain(&self.link) {
            if let Err(error) = fs::remove_file(path) {
                tracing::warn!(%error, path = %path.display(), "the socket's file stays");
            }
        }
    }
}

/// Removes what a daemon that was killed left at `path`: a socket nobody answers on, or a link.
fn make_way(path: &Path) -> Result<()> {
    let found = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        other => other.with_context(|| format!("cannot look at {}", path.display()))?.file_type(),
    };
    if !found.is_socket() && !found.is_symlink() {
        let message = format!("{} is there, and is no socket", path.display());
        return Err(Trouble::new(Exit::Refused, "exists", message)
            .hint("name another place: `snaptree serve --socket PATH`")
            .into());
    }
    if found.is_socket() && UnixStream::connect(path).is_ok() {
        let message = format!("somebody answers on {}", path.display());
        return Err(Trouble::new(Exit::Refused, "in-use", message)
            .hint("name another place: `snaptree serve --socket PATH`")
            .into());
    }
    fs::remove_file(path).with_context(|| format!("cannot remove the stale {}", path.display()))
}

/// Lets the owner and the group in, and nobody else.
fn admit(path: &Path) -> Result<()> {
    let group = Group::from_name(GROUP).ok().flatten().map(|group| group.gid);
    if let Some(group) = group
        && let Err(error) = chown(path, None, Some(group))
    {
        tracing::warn!(%error, "the group {GROUP} cannot use the socket");
    }
    fs::set_permissions(path, fs::Permissions::from_mode(MODE))
        .with_context(|| format!("cannot set the mode of {}", path.display()))
}
