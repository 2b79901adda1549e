//! Running qemu-img.
//!
//! Every child has a time limit, a limit on what is read of its output, the C locale, and, where it works on layers,
//! the operation's lock as its stdin. Such a child is not killed when nobody waits for it any more: recovery waits for
//! it, or ends it, through that lock.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use serde_json::json;
use snaptree_engine::driver::{CallOff, DriverError, ErrorClass, Progress, StepContext, StepProgress};
use snaptree_engine::operation::Code;
use tokio::io::{AsyncRead, AsyncReadExt};

use super::bitmaps::Bitmap;
use super::qcow2::FormatOptions;
use crate::child::{self, Bound};
use crate::operation_lock::OperationLock;

/// For what reads all tables of an image. Whoever asks for it has the state's lock meanwhile.
const CHECKING: Duration = Duration::from_secs(60);
/// What a shell adds to a signal's number for its exit code.
const SHELL_SIGNALLED: i32 = 128;
/// What the C library says of errors that pass: the host was short of something, or a file server was away.
const PASSING: [&str; 7] = [
    "Cannot allocate memory",
    "Resource temporarily unavailable",
    "Too many open files in system",
    "Interrupted system call",
    "Connection timed out",
    "Connection refused",
    "Stale file handle",
];
/// How often it is asked whether what it works for was called off.
const LOOK: Duration = Duration::from_millis(100);
/// What QEMU says where the page cache cannot be gone round.
const NO_DIRECT: &str = "O_DIRECT";
/// What a write fails with that is refused in [`shielded`].
const REFUSED: &str = "Input/output error";
/// In what QEMU says where it was built without the driver that refuses them.
const NO_SHIELD: &str = "'blkdebug'";
const OUTPUT_BYTES_MAX: usize = 1 << 20;
const MESSAGE_CHARS_MAX: usize = 600;
const MESSAGE_LINES_MAX: usize = 4;

/// How long qemu-img and QEMU may take. Past it the end of qemu-img's work is unknown, and is made out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ToolTimes {
    /// For what reads or writes headers.
    pub header: Duration,
    /// For what moves a disk's data.
    pub copy: Duration,
    /// For a machine that is started, until it is there.
    pub start: Duration,
}

impl Default for ToolTimes {
    fn default() -> Self {
        Self {
            header: Duration::from_secs(30),
            copy: Duration::from_secs(24 * 3600),
            start: Duration::from_secs(60),
        }
    }
}

/// The program.
#[derive(Clone, Debug)]
pub(super) struct QemuImg {
    pub(super) program: PathBuf,
    pub(super) times: ToolTimes,
    /// How many bytes a second it and QEMU's jobs may move; 0 for any number. qemu-img 7.2 knows no limit for a rebase.
    pub(super) speed_bytes: u64,
}

/// What a child does, for how long it may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    Header,
    Check,
    Copy,
}

/// What a child said.
#[derive(Debug)]
struct Output {
    /// How it ended.
    status: ExitStatus,
    /// The beginning of what it wrote to stdout.
    stdout: String,
    /// The beginning of what it wrote to stderr.
    stderr: String,
}

/// How a child is run.
struct Run<'a> {
    args: Vec<OsString>,
    work: Work,
    lock: Option<&'a OperationLock>,
    progress: Option<&'a dyn Progress>,
    call_off: CallOff<'a>,
}

/// Whom a child that moves data works for.
#[derive(Clone, Copy)]
pub(super) struct Patron<'a> {
    /// Who watches.
    pub(super) progress: &'a dyn Progress,
    /// Whether somebody wants it gone meanwhile.
    pub(super) call_off: CallOff<'a>,
}

impl<'a> From<&StepContext<'a>> for Patron<'a> {
    fn from(context: &StepContext<'a>) -> Self {
        Self { progress: context.progress, call_off: context.call_off }
    }
}

impl QemuImg {
    pub(super) fn new(program: PathBuf) -> Self {
        Self { program, times: ToolTimes::default(), speed_bytes: 0 }
    }

    /// Makes an empty overlay, laid out as QEMU does by default where nothing is said of it. The caller has made `file`
    /// itself, exclusively.
    pub(super) async fn create(
        &self,
        lock: &OperationLock,
        file: &Path,
        on: &Path,
        virtual_size_bytes: u64,
        format: Option<FormatOptions>,
    ) -> Result<(), DriverError> {
        let size = virtual_size_bytes.to_string();
        let options = as_options(format);
        let args = ["create", "-q", "-u", "-f", "qcow2"].map(OsStr::new).into_iter();
        let args = args.chain(options.iter().map(OsString::as_os_str));
        let args = args.chain(["-F", "qcow2", "-b"].map(OsStr::new));
        let args = args.chain([on.as_os_str(), file.as_os_str(), OsStr::new(&size)]);
        self.done("create", file, Run::quick(args).lock(lock)).await
    }

    /// Puts `file` upon `onto` by its header alone; the content must be the same.
    pub(super) async fn rebase_header(
        &self,
        lock: &OperationLock,
        file: &Path,
        onto: &Path,
        format: &str,
    ) -> Result<(), DriverError> {
        let args = ["rebase", "-q", "-u", "-f", "qcow2", "-F", format, "-b"].map(OsStr::new);
        let args = args.into_iter().chain([onto.as_os_str(), file.as_os_str()]);
        self.done("rebase", file, Run::quick(args).lock(lock)).await
    }

    /// Copies into `file` what it needs to stand upon `onto` instead of its parent, and writes its tables. Its header is
    /// the caller's to write, once that is on disk: qemu-img itself writes it before the tables that make it true (seen;
    /// killed between, the layer reads wrong). So each write to the header is refused, which is the last that qemu-img
    /// tries, and what it then says tells that all else was done.
    ///
    /// Where that cannot be had it is done with each write on disk before the next, at half the speed, and the header is
    /// written as well: no kill at any write changed what the layer reads as.
    pub(super) async fn pull(
        &self,
        lock: &OperationLock,
        file: &Path,
        onto: &Path,
        patron: Patron<'_>,
    ) -> Result<(), DriverError> {
        if let (Some(shielded), Some(onto_text)) = (shielded(file), onto.to_str()) {
            let args = ["rebase", "-p", "-F", "qcow2", "-b", onto_text, shielded.as_str()].map(OsStr::new);
            let mut output = self.run("rebase", file, Run::moving(args).lock(lock).patron(patron)).await?;
            output.stderr = output.stderr.replace(&shielded, &file.display().to_string());
            if output.status.success() || output.refused_header_alone(onto_text) {
                return Ok(());
            }
            // A dirty bitmap in the image changes the header too, when the image is opened (seen).
            let refused = output.stderr.contains(REFUSED) || output.stderr.contains(NO_SHIELD);
            if output.status.code() != Some(1) || !refused {
                return Err(output.failure("rebase", file));
            }
            tracing::info!(file = %file.display(), why = output.summary(), "each write waits for the disk");
        }
        match self.rebase(lock, file, (onto, "qcow2"), Some("directsync"), patron).await {
            // Not every file system knows it; that is said when the file is opened, before anything is written.
            Err(error) if error.failure.message.contains(NO_DIRECT) => {
                self.rebase(lock, file, (onto, "qcow2"), Some("writethrough"), patron).await
            }
            done => done,
        }
    }

    /// Puts `file` upon `onto`, of that format, and copies what differs; killed in it, `file` may read wrong, but with
    /// a `cache` that has each write on disk before the next.
    pub(super) async fn rebase(
        &self,
        lock: &OperationLock,
        file: &Path,
        (onto, format): (&Path, &str),
        cache: Option<&str>,
        patron: Patron<'_>,
    ) -> Result<(), DriverError> {
        let args = ["rebase", "-p", "-f", "qcow2", "-F", format, "-b"].map(OsStr::new);
        let args = args.into_iter().chain([onto.as_os_str(), file.as_os_str()]);
        let cache = cache.into_iter().flat_map(|cache| ["-t", cache]).map(OsStr::new);
        self.done("rebase", file, Run::moving(args.chain(cache)).lock(lock).patron(patron)).await
    }

    /// Works on an internal snapshot of an image: `-c` creates it, `-a` applies it, `-d` deletes it.
    pub(super) async fn snapshot(
        &self,
        lock: &OperationLock,
        act: &'static str,
        tag: &str,
        file: &Path,
    ) -> Result<(), DriverError> {
        let args = ["snapshot", "-q", act, tag].map(OsStr::new).into_iter().chain([file.as_os_str()]);
        self.done("snapshot", file, Run::moving(args).lock(lock)).await
    }

    /// Writes all that `from` and the layers between have into `into`. `from` itself is not changed.
    pub(super) async fn commit(
        &self,
        lock: &OperationLock,
        from: &Path,
        into: &Path,
        patron: Patron<'_>,
    ) -> Result<(), DriverError> {
        let rate = self.rate();
        let args = ["commit", "-p", "-d", "-f", "qcow2"].map(OsStr::new).into_iter();
        let args = args.chain(rate.iter().map(OsString::as_os_str));
        let args = args.chain([OsStr::new("-b"), into.as_os_str(), from.as_os_str()]);
        self.done("commit", from, Run::moving(args).lock(lock).patron(patron)).await
    }

    /// Adds what a dirty bitmap of `from` has marked to the one of the same name in `into`, which is made if it is not
    /// there.
    pub(super) async fn merge_bitmap(
        &self,
        lock: &OperationLock,
        (from, bitmap): (&Path, &Bitmap),
        into: &Path,
        is_there: IsThere,
    ) -> Result<(), DriverError> {
        let granularity = bitmap.granularity_bytes.to_string();
        let mut args = vec!["bitmap".into()];
        if is_there == IsThere::No {
            args.extend(["--add", "-g", &granularity].map(OsString::from));
        }
        args.extend(["--merge", &bitmap.name].map(OsString::from));
        if is_there == IsThere::No && !bitmap.records {
            args.push("--disable".into());
        }
        args.extend(["-F".into(), "qcow2".into(), "-b".into(), from.into(), "-f".into(), "qcow2".into()]);
        args.extend([into.into(), OsString::from(&bitmap.name)]);
        self.done("bitmap", into, Run::quick(args.iter().map(OsString::as_os_str)).lock(lock)).await
    }

    /// Copies an image of `format`, with all that it is built upon, into one qcow2 file, laid out as `like` says.
    pub(super) async fn convert(
        &self,
        lock: Option<&OperationLock>,
        (from, format): (&Path, &str),
        into: &Path,
        like: Option<FormatOptions>,
        patron: Patron<'_>,
    ) -> Result<(), DriverError> {
        let rate = self.rate();
        let options = as_options(like);
        let args = ["convert", "-p", "-f", format, "-O", "qcow2"].map(OsStr::new).into_iter();
        let args = args.chain(options.iter().map(OsString::as_os_str));
        let args = args.chain(rate.iter().map(OsString::as_os_str));
        let args = args.chain([from.as_os_str(), into.as_os_str()]);
        let mut run = Run::moving(args).patron(patron);
        run.lock = lock;
        self.done("convert", from, run).await
    }

    /// Whether two images read the same.
    pub(super) async fn compare(
        &self,
        lock: Option<&OperationLock>,
        (a, a_format): (&Path, &str),
        (b, b_format): (&Path, &str),
    ) -> Result<(), DriverError> {
        let args = ["compare", "-q", "-f", a_format, "-F", b_format].map(OsStr::new);
        let mut run = Run::moving(args.into_iter().chain([a.as_os_str(), b.as_os_str()]));
        run.lock = lock;
        let output = self.run("compare", a, run).await?;
        match output.status.code() {
            Some(0) => Ok(()),
            Some(1) => Err(DriverError::permanent(
                Code::BadImage,
                format!("the copy {} does not read as {} does", b.display(), a.display()),
            )),
            _ => Err(output.failure("compare", a)),
        }
    }

    /// Has QEMU mend what it would mend by itself when it next opens the image.
    pub(super) async fn mend(&self, lock: Option<&OperationLock>, file: &Path) -> Result<(), DriverError> {
        let args = ["check", "-q", "-f", "qcow2", "-r", "all"].map(OsStr::new);
        let mut run = Run::moving(args.into_iter().chain([file.as_os_str()]));
        run.lock = lock;
        self.done("check", file, run).await
    }

    /// Looks for damage. What can be lived with comes back as a note: so what is wrong with an image that is `dirty`, as
    /// far as QEMU mends that by itself.
    pub(super) async fn check(
        &self,
        file: &Path,
        force_share: ForceShare,
        dirty: Dirty,
    ) -> Result<Option<String>, DriverError> {
        let mut args = vec![OsStr::new("check"), OsStr::new("-f"), OsStr::new("qcow2")];
        if force_share == ForceShare::Yes {
            args.push(OsStr::new("-U"));
        }
        args.push(file.as_os_str());
        let mut run = Run::quick(args);
        run.work = Work::Check;
        let output = match self.run("check", file, run).await {
            // An image may be large, or lie on something slow: that is no fault of it.
            Err(error) if error.failure.code == Code::Timeout => {
                return Ok(Some(format!("{}: it was not checked for damage", error.failure.message)));
            }
            output => output?,
        };
        match output.status.code() {
            Some(0) => Ok(None),
            Some(3) => Ok(Some(format!(
                "{} has leaked clusters, which only cost space (qemu-img check -r leaks frees them)",
                file.display()
            ))),
            Some(2) if dirty == Dirty::Yes && output.found_late_counts_alone() => Ok(Some(format!(
                "{} was not closed by who wrote it last (lazy_refcounts): QEMU mends its counts when the machine is next \
                 started, and `domain add --repair` (qemu-img check -r all) does it now",
                file.display()
            ))),
            Some(2) => Err(DriverError::permanent(
                Code::BadImage,
                format!("image {} is damaged: {}", file.display(), output.summary()),
            )
            .hint(format!("qemu-img check {} tells more", file.display()))),
            Some(_) => Err(DriverError::permanent(
                Code::BadImage,
                format!("image {} cannot be opened: {}", file.display(), output.summary()),
            )),
            None => Err(output.failure("check", file)),
        }
    }

    /// The format that qemu-img takes an image for.
    pub(super) async fn format(&self, file: &Path) -> Result<String, DriverError> {
        let args = ["info", "--output=json"].map(OsStr::new);
        let output = self.run("info", file, Run::quick(args.into_iter().chain([file.as_os_str()]))).await?;
        if !output.status.success() {
            return Err(output.failure("info", file));
        }
        let info: Option<serde_json::Value> = serde_json::from_str(&output.stdout).ok();
        let format = info.as_ref().and_then(|info| info.get("format")).and_then(|format| format.as_str());
        format.map(|name| name.chars().filter(|c| !c.is_control()).take(32).collect()).ok_or_else(|| {
            DriverError::permanent(
                Code::Io,
                format!("qemu-img does not say which format {} has", file.display()),
            )
        })
    }

    /// The option that limits the speed, where there is a limit.
    fn rate(&self) -> Vec<OsString> {
        match self.speed_bytes {
            0 => Vec::new(),
            bytes => vec!["-r".into(), bytes.to_string().into()],
        }
    }

    async fn done(&self, command: &str, file: &Path, run: Run<'_>) -> Result<(), DriverError> {
        let output = self.run(command, file, run).await?;
        if output.status.success() { Ok(()) } else { Err(output.failure(command, file)) }
    }

    #[tracing::instrument(level = "debug", skip_all, fields(command, file = %file.display()))]
    async fn run(&self, command: &str, file: &Path, run: Run<'_>) -> Result<Output, DriverError> {
        let bound = run.lock.map_or(Bound::ToUs, Bound::ToLock);
        let mut child =
            child::spawn(&self.program, &run.args, &[("LC_ALL", "C")], bound).map_err(|error| {
                DriverError::permanent(Code::Io, format!("cannot start {}: {error}", self.program.display()))
                    .hint("install qemu-img (Debian: qemu-utils, Fedora: qemu-img)")
            })?;
        let limit = match run.work {
            Work::Header => self.times.header,
            Work::Check => CHECKING,
            Work::Copy => self.times.copy,
        };
        let (out, err) = child.streams();
        let cannot_wait = |error| DriverError::unknown(Code::Io, "cannot wait for qemu-img").source(error);
        let work =
            async { tokio::join!(child.wait(), read_limited(out, run.progress), read_limited(err, None)) };
        tokio::select! {
            biased;
            done = tokio::time::timeout(limit, work) => match done {
                Ok((status, stdout, stderr)) => {
                    Ok(Output { status: status.map_err(cannot_wait)?, stdout, stderr })
                }
                // What it moves may still be moving: recovery takes the operation's lock before anything else.
                Err(_) => Err(DriverError::unknown(
                    Code::Timeout,
                    format!("qemu-img {command} of {} took longer than {} s", file.display(), limit.as_secs()),
                )),
            },
            () = run.called_off() => {
                // The step is taken back from wherever a killed child left it.
                child.kill().await.map_err(cannot_wait)?;
                Err(DriverError::permanent(Code::Cancelled, "it was called off while qemu-img was at work"))
            }
        }
    }
}

/// Whether an image has a dirty bitmap of some name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IsThere {
    /// It has.
    Yes,
    /// It has none.
    No,
}

/// Whether whoever wrote an image last was killed before its counts were written, by its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dirty {
    /// Yes.
    Yes,
    /// No.
    No,
}

/// Whether an image that a machine writes may be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ForceShare {
    /// Yes; what is found is only a hint then.
    Yes,
    /// No.
    No,
}

impl<'a> Run<'a> {
    fn quick<'s>(args: impl IntoIterator<Item = &'s OsStr>) -> Self {
        let args = args.into_iter().map(OsStr::to_os_string).collect();
        Self { args, work: Work::Header, lock: None, progress: None, call_off: CallOff::default() }
    }

    fn moving<'s>(args: impl IntoIterator<Item = &'s OsStr>) -> Self {
        Self { work: Work::Copy, ..Self::quick(args) }
    }

    fn lock(mut self, lock: &'a OperationLock) -> Self {
        self.lock = Some(lock);
        self
    }

    fn patron(mut self, patron: Patron<'a>) -> Self {
        self.progress = Some(patron.progress);
        self.call_off = patron.call_off;
        self
    }

    /// Returns once it was called off.
    async fn called_off(&self) {
        while !self.call_off.is_asked() {
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// `-o`, where anything is said.
fn as_options(format: Option<FormatOptions>) -> Vec<OsString> {
    format.map_or_else(Vec::new, |format| vec!["-o".into(), format.as_options().into()])
}

/// An image by a name that has QEMU refuse every write to its first sector, where the header is, with EIO. None for a
/// path that is not UTF-8.
fn shielded(file: &Path) -> Option<String> {
    let refuse = json!({ "event": "none", "iotype": "write", "sector": 0, "errno": 5 });
    let image = json!({ "driver": "file", "filename": file.to_str()? });
    let file = json!({ "driver": "blkdebug", "inject-error": [refuse], "image": image });
    Some(format!("json:{}", json!({ "driver": "qcow2", "file": file })))
}

impl Output {
    /// Whether all was done but the writing of the header, and nothing else went wrong.
    fn refused_header_alone(&self, onto: &str) -> bool {
        let expected = format!("qemu-img: Could not change the backing file to '{onto}': {REFUSED}");
        self.status.code() == Some(1) && self.stderr.trim_end() == expected
    }

    /// Whether all that was found are counts that were not written before somebody was killed: QEMU writes them anew when
    /// it next opens the image. A cluster that two refer to, or one that lies outside the file, is damage.
    fn found_late_counts_alone(&self) -> bool {
        let mut errors = self.stderr.lines().filter(|line| line.starts_with("ERROR")).peekable();
        errors.peek().is_some()
            && errors.all(|line| {
                (line.starts_with("ERROR cluster ") && line.ends_with(" refcount=0 reference=1"))
                    || (line.starts_with("ERROR OFLAG_COPIED ") && line.ends_with(" refcount=0"))
            })
    }

    /// The first lines that it wrote to stderr, without control characters.
    fn summary(&self) -> String {
        let text: Vec<&str> = self
            .stderr
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .take(MESSAGE_LINES_MAX)
            .collect();
        let clean: String =
            text.join("; ").chars().filter(|c| !c.is_control()).take(MESSAGE_CHARS_MAX).collect();
        if clean.is_empty() { format!("it ended with {}", self.status) } else { clean }
    }

    fn failure(&self, command: &str, file: &Path) -> DriverError {
        let summary = self.summary();
        let message = format!("qemu-img {command} of {} failed: {summary}", file.display());
        // No exit code, or the one that a shell gives for a child without one: it was killed, and may have done any
        // part of its work.
        let (class, code) = if self.status.code().is_none_or(|code| code > SHELL_SIGNALLED) {
            (ErrorClass::Unknown, Code::Io)
        } else if self.stderr.contains("No space left on device") {
            (ErrorClass::Permanent, Code::NoSpace)
        } else if self.stderr.contains("Permission denied") || self.stderr.contains("Operation not permitted")
        {
            (ErrorClass::Permanent, Code::Permission)
        } else if self.stderr.contains("Failed to get") && self.stderr.contains("lock") {
            (ErrorClass::Busy, Code::InUse)
        } else if PASSING.iter().any(|words| self.stderr.contains(words)) {
            (ErrorClass::Transient, Code::Io)
        } else {
            (ErrorClass::Permanent, Code::Io)
        };
        DriverError::new(class, code, message)
    }
}

/// Reads to the end, keeps the first part, and tells the percentages that go by.
async fn read_limited(stream: Option<impl AsyncRead + Unpin>, progress: Option<&dyn Progress>) -> String {
    let Some(mut stream) = stream else { return String::new() };
    let mut kept = Vec::new();
    let mut buffer = [0_u8; 8192];
    let mut told = None;
    // What a tool says is read to its end, so that it never waits for us; an error ends it as well.
    while let Ok(read @ 1..) = stream.read(&mut buffer).await {
        let chunk = &buffer[..read];
        if let (Some(progress), Some(percent)) = (progress, last_percentage(chunk))
            && told != Some(percent)
        {
            told = Some(percent);
            progress.step_progress(StepProgress::Percent(percent));
        }
        let room = OUTPUT_BYTES_MAX.saturating_sub(kept.len());
        kept.extend_from_slice(&chunk[..read.min(room)]);
    }
    String::from_utf8_lossy(&kept).into_owned()
}

/// The last `(12.34/100%)` of a piece of output, in whole percent.
fn last_percentage(chunk: &[u8]) -> Option<u8> {
    let text = std::str::from_utf8(chunk).ok()?;
    let end = text.rfind("/100%)")?;
    let number = text.get(..end)?.rsplit('(').next()?;
    let whole = number.split('.').next()?.trim();
    whole.parse().ok().filter(|percent| *percent <= 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentages_are_read() {
        assert_eq!(last_percentage(b"    (0.00/100%)\r    (12.34/100%)\r"), Some(12));
        assert_eq!(last_percentage(b"    (100.00/100%)\r\n"), Some(100));
        for none in [b"".as_slice(), b"hello", b"(x/100%)", b"\xff(1.0/100%)", b"(999.0/100%)"] {
            assert_eq!(last_percentage(none), None);
        }
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_named_with_what_to_do() {
        let error = QemuImg::new("/nonexistent/qemu-img".into())
            .check(Path::new("/x"), ForceShare::No, Dirty::No)
            .await
            .unwrap_err();
        assert!(error.to_string().contains("/nonexistent/qemu-img"), "{error}");
        assert!(error.failure.hint.is_some());
    }
}
