//! What is asked for, and the steps to it.

use serde::{Deserialize, Serialize};

use crate::event::{
    DomainUnregisterRequested, Event, MergeStarted, SnapshotCreateRequested, SnapshotDeleteRequested,
    SnapshotEditRequested, SnapshotRevertRequested,
};
use crate::ids::SnapshotId;

/// What an operation was asked to do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Request {
    /// Take a snapshot.
    Create(SnapshotCreateRequested),
    /// Go back to one.
    Revert(SnapshotRevertRequested),
    /// Delete some.
    Delete(SnapshotDeleteRequested),
    /// Change what the hypervisor keeps about one.
    Edit(SnapshotEditRequested),
    /// Fold tombstones away.
    Merge(MergeStarted),
    /// Let go of the domain.
    Unregister(DomainUnregisterRequested),
}

impl Request {
    /// The request that an event makes, if it makes one.
    pub fn of(event: &Event) -> Option<Self> {
        match event {
            Event::SnapshotCreateRequested(r) => Some(Self::Create(r.clone())),
            Event::SnapshotRevertRequested(r) => Some(Self::Revert(r.clone())),
            Event::SnapshotDeleteRequested(r) => Some(Self::Delete(r.clone())),
            Event::SnapshotEditRequested(r) => Some(Self::Edit(r.clone())),
            Event::MergeStarted(r) => Some(Self::Merge(r.clone())),
            Event::DomainUnregisterRequested(r) => Some(Self::Unregister(r.clone())),
            _ => None,
        }
    }

    /// The word in `op list`.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Create(_) => "create",
            Self::Revert(_) => "revert",
            Self::Delete(_) => "delete",
            Self::Edit(_) => "edit",
            Self::Merge(_) => "merge",
            Self::Unregister(_) => "unregister",
        }
    }

    /// The snapshots that it is about, the first one first.
    pub fn snapshots(&self) -> Vec<SnapshotId> {
        match self {
            Self::Create(r) => vec![r.snapshot],
            Self::Revert(r) => vec![r.snapshot],
            Self::Delete(r) => r.snapshots.clone(),
            Self::Edit(r) => vec![r.edit.snapshot],
            Self::Merge(r) => r.plan.snapshots.clone(),
            Self::Unregister(_) => Vec::new(),
        }
    }
}

/// Whether a step can be taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reversal {
    /// The driver can undo it, also after the steps behind it were undone.
    Undoable,
    /// Undoable until it has taken effect; once it is done (or found done) the operation only goes forward.
    PointOfNoReturn,
    /// Lies behind the point of no return.
    ForwardOnly,
}

/// Which snapshots' `Deleted` events a step brings, and when.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Poison {
    /// None.
    #[default]
    Nothing,
    /// With its `StepStarted`: it is the first that touches their data.
    AtStart(Vec<SnapshotId>),
    /// With its `StepFinished`: the hypervisor deletes in one call, or only a mark is set.
    AtFinish(Vec<SnapshotId>),
    /// With its `StepFinished`: they are deleted for the user, and the hypervisor merges their data later.
    Hidden(Vec<SnapshotId>),
}

/// The smallest thing a driver does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// What it does, as `op show` and the progress bar print it: `adopt vda`, `switch`.
    pub name: String,
    /// Whether it can be taken back.
    pub reversal: Reversal,
    /// The snapshots that it ends.
    #[serde(default, skip_serializing_if = "is_nothing")]
    pub poison: Poison,
    /// All that the driver needs to do it, resolve it or undo it; only the driver reads it.
    pub data: serde_json::Value,
}

fn is_nothing(poison: &Poison) -> bool {
    *poison == Poison::Nothing
}
