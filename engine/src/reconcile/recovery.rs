//! Finishing what was cut short.
//!
//! Recovery is no second way of doing things: the worker resolves a step whose end is not known whenever it meets
//! one. What is told apart here is only the account of it.

use jiff::Timestamp;

use crate::command::Command;
use crate::driver::Watch;
use crate::engine::{Engine, EngineError, Requester};
use crate::ids::{DomainName, OperationId};
use crate::operation::{Failure, Operation, Outcome, Phase};
use crate::project::DomainState;
use crate::reconcile::worker::{Carried, Driven, Worker};

/// What recovery found of an operation, and what it did.
#[derive(Clone, Debug, PartialEq)]
pub struct Recovered {
    /// The operation.
    pub operation: OperationId,
    /// `create`, `revert`, ...
    pub kind: &'static str,
    /// Its domain.
    pub domain: DomainName,
    /// When it was asked for.
    pub requested: Timestamp,
    /// Where it stood, in words.
    pub found: String,
    /// What was done about it, in words.
    pub did: String,
    /// How it ended; none if it is still open.
    pub outcome: Option<Outcome>,
    /// Why it did not succeed, or what stands in the way.
    pub failure: Option<Failure>,
}

/// What a recovery came to.
#[derive(Debug, Default)]
pub struct Recovery {
    /// Operation by operation.
    pub operations: Vec<Recovered>,
    /// Domains that could not be looked at, and why.
    pub left_out: Vec<(DomainName, EngineError)>,
}

impl Recovery {
    /// Goes on without a domain.
    ///
    /// # Errors
    /// What stands in the way stands in the way of all domains.
    pub(crate) fn leave_out(&mut self, domain: DomainName, error: EngineError) -> Result<(), EngineError> {
        if !error.spares_others() {
            return Err(error);
        }
        self.left_out.push((domain, error));
        Ok(())
    }
}

/// Drives a domain's open operations to their ends, and tells about each. One that needs attention for a reason that may
/// be gone is tried again, once.
pub(crate) async fn recover_domain(
    engine: &Engine,
    requester: &Requester,
    state: &DomainState,
    watch: &dyn Watch,
) -> Result<Vec<Recovered>, EngineError> {
    let Some(domain) = &state.domain else { return Ok(Vec::new()) };
    let now = match engine.retry_what_may_pass(requester, state).await? {
        Retried::Some => engine.load(domain.id).await?,
        Retried::None => state.clone(),
    };
    let driven = Worker::new(engine, requester, now, watch)?.drive().await?;
    Ok(accounts(state, &driven))
}

/// Whether any operation was tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retried {
    /// One, or more.
    Some,
    /// None.
    None,
}

impl Engine {
    /// Lets every operation that needs attention try again whose reason may be gone: its step is resolved from an
    /// observation before anything else, as always.
    ///
    /// # Errors
    /// The store failed.
    pub async fn retry_what_may_pass(
        &self,
        requester: &Requester,
        state: &DomainState,
    ) -> Result<Retried, EngineError> {
        let Some(domain) = &state.domain else { return Ok(Retried::None) };
        let mut retried = Retried::None;
        for operation in &state.open {
            if let Phase::NeedsAttention { failure, .. } = &operation.phase
                && failure.code.may_pass()
            {
                self.submit(requester, domain.id, &Command::Retry(operation.id), None).await?;
                retried = Retried::Some;
            }
        }
        Ok(retried)
    }
}

/// The account of a domain that was driven from `state`.
pub fn accounts(state: &DomainState, driven: &Driven) -> Vec<Recovered> {
    let Some(domain) = &state.domain else { return Vec::new() };
    let account = |operation: &Operation| {
        let carried = driven.carried.iter().find(|carried| carried.operation.id == operation.id);
        account_of(&domain.name, operation, carried)
    };
    state.open.iter().map(account).collect()
}

/// The account of a domain whose hypervisor cannot be asked: everything stays as it stood.
pub fn unrecovered(state: &DomainState, failure: &Failure) -> Vec<Recovered> {
    let Some(domain) = &state.domain else { return Vec::new() };
    let account = |operation| {
        let did = format!("left it, since the hypervisor cannot be asked: {failure}");
        Recovered { did, ..account_of(&domain.name, operation, None) }
    };
    state.open.iter().map(account).collect()
}

fn account_of(domain: &DomainName, operation: &Operation, carried: Option<&Carried>) -> Recovered {
    let found = carried.and_then(|carried| carried.found.clone()).unwrap_or_else(|| stood(operation));
    let outcome = carried.and_then(|carried| carried.outcome);
    let failure = match (&operation.phase, carried) {
        (Phase::NeedsAttention { failure, .. }, None) => Some(failure.clone()),
        (_, carried) => carried.and_then(|carried| carried.failure.clone()),
    };
    let did = match (outcome, &failure) {
        (Some(Outcome::Succeeded), _) => "carried it through".to_owned(),
        (Some(_), Some(failure)) => format!("took it back: {failure}"),
        (Some(_), None) => "took it back".to_owned(),
        (None, Some(failure)) => format!("left it for someone to look at: {failure}"),
        (None, None) => "left it waiting behind another operation".to_owned(),
    };
    Recovered {
        operation: operation.id,
        kind: operation.request.kind(),
        domain: domain.clone(),
        requested: operation.requested,
        found,
        did,
        outcome,
        failure,
    }
}

/// Where an operation stands, in words.
pub fn stood(operation: &Operation) -> String {
    let step = |index: usize| operation.steps.get(index).map_or("?", |step| step.name.as_str());
    match &operation.phase {
        Phase::Requested => "asked for, nothing touched".to_owned(),
        Phase::Planned => "planned, nothing touched".to_owned(),
        Phase::Running { step: index } => format!("in step {} '{}'", index + 1, step(*index)),
        Phase::Waiting { step: index, .. } => {
            format!("waiting to try step {} '{}' again", index + 1, step(*index))
        }
        Phase::Ready { step: index } => format!("{index} of {} steps done", operation.steps.len()),
        Phase::Undoing { step: index, .. } => format!("taking back step {} '{}'", index + 1, step(*index)),
        Phase::Undone { step: index, .. } => {
            format!("step {} '{}' and all after it taken back", index + 1, step(*index))
        }
        Phase::NeedsAttention { failure, .. } => format!("needs attention: {failure}"),
        Phase::Ended { .. } => "ended".to_owned(),
    }
}
