//! What happened to runs that someone may want to hear of.

use std::fmt;

use snaptree_engine::around::HookPhase;
use snaptree_engine::engine::{Engine, EngineError};
use snaptree_engine::event::{Event, PolicyRequest};
use snaptree_engine::operation::Failure;
use snaptree_engine::{DomainName, OperationId, PolicyName};

use super::outcome::RunOutcome;
use super::project::Run;
use crate::file::Occasion;
use crate::leap::Doubt;

/// Something that someone may want to hear of.
#[derive(Clone, Debug, PartialEq)]
pub enum Notable {
    /// A run of one domain took no snapshot.
    Failed {
        /// The policy.
        policy: PolicyName,
        /// The domain.
        domain: DomainName,
        /// How it ended, and why if it was refused.
        why: String,
    },
    /// A run's operation on one domain can go neither on nor back by itself.
    NeedsAttention {
        /// The policy.
        policy: PolicyName,
        /// The domain.
        domain: DomainName,
        /// The operation.
        operation: Option<OperationId>,
    },
    /// A run took its snapshot of a domain, and the one before it had not.
    Recovered {
        /// The policy.
        policy: PolicyName,
        /// The domain.
        domain: DomainName,
    },
    /// A snapshot that no rule keeps is still there: its delete was refused, or did not succeed.
    DeleteFailed {
        /// The policy.
        policy: PolicyName,
        /// The domain.
        domain: DomainName,
        /// The snapshot's name.
        snapshot: String,
        /// How it ended, and why.
        why: String,
    },
    /// A program around a run failed, and the run did not end with that.
    HookFailed {
        /// The policy.
        policy: PolicyName,
        /// The domain.
        domain: DomainName,
        /// Which program.
        hook: HookPhase,
        /// What went wrong.
        why: String,
    },
    /// The policy was for a domain, and is not any more, though the domain is there and the policy is as it was.
    Left {
        /// The policy.
        policy: PolicyName,
        /// The domain, by the name that it has now.
        domain: DomainName,
    },
    /// The clock leapt, and deletes are held back.
    ClockLeapt {
        /// The policy.
        policy: PolicyName,
        /// The leap, and since when.
        doubt: Doubt,
    },
    /// The clock is believed again, and the next run deletes.
    ClockBelieved {
        /// The policy.
        policy: PolicyName,
    },
    /// The policy does not run any more.
    Suspended {
        /// The policy.
        policy: PolicyName,
        /// Why.
        reason: String,
    },
}

impl Notable {
    /// The policy.
    pub fn policy(&self) -> &PolicyName {
        match self {
            Self::Failed { policy, .. }
            | Self::NeedsAttention { policy, .. }
            | Self::Recovered { policy, .. }
            | Self::DeleteFailed { policy, .. }
            | Self::HookFailed { policy, .. }
            | Self::ClockLeapt { policy, .. }
            | Self::Left { policy, .. }
            | Self::ClockBelieved { policy }
            | Self::Suspended { policy, .. } => policy,
        }
    }

    /// The domain, if it is about one.
    pub fn domain(&self) -> Option<&DomainName> {
        match self {
            Self::Failed { domain, .. }
            | Self::NeedsAttention { domain, .. }
            | Self::Recovered { domain, .. }
            | Self::DeleteFailed { domain, .. }
            | Self::Left { domain, .. }
            | Self::HookFailed { domain, .. } => Some(domain),
            Self::Suspended { .. } | Self::ClockLeapt { .. } | Self::ClockBelieved { .. } => None,
        }
    }

    /// When people want to hear of it.
    pub fn occasion(&self) -> Occasion {
        match self {
            Self::Failed { .. }
            | Self::DeleteFailed { .. }
            | Self::HookFailed { .. }
            | Self::Suspended { .. } => Occasion::Failure,
            Self::NeedsAttention { .. } | Self::ClockLeapt { .. } | Self::Left { .. } => {
                Occasion::NeedsAttention
            }
            Self::Recovered { .. } | Self::ClockBelieved { .. } => Occasion::Recovery,
        }
    }
}

impl fmt::Display for Notable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed { domain, why, .. } => write!(f, "the run on {domain} took no snapshot: {why}"),
            Self::NeedsAttention { domain, operation: Some(operation), .. } => {
                write!(f, "the run on {domain} needs attention: `snaptree op show {operation}`")
            }
            Self::NeedsAttention { domain, operation: None, .. } => {
                write!(f, "the run on {domain} needs attention")
            }
            Self::DeleteFailed { domain, snapshot, why, .. } => {
                write!(f, "snapshot '{snapshot}' of {domain} was not deleted: {why}")
            }
            Self::HookFailed { domain, hook, why, .. } => {
                write!(f, "the hook {} the run on {domain} failed: {why}", hook.as_str())
            }
            Self::Left { domain, .. } => write!(
                f,
                "the policy is no longer for domain {domain}: its new name or labels do not match, and it takes and \
                 deletes none of its snapshots any more"
            ),
            Self::ClockLeapt { doubt, .. } => write!(f, "{doubt}"),
            Self::ClockBelieved { .. } => f.write_str("the clock is believed again: the next run deletes"),
            Self::Recovered { domain, .. } => write!(f, "runs on {domain} take their snapshots again"),
            Self::Suspended { policy, reason } => {
                write!(f, "the policy is suspended until `snaptree policy resume {policy}`: {reason}")
            }
        }
    }
}

/// What is to be told of a run that took no snapshot.
pub(super) async fn failure(
    engine: &Engine,
    policy: &PolicyName,
    run: &Run,
    outcome: RunOutcome,
) -> Result<Notable, EngineError> {
    let (policy, domain) = (policy.clone(), run.name.clone());
    if outcome == RunOutcome::NeedsAttention {
        return Ok(Notable::NeedsAttention { policy, domain, operation: run.create.operation });
    }
    let why = why(engine, &run.create, outcome).await?;
    Ok(Notable::Failed { policy, domain, why })
}

/// What is to be told of a delete that retention asked for and that did not succeed.
pub(super) async fn delete_failure(
    engine: &Engine,
    policy: &PolicyName,
    domain: &DomainName,
    request: &PolicyRequest,
    outcome: RunOutcome,
) -> Result<Notable, EngineError> {
    let (policy, domain) = (policy.clone(), domain.clone());
    if outcome == RunOutcome::NeedsAttention {
        return Ok(Notable::NeedsAttention { policy, domain, operation: request.operation });
    }
    let why = why(engine, request, outcome).await?;
    Ok(Notable::DeleteFailed { policy, domain, snapshot: request.snapshot.clone(), why })
}

/// Why a request was refused, or its operation did not succeed; none if nothing of that is so, or not yet.
///
/// # Errors
/// The store failed.
pub async fn failure_of(engine: &Engine, request: &PolicyRequest) -> Result<Option<Failure>, EngineError> {
    Ok(match (&request.refused, request.operation) {
        (Some(refused), _) => Some(refused.clone()),
        (None, Some(operation)) => {
            let events = engine.operation_events(operation).await?;
            events.iter().rev().find_map(|envelope| match &envelope.event {
                Event::OperationFailed(e) => Some(e.failure.clone()),
                Event::OperationCancelled(e) => Some(e.failure.clone()),
                Event::OperationExpired(e) => Some(e.failure.clone()),
                Event::OperationResolved(e) => e.abandoned(),
                Event::OperationNeedsAttention(e) => Some(e.failure.clone()),
                _ => None,
            })
        }
        (None, None) => None,
    })
}

/// How a request ended, and why.
async fn why(engine: &Engine, request: &PolicyRequest, outcome: RunOutcome) -> Result<String, EngineError> {
    let failure = failure_of(engine, request).await?;
    let word = outcome.as_str().unwrap_or("open");
    Ok(failure.map_or_else(|| word.to_owned(), |failure| format!("{word}: {failure}")))
}

/// What is to be told of the programs around a run that took its snapshot.
pub(super) async fn hooks_failed(
    engine: &Engine,
    policy: &PolicyName,
    run: &Run,
) -> Result<Vec<Notable>, EngineError> {
    let Some(operation) = run.create.operation else { return Ok(Vec::new()) };
    let events = engine.operation_events(operation).await?;
    let failed = events.into_iter().filter_map(|envelope| match envelope.event {
        Event::OperationHookFinished(e) => Some(Notable::HookFailed {
            policy: policy.clone(),
            domain: run.name.clone(),
            hook: e.hook,
            why: e.failure?.message,
        }),
        _ => None,
    });
    Ok(failed.collect())
}
