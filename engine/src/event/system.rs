//! What happens to the installation and its hosts.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::domain::DriverKind;
use crate::ids::{HostName, OperationId, SnapshotId, SnapshotName};
use crate::layer::LayerGraph;
use crate::operation::Failure;
use crate::tree::Tree;

/// Payload: what was taken over from beside the layers, because the log was restored from an older copy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SystemRestored {
    /// The last event that the lost log had when the layers were switched last.
    pub seq: u64,
    /// Its hash (hex), which this log does not have there.
    pub hash: String,
    /// The operation that switched them.
    pub switched_by: OperationId,
    /// Every live snapshot, and the current one.
    pub tree: Tree,
    /// Deleted snapshots whose data is still there, by their last names.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tombstones: BTreeMap<SnapshotId, SnapshotName>,
    /// The files.
    pub layers: LayerGraph,
    /// Snapshots that this log did not know.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adopted: Vec<SnapshotName>,
    /// Snapshots of this log that are gone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gone: Vec<SnapshotName>,
}

/// Payload: a host was registered, or is spoken to otherwise from here on. It is in the stream of the installation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostAdded {
    /// Its name.
    pub host: HostName,
    /// Who speaks to it.
    pub driver: DriverKind,
    /// Where it is and who we are there; only the driver reads it. Where a password comes from is in it, and never the
    /// password.
    pub config: serde_json::Value,
}

/// Payload: a host is no longer known. It is in the stream of the installation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostRemoved {
    /// Its name.
    pub host: HostName,
}

/// Payload: a state directory was made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SystemOpened {
    /// The random id of the installation, which is the first previous hash (hex).
    pub installation: String,
    /// The program's version.
    pub program: String,
}

/// Payload: a projection of the stream as it was before this event was stored. A stored one that is not as its event says
/// is not used, so whoever changes it has to change the log as well.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointKept {
    /// The projector that made it.
    pub projector: u32,
    /// The SHA-256 of its text (hex).
    pub sha256: String,
}

impl CheckpointKept {
    /// Of a projection's text.
    pub fn of(projector: u32, text: &str) -> Self {
        let sha256 = Sha256::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
        Self { projector, sha256 }
    }
}

/// What an observation showed of a step whose end was not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StepFound {
    /// It is done.
    Done,
    /// It has had no effect.
    NotBegun,
    /// It has begun, and is not done.
    HalfDone,
}

/// What follows from what was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Course {
    /// The operation goes on.
    Forward,
    /// The operation is taken back.
    Back,
    /// Someone has to look at it.
    Ask,
}

/// Payload: the end of a step was not known, and was made out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SystemRecovered {
    /// Its index in the plan.
    pub step: usize,
    /// What was found of it.
    pub found: StepFound,
    /// What follows.
    pub course: Course,
    /// Why its end was not known; none if the process that had begun it was cut short.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
}
