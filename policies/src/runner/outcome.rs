//! How runs ended.

use snaptree_engine::engine::{Engine, EngineError};
use snaptree_engine::event::PolicyRequest;
use snaptree_engine::log::OperationFilter;
use snaptree_engine::operation::Outcome;

/// How a request of a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunOutcome {
    /// It has not ended.
    Open,
    /// It can go neither on nor back by itself.
    NeedsAttention,
    /// It was refused, and became no operation.
    Refused,
    /// It became an operation, which ended.
    Ended(Outcome),
}

impl RunOutcome {
    /// The word in JSON; none while it is open.
    pub const fn as_str(self) -> Option<&'static str> {
        match self {
            Self::Open => None,
            Self::NeedsAttention => Some("needs-attention"),
            Self::Refused => Some("refused"),
            Self::Ended(outcome) => Some(outcome.as_str()),
        }
    }

    /// Whether the snapshot was taken.
    pub fn is_success(self) -> bool {
        self == Self::Ended(Outcome::Succeeded)
    }
}

/// How a request ended, as the log tells it.
///
/// # Errors
/// The store failed.
pub async fn outcome_of(engine: &Engine, request: &PolicyRequest) -> Result<RunOutcome, EngineError> {
    let Some(operation) = request.operation else { return Ok(RunOutcome::Refused) };
    let filter = OperationFilter { operation: Some(operation), ..OperationFilter::default() };
    let row = engine.log().operations(&filter, 1).await?.pop();
    Ok(match row {
        Some(row) => match row.outcome {
            Some(outcome) => RunOutcome::Ended(outcome),
            None if row.needs_attention => RunOutcome::NeedsAttention,
            None => RunOutcome::Open,
        },
        None => RunOutcome::Open,
    })
}
