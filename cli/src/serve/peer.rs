//! Who asks over the socket, as the kernel vouches for it.

use axum::http::HeaderMap;
use nix::unistd::{Uid, User, gethostname};
use snaptree_engine::engine::Requester;
use snaptree_engine::event::{Actor, Origin};
use tokio::net::unix::UCred;

use crate::wire::SUDO_USER_HEADER;

/// Longest name that is taken from a claim.
const NAME_CHARS_MAX: usize = 256;

/// The other end of a connection, as it was when it connected.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    uid: u32,
    pid: u32,
}

impl From<UCred> for Peer {
    fn from(cred: UCred) -> Self {
        Self { uid: cred.uid(), pid: cred.pid().and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0) }
    }
}

impl Peer {
    /// Who asks.
    pub fn requester(self, headers: &HeaderMap) -> Requester {
        let name = User::from_uid(Uid::from_raw(self.uid)).ok().flatten().map(|user| user.name);
        let name = name.filter(|name| !name.is_empty() && !name.chars().any(char::is_control));
        let host = gethostname().map(|host| host.to_string_lossy().into_owned());
        let claim = headers.get(SUDO_USER_HEADER).and_then(|value| value.to_str().ok());
        Requester {
            actor: Actor::User(name.unwrap_or_else(|| self.uid.to_string())),
            origin: Origin {
                uid: self.uid,
                host: host.unwrap_or_else(|_| "unknown".to_owned()),
                pid: self.pid,
                via: "socket".to_owned(),
                sudo_user: claim
                    .map(|name| name.chars().filter(|c| !c.is_control()).take(NAME_CHARS_MAX).collect()),
            },
        }
    }
}
