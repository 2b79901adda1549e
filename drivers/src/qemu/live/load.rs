//! A machine goes on from its memory.
//!
//! ```text
//!   switch   new layers upon the snapshot's; the next QEMU is started on them and waits; then the generation
//!   load     the old QEMU is ended, the next one gets its names, the memory goes in, the guest goes on
//! ```
//! Behind the switch there is only forward: a next QEMU that is gone is started again, as long as nothing was written
//! to its layers. Memory that cannot be loaded leaves the machine off, with the snapshot's disks.
//!
//! Architecture Invariant: a QEMU that waits holds no locks of its images (seen: `-incoming defer`), so that it is there
//! is told by its socket, and whose it is by the files that it has open. No guest goes on while the old one lives.

use std::fs;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use snaptree_engine::domain::RunState;
use snaptree_engine::driver::{DriverError, ErrorClass, Learnt, StepProgress, StepReport};
use snaptree_engine::operation::{Code, Failure};
use tokio::time::Instant;

use super::memory::Migration;
use super::monitor::{Monitor, failed};
use super::process::{last_words, managed_pid, said_path, start_waiting};
use crate::qemu::adopt::Work;
use crate::qemu::agent::{Agent, Limits, Status};
use crate::qemu::config::QemuConfig;
use crate::qemu::files::{Doing, facts, if_there, remove, stamp_of};
use crate::qemu::lock::{DYING, in_use, writer};
use crate::qemu::qmp::QmpError;
use crate::qemu::runs::Runs;
use crate::qemu::step::{LoadMemory, Next};

/// How long a killed QEMU may take to be gone; one with much memory takes a while.
const GONE: Duration = Duration::from_secs(30);
/// Longest that no memory is read.
const STALLED: Duration = Duration::from_secs(60);
/// How long the guest agent is asked whether it came back frozen.
const THAW: Duration = Duration::from_secs(2);
const POLL_MS: u64 = 2;
const POLL: Duration = Duration::from_millis(POLL_MS);
/// How often the memory is tried.
const TRIES: usize = 2;

impl Next {
    /// Starts it. Beside one that runs it may not be able to start, if both want the same port: then it is started when
    /// that one is gone.
    pub(in crate::qemu) async fn start_beside(&self, work: Work<'_>) -> Result<(), DriverError> {
        let (_, config) = QemuConfig::of(work.context.state)?;
        let started = start_waiting(&config, self).await;
        work.reached("qemu.next.started");
        match started {
            Ok(()) => Ok(()),
            Err(error) if super::users(work.context.state, &config)?.is_empty() => Err(error),
            Err(error) => {
                tracing::info!(%error, "the next QEMU cannot be started beside the one that runs");
                self.end().await
            }
        }
    }

    /// Ends it, if it is there.
    pub(in crate::qemu) async fn end(&self) -> Result<(), DriverError> {
        for file in self.disks.values() {
            if let Some(pid) = managed_pid(&self.pid_file, file) {
                end_process(pid, &self.pid_file).await?;
            }
        }
        for path in [&self.qmp, &self.pid_file, &said_path(&self.pid_file)] {
            remove(path)?;
        }
        Ok(())
    }

    /// It takes the place of the one before, whose names nobody uses any more.
    fn promote(&self, qmp: &Path, pid_file: &Path) -> Result<(), DriverError> {
        let said = (said_path(&self.pid_file), said_path(pid_file));
        for (from, to) in [(&*said.0, &*said.1), (&self.pid_file, pid_file), (&self.qmp, qmp)] {
            if_there(fs::rename(from, to)).doing("rename", from)?;
        }
        Ok(())
    }
}

/// Why the machine does not go on from its memory.
enum Broken {
    /// The memory is at fault, or the QEMU that it went into.
    Load(Failure),
    /// Something else.
    Other(DriverError),
}

impl From<DriverError> for Broken {
    fn from(error: DriverError) -> Self {
        Self::Other(error)
    }
}

impl LoadMemory {
    /// Does it, or what is left of it.
    pub(in crate::qemu) async fn execute(&self, work: Work<'_>) -> Result<StepReport, DriverError> {
        work.reached("qemu.load.begin");
        let (_, config) = QemuConfig::of(work.context.state)?;
        let Runs::Managed { qmp, pid_file, .. } = &config.runs else {
            return Err(DriverError::permanent(Code::Unsupported, "Snaptree does not start this machine"));
        };
        self.end_old(qmp, pid_file).await?;
        work.reached("qemu.load.old-ended");
        let mut broken = None;
        for _ in 0..TRIES {
            let mut monitor = match self.waiting(&config, (qmp, pid_file)).await {
                Ok(Some(monitor)) => monitor,
                // It ran, and has ended since: what it wrote is newer than its memory.
                Ok(None) => return Ok(StepReport::default()),
                Err(Broken::Load(failure)) => {
                    broken = Some(failure);
                    break;
                }
                Err(Broken::Other(error)) => return Err(error),
            };
            work.reached("qemu.load.waiting");
            match self.load(work, &mut monitor).await {
                Ok(()) => {
                    let thawed = self.thaw(&config).await;
                    work.reached("qemu.load.done");
                    return Ok(StepReport { changes: Vec::new(), learnt: json!({ "thawed": thawed }) });
                }
                Err(Broken::Load(failure)) => {
                    drop(monitor);
                    let failure = with_last_words(failure, pid_file);
                    tracing::warn!(%failure, "the memory could not be loaded");
                    self.end_next(pid_file).await?;
                    broken = Some(failure);
                }
                Err(Broken::Other(error)) => return Err(error),
            }
        }
        work.reached("qemu.load.failed");
        let learnt = Learnt { failed: broken, ..Learnt::default() };
        Ok(StepReport { changes: Vec::new(), learnt: serde_json::to_value(learnt).unwrap_or_default() })
    }

    /// Has the old QEMU end; it may not be gone yet. It is killed, for at its own end it would remove the sockets that
    /// the next one has made by the same names.
    async fn end_old(&self, qmp: &Path, pid_file: &Path) -> Result<(), DriverError> {
        for file in &self.old {
            let Some(holder) = writer(file).doing("ask for the locks of", file)? else { continue };
            match managed_pid(pid_file, file) {
                Some(pid) => signal_kill(pid),
                None => {
                    let mut monitor = Monitor::connect(qmp)
                        .await
                        .map_err(|error| in_use_busy(&holder).source(failed(error)))?;
                    monitor.quit().await?;
                }
            }
        }
        Ok(())
    }

    /// The QEMU that waits, under the machine's names; none if the machine went on already, and is off again.
    async fn waiting(
        &self,
        config: &QemuConfig,
        (qmp, pid_file): (&Path, &Path),
    ) -> Result<Option<Monitor>, Broken> {
        if let Ok(monitor) = Monitor::connect(&self.next.qmp).await {
            self.next.promote(qmp, pid_file)?;
            return Ok(Some(monitor));
        }
        if let Some(monitor) = self.under_its_name(qmp).await? {
            return Ok(Some(monitor));
        }
        self.check_unused().await?;
        if self.next.disks.values().any(|file| self.is_written(file)) {
            return Ok(None);
        }
        start_waiting(config, &self.next).await?;
        self.next.promote(qmp, pid_file)?;
        Ok(Some(Monitor::connect(qmp).await.map_err(failed)?))
    }

    /// Refuses to join a machine that somebody else started from the snapshot's disks. One that was killed in this
    /// moment lets go of them.
    async fn check_unused(&self) -> Result<(), Broken> {
        let until = Instant::now() + DYING;
        for file in self.next.disks.values() {
            while let Some(holder) = writer(file).doing("ask for the locks of", file)? {
                if Instant::now() > until {
                    let why =
                        format!("somebody else started the machine meanwhile ({})", in_use(&holder).message);
                    return Err(not_loaded(&why));
                }
                tokio::time::sleep(POLL).await;
            }
        }
        Ok(())
    }

    async fn under_its_name(&self, qmp: &Path) -> Result<Option<Monitor>, DriverError> {
        let mut monitor = match Monitor::connect(qmp).await {
            Ok(monitor) => monitor,
            // The old one's, which is dying, or what it left.
            Err(QmpError::Absent { .. } | QmpError::Closed { .. }) => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let machine = match monitor.look().await {
            Ok(machine) => machine,
            Err(error) if error.failure.code == Code::Io => return Ok(None),
            Err(error) => return Err(error),
        };
        let ours = self.next.disks.values().all(|file| machine.node_of(file).is_some());
        Ok(ours.then_some(monitor))
    }

    fn is_written(&self, file: &Path) -> bool {
        facts(file).is_ok_and(|(_, _, header)| header.has_data(file))
    }

    /// Puts the memory in, and lets the guest go on.
    async fn load(&self, work: Work<'_>, monitor: &mut Monitor) -> Result<(), Broken> {
        if monitor.status().await.map_err(gone)? == "inmigrate"
            && monitor.migration().await? == Migration::None
        {
            self.check_memory()?;
            let file = fs::File::open(&self.memory).doing("open", &self.memory)?;
            let uri = monitor.give_memory(&file).await.map_err(gone)?;
            monitor.act("migrate-incoming", json!({ "uri": uri })).await.map_err(gone)?;
            work.reached("qemu.load.begun");
        }
        self.until_loaded(work, monitor).await?;
        work.reached("qemu.load.loaded");
        self.until_alone().await?;
        if self.wish == RunState::Running && monitor.waits().await.map_err(gone)? {
            monitor.cont().await.map_err(gone)?;
        }
        work.reached("qemu.load.resumed");
        monitor.take_memory_back().await.map_err(gone)?;
        Ok(())
    }

    fn check_memory(&self) -> Result<(), Broken> {
        match stamp_of(&self.memory) {
            Ok(found) if found == self.stamp => Ok(()),
            Ok(_) => Err(not_loaded("its file was written since")),
            Err(error) => Err(not_loaded(&error.failure.message)),
        }
    }

    async fn until_loaded(&self, work: Work<'_>, monitor: &mut Monitor) -> Result<(), Broken> {
        let mut moved = (0, Instant::now());
        loop {
            let status = monitor.status().await.map_err(gone)?;
            match monitor.migration().await.map_err(gone)? {
                Migration::Completed if status != "inmigrate" => return Ok(()),
                Migration::None if status != "inmigrate" => {
                    return Err(not_loaded("the machine was started without it meanwhile"));
                }
                Migration::Failed(why) => return Err(not_loaded(&why)),
                Migration::Active { done_bytes, total_bytes, .. } => {
                    let progress = StepProgress::Bytes { done: done_bytes, total: total_bytes };
                    work.context.progress.step_progress(progress);
                    if done_bytes > moved.0 {
                        moved = (done_bytes, Instant::now());
                    }
                }
                _ => {}
            }
            if moved.1.elapsed() > STALLED {
                return Err(not_loaded("no more of it was read"));
            }
            monitor.pause(POLL_MS).await.map_err(gone)?;
        }
    }

    /// Returns when the old machine is gone.
    async fn until_alone(&self) -> Result<(), DriverError> {
        let until = Instant::now() + GONE;
        for file in &self.old {
            while let Some(holder) = writer(file).doing("ask for the locks of", file)? {
                if Instant::now() > until {
                    return Err(in_use_busy(&holder));
                }
                tokio::time::sleep(POLL).await;
            }
        }
        Ok(())
    }

    async fn end_next(&self, pid_file: &Path) -> Result<(), DriverError> {
        for file in self.next.disks.values() {
            if let Some(pid) = managed_pid(pid_file, file) {
                end_process(pid, pid_file).await?;
            }
        }
        Ok(())
    }

    /// A guest that was frozen when its memory was taken comes back frozen. How many file systems were thawed.
    async fn thaw(&self, config: &QemuConfig) -> u64 {
        let (RunState::Running, Some(socket)) = (self.wish, &config.agent) else { return 0 };
        let thaw = async {
            let mut agent = Agent::connect(socket, Limits::default()).await?;
            match agent.status().await? {
                Status::Frozen => agent.thaw(THAW).await,
                _ => Ok(0),
            }
        };
        match tokio::time::timeout(THAW, thaw).await {
            Ok(Ok(thawed)) => thawed,
            Ok(Err(error)) => {
                tracing::warn!(%error, "whether the guest came back frozen cannot be told");
                0
            }
            Err(_) => {
                tracing::warn!(
                    "whether the guest came back frozen cannot be told: its agent does not answer"
                );
                0
            }
        }
    }
}

fn in_use_busy(holder: &snaptree_engine::driver::InUse) -> DriverError {
    DriverError { class: ErrorClass::Busy, ..DriverError::from(in_use(holder)) }
}

fn not_loaded(why: &str) -> Broken {
    Broken::Load(
        Failure::new(
            Code::Io,
            format!("the machine stands at the snapshot's disks, but its memory could not be loaded: {why}"),
        )
        .hint("snaptree domain start boots it from those, if it is off; revert again to try the memory once more"),
    )
}

/// What a QEMU that loads memory says last: one that cannot ends.
fn gone(error: DriverError) -> Broken {
    match (error.class, error.failure.code) {
        (ErrorClass::Unknown, Code::Io) | (ErrorClass::Permanent, _) => not_loaded(&error.failure.message),
        _ => Broken::Other(error),
    }
}

fn with_last_words(failure: Failure, pid_file: &Path) -> Failure {
    match last_words(&said_path(pid_file)) {
        Some(words) => Failure { message: format!("{} (QEMU: {words})", failure.message), ..failure },
        None => failure,
    }
}

fn signal_kill(pid: Pid) {
    if let Err(error) = kill(pid, Signal::SIGKILL) {
        tracing::debug!(%pid, %error, "it could not be signalled");
    }
}

/// Ends a QEMU, and waits until it is gone.
async fn end_process(pid: Pid, pid_file: &Path) -> Result<(), DriverError> {
    signal_kill(pid);
    let until = Instant::now() + GONE;
    while has_process(pid) {
        if Instant::now() > until {
            return Err(DriverError::new(
                ErrorClass::Busy,
                Code::InUse,
                format!("the QEMU of {} (pid {pid}) cannot be ended", pid_file.display()),
            ));
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// A process that has ended and was not waited for has nothing open.
fn has_process(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}
