//! How an operation goes on.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::around::HookPhase;
use crate::layer::LayerChange;
use crate::operation::{Code, Failure, Step, Verdict};

/// Payload: an operation's steps are known.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperationPlanned {
    /// In the order in which they will be done.
    pub steps: Vec<Step>,
}

/// Payload: a step is about to be done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperationStepStarted {
    /// Its index in the plan.
    pub step: usize,
}

/// How a step was found to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HowFinished {
    /// The driver did it and said so.
    Executed,
    /// An observation after an interruption showed that it had been done.
    Observed,
}

/// Payload: a step is done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperationStepFinished {
    /// Its index in the plan.
    pub step: usize,
    /// How that is known.
    pub how: HowFinished,
    /// What of the layer graph changed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub changes: Vec<LayerChange>,
    /// What else the driver learnt.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub learnt: serde_json::Value,
}

/// Payload: a step is about to be undone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperationUndoStarted {
    /// Its index in the plan.
    pub step: usize,
    /// Why the operation goes back.
    pub failure: Failure,
}

/// Payload: a step is undone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperationUndoFinished {
    /// Its index in the plan.
    pub step: usize,
    /// What of the layer graph changed back.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub changes: Vec<LayerChange>,
}

/// Payload: a program before or after is about to be run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperationHookStarted {
    /// Which of the two.
    pub hook: HookPhase,
}

/// Payload: a program before or after has ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperationHookFinished {
    /// Which of the two.
    pub hook: HookPhase,
    /// What went wrong, with the end of what it wrote; none if it ended well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
}

/// Why a step is tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RetryKind {
    /// It failed, and may work the next time; the tries are counted.
    Failed,
    /// Somebody else was at it; waiting does not count.
    Busy,
}

/// Payload: a step did not come to its end this time; it is tried again at `retry_at`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperationAttemptFailed {
    /// Its index in the plan.
    pub step: usize,
    /// What went wrong.
    pub failure: Failure,
    /// Whether this try counts.
    pub kind: RetryKind,
    /// Not before this.
    pub retry_at: Timestamp,
}

/// Payload: outcome.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperationSucceeded {}

/// Payload: outcome.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperationFailed {
    /// Why.
    pub failure: Failure,
}

/// Payload: outcome.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperationCancelled {
    /// Who or what called it off.
    pub failure: Failure,
}

/// Payload: outcome.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperationExpired {
    /// The deadline, and when it was missed.
    pub failure: Failure,
}

/// Payload: neither on nor back.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperationNeedsAttention {
    /// What stands in the way.
    pub failure: Failure,
}

/// Payload: an operation that needed attention may try again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperationRetried {}

/// Payload: what someone who looked said.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperationResolved {
    /// What became of the step in hand.
    pub verdict: Verdict,
    /// Why that is known.
    pub reason: String,
    /// What of the layer graph changed with it, as far as an observation tells.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub changes: Vec<LayerChange>,
}

impl OperationResolved {
    /// What the operation ends with, if it was abandoned.
    pub fn abandoned(&self) -> Option<Failure> {
        let failure = || Failure::new(Code::NeedsAttention, format!("abandoned: {}", self.reason));
        (self.verdict == Verdict::Abandon).then(failure)
    }
}
