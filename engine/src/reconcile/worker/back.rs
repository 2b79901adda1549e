//! What happens when a step did not simply work: resolved, tried again, taken back, called off.

use jiff::{SignedDuration, Timestamp};

use crate::around::HookEnd;
use crate::driver::{DriverError, ErrorClass, Remedy, Resolution};
use crate::engine::EngineError;
use crate::event::{
    Course, Event, HowFinished, OperationAttemptFailed, OperationCancelled, OperationExpired,
    OperationFailed, OperationNeedsAttention, OperationUndoFinished, OperationUndoStarted, RetryKind,
    StepFound, SystemRecovered,
};
use crate::log::NewEvent;
use crate::operation::{Code, Failure, Operation, Phase, Reversal, Step};

use super::outcome::deferrals;
use super::{BUSY_ATTEMPTS_MAX, Hand, Pass, Worker, repairs_in};

impl Worker<'_> {
    /// Ctrl-C: what can be undone is undone, the rest is left to `recover`. A daemon that ends leaves all of it.
    pub(super) async fn park_or_cancel(&mut self, operation: &Operation) -> Result<Pass, EngineError> {
        if self.engine.stop.parks() {
            return Ok(Pass::Rests);
        }
        let failure = Failure::new(Code::Cancelled, CALLED_OFF);
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
    pub(super) async fn take_back(
        &mut self,
        operation: &Operation,
        failure: Failure,
    ) -> Result<Option<Pass>, EngineError> {
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

    /// Why the operation is to go back, if someone called it off and it can.
    pub(super) fn called_off(&self, operation: &Operation) -> Option<Failure> {
        let by = self.engine.stop.called_off(operation.id)?;
        if operation.can_go_back() {
            return Some(Failure::new(Code::Cancelled, format!("{CALLED_OFF}, by {by}")));
        }
        // Too late, once and for all: nothing is to be interrupted by it any more.
        self.engine.stop.forget(operation.id);
        None
    }

    /// The driver was not asked for a step that was announced.
    pub(super) async fn not_begun(
        &mut self,
        operation: &Operation,
        index: usize,
    ) -> Result<Pass, EngineError> {
        match self.called_off(operation) {
            Some(failure) => self.go_back(operation, index, failure).await,
            // The step is resolved as any other that was cut short; or it was called off too late, and is asked for.
            None => Ok(Pass::On(Hand::Found)),
        }
    }

    pub(super) fn untouched_end(&self, failure: &Failure) -> Event {
        let failure = failure.clone();
        match failure.code {
            Code::Cancelled => OperationCancelled { failure }.into(),
            Code::Expired => OperationExpired { failure }.into(),
            _ => OperationFailed { failure }.into(),
        }
    }

    /// What a driver's failure leads to.
    pub(super) async fn failed(
        &mut self,
        operation: &Operation,
        index: usize,
        step: &Step,
        mut error: DriverError,
    ) -> Result<Pass, EngineError> {
        if error.failure.code == Code::Cancelled
            && let Some(failure) = self.called_off(operation)
        {
            error.failure = failure;
        }
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
        if error.class != ErrorClass::Permanent {
            return self.give_up(operation, index, error.failure).await;
        }
        if step.reversal == Reversal::ForwardOnly || !operation.can_go_back() {
            return self.needs_attention(operation, error.failure).await;
        }
        self.go_back(operation, index, error.failure).await
    }

    /// Exponential backoff with full jitter and a cap.
    pub(super) fn retry_at(&self, attempt: u32) -> Timestamp {
        let settings = &self.engine.settings;
        let ceiling =
            settings.retry_delay_ms_min.saturating_mul(1 << attempt.min(20)).min(settings.retry_delay_ms_max);
        let random = self.engine.ids.next().as_u128() % (u128::from(ceiling) + 1);
        let delay_ms = i64::try_from(random).unwrap_or(i64::MAX);
        let now = self.engine.clock.now();
        now.checked_add(SignedDuration::from_millis(delay_ms)).unwrap_or(now)
    }

    pub(super) async fn go_back(
        &mut self,
        operation: &Operation,
        index: usize,
        failure: Failure,
    ) -> Result<Pass, EngineError> {
        self.busy = 0;
        self.commit(operation, vec![OperationUndoStarted { step: index, failure }.into()]).await?;
        Ok(Pass::On(Hand::Found))
    }

    pub(super) async fn undo(
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
                // Each step has tries of its own.
                self.busy = 0;
                let mut events = repairs_in(&report);
                events.push(OperationUndoFinished { step: index, changes: report.changes }.into());
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
                if matches!(error.class, ErrorClass::Permanent) {
                    let message = format!("{failure}; and going back failed: {error}");
                    return self.needs_attention(operation, Failure::new(error.failure.code, message)).await;
                }
                // What may work later needs nobody's verdict: it stays open, and whoever drives next goes on.
                if self.busy > self.engine.settings.attempts_max {
                    return Err(EngineError::Driver(error));
                }
                let retry_at = self.retry_at(self.busy);
                tokio::select! {
                    biased;
                    () = self.engine.clock.sleep_until(retry_at) => {}
                    () = self.engine.stop.parked() => {}
                }
                Ok(Pass::On(Hand::Found))
            }
        }
    }

    /// After a try whose end is not known: waits a little and finds out; after too many of them, goes back.
    pub(super) async fn resolve_again(
        &mut self,
        operation: &Operation,
        index: usize,
        failure: Failure,
    ) -> Result<Pass, EngineError> {
        self.resolutions += 1;
        if self.resolutions >= self.engine.settings.attempts_max {
            return self.give_up(operation, index, failure).await;
        }
        let retry_at = self.retry_at(self.resolutions);
        tokio::select! {
            biased;
            () = self.engine.clock.sleep_until(retry_at) => self.resolve(operation, index, Some(failure)).await,
            () = self.engine.stop.interrupts(None) => Ok(Pass::On(Hand::Found)),
        }
    }

    /// The tries are used up: back where that is possible, and only else to someone who looks.
    async fn give_up(
        &mut self,
        operation: &Operation,
        index: usize,
        failure: Failure,
    ) -> Result<Pass, EngineError> {
        let Some(step) = operation.steps.get(index) else { return Ok(Pass::Rests) };
        let resolution = self.look(operation, index, step).await?;
        let goes_back = operation.can_go_back() && step.reversal != Reversal::ForwardOnly;
        match resolution {
            Resolution::Done(_) | Resolution::HalfDone(Remedy::TakeBack(_) | Remedy::AskSomeone(_)) => {
                self.resolved(operation, index, step, resolution).await
            }
            Resolution::NotDone | Resolution::HalfDone(Remedy::EitherWay) if goes_back => {
                self.go_back(operation, index, failure).await
            }
            Resolution::HalfDone(Remedy::Finish) if goes_back && step.reversal == Reversal::Undoable => {
                self.go_back(operation, index, failure).await
            }
            Resolution::NotDone | Resolution::HalfDone(Remedy::EitherWay | Remedy::Finish) => {
                self.needs_attention(operation, failure).await
            }
        }
    }

    /// What became of a step. Nobody may still be at work on it.
    async fn look(
        &mut self,
        operation: &Operation,
        index: usize,
        step: &Step,
    ) -> Result<Resolution, EngineError> {
        self.driver_settled(operation).await?;
        let seen = self.driver.observe(&self.state).await.map_err(EngineError::Driver)?;
        let head = self.head().await?;
        Ok(self.driver.resolve(&self.context(operation, index, head), step, &seen))
    }

    /// Finds out what became of a step, writes it down, and goes on from there. `why` says what made it unknown,
    /// where this process has seen that.
    pub(super) async fn resolve(
        &mut self,
        operation: &Operation,
        index: usize,
        why: Option<Failure>,
    ) -> Result<Pass, EngineError> {
        let Some(step) = operation.steps.get(index) else { return Ok(Pass::Rests) };
        let resolution = self.look(operation, index, step).await?;
        self.found = Some(format!("step {} '{}' {}", index + 1, step.name, word(&resolution)));
        let late = if index == 0 { self.expired(operation) } else { None };
        let unwanted = self.called_off(operation);
        let either_way = matches!(resolution, Resolution::NotDone | Resolution::HalfDone(Remedy::EitherWay));
        let back = late.or(unwanted).filter(|_| either_way);
        let (found, forward) = in_event(&resolution);
        let course = if back.is_some() { Course::Back } else { forward };
        self.note_recovery(operation, SystemRecovered { step: index, found, course, failure: why }).await?;
        match back {
            Some(failure) => self.go_back(operation, index, failure).await,
            None => self.resolved(operation, index, step, resolution).await,
        }
    }

    /// Writes down what was made out: in the name of whoever recovers, who need not be the one that asked.
    async fn note_recovery(
        &mut self,
        operation: &Operation,
        recovered: SystemRecovered,
    ) -> Result<(), EngineError> {
        let event = NewEvent {
            stream: self.stream.clone(),
            event: recovered.into(),
            operation: Some(operation.id),
            cause: Some(operation.seq),
            key: None,
        };
        Ok(self.append(self.requester.actor.clone(), vec![event]).await?)
    }

    pub(super) async fn resolved(
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

    pub(super) async fn needs_attention(
        &mut self,
        operation: &Operation,
        failure: Failure,
    ) -> Result<Pass, EngineError> {
        self.after(operation, HookEnd::NeedsAttention).await?;
        self.commit(operation, vec![OperationNeedsAttention { failure }.into()]).await?;
        Ok(Pass::Rests)
    }
}

const CALLED_OFF: &str = "called off while it was carried out";

/// What was found, and what follows from it alone.
fn in_event(resolution: &Resolution) -> (StepFound, Course) {
    match resolution {
        Resolution::Done(_) => (StepFound::Done, Course::Forward),
        Resolution::NotDone => (StepFound::NotBegun, Course::Forward),
        Resolution::HalfDone(remedy) => {
            let course = match remedy {
                Remedy::Finish | Remedy::EitherWay => Course::Forward,
                Remedy::TakeBack(_) => Course::Back,
                Remedy::AskSomeone(_) => Course::Ask,
            };
            (StepFound::HalfDone, course)
        }
    }
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
