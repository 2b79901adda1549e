//! Starting and ending the processes of machines.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use snaptree_engine::domain::{Domain, RunState};
use snaptree_engine::driver::{DriverError, ErrorClass, StepReport};
use snaptree_engine::operation::Code;
use snaptree_engine::project::DomainState;
use tokio::process::{Child, Command};
use tokio::time::Instant;

use super::monitor::{Monitor, failed};
use super::seen::Run;
use crate::qemu::adopt::Work;
use crate::qemu::config::QemuConfig;
use crate::qemu::files::{Doing, if_there};
use crate::qemu::lock::{has_open, in_use};
use crate::qemu::observe::in_use as users;
use crate::qemu::qmp::QmpError;
use crate::qemu::runs::{Incoming, Runs, Values, command_line};
use crate::qemu::step::{Next, Power};

/// How long a machine may take to be there.
const START: Duration = Duration::from_secs(60);
/// How long QEMU may take to end once it was told to.
const QUIT: Duration = Duration::from_secs(20);
/// How long a stop command, or a guest that was asked to shut down, may take.
const STOP: Duration = Duration::from_secs(180);
/// How long a signalled process may take to be gone.
const KILLED: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(20);
/// The same where a guest waits for it.
const POLL_SOON: Duration = Duration::from_millis(3);
/// How much of what a failed command said is passed on.
const SAID_BYTES_MAX: usize = 2048;

/// How a machine is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::qemu) enum Ending {
    /// The guest is asked to shut down.
    Shutdown,
    /// At once; what the guest has in its memory is lost.
    AtOnce,
}

impl Power {
    /// Does it; a machine that is as wished is left alone.
    pub(in crate::qemu) async fn execute(&self, work: Work<'_>) -> Result<StepReport, DriverError> {
        work.reached("qemu.power.begin");
        match self.wish {
            RunState::Off => end(work.context.state, Ending::AtOnce).await?,
            wish => start(work.context.state, wish).await?,
        }
        work.reached("qemu.power.done");
        Ok(StepReport::default())
    }

    /// Starts a machine that was ended for nothing.
    pub(in crate::qemu) async fn undo(&self, work: Work<'_>) -> Result<StepReport, DriverError> {
        if self.wish == RunState::Off && self.was != RunState::Off {
            start(work.context.state, self.was).await?;
        }
        Ok(StepReport::default())
    }
}

/// Ends the machine, if it runs.
pub(in crate::qemu) async fn end(state: &DomainState, ending: Ending) -> Result<(), DriverError> {
    let (domain, config) = QemuConfig::of(state)?;
    let Some(holder) = users(state, &config)?.into_iter().next() else { return Ok(()) };
    match &config.runs {
        Runs::Managed { qmp, pid_file, .. } => {
            let told = tell(qmp, ending).await;
            let wait = if ending == Ending::Shutdown { STOP } else { QUIT };
            if told.is_ok() && is_free(state, &config, wait).await? {
                return Ok(());
            }
            if ending == Ending::Shutdown {
                told?;
                return Err(DriverError::permanent(
                    Code::Timeout,
                    format!("the guest was asked to shut down and has not after {} s", STOP.as_secs()),
                )
                .hint("snaptree domain stop --force ends it at once"));
            }
            let Some(pid) = managed_pid(pid_file, &holder.file) else {
                return Err(in_use(&holder)
                    .hint("it is not the QEMU that Snaptree started: end it yourself")
                    .into());
            };
            kill_and_wait(state, &config, pid).await
        }
        Runs::Commands { stop, .. } => {
            run_command("stop", stop, STOP).await?;
            if is_free(state, &config, STOP).await? {
                return Ok(());
            }
            Err(in_use(&holder).hint("the stop command ended, and the machine still runs").into())
        }
        Runs::Apart | Runs::Attached { .. } => Err(not_ours(domain)),
    }
}

/// Why it is neither started nor ended.
fn not_ours(domain: &Domain) -> DriverError {
    DriverError::permanent(
        Code::Unsupported,
        format!("domain '{}' is started and ended by someone else", domain.name),
    )
    .hint("a domain that is registered with --start and --stop, or with --launch, is by Snaptree")
}

async fn tell(socket: &Path, ending: Ending) -> Result<(), DriverError> {
    let mut monitor = Monitor::connect(socket).await.map_err(failed)?;
    match ending {
        Ending::AtOnce => monitor.quit().await,
        // A guest that is stopped hears nothing.
        Ending::Shutdown => {
            if monitor.run_state().await? == Run::Paused {
                monitor.cont().await?;
            }
            monitor.power_button().await
        }
    }
}

/// Starts the machine, unless it runs. One that is just ending is waited for.
pub(in crate::qemu) async fn start(state: &DomainState, wish: RunState) -> Result<(), DriverError> {
    let (domain, config) = QemuConfig::of(state)?;
    let until = Instant::now() + START;
    let mut child = None;
    while !is_there(state, &config, wish).await? {
        if child.is_none() && users(state, &config)?.is_empty() {
            child = Some(launch(state, domain, &config, wish)?);
        }
        if let Some((child, said)) = &mut child
            && let Some(status) = child.try_wait().doing("wait for", said)?
            && !status.success()
        {
            return Err(not_started(&format!("its command ended with {status}"), said));
        }
        if Instant::now() >= until {
            return Err(DriverError::new(
                ErrorClass::Unknown,
                Code::Timeout,
                format!("the machine is not there after {} s", START.as_secs()),
            ));
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// The process that starts the machine, and the file that has what it says.
fn launch(
    state: &DomainState,
    domain: &Domain,
    config: &QemuConfig,
    wish: RunState,
) -> Result<(Child, PathBuf), DriverError> {
    match &config.runs {
        Runs::Managed { launch, qmp, pid_file } => {
            let disks = config.disks.keys().map(|name| (name.clone(), current_file(state, config, name)));
            let disks = disks.collect();
            let values = Values { disks: &disks, qmp, pid_file, incoming: Incoming::No };
            let mut words = command_line(launch, values)?;
            if wish == RunState::Paused {
                words.push("-S".to_owned());
            }
            spawn(&words, &said_path(pid_file))
        }
        Runs::Commands { start, .. } => {
            let words = ["sh".to_owned(), "-c".to_owned(), start.clone()];
            let said = std::env::temp_dir().join(format!("snaptree-start-{}.log", domain.id));
            spawn(&words, &said)
        }
        Runs::Apart | Runs::Attached { .. } => Err(not_ours(domain)),
    }
}

/// Starts a managed machine's QEMU so that it waits for its memory. One that was started before is not looked for.
pub(super) async fn start_waiting(config: &QemuConfig, next: &Next) -> Result<(), DriverError> {
    let Runs::Managed { launch, .. } = &config.runs else {
        return Err(DriverError::permanent(Code::Unsupported, "Snaptree does not start this machine"));
    };
    for stale in [&next.qmp, &next.pid_file] {
        if_there(fs::remove_file(stale)).doing("remove", stale)?;
    }
    let values =
        Values { disks: &next.disks, qmp: &next.qmp, pid_file: &next.pid_file, incoming: Incoming::Defer };
    let mut words = command_line(launch, values)?;
    // It goes on when it is told to, whatever it did when its memory was taken.
    words.push("-S".to_owned());
    let (mut child, said) = spawn(&words, &said_path(&next.pid_file))?;
    let until = Instant::now() + START;
    loop {
        match Monitor::connect(&next.qmp).await {
            Ok(_) => return Ok(()),
            Err(QmpError::Absent { .. } | QmpError::Closed { .. }) => {}
            Err(error) => return Err(failed(error)),
        }
        if let Some(status) = child.try_wait().doing("wait for", &said)?
            && !status.success()
        {
            return Err(not_started(&format!("its command ended with {status}"), &said));
        }
        if Instant::now() >= until {
            return Err(DriverError::new(
                ErrorClass::Unknown,
                Code::Timeout,
                format!("the machine is not there after {} s", START.as_secs()),
            ));
        }
        tokio::time::sleep(POLL_SOON).await;
    }
}

/// Whether the machine has its disks open, and runs or waits as wished.
async fn is_there(state: &DomainState, config: &QemuConfig, wish: RunState) -> Result<bool, DriverError> {
    if users(state, config)?.is_empty() {
        return Ok(false);
    }
    let Some(socket) = config.runs.qmp() else { return Ok(true) };
    let mut monitor = match Monitor::connect(socket).await {
        Ok(monitor) => monitor,
        Err(QmpError::Absent { .. } | QmpError::Closed { .. }) => return Ok(false),
        Err(error) => return Err(failed(error)),
    };
    match (wish, monitor.run_state().await?) {
        (RunState::Running, Run::Paused) => monitor.cont().await.map(|()| true),
        (RunState::Paused, Run::Running) => monitor.stop().await.map(|()| true),
        _ => Ok(true),
    }
}

fn current_file(state: &DomainState, config: &QemuConfig, disk: &snaptree_engine::DiskName) -> PathBuf {
    config.written(disk, state).unwrap_or_default()
}

/// The machine outlives Snaptree: a process group of its own, nothing of ours inherited, its words in a file.
fn spawn(words: &[String], said: &Path) -> Result<(Child, PathBuf), DriverError> {
    let Some((program, arguments)) = words.split_first() else {
        return Err(DriverError::permanent(Code::Invalid, "the launch command is empty"));
    };
    if let Some(folder) = said.parent() {
        fs::create_dir_all(folder).doing("make the folder", folder)?;
    }
    // In a folder that others may write to, a name may be a link of theirs.
    if_there(fs::remove_file(said)).doing("remove", said)?;
    let output =
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(said).doing("make", said)?;
    let errors = output.try_clone().doing("duplicate", said)?;
    let child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors)
        .process_group(0)
        .kill_on_drop(false)
        .spawn()
        .map_err(|error| {
            DriverError::permanent(Code::NotFound, format!("'{program}' cannot be started")).source(error)
        })?;
    Ok((child, said.to_path_buf()))
}

/// The last line that a machine's QEMU said.
pub(super) fn last_words(said: &Path) -> Option<String> {
    let text = fs::read(said).ok()?;
    let text = String::from_utf8_lossy(&text[..text.len().min(SAID_BYTES_MAX)]).into_owned();
    text.lines().map(str::trim).rfind(|line| !line.is_empty()).map(str::to_owned)
}

fn not_started(how: &str, said: &Path) -> DriverError {
    let line = last_words(said).unwrap_or_else(|| "it said nothing".to_owned());
    DriverError::new(
        ErrorClass::Transient,
        Code::Io,
        format!("the machine could not be started: {how}: {line}"),
    )
    .hint(format!("see {}", said.display()))
}

async fn run_command(name: &str, command: &str, limit: Duration) -> Result<(), DriverError> {
    let mut child = Command::new("sh")
        .args(["-c", command])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .map_err(|error| DriverError::permanent(Code::Io, "sh cannot be started").source(error))?;
    match tokio::time::timeout(limit, child.wait()).await {
        Ok(Ok(status)) if status.success() => Ok(()),
        Ok(Ok(status)) => {
            Err(DriverError::permanent(Code::Io, format!("the {name} command ended with {status}"))
                .hint("run it by hand to see what it says"))
        }
        Ok(Err(error)) => {
            Err(DriverError::unknown(Code::Io, format!("the {name} command cannot be waited for"))
                .source(error))
        }
        Err(_) => Err(DriverError::unknown(
            Code::Timeout,
            format!("the {name} command has not ended after {} s", limit.as_secs()),
        )),
    }
}

async fn is_free(state: &DomainState, config: &QemuConfig, wait: Duration) -> Result<bool, DriverError> {
    let until = Instant::now() + wait;
    while !users(state, config)?.is_empty() {
        if Instant::now() >= until {
            return Ok(false);
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(true)
}

/// Where a managed machine's words go.
pub(super) fn said_path(pid_file: &Path) -> PathBuf {
    pid_file.with_extension("log")
}

/// The process in the pid file, if it has the machine's disk open: a number alone may be anybody's by now.
pub(super) fn managed_pid(pid_file: &Path, disk: &Path) -> Option<Pid> {
    let pid: u32 = fs::read_to_string(pid_file).ok()?.trim().parse().ok()?;
    has_open(pid, disk).then_some(Pid::from_raw(i32::try_from(pid).ok()?))
}

async fn kill_and_wait(state: &DomainState, config: &QemuConfig, pid: Pid) -> Result<(), DriverError> {
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        tracing::warn!(%pid, %signal, "ending a machine that does not answer");
        if let Err(error) = kill(pid, signal) {
            tracing::warn!(%pid, %error, "it could not be signalled");
        }
        if is_free(state, config, KILLED).await? {
            return Ok(());
        }
    }
    Err(DriverError::new(ErrorClass::Busy, Code::InUse, format!("the machine (pid {pid}) cannot be ended")))
}
