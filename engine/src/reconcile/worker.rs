//! One domain's worker: carries its open operations through, one after the other, and merges after each.
//!
//! ```text
//!   take the first open operation
//!     Requested         observe, plan            commit Planned + StepStarted(0)
//!     Running, fresh    driver.execute           commit StepFinished(i) + StepStarted(i+1) | outcome
//!     Running, found    settle, observe, resolve, then execute, undo or commit
//!     Undoing           driver.undo              commit UndoFinished(i) + UndoStarted(i-1) | outcome
//!   then look at the tombstones; a merge is an operation of its own, and is taken the same way
//! ```
//!
//! Architecture Invariant: the driver is asked for an effect only after the event that announces it is on disk, and a
//! step whose end is not known is resolved before anything else happens to the domain.

use std::collections::BTreeSet;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};

use crate::command::reject;
use crate::driver::{
    Driver, DriverError, ErrorClass, Head, Learnt, Observation, Remedy, Resolution, StepContext, StepReport,
    Watch,
};
use crate::engine::{Engine, EngineError, Requester};
use crate::event::{
    Actor, DomainUnregistered, Envelope, Event, HowFinished, MemoryKind, MergeDeferred, MergeFinished,
    MergeStarted, OperationAttemptFailed, OperationCancelled, OperationExpired, OperationFailed,
    OperationNeedsAttention, OperationPlanned, OperationStepFinished, OperationStepStarted,
    OperationSucceeded, OperationUndoFinished, OperationUndoStarted, RetryKind, SnapshotCreated,
    SnapshotDeleted, SnapshotReverted, UnregisterWish,
};
use crate::ids::{OperationId, SnapshotId, StreamId};
use crate::log::{LogError, NewEvent};
use crate::operation::{
    Code, Failure, Operation, Outcome, Phase, Poison, Request, Reversal, STEPS_MAX, Step,
};
use crate::project::DomainState;
use crate::reconcile::merge::{self, MergePlan, MergePolicy, PutOff, Verdict};
use crate::tree::SnapshotState;

/// How often a step is resolved anew within one run, before someone has to look.
const RESOLUTIONS_MAX: u32 = 8;
/// How often a busy hypervisor is asked again within one run.
const BUSY_ATTEMPTS_MAX: u32 = 20;
/// A checkpoint is kept each time the stream's version passes a multiple of this.
const CHECKPOINT_EVENTS: u64 = 256;

/// An operation that came to an end, or to rest, while its domain was driven.
#[derive(Clone, Debug, PartialEq)]
pub struct Carried {
    /// The operation as it was when it ended.
    pub operation: Operation,
    /// How it ended; none if it is parked or needs attention.
    pub outcome: Option<Outcome>,
    /// Why it did not succeed.
    pub failure: Option<Failure>,
    /// What recovery found of the step in flight, if the operation had been cut short.
    pub found: Option<String>,
}

/// What driving a domain came to.
#[derive(Clone, Debug, PartialEq)]
pub struct Driven {
    /// The operations that were carried through, merges among them, in order.
    pub carried: Vec<Carried>,
    /// The domain afterwards.
    pub state: DomainState,
}

/// How the step in hand came into this process's hands.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hand {
    /// Its `StepStarted` was written by this worker just now; the driver was not asked yet.
    Fresh,
    /// Nobody knows how far it came.
    Found,
}

/// What a pass over an operation came to.
enum Pass {
    /// Go on with it.
    On(Hand),
    /// It is over, or rests.
    Rests,
}

pub(crate) struct Worker<'a> {
    engine: &'a Engine,
    requester: &'a Requester,
    watch: &'a dyn Watch,
    driver: Arc<dyn Driver>,
    state: DomainState,
    stream: StreamId,
    head: Option<Head>,
    policy: MergePolicy,
    carried: Vec<Carried>,
    /// The operation that is to be taken back if that is still possible.
    calling_off: Option<OperationId>,
    found: Option<String>,
    resolutions: u32,
    busy: u32,
}

impl<'a> Worker<'a> {
    pub(crate) fn new(
        engine: &'a Engine,
        requester: &'a Requester,
        state: DomainState,
        watch: &'a dyn Watch,
    ) -> Result<Self, EngineError> {
        let driver = engine.driver_of(&state)?;
        let domain = state.domain.as_ref().map(|domain| domain.id);
        let domain = domain.ok_or_else(|| reject(Code::NotFound, "the domain is not registered"))?;
        let policy =
            MergePolicy { copy_bytes_max: engine.settings.merge_copy_bytes_max, put_off: PutOff::Leave };
        Ok(Self {
            engine,
            requester,
            watch,
            driver,
            state,
            stream: StreamId::Domain(domain),
            head: None,
            policy,
            carried: Vec::new(),
            calling_off: None,
            found: None,
            resolutions: 0,
            busy: 0,
        })
    }

    /// Takes up what was put off with `--defer`, too.
    pub(crate) fn forget_deferrals(&mut self) {
        self.policy.put_off = PutOff::Take;
    }

    /// Takes one open operation back, or carries it through where it is too late for that. The others wait.
    pub(crate) async fn call_off(mut self, operation: OperationId) -> Result<Driven, EngineError> {
        self.calling_off = Some(operation);
        self.carry(operation).await?;
        Ok(self.driven())
    }

    pub(crate) async fn drive(mut self) -> Result<Driven, EngineError> {
        let mut tried = BTreeSet::new();
        loop {
            while let Some(operation) = self.next_open() {
                let merged = matches!(operation.request, Request::Merge(_));
                let outcome = self.carry(operation.id).await?;
                if outcome == Some(Outcome::Succeeded) && !merged {
                    tried.clear();
                }
                if outcome.is_none() {
                    return Ok(self.driven());
                }
            }
            if self.engine.stop.asked() || !self.begin_merge(&mut tried).await? {
                return Ok(self.driven());
            }
        }
    }

    fn driven(self) -> Driven {
        Driven { carried: self.carried, state: self.state }
    }

    /// The first open operation, unless it waits for someone.
    fn next_open(&self) -> Option<Operation> {
        let first = self.state.open.first()?;
        (!matches!(first.phase, Phase::NeedsAttention { .. })).then(|| first.clone())
    }

    /// Carries one operation through; `None` if it rests without an outcome.
    async fn carry(&mut self, id: OperationId) -> Result<Option<Outcome>, EngineError> {
        self.found = None;
        self.resolutions = 0;
        self.busy = 0;
        let mut hand = Hand::Found;
        while let Some(operation) = self.state.operation(id).cloned() {
            match self.pass(&operation, hand).await? {
                Pass::On(next) => hand = next,
                Pass::Rests => {
                    if let Some(operation) = self.state.operation(id).cloned() {
                        let failure = match &operation.phase {
                            Phase::NeedsAttention { failure, .. } => Some(failure.clone()),
                            _ => None,
                        };
                        self.carried.push(Carried {
                            operation,
                            outcome: None,
                            failure,
                            found: self.found.take(),
                        });
                        return Ok(None);
                    }
                    break;
                }
            }
        }
        Ok(self.carried.last().and_then(|carried| carried.outcome))
    }

    /// One thing done for an operation, according to where it stands.
    async fn pass(&mut self, operation: &Operation, hand: Hand) -> Result<Pass, EngineError> {
        if self.calling_off == Some(operation.id) {
            if let Some(pass) = self.take_back(operation).await? {
                return Ok(pass);
            }
        } else if self.engine.stop.asked() && hand == Hand::Found {
            return self.park_or_cancel(operation).await;
        }
        match &operation.phase {
            Phase::Requested => self.plan(operation).await,
            Phase::Planned => self.start(operation, 0, Vec::new()).await,
            Phase::Ready { step } => self.start(operation, *step, Vec::new()).await,
            Phase::Waiting { step, retry_at } => {
                self.engine.clock.sleep_until(*retry_at).await;
                self.start(operation, *step, Vec::new()).await
            }
            Phase::Running { step } if hand == Hand::Fresh => self.execute(operation, *step).await,
            Phase::Running { step } => self.resolve(operation, *step).await,
            Phase::Undoing { step, failure } => self.undo(operation, *step, failure).await,
            Phase::Undone { step: 0, failure } => {
                let ended = self.untouched_end(failure);
                self.end(operation, vec![ended]).await
            }
            Phase::Undone { step, failure } => {
                let event = OperationUndoStarted { step: step - 1, failure: failure.clone() };
                self.commit(operation, vec![event.into()]).await?;
                Ok(Pass::On(Hand::Found))
            }
            Phase::NeedsAttention { .. } | Phase::Ended { .. } => Ok(Pass::Rests),
        }
    }

    /// Ctrl-C: what can be undone is undone, the rest is left to `recover`.
    async fn park_or_cancel(&mut self, operation: &Operation) -> Result<Pass, EngineError> {
        let failure = called_off();
        match &operation.phase {
            Phase::Requested | Phase::Planned => {
                self.end(operation, vec![OperationCancelled { failure }.into()]).await
            }
            Phase::Ready { step } if *step > 0 && operation.can_go_back() => {
                self.go_back(operation, step - 1, failure).await
            }
            Phase::Waiting { step, .. } if operation.can_go_back() => {
                self.go_back(operation, *step, failure).await
            }
            Phase::Undoing { step, failure } => self.undo(operation, *step, failure).await,
            Phase::Undone { step: 0, failure } => {
                let ended = self.untouched_end(failure);
                self.end(operation, vec![ended]).await
            }
            Phase::Undone { step, failure } => self.go_back(operation, step - 1, failure.clone()).await,
            _ => Ok(Pass::Rests),
        }
    }

    /// The next thing toward taking an operation back; `None` to go on with it as usual.
    async fn take_back(&mut self, operation: &Operation) -> Result<Option<Pass>, EngineError> {
        let failure = called_off();
        Ok(match &operation.phase {
            Phase::Requested | Phase::Planned => {
                Some(self.end(operation, vec![OperationCancelled { failure }.into()]).await?)
            }
            Phase::Ready { step } if *step > 0 && operation.can_go_back() => {
                Some(self.go_back(operation, step - 1, failure).await?)
            }
            Phase::Waiting { step, .. } if operation.can_go_back() => {
                Some(self.go_back(operation, *step, failure).await?)
            }
            _ => None,
        })
    }

    fn untouched_end(&self, failure: &Failure) -> Event {
        let failure = failure.clone();
        match failure.code {
            Code::Cancelled => OperationCancelled { failure }.into(),
            Code::Expired => OperationExpired { failure }.into(),
            _ => OperationFailed { failure }.into(),
        }
    }

    /// Observes and plans; a broken precondition ends the operation with nothing touched.
    async fn plan(&mut self, operation: &Operation) -> Result<Pass, EngineError> {
        if let Some(failure) = self.expired(operation) {
            return self.end(operation, vec![OperationExpired { failure }.into()]).await;
        }
        let planned = match self.driver.observe(&self.state).await {
            Ok(seen) => self.driver.plan(operation.id, &operation.request, &self.state, &seen),
            Err(error) => {
                tracing::debug!(%error, "the hypervisor could not be asked");
                Err(error.failure)
            }
        };
        let failure = match planned {
            Ok(plan) if plan.steps.len() > STEPS_MAX => Failure::new(
                Code::Invalid,
                format!("it would take {} steps, and {STEPS_MAX} are allowed", plan.steps.len()),
            ),
            Ok(plan) => {
                let mut operation = operation.clone();
                operation.steps.clone_from(&plan.steps);
                return self.start(&operation, 0, vec![OperationPlanned { steps: plan.steps }.into()]).await;
            }
            Err(failure) => failure,
        };
        let mut events = vec![OperationFailed { failure: failure.clone().refused() }.into()];
        events.extend(deferrals(operation, &failure));
        self.end(operation, events).await
    }

    /// Why it must not begin any more, if its deadline has passed.
    fn expired(&self, operation: &Operation) -> Option<Failure> {
        let deadline = operation.deadline().filter(|deadline| *deadline < self.engine.clock.now())?;
        let message =
            format!("it was to begin before {deadline}, and what was there then is there no longer");
        Some(Failure::new(Code::Expired, message).hint("ask for it again"))
    }

    /// Commits `before` with the start of step `index`, or with the outcome if there is no such step.
    async fn start(
        &mut self,
        operation: &Operation,
        index: usize,
        mut before: Vec<Event>,
    ) -> Result<Pass, EngineError> {
        let Some(step) = operation.steps.get(index) else {
            before.extend(self.outcome(operation, &before));
            return self.end(operation, before).await;
        };
        before.push(OperationStepStarted { step: index }.into());
        if let Poison::AtStart(snapshots) = &step.poison {
            before.extend(self.deleted(snapshots));
        }
        self.commit(operation, before).await?;
        self.engine.hooks.reached(&format!("step.started.{}", step.name));
        Ok(Pass::On(Hand::Fresh))
    }

    async fn execute(&mut self, operation: &Operation, index: usize) -> Result<Pass, EngineError> {
        let Some(step) = operation.steps.get(index) else { return Ok(Pass::Rests) };
        let head = self.head().await?;
        let context = self.context(operation, index, head);
        let done = self.driver.execute(&context, step).await;
        match done {
            Ok(report) => self.finish(operation, index, step, report, HowFinished::Executed).await,
            Err(error) => self.failed(operation, index, step, error).await,
        }
    }

    fn context<'c>(&'c self, operation: &'c Operation, index: usize, head: Head) -> StepContext<'c> {
        StepContext {
            state: &self.state,
            operation: operation.id,
            request: &operation.request,
            index,
            head,
            now: self.engine.clock.now(),
            hooks: &*self.engine.hooks,
            progress: self.watch,
        }
    }

    async fn finish(
        &mut self,
        operation: &Operation,
        index: usize,
        step: &Step,
        report: StepReport,
        how: HowFinished,
    ) -> Result<Pass, EngineError> {
        self.engine.hooks.reached(&format!("step.done.{}", step.name));
        let mut events: Vec<Event> = vec![
            OperationStepFinished { step: index, how, changes: report.changes, learnt: report.learnt }.into(),
        ];
        if let Poison::AtFinish(snapshots) = &step.poison {
            events.extend(self.deleted(snapshots));
        }
        if self.engine.stop.asked() && index + 1 < operation.steps.len() {
            self.commit(operation, events).await?;
            return Ok(Pass::On(Hand::Found));
        }
        self.start(operation, index + 1, events).await
    }

    /// What a driver's failure leads to.
    async fn failed(
        &mut self,
        operation: &Operation,
        index: usize,
        step: &Step,
        error: DriverError,
    ) -> Result<Pass, EngineError> {
        tracing::debug!(step = step.name, error = &error as &dyn std::error::Error, "a step failed");
        let may_retry = match error.class {
            ErrorClass::Transient => operation.attempts + 1 < self.engine.settings.attempts_max,
            ErrorClass::Busy => {
                self.busy += 1;
                self.busy < BUSY_ATTEMPTS_MAX
            }
            ErrorClass::Permanent => false,
            ErrorClass::Unknown => return self.resolve_again(operation, index, error.failure).await,
        };
        if may_retry {
            let kind = if error.class == ErrorClass::Busy { RetryKind::Busy } else { RetryKind::Failed };
            let retry_at = self.retry_at(operation.attempts + self.busy);
            let event = OperationAttemptFailed { step: index, failure: error.failure, kind, retry_at };
            self.commit(operation, vec![event.into()]).await?;
            return Ok(Pass::On(Hand::Found));
        }
        let beyond = step.reversal == Reversal::ForwardOnly || !operation.can_go_back();
        if beyond || (step.reversal == Reversal::PointOfNoReturn && error.class != ErrorClass::Permanent) {
            return self.needs_attention(operation, error.failure).await;
        }
        self.go_back(operation, index, error.failure).await
    }

    /// Exponential backoff with full jitter and a cap.
    fn retry_at(&self, attempt: u32) -> Timestamp {
        let settings = &self.engine.settings;
        let ceiling =
            settings.retry_delay_ms_min.saturating_mul(1 << attempt.min(20)).min(settings.retry_delay_ms_max);
        let random = self.engine.ids.next().as_u128() % (u128::from(ceiling) + 1);
        let delay_ms = i64::try_from(random).unwrap_or(i64::MAX);
        let now = self.engine.clock.now();
        now.checked_add(SignedDuration::from_millis(delay_ms)).unwrap_or(now)
    }

    async fn go_back(
        &mut self,
        operation: &Operation,
        index: usize,
        failure: Failure,
    ) -> Result<Pass, EngineError> {
        self.commit(operation, vec![OperationUndoStarted { step: index, failure }.into()]).await?;
        Ok(Pass::On(Hand::Found))
    }

    async fn undo(
        &mut self,
        operation: &Operation,
        index: usize,
        failure: &Failure,
    ) -> Result<Pass, EngineError> {
        let Some(step) = operation.steps.get(index) else { return Ok(Pass::Rests) };
        self.driver_settled(operation).await?;
        let head = self.head().await?;
        let undone = self.driver.undo(&self.context(operation, index, head), step).await;
        match undone {
            Ok(report) => {
                let mut events: Vec<Event> =
                    vec![OperationUndoFinished { step: index, changes: report.changes }.into()];
                if let Some(next) = index.checked_sub(1) {
                    events.push(OperationUndoStarted { step: next, failure: failure.clone() }.into());
                    self.commit(operation, events).await?;
                    return Ok(Pass::On(Hand::Found));
                }
                events.push(self.untouched_end(failure));
                events.extend(deferrals(operation, failure));
                self.end(operation, events).await
            }
            Err(error) => {
                self.busy += 1;
                if matches!(error.class, ErrorClass::Permanent)
                    || self.busy > self.engine.settings.attempts_max
                {
                    let message = format!("{failure}; and going back failed: {error}");
                    return self.needs_attention(operation, Failure::new(error.failure.code, message)).await;
                }
                let retry_at = self.retry_at(self.busy);
                self.engine.clock.sleep_until(retry_at).await;
                Ok(Pass::On(Hand::Found))
            }
        }
    }

    async fn driver_settled(&self, operation: &Operation) -> Result<(), EngineError> {
        self.driver.settle(&self.state, operation.id).await.map_err(EngineError::Driver)
    }

    async fn resolve_again(
        &mut self,
        operation: &Operation,
        index: usize,
        failure: Failure,
    ) -> Result<Pass, EngineError> {
        self.resolutions += 1;
        if self.resolutions > RESOLUTIONS_MAX {
            return self.needs_attention(operation, failure).await;
        }
        self.resolve(operation, index).await
    }

    /// Finds out what became of a step, and goes on from there. Nobody may still be at work on it.
    async fn resolve(&mut self, operation: &Operation, index: usize) -> Result<Pass, EngineError> {
        let Some(step) = operation.steps.get(index) else { return Ok(Pass::Rests) };
        self.driver_settled(operation).await?;
        let seen = self.driver.observe(&self.state).await.map_err(EngineError::Driver)?;
        let head = self.head().await?;
        let resolution = self.driver.resolve(&self.context(operation, index, head), step, &seen);
        self.found = Some(format!("step {} '{}' {}", index + 1, step.name, word(&resolution)));
        let late = if index == 0 { self.expired(operation) } else { None };
        let unwanted = (self.calling_off == Some(operation.id) && operation.can_go_back()).then(called_off);
        match (resolution, late.or(unwanted)) {
            (Resolution::NotDone | Resolution::HalfDone(Remedy::EitherWay), Some(failure)) => {
                self.go_back(operation, index, failure).await
            }
            (resolution, _) => self.resolved(operation, index, step, resolution).await,
        }
    }

    async fn resolved(
        &mut self,
        operation: &Operation,
        index: usize,
        step: &Step,
        resolution: Resolution,
    ) -> Result<Pass, EngineError> {
        match resolution {
            Resolution::Done(report) => {
                self.finish(operation, index, step, report, HowFinished::Observed).await
            }
            Resolution::NotDone | Resolution::HalfDone(Remedy::Finish | Remedy::EitherWay) => {
                Ok(Pass::On(Hand::Fresh))
            }
            Resolution::HalfDone(Remedy::TakeBack(failure)) => self.go_back(operation, index, failure).await,
            Resolution::HalfDone(Remedy::AskSomeone(failure)) => {
                self.needs_attention(operation, failure).await
            }
        }
    }

    async fn needs_attention(
        &mut self,
        operation: &Operation,
        failure: Failure,
    ) -> Result<Pass, EngineError> {
        self.commit(operation, vec![OperationNeedsAttention { failure }.into()]).await?;
        Ok(Pass::Rests)
    }

    /// The events that make the request true, and the outcome. `before` goes into the same commit.
    fn outcome(&self, operation: &Operation, before: &[Event]) -> Vec<Event> {
        let mut events = Vec::new();
        let mut learnt = operation.learnt.clone();
        for event in before {
            if let Event::OperationStepFinished(e) = event
                && let Ok(now) = serde_json::from_value::<Learnt>(e.learnt.clone())
            {
                learnt.taken = now.taken.or(learnt.taken);
                learnt.state = now.state.or(learnt.state);
                learnt.left.extend(now.left);
            }
        }
        let gone: Vec<SnapshotId> = before
            .iter()
            .filter_map(|event| match event {
                Event::SnapshotDeleted(e) => Some(e.snapshot),
                _ => None,
            })
            .collect();
        match &operation.request {
            Request::Create(request) => {
                let mut snapshot = request.predicted(operation);
                snapshot.parent = self.state.tree.current().map(|current| current.id);
                snapshot.created = learnt.taken.unwrap_or_else(|| self.engine.clock.now());
                snapshot.state = learnt.state.unwrap_or(SnapshotState::Shutoff);
                if matches!(snapshot.state, SnapshotState::Shutoff | SnapshotState::DiskSnapshot) {
                    snapshot.memory = MemoryKind::No;
                }
                events.push(SnapshotCreated { snapshot }.into());
            }
            Request::Revert(request) => events.push(SnapshotReverted { snapshot: request.snapshot }.into()),
            Request::Delete(request) => {
                let left: Vec<_> =
                    request.snapshots.iter().copied().filter(|id| !gone.contains(id)).collect();
                events.extend(self.deleted(&left));
            }
            Request::Merge(request) => {
                events.push(MergeFinished { snapshots: request.plan.snapshots.clone() }.into());
            }
            Request::Unregister(request) => {
                let mut left: Vec<_> = learnt.left.into_iter().collect();
                if request.wish == UnregisterWish::KeepLayers {
                    left.extend(self.state.layers.files().cloned());
                }
                events.push(DomainUnregistered { wish: request.wish, left }.into());
            }
        }
        events.push(OperationSucceeded {}.into());
        events
    }

    /// One `Deleted` per snapshot that still lives.
    fn deleted(&self, snapshots: &[SnapshotId]) -> Vec<Event> {
        snapshots
            .iter()
            .filter_map(|id| self.state.tree.get(*id))
            .map(|snapshot| SnapshotDeleted { snapshot: snapshot.id, name: snapshot.name.clone() }.into())
            .collect()
    }

    /// Commits the events that end an operation, and keeps what it came to.
    async fn end(&mut self, operation: &Operation, events: Vec<Event>) -> Result<Pass, EngineError> {
        let ended = events.iter().find_map(|event| match event {
            Event::OperationSucceeded(_) => Some((Outcome::Succeeded, None)),
            Event::OperationFailed(e) => Some((Outcome::Failed, Some(e.failure.clone()))),
            Event::OperationCancelled(e) => Some((Outcome::Cancelled, Some(e.failure.clone()))),
            Event::OperationExpired(e) => Some((Outcome::Expired, Some(e.failure.clone()))),
            _ => None,
        });
        self.commit(operation, events).await?;
        if let Some((outcome, failure)) = ended {
            let operation = operation.clone();
            let found = self.found.take();
            self.carried.push(Carried { operation, outcome: Some(outcome), failure, found });
        }
        Ok(Pass::Rests)
    }

    /// Appends facts of an operation and applies them. Facts carry no expectation, so they do not conflict.
    async fn commit(&mut self, operation: &Operation, events: Vec<Event>) -> Result<(), EngineError> {
        let events = events
            .into_iter()
            .map(|event| NewEvent {
                stream: self.stream.clone(),
                event,
                operation: Some(operation.id),
                cause: Some(operation.seq),
                key: None,
            })
            .collect();
        self.append(operation.actor.clone(), events).await?;
        Ok(())
    }

    async fn append(&mut self, actor: Actor, events: Vec<NewEvent>) -> Result<(), LogError> {
        self.engine.hooks.reached("append.before");
        let requester = Requester { actor, origin: self.requester.origin.clone() };
        let appended = self.engine.append(&requester, Vec::new(), events).await?;
        self.engine.hooks.reached("append.after");
        self.follow(&appended).await
    }

    /// Applies what was appended. Requests that others appended in between are read first.
    async fn follow(&mut self, appended: &[Envelope]) -> Result<(), LogError> {
        let Some((first, last)) = appended.first().zip(appended.last()) else { return Ok(()) };
        let before = self.state.version;
        if first.version != before + 1 {
            let missed =
                self.engine.log.read_stream(&self.stream, before, first.seq - 1, usize::MAX >> 1).await?;
            self.state.apply_all(&missed);
        }
        self.state.apply_all(appended);
        self.head = Some(Head { seq: last.seq, hash: last.hash });
        appended.iter().for_each(|envelope| self.watch.happened(envelope));
        if before / CHECKPOINT_EVENTS != self.state.version / CHECKPOINT_EVENTS {
            self.engine.keep_checkpoint(&self.state, last).await;
        }
        Ok(())
    }

    async fn head(&self) -> Result<Head, EngineError> {
        match self.head {
            Some(head) => Ok(head),
            None => Ok(self.engine.log.head().await?),
        }
    }

    /// Looks at the tombstones and requests the first merge that is possible. Says whether there is one.
    async fn begin_merge(&mut self, tried: &mut BTreeSet<Vec<SnapshotId>>) -> Result<bool, EngineError> {
        let blocked = !self.state.open.is_empty() || !self.state.registered;
        if self.state.tombstones.is_empty() || blocked {
            return Ok(false);
        }
        let seen = self.driver.observe(&self.state).await.map_err(EngineError::Driver)?;
        let verdicts = self.verdicts(&seen);
        self.note_deferrals(&verdicts).await?;
        let plan = verdicts.into_iter().find_map(|verdict| match verdict {
            Verdict::Merge(plan) if !tried.contains(&plan.snapshots) => Some(plan),
            _ => None,
        });
        let Some(plan) = plan else { return Ok(false) };
        tried.insert(plan.snapshots.clone());
        self.request_merge(plan).await?;
        Ok(true)
    }

    fn verdicts(&self, seen: &Observation) -> Vec<Verdict> {
        merge::verdicts(&self.state, seen, self.policy)
    }

    async fn request_merge(&mut self, plan: MergePlan) -> Result<(), EngineError> {
        let cause = plan.snapshots.iter().find_map(|id| self.state.tombstones.get(id)).map(|stone| stone.seq);
        let event = NewEvent {
            stream: self.stream.clone(),
            event: MergeStarted { plan }.into(),
            operation: Some(OperationId::from_uuid(self.engine.ids.next())),
            cause,
            key: None,
        };
        Ok(self.append(Actor::Engine, vec![event]).await?)
    }

    /// Writes down why a tombstone stays, once per reason.
    async fn note_deferrals(&mut self, verdicts: &[Verdict]) -> Result<(), EngineError> {
        let mut events = Vec::new();
        for verdict in verdicts {
            let Verdict::Defer { snapshot, reason } = verdict else { continue };
            let stone = self.state.tombstones.get(snapshot);
            if let Some(stone) = stone.filter(|stone| stone.deferred.as_ref() != Some(reason)) {
                let event = MergeDeferred { snapshot: *snapshot, reason: reason.clone() };
                let cause = Some(stone.seq);
                let stream = self.stream.clone();
                events.push(NewEvent { stream, event: event.into(), operation: None, cause, key: None });
            }
        }
        if events.is_empty() {
            return Ok(());
        }
        Ok(self.append(Actor::Engine, events).await?)
    }
}

/// A merge that failed leaves its tombstones for later, with the reason.
fn deferrals(operation: &Operation, failure: &Failure) -> Vec<Event> {
    let Request::Merge(request) = &operation.request else { return Vec::new() };
    let deferred =
        |snapshot: &SnapshotId| MergeDeferred { snapshot: *snapshot, reason: failure.message.clone() }.into();
    request.plan.snapshots.iter().map(deferred).collect()
}

fn called_off() -> Failure {
    Failure::new(Code::Cancelled, "called off while it was carried out")
}

fn word(resolution: &Resolution) -> &'static str {
    match resolution {
        Resolution::Done(_) => "was done",
        Resolution::NotDone => "had not begun",
        Resolution::HalfDone(Remedy::Finish | Remedy::EitherWay) => "was half done and could be finished",
        Resolution::HalfDone(Remedy::TakeBack(_)) => "was half done and had to be taken back",
        Resolution::HalfDone(Remedy::AskSomeone(_)) => "was half done and is beyond repair",
    }
}
