//! QEMU, for machines that are off and that run: every snapshot freezes the active layer of each disk and puts a new one
//! on top.
//!
//! # Where things are
//! ```text
//!  /vm/web.qcow2 -> .snaptree/<domain>/active/vda       the path that the user registered
//!  /vm/.snaptree/<domain>/                              the layers folder
//!      active -> gen-<operation>-<step>                 switched by one rename(2), for all disks at once
//!      gen-<operation>-<step>/
//!          vda -> /vm/.snaptree/<domain>/vda-<op 2>.qcow2
//!          manifest.json                                which file every snapshot reads as
//!      frozen-gen-<operation>-<step>                   the guest's file systems may be frozen for that step
//!      memory-<op 2>.vmstate                            the machine's memory at the moment of operation 2
//!      vda-<op 1>-base.qcow2                            the registered image: frozen, never unlinked
//!      vda-<op 1>.qcow2                                 built upon it: frozen by operation 2
//!      vda-<op 2>.qcow2                                 built upon that one: the machine writes it
//! ```
//! Layers name one another by absolute path. No header ever carries `active` or an adopted path.
//!
//! # The path of a request
//! `observe` (headers and locks), `plan` (pure; `drift` is what it refuses), then per step `adopt`, `switch`,
//! `merge` (pull, push, drop) or `flatten`; under a machine that runs `live` does its part of `switch` and `merge`, over
//! `qmp`; `keep` ends a snapshot with memory. Snapshots inside the images are `internal`'s, and need none of the above.
//! `resolve` (pure) tells after an interruption what became of a step.
//!
//! Architecture Invariant: what a layer with dependants reads as never changes, except by the push of its only
//! dependant into it; and only `DropLayers` and `Clean` unlink a file that is in the log.

mod adopt;
mod agent;
mod bitmaps;
mod config;
mod disks;
mod drift;
mod files;
mod flatten;
mod generation;
mod img;
mod inside;
mod internal;
mod keep;
mod kept;
mod libvirt;
mod live;
mod lock;
mod manifest;
mod merge;
mod observe;
mod plan;
mod plan_create;
mod plan_end;
mod plan_merge;
mod power;
mod probe;
mod qcow2;
mod qmp;
mod record;
mod resolve;
mod runs;
mod step;
mod switch;

use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use serde::Deserialize;
use snaptree_engine::OperationId;
use snaptree_engine::domain::{Access, RunState};
use snaptree_engine::driver::{
    Driver, DriverError, ErrorClass, Head, Kept, Observation, Plan, PowerWish, Probe, Registration, Remedy,
    Resolution, StepContext, StepReport, Touched,
};
use snaptree_engine::operation::{Code, Failure, Request, Step};
use snaptree_engine::project::DomainState;

pub use config::{
    AccessWish, DiskPaths, LeftOut, MachineFacts, PathWish, QemuConfig, QemuOptions, RawWish, RepairWish,
    bases_of, files_of, machine_of,
};
pub use disks::{DisksWish, KeptLayers};
pub use img::ToolTimes;
pub use manifest::{Manifest, ManifestHead, ManifestSnapshot};
pub use runs::{Runs, RunsWish};

use crate::operation_lock::OperationLock;
use adopt::Work;
use img::QemuImg;
use step::QemuStep;

/// How long an orphaned tool may go on before it is ended.
const SETTLE_GRACE_DEFAULT: Duration = Duration::from_secs(10);

/// Drives QEMU's disk images.
#[derive(Clone, Debug)]
pub struct QemuDriver {
    run_dir: PathBuf,
    img: QemuImg,
    settle_grace: Duration,
    left_out: LeftOut,
}

impl QemuDriver {
    /// A driver that keeps its operations' locks in `run_dir`, which it makes when it needs it.
    pub fn new(run_dir: PathBuf) -> Self {
        Self {
            run_dir,
            img: QemuImg::new("qemu-img".into()),
            settle_grace: SETTLE_GRACE_DEFAULT,
            left_out: LeftOut::default(),
        }
    }

    /// With another qemu-img than the one on the path.
    #[must_use]
    pub fn qemu_img(self, program: PathBuf) -> Self {
        Self { img: QemuImg { program, ..self.img }, ..self }
    }

    /// With other times that qemu-img may take.
    #[must_use]
    pub fn tool_times(self, times: ToolTimes) -> Self {
        Self { img: QemuImg { times, ..self.img }, ..self }
    }

    /// With another time that an orphaned tool is given before it is ended.
    #[must_use]
    pub fn settle_grace(self, grace: Duration) -> Self {
        Self { settle_grace: grace, ..self }
    }

    /// With another way to take media that a machine writes and that are no disks of its domain.
    #[must_use]
    pub fn left_out(self, left_out: LeftOut) -> Self {
        Self { left_out, ..self }
    }

    /// With a limit on how many bytes a second a merge may move; 0 for none. It holds for QEMU's jobs and for what
    /// qemu-img commits and converts; for a rebase qemu-img 7.2 knows none.
    #[must_use]
    pub fn job_speed(self, bytes: u64) -> Self {
        Self { img: QemuImg { speed_bytes: bytes, ..self.img }, ..self }
    }
}

#[async_trait]
impl Driver for QemuDriver {
    async fn probe(&self, registration: &Registration) -> Result<Probe, DriverError> {
        probe::probe(&self.img, registration, &self.run_dir).await
    }

    async fn access(&self, state: &DomainState, wish: &serde_json::Value) -> Result<Access, DriverError> {
        let (domain, config) = QemuConfig::of(state)?;
        let wish = AccessWish::deserialize(wish).map_err(|error| {
            DriverError::permanent(Code::Invalid, "how a QEMU machine is reached cannot be read")
                .source(error)
        })?;
        let is_other = wish.runs.qmp.is_some();
        let before = config.runs.qmp().map(Path::to_path_buf);
        // The steps of an operation that needs attention go by the disks that there were.
        if let (false, Some(open)) = (wish.disks.is_none(), state.open.first()) {
            let message = format!("the {} {} of this domain is still open", open.request.kind(), open.id);
            let failure = Failure::new(Code::Invalid, message).refused();
            return Err(failure.hint("`snaptree recover` finishes it; then its disks can be changed").into());
        }
        let (config, disks) = config.with_disks(&self.img, state, domain, &wish.disks).await?;
        let config = config.reached(wish, domain, &self.run_dir)?;
        if config.runs.qmp() != before.as_deref() {
            keeps_its_socket(state)?;
        }
        if is_other {
            probe::check_monitor(&config.runs).await?;
        }
        let capabilities = config::capabilities(config.agent.as_ref(), &config.runs);
        Ok(Access { config: config.to_value()?, capabilities, disks })
    }

    async fn observe(&self, state: &DomainState) -> Result<Observation, DriverError> {
        let state = state.clone();
        files::check_layers(&QemuConfig::of(&state)?.1.layers)?;
        let machine = live::look(&state).await?;
        // A file system that hangs must not hang everything else.
        match tokio::task::spawn_blocking(move || observe::observe(&state, Timestamp::now(), machine)).await {
            Ok(observed) => observed,
            Err(error) => {
                Err(DriverError::new(ErrorClass::Transient, Code::Io, "the images cannot be looked at")
                    .source(error))
            }
        }
    }

    fn plan(
        &self,
        operation: OperationId,
        request: &Request,
        state: &DomainState,
        observation: &Observation,
    ) -> Result<Plan, Failure> {
        plan::plan(operation, request, state, observation, self.left_out)
    }

    async fn execute(&self, context: &StepContext<'_>, step: &Step) -> Result<StepReport, DriverError> {
        let step = QemuStep::of(step)?;
        files::check_layers(&QemuConfig::of(context.state)?.1.layers)?;
        let lock = OperationLock::take(&self.run_dir, context.operation)?;
        let work = Work { context, img: &self.img, lock: &lock };
        let done = match &step {
            QemuStep::Adopt(adopt) => adopt.execute(work).await,
            QemuStep::Switch(switch) => switch.execute(work).await,
            QemuStep::Pull(pull) => pull.execute(work).await,
            QemuStep::Push(push) => push.execute(work).await,
            QemuStep::Drop(drop) => drop.execute(work).await,
            QemuStep::Flatten(flatten) => flatten.execute(work).await,
            QemuStep::Fold(fold) => fold.execute(work).await,
            QemuStep::Place(place) => place.execute(work).await,
            QemuStep::Clean(clean) => clean.execute(work).await,
            QemuStep::Power(power) => power.execute(work).await,
            QemuStep::Keep(keep) => keep.execute(work).await,
            QemuStep::Resume(resume) => resume.execute(work).await,
            QemuStep::Save(save) => save.execute(work).await,
            QemuStep::Load(load) => load.execute(work).await,
            QemuStep::Erase(erase) => erase.execute(work).await,
        };
        give_back(lock, &done);
        done
    }

    fn resolve(&self, context: &StepContext<'_>, step: &Step, observation: &Observation) -> Resolution {
        match QemuStep::of(step) {
            Ok(step) => resolve::resolve(context, &step, observation),
            Err(failure) => Resolution::HalfDone(Remedy::AskSomeone(failure)),
        }
    }

    fn touches(&self, step: &Step) -> Option<Touched> {
        QemuStep::of(step).ok()?.touches()
    }

    async fn undo(&self, context: &StepContext<'_>, step: &Step) -> Result<StepReport, DriverError> {
        let step = QemuStep::of(step)?;
        files::check_layers(&QemuConfig::of(context.state)?.1.layers)?;
        let lock = OperationLock::take(&self.run_dir, context.operation)?;
        let work = Work { context, img: &self.img, lock: &lock };
        let undone = match &step {
            QemuStep::Adopt(adopt) => adopt.undo(work).await,
            QemuStep::Switch(switch) => switch.undo(work).await,
            QemuStep::Pull(pull) => pull.undo(work).await,
            QemuStep::Push(push) => push.undo(work).await,
            QemuStep::Flatten(flatten) => flatten.undo().await,
            QemuStep::Place(place) => place.undo(),
            QemuStep::Power(power) => power.undo(work).await,
            QemuStep::Save(save) => save.undo(work).await,
            QemuStep::Load(load) => load.undo(work).await,
            QemuStep::Drop(_)
            | QemuStep::Clean(_)
            | QemuStep::Fold(_)
            | QemuStep::Keep(_)
            | QemuStep::Resume(_)
            | QemuStep::Erase(_) => Err(DriverError::permanent(
                Code::Invalid,
                "a step behind the point of no return cannot be taken back",
            )),
        };
        give_back(lock, &undone);
        undone
    }

    async fn kept_head(&self, state: &DomainState) -> Result<Option<Head>, DriverError> {
        kept::head(state)
    }

    async fn kept(&self, state: &DomainState) -> Result<Option<Kept>, DriverError> {
        kept::kept(state)
    }

    async fn power(&self, state: &DomainState, wish: PowerWish) -> Result<(), DriverError> {
        match wish {
            PowerWish::Start => live::start(state, RunState::Running, self.img.times.start).await,
            PowerWish::Shutdown => live::end(state, live::Ending::Shutdown).await,
            PowerWish::End => live::end(state, live::Ending::AtOnce).await,
        }
    }

    fn forget(&self, state: &DomainState) {
        live::forget_machine(state);
    }

    async fn settle(&self, state: &DomainState, operation: OperationId) -> Result<(), DriverError> {
        OperationLock::settle(&self.run_dir, operation, self.settle_grace).await?;
        let patience = internal::patience(state, operation);
        if is_under_machine(state, operation) { live::settle(state, patience).await } else { Ok(()) }
    }
}

/// Whether what became of the operation's steps can only be told with the machine, if it runs.
fn is_under_machine(state: &DomainState, operation: OperationId) -> bool {
    let open = state.open.iter().find(|open| open.id == operation);
    let mut steps = open.into_iter().flat_map(|open| &open.steps);
    steps.any(|step| QemuStep::of(step).is_ok_and(|step| step.is_under_machine()))
}

/// What became of a step under a machine only the machine tells that it was done under.
fn keeps_its_socket(state: &DomainState) -> Result<(), Failure> {
    let Some(open) = state.open.iter().find(|open| is_under_machine(state, open.id)) else { return Ok(()) };
    let message = format!(
        "the {} {} was at work under the machine, and only by the QMP socket of that time can it be told how far it came",
        open.request.kind(),
        open.id
    );
    Err(Failure::new(Code::Invalid, message).refused().hint(
        "`snaptree op retry` or `snaptree op resolve` ends it; all but the socket can be changed meanwhile",
    ))
}

/// Where the end of a step is unknown a tool may still be at work, and its lock must be found by recovery.
fn give_back(lock: OperationLock, done: &Result<StepReport, DriverError>) {
    match done {
        Err(error) if error.class == ErrorClass::Unknown => drop(lock),
        _ => lock.release(),
    }
}
