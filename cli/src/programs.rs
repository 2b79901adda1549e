//! Programs that users name, for hooks and notifications: run without a shell, in a process group of their own, with a
//! limit of time and of what they write.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use async_trait::async_trait;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use snaptree_engine::around::{HookCall, HookEnd, HookRunner};
use snaptree_engine::event::Actor;
use snaptree_engine::operation::{Code, Failure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::unix::pipe::Receiver;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::instrument;

/// How much of the end of what a program writes is kept, in bytes.
const OUTPUT_BYTES_MAX: usize = 4_096;

/// How much of that goes into a failure, in characters.
const TOLD_CHARS_MAX: usize = 500;

/// How long a program may take to end after it was asked to.
const TERM_WAIT: Duration = Duration::from_secs(2);

/// How long is read on after a program ended: what it left in the background may have its output open for ever.
const DRAIN_WAIT: Duration = Duration::from_millis(200);

/// How often it is looked whether an earlier run has ended.
const POLL: Duration = Duration::from_millis(50);

/// What of this process's environment a program gets. The rest may hold secrets.
const PASSED_ON: [&str; 8] = ["PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "TMPDIR"];

/// The path for a program if this process has none.
const PATH_DEFAULT: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a program reads.
pub enum Input<'a> {
    /// This text.
    Text(String),
    /// Nothing; the file stays locked for as long as the program lives, whatever becomes of this process.
    Locked(&'a File),
}

/// A program to be run.
pub struct Program<'a> {
    /// Its absolute path.
    pub path: &'a str,
    /// Its arguments.
    pub arguments: &'a [String],
    /// Added to its environment; the last of a name counts.
    pub environment: Vec<(&'a str, String)>,
    /// What it reads.
    pub input: Input<'a>,
    /// How long it may take.
    pub time_max: Duration,
}

/// Ends the group if nobody waits for it any more.
struct Group(Option<Pid>);

impl Group {
    fn signal(&self, signal: Signal) {
        if let Some(group) = self.0 {
            // A group that is gone already is what was wanted.
            let _ = killpg(group, signal);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.signal(Signal::SIGKILL);
    }
}

/// Runs a program to its end. What it left in the background then is left alone; past its time all of it is ended.
///
/// # Errors
/// It could not be started, said by its exit code that it failed, or took too long.
#[instrument(skip_all, fields(program = program.path))]
pub async fn run(program: Program<'_>) -> Result<(), Failure> {
    let path = program.path;
    let cannot = |error: std::io::Error| Failure::new(Code::Io, format!("cannot start {path}: {error}"));
    let deadline = Instant::now() + program.time_max;
    let (mut child, mut output) = spawn(&program).map_err(cannot)?;
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
    let mut group = Group(pid.map(Pid::from_raw));
    let stdin = child.stdin.take();
    let text = if let Input::Text(text) = program.input { text } else { String::new() };
    let fed = async move {
        if let Some(mut stdin) = stdin {
            // A program that does not read it need not.
            let _ = stdin.write_all(text.as_bytes()).await;
        }
        std::future::pending::<()>().await
    };
    let mut tail = Tail::default();
    let waited = tokio::select! {
        waited = timeout_at(deadline, ended(&mut child, &mut output, &mut tail)) => waited,
        () = fed => return Ok(()),
    };
    match waited {
        Ok(Ok(status)) => {
            group.0 = None;
            tracing::debug!(%status, output = tail.text(), "a program has ended");
            if status.success() { Ok(()) } else { Err(failed(path, status, &tail)) }
        }
        Ok(Err(error)) => Err(Failure::new(Code::Io, format!("cannot wait for {path}: {error}"))),
        Err(_) => {
            group.signal(Signal::SIGTERM);
            let _ = timeout(TERM_WAIT, ended(&mut child, &mut output, &mut tail)).await;
            drop(group);
            let _ = timeout(TERM_WAIT, child.wait()).await;
            let took = program.time_max.as_secs();
            tracing::debug!(output = tail.text(), "a program took too long and was ended");
            Err(Failure::new(
                Code::Timeout,
                format!("{path} took longer than {took} s and was ended{}", tail.told()),
            ))
        }
    }
}

fn failed(path: &str, status: ExitStatus, tail: &Tail) -> Failure {
    let how = match status.code() {
        Some(code) => format!("ended with exit code {code}"),
        None => format!("was ended by a signal ({status})"),
    };
    Failure::new(Code::Io, format!("{path} {how}{}", tail.told()))
}

fn spawn(program: &Program<'_>) -> std::io::Result<(Child, Receiver)> {
    let (reader, writer) = std::io::pipe()?;
    let stdin = match &program.input {
        Input::Text(_) => Stdio::piped(),
        Input::Locked(file) => Stdio::from(file.try_clone()?),
    };
    let passed_on = PASSED_ON.iter().filter_map(|name| Some((name, std::env::var_os(name)?)));
    // Dropped at the end of this function, and with it our ends of the pipe.
    let child = Command::new(program.path)
        .args(program.arguments)
        .env_clear()
        .env("PATH", PATH_DEFAULT)
        .envs(passed_on)
        .envs(program.environment.iter().map(|(name, value)| (name, value)))
        .current_dir("/")
        .stdin(stdin)
        .stdout(Stdio::from(writer.try_clone()?))
        .stderr(Stdio::from(writer))
        .process_group(0)
        .spawn()?;
    Ok((child, Receiver::from_owned_fd(OwnedFd::from(reader))?))
}

/// Waits for the program itself, and reads what it writes meanwhile.
async fn ended(child: &mut Child, output: &mut Receiver, tail: &mut Tail) -> std::io::Result<ExitStatus> {
    let mut buffer = [0; 1_024];
    let mut open = true;
    let status = loop {
        tokio::select! {
            read = output.read(&mut buffer), if open => match read {
                Ok(0) | Err(_) => open = false,
                Ok(count) => tail.add(&buffer[..count]),
            },
            status = child.wait() => break status?,
        }
    };
    let drained = Instant::now() + DRAIN_WAIT;
    while open && let Ok(Ok(count @ 1..)) = timeout_at(drained, output.read(&mut buffer)).await {
        tail.add(&buffer[..count]);
    }
    Ok(status)
}

/// The end of what a program wrote.
#[derive(Default)]
struct Tail(VecDeque<u8>);

impl Tail {
    fn add(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
        let over = self.0.len().saturating_sub(OUTPUT_BYTES_MAX);
        self.0.drain(..over);
    }

    fn text(&self) -> String {
        let bytes: Vec<u8> = self.0.iter().copied().collect();
        String::from_utf8_lossy(&bytes).trim().to_owned()
    }

    /// For the end of a sentence; empty if nothing was written.
    fn told(&self) -> String {
        let text: String = self.text().split_whitespace().collect::<Vec<_>>().join(" ");
        let text: Vec<char> = text.chars().filter(|c| !c.is_control()).collect();
        if text.is_empty() {
            return String::new();
        }
        let from = text.len().saturating_sub(TOLD_CHARS_MAX);
        let before = if from > 0 { "..." } else { "" };
        format!("; it said: {before}{}", text[from..].iter().collect::<String>())
    }
}

/// Runs hooks.
#[derive(Clone, Debug)]
pub struct HookPrograms {
    /// Where their locks are.
    run_folder: PathBuf,
}

impl HookPrograms {
    /// With locks in that folder, which need not be there yet.
    pub fn new(run_folder: PathBuf) -> Self {
        Self { run_folder }
    }
}

#[async_trait]
impl HookRunner for HookPrograms {
    async fn run(&self, call: &HookCall<'_>) -> Result<(), Failure> {
        let Some((path, arguments)) = call.hook.program.split_first().filter(|(path, _)| path.starts_with('/'))
        else {
            return Err(Failure::new(Code::Invalid, "a hook has no program with an absolute path"));
        };
        let time_max = Duration::from_secs(call.hook.timeout_s);
        let file = self.run_folder.join(format!("hook-{}-{}.lock", call.operation, call.phase.as_str()));
        let lock = locked(&self.run_folder, &file, time_max).await?;
        let program = Program {
            path,
            arguments,
            environment: environment(call),
            input: Input::Locked(&lock),
            time_max,
        };
        let ran = run(program).await;
        // What is left over is an empty file; nobody waits for its lock any more.
        let _ = std::fs::remove_file(&file);
        drop(lock);
        match &ran {
            Ok(()) => tracing::info!(
                hook = call.phase.as_str(), operation = %call.operation, domain = %call.domain, "a hook has run"
            ),
            Err(failure) => tracing::warn!(
                hook = call.phase.as_str(), operation = %call.operation, domain = %call.domain,
                "a hook failed: {failure}"
            ),
        }
        ran
    }
}

fn environment<'a>(call: &HookCall<'a>) -> Vec<(&'a str, String)> {
    let given = call.hook.environment.iter().map(|(name, value)| (name.as_str(), value.clone()));
    let policy = if let Actor::Policy(name) = call.actor { name.to_string() } else { String::new() };
    let ours = [
        ("SNAPTREE_PHASE", call.phase.as_str().to_owned()),
        ("SNAPTREE_OUTCOME", call.end.map_or("", HookEnd::as_str).to_owned()),
        ("SNAPTREE_OPERATION", call.operation.to_string()),
        ("SNAPTREE_POLICY", policy),
        ("SNAPTREE_DOMAIN", call.domain.to_string()),
        ("SNAPTREE_SNAPSHOT", call.snapshot.to_string()),
    ];
    given.chain(ours).collect()
}

/// The lock of a hook, when an earlier run of it, whose Snaptree was killed, is over.
async fn locked(folder: &Path, file: &Path, wait: Duration) -> Result<Flock<File>, Failure> {
    let cannot = |error: std::io::Error| {
        Failure::new(Code::Io, format!("cannot lock {}: {error}", file.display()))
    };
    std::fs::create_dir_all(folder).map_err(cannot)?;
    let deadline = Instant::now() + wait;
    let mut opened = File::options().create(true).append(true).open(file).map_err(cannot)?;
    loop {
        match Flock::lock(opened, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((_, error)) if error != nix::errno::Errno::EWOULDBLOCK => return Err(cannot(error.into())),
            Err(_) if Instant::now() >= deadline => {
                let message = "an earlier run of it, whose Snaptree was killed, is still at work";
                return Err(Failure::new(Code::InUse, message).hint(format!("`fuser {}` names it", file.display())));
            }
            Err((again, _)) => opened = again,
        }
        sleep(POLL).await;
    }
}
