//! The built-in simulated hypervisor: its disks have contents, so that anyone can try Snaptree with no
//! hypervisor installed, and see that a revert brings back what was there.
//!
//! A machine is one JSON file, `<state>/sim/<domain>.json`, replaced as a whole. The file names the last step
//! that took effect, written together with the effect; so every step is exactly done or not done, and an
//! observation tells which. A machine that has no file yet was never used: the first change makes the file.
//!
//! Code Map: `machine` (what a machine is), `step` (what the steps do to it), `plan` (which steps, and what
//! became of one), `file` (the file), `profile` (whose limits it has).

mod file;
mod machine;
mod plan;
mod profile;
mod step;

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use jiff::Timestamp;
use snaptree_engine::domain::{Disk, RunState};
use snaptree_engine::driver::{
    Driver, DriverError, Observation, Plan, Probe, Registration, Resolution, SeenSnapshot, StepContext,
    StepReport,
};
use snaptree_engine::operation::{Code, Failure, Request, Step};
use snaptree_engine::project::DomainState;
use snaptree_engine::{DiskName, OperationId, SnapshotId};

use file::MachineFile;
use machine::Machine;
use plan::Detail;
pub use profile::{Profile, SimOptions};
use step::Action;

/// How many blocks a disk has.
pub const BLOCKS: u64 = 1024;

/// What the guest sees as a disk's size.
pub const DISK_BYTES: u64 = 1 << 20;

/// The simulated hypervisor.
///
/// # Guarantees
/// Its work is done when a call returns, or when the process that called is gone: nothing goes on behind it.
/// Several processes may use one machine; each change has it for itself.
#[derive(Clone, Debug)]
pub struct SimDriver {
    folder: PathBuf,
}

/// A machine, and whether it has a file.
enum Found {
    Present(Machine),
    New(Machine),
    Missing,
}

impl SimDriver {
    /// Keeps its machines in `dir`, the state directory, under `sim/`.
    pub fn new(dir: PathBuf) -> Self {
        Self { folder: dir.join("sim") }
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
        self.change(state, |machine| machine.write(disk, block, value))
    }

    /// What the person at the machine would do: switches it on or off, pauses or resumes it. It boots with an
    /// empty memory.
    ///
    /// # Errors
    /// The machine's file cannot be read or written.
    pub fn power(&self, state: &DomainState, run_state: RunState) -> Result<(), DriverError> {
        self.change(state, |machine| {
            machine.power = machine.power.brought_to(run_state);
            Ok(())
        })
    }

    /// What the machine's memory holds; none while it is off.
    ///
    /// # Errors
    /// The machine's file cannot be read.
    pub fn memory(&self, state: &DomainState) -> Result<Option<u64>, DriverError> {
        Ok(self.machine(state)?.power.memory())
    }

    /// The SHA-256, in hex, of what a disk reads as now.
    ///
    /// # Errors
    /// The disk does not exist, or the machine's file cannot be read.
    pub fn content_sha256(&self, state: &DomainState, disk: &DiskName) -> Result<String, DriverError> {
        let content = self.machine(state)?.disks.remove(disk);
        Ok(content.ok_or_else(|| no_disk("the machine", disk))?.sha256())
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
        let machine = self.machine(state)?;
        let content = machine.marked(snapshot)?.disks.get(disk);
        Ok(content.ok_or_else(|| no_disk("the snapshot", disk))?.sha256())
    }

    fn file(&self, state: &DomainState) -> Result<MachineFile, Failure> {
        Ok(MachineFile::new(&self.folder, plan::domain(state)?.id))
    }

    fn find(&self, state: &DomainState) -> Result<Found, DriverError> {
        let file = self.file(state)?;
        let names = || plan::domain(state).map(|domain| domain.disks.iter().map(|disk| disk.name.clone()));
        match file.read()? {
            Some(machine) if names()?.all(|name| machine.disks.contains_key(&name)) => {
                Ok(Found::Present(machine))
            }
            Some(_) => Err(DriverError::permanent(
                Code::Drift,
                format!("the machine in {} has not all disks of the domain", file.path().display()),
            )),
            None if state.tree.is_empty() => Ok(Found::New(Machine::new(names()?))),
            None => Ok(Found::Missing),
        }
    }

    fn machine(&self, state: &DomainState) -> Result<Machine, DriverError> {
        match self.find(state)? {
            Found::Present(machine) | Found::New(machine) => Ok(machine),
            Found::Missing => Err(plan::missing().into()),
        }
    }

    /// Changes the machine as a whole or not at all.
    ///
    /// It blocks instead of yielding, as the files are small: an effect that outlived a call that was given
    /// up would have to be waited for in `settle`.
    fn change<T>(
        &self,
        state: &DomainState,
        effect: impl FnOnce(&mut Machine) -> Result<T, Failure>,
    ) -> Result<T, DriverError> {
        let file = self.file(state)?;
        let lock = file.lock()?;
        let mut machine = self.machine(state)?;
        let answer = effect(&mut machine)?;
        file.write(&lock, &machine)?;
        Ok(answer)
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
        disks.push(Disk { name: name.clone(), path: None, virtual_size_bytes: DISK_BYTES });
    }
    if disks.is_empty() {
        let name = DiskName::new("vda").map_err(|error| Failure::new(Code::Invalid, error.to_string()))?;
        disks.push(Disk { name, path: None, virtual_size_bytes: DISK_BYTES });
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
            notes: Vec::new(),
        })
    }

    async fn observe(&self, state: &DomainState) -> Result<Observation, DriverError> {
        self.file(state)?.sync()?;
        let (machine, detail) = match self.find(state)? {
            Found::Present(mut machine) => {
                let last_operation = machine.last_operation.take();
                (machine, Detail::Present { last_operation })
            }
            Found::New(machine) => (machine, Detail::New),
            Found::Missing => (Machine::new(std::iter::empty()), Detail::Missing),
        };
        let snapshots = machine.snapshots.into_iter().map(|kept| SeenSnapshot {
            id: kept.mark,
            native: kept.native.to_string(),
            parent: kept.parent.map(|parent| parent.to_string()),
            name: kept.name,
        });
        Ok(Observation {
            at: Timestamp::now(),
            run_state: machine.power.run_state(),
            in_use: Vec::new(),
            files: Default::default(),
            unreadable: Default::default(),
            foreign_dependants: Default::default(),
            generation: None,
            snapshots: snapshots.collect(),
            current: machine.current.map(|current| current.to_string()),
            detail: json(&detail)?,
        })
    }

    fn plan(
        &self,
        _operation: OperationId,
        request: &Request,
        state: &DomainState,
        observation: &Observation,
    ) -> Result<Plan, Failure> {
        plan::plan(request, state, observation).map_err(Failure::refused)
    }

    async fn execute(&self, context: &StepContext<'_>, step: &Step) -> Result<StepReport, DriverError> {
        let action = Action::of(step)?;
        context.hooks.reached(&format!("sim.{}.before", action.word()));
        let learnt = self.change(context.state, |machine| {
            action.apply(machine, context.operation, context.index, context.now)
        })?;
        context.hooks.reached(&format!("sim.{}.after", action.word()));
        // This hypervisor has no layers that could change.
        Ok(StepReport { changes: Vec::new(), learnt })
    }

    fn resolve(&self, context: &StepContext<'_>, _step: &Step, observation: &Observation) -> Resolution {
        plan::resolve(context.operation, context.index, observation)
    }

    async fn undo(&self, context: &StepContext<'_>, step: &Step) -> Result<StepReport, DriverError> {
        let action = Action::of(step)?;
        context.hooks.reached("sim.undo.before");
        self.change(context.state, |machine| action.take_back(machine, context.operation, context.index))?;
        context.hooks.reached("sim.undo.after");
        Ok(StepReport::default())
    }

    async fn settle(&self, _state: &DomainState, _operation: OperationId) -> Result<(), DriverError> {
        Ok(())
    }
}
