//! Why a QEMU does not greet: by the kernel's list of UNIX sockets.
//!
//! QEMU's monitor takes one client at a time and leaves the next one in the queue; one that hangs leaves all there.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Longest list that is read.
const LIST_BYTES_MAX: u64 = 16 << 20;
/// `State` of a connection that the server has taken (`SS_CONNECTED`); one that waits is `SS_CONNECTING`.
const CONNECTED: &str = "03";
/// `Flags` of a socket that takes connections (`__SO_ACCEPTCON`).
const LISTENS: &str = "00010000";

/// Why a QEMU does not greet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::qemu) enum Silence {
    /// Another client has the monitor.
    Taken,
    /// It takes no connection at all.
    Hangs,
    /// The kernel does not know the socket by this name.
    Unknown,
}

impl Silence {
    /// What the kernel knows.
    pub(super) fn of(socket: &Path) -> Self {
        let mut list = String::new();
        let read =
            File::open("/proc/net/unix").and_then(|file| file.take(LIST_BYTES_MAX).read_to_string(&mut list));
        match (read, socket.to_str()) {
            (Ok(_), Some(socket)) => Self::parse(&list, socket),
            _ => Self::Unknown,
        }
    }

    fn parse(list: &str, socket: &str) -> Self {
        let mut listens = false;
        for line in list.lines() {
            // Num RefCount Protocol Flags Type St Inode Path; a path may have spaces.
            let mut fields = line.splitn(8, ' ').filter(|field| !field.is_empty());
            let (Some(flags), Some(state)) = (fields.nth(3), fields.nth(1)) else { continue };
            if !line.ends_with(&format!(" {socket}")) {
                continue;
            }
            if flags == LISTENS {
                listens = true;
            } else if state == CONNECTED {
                return Self::Taken;
            }
        }
        if listens { Self::Hangs } else { Self::Unknown }
    }
}

impl fmt::Display for Silence {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Taken => "another client has its monitor",
            Self::Hangs => "it hangs, and takes no connection",
            Self::Unknown => "another client has its monitor, or it hangs",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Silence;

    const HEAD: &str = "Num       RefCount Protocol Flags    Type St Inode Path\n";

    fn parsed(lines: &str) -> Silence {
        Silence::parse(&format!("{HEAD}{lines}"), "/run/vm qmp")
    }

    #[test]
    fn a_connection_that_was_taken_is_another_clients() {
        let listens = "00000000aaaaaaaa: 00000002 00000000 00010000 0001 01 11 /run/vm qmp\n";
        let waits = "00000000bbbbbbbb: 00000002 00000000 00000000 0001 02 12 /run/vm qmp\n";
        let taken = "00000000cccccccc: 00000003 00000000 00000000 0001 03 13 /run/vm qmp\n";
        let elsewhere = "00000000dddddddd: 00000003 00000000 00000000 0001 03 14 /run/other qmp\n";
        assert_eq!(parsed(&[listens, waits, taken].concat()), Silence::Taken);
        assert_eq!(parsed(&[listens, waits, elsewhere].concat()), Silence::Hangs);
        assert_eq!(parsed(elsewhere), Silence::Unknown);
        assert_eq!(parsed("garbage\n\n 1 2 3"), Silence::Unknown);
    }
}
