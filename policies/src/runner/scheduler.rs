//! What a daemon does with policies, again and again: looks what is due, and what ended.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use snaptree_engine::engine::{Engine, EngineError, Requester};
use snaptree_engine::event::{Actor, Origin, PolicyRequest, PolicyRun, PolicySkipped, PolicySuspended};
use snaptree_engine::log::{DomainRow, LogError};
use snaptree_engine::{DomainId, DomainName, PolicyName};

use super::book::{Book, Chosen, News, chosen_of, registered_at};
use super::clock::{ClockState, Seen, Turn, reading, watch_clock};
use super::define::write;
use super::fire::{Firing, fire, requester};
use super::notable::{Notable, delete_failure, failure, hooks_failed};
use super::outcome::{Open, RunOutcome, outcome_of};
use super::project::{Entry, PolicyState, Run};
use super::retain::retain;
use super::told::Back;
use crate::file::{Hooks, Policy};
use crate::schedule::{Count, Due, History, SkipReason, Skipped, delay, due};

/// What a look came to.
#[derive(Clone, Debug, Default)]
pub struct Tick {
    /// Domains with new requests, to be driven.
    pub woken: BTreeSet<DomainId>,
    /// When to look again at the latest; none if nothing will ever be due.
    pub next_at: Option<Timestamp>,
    /// What happened.
    pub notable: Vec<Notable>,
}

impl Tick {
    fn look_again(&mut self, at: Timestamp) {
        self.next_at = Some(self.next_at.map_or(at, |next| next.min(at)));
    }
}

/// How a run that is watched came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Watched {
    /// It was there when this scheduler began; how it ended may have been told before.
    Before,
    /// It was seen while it was open.
    Fresh,
}

/// A delete that retention asked for and of which it is not known yet how it ended.
#[derive(Clone)]
struct WatchedDelete {
    policy: PolicyName,
    domain: DomainName,
    request: PolicyRequest,
    how: Watched,
}

/// Runs policies. All that it remembers can be read from the log again.
pub struct Scheduler {
    engine: Engine,
    origin: Origin,
    book: Book,
    watched: BTreeMap<(PolicyName, DomainId), Watched>,
    deletes: Vec<WatchedDelete>,
    registered: BTreeMap<DomainId, Timestamp>,
    /// The clock at the last look.
    looked: Option<Seen>,
    clock: ClockState,
    /// Which domains each policy was for at the last look, by its definition then.
    chosen: BTreeMap<PolicyName, (Timestamp, BTreeSet<DomainId>)>,
}

impl Scheduler {
    /// A scheduler over the engine's log.
    ///
    /// # Errors
    /// The store failed.
    pub async fn new(engine: Engine, origin: Origin) -> Result<Self, EngineError> {
        let book = Book::read(&engine).await?;
        let (mut watched, mut deletes) = (BTreeMap::new(), Vec::new());
        for state in book.defined() {
            for run in state.last_runs() {
                watched.insert((state.name.clone(), run.domain), Watched::Before);
                let asked = run.deletes.iter().flatten();
                deletes.extend(asked.map(|request| WatchedDelete {
                    policy: state.name.clone(),
                    domain: run.name.clone(),
                    request: request.clone(),
                    how: Watched::Before,
                }));
            }
        }
        let (registered, looked, clock) = (BTreeMap::new(), None, ClockState::default());
        let chosen = BTreeMap::new();
        Ok(Self { engine, origin, book, watched, deletes, registered, looked, clock, chosen })
    }

    /// What a policy says, as of the last look.
    pub fn policy(&self, name: &PolicyName) -> Option<&Policy> {
        self.book.get(name)?.policy()
    }

    /// Lets what ended have its consequences, and asks for what is due by the engine's clock.
    ///
    /// # Errors
    /// The store failed. What was asked for until then stands.
    pub async fn tick(&mut self) -> Result<Tick, EngineError> {
        let mut tick = Tick::default();
        self.learn().await?;
        self.watch_clock(&mut tick).await?;
        self.settle(&mut tick).await?;
        self.settle_deletes(&mut tick).await?;
        let names: Vec<PolicyName> = self.book.defined().map(|state| state.name.clone()).collect();
        let domains = if names.is_empty() { Vec::new() } else { self.engine.domains().await? };
        for name in names {
            match self.run_due(&name, &domains, &mut tick).await {
                // Somebody wrote about the policy in between: it is looked at again, at once.
                Err(EngineError::Log(LogError::Conflict { .. })) => tick.look_again(self.engine.now()),
                other => other?,
            }
        }
        self.learn().await?;
        Ok(tick)
    }

    /// Looks whether the clock leapt, and tells whom the policies name.
    async fn watch_clock(&mut self, tick: &mut Tick) -> Result<(), EngineError> {
        let requester = Requester { actor: Actor::Engine, origin: self.origin.clone() };
        let (clock, turn) = watch_clock(&self.engine, &requester, &self.book, self.looked).await?;
        let reading = reading(&self.engine);
        // Within one boot a look is worth as much as a record.
        self.looked = match reading.uptime {
            Some(_) => Some(Seen { seq: self.engine.log().head().await?.seq, reading }),
            None => None,
        };
        self.clock = clock;
        let names = self.book.defined().map(|state| state.name.clone());
        match (turn, clock.doubt) {
            (Turn::Leapt, Some(doubt)) => {
                tick.notable.extend(names.map(|policy| Notable::ClockLeapt { policy, doubt }));
            }
            (Turn::Believed, _) => {
                tick.notable.extend(names.map(|policy| Notable::ClockBelieved { policy }));
            }
            _ => {}
        }
        Ok(())
    }

    /// Reads what is new, and watches what was asked for in it.
    async fn learn(&mut self) -> Result<(), EngineError> {
        for news in self.book.refresh(&self.engine).await? {
            match news {
                News::Snapshot(policy, domain) => {
                    self.watched.insert((policy, domain), Watched::Fresh);
                }
                News::Deletes(policy, PolicyRun { name: domain, requests, .. }) => {
                    self.deletes.extend(requests.into_iter().map(|request| WatchedDelete {
                        policy: policy.clone(),
                        domain: domain.clone(),
                        request,
                        how: Watched::Fresh,
                    }));
                }
            }
        }
        Ok(())
    }

    /// Looks how the watched deletes ended.
    async fn settle_deletes(&mut self, tick: &mut Tick) -> Result<(), EngineError> {
        if self.deletes.is_empty() {
            return Ok(());
        }
        let operations = Open::read(&self.engine).await?;
        let mut open = Vec::new();
        for watched in &self.deletes {
            let WatchedDelete { policy, domain, request, how } = watched;
            match operations.outcome_of(&self.engine, request).await? {
                RunOutcome::Open => open.push(WatchedDelete { how: Watched::Fresh, ..watched.clone() }),
                outcome if outcome.is_success() || *how == Watched::Before => {}
                outcome => {
                    let told = delete_failure(&self.engine, policy, domain, request, outcome).await?;
                    tick.notable.push(told);
                }
            }
        }
        self.deletes = open;
        Ok(())
    }

    /// Looks how the watched runs ended. Retention follows those that took their snapshot.
    async fn settle(&mut self, tick: &mut Tick) -> Result<(), EngineError> {
        let mut failed = BTreeSet::new();
        let operations = match self.watched.is_empty() {
            true => return Ok(()),
            false => Open::read(&self.engine).await?,
        };
        for (key, how) in self.ended(&operations) {
            let (name, domain) = key.clone();
            let found = self.book.get(&name).and_then(|state| {
                Some((state.policy()?.clone(), state.last_run(domain)?.clone(), state.suspended.is_none()))
            });
            let Some((policy, run, running)) = found else {
                self.watched.remove(&key);
                continue;
            };
            match operations.outcome_of(&self.engine, &run.create).await? {
                RunOutcome::Open => continue,
                outcome if outcome.is_success() => {
                    if how == Watched::Fresh && policy.hooks != Hooks::default() {
                        tick.notable.extend(hooks_failed(&self.engine, &name, &run).await?);
                    }
                    if how == Watched::Fresh && self.failed_before(&name, &run).await? {
                        let (policy, domain) = (name.clone(), run.name.clone());
                        tick.notable.push(Notable::Recovered { policy, domain });
                    }
                    let explicit = run.asked_by.is_some();
                    let follows = how == Watched::Fresh || !self.has_passed(&policy, &run);
                    if run.deletes.is_none() && follows && (running || explicit) {
                        match self.retention(&policy, &run).await {
                            Ok(true) => tick.woken.insert(domain),
                            Ok(false) => false,
                            Err(EngineError::Log(LogError::Conflict { .. })) => {
                                tick.look_again(self.engine.now());
                                continue;
                            }
                            Err(error) => return Err(error),
                        };
                    }
                }
                outcome => {
                    failed.insert(name.clone());
                    if how == Watched::Fresh {
                        tick.notable.push(failure(&self.engine, &name, &run, outcome).await?);
                    }
                }
            }
            self.watched.remove(&key);
        }
        for name in failed {
            self.suspend_if_hopeless(&name, tick).await?;
        }
        Ok(())
    }

    /// The watched runs that are not open any more, and how they came to be. The others were seen while they were open.
    fn ended(&mut self, operations: &Open) -> Vec<((PolicyName, DomainId), Watched)> {
        let mut ended = Vec::new();
        for (key, how) in &mut self.watched {
            let run = self.book.get(&key.0).and_then(|state| state.last_run(key.1));
            if run.is_some_and(|run| operations.standing(&run.create) == Some(RunOutcome::Open)) {
                *how = Watched::Fresh;
            } else {
                ended.push((key.clone(), *how));
            }
        }
        ended
    }

    /// Whether the run after `run`, which is of a time before this process, is planned for a moment that has passed. Then
    /// it is that one's to delete, once its own snapshot is there.
    fn has_passed(&self, policy: &Policy, run: &Run) -> bool {
        let next = policy.schedule.next_after(run.planned, policy.zone());
        let delay = delay(policy.jitter, &policy.name, run.domain);
        next.and_then(|next| next.checked_add(delay).ok()).is_some_and(|next| next <= self.engine.now())
    }

    /// Whether the run before `run` on its domain took no snapshot.
    async fn failed_before(&self, name: &PolicyName, run: &Run) -> Result<bool, EngineError> {
        let state = self.book.get(name);
        let Some(before) = state.and_then(|state| state.runs_of(run.domain).nth(1)) else {
            return Ok(false);
        };
        let outcome = outcome_of(&self.engine, &before.create).await?;
        Ok(!outcome.is_success() && outcome != RunOutcome::Open)
    }

    /// Whether anything was asked for.
    async fn retention(&mut self, policy: &Policy, run: &Run) -> Result<bool, EngineError> {
        let Some(state) = self.book.shared(&policy.name) else { return Ok(false) };
        let asked = retain(&self.engine, &self.origin, &state, policy, run, self.clock.trust()).await?;
        drop(state);
        self.learn().await?;
        Ok(asked.iter().any(|request| request.operation.is_some()))
    }

    /// Suspends a policy whose last runs took no snapshot of any domain.
    async fn suspend_if_hopeless(&mut self, name: &PolicyName, tick: &mut Tick) -> Result<(), EngineError> {
        let Some(state) = self.book.shared(name) else { return Ok(()) };
        match suspend_if_hopeless(&self.engine, &self.origin, &state).await {
            Ok(Some(reason)) => tick.notable.push(Notable::Suspended { policy: name.clone(), reason }),
            Ok(None) => return Ok(()),
            Err(EngineError::Log(LogError::Conflict { .. })) => tick.look_again(self.engine.now()),
            Err(error) => return Err(error),
        }
        drop(state);
        self.learn().await
    }

    /// Asks for what is due of one policy.
    async fn run_due(
        &mut self,
        name: &PolicyName,
        rows: &[DomainRow],
        tick: &mut Tick,
    ) -> Result<(), EngineError> {
        let Some(mut state) = self.book.shared(name) else { return Ok(()) };
        let Some(policy) = state.running().cloned() else { return Ok(()) };
        let policy = &policy;
        let now = self.engine.now();
        let mut runs: BTreeMap<Timestamp, Vec<Chosen>> = BTreeMap::new();
        let mut skips = Vec::new();
        let mut operations = None;
        let domains = chosen_of(&self.engine, rows.to_vec(), policy).await?;
        self.tell_left(&state, rows, &domains, tick);
        for domain in domains {
            let Due { run, skipped, next_at } = self.due(&state, policy, &domain, now).await?;
            if let Some(next_at) = next_at {
                tick.look_again(next_at);
            }
            if run.is_some() && self.is_at_work(&state, domain.id, &mut operations).await? {
                // The run before this one is not over; when it is, what is due then is asked for.
                continue;
            }
            skips.extend(skipped.map(|skipped| passed_over(&domain, &skipped)));
            if let Some(planned) = run {
                runs.entry(planned).or_default().push(domain);
            }
        }
        if runs.is_empty() && !skips.is_empty() {
            runs.insert(now, Vec::new());
        }
        for (planned, domains) in runs {
            let skipped = std::mem::take(&mut skips);
            let firing = Firing { planned, asked_by: None, domains: &domains, skipped: &skipped };
            let asked = fire(&self.engine, &self.origin, &state, policy, firing).await?;
            tick.woken.extend(asked.iter().filter(|ran| ran.operation().is_some()).map(|ran| ran.domain.id));
            if asked.iter().any(|ran| ran.operation().is_none()) {
                // What was refused is told of with the next look.
                tick.look_again(now);
            }
            drop(state);
            self.learn().await?;
            let Some(newer) = self.book.shared(name) else { return Ok(()) };
            state = newer;
        }
        Ok(())
    }

    /// Tells of domains that the policy was for at the last look and is not for any more, though neither ended.
    fn tell_left(&mut self, state: &PolicyState, rows: &[DomainRow], domains: &[Chosen], tick: &mut Tick) {
        let Some(defined) = state.definition.as_ref().map(|definition| definition.at) else { return };
        let now: BTreeSet<DomainId> = domains.iter().map(|domain| domain.id).collect();
        let before = self.chosen.insert(state.name.clone(), (defined, now.clone()));
        let Some((_, before)) = before.filter(|(then, _)| *then == defined) else { return };
        for row in rows.iter().filter(|row| before.contains(&row.id) && !now.contains(&row.id)) {
            tick.notable.push(Notable::Left { policy: state.name.clone(), domain: row.name.clone() });
        }
    }

    async fn due(
        &mut self,
        state: &PolicyState,
        policy: &Policy,
        domain: &Chosen,
        now: Timestamp,
    ) -> Result<Due, EngineError> {
        let registered = match self.registered.get(&domain.id) {
            Some(at) => *at,
            None => {
                let at = registered_at(&self.engine, domain.id).await?;
                self.registered.insert(domain.id, at);
                at
            }
        };
        let nothing = History::default();
        let history = state.histories.get(&domain.id).unwrap_or(&nothing);
        Ok(due(&policy.asked(domain.id, state.since.max(registered), history), now))
    }

    async fn is_at_work(
        &self,
        state: &PolicyState,
        domain: DomainId,
        operations: &mut Option<Open>,
    ) -> Result<bool, EngineError> {
        let Some(run) = state.last_run(domain) else { return Ok(false) };
        let operations = match operations {
            Some(operations) => operations,
            None => operations.insert(Open::read(&self.engine).await?),
        };
        Ok(operations.standing(&run.create) == Some(RunOutcome::Open))
    }
}

/// The event of a skip.
fn passed_over(domain: &Chosen, skipped: &Skipped) -> PolicySkipped {
    let (count, more) = match skipped.count {
        Count::Exactly(count) => (count, false),
        Count::AtLeast(count) => (count, true),
    };
    let why = match skipped.why {
        SkipReason::NoCatchUp => "no-catch-up",
        SkipReason::CaughtUp => "caught-up",
        SkipReason::TooLate => "too-late",
    };
    PolicySkipped {
        domain: domain.id,
        name: domain.name.clone(),
        first: skipped.first,
        last: skipped.last,
        count,
        more,
        why: why.to_owned(),
    }
}

/// Suspends a policy whose last runs took no snapshot of any domain. Says why, if it did.
///
/// # Errors
/// Somebody else wrote about the policy meanwhile (a conflict: read again), or the store failed.
pub async fn suspend_if_hopeless(
    engine: &Engine,
    origin: &Origin,
    state: &PolicyState,
) -> Result<Option<String>, EngineError> {
    let Some(policy) = state.running() else { return Ok(None) };
    let limit = policy.suspend_after.get();
    if failures_in_a_row(engine, state, limit).await? < limit {
        return Ok(None);
    }
    let reason = format!("{limit} runs in a row took no snapshot");
    let event = PolicySuspended { reason: reason.clone() };
    write(engine, &requester(state, origin), state, event.into()).await?;
    Ok(Some(reason))
}

/// How many of the last runs took no snapshot of any domain, up to `most`; also those that somebody asked for. One that
/// is not over does not count, nor any before the policy was defined or resumed.
async fn failures_in_a_row(engine: &Engine, state: &PolicyState, most: u32) -> Result<u32, EngineError> {
    let since = state.definition.as_ref().map_or(state.since, |defined| defined.at.max(state.since));
    let mut instants: BTreeMap<Timestamp, Vec<Run>> = BTreeMap::new();
    let mut back = Back::new(engine, state);
    'log: while let Some(page) = back.page().await? {
        for entry in page {
            let Entry::Ran(run) = entry else { continue };
            if run.at < since {
                break 'log;
            }
            instants.entry(run.planned).or_default().push(run);
            if instants.len() > usize::try_from(most).unwrap_or(usize::MAX) {
                break 'log;
            }
        }
    }
    let operations = Open::read(engine).await?;
    let mut failures = 0;
    for runs in instants.values().rev() {
        let mut open = false;
        for run in runs {
            match operations.outcome_of(engine, &run.create).await? {
                outcome if outcome.is_success() => return Ok(failures),
                outcome => open |= outcome == RunOutcome::Open,
            }
        }
        failures += u32::from(!open);
        if failures == most {
            break;
        }
    }
    Ok(failures)
}
