//! Processes: which one it is, whether it lives, its end, and who writes a file.
//!
//! A number alone may be another process's by now. With the moment at which it was started, in this boot, it is one
//! process for ever; and a pidfd that was opened before that was compared signals that one or nobody.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Where the start's time is in `/proc/PID/stat`, behind the name (see proc(5): the 22nd field, and the state the 3rd).
const STARTED_AT: usize = 19;
/// Bits of the flags in `/proc/PID/fdinfo` that tell how a file is open (`O_ACCMODE`); 0 is to read.
const ACCESS_MODE: u64 = 3;
/// How often a process is looked at where the kernel (before 5.3) has no pidfd.
const LOOK: Duration = Duration::from_millis(100);

/// One process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    pid: u32,
    /// In clock ticks since the boot.
    started: u64,
    boot: String,
}

/// What the kernel says of a number.
struct Stat {
    started: u64,
    is_zombie: bool,
}

fn stat(pid: u32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before it may have any byte.
    let (_, rest) = text.rsplit_once(") ")?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let is_zombie = matches!(fields.first(), Some(&"Z" | &"X"));
    Some(Stat { started: fields.get(STARTED_AT)?.parse().ok()?, is_zombie })
}

fn boot() -> String {
    fs::read_to_string(BOOT_ID).unwrap_or_default().trim().to_owned()
}

impl Process {
    /// The process that has this number now.
    pub(crate) fn of(pid: u32) -> Option<Self> {
        Some(Self { pid, started: stat(pid)?.started, boot: boot() })
    }

    /// Its number.
    pub(crate) const fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it was started after another one, or at the same tick.
    pub(crate) fn is_since(&self, other: &Self) -> bool {
        self.boot == other.boot && self.started >= other.started
    }

    /// As a line that [`parse`](Self::parse) reads.
    pub(crate) fn line(&self) -> String {
        format!("{} {} {}\n", self.boot, self.pid, self.started)
    }

    /// Reads a line.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace();
        let boot = words.next()?.to_owned();
        Some(Self { boot, pid: words.next()?.parse().ok()?, started: words.next()?.parse().ok()? })
    }

    /// Whether it lives. One that has ended and was not waited for has nothing open, once all its threads are gone.
    pub(crate) fn is_alive(&self) -> bool {
        let threads = || fs::read_dir(format!("/proc/{}/task", self.pid)).map_or(0, Iterator::count);
        stat(self.pid).is_some_and(|found| {
            found.started == self.started && self.boot == boot() && (!found.is_zombie || threads() > 1)
        })
    }

    /// A handle of this very process; none if it is gone.
    fn handle(&self) -> Option<rustix::io::Result<OwnedFd>> {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw)?;
        let handle = pidfd_open(pid, PidfdFlags::empty());
        // In this order: the number cannot be given away while the handle is there and the process is the one.
        match handle {
            Err(rustix::io::Errno::SRCH) => None,
            handle => self.is_alive().then_some(handle),
        }
    }

    /// Ends it at once.
    pub(crate) fn kill(&self) {
        self.signal(Signal::KILL);
    }

    /// Asks it to end.
    pub(crate) fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    fn signal(&self, signal: Signal) {
        let sent = match self.handle() {
            None => return,
            Some(Ok(handle)) => pidfd_send_signal(handle, signal),
            Some(Err(_)) => i32::try_from(self.pid)
                .ok()
                .and_then(Pid::from_raw)
                .map_or(Ok(()), |pid| rustix::process::kill_process(pid, signal)),
        };
        if let Err(error) = sent {
            tracing::warn!(pid = self.pid, ?signal, %error, "it could not be signalled");
        }
    }

    /// Waits for its end, told by the kernel; whether it came in time.
    pub(crate) async fn is_gone_within(&self, wait: Duration) -> bool {
        let until = Instant::now() + wait;
        let handle = match self.handle() {
            None => return true,
            Some(Ok(handle)) => readable(handle),
            Some(Err(_)) => None,
        };
        match handle {
            Some(handle) => {
                let ended = tokio::time::timeout_at(until, handle.readable()).await;
                ended.is_ok_and(|ended| ended.is_ok()) || !self.is_alive()
            }
            None => {
                while self.is_alive() {
                    if Instant::now() >= until {
                        return false;
                    }
                    tokio::time::sleep(LOOK).await;
                }
                true
            }
        }
    }
}

/// Told by the kernel when the process of the handle has ended.
#[expect(
    deprecated,
    reason = "what it is deprecated for are types that change or close their descriptor: OwnedFd does not"
)]
fn readable(handle: OwnedFd) -> Option<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(handle, Interest::READABLE).ok()
}

/// Who has files open for writing, by device and inode; this program is left out, and what cannot be looked at: the
/// processes of others, where it does not run as root.
pub(crate) fn writers_of(inodes: &[(u64, u64)]) -> BTreeMap<(u64, u64), u32> {
    let mut found = BTreeMap::new();
    if inodes.is_empty() {
        return found;
    }
    let program =
        |pid: &str| fs::metadata(format!("/proc/{pid}/exe")).ok().map(|file| (file.dev(), file.ino()));
    let ours = program("self");
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = process.file_name();
        let Some((text, pid)) = name.to_str().and_then(|name| Some((name, name.parse().ok()?))) else {
            continue;
        };
        for open in fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten() {
            let Ok(file) = fs::metadata(open.path()) else { continue };
            let inode = (file.dev(), file.ino());
            let number = open.file_name();
            if inodes.contains(&inode) && is_for_writing(pid, number.to_str().unwrap_or_default()) {
                if program(text) == ours {
                    break;
                }
                found.entry(inode).or_insert(pid);
            }
        }
    }
    found
}

fn is_for_writing(pid: u32, descriptor: &str) -> bool {
    let text = fs::read_to_string(format!("/proc/{pid}/fdinfo/{descriptor}")).unwrap_or_default();
    let flags = text.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| u64::from_str_radix(flags.trim(), 8).ok());
    flags.is_some_and(|flags| flags & ACCESS_MODE != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_process_is_told_from_another_one_and_its_end_is_heard() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::of(child.id()).unwrap();
        assert_eq!(Process::parse(&process.line()), Some(process.clone()));
        assert!(process.is_alive());
        assert!(!process.is_gone_within(Duration::from_millis(10)).await);
        let other = Process { started: process.started - 1, ..process.clone() };
        assert!(!other.is_alive(), "the same number, another process");
        other.kill();
        assert!(process.is_alive(), "a later process of that number is not signalled");
        process.kill();
        assert!(process.is_gone_within(Duration::from_secs(10)).await);
        assert!(!process.is_alive());
        child.wait().unwrap();
        assert_eq!(Process::parse("x y"), None);
    }

    #[test]
    fn who_has_a_file_open_for_writing_is_found_and_who_reads_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        fs::write(&path, "x").unwrap();
        let metadata = fs::metadata(&path).unwrap();
        let inode = (metadata.dev(), metadata.ino());
        let held = |file: fs::File| {
            let mut child = std::process::Command::new("sleep").arg("60").stdin(file).spawn().unwrap();
            let found = writers_of(&[inode]).get(&inode).copied();
            let pid = child.id();
            child.kill().unwrap();
            child.wait().unwrap();
            (found, pid)
        };
        assert_eq!(held(fs::File::open(&path).unwrap()).0, None);
        let (found, pid) = held(fs::OpenOptions::new().append(true).open(&path).unwrap());
        assert_eq!(found, Some(pid));
        assert!(writers_of(&[inode]).is_empty());
    }
}
