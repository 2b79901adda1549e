//! A machine goes on from its memory.
//!
//! ```text
//!   switch   new layers upon the snapshot's; the next QEMU is started on them, the memory goes in; then the generation
//!   load     the old QEMU is ended, the next one gets its names (and the memory, if it has not), the guest goes on
//! ```
//! The memory goes in before anything is given up, so memory that cannot be loaded (a machine of another size, say) leaves
//! the domain as it was. Only where the two cannot be there at once (one port for both, no room for two memories) it is
//! loaded behind the switch.
//!
//! Behind the switch there is only forward: a next QEMU that is gone is started again, as long as nothing was written
//! to its layers. Memory that cannot be loaded leaves the machine off, with the snapshot's disks.
//!
//! Architecture Invariant: a QEMU that waits holds no locks of its images (seen: `-incoming defer`), so that it is there
//! is told by its socket, and whose it is by the files that it has open. No guest goes on while the old one lives.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;
use snaptree_engine::domain::RunState;
use snaptree_engine::driver::{DriverError, ErrorClass, Learnt, StepProgress, StepReport};
use snaptree_engine::operation::{Code, Failure};
use snaptree_engine::project::DomainState;
use tokio::time::Instant;

use super::memory::Migration;
use super::monitor::{Monitor, failed};
use super::ours::{forget, has_open, living, living_with, record_path};
use super::process::{kill_all, last_words, said_path, start_waiting};
use crate::process::Process;
use crate::qemu::adopt::Work;
use crate::qemu::agent::{Agent, Limits, Status};
use crate::qemu::config::QemuConfig;
use crate::qemu::files::{Doing, facts, if_there, stamp_of};
use crate::qemu::lock::{DYING, in_use, until_let_go, writer};
use crate::qemu::qmp::QmpError;
use crate::qemu::runs::Runs;
use crate::qemu::step::{KeptMemory, LoadMemory, Next};

/// How long a killed QEMU may take to be gone; one with much memory takes a while.
const GONE: Duration = Duration::from_secs(30);
/// Longest that no memory is read.
const STALLED: Duration = Duration::from_secs(60);
/// How long the guest agent is asked whether it came back frozen.
const THAW: Duration = Duration::from_secs(2);
const POLL_MS: u64 = 2;
const POLL_MAX_MS: u64 = 200;
const MEMORY_OF_HOST: &str = "/proc/meminfo";
/// What stays free on the host beside two memories.
const MEMORY_LEFT_BYTES: u64 = 64 << 20;
/// How often the memory is tried.
const TRIES: usize = 2;

impl Next {
    /// Starts it, and has it load its memory. Beside one that runs it may not be able to start, if both want the same
    /// port, or there may be no room for both: then that is done when that one is gone.
    pub(in crate::qemu) async fn start_beside(&self, work: Work<'_>) -> Result<(), DriverError> {
        let (_, config) = QemuConfig::of(work.context.state)?;
        let is_alone = super::users(work.context.state, &config)?.is_empty();
        let started = start_waiting(&config, self, work.img.times.start).await;
        work.reached("qemu.next.started");
        match (started, &self.memory) {
            (Ok(()), Some(memory)) if is_alone || memory.has_room_beside() => {
                self.load_first(work, memory).await
            }
            (Ok(()), _) => Ok(()),
            (Err(error), _) if is_alone => Err(error),
            (Err(error), _) => {
                tracing::info!(%error, "the next QEMU cannot be started beside the one that runs");
                self.end().await
            }
        }
    }

    /// Loads the memory while there is still a way back.
    async fn load_first(&self, work: Work<'_>, memory: &KeptMemory) -> Result<(), DriverError> {
        let mut monitor = Monitor::connect(&self.qmp).await.map_err(failed)?;
        let loaded = memory.load(work, &mut monitor).await;
        drop(monitor);
        let failure = match loaded {
            Ok(()) => {
                work.reached("qemu.next.loaded");
                return Ok(());
            }
            Err(Broken::Load(why)) => Failure::new(
                Code::Io,
                format!("the memory of the snapshot cannot be loaded, and nothing was given up: {why}"),
            )
            .hint("was the launch command changed since, or QEMU? snaptree domain set NAME --launch COMMAND sets it back"),
            Err(Broken::Other(error)) => return Err(error),
        };
        let failure = with_last_words(failure, &self.pid_file);
        self.end().await?;
        Err(failure.into())
    }

    /// Ends it, if it is there.
    pub(in crate::qemu) async fn end(&self) -> Result<(), DriverError> {
        kill_all(&self.processes(), GONE).await?;
        forget(&self.qmp, &self.pid_file)
    }

    /// It takes the place of the one before, whose names nobody uses any more.
    fn promote(&self, qmp: &Path, pid_file: &Path) -> Result<(), DriverError> {
        let said = (said_path(&self.pid_file), said_path(pid_file));
        let noted = (record_path(&self.pid_file), record_path(pid_file));
        let names =
            [(&*said.0, &*said.1), (&*noted.0, &*noted.1), (&self.pid_file, pid_file), (&self.qmp, qmp)];
        for (from, to) in names {
            if_there(fs::rename(from, to)).doing("rename", from)?;
        }
        Ok(())
    }
}

/// Why the machine does not go on from its memory.
enum Broken {
    /// The memory is at fault, or the QEMU that it went into: why.
    Load(String),
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
        let old = self.end_old(&config, (qmp, pid_file), work.context.state).await?;
        work.reached("qemu.load.old-ended");
        let mut broken = None;
        for _ in 0..TRIES {
            let mut monitor = match self.waiting(&config, (qmp, pid_file), work.img.times.start).await {
                Ok(Some(monitor)) => monitor,
                // It ran, and has ended since: what it wrote is newer than its memory.
                Ok(None) => return Ok(StepReport::default()),
                Err(Broken::Load(why)) => {
                    broken = Some(gave_up(&why));
                    break;
                }
                Err(Broken::Other(error)) => return Err(error),
            };
            work.reached("qemu.load.waiting");
            match self.load(work, &mut monitor, &old).await {
                Ok(()) => {
                    let thawed = self.thaw(&config).await;
                    work.reached("qemu.load.done");
                    return Ok(StepReport { changes: Vec::new(), learnt: json!({ "thawed": thawed }) });
                }
                Err(Broken::Load(why)) => {
                    drop(monitor);
                    let failure = with_last_words(gave_up(&why), pid_file);
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

    /// Has every QEMU end that is not the next one; they may not be gone yet. They are killed, for at their own end they
    /// would remove the sockets that the next one has made by the same names.
    async fn end_old(
        &self,
        config: &QemuConfig,
        (qmp, pid_file): (&Path, &Path),
        state: &DomainState,
    ) -> Result<Vec<Process>, DriverError> {
        let is_next = |process: &Process| has_open(process, self.next.disks.values().map(PathBuf::as_path));
        let mut old = living(pid_file, state, config);
        // The next one may have these names already.
        if let Ok(monitor) = Monitor::connect(qmp).await {
            old.extend(monitor.process().filter(|process| !old.contains(process)));
        }
        old.retain(|process| !is_next(process));
        old.iter().for_each(Process::kill);
        for file in &self.old {
            let Some(holder) = writer(file).doing("ask for the locks of", file)? else { continue };
            if !old.iter().any(|process| Some(process.pid()) == holder.pid) {
                let monitor = Monitor::connect(qmp).await;
                monitor.map_err(|error| in_use_busy(&holder).source(failed(error)))?.quit().await?;
            }
        }
        Ok(old)
    }

    /// The QEMU that waits, under the machine's names; none if the machine went on already, and is off again.
    async fn waiting(
        &self,
        config: &QemuConfig,
        (qmp, pid_file): (&Path, &Path),
        limit: Duration,
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
        start_waiting(config, &self.next, limit).await?;
        self.next.promote(qmp, pid_file)?;
        Ok(Some(Monitor::connect(qmp).await.map_err(failed)?))
    }

    /// Refuses to join a machine that somebody else started from the snapshot's disks. One that was killed in this
    /// moment lets go of them.
    async fn check_unused(&self) -> Result<(), Broken> {
        let until = Instant::now() + DYING;
        for file in self.next.disks.values() {
            while let Some(holder) = writer(file).doing("ask for the locks of", file)? {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    let why =
                        format!("somebody else started the machine meanwhile ({})", in_use(&holder).message);
                    return Err(not_loaded(&why));
                }
                until_let_go(&holder, left).await;
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
    async fn load(&self, work: Work<'_>, monitor: &mut Monitor, old: &[Process]) -> Result<(), Broken> {
        let memory = KeptMemory { file: self.memory.clone(), stamp: self.stamp };
        memory.load(work, monitor).await?;
        work.reached("qemu.load.loaded");
        self.until_alone(old).await?;
        if monitor.waits().await.map_err(gone)? {
            match self.wish {
                RunState::Running => monitor.cont().await.map_err(gone)?,
                // Else it would hold nothing of its disks until the guest goes on, and look like one that is off.
                _ => monitor.take_disks().await.map_err(gone)?,
            }
        }
        work.reached("qemu.load.resumed");
        monitor.take_memory_back().await.map_err(gone)?;
        Ok(())
    }

    /// Returns when the old machine is gone, whatever it had open.
    async fn until_alone(&self, old: &[Process]) -> Result<(), DriverError> {
        let until = Instant::now() + GONE;
        kill_all(old, GONE).await?;
        for file in &self.old {
            while let Some(holder) = writer(file).doing("ask for the locks of", file)? {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(in_use_busy(&holder));
                }
                until_let_go(&holder, left).await;
            }
        }
        Ok(())
    }

    async fn end_next(&self, pid_file: &Path) -> Result<(), DriverError> {
        kill_all(&living_with(pid_file, self.next.disks.values().map(PathBuf::as_path)), GONE).await
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

impl KeptMemory {
    /// Whether the memory of two machines fits into this one. What was written of it is about what it takes.
    fn has_room_beside(&self) -> bool {
        let text = fs::read_to_string(MEMORY_OF_HOST).unwrap_or_default();
        let free = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
        let free_kib = free.and_then(|free| free.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
        let wanted = self.stamp.size_bytes.saturating_add(self.stamp.size_bytes / 4);
        let wanted = wanted.saturating_add(MEMORY_LEFT_BYTES);
        free_kib.is_some_and(|free_kib| free_kib.saturating_mul(1024) > wanted)
    }

    /// Puts the memory into a QEMU that waits for it; one that has it already is left alone.
    async fn load(&self, work: Work<'_>, monitor: &mut Monitor) -> Result<(), Broken> {
        if monitor.status().await.map_err(gone)? == "inmigrate"
            && monitor.migration().await? == Migration::None
        {
            self.check()?;
            let file = fs::File::open(&self.file).doing("open", &self.file)?;
            let uri = monitor.give_memory(&file).await.map_err(gone)?;
            monitor.act("migrate-incoming", json!({ "uri": uri })).await.map_err(gone)?;
            work.reached("qemu.load.begun");
        }
        self.until_loaded(work, monitor).await
    }

    fn check(&self) -> Result<(), Broken> {
        match stamp_of(&self.file) {
            Ok(found) if found == self.stamp => Ok(()),
            Ok(_) => Err(not_loaded("its file was written since")),
            Err(error) => Err(not_loaded(&error.failure.message)),
        }
    }

    async fn until_loaded(&self, work: Work<'_>, monitor: &mut Monitor) -> Result<(), Broken> {
        let begun = Instant::now();
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
            // A twentieth of what it took so far is not missed by anybody.
            let pause_ms = u64::try_from(begun.elapsed().as_millis() / 20).unwrap_or(POLL_MAX_MS);
            monitor.pause(pause_ms.clamp(POLL_MS, POLL_MAX_MS)).await.map_err(gone)?;
        }
    }
}

fn in_use_busy(holder: &snaptree_engine::driver::InUse) -> DriverError {
    DriverError { class: ErrorClass::Busy, ..DriverError::from(in_use(holder)) }
}

fn not_loaded(why: &str) -> Broken {
    Broken::Load(why.to_owned())
}

/// What is so when it could not be loaded behind the switch.
fn gave_up(why: &str) -> Failure {
    Failure::new(
        Code::Io,
        format!(
            "the machine is off and stands at the snapshot's disks, but its memory could not be loaded: {why}; what it \
             wrote since its last snapshot is gone"
        ),
    )
    .hint("snaptree domain start boots it from those; revert again to try the memory once more")
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
