//! The steps: what their data says, and what each asks of the host.

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use snaptree_engine::SnapshotId;
use snaptree_engine::domain::RunState;
use snaptree_engine::driver::{DriverError, ErrorClass, Learnt, StepContext, StepReport};
use snaptree_engine::operation::{Code, Failure, Poison, Reversal, Step};
use snaptree_engine::tree::SnapshotState;

use super::client::{Client, Effect};
use super::fault::{CallError, of_task};
use super::name::{escaped, marked};
use super::observe::{Machine, Mark, machines};
use super::soap::{Moref, Request};
use super::task::{Ended, Watched, begin, end};

/// How long the guest may take to come to rest, in minutes. vSphere allows 5 to 240.
const QUIESCE_MINUTES: &str = "15";

/// A step's data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "action", rename_all = "kebab-case", deny_unknown_fields)]
pub(super) enum Action {
    /// Takes a snapshot.
    Create {
        snapshot: SnapshotId,
        name: String,
        description: Option<String>,
        content: Wanted,
        power: RunState,
    },
    /// Goes back to one. `before` is what tells afterwards whether it took place.
    Revert { snapshot: SnapshotId, native: String, power_on: PowerOn, before: Before },
    /// Switches the machine on.
    Start,
    /// Deletes a snapshot; the host merges.
    Remove { snapshot: SnapshotId, native: String },
    /// Folds away what no snapshot needs any more and the host could not fold when it deleted.
    Consolidate,
    /// Gives a snapshot another name or description.
    Edit { snapshot: SnapshotId, native: String, to: Text, from: Text },
    /// Leaves a snapshot to whoever uses the host's own tools.
    Forget { snapshot: SnapshotId },
}

/// What a host keeps about a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Text {
    /// Its name.
    pub name: String,
    /// What is written about it.
    pub description: Option<String>,
}

/// What a snapshot is to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Wanted {
    /// Disks and memory.
    Memory,
    /// Disks.
    Disks,
    /// Disks, with the guest at rest.
    DisksAtRest,
}

/// Whether a revert may leave the machine running.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum PowerOn {
    /// As the snapshot has it.
    AsTaken,
    /// Never.
    Suppressed,
}

/// How the machine stood before a revert.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Before {
    /// The current snapshot.
    pub current: Option<String>,
    /// How it was powered.
    pub power: RunState,
    /// When it was switched on last.
    pub booted: Option<String>,
    /// The tasks that the host knew, by id and time: ids begin anew when a host does.
    pub tasks: BTreeSet<(String, Option<Timestamp>)>,
}

impl Action {
    pub(super) fn of(step: &Step) -> Result<Self, Failure> {
        Self::deserialize(&step.data).map_err(|error| {
            Failure::new(Code::Invalid, format!("step '{}' is none of this driver's: {error}", step.name))
        })
    }

    pub(super) fn step(&self, name: String, reversal: Reversal, poison: Poison) -> Result<Step, Failure> {
        Ok(Step { name, reversal, poison, data: json(self)? })
    }

    /// The word in the names of hooks.
    pub(super) const fn word(&self) -> &'static str {
        match self {
            Self::Create { .. } => "create",
            Self::Revert { .. } => "revert",
            Self::Start => "start",
            Self::Remove { .. } => "remove",
            Self::Consolidate => "consolidate",
            Self::Edit { .. } => "edit",
            Self::Forget { .. } => "forget",
        }
    }
}

fn json(value: &impl Serialize) -> Result<Value, Failure> {
    serde_json::to_value(value).map_err(|error| Failure::new(Code::Invalid, error.to_string()))
}

/// What is reported of a snapshot that was taken.
pub(super) fn taken(mark: &Mark, power: RunState) -> Result<StepReport, Failure> {
    let state = match (mark.state, power) {
        (RunState::Off, RunState::Off) => SnapshotState::Shutoff,
        (RunState::Off, _) => SnapshotState::DiskSnapshot,
        (state, _) => state.into(),
    };
    let native = Some(mark.native.clone());
    let learnt = json(&Learnt { taken: mark.taken, state: Some(state), native, ..Learnt::default() })?;
    // This hypervisor's layers are its own.
    Ok(StepReport { changes: Vec::new(), learnt })
}

/// Why a snapshot is not what was asked for: vSphere takes one without rest where it cannot bring the guest to rest.
pub(super) fn not_at_rest(mark: &Mark, content: Wanted, power: RunState) -> Option<Failure> {
    if content != Wanted::DisksAtRest || power == RunState::Off || mark.quiesced {
        return None;
    }
    let message = "the host took the snapshot without bringing the guest to rest";
    Some(
        Failure::new(Code::Unsupported, message)
            .hint("see to VMware Tools in the guest, or leave out --quiesce"),
    )
}

/// A machine that is worked on, within a step.
pub(super) struct Work<'a> {
    pub client: &'a Client,
    pub vm: Moref,
    pub context: &'a StepContext<'a>,
}

impl Work<'_> {
    pub(super) async fn execute(&self, action: &Action) -> Result<StepReport, DriverError> {
        match action {
            Action::Create { snapshot, name, description, content, power } => {
                let description = marked(description.as_deref(), *snapshot);
                self.create(*snapshot, &escaped(name), &description, *content, *power).await
            }
            Action::Revert { native, power_on, before, .. } => {
                self.revert(native, *power_on, before).await?;
                Ok(StepReport::default())
            }
            Action::Start => {
                self.start().await?;
                Ok(StepReport::default())
            }
            Action::Remove { native, .. } => {
                self.remove(native).await?;
                Ok(StepReport::default())
            }
            Action::Consolidate => {
                self.consolidate().await?;
                Ok(StepReport::default())
            }
            Action::Edit { snapshot, native, to, .. } => {
                self.rename(*snapshot, native, to).await?;
                Ok(StepReport::default())
            }
            // What carries our mark and is in no log of ours is left alone.
            Action::Forget { .. } => Ok(StepReport::default()),
        }
    }

    /// Takes a step back, whether it was not, half or wholly done.
    pub(super) async fn undo(&self, action: &Action) -> Result<(), DriverError> {
        match action {
            Action::Create { snapshot, .. } => {
                for mark in self.look().await?.marks(*snapshot).iter().rev() {
                    self.remove(&mark.native).await?;
                }
                Ok(())
            }
            Action::Revert { native, before, .. } => {
                let moved = has_moved(&self.look().await?, native, before);
                if moved { Err(no_way_back(action)) } else { Ok(()) }
            }
            Action::Remove { native, .. } => {
                if self.look().await?.lists(native) {
                    Ok(())
                } else {
                    Err(no_way_back(action))
                }
            }
            Action::Edit { snapshot, native, from, .. } => self.rename(*snapshot, native, from).await,
            Action::Start | Action::Consolidate | Action::Forget { .. } => Ok(()),
        }
    }

    async fn create(
        &self,
        snapshot: SnapshotId,
        name: &str,
        description: &str,
        content: Wanted,
        power: RunState,
    ) -> Result<StepReport, DriverError> {
        match self.look().await?.marks(snapshot) {
            [] => {}
            // What a task left that ended in a fault is not what was asked for.
            [left] => self.remove(&left.native).await?,
            [_, ..] => return self.taken(snapshot, content, power).await,
        }
        let task = self.ask_for_snapshot(name, description, content).await?;
        self.context.hooks.reached("esx.create.asked");
        match end(self.client, &task, self.watched()).await? {
            Ended::Badly(fault) => Err(of_task(&fault, &self.client.host)),
            Ended::Well => self.taken(snapshot, content, power).await,
        }
    }

    /// What was taken. Of several with one mark, a call that came twice, the oldest stays.
    async fn taken(
        &self,
        snapshot: SnapshotId,
        content: Wanted,
        power: RunState,
    ) -> Result<StepReport, DriverError> {
        let machine = self.look().await?;
        let Some((oldest, younger)) = machine.marks(snapshot).split_first() else {
            let message =
                format!("host '{}' says that it took the snapshot, and does not have it", self.client.host);
            return Err(DriverError::unknown(Code::Io, message));
        };
        for mark in younger.iter().rev() {
            self.remove(&mark.native).await?;
        }
        match not_at_rest(oldest, content, power) {
            Some(failure) => Err(failure.into()),
            None => Ok(taken(oldest, power)?),
        }
    }

    /// The newer call where the host has it: the older one is deprecated as of vSphere 8.
    async fn ask_for_snapshot(
        &self,
        name: &str,
        description: &str,
        content: Wanted,
    ) -> Result<Moref, DriverError> {
        let told = |error| self.client.told(error, Effect::Some);
        let memory = content == Wanted::Memory;
        let at_rest = content == Wanted::DisksAtRest;
        let version = self.client.content().await.map_err(told)?;
        if version.is_at_least(6, 5) {
            let mut request = Request::new("CreateSnapshotEx_Task", &self.vm)
                .text("name", name)
                .text("description", description)
                .flag("memory", memory);
            if at_rest {
                request =
                    request.raw(&format!("<quiesceSpec><timeout>{QUIESCE_MINUTES}</timeout></quiesceSpec>"));
            }
            match begin(self.client, &request).await {
                Err(error) if error.is_unknown_method() => {}
                asked => return asked.map_err(told),
            }
        }
        let request = Request::new("CreateSnapshot_Task", &self.vm)
            .text("name", name)
            .text("description", description)
            .flag("memory", memory)
            .flag("quiesce", at_rest);
        begin(self.client, &request).await.map_err(told)
    }

    async fn revert(&self, native: &str, power_on: PowerOn, before: &Before) -> Result<(), DriverError> {
        let request = Request::new("RevertToSnapshot_Task", &snapshot(native))
            .flag("suppressPowerOn", power_on == PowerOn::Suppressed);
        let task =
            begin(self.client, &request).await.map_err(|error| self.client.told(error, Effect::Some))?;
        self.context.hooks.reached("esx.revert.asked");
        let Ended::Badly(fault) = end(self.client, &task, self.watched()).await? else { return Ok(()) };
        let mut error = of_task(&fault, &self.client.host);
        if has_moved(&self.look().await?, native, before) {
            // The disks are back, and the power may not be: it is not over, and cannot be taken back.
            error.class = ErrorClass::Unknown;
        }
        Err(error)
    }

    async fn start(&self) -> Result<(), DriverError> {
        let ended = match begin(self.client, &Request::new("PowerOnVM_Task", &self.vm)).await {
            Ok(task) => end(self.client, &task, self.watched()).await?,
            Err(error) => return self.unless_on(self.client.told(error, Effect::Some)).await,
        };
        match ended {
            Ended::Well => Ok(()),
            Ended::Badly(fault) => self.unless_on(of_task(&fault, &self.client.host)).await,
        }
    }

    /// A machine that is on is what was wished, whoever switched it on.
    async fn unless_on(&self, error: DriverError) -> Result<(), DriverError> {
        if error.class == ErrorClass::Permanent && self.look().await?.power == RunState::Running {
            return Ok(());
        }
        Err(error)
    }

    /// Deletes one snapshot and leaves its children: of a whole branch one by one, so that nothing goes that nobody
    /// named, such as a backup's.
    async fn remove(&self, native: &str) -> Result<(), DriverError> {
        let request = Request::new("RemoveSnapshot_Task", &snapshot(native))
            .flag("removeChildren", false)
            .flag("consolidate", true);
        let task = match begin(self.client, &request).await {
            Ok(task) => task,
            Err(error) if error.is_gone() => return Ok(()),
            Err(error) => return Err(self.client.told(error, Effect::Some)),
        };
        self.context.hooks.reached("esx.remove.asked");
        match end(self.client, &task, self.watched()).await? {
            Ended::Well => Ok(()),
            // It may have failed at merging only; then what is left is consolidated.
            Ended::Badly(_) if !self.look().await?.lists(native) => Ok(()),
            Ended::Badly(fault) => Err(of_task(&fault, &self.client.host)),
        }
    }

    /// Not a task: it is done when it is answered.
    async fn rename(&self, id: SnapshotId, native: &str, to: &Text) -> Result<(), DriverError> {
        let request = Request::new("RenameSnapshot", &snapshot(native))
            .text("name", &escaped(&to.name))
            .text("description", &marked(to.description.as_deref(), id));
        let asked = self.client.call(&request, Effect::Some).await;
        asked.map(|_| ()).map_err(|error| self.client.told(error, Effect::Some))
    }

    async fn consolidate(&self) -> Result<(), DriverError> {
        if !self.look().await?.detail.consolidation_needed {
            return Ok(());
        }
        let request = Request::new("ConsolidateVMDisks_Task", &self.vm);
        let task =
            begin(self.client, &request).await.map_err(|error| self.client.told(error, Effect::Some))?;
        self.context.hooks.reached("esx.consolidate.asked");
        match end(self.client, &task, self.watched()).await? {
            Ended::Badly(fault) if self.look().await?.detail.consolidation_needed => {
                Err(of_task(&fault, &self.client.host))
            }
            Ended::Well | Ended::Badly(_) => Ok(()),
        }
    }

    fn watched(&self) -> Watched<'_> {
        Watched { progress: self.context.progress, call_off: self.context.call_off }
    }

    pub(super) async fn look(&self) -> Result<Machine, DriverError> {
        // Nothing was asked for yet, or it has ended: a look that fails leaves what was done to be resolved.
        let unknown = |error: CallError| {
            let mut error = self.client.told(error, Effect::None);
            if error.class == ErrorClass::Transient {
                error.class = ErrorClass::Unknown;
            }
            error
        };
        let found = machines(self.client, std::slice::from_ref(&self.vm)).await.map_err(unknown)?;
        found.into_values().next().ok_or_else(|| {
            DriverError::unknown(
                Code::NotFound,
                format!("host '{}' has no machine {}", self.client.host, self.vm),
            )
        })
    }
}

/// Whether a revert has moved the machine: it stands on the snapshot now, and did not before.
fn has_moved(machine: &Machine, native: &str, before: &Before) -> bool {
    let current = machine.current.as_ref().map(|current| current.id.as_str());
    current == Some(native) && before.current.as_deref() != Some(native)
}

fn snapshot(native: &str) -> Moref {
    Moref::new("VirtualMachineSnapshot", native)
}

fn no_way_back(action: &Action) -> DriverError {
    DriverError::permanent(Code::Invalid, format!("a {} cannot be taken back", action.word()))
}
