//! Who asks, as the kernel vouches for it.

use nix::unistd::{Uid, User, gethostname, getuid};
use snaptree_engine::engine::Requester;
use snaptree_engine::event::{Actor, Origin};

/// The kernel's word for "nobody logged in".
const NO_LOGIN: u32 = u32::MAX;

/// The person who started this process. `sudo` and `su` do not change the login uid.
pub fn this_user() -> Requester {
    let uid = login_uid().unwrap_or_else(|| getuid().as_raw());
    let name = User::from_uid(Uid::from_raw(uid)).ok().flatten().map(|user| user.name);
    let name = name.filter(|name| !name.is_empty() && !name.chars().any(char::is_control));
    let host = gethostname().map(|host| host.to_string_lossy().into_owned());
    let sudo_user = std::env::var("SUDO_USER").ok();
    Requester {
        actor: Actor::User(name.unwrap_or_else(|| uid.to_string())),
        origin: Origin {
            uid,
            host: host.unwrap_or_else(|_| "unknown".to_owned()),
            pid: std::process::id(),
            via: "cli".to_owned(),
            sudo_user: sudo_user.map(|name| name.chars().filter(|c| !c.is_control()).take(256).collect()),
        },
    }
}

fn login_uid() -> Option<u32> {
    let text = std::fs::read_to_string("/proc/self/loginuid").ok()?;
    text.trim().parse().ok().filter(|uid| *uid != NO_LOGIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_somebody() {
        let requester = this_user();
        assert!(requester.actor.to_string().starts_with("user:"));
        assert_eq!(requester.origin.pid, std::process::id());
        assert_eq!(requester.origin.via, "cli");
    }
}
