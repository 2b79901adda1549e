//! Starting and ending the processes of machines.
//!
//! ```text
//!   start   spawn, note the process ─▶ QMP answers, and the disks are written ─▶ note what answers ─▶ there
//!                                  └▶ it cannot be so, or not in time ─▶ what was begun is ended, and it is said why
//!   end     quit, or the power button ─▶ the end of the very processes that are noted, told by the kernel
//! ```
//!
//! Architecture Invariant: no QEMU is started while one that was started before it lives, whatever that one has open.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use snaptree_engine::DomainId;
use snaptree_engine::domain::{Domain, RunState};
use snaptree_engine::driver::{DriverError, ErrorClass, InUse, StepReport};
use snaptree_engine::operation::Code;
use snaptree_engine::project::DomainState;
use tokio::process::{Child, Command};
use tokio::time::Instant;

use super::monitor::{Monitor, failed};
use super::ours::{forget, living, living_with, note};
use super::seen::Run;
use crate::process::Process;
use crate::qemu::adopt::Work;
use crate::qemu::config::QemuConfig;
use crate::qemu::files::{Doing, if_there};
use crate::qemu::lock::{in_use, until_let_go, used_by};
use crate::qemu::observe::{current_file, in_use as users};
use crate::qemu::qmp::QmpError;
use crate::qemu::runs::{Incoming, Runs, Values, command_line};
use crate::qemu::step::{Next, Power};

/// How long a machine may be missing whose command has ended: one that goes to the background is there soon.
const MISSING: Duration = Duration::from_secs(10);
/// How long QEMU may take to end once it was told to.
const QUIT: Duration = Duration::from_secs(20);
/// How long a stop command, or a guest that was asked to shut down, may take.
const STOP: Duration = Duration::from_secs(180);
/// How long a signalled process may take to be gone.
const KILLED: Duration = Duration::from_secs(10);
/// How long QEMU may take to end by itself behind its guest.
const AFTER_GUEST: Duration = Duration::from_secs(2);
/// A machine that starts is looked for often at first, since a guest may wait for it, and then less and less.
const LOOK_SOON: Duration = Duration::from_millis(3);
const LOOK_LATER: Duration = Duration::from_millis(250);
/// How much of what a failed command said is passed on.
const SAID_BYTES_MAX: u64 = 2048;

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
            wish => start(work.context.state, wish, work.img.times.start).await?,
        }
        work.reached("qemu.power.done");
        Ok(StepReport::default())
    }

    /// Starts a machine that was ended for nothing.
    pub(in crate::qemu) async fn undo(&self, work: Work<'_>) -> Result<StepReport, DriverError> {
        if self.wish == RunState::Off && self.was != RunState::Off {
            start(work.context.state, self.was, work.img.times.start).await?;
        }
        Ok(StepReport::default())
    }
}

/// Ends the machine, if it runs.
pub(in crate::qemu) async fn end(state: &DomainState, ending: Ending) -> Result<(), DriverError> {
    let (domain, config) = QemuConfig::of(state)?;
    match &config.runs {
        Runs::Managed { qmp, pid_file, .. } => end_ours(state, &config, (qmp, pid_file), ending).await,
        Runs::Commands { stop, .. } => {
            if holder(state, &config).await?.is_none() {
                return Ok(());
            }
            run_command("stop", stop, STOP).await?;
            match until_free(state, &config, STOP).await? {
                None => Ok(()),
                Some(holder) => {
                    Err(in_use(&holder).hint("the stop command ended, and the machine still runs").into())
                }
            }
        }
        Runs::Apart | Runs::Attached { .. } => match holder(state, &config).await? {
            None => Ok(()),
            Some(_) => Err(not_ours(domain)),
        },
    }
}

/// Ends every process that Snaptree started for the machine, and what answers at its socket.
async fn end_ours(
    state: &DomainState,
    config: &QemuConfig,
    (qmp, pid_file): (&Path, &Path),
    ending: Ending,
) -> Result<(), DriverError> {
    let mut ours = living(pid_file, state, config);
    let monitor = match Monitor::connect(qmp).await {
        Ok(monitor) => Some(monitor),
        Err(QmpError::Absent { .. } | QmpError::Closed { .. }) if ours.is_empty() => None,
        Err(error) if ending == Ending::Shutdown => return Err(failed(error)),
        Err(_) => None,
    };
    let answers = monitor.as_ref().and_then(Monitor::process);
    ours.extend(answers.filter(|process| !ours.contains(process)));
    match (monitor, ending) {
        (Some(monitor), Ending::Shutdown) => shut_down(monitor, &ours).await?,
        (Some(mut monitor), Ending::AtOnce) => {
            let wait = if monitor.quit().await.is_ok() { QUIT } else { Duration::ZERO };
            drop(monitor);
            end_all(&ours, wait).await?;
        }
        (None, _) => end_all(&ours, Duration::ZERO).await?,
    }
    match until_free(state, config, KILLED).await? {
        None => Ok(()),
        Some(holder) => {
            Err(in_use(&holder).hint("it is not the QEMU that Snaptree started: end it yourself").into())
        }
    }
}

/// Has the guest shut down, and waits for the end of its QEMU.
async fn shut_down(mut monitor: Monitor, ours: &[Process]) -> Result<(), DriverError> {
    // A guest that is stopped hears nothing.
    if monitor.run_state().await? == Run::Paused {
        monitor.cont().await?;
    }
    monitor.power_button().await?;
    let until = Instant::now() + STOP;
    let gone = are_gone(ours, STOP);
    tokio::pin!(gone);
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let heard = tokio::select! {
            gone = &mut gone => return if gone { Ok(()) } else { Err(not_shut_down()) },
            heard = monitor.is_guest_off_within(left) => heard,
        };
        match heard {
            Ok(false) => {}
            // Under -no-shutdown it stays.
            Ok(true) => {
                if !are_gone(ours, AFTER_GUEST).await {
                    monitor.quit().await?;
                }
            }
            // It ends.
            Err(_) => return if gone.await { Ok(()) } else { Err(not_shut_down()) },
        }
    }
}

fn not_shut_down() -> DriverError {
    DriverError::permanent(
        Code::Timeout,
        format!("the guest was asked to shut down and has not after {} s", STOP.as_secs()),
    )
    .hint("snaptree domain stop --force ends it at once")
}

/// Whether all of them have ended in time.
async fn are_gone(processes: &[Process], wait: Duration) -> bool {
    let until = Instant::now() + wait;
    for process in processes {
        if !process.is_gone_within(until.saturating_duration_since(Instant::now())).await {
            return false;
        }
    }
    true
}

/// Waits for their end for so long, and then sees to it.
async fn end_all(processes: &[Process], wait: Duration) -> Result<(), DriverError> {
    if are_gone(processes, wait).await {
        return Ok(());
    }
    for end in [Process::terminate, Process::kill] {
        for process in processes.iter().filter(|process| process.is_alive()) {
            tracing::warn!(pid = process.pid(), "ending a machine that does not end by itself");
            end(process);
        }
        if are_gone(processes, KILLED).await {
            return Ok(());
        }
    }
    Err(cannot_end(processes))
}

fn cannot_end(processes: &[Process]) -> DriverError {
    let alive = processes.iter().find(|process| process.is_alive());
    let pid = alive.map_or(0, Process::pid);
    DriverError::new(ErrorClass::Busy, Code::InUse, format!("the machine (pid {pid}) cannot be ended"))
}

/// Kills them, and waits until they are gone.
pub(super) async fn kill_all(processes: &[Process], wait: Duration) -> Result<(), DriverError> {
    processes.iter().for_each(Process::kill);
    if are_gone(processes, wait).await { Ok(()) } else { Err(cannot_end(processes)) }
}

/// Who has the machine's disks, or answers for it.
async fn holder(state: &DomainState, config: &QemuConfig) -> Result<Option<InUse>, DriverError> {
    if let Some(holder) = users(state, config)?.into_iter().next() {
        return Ok(Some(holder));
    }
    let (Some(socket), Some(disk)) = (config.runs.qmp(), config.disks.keys().next()) else { return Ok(None) };
    let monitor = Monitor::connect(socket).await.ok();
    let pid = |monitor: Monitor| monitor.process().map(|process| process.pid());
    Ok(monitor.map(|monitor| used_by(&current_file(state, config, disk), pid(monitor))))
}

/// Waits until nobody has the machine; who still does after `wait`.
async fn until_free(
    state: &DomainState,
    config: &QemuConfig,
    wait: Duration,
) -> Result<Option<InUse>, DriverError> {
    let until = Instant::now() + wait;
    loop {
        let Some(holder) = holder(state, config).await? else { return Ok(None) };
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(Some(holder));
        }
        until_let_go(&holder, left).await;
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

/// What was begun to have a machine there.
struct Begun {
    child: Child,
    process: Option<Process>,
    /// Has what it says.
    said: PathBuf,
    /// When its command was found to have ended.
    ended: Option<Instant>,
}

impl Begun {
    /// Why nothing will come of it, once that is clear.
    fn is_in_vain(&mut self) -> Result<Option<DriverError>, DriverError> {
        if self.ended.is_none()
            && let Some(status) = self.child.try_wait().doing("wait for", &self.said)?
        {
            if !status.success() {
                return Ok(Some(not_started(&format!("its command ended with {status}"), &self.said)));
            }
            self.ended = Some(Instant::now());
        }
        let missing = self.ended.is_some_and(|ended| ended.elapsed() > MISSING);
        Ok(missing.then(|| not_started("its command has ended, and no machine is there", &self.said)))
    }

    /// Ends it, and all that it started: a launch command may start QEMU through others.
    async fn give_up(mut self, mut ours: Vec<Process>) {
        // Until it is waited for, its number is nobody else's, nor is that of its group.
        if self.ended.is_none()
            && let Some(group) = self.child.id().and_then(|pid| i32::try_from(pid).ok())
            && let Err(error) = killpg(Pid::from_raw(group), Signal::SIGKILL)
        {
            tracing::debug!(group, %error, "it could not be signalled");
        }
        ours.extend(self.process.clone());
        if let Err(error) = kill_all(&ours, KILLED).await {
            tracing::warn!(%error, "a machine that was not there in time is left");
        }
        if let Err(error) = self.child.try_wait() {
            tracing::debug!(%error, "it cannot be waited for");
        }
    }
}

/// Starts the machine, unless it runs. One that is just ending is waited for. One that does not come up as it should is
/// ended again.
pub(in crate::qemu) async fn start(
    state: &DomainState,
    wish: RunState,
    limit: Duration,
) -> Result<(), DriverError> {
    let (domain, config) = QemuConfig::of(state)?;
    let mut begun = None;
    let started = until_there(state, (domain, &config), wish, limit, &mut begun).await;
    match (started, begun) {
        (Err(error), Some(begun)) => {
            give_up(state, &config, begun).await;
            Err(error)
        }
        (started, _) => started,
    }
}

async fn until_there(
    state: &DomainState,
    (domain, config): (&Domain, &QemuConfig),
    wish: RunState,
    limit: Duration,
    begun: &mut Option<Begun>,
) -> Result<(), DriverError> {
    let until = Instant::now() + limit;
    let mut pause = LOOK_SOON;
    while !is_there(state, config, wish, begun.is_some()).await? {
        if begun.is_none() && users(state, config)?.is_empty() {
            *begun = Some(launch(state, domain, config, wish)?);
        }
        if let Some(error) = begun.as_mut().map(Begun::is_in_vain).transpose()?.flatten() {
            return Err(error);
        }
        if Instant::now() >= until {
            return Err(not_there(limit, begun.as_ref()));
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LOOK_LATER);
    }
    Ok(())
}

fn not_there(limit: Duration, begun: Option<&Begun>) -> DriverError {
    let how = format!("it is not there after {} s", limit.as_secs());
    match begun {
        Some(begun) => not_started(&how, &begun.said),
        None => DriverError::new(
            ErrorClass::Busy,
            Code::InUse,
            format!("the machine could not be started: {how}, and another process of it has not ended"),
        )
        .hint("snaptree domain stop --force ends it"),
    }
}

/// Ends what was begun, and removes what it left. Its words stay, for whoever wants to know why.
async fn give_up(state: &DomainState, config: &QemuConfig, begun: Begun) {
    match &config.runs {
        Runs::Managed { qmp, pid_file, .. } => {
            let named = fs::read_to_string(pid_file).ok();
            let named = named.and_then(|text| Process::of(text.trim().parse().ok()?));
            let since =
                |process: &Process| begun.process.as_ref().is_some_and(|begun| process.is_since(begun));
            let mut ours = living(pid_file, state, config);
            ours.extend(named.filter(since));
            if let Ok(monitor) = Monitor::connect(qmp).await {
                ours.extend(monitor.process());
            }
            let said = begun.said.clone();
            begun.give_up(ours).await;
            let kept = fs::rename(&said, said.with_extension("kept"));
            let forgotten = forget(qmp, pid_file);
            let put_back = fs::rename(said.with_extension("kept"), &said);
            if let Err(error) = forgotten.and(kept.and(put_back).doing("rename", &said)) {
                tracing::warn!(%error, "a machine that could not be started leaves files behind");
            }
        }
        Runs::Commands { stop, .. } => {
            let is_there = holder(state, config).await.is_ok_and(|holder| holder.is_some());
            if is_there && let Err(error) = run_command("stop", stop, STOP).await {
                tracing::warn!(%error, "a machine that could not be started is not ended by its stop command");
            }
            begun.give_up(Vec::new()).await;
        }
        Runs::Apart | Runs::Attached { .. } => {}
    }
}

/// The process that starts the machine, and the file that has what it says.
fn launch(
    state: &DomainState,
    domain: &Domain,
    config: &QemuConfig,
    wish: RunState,
) -> Result<Begun, DriverError> {
    match &config.runs {
        Runs::Managed { launch, qmp, pid_file } => {
            for stale in [qmp, pid_file] {
                if_there(fs::remove_file(stale)).doing("remove", stale)?;
            }
            let disks = config.disks.keys().map(|name| (name.clone(), current_file(state, config, name)));
            let disks = disks.collect();
            let values = Values { disks: &disks, qmp, pid_file, incoming: Incoming::No };
            let mut words = command_line(launch, values)?;
            if wish == RunState::Paused {
                words.push("-S".to_owned());
            }
            let begun = spawn(&words, &said_path(pid_file))?;
            begun.process.as_ref().map_or(Ok(()), |process| note(pid_file, process))?;
            Ok(begun)
        }
        Runs::Commands { start, .. } => {
            let words = ["sh".to_owned(), "-c".to_owned(), start.clone()];
            spawn(&words, &start_words(domain.id))
        }
        Runs::Apart | Runs::Attached { .. } => Err(not_ours(domain)),
    }
}

/// Starts a managed machine's QEMU so that it waits for its memory. One that was started before under these names is
/// ended first.
pub(super) async fn start_waiting(
    config: &QemuConfig,
    next: &Next,
    limit: Duration,
) -> Result<(), DriverError> {
    let Runs::Managed { launch, .. } = &config.runs else {
        return Err(DriverError::permanent(Code::Unsupported, "Snaptree does not start this machine"));
    };
    kill_all(&next.processes(), KILLED).await?;
    for stale in [&next.qmp, &next.pid_file] {
        if_there(fs::remove_file(stale)).doing("remove", stale)?;
    }
    let values =
        Values { disks: &next.disks, qmp: &next.qmp, pid_file: &next.pid_file, incoming: Incoming::Defer };
    let mut words = command_line(launch, values)?;
    // It goes on when it is told to, whatever it did when its memory was taken.
    words.push("-S".to_owned());
    let mut begun = spawn(&words, &said_path(&next.pid_file))?;
    begun.process.as_ref().map_or(Ok(()), |process| note(&next.pid_file, process))?;
    match next.until_waiting(&mut begun, limit).await {
        Ok(()) => Ok(()),
        Err(error) => {
            begun.give_up(next.processes()).await;
            Err(error)
        }
    }
}

impl Next {
    /// Its processes that live.
    pub(super) fn processes(&self) -> Vec<Process> {
        living_with(&self.pid_file, self.disks.values().map(PathBuf::as_path))
    }

    async fn until_waiting(&self, begun: &mut Begun, limit: Duration) -> Result<(), DriverError> {
        let until = Instant::now() + limit;
        let mut pause = LOOK_SOON;
        loop {
            match Monitor::connect(&self.qmp).await {
                Ok(monitor) => {
                    return monitor.process().map_or(Ok(()), |process| note(&self.pid_file, &process));
                }
                Err(error @ (QmpError::Malformed { .. } | QmpError::Io { .. })) => return Err(failed(error)),
                Err(_) => {}
            }
            if let Some(error) = begun.is_in_vain()? {
                return Err(error);
            }
            if Instant::now() >= until {
                return Err(not_there(limit, Some(begun)));
            }
            tokio::time::sleep(pause).await;
            // A guest waits for it.
            pause = (pause * 2).min(LOOK_SOON * 8);
        }
    }
}

/// Whether the machine has its disks open, and runs or waits as wished. One that was started a moment ago has to write
/// its disks; it is noted.
async fn is_there(
    state: &DomainState,
    config: &QemuConfig,
    wish: RunState,
    is_new: bool,
) -> Result<bool, DriverError> {
    let Some(socket) = config.runs.qmp() else { return Ok(!users(state, config)?.is_empty()) };
    let mut monitor = match Monitor::connect(socket).await {
        Ok(monitor) => monitor,
        Err(QmpError::Absent { .. } | QmpError::Closed { .. }) => return Ok(false),
        // It listens before it is ready, and much memory takes a while.
        Err(QmpError::Silent { .. } | QmpError::TimedOut { .. }) if is_new => return Ok(false),
        Err(error) => return Err(failed(error)),
    };
    if is_new {
        match monitor.check_writes(state, config).await {
            Err(error) if error.class == ErrorClass::Unknown => return Ok(false),
            checked => checked?,
        }
        if let (Runs::Managed { pid_file, .. }, Some(process)) = (&config.runs, monitor.process()) {
            note(pid_file, &process)?;
        }
    }
    match (wish, monitor.run_state().await?) {
        (RunState::Running, Run::Paused) => monitor.cont().await.map(|()| true),
        (RunState::Paused, Run::Running) => monitor.stop().await.map(|()| true),
        _ => Ok(true),
    }
}

impl Monitor {
    /// Refuses a machine that was started on its disks and does not write them: with `-snapshot` or `readonly=on`, or
    /// from other files.
    async fn check_writes(&mut self, state: &DomainState, config: &QemuConfig) -> Result<(), DriverError> {
        let machine = self.look().await?;
        for disk in config.disks.keys() {
            let file = current_file(state, config, disk);
            let what = match machine.root_of(&file) {
                Some(node) if !node.read_only => continue,
                Some(_) => "opened it for reading alone (readonly=on)",
                None if machine.node_of(&file).is_some() => "put a file of its own upon it (-snapshot)",
                None => "has not opened it",
            };
            return Err(DriverError::permanent(
                Code::Invalid,
                format!(
                    "the machine was ended again: its QEMU does not write disk '{disk}' ({}) but {what}",
                    file.display()
                ),
            )
            .hint("correct the command that starts it: snaptree domain set NAME --launch COMMAND"));
        }
        Ok(())
    }
}

/// The machine outlives Snaptree: a process group of its own, nothing of ours inherited, its words in a file.
fn spawn(words: &[String], said: &Path) -> Result<Begun, DriverError> {
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
    let process = child.id().and_then(Process::of);
    Ok(Begun { child, process, said: said.to_path_buf(), ended: None })
}

/// The last line that a machine's QEMU said.
pub(super) fn last_words(said: &Path) -> Option<String> {
    let text = tail(said).ok()?;
    String::from_utf8_lossy(&text).lines().map(str::trim).rfind(|line| !line.is_empty()).map(str::to_owned)
}

/// The end of a file.
fn tail(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(SAID_BYTES_MAX)))?;
    let mut text = Vec::new();
    file.take(SAID_BYTES_MAX).read_to_end(&mut text)?;
    Ok(text)
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

/// Where the words of a start command go.
pub(super) fn start_words(domain: DomainId) -> PathBuf {
    std::env::temp_dir().join(format!("snaptree-start-{domain}.log"))
}

/// Where a managed machine's words go.
pub(super) fn said_path(pid_file: &Path) -> PathBuf {
    pid_file.with_extension("log")
}
