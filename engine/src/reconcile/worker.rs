//! One domain's worker: carries its open operations through, one after the other, and merges after each.
//!
//! ```text
//!   take the first open operation
//!     Requested         the hook before          commit HookStarted, HookFinished
//!                       observe, plan            commit Planned + StepStarted(0)
//!     Running, fresh    driver.execute           commit StepFinished(i) + StepStarted(i+1) | outcome
//!     Running, found    settle, observe, resolve, then execute, undo or commit
//!     Undoing           driver.undo              commit UndoFinished(i) + UndoStarted(i-1) | outcome
//!     about to end      the hook after           commit HookStarted, HookFinished, then the outcome
//!   then look at the tombstones; a merge is an operation of its own, and is taken the same way
//! ```
//!
//! Architecture Invariant: the driver is asked for an effect only after the event that announces it is on disk, and a
//! step whose end is not known is resolved before anything else happens to the domain.

mod around;
mod back;
mod merging;
mod outcome;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::command::reject;
use crate::driver::{
    CallOff, Driver, DriverError, Head, Learnt, Observation, Plan, StepContext, StepReport, Watch,
};
use crate::engine::{Engine, EngineError, Requester};
use crate::event::{
    Actor, DomainRepaired, Envelope, Event, HowFinished, MergeWish, OperationExpired, OperationFailed,
    OperationPlanned, OperationStepFinished, OperationStepStarted, OperationUndoStarted,
};
use crate::ids::{OperationId, StreamId};
use crate::log::{LogError, NewEvent};
use crate::operation::{
    Code, Failure, Operation, Outcome, Phase, Poison, Request, Reversal, STEPS_MAX, Step,
};
use crate::project::DomainState;
use crate::reconcile::beside::{self, Blocked};
use crate::reconcile::connection::was_not_asked;
use crate::reconcile::merge::{MergePolicy, PutOff};
use crate::reconcile::space;
use crate::settings::Stop;

use outcome::{Stays, deferrals};

/// How often a busy hypervisor is asked again within one run.
const BUSY_ATTEMPTS_MAX: u32 = 20;
/// A checkpoint is kept each time the stream's version passes a multiple of this.
const CHECKPOINT_EVENTS: u64 = 256;

/// An operation that came to an end, or to rest, while its domain was driven.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
        let policy = engine.settings.merge_policy();
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
        self.carry(operation).await?;
        Ok(self.driven())
    }

    pub(crate) async fn drive(mut self) -> Result<Driven, EngineError> {
        let mut tried = Vec::new();
        loop {
            while let Some(operation) = self.next_open() {
                let merged = matches!(operation.request, Request::Merge(_));
                let outcome = self.carry(operation.id).await?;
                if outcome == Some(Outcome::Succeeded) && !merged {
                    tried.clear();
                }
                if outcome.is_none() && !self.needs_attention_now(operation.id) {
                    return Ok(self.driven());
                }
            }
            if self.engine.stop.asked() || !self.begin_merge(&mut tried).await? {
                return Ok(self.driven());
            }
        }
    }

    fn driven(self) -> Driven {
        self.engine.remember(&self.state);
        Driven { carried: self.carried, state: self.state }
    }

    /// The first open operation that does not wait for someone, unless one that does blocks the whole domain. One that
    /// was called off before its turn goes first.
    fn next_open(&self) -> Option<Operation> {
        if beside::blocked(&*self.driver, &self.state) == Blocked::Domain {
            return None;
        }
        let called_off = |operation: &&Operation| {
            operation.phase == Phase::Requested && self.engine.stop.called_off(operation.id).is_some()
        };
        let waits = |operation: &&Operation| matches!(operation.phase, Phase::NeedsAttention { .. });
        let open = &self.state.open;
        open.iter().find(called_off).or_else(|| open.iter().find(|operation| !waits(operation))).cloned()
    }

    fn needs_attention_now(&self, id: OperationId) -> bool {
        let found = self.state.operation(id);
        found.is_some_and(|operation| matches!(operation.phase, Phase::NeedsAttention { .. }))
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
        if let Some(failure) = self.called_off(operation) {
            if let Some(pass) = self.take_back(operation, failure).await? {
                return Ok(pass);
            }
        } else if self.engine.stop.asked() && hand == Hand::Found {
            if !self.sees_through(operation) {
                return self.park_or_cancel(operation).await;
            }
            // It waits for its turn as if nothing were to end; who ends the program does not wait for ever.
            self.driver = self.engine.driver_until(&self.state, Stop::default())?;
        }
        match &operation.phase {
            Phase::Requested => self.plan(operation).await,
            Phase::Planned => self.start(operation, 0, Vec::new()).await,
            Phase::Ready { step } => self.start(operation, *step, Vec::new()).await,
            Phase::Waiting { step, retry_at } => {
                let stop = self.engine.stop.interrupts(operation.can_go_back().then_some(operation.id));
                tokio::select! {
                    biased;
                    () = self.engine.clock.sleep_until(*retry_at) => {}
                    () = stop => return Ok(Pass::On(Hand::Found)),
                }
                self.start(operation, *step, Vec::new()).await
            }
            Phase::Running { step } if hand == Hand::Fresh => self.execute(operation, *step).await,
            Phase::Running { step } => self.resolve(operation, *step, None).await,
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

    /// Observes and plans; a broken precondition ends the operation with nothing touched.
    async fn plan(&mut self, operation: &Operation) -> Result<Pass, EngineError> {
        if let Some(failure) = self.expired(operation) {
            return self.end(operation, vec![OperationExpired { failure }.into()]).await;
        }
        if let Some(hook) = operation.hook_before() {
            return self.before(operation, hook).await;
        }
        if let Some(failure) = self.not_kept(operation) {
            return self.end(operation, vec![OperationFailed { failure }.into()]).await;
        }
        let seen = self.observe_and_adopt().await?;
        // The hypervisor may have been busy with others for long.
        if let Some(failure) = self.expired(operation) {
            return self.end(operation, vec![OperationExpired { failure }.into()]).await;
        }
        let planned = match seen {
            Ok(seen) => self
                .driver
                .plan(operation.id, &operation.request, &self.state, &seen)
                .and_then(|plan| self.check_room(operation, &seen, plan)),
            Err(error) if was_not_asked(&error) => return Ok(Pass::On(Hand::Found)),
            Err(error) => {
                tracing::debug!(%error, "the hypervisor could not be asked");
                Err(error.failure)
            }
        };
        let planned =
            planned.and_then(|plan| match beside::in_the_way(&*self.driver, &self.state, &plan.steps) {
                Some(failure) => Err(failure),
                None => Ok(plan),
            });
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

    /// Why a revert must not begin, if what it gives up was to be kept and is not.
    fn not_kept(&self, operation: &Operation) -> Option<Failure> {
        let Request::Revert(revert) = &operation.request else { return None };
        revert.keep.filter(|keep| !self.state.tree.contains(*keep))?;
        let message = "what the revert would give up could not be kept";
        Some(
            Failure::new(Code::Invalid, message)
                .hint("`snaptree op list` shows the create before it, and `op show` why it failed")
                .refused(),
        )
    }

    /// The plan, if there is room for it, and for the merges that are to follow at once.
    fn check_room(&self, operation: &Operation, seen: &Observation, plan: Plan) -> Result<Plan, Failure> {
        space::check_plan(&operation.request, &plan, (&self.state, seen), self.policy.margin_bytes)?;
        if let Request::Delete(delete) = &operation.request
            && delete.merge == MergeWish::Now
        {
            let deleted = (&operation.actor, self.engine.clock.now());
            space::foresee(&self.state, delete, deleted, seen, self.policy)?;
        }
        Ok(plan)
    }

    /// Reads what is there; what somebody else did is taken over first, so that nothing is planned upon a wrong tree.
    async fn observe_and_adopt(&mut self) -> Result<Result<Observation, DriverError>, EngineError> {
        let seen = self.driver.observe(&self.state).await;
        let Ok(found) = &seen else { return Ok(seen) };
        let taken_over = self.engine.adoption(&self.state, found);
        if taken_over.is_empty() {
            return Ok(seen);
        }
        let new = |event: Event| NewEvent::of_itself(self.stream.clone(), event);
        let events = taken_over.into_iter().map(new).collect();
        self.append(Actor::Engine, events).await?;
        Ok(self.driver.observe(&self.state).await)
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
            let lists = self.state.domain.as_ref().is_some_and(|domain| domain.capabilities.merges_itself);
            before.extend(self.deleted(snapshots, if lists { Stays::AtTheHypervisor } else { Stays::No }));
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
            Err(error) if was_not_asked(&error) => self.not_begun(operation, index).await,
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
            call_off: match operation.steps.get(index) {
                Some(step) if step.reversal == Reversal::Undoable && operation.can_go_back() => {
                    CallOff::of(&self.engine.stop, operation.id)
                }
                _ => CallOff::default(),
            },
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
        self.resolutions = 0;
        self.busy = 0;
        self.engine.hooks.reached(&format!("step.done.{}", step.name));
        let mut events = repairs_in(&report);
        events.push(
            OperationStepFinished { step: index, how, changes: report.changes, learnt: report.learnt }.into(),
        );
        events.extend(match &step.poison {
            Poison::AtFinish(snapshots) => self.deleted(snapshots, Stays::No),
            Poison::Hidden(snapshots) => self.deleted(snapshots, Stays::AtTheHypervisor),
            Poison::AtStart(_) | Poison::Nothing => Vec::new(),
        });
        let ends = self.engine.stop.asked() && index + 1 < operation.steps.len();
        if ends || self.engine.stop.called_off(operation.id).is_some() {
            self.commit(operation, events).await?;
            return Ok(Pass::On(Hand::Found));
        }
        self.start(operation, index + 1, events).await
    }

    async fn driver_settled(&self, operation: &Operation) -> Result<(), EngineError> {
        self.driver.settle(&self.state, operation.id).await.map_err(EngineError::Driver)
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
            let told = self.engine.keep_checkpoint(self.requester, &self.state, last).await;
            if let Some(told) = told {
                self.state.apply(&told);
                self.head = Some(Head { seq: told.seq, hash: told.hash });
            }
        }
        Ok(())
    }

    async fn head(&self) -> Result<Head, EngineError> {
        match self.head {
            Some(head) => Ok(head),
            None => Ok(self.engine.log.head().await?),
        }
    }
}

/// What a step had to put right at the hypervisor first.
fn repairs_in(report: &StepReport) -> Vec<Event> {
    let learnt: Learnt = serde_json::from_value(report.learnt.clone()).unwrap_or_default();
    learnt.repairs.into_iter().map(|what| DomainRepaired { what }.into()).collect()
}
