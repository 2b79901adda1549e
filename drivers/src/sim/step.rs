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
    Create {
        snapshot: SnapshotId,
        name: SnapshotName,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        description: Option<String>,
        disks: BTreeSet<DiskName>,
        memory: MemoryKind,
    },
    Revert {
        snapshot: SnapshotId,
        run_state: Option<RunState>,
    },
    Delete {
        snapshot: SnapshotId,
    },
    Edit {
        snapshot: SnapshotId,
        name: Option<SnapshotName>,
        description: Option<String>,
    },
    Forget {
        snapshot: SnapshotId,
    },
    Hide {
        snapshot: SnapshotId,
    },
    Flatten {
        snapshots: Vec<SnapshotId>,
    },
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
            Self::Edit { .. } => "edit",
            Self::Forget { .. } => "forget",
            Self::Hide { .. } => "hide",
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
            Self::Create { snapshot, name, description, disks, memory } => {
                let about = (name.as_str(), description.as_deref());
                let (native, state) = machine.take(*snapshot, about, disks, *memory)?;
                let (taken, native) = (Some(now), Some(native.to_string()));
                return json(&Learnt { taken, state: Some(state), native, ..Learnt::default() });
            }
            Self::Revert { snapshot, run_state } => machine.revert(*snapshot, *run_state)?,
            Self::Delete { snapshot } => machine.remove(*snapshot)?,
            Self::Edit { snapshot, name, description } => {
                machine.edit(*snapshot, name.as_ref().map(SnapshotName::as_str), description.as_deref())?;
            }
            // What carries our mark and is in no log of ours is left alone, and what is merged later stays.
            Self::Forget { .. } | Self::Hide { .. } => {}
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
