//! Programs that Snaptree runs: how long they live.
//!
//! ```text
//!                  asks something: Bound::ToUs       works for an operation: Bound::ToLock
//!  stdin           nothing                           the operation's lock
//!  nobody waits    its process group is killed       it goes on
//!  we are killed   the kernel kills it (the leash)   it goes on; recovery waits for the lock, or ends who has it
//! ```
//! Time limits and what is kept of its words are the callers', who know what it is about.
//!
//! The leash is this program itself, called once more: it tells the kernel to end it with us and becomes the other
//! program. What is set for a child between fork and exec would need unsafe code.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::OnceLock;

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, getppid};
use tokio::process::{Child, ChildStderr, ChildStdout, Command};

use crate::operation_lock::OperationLock;

/// The first argument of a leash.
const LEASH: &str = "__leash";
/// What a shell gives where a program cannot be started.
const NOT_STARTED: u8 = 127;

static LEASHES: OnceLock<PathBuf> = OnceLock::new();

/// From now on children that ask something end with this process, also where it is killed. Only for a program whose
/// `main` begins with [`become_leashed`].
pub fn leash_children() {
    // The file itself, whatever became of its name since.
    let _ = LEASHES.set("/proc/self/exe".into());
}

/// Where this process was started as a leash: becomes the program that it is for. Returns if it was not, or with the exit
/// code if that program cannot be started.
pub fn become_leashed(mut arguments: impl Iterator<Item = OsString>) -> Option<u8> {
    let _own = arguments.next();
    if arguments.next().as_deref() != Some(OsStr::new(LEASH)) {
        return None;
    }
    let (Some(parent), Some(program)) = (arguments.next(), arguments.next()) else {
        return Some(NOT_STARTED);
    };
    if let Err(error) = set_pdeathsig(Signal::SIGKILL) {
        return Some(not_started(&program, &error.into()));
    }
    // It may have died before the kernel was told.
    if getppid().to_string().as_str() != parent {
        return Some(NOT_STARTED);
    }
    let error = std::process::Command::new(&program).args(arguments).exec();
    Some(not_started(&program, &error))
}

fn not_started(program: &OsStr, error: &io::Error) -> u8 {
    eprintln!("cannot start {}: {error}", program.display());
    NOT_STARTED
}

/// How long a child lives.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Bound<'a> {
    /// As long as somebody waits for it.
    ToUs,
    /// Until it is done: it holds the lock of an operation.
    ToLock(&'a OperationLock),
}

/// A child that was started. Where it is bound to us, it and all that it started end when this is dropped.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    group: Option<Pid>,
}

/// Starts a program in the C locale or another, with its words in pipes.
///
/// # Errors
/// It is not there, or cannot be started; [`DriverError`](snaptree_engine::driver::DriverError)'s for a lock.
pub(crate) fn spawn(
    program: &Path,
    arguments: &[OsString],
    environment: &[(&str, &str)],
    bound: Bound<'_>,
) -> io::Result<Running> {
    let mut command = match (bound, LEASHES.get()) {
        (Bound::ToUs, Some(leash)) => {
            let program = found(program)?;
            let mut command = Command::new(leash);
            command.arg(LEASH).arg(std::process::id().to_string()).arg(program);
            command
        }
        _ => Command::new(program),
    };
    command.args(arguments).envs(environment.iter().copied()).stdout(Stdio::piped()).stderr(Stdio::piped());
    match bound {
        Bound::ToUs => command.stdin(Stdio::null()).process_group(0),
        Bound::ToLock(lock) => command.stdin(lock.for_child().map_err(io::Error::other)?),
    };
    let child = command.spawn()?;
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).map(Pid::from_raw);
    let group = if let Bound::ToUs = bound { pid } else { None };
    Ok(Running { child, group })
}

/// A program as a shell would find it.
fn found(program: &Path) -> io::Result<PathBuf> {
    if program.components().count() > 1 {
        return is_executable(program).map(|()| program.to_path_buf());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut candidates = std::env::split_paths(&path).map(|folder| folder.join(program));
    candidates.find(|candidate| is_executable(candidate).is_ok()).ok_or(io::ErrorKind::NotFound.into())
}

fn is_executable(path: &Path) -> io::Result<()> {
    let metadata = std::fs::metadata(path)?;
    if metadata.is_file() && metadata.permissions().mode() & 0o111 != 0 {
        return Ok(());
    }
    Err(io::ErrorKind::PermissionDenied.into())
}

impl Running {
    /// Its number.
    pub(crate) fn id(&self) -> Option<u32> {
        self.child.id()
    }

    /// What it says; once.
    pub(crate) fn streams(&mut self) -> (Option<ChildStdout>, Option<ChildStderr>) {
        (self.child.stdout.take(), self.child.stderr.take())
    }

    /// Waits for its end.
    pub(crate) async fn wait(&mut self) -> io::Result<ExitStatus> {
        let status = self.child.wait().await?;
        // What it left in the background is not ours to end.
        self.group = None;
        Ok(status)
    }

    /// Ends it, and waits until it is gone.
    pub(crate) async fn kill(&mut self) -> io::Result<()> {
        self.end_group();
        self.child.kill().await
    }

    fn end_group(&mut self) {
        if let Some(group) = self.group.take() {
            let _ = killpg(group, Signal::SIGKILL);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end_group();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_child_that_nobody_waits_for_ends_with_all_that_it_started() {
        let arguments = ["-c", "sleep 600 & echo $!; wait"].map(OsString::from);
        let mut running = spawn(Path::new("sh"), &arguments, &[], Bound::ToUs).unwrap();
        let (out, _) = running.streams();
        let mut line = String::new();
        let mut out = tokio::io::BufReader::new(out.unwrap());
        tokio::io::AsyncBufReadExt::read_line(&mut out, &mut line).await.unwrap();
        drop(running);
        // The pipe ends once the last one that has it is gone.
        let mut rest = String::new();
        tokio::io::AsyncReadExt::read_to_string(&mut out, &mut rest).await.unwrap();
        // A process that ends closes its files a moment before it is gone.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        let stat = || std::fs::read_to_string(format!("/proc/{}/stat", line.trim()));
        while stat().is_ok_and(|stat| !stat.contains(") Z")) {
            assert!(std::time::Instant::now() < deadline, "it lives on: {:?}", stat());
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_program_that_is_not_there_is_not_found() {
        assert_eq!(found(Path::new("no-such-program")).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(found(Path::new("sh")).unwrap().is_absolute());
        let plain = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(found(plain.path()).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    }
}
