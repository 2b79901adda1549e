//! What happens to snapshots, and what is asked for them.

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{DeleteScope, DeleteWhat, MemoryKind, MergeWish, Place};
use crate::around::Around;
use crate::domain::RunState;
use crate::ids::{DiskName, SnapshotId, SnapshotName};
use crate::operation::Operation;
use crate::tree::{Hold, Labels, Snapshot, SnapshotState};

/// What goes with a request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestTerms {
    /// The SHA-256 (hex) of the command that a key was given with; none without a key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command_sha256: Option<String>,
    /// The moment after which the first step must not begin; none for whenever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Timestamp>,
    /// Programs to be run before and after.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub around: Option<Around>,
    /// What somebody else keeps inside the images and the user gives up for it, by its name there: see
    /// [`Inside`](crate::driver::Inside).
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub give_up: BTreeSet<String>,
}

impl RequestTerms {
    /// The same for a request that may begin whenever, with nothing around it.
    pub(crate) fn whenever(&self) -> Self {
        Self { deadline: None, around: None, ..self.clone() }
    }
}

/// Payload: a snapshot was asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotCreateRequested {
    /// The id that it will have.
    pub snapshot: SnapshotId,
    /// Its name.
    pub name: SnapshotName,
    /// What the user wrote about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Labels.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// The disks that it is to hold.
    pub disks: BTreeSet<DiskName>,
    /// Whether the machine's memory belongs to it.
    pub memory: MemoryKind,
    /// Where it is kept.
    #[serde(default, skip_serializing_if = "Place::is_usual")]
    pub place: Place,
    /// Whether the guest is asked to bring its file systems to rest first.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub quiesce: bool,
    /// Whether it keeps what a revert gives up. The memory belongs to it then only if the machine has any.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub before_revert: bool,
    /// Idempotency.
    #[serde(flatten)]
    pub request: RequestTerms,
}

impl SnapshotCreateRequested {
    /// The snapshot as it will be, as far as the request says.
    pub(crate) fn predicted(&self, operation: &Operation) -> Snapshot {
        Snapshot {
            id: self.snapshot,
            name: self.name.clone(),
            real_name: None,
            description: self.description.clone(),
            parent: None,
            created: operation.learnt.taken.unwrap_or(operation.requested),
            state: operation.learnt.state.unwrap_or(SnapshotState::Shutoff),
            memory: self.memory,
            disks: self.disks.clone(),
            labels: self.labels.clone(),
            hold: None,
            made_by: operation.actor.clone(),
            made_in: Some(operation.id),
            lost: false,
            native: operation.learnt.native.clone(),
            left_out: operation.learnt.left_out.clone(),
        }
    }
}

/// Payload: a snapshot exists. It holds what became known while it was taken.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotCreated {
    /// All of it; the projector sets its parent to the snapshot that was current.
    #[serde(flatten)]
    pub snapshot: Snapshot,
}

/// Payload: a revert was asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotRevertRequested {
    /// Where to.
    pub snapshot: SnapshotId,
    /// The run state asked for; none for the one that the snapshot has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_state: Option<RunState>,
    /// The snapshot that keeps what is given up, asked for together with this: without it nothing is reverted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep: Option<SnapshotId>,
    /// Idempotency.
    #[serde(flatten)]
    pub request: RequestTerms,
}

/// Payload: the machine is at that snapshot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotReverted {
    /// Which one.
    pub snapshot: SnapshotId,
}

/// Payload: a delete was asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotDeleteRequested {
    /// Every snapshot that goes, children before their parents.
    pub snapshots: Vec<SnapshotId>,
    /// The ones that were named.
    pub named: Vec<SnapshotId>,
    /// How the named ones were meant.
    pub scope: DeleteScope,
    /// Whether the data goes too.
    pub what: DeleteWhat,
    /// When the data is to be folded away.
    pub merge: MergeWish,
    /// Why; a policy's reasons.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reasons: Vec<String>,
    /// Idempotency.
    #[serde(flatten)]
    pub request: RequestTerms,
}

/// Payload: one snapshot is gone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotDeleted {
    /// Which one.
    pub snapshot: SnapshotId,
    /// The name that it had, for whoever reads the log alone.
    pub name: SnapshotName,
    /// Whether the hypervisor may still hold its data, as it merges it later.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stays: bool,
}

/// Payload: a change of what the hypervisor keeps about a snapshot was asked for; what is left out stays.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotEditRequested {
    /// What is to be.
    #[serde(flatten)]
    pub edit: SnapshotEdited,
    /// Idempotency.
    #[serde(flatten)]
    pub request: RequestTerms,
}

/// Payload: what of a snapshot changed; what is left out stayed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotEdited {
    /// Which one.
    pub snapshot: SnapshotId,
    /// The new name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<SnapshotName>,
    /// The name at the hypervisor that the new one stands for, where it was changed there and cannot be the name here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub real_name: Option<String>,
    /// The new description; an empty one removes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// All labels that it has from now on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<Labels>,
}

impl SnapshotEdited {
    /// Writes the change into a snapshot.
    pub(crate) fn apply(&self, snapshot: &mut Snapshot) {
        if let Some(name) = &self.name {
            snapshot.name = name.clone();
            snapshot.real_name.clone_from(&self.real_name);
        }
        if let Some(description) = &self.description {
            snapshot.description = Some(description.clone()).filter(|text| !text.is_empty());
        }
        if let Some(labels) = &self.labels {
            snapshot.labels.clone_from(labels);
        }
    }
}

/// Payload: a snapshot is held.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotHeld {
    /// Which one.
    pub snapshot: SnapshotId,
    /// The hold; it takes the place of an earlier one.
    pub hold: Hold,
}

/// Payload: a snapshot is held no longer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotReleased {
    /// Which one.
    pub snapshot: SnapshotId,
}

/// Payload: a snapshot that the hypervisor listed and the log did not know.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotAdopted {
    /// All that is known of it; its parent is the one that it has there.
    #[serde(flatten)]
    pub snapshot: Snapshot,
    /// Its name there, which need not be one that it can have here.
    pub listed_as: String,
    /// Snapshots of ours that stand upon it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub children: Vec<SnapshotId>,
}

impl SnapshotAdopted {
    /// The snapshot with its name at the hypervisor, where that is another one.
    pub(crate) fn known(&self) -> Snapshot {
        let real_name = Some(self.listed_as.clone()).filter(|real| real != self.snapshot.name.as_str());
        Snapshot { real_name, ..self.snapshot.clone() }
    }
}
