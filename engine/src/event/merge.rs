//! What Snaptree does of itself: merges, and what it finds at the hypervisor.

use serde::{Deserialize, Serialize};

use crate::ids::SnapshotId;
use crate::reconcile::drift::Finding;
use crate::reconcile::merge::MergePlan;

/// Payload: the request of a merge.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MergeStarted {
    /// What is to be folded, and which way.
    pub plan: MergePlan,
}

/// Payload: tombstones that were folded away.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MergeFinished {
    /// The snapshots that they had been.
    pub snapshots: Vec<SnapshotId>,
}

/// Payload: a tombstone that stays for now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MergeDeferred {
    /// The snapshot that it had been.
    pub snapshot: SnapshotId,
    /// Why.
    pub reason: String,
}

/// Payload: a difference that no operation of ours explains.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DriftFound {
    /// Which one.
    pub finding: Finding,
}

/// Payload: a difference that is no longer there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DriftCleared {
    /// Which one.
    pub finding: Finding,
}
