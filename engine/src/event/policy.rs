//! What happens to policies, and what they do.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Actor, Uptime};
use crate::ids::{DomainId, DomainName, OperationId};
use crate::operation::Failure;

/// Payload: a policy was defined, or defined anew.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyDefined {
    /// The policy, checked; what it means is the business of the crate that runs policies.
    pub policy: serde_json::Value,
    /// The text that it was read from.
    pub source: String,
}

/// Payload: a policy ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyRemoved {}

/// Payload: a policy does not run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicySuspended {
    /// Why.
    pub reason: String,
}

/// Payload: a policy runs again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyResumed {}

/// What a run asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunPart {
    /// Snapshots.
    Snapshots,
    /// Deletes, after the snapshots.
    Retention,
}

/// Payload: a policy ran.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyFired {
    /// The planned instant, or the moment at which somebody asked for the run.
    pub planned: Timestamp,
    /// What it asked for.
    pub part: RunPart,
    /// Who asked for the run; none if it was due.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asked_by: Option<Actor>,
    /// Domain by domain.
    pub domains: Vec<PolicyRun>,
    /// For how long the machine had been up, which tells whether its clock leapt until the next run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uptime: Option<Uptime>,
}

/// What a run asked of one domain.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyRun {
    /// The domain.
    pub domain: DomainId,
    /// Its name then.
    pub name: DomainName,
    /// The requests, in their order.
    pub requests: Vec<PolicyRequest>,
}

/// One request of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyRequest {
    /// The name of the snapshot that it is about.
    pub snapshot: String,
    /// The operation that it became; none if it was refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<OperationId>,
    /// Why it was refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<Failure>,
    /// Of a delete: why the snapshot goes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reasons: Vec<String>,
}

/// Payload: planned instants of one domain that do not run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicySkipped {
    /// The domain.
    pub domain: DomainId,
    /// Its name then.
    pub name: DomainName,
    /// The first.
    pub first: Timestamp,
    /// The last.
    pub last: Timestamp,
    /// How many, at least.
    pub count: u32,
    /// Whether there are more than were counted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub more: bool,
    /// Why.
    pub why: String,
}
