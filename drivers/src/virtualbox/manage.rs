//! `VBoxManage`: one call, with its limits, and what its failures mean.
//!
//! Progress and errors come on standard error, also where all goes well; exit 0 beside an error there is a failure. A
//! call that was cut short proves nothing: `VBoxSVC`, which does the work, goes on without its client.

use std::convert::Infallible;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use snaptree_engine::driver::{DriverError, ErrorClass, Progress, StepProgress};
use snaptree_engine::operation::{Code, Failure};
use tokio::io::{AsyncRead, AsyncReadExt as _};

use super::repair;
use crate::child::{self, Bound};
use crate::operation_lock::OperationLock;

/// Most bytes that are kept of what a call writes to one stream; the rest is read and dropped.
const OUTPUT_BYTES_MAX: usize = 4 << 20;
/// How long a call may take that only reads or writes settings. Ten seconds were seen where `VBoxSVC` comes up just as
/// another one ends, and a call waits for whatever `VBoxSVC` is at.
pub(super) const QUICK: Duration = Duration::from_secs(60);
/// How long a call may take that moves data, or that waits for one that does.
pub(super) const MOVING: Duration = Duration::from_secs(24 * 3600);
/// How often a question is asked, and how long is waited in between.
const ASKS_MAX: u32 = 10;
const BETWEEN_ASKS: Duration = Duration::from_millis(300);
/// How often is looked whether `VBoxSVC` is still there, and how long a VBoxManage may take to notice that it is not.
const BETWEEN_LOOKS: Duration = Duration::from_millis(500);
const NOTICES: Duration = Duration::from_secs(10);
/// States in which a machine is for as long as something is done to it.
const PASSING: &[&str] = &[
    "Snapshotting",
    "DeletingSnapshot",
    "RestoringSnapshot",
    "LiveSnapshotting",
    "Saving",
    "Restoring",
    "Starting",
    "Stopping",
    "SettingUp",
];

/// The program, and how it is called.
#[derive(Clone, Debug)]
pub(super) struct Manage {
    program: PathBuf,
}

/// One call.
pub(super) struct Call<'a> {
    args: Vec<String>,
    limit: Duration,
    lock: Option<&'a OperationLock>,
    progress: Option<&'a dyn Progress>,
}

impl<'a> Call<'a> {
    /// One that is over soon.
    pub(super) fn quick<'s>(args: impl IntoIterator<Item = &'s str>) -> Self {
        let args = args.into_iter().map(str::to_owned).collect();
        Self { args, limit: QUICK, lock: None, progress: None }
    }

    /// One that may move all of a disk.
    pub(super) fn moving(mut self) -> Self {
        self.limit = MOVING;
        self
    }

    /// One that works for an operation.
    pub(super) fn working(mut self, lock: &'a OperationLock, progress: &'a dyn Progress) -> Self {
        (self.lock, self.progress) = (Some(lock), Some(progress));
        self
    }
}

impl Manage {
    pub(super) fn new(program: PathBuf) -> Self {
        Self { program }
    }

    /// Asks what changes nothing, and again where `VBoxSVC` was just coming or going.
    ///
    /// # Errors
    /// As [`Manage::run`].
    pub(super) async fn ask(&self, args: &[&str], limit: Duration) -> Result<String, DriverError> {
        let mut tries = 1;
        loop {
            let call = Call { limit, ..Call::quick(args.iter().copied()) };
            match self.run(call).await {
                Err(error) if passes(&error) && tries < ASKS_MAX => tries += 1,
                answer => return answer,
            }
            tokio::time::sleep(BETWEEN_ASKS).await;
        }
    }

    /// Calls it; returns what it wrote to its standard output.
    ///
    /// # Errors
    /// It cannot be started, took too long, or says that it failed.
    #[tracing::instrument(level = "debug", skip_all, fields(args = ?call.args))]
    pub(super) async fn run(&self, call: Call<'_>) -> Result<String, DriverError> {
        repair::machines(None).await?;
        let bound = call.lock.map_or(Bound::ToUs, Bound::ToLock);
        let arguments: Vec<OsString> = call.args.iter().map(OsString::from).collect();
        let locale = [("LC_ALL", "C.UTF-8"), ("LANG", "C.UTF-8")];
        let mut child = child::spawn(&self.program, &arguments, &locale, bound).map_err(|error| {
            DriverError::permanent(Code::Io, format!("cannot start {}: {error}", self.program.display()))
                .hint("install VirtualBox, or name its VBoxManage by VBOXMANAGE or the setting virtualbox.manage")
        })?;
        let (out, err) = child.streams();
        let pid = child.id();
        let work = async { tokio::join!(child.wait(), kept(out, None), kept(err, call.progress)) };
        let work = async {
            tokio::select! {
                never = end_without_service(pid) => match never {},
                ended = work => ended,
            }
        };
        let what = call.args.first().map_or("", String::as_str);
        let Ok((status, stdout, stderr)) = tokio::time::timeout(call.limit, work).await else {
            let message = format!("VBoxManage {what} took longer than {} s", call.limit.as_secs());
            return Err(DriverError::unknown(Code::Timeout, message));
        };
        let status = status
            .map_err(|error| DriverError::unknown(Code::Io, "cannot wait for VBoxManage").source(error))?;
        if status.success() && !stderr.contains("VBoxManage: error:") {
            return Ok(stdout);
        }
        Err(failure(what, status, &stderr))
    }
}

/// Whether a question that failed so may be answered the next time: `VBoxSVC` was coming or going, or either was killed.
fn passes(error: &DriverError) -> bool {
    match error.class {
        ErrorClass::Transient => true,
        ErrorClass::Unknown => error.failure.code == Code::Io,
        ErrorClass::Busy | ErrorClass::Permanent => false,
    }
}

/// Ends a VBoxManage whose `VBoxSVC` died: most notice it, and some go on asking it for ever (seen).
async fn end_without_service(pid: Option<u32>) -> Infallible {
    let mut known = None;
    loop {
        tokio::time::sleep(BETWEEN_LOOKS).await;
        let now = repair::service();
        known = known.or(now);
        if known == now {
            continue;
        }
        tokio::time::sleep(NOTICES).await;
        if let Some(pid) = pid.and_then(|pid| i32::try_from(pid).ok()) {
            tracing::warn!(pid, "VBoxSVC is gone, and VBoxManage does not notice: ending it");
            // One that has ended is not waited for yet, so the number is still its own.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        std::future::pending::<()>().await;
    }
}

/// Reads a stream to its end.
async fn kept(stream: Option<impl AsyncRead + Unpin>, progress: Option<&dyn Progress>) -> String {
    let Some(mut stream) = stream else { return String::new() };
    let (mut all, mut buffer) = (Vec::new(), vec![0; 16 << 10]);
    while let Ok(count @ 1..) = stream.read(&mut buffer).await {
        let room = OUTPUT_BYTES_MAX.saturating_sub(all.len());
        all.extend_from_slice(&buffer[..count.min(room)]);
        if let Some(progress) = progress
            && let Some(percent) = last_percent(&all)
        {
            progress.step_progress(StepProgress::Percent(percent));
        }
    }
    String::from_utf8_lossy(&all).into_owned()
}

/// The last `NN%` that was written. More than a hundred was seen.
fn last_percent(written: &[u8]) -> Option<u8> {
    let tail = &written[written.len().saturating_sub(64)..];
    let end = tail.iter().rposition(|byte| *byte == b'%')?;
    let digits: Vec<u8> =
        tail[..end].iter().rev().take_while(|byte| byte.is_ascii_digit()).copied().collect();
    let text: String = digits.into_iter().rev().map(char::from).collect();
    text.parse::<u8>().ok().map(|percent| percent.min(100))
}

/// How much is told of what a failed call said.
const WHY_LINES_MAX: usize = 3;
const WHY_CHARS_MAX: usize = 600;

/// What a failed call means.
fn failure(what: &str, status: ExitStatus, stderr: &str) -> DriverError {
    let said: Vec<&str> =
        stderr.lines().filter_map(|line| line.strip_prefix("VBoxManage: error: ")).collect();
    let of = |mark: &str| said.iter().any(|line| line.contains(mark));
    let why = why(&said).unwrap_or_else(|| match status.code() {
        None => "it was ended by a signal".to_owned(),
        Some(_) => "it gave no reason".to_owned(),
    });
    let passing =
        || PASSING.iter().any(|state| of(&format!("machine state: {state}"))) || of("while it is changing");
    let (class, code) = match status.code() {
        // VBoxSVC went away under it, or it was killed.
        None | Some(133 | 137 | 143) => (ErrorClass::Unknown, Code::Io),
        // VBoxSVC is just ending or beginning, and nothing was asked of it; the code that goes with it varies.
        _ if of("NS_ERROR_FACTORY_NOT_REGISTERED") || of("Failed to create the VirtualBox object") => {
            (ErrorClass::Transient, Code::Io)
        }
        _ if of("already locked for a session") || of("is not ready") || of("VBOX_E_VM_ERROR") => {
            (ErrorClass::Busy, Code::InUse)
        }
        _ if of("0x80bb0002") && (passing() || of("while it is changing the state")) => {
            (ErrorClass::Busy, Code::InUse)
        }
        _ if of("0x80bb0002") => (ErrorClass::Permanent, Code::InUse),
        _ if of("0x80bb0007") => (ErrorClass::Permanent, Code::Unsupported),
        _ if of("has more than one child hard disk") => (ErrorClass::Permanent, Code::Unsupported),
        // Whether it is there is told by the settings, never by a code; and what had begun may have gone on.
        _ if of("Could not find") || of("VERR_FILE_NOT_FOUND") || of("functionality is limited") => {
            (ErrorClass::Unknown, Code::Drift)
        }
        _ if stderr.contains("0%...") => (ErrorClass::Unknown, Code::Io),
        _ if of("VERR_DISK_FULL") => (ErrorClass::Permanent, Code::NoSpace),
        _ => (ErrorClass::Permanent, Code::Io),
    };
    let failure = Failure::new(code, format!("VBoxManage {what} failed: {why}"));
    DriverError { class, failure, source: None }
}

/// What it says went wrong: the first line says what could not be done, and the next one why.
fn why(said: &[&str]) -> Option<String> {
    let mut lines: Vec<&str> = said.iter().copied().filter(|line| !line.starts_with("Details: ")).collect();
    lines.dedup();
    lines.truncate(WHY_LINES_MAX);
    let told = lines.join(" ").chars().filter(|c| !c.is_control()).take(WHY_CHARS_MAX).collect::<String>();
    Some(told).filter(|told| !told.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt as _;

    fn class(code: i32, stderr: &str) -> ErrorClass {
        failure("snapshot", ExitStatus::from_raw(code << 8), stderr).class
    }

    #[test]
    fn a_failure_is_of_the_class_that_was_seen_of_the_real_thing() {
        let said = |text: &str, code: &str| {
            format!("VBoxManage: error: {text}\nVBoxManage: error: Details: code {code}, component X\n")
        };
        for (code, stderr, expected) in [
            (133, String::new(), ErrorClass::Unknown),
            (
                1,
                said(
                    "Failed to create the VirtualBox object!",
                    "NS_ERROR_FACTORY_NOT_REGISTERED (0x80040154)",
                ),
                ErrorClass::Transient,
            ),
            (
                1,
                said("Failed to create the VirtualBox object!", "NS_ERROR_FAILURE (0x80004005)"),
                ErrorClass::Transient,
            ),
            (
                1,
                said(
                    "The machine 'a' is already locked for a session (or being unlocked)",
                    "VBOX_E_INVALID_OBJECT_STATE (0x80bb0007)",
                ),
                ErrorClass::Busy,
            ),
            (
                1,
                said(
                    "Cannot take a snapshot of the virtual machine while it is changing state (machine state: DeletingSnapshot)",
                    "VBOX_E_INVALID_VM_STATE (0x80bb0002)",
                ),
                ErrorClass::Busy,
            ),
            (
                1,
                said(
                    "Cannot take a live snapshot of a virtual machine unless it is running.",
                    "VBOX_E_INVALID_VM_STATE (0x80bb0002)",
                ),
                ErrorClass::Permanent,
            ),
            (
                1,
                said(
                    "Cannot take another snapshot for machine 'g', because it exceeds the maximum snapshot depth limit.",
                    "VBOX_E_INVALID_OBJECT_STATE (0x80bb0007)",
                ),
                ErrorClass::Permanent,
            ),
            (
                1,
                said("Could not find a snapshot with UUID {..}", "NS_ERROR_FAILURE (0x80004005)"),
                ErrorClass::Unknown,
            ),
            (
                1,
                "0%...NS_ERROR_FAILURE\n".to_owned()
                    + &said(
                        "Hard disk 'd.vdi' has more than one child hard disk (2)",
                        "NS_ERROR_FAILURE (0x80004005)",
                    ),
                ErrorClass::Permanent,
            ),
            (
                1,
                "0%...NS_ERROR_FAILURE\n".to_owned()
                    + &said("Could not open the medium 'x.vdi'.", "VERR_FILE_NOT_FOUND"),
                ErrorClass::Unknown,
            ),
            (0, said("something", "NS_ERROR_FAILURE (0x80004005)"), ErrorClass::Permanent),
        ] {
            assert_eq!(class(code, &stderr), expected, "{stderr}");
        }
    }

    #[test]
    fn the_reason_is_told_with_what_could_not_be_done() {
        let stderr = "0%...\nProgress state: NS_ERROR_FAILURE\nVBoxManage: error: Could not open the medium 'd.vdi'.\n\
                      VBoxManage: error: VD: error VERR_FILE_NOT_FOUND opening image file 'd.vdi'\n\
                      VBoxManage: error: Details: code NS_ERROR_FAILURE (0x80004005), component MediumWrap\n";
        let told = failure("snapshot", ExitStatus::from_raw(256), stderr).failure.message;
        assert_eq!(
            told,
            "VBoxManage snapshot failed: Could not open the medium 'd.vdi'. VD: error VERR_FILE_NOT_FOUND opening image \
             file 'd.vdi'"
        );
    }

    #[test]
    fn progress_is_the_last_percentage_and_never_more_than_all() {
        for (written, percent) in [
            ("", None),
            ("0%...10%...", Some(10)),
            ("0%...133%", Some(100)),
            ("%", None),
            ("90%...NS_ERROR", Some(90)),
        ] {
            assert_eq!(last_percent(written.as_bytes()), percent, "{written}");
        }
    }
}
