//! One request's life.
//!
//! ```text
//!  Requested --Planned--> Planned --StepStarted(0)--> Running(0)
//!                                                        |  ^
//!                              StepFinished(i)           |  | StepStarted(i)
//!      Ready(i+1) <--------------------------------------+  |
//!        |  |                                            |  |
//!        |  +--StepStarted(i+1)--> Running(i+1)          |  |
//!        |                                AttemptFailed(i)  |
//!        |                                               v  |
//!        |                                            Waiting(i)
//!        |
//!        +--Succeeded | Failed (after the last step)--> Ended(Succeeded | Failed)
//!
//!  Running(i) | Waiting(i) --UndoStarted(i)--> Undoing(i) --UndoFinished(i)--> Undone(i)
//!  Ready(i)                --UndoStarted(i-1)--> Undoing(i-1)
//!  Undone(i)               --UndoStarted(i-1)--> Undoing(i-1)
//!  Undone(0) | Requested | Planned --Failed | Cancelled | Expired--> Ended
//!
//!  any open phase --NeedsAttention--> NeedsAttention(phase) --Retried--> phase
//!     NeedsAttention(Running(i)) --Resolved(done)--> Ready(i+1), --Resolved(not done)--> Ready(i)
//!     NeedsAttention(Undoing(i)) --Resolved(done)--> Undone(i),  --Resolved(not done)--> Undoing(i)
//!     NeedsAttention(phase)      --Resolved(abandon)--> Ended(Failed)
//! ```
//!
//! * `Requested`: in the log, nothing looked at yet.
//! * `Running(i)`: the driver was, or is about to be, asked for step `i`. After a crash nobody knows how far it came:
//!   it is resolved from an observation, never simply repeated.
//! * `Waiting(i)`: the driver said that step `i` did not happen and may be tried again.
//! * `Undone(i)`: step `i` and all after it are undone.
//! * `Failed` after the last step: a step past the point of no return learnt that what was asked for cannot come to be
//!   ([`Learnt::failed`](crate::driver::Learnt)), and the rest was brought to a sound end.
//!
//! Programs around it ([`around`](mod@crate::around)) change no phase: the one before runs while it is `Requested`, the one
//! after in whatever phase it is about to end or to rest.
//!
//! [`Phase::next`] is total over the events. What the drawing does not allow is an [`IllegalHistory`]: the log was
//! not written by this program, and loading it is refused.

mod failure;
mod request;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::around::{HookPhase, HookStage, HookStages};
use crate::driver::Learnt;
use crate::event::{Actor, Event, OperationResolved, RetryKind};
use crate::ids::OperationId;

pub use failure::{Code, Failure};
pub use request::{Poison, Request, Reversal, Step};

/// Most steps that a plan may have; a driver that plans more has lost its way.
pub const STEPS_MAX: usize = 100_000;

/// How an operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// What was asked for is so.
    Succeeded,
    /// It is not, and the domain is as it was.
    Failed,
    /// It was called off, and the domain is as it was.
    Cancelled,
    /// Its deadline passed before its first step, and the domain is as it was.
    Expired,
}

/// What someone who looked says of a step that Snaptree could not make out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It is done (or undone, if it was being undone); go on behind it.
    Done,
    /// It is not; do it (or undo it) again.
    NotDone,
    /// Let the operation end here, as failed, and leave everything as it is.
    Abandon,
}

impl Outcome {
    /// The word in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Expired => "expired",
        }
    }
}

/// Where an operation stands. See the drawing in the module's documentation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all = "kebab-case")]
pub enum Phase {
    /// Asked for.
    Requested,
    /// Its steps are known, none was started.
    Planned,
    /// Step `step` was started, and its end is not known.
    Running {
        /// The step.
        step: usize,
    },
    /// Step `step` did not happen, and may be tried again.
    Waiting {
        /// The step.
        step: usize,
        /// Not before this.
        retry_at: Timestamp,
    },
    /// All steps before `step` are done.
    Ready {
        /// The next step, or the number of steps.
        step: usize,
    },
    /// Step `step` is being undone.
    Undoing {
        /// The step.
        step: usize,
        /// Why it goes back.
        failure: Failure,
    },
    /// Step `step` and all after it are undone.
    Undone {
        /// The step.
        step: usize,
        /// Why it went back.
        failure: Failure,
    },
    /// Someone has to look at it.
    NeedsAttention {
        /// Where it stood.
        before: Box<Phase>,
        /// What stands in the way.
        failure: Failure,
    },
    /// It is over.
    Ended {
        /// How.
        outcome: Outcome,
        /// Why, if it failed.
        failure: Option<Failure>,
    },
}

/// An event that does not follow from where the operation stood.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("illegal history: {event} of operation {operation} cannot follow {phase} (event {seq})")]
pub struct IllegalHistory {
    /// The operation.
    pub operation: OperationId,
    /// Where it stood.
    pub phase: String,
    /// The event's kind.
    pub event: String,
    /// Where in the log.
    pub seq: u64,
}

impl Phase {
    /// Where the operation stands after `event`; `None` if the event cannot follow.
    pub fn next(&self, event: &Event, steps: usize) -> Option<Self> {
        if let Self::NeedsAttention { before, .. } = self {
            return match event {
                Event::OperationRetried(_) => Some((**before).clone()),
                Event::OperationResolved(e) => before.settled(e),
                _ => None,
            };
        }
        match event {
            Event::OperationPlanned(_) => matches!(self, Self::Requested).then_some(Self::Planned),
            Event::OperationStepStarted(e) => {
                let expected = match self {
                    Self::Planned => 0,
                    Self::Ready { step } | Self::Waiting { step, .. } => *step,
                    _ => return None,
                };
                (e.step == expected && e.step < steps).then_some(Self::Running { step: e.step })
            }
            Event::OperationStepFinished(e) => matches!(self, Self::Running { step } if *step == e.step)
                .then_some(Self::Ready { step: e.step + 1 }),
            Event::OperationAttemptFailed(e) => matches!(self, Self::Running { step } if *step == e.step)
                .then_some(Self::Waiting { step: e.step, retry_at: e.retry_at }),
            Event::OperationUndoStarted(e) => {
                let first_undone = match self {
                    Self::Running { step } | Self::Waiting { step, .. } => *step,
                    Self::Ready { step } | Self::Undone { step, .. } => step.checked_sub(1)?,
                    _ => return None,
                };
                (e.step == first_undone).then(|| Self::Undoing { step: e.step, failure: e.failure.clone() })
            }
            Event::OperationUndoFinished(e) => match self {
                Self::Undoing { step, failure } if *step == e.step => {
                    Some(Self::Undone { step: *step, failure: failure.clone() })
                }
                _ => None,
            },
            Event::OperationSucceeded(_) => match self {
                Self::Ready { step } if *step == steps => {
                    Some(Self::Ended { outcome: Outcome::Succeeded, failure: None })
                }
                Self::Planned if steps == 0 => {
                    Some(Self::Ended { outcome: Outcome::Succeeded, failure: None })
                }
                _ => None,
            },
            Event::OperationFailed(e) if matches!(self, Self::Ready { step } if *step == steps) => {
                Some(Self::Ended { outcome: Outcome::Failed, failure: Some(e.failure.clone()) })
            }
            Event::OperationFailed(e) => self.end_untouched(Outcome::Failed, &e.failure),
            Event::OperationCancelled(e) => self.end_untouched(Outcome::Cancelled, &e.failure),
            Event::OperationExpired(e) => self.end_untouched(Outcome::Expired, &e.failure),
            Event::OperationNeedsAttention(e) => (!self.is_ended())
                .then(|| Self::NeedsAttention { before: Box::new(self.clone()), failure: e.failure.clone() }),
            _ => None,
        }
    }

    /// The end of an operation that has touched nothing, or nothing any more.
    fn end_untouched(&self, outcome: Outcome, failure: &Failure) -> Option<Self> {
        matches!(self, Self::Requested | Self::Planned | Self::Undone { step: 0, .. })
            .then(|| Self::Ended { outcome, failure: Some(failure.clone()) })
    }

    /// Where it stands once someone has said what became of the step in hand; `None` if no step is.
    fn settled(&self, said: &OperationResolved) -> Option<Self> {
        match (said.verdict, self) {
            (Verdict::Abandon, _) => {
                Some(Self::Ended { outcome: Outcome::Failed, failure: said.abandoned() })
            }
            (Verdict::Done, Self::Running { step } | Self::Waiting { step, .. }) => {
                Some(Self::Ready { step: step + 1 })
            }
            (Verdict::NotDone, Self::Running { step } | Self::Waiting { step, .. }) => {
                Some(Self::Ready { step: *step })
            }
            (Verdict::Done, Self::Undoing { step, failure }) => {
                Some(Self::Undone { step: *step, failure: failure.clone() })
            }
            (Verdict::NotDone, Self::Undoing { .. }) => Some(self.clone()),
            _ => None,
        }
    }

    /// Whether it is over.
    pub const fn is_ended(&self) -> bool {
        matches!(self, Self::Ended { .. })
    }

    /// The word in `op show`.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Requested => "requested",
            Self::Planned => "planned",
            Self::Running { .. } => "running",
            Self::Waiting { .. } => "waiting",
            Self::Ready { .. } => "ready",
            Self::Undoing { .. } => "undoing",
            Self::Undone { .. } => "undone",
            Self::NeedsAttention { .. } => "needs-attention",
            Self::Ended { .. } => "ended",
        }
    }
}

/// The stage that an event brings a program around an operation to, if it is about one.
fn staged(event: &Event) -> Option<(HookPhase, HookStage)> {
    match event {
        Event::OperationHookStarted(e) => Some((e.hook, HookStage::Started)),
        Event::OperationHookFinished(e) => Some((e.hook, HookStage::Finished)),
        _ => None,
    }
}

/// An operation, as the log tells it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Operation {
    /// Its id.
    pub id: OperationId,
    /// What was asked.
    pub request: Request,
    /// The request's place in the log.
    pub seq: u64,
    /// When it was asked.
    pub requested: Timestamp,
    /// Who asked.
    pub actor: Actor,
    /// The event that caused it; for a merge, the delete.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<u64>,
    /// Its steps, once they are planned.
    #[serde(default)]
    pub steps: Vec<Step>,
    /// Where it stands.
    pub phase: Phase,
    /// How often the step in hand failed.
    #[serde(default)]
    pub attempts: u32,
    /// What its steps learnt so far.
    #[serde(default)]
    pub learnt: Learnt,
    /// How far the programs around it have come.
    #[serde(default, skip_serializing_if = "HookStages::is_untouched")]
    pub stages: HookStages,
}

impl Operation {
    /// Applies an event that carries this operation's id.
    ///
    /// # Errors
    /// [`IllegalHistory`] if the event cannot follow; the operation is unchanged then.
    pub fn apply(&mut self, event: &Event, seq: u64) -> Result<(), IllegalHistory> {
        if let Some((phase, stage)) = staged(event) {
            if !self.may_stage(phase, stage) {
                return Err(self.illegal(event, seq));
            }
            *self.stages.of(phase) = stage;
            return Ok(());
        }
        let steps = if let Event::OperationPlanned(e) = event { e.steps.len() } else { self.steps.len() };
        let Some(next) = self.phase.next(event, steps) else {
            return Err(self.illegal(event, seq));
        };
        match event {
            Event::OperationPlanned(e) => self.steps.clone_from(&e.steps),
            Event::OperationAttemptFailed(e) if e.kind == RetryKind::Failed => {
                self.attempts = self.attempts.saturating_add(1);
            }
            Event::OperationStepFinished(e) => {
                self.attempts = 0;
                self.learn(&e.learnt);
            }
            Event::OperationRetried(_) | Event::OperationResolved(_) => self.attempts = 0,
            _ => {}
        }
        self.phase = next;
        Ok(())
    }

    fn illegal(&self, event: &Event, seq: u64) -> IllegalHistory {
        IllegalHistory {
            operation: self.id,
            phase: self.phase.as_str().to_owned(),
            event: event.kind().to_owned(),
            seq,
        }
    }

    /// Whether a program around it may come to that stage. One that was cut short is started again.
    fn may_stage(&self, phase: HookPhase, stage: HookStage) -> bool {
        let rests = matches!(self.phase, Phase::NeedsAttention { .. } | Phase::Ended { .. });
        let (now, in_place) = match phase {
            HookPhase::Before => (self.stages.before, self.phase == Phase::Requested),
            HookPhase::After => (self.stages.after, !rests),
        };
        in_place
            && match stage {
                HookStage::Started => now != HookStage::Finished,
                HookStage::Finished => now == HookStage::Started,
                HookStage::NotRun => false,
            }
    }

    /// Keeps what a step learnt. What is not of [`Learnt`]'s shape was for the driver alone.
    fn learn(&mut self, learnt: &serde_json::Value) {
        if let Ok(learnt) = serde_json::from_value::<Learnt>(learnt.clone()) {
            self.learnt.add(learnt);
        }
    }

    /// The step that was started and whose end is not known, also while someone has to look at it.
    pub fn step_in_hand(&self) -> Option<usize> {
        let phase = if let Phase::NeedsAttention { before, .. } = &self.phase { before } else { &self.phase };
        match phase {
            Phase::Running { step } | Phase::Waiting { step, .. } => Some(*step),
            _ => None,
        }
    }

    /// The moment after which it must not begin any more.
    pub fn deadline(&self) -> Option<Timestamp> {
        match &self.request {
            Request::Create(request) => request.request.deadline,
            Request::Revert(request) => request.request.deadline,
            Request::Delete(_) | Request::Edit(_) | Request::Merge(_) | Request::Unregister(_) => None,
        }
    }

    /// Whether a failure now leads back: no step behind or at the point of no return is done.
    pub fn can_go_back(&self) -> bool {
        let done = match &self.phase {
            Phase::Running { step } | Phase::Waiting { step, .. } | Phase::Ready { step } => *step,
            Phase::Undoing { .. } | Phase::Undone { .. } | Phase::Requested | Phase::Planned => return true,
            Phase::NeedsAttention { .. } | Phase::Ended { .. } => return false,
        };
        self.steps.iter().take(done).all(|step| step.reversal == Reversal::Undoable)
    }
}

#[cfg(test)]
mod tests;
