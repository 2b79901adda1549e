//! The built-in simulated hypervisor: its disks have contents, so that anyone can try Snaptree with no
//! hypervisor installed, and see that a revert brings back what was there.
//!
//! A machine is one JSON file, `<state>/sim/<domain>.json`, replaced as a whole. The file names the last step
//! that took effect, written together with the effect; so every effect is exactly there or not there, and an
//! observation tells which. A machine that has no file yet was never used: the first change makes the file.
//!
//! There are two kinds of machines. Where the hypervisor deletes and merges in one call, each snapshot holds a copy
//! (`machine`, `step`, `plan`). Where it does not, as QEMU, the disks are chains of layers, and the engine merges
//! them (`layered`). The driver sees both as a `Host`.
//!
//! What can go wrong is said by [`Faults`]; in production nothing does.
//!
//! Code Map: `host` (what a machine can do), `machine`, `step`, `plan` and `plain` (copies), `layered` (layers),
//! `vault` and `file` (where it is kept), `profile` (whose limits it has), `faults` (what goes wrong).

mod faults;
mod file;
mod host;
mod layered;
mod machine;
mod plain;
mod plan;
mod profile;
mod step;
mod vault;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use snaptree_engine::domain::{Disk, Domain, RunState};
use snaptree_engine::driver::{
    Driver, DriverError, Observation, Plan, Probe, Registration, Resolution, StepContext, StepReport,
};
use snaptree_engine::operation::{Code, Failure, Request, Step};
use snaptree_engine::project::DomainState;
use snaptree_engine::{DiskName, OperationId, SnapshotId};

pub use faults::{Direction, Fault, FaultPoint, Faults, INJECTED, NoFaults};
use host::{At, Effects, Freshness, GoingOn, Host};
use layered::Layered;
use machine::{Content, Machine, Power};
pub use profile::{Profile, SimOptions};
use vault::Vault;

/// How many blocks a disk has.
pub const BLOCKS: u64 = 1024;

/// What the guest sees as a disk's size.
pub const DISK_BYTES: u64 = 1 << 20;

/// What a machine, or a snapshot of it, holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holding {
    /// Per disk the blocks that do not read as zero.
    pub disks: BTreeMap<DiskName, BTreeMap<u64, u64>>,
    /// Whether it runs, or will after a revert.
    pub run_state: RunState,
    /// What the memory holds; none without one.
    pub memory: Option<u64>,
}

impl Holding {
    fn of(disks: BTreeMap<DiskName, Content>, power: Power) -> Self {
        let disks =
            disks.into_iter().map(|(disk, content)| (disk, Arc::unwrap_or_clone(content.0))).collect();
        Self { disks, run_state: power.run_state(), memory: power.memory() }
    }
}

/// What someone does at the hypervisor itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ByHand {
    /// Takes a snapshot of that name.
    Take(String),
    /// Deletes a snapshot of ours.
    Remove(SnapshotId),
    /// Reverts to a snapshot of ours.
    Revert(SnapshotId),
    /// Gives a snapshot of ours another name.
    Rename(SnapshotId, String),
}

/// The simulated hypervisor.
///
/// # Guarantees
/// Its work is done when a call returns, or when the process that called is gone, unless its [`Faults`] say
/// otherwise. Several processes may use one machine; each change has it for itself.
#[derive(Clone)]
pub struct SimDriver {
    vault: Vault,
    faults: Arc<dyn Faults>,
}

impl fmt::Debug for SimDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimDriver").field("vault", &self.vault).finish_non_exhaustive()
    }
}

/// Runs a method for the kind of machine that the domain is.
macro_rules! hosted {
    ($self:ident.$method:ident($state:expr $(, $argument:expr)*)) => {
        if is_layered($state) {
            $self.$method::<Layered>($state $(, $argument)*)
        } else {
            $self.$method::<Machine>($state $(, $argument)*)
        }
    };
}

/// Whether the disks are chains of layers, as the log says.
fn is_layered(state: &DomainState) -> bool {
    state.domain.as_ref().is_some_and(|domain| !domain.capabilities.merges_itself)
}

impl SimDriver {
    /// Keeps its machines in `dir`, the state directory, under `sim/`.
    pub fn new(dir: PathBuf) -> Self {
        Self { vault: Vault::Folder(dir.join("sim")), faults: Arc::new(NoFaults) }
    }

    /// Keeps its machines in memory; clones share them.
    pub fn in_memory() -> Self {
        Self { vault: Vault::Memory(Arc::default()), faults: Arc::new(NoFaults) }
    }

    /// Lets things go wrong.
    #[must_use]
    pub fn with_faults(mut self, faults: Arc<dyn Faults>) -> Self {
        self.faults = faults;
        self
    }

    /// What the guest would do: writes `value` into a block of a disk. A disk reads as zeros where nothing
    /// was written. While the machine runs, its memory counts the writes.
    ///
    /// # Errors
    /// The disk or the block does not exist, or the machine's file cannot be read or written.
    pub fn write(
        &self,
        state: &DomainState,
        disk: &DiskName,
        block: u64,
        value: u64,
    ) -> Result<(), DriverError> {
        hosted!(self.write_as(state, disk, block, value))
    }

    fn write_as<H: Host>(
        &self,
        state: &DomainState,
        disk: &DiskName,
        block: u64,
        value: u64,
    ) -> Result<(), DriverError> {
        self.change(state, |machine: &mut H, _| machine.write(disk, block, value))
    }

    /// What the person at the machine would do: switches it on or off, pauses or resumes it. It boots with an
    /// empty memory.
    ///
    /// # Errors
    /// The machine's file cannot be read or written.
    pub fn power(&self, state: &DomainState, run_state: RunState) -> Result<(), DriverError> {
        hosted!(self.power_as(state, run_state))
    }

    fn power_as<H: Host>(&self, state: &DomainState, run_state: RunState) -> Result<(), DriverError> {
        self.change(state, |machine: &mut H, _| {
            machine.bring_to(run_state);
            Ok(())
        })
    }

    /// What someone does at the hypervisor itself, past Snaptree.
    ///
    /// # Errors
    /// The hypervisor keeps no list of snapshots or has no such one, or the machine's file cannot be read or written.
    pub fn by_hand(&self, state: &DomainState, act: &ByHand) -> Result<(), DriverError> {
        hosted!(self.by_hand_as(state, act))
    }

    fn by_hand_as<H: Host>(&self, state: &DomainState, act: &ByHand) -> Result<(), DriverError> {
        self.change(state, |machine: &mut H, _| machine.by_hand(act))
    }

    /// What the machine's memory holds; none while it is off.
    ///
    /// # Errors
    /// The machine's file cannot be read.
    pub fn memory(&self, state: &DomainState) -> Result<Option<u64>, DriverError> {
        Ok(self.holding(state)?.memory)
    }

    /// What the machine holds now.
    ///
    /// # Errors
    /// The machine's file cannot be read.
    pub fn holding(&self, state: &DomainState) -> Result<Holding, DriverError> {
        hosted!(self.holding_as(state))
    }

    fn holding_as<H: Host>(&self, state: &DomainState) -> Result<Holding, DriverError> {
        let mut machine: H = self.machine(state)?;
        let power = *machine.power();
        Ok(Holding::of(machine.contents(), power))
    }

    /// What each live snapshot holds. One that the hypervisor no longer has is not among them.
    ///
    /// # Errors
    /// The machine's file cannot be read.
    pub fn snapshots(&self, state: &DomainState) -> Result<BTreeMap<SnapshotId, Holding>, DriverError> {
        hosted!(self.snapshots_as(state))
    }

    fn snapshots_as<H: Host>(
        &self,
        state: &DomainState,
    ) -> Result<BTreeMap<SnapshotId, Holding>, DriverError> {
        let machine: H = self.machine(state)?;
        let kept = |id| machine.kept(state, id).ok().map(|(disks, power)| (id, Holding::of(disks, power)));
        Ok(state.tree.iter().filter_map(|snapshot| kept(snapshot.id)).collect())
    }

    /// The SHA-256, in hex, of what a disk reads as now.
    ///
    /// # Errors
    /// The disk does not exist, or the machine's file cannot be read.
    pub fn content_sha256(&self, state: &DomainState, disk: &DiskName) -> Result<String, DriverError> {
        let holding = self.holding(state)?.disks.remove(disk);
        Ok(Content(holding.ok_or_else(|| no_disk("the machine", disk))?.into()).sha256())
    }

    /// The SHA-256, in hex, of what a disk reads as in a snapshot.
    ///
    /// # Errors
    /// The hypervisor has no such snapshot, it does not hold the disk, or the machine's file cannot be read.
    pub fn snapshot_sha256(
        &self,
        state: &DomainState,
        snapshot: SnapshotId,
        disk: &DiskName,
    ) -> Result<String, DriverError> {
        hosted!(self.snapshot_sha256_as(state, snapshot, disk))
    }

    fn snapshot_sha256_as<H: Host>(
        &self,
        state: &DomainState,
        snapshot: SnapshotId,
        disk: &DiskName,
    ) -> Result<String, DriverError> {
        let machine: H = self.machine(state)?;
        let content = machine.kept(state, snapshot)?.0.remove(disk);
        Ok(content.ok_or_else(|| no_disk("the snapshot", disk))?.sha256())
    }

    /// The machine; none if it is gone.
    fn find<H: Host>(&self, state: &DomainState) -> Result<Option<(H, Freshness)>, DriverError> {
        let domain = plan::domain(state)?;
        self.found(state, domain, self.vault.read(domain.id)?)
    }

    fn found<H: Host>(
        &self,
        state: &DomainState,
        domain: &Domain,
        kept: Option<H>,
    ) -> Result<Option<(H, Freshness)>, DriverError> {
        match kept {
            Some(mut machine) if domain.disks.iter().all(|disk| machine.has_disk(&disk.name)) => {
                machine.recognise(state);
                Ok(Some((machine, Freshness::Used)))
            }
            Some(_) => Err(DriverError::permanent(
                Code::Drift,
                format!("the machine in {} has not all disks of the domain", self.vault.place(domain.id)),
            )),
            None if state.tree.is_empty() => Ok(Some((H::new(domain), Freshness::New))),
            None => Ok(None),
        }
    }

    fn machine<H: Host>(&self, state: &DomainState) -> Result<H, DriverError> {
        Ok(self.find(state)?.ok_or_else(plan::missing)?.0)
    }

    /// Changes the machine as a whole or not at all.
    ///
    /// It blocks instead of yielding, as the files are small: an effect that outlived a call that was given
    /// up would have to be waited for in `settle`.
    fn change<H: Host, T>(
        &self,
        state: &DomainState,
        effect: impl FnOnce(&mut H, &Domain) -> Result<T, Failure>,
    ) -> Result<T, DriverError> {
        let domain = plan::domain(state)?;
        self.vault.change(domain.id, |kept| {
            let mut machine: H = self.found(state, domain, kept)?.ok_or_else(plan::missing)?.0;
            let answer = effect(&mut machine, domain)?;
            Ok((machine, answer))
        })
    }

    fn observe_as<H: Host>(&self, state: &DomainState) -> Result<Observation, DriverError> {
        let domain = plan::domain(state)?;
        self.vault.sync(domain.id)?;
        Ok(H::observe(self.find(state)?, domain)?)
    }

    async fn execute_as<H: Host>(
        &self,
        state: &DomainState,
        context: &StepContext<'_>,
        step: &Step,
    ) -> Result<StepReport, DriverError> {
        let (word, effects) = H::kind(step)?;
        let at = At::of(context, self.faults.clock_off());
        let fault = self.fault(context, step, word, Direction::Forward).await?;
        context.hooks.reached(&format!("sim.{word}.before"));
        match fault {
            Some(fault @ (Fault::Transient | Fault::Busy | Fault::Permanent | Fault::Hang)) => {
                return Err(fault.error());
            }
            Some(fault @ Fault::GoesOn) => {
                let (operation, index, now) = (at.operation, at.index, at.now);
                self.change(state, |machine: &mut H, domain| {
                    machine.let_finish(domain);
                    *machine.going_on() = Some(GoingOn { operation, index, step: step.clone(), now });
                    Ok(())
                })?;
                return Err(fault.error());
            }
            _ => {}
        }
        if effects == Effects::Several {
            self.change(state, |machine: &mut H, domain| {
                machine.let_finish(domain);
                machine.begin(domain, at, step)
            })?;
            context.hooks.reached(&format!("sim.{word}.half"));
        }
        if let Some(fault @ Fault::HalfDone) = fault {
            return Err(fault.error());
        }
        let report = self.change(state, |machine: &mut H, domain| {
            machine.let_finish(domain);
            machine.perform(domain, at, step)
        })?;
        context.hooks.reached(&format!("sim.{word}.after"));
        match fault {
            Some(fault) => Err(fault.error()),
            None => Ok(report),
        }
    }

    async fn undo_as<H: Host>(
        &self,
        state: &DomainState,
        context: &StepContext<'_>,
        step: &Step,
    ) -> Result<StepReport, DriverError> {
        let (word, _) = H::kind(step)?;
        let at = At::of(context, self.faults.clock_off());
        let fault = self.fault(context, step, word, Direction::Back).await?;
        context.hooks.reached("sim.undo.before");
        match fault {
            None | Some(Fault::LostReply) => {}
            Some(Fault::Transient) => return Err(Fault::Transient.error()),
            Some(_) => return Err(Fault::Hang.error()),
        }
        let report = self.change(state, |machine: &mut H, domain| {
            machine.let_finish(domain);
            machine.take_back(domain, at, step)
        })?;
        context.hooks.reached("sim.undo.after");
        match fault {
            Some(fault) => Err(fault.error()),
            None => Ok(report),
        }
    }

    /// Waits as long as the step takes, and says what goes wrong with it.
    async fn fault(
        &self,
        context: &StepContext<'_>,
        step: &Step,
        word: &'static str,
        direction: Direction,
    ) -> Result<Option<Fault>, Failure> {
        let point = FaultPoint {
            domain: plan::domain(context.state)?.id,
            operation: context.operation,
            step: context.index,
            word,
            reversal: step.reversal,
            direction,
        };
        self.faults.latency(&point).await;
        Ok(self.faults.fault(&point))
    }

    /// What goes on behind is waited for.
    fn settle_as<H: Host>(&self, state: &DomainState) -> Result<(), DriverError> {
        let found = self.find::<H>(state)?;
        if !found.is_some_and(|(mut machine, _)| machine.going_on().is_some()) {
            return Ok(());
        }
        self.change(state, |machine: &mut H, domain| {
            machine.let_finish(domain);
            Ok(())
        })
    }
}

/// None of our types fails to serialize; the error is serde_json's.
fn json(value: &impl serde::Serialize) -> Result<serde_json::Value, Failure> {
    serde_json::to_value(value).map_err(|error| Failure::new(Code::Invalid, error.to_string()))
}

fn no_disk(owner: &str, disk: &DiskName) -> DriverError {
    DriverError::permanent(Code::NotFound, format!("{owner} has no disk '{disk}'"))
}

/// The disks asked for, or one if none are.
fn disks(given: &[(DiskName, PathBuf)]) -> Result<Vec<Disk>, Failure> {
    let mut disks: Vec<Disk> = Vec::with_capacity(given.len());
    for (name, path) in given {
        if path != Path::new("") {
            let message = format!("disk '{name}' of a simulated machine cannot be {}", path.display());
            return Err(Failure::new(Code::Unsupported, message)
                .hint("its disks are kept in the state directory: give their names only")
                .refused());
        }
        if disks.iter().any(|known| known.name == *name) {
            return Err(Failure::new(Code::Invalid, format!("disk '{name}' is given twice")).refused());
        }
        disks.push(Disk::new(name.clone(), None, DISK_BYTES));
    }
    if disks.is_empty() {
        let name = DiskName::new("vda").map_err(|error| Failure::new(Code::Invalid, error.to_string()))?;
        disks.push(Disk::new(name, None, DISK_BYTES));
    }
    Ok(disks)
}

#[async_trait]
impl Driver for SimDriver {
    async fn probe(&self, registration: &Registration) -> Result<Probe, DriverError> {
        let options = SimOptions::read(&registration.options)?;
        Ok(Probe {
            disks: disks(&registration.disks)?,
            config: json(&options)?,
            capabilities: options.profile.capabilities(),
            claims: Vec::new(),
            notes: Vec::new(),
        })
    }

    async fn observe(&self, state: &DomainState) -> Result<Observation, DriverError> {
        hosted!(self.observe_as(state))
    }

    fn plan(
        &self,
        operation: OperationId,
        request: &Request,
        state: &DomainState,
        observation: &Observation,
    ) -> Result<Plan, Failure> {
        let planned = if is_layered(state) {
            Layered::plan(operation, request, state, observation)
        } else {
            <Machine as Host>::plan(operation, request, state, observation)
        };
        planned.map_err(Failure::refused)
    }

    async fn execute(&self, context: &StepContext<'_>, step: &Step) -> Result<StepReport, DriverError> {
        if is_layered(context.state) {
            self.execute_as::<Layered>(context.state, context, step).await
        } else {
            self.execute_as::<Machine>(context.state, context, step).await
        }
    }

    fn resolve(&self, context: &StepContext<'_>, step: &Step, observation: &Observation) -> Resolution {
        if is_layered(context.state) {
            Layered::resolve(context, step, observation)
        } else {
            <Machine as Host>::resolve(context, step, observation)
        }
    }

    async fn undo(&self, context: &StepContext<'_>, step: &Step) -> Result<StepReport, DriverError> {
        if is_layered(context.state) {
            self.undo_as::<Layered>(context.state, context, step).await
        } else {
            self.undo_as::<Machine>(context.state, context, step).await
        }
    }

    async fn settle(&self, state: &DomainState, _operation: OperationId) -> Result<(), DriverError> {
        hosted!(self.settle_as(state))
    }
}
