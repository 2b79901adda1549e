//! Requests about policies, carried out with the engine of this process.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Result;
use jiff::{SignedDuration, Timestamp};
use snaptree_engine::engine::{Engine, EngineError, Requester};
use snaptree_engine::event::{Actor, PolicyRun};
use snaptree_engine::log::LogError;
use snaptree_engine::{DomainId, PolicyName};
use snaptree_policies::file::Policy;
use snaptree_policies::retention::Trust;
use snaptree_policies::runner::{
    Book, Chosen, Firing, PolicyRequestError, PolicyState, chosen, confirm_clock, define, fire, outcome_of,
    remove, resume, retain, suspend, suspend_if_hopeless, watch_clock,
};
use tokio::sync::Mutex;

use crate::exit::{Exit, Trouble};
use crate::wire::{PolicyAnswer, PolicyAsk};

/// How often a request is thought over because somebody else wrote about the policy first.
const CONFLICTS_MAX: u32 = 16;

/// What a process knows of policies from one request to the next, so that each reads only what was appended since.
#[derive(Default)]
pub struct Policies(Mutex<Book>);

impl Policies {
    /// The policy of that name, as the log has it now.
    async fn find(&self, engine: &Engine, name: &str) -> Result<Arc<PolicyState>> {
        let mut book = self.0.lock().await;
        book.refresh(engine).await?;
        let name = &book.find(name)?.name;
        Ok(book.shared(name).ok_or_else(|| Trouble::not_found(format!("there is no policy '{name}'")))?)
    }

    /// Looks whether the machine's clock leapt, before anything is written by it.
    async fn watch_clock(&self, engine: &Engine, requester: &Requester) -> Result<Trust> {
        let mut book = self.0.lock().await;
        book.refresh(engine).await?;
        let by_itself = Requester { actor: Actor::Engine, origin: requester.origin.clone() };
        let (clock, _) = watch_clock(engine, &by_itself, &book, None).await?;
        Ok(clock.trust())
    }

    /// Why those policies do not run that this program cannot read, by name.
    ///
    /// # Errors
    /// The log cannot be read.
    pub async fn sick(&self, engine: &Engine) -> Result<BTreeMap<PolicyName, String>> {
        let mut book = self.0.lock().await;
        book.refresh(engine).await?;
        Ok(sick(&book))
    }
}

/// Why those policies do not run that this program cannot read, by name.
pub fn sick(book: &Book) -> BTreeMap<PolicyName, String> {
    let told = |state: &PolicyState| Some((state.name.clone(), state.problem()?.to_owned()));
    book.defined().filter_map(told).collect()
}

/// Carries out a request about a policy.
///
/// # Errors
/// It was rejected, or the state cannot be used.
pub async fn policy(
    engine: &Engine,
    policies: &Policies,
    requester: &Requester,
    ask: &PolicyAsk,
) -> Result<PolicyAnswer> {
    let mut conflicts = 0;
    loop {
        match once(engine, policies, requester, ask).await {
            Err(error) if conflicts < CONFLICTS_MAX && is_conflict(&error) => conflicts += 1,
            other => return other,
        }
    }
}

fn is_conflict(error: &anyhow::Error) -> bool {
    let of_engine = |error: &EngineError| matches!(error, EngineError::Log(LogError::Conflict { .. }));
    error.chain().any(|cause| {
        cause.downcast_ref::<EngineError>().is_some_and(of_engine)
            || cause.downcast_ref::<LogError>().is_some_and(|e| matches!(e, LogError::Conflict { .. }))
    })
}

async fn once(
    engine: &Engine,
    policies: &Policies,
    requester: &Requester,
    ask: &PolicyAsk,
) -> Result<PolicyAnswer> {
    let trust = policies.watch_clock(engine, requester).await?;
    match ask {
        PolicyAsk::ConfirmClock => {
            confirm_clock(engine, requester).await?;
            return Ok(PolicyAnswer::default());
        }
        PolicyAsk::Run { name, domain } => {
            let state = policies.find(engine, name).await?;
            return run(engine, requester, &state, domain.as_deref()).await;
        }
        PolicyAsk::Retain { name, planned, domain } => {
            let state = policies.find(engine, name).await?;
            return keep(engine, requester, &state, (*planned, *domain), trust).await;
        }
        PolicyAsk::Review { name } => {
            let state = policies.find(engine, name).await?;
            let suspended = suspend_if_hopeless(engine, &requester.origin, &state).await?;
            return Ok(PolicyAnswer { suspended, ..PolicyAnswer::default() });
        }
        _ => {}
    }
    let mut book = policies.0.lock().await;
    let book = &mut *book;
    let done = match ask {
        PolicyAsk::Set { source } => define(engine, requester, book, source).await.map(|_| ()),
        PolicyAsk::Remove { name } => remove(engine, requester, book, name).await,
        PolicyAsk::Suspend { name, reason } => suspend(engine, requester, book, name, reason).await,
        PolicyAsk::Resume { name } => resume(engine, requester, book, name).await,
        PolicyAsk::Run { .. }
        | PolicyAsk::Retain { .. }
        | PolicyAsk::Review { .. }
        | PolicyAsk::ConfirmClock => Ok(()),
    };
    done.map(|()| PolicyAnswer::default()).map_err(in_engine)
}

/// What a policy's request failed with, as the rest of the program knows it.
pub fn in_engine(error: PolicyRequestError) -> anyhow::Error {
    match error {
        PolicyRequestError::Engine(error) => error.into(),
        PolicyRequestError::File(error) => {
            // One problem a line in the file's own words; an error of ours is one line.
            let problems = error.to_string().replace('\n', "; ");
            Trouble::new(Exit::Refused, "invalid", format!("the policy file cannot be used: {problems}"))
                .hint("`snaptree policy set --help` shows one")
                .into()
        }
        other => other.into(),
    }
}

/// The policy, if this program can read it.
///
/// # Errors
/// It cannot.
pub fn readable(state: &PolicyState) -> Result<&Policy> {
    if let Some(problem) = state.problem() {
        let message = format!("policy '{}' cannot be read: {problem}", state.name);
        return Err(Trouble::new(Exit::Failed, "version", message)
            .hint("was it defined by a newer snaptree? `snaptree policy set` defines it anew")
            .into());
    }
    let removed = || Trouble::not_found(format!("policy '{}' was removed", state.name));
    Ok(state.policy().ok_or_else(removed)?)
}

/// The domains that a policy is for; or the one of that name or id among them.
///
/// # Errors
/// There is none, or the policy is not for it.
pub async fn domains_of(engine: &Engine, policy: &Policy, wanted: Option<&str>) -> Result<Vec<Chosen>> {
    let mut domains = chosen(engine, policy).await?;
    if let Some(wanted) = wanted {
        let id = engine.find_domain(wanted).await?;
        domains.retain(|domain| domain.id == id);
        if domains.is_empty() {
            let message = format!("policy '{}' is not for domain '{wanted}'", policy.name);
            return Err(Trouble::new(Exit::Refused, "invalid", message)
                .hint("`snaptree policy show` lists the domains that it is for")
                .into());
        }
    }
    Ok(domains)
}

async fn run(
    engine: &Engine,
    requester: &Requester,
    state: &PolicyState,
    domain: Option<&str>,
) -> Result<PolicyAnswer> {
    let policy = readable(state)?;
    let domains = domains_of(engine, policy, domain).await?;
    if domains.is_empty() {
        let message = format!("policy '{}' is for no registered domain", state.name);
        return Err(Trouble::not_found(message).hint("`snaptree domain list` lists the domains").into());
    }
    let mut planned = Timestamp::from_microsecond(engine.now().as_microsecond())?;
    // Its instant is what a run is known by.
    while state.has_run(planned) {
        planned = planned.checked_add(SignedDuration::from_micros(1))?;
    }
    let asked_by = Some(&requester.actor);
    let firing = Firing { planned, asked_by, domains: &domains, skipped: &[] };
    let ran = fire(engine, &requester.origin, state, policy, firing).await?;
    let runs = ran.into_iter().map(|ran| PolicyRun {
        domain: ran.domain.id,
        name: ran.domain.name,
        requests: vec![ran.request],
    });
    Ok(PolicyAnswer { planned: Some(planned), runs: runs.collect(), ..PolicyAnswer::default() })
}

/// The deletes that follow a run: those that were asked for already, or those that are asked for now.
async fn keep(
    engine: &Engine,
    requester: &Requester,
    state: &PolicyState,
    (planned, domain): (Timestamp, DomainId),
    trust: Trust,
) -> Result<PolicyAnswer> {
    let policy = readable(state)?;
    let run = state.runs_of(domain).find(|run| run.planned == planned);
    let Some(run) = run else {
        if state.last_run(domain).is_some_and(|last| last.planned > planned) {
            // Later runs of the domain came in between, and retention follows each of them.
            return Ok(PolicyAnswer { planned: Some(planned), ..PolicyAnswer::default() });
        }
        return Err(Trouble::not_found(format!("policy '{}' had no such run", state.name)).into());
    };
    let requests = match &run.deletes {
        Some(deletes) => deletes.clone(),
        None if outcome_of(engine, &run.create).await?.is_success() => {
            retain(engine, &requester.origin, state, policy, run, trust).await?
        }
        None => Vec::new(),
    };
    let run = PolicyRun { domain, name: run.name.clone(), requests };
    Ok(PolicyAnswer { planned: Some(planned), runs: vec![run], ..PolicyAnswer::default() })
}
