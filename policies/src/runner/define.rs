//! Defining policies, suspending them, letting them go.

use snaptree_engine::engine::{Engine, EngineError, Requester};
use snaptree_engine::event::{Event, PolicyDefined, PolicyRemoved, PolicyResumed, PolicySuspended};
use snaptree_engine::operation::{Code, Failure};

use super::book::Book;
use super::fire::{beside, is_of_a_run};
use super::project::PolicyState;
use crate::file::{FileError, Policy};

/// Longest reason of a suspension, in bytes.
const REASON_BYTES_MAX: usize = 4_096;

/// A request about a policy that was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum PolicyRequestError {
    /// The policy file is none.
    #[error("the policy file cannot be used")]
    File(#[from] FileError),
    /// Refused by the engine, or the store failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// What was read cannot be written.
    #[error("the policy cannot be written as JSON")]
    Json(#[from] serde_json::Error),
}

impl From<Failure> for PolicyRequestError {
    fn from(failure: Failure) -> Self {
        Self::Engine(EngineError::Rejected(failure))
    }
}

/// Defines a policy, or changes it. One that says the same already is left as it is, with its schedule.
///
/// # Errors
/// The file is no policy, or the store failed.
pub async fn define(
    engine: &Engine,
    requester: &Requester,
    book: &mut Book,
    source: &str,
) -> Result<Policy, PolicyRequestError> {
    let policy = Policy::from_toml(source)?;
    book.refresh(engine).await?;
    let state = book.get(&policy.name).cloned().unwrap_or_else(|| PolicyState::new(policy.name.clone()));
    let defined = state.definition.as_ref().filter(|_| state.sick.is_none());
    if defined.is_some_and(|known| known.policy.as_ref() == Ok(&policy) && known.source == source) {
        return Ok(policy);
    }
    let value = serde_json::to_value(&policy)?;
    let event = PolicyDefined { policy: value, source: source.to_owned() };
    write(engine, requester, &state, event.into()).await?;
    book.refresh(engine).await?;
    Ok(policy)
}

/// Ends a policy. Its snapshots stay.
///
/// # Errors
/// There is none of that name, or the store failed.
pub async fn remove(
    engine: &Engine,
    requester: &Requester,
    book: &mut Book,
    name: &str,
) -> Result<(), PolicyRequestError> {
    book.refresh(engine).await?;
    write(engine, requester, book.find(name)?, PolicyRemoved {}.into()).await?;
    book.refresh(engine).await?;
    Ok(())
}

/// Keeps a policy from running until it is resumed.
///
/// # Errors
/// There is none of that name, it is suspended already, or the store failed.
pub async fn suspend(
    engine: &Engine,
    requester: &Requester,
    book: &mut Book,
    name: &str,
    reason: &str,
) -> Result<(), PolicyRequestError> {
    if reason.trim().is_empty() || reason.len() > REASON_BYTES_MAX {
        let message = format!("a reason has from 1 to {REASON_BYTES_MAX} bytes");
        return Err(Failure::new(Code::Invalid, message).refused().into());
    }
    book.refresh(engine).await?;
    let state = book.find(name)?;
    if let Some(suspended) = &state.suspended {
        let message = format!("policy '{}' is suspended already: {}", state.name, suspended.reason);
        return Err(Failure::new(Code::Invalid, message).refused().into());
    }
    write(engine, requester, state, PolicySuspended { reason: reason.to_owned() }.into()).await?;
    book.refresh(engine).await?;
    Ok(())
}

/// Lets a policy run again; what it missed meanwhile does not run.
///
/// # Errors
/// There is none of that name, it is not suspended, or the store failed.
pub async fn resume(
    engine: &Engine,
    requester: &Requester,
    book: &mut Book,
    name: &str,
) -> Result<(), PolicyRequestError> {
    book.refresh(engine).await?;
    let state = book.find(name)?;
    if state.suspended.is_none() {
        let message = format!("policy '{}' is not suspended", state.name);
        return Err(Failure::new(Code::Invalid, message).refused().into());
    }
    write(engine, requester, state, PolicyResumed {}.into()).await?;
    book.refresh(engine).await?;
    Ok(())
}

pub(super) async fn write(
    engine: &Engine,
    requester: &Requester,
    state: &PolicyState,
    event: Event,
) -> Result<(), EngineError> {
    let matters = |event: &Event| !is_of_a_run(event);
    let mut beside = beside(state, &matters);
    engine.submit_together(requester, &mut beside, &[], &|_| vec![event.clone()]).await?;
    Ok(())
}
