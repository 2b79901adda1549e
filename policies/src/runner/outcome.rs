//! How runs ended.

use std::collections::BTreeMap;

use snaptree_engine::OperationId;
use snaptree_engine::engine::{Engine, EngineError};
use snaptree_engine::event::PolicyRequest;
use snaptree_engine::log::{OpenOnly, OperationFilter};
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

/// The operations that were open at a moment: few, whatever the number of all. Asked about many requests, it is read once.
#[derive(Debug)]
pub struct Open(BTreeMap<OperationId, RunOutcome>);

impl Open {
    /// Those that are open now.
    ///
    /// # Errors
    /// The store failed.
    pub async fn read(engine: &Engine) -> Result<Self, EngineError> {
        let filter = OperationFilter { open: Some(OpenOnly), ..OperationFilter::default() };
        let rows = engine.log().operations(&filter, usize::MAX >> 1).await?;
        let standing = |attention| if attention { RunOutcome::NeedsAttention } else { RunOutcome::Open };
        Ok(Self(rows.into_iter().map(|row| (row.id, standing(row.needs_attention))).collect()))
    }

    /// How a request stood that was in the log before; none if it had ended.
    pub fn standing(&self, request: &PolicyRequest) -> Option<RunOutcome> {
        self.0.get(&request.operation?).copied()
    }

    /// How a request stood that was in the log before, or how it ended.
    ///
    /// # Errors
    /// The store failed.
    pub async fn outcome_of(
        &self,
        engine: &Engine,
        request: &PolicyRequest,
    ) -> Result<RunOutcome, EngineError> {
        match self.standing(request) {
            Some(standing) => Ok(standing),
            None => outcome_of(engine, request).await,
        }
    }
}
