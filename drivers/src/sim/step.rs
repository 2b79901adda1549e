//! The steps: what their data says, and what each does to a machine.

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use snaptree_engine::domain::RunState;
use snaptree_engine::driver::Learnt;
use snaptree_engine::event::MemoryKind;
use snaptree_engine::operation::{Code, Failure, Poison, Reversal, Step};
use snaptree_engine::{DiskName, OperationId, SnapshotId, SnapshotName};

use super::json;
use super::machine::{Applied, Machine};

/// A step's data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "action", rename_all = "kebab-case", deny_unknown_fields)]
pub(super) enum Action {
    Create { snapshot: SnapshotId, name: SnapshotName, disks: BTreeSet<DiskName>, memory: MemoryKind },
    Revert { snapshot: SnapshotId, run_state: Option<RunState> },
    Delete { snapshot: SnapshotId },
    Forget { snapshot: SnapshotId },
    Flatten { snapshots: Vec<SnapshotId> },
}

/// What a create reports: the engine reads [`Learnt`], and the native id is kept for whoever reads the log.
#[derive(Serialize)]
struct Created {
    #[serde(flatten)]
    learnt: Learnt,
    native: String,
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
            Self::Delete { .. } => "delete",
            Self::Forget { .. } => "forget",
            Self::Flatten { .. } => "flatten",
        }
    }

    /// Lets the step take effect, and notes that it did. One that already has is not repeated.
    pub(super) fn apply(
        &self,
        machine: &mut Machine,
        operation: OperationId,
        step: usize,
        now: Timestamp,
    ) -> Result<Value, Failure> {
        if let Some(last) = machine.last_operation.as_ref().filter(|last| last.is(operation, step)) {
            return Ok(last.learnt.clone());
        }
        let learnt = self.effect(machine, now)?;
        machine.last_operation = Some(Applied { operation, step, learnt: learnt.clone() });
        Ok(learnt)
    }

    fn effect(&self, machine: &mut Machine, now: Timestamp) -> Result<Value, Failure> {
        match self {
            Self::Create { snapshot, name, disks, memory } => {
                let (native, state) = machine.take(*snapshot, name.as_str(), disks, *memory)?;
                let learnt = Learnt { taken: Some(now), state: Some(state), ..Learnt::default() };
                return json(&Created { learnt, native: native.to_string() });
            }
            Self::Revert { snapshot, run_state } => machine.revert(*snapshot, *run_state)?,
            Self::Delete { snapshot } => machine.remove(*snapshot)?,
            // What carries our mark and is in no log of ours is left alone.
            Self::Forget { .. } => {}
            Self::Flatten { snapshots } => {
                snapshots.iter().try_for_each(|snapshot| machine.remove(*snapshot))?;
            }
        }
        Ok(Value::Null)
    }

    /// Takes the step back, if it took effect.
    pub(super) fn take_back(
        &self,
        machine: &mut Machine,
        operation: OperationId,
        step: usize,
    ) -> Result<(), Failure> {
        let applied = machine.last_operation.take_if(|last| last.is(operation, step)).is_some();
        match self {
            Self::Create { snapshot, .. } if machine.marked(*snapshot).is_ok() => machine.remove(*snapshot),
            Self::Create { .. } => Ok(()),
            _ if applied => {
                Err(Failure::new(Code::Invalid, format!("a {} cannot be taken back", self.word())))
            }
            _ => Ok(()),
        }
    }
}
