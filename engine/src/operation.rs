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
//!        +--Succeeded (after the last step)--> Ended(Succeeded)
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
//!
//! Programs around it ([`around`](mod@crate::around)) change no phase: the one before runs while it is `Requested`, the one
//! after in whatever phase it is about to end or to rest.
//!
//! [`Phase::next`] is total over the events. What the drawing does not allow is an [`IllegalHistory`]: the log was
//! not written by this program, and loading it is refused.

use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::around::{HookPhase, HookStage, HookStages};
use crate::driver::Learnt;
use crate::event::{
    Actor, DomainUnregisterRequested, Event, MergeStarted, OperationResolved, RetryKind,
    SnapshotCreateRequested, SnapshotDeleteRequested, SnapshotEditRequested, SnapshotRevertRequested,
};
use crate::ids::{OperationId, SnapshotId};

/// Most steps that a plan may have; a driver that plans more has lost its way.
pub const STEPS_MAX: usize = 100_000;

/// What kind of trouble it is; stable words for JSON and exit codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// Somebody has the image or the machine open.
    InUse,
    /// The driver or the domain cannot do this.
    Unsupported,
    /// A hold forbids it.
    Held,
    /// What was named is not there.
    NotFound,
    /// The name is taken.
    Exists,
    /// The request contradicts the state, or itself.
    Invalid,
    /// The file system is full, or would be.
    NoSpace,
    /// The operating system does not allow it.
    Permission,
    /// What is on disk is not what the log says, and no operation explains it.
    Drift,
    /// An image is damaged, or not what it should be.
    BadImage,
    /// A tool or the operating system failed.
    Io,
    /// It took too long; what became of it is not known.
    Timeout,
    /// The request was called off.
    Cancelled,
    /// Its first step came too late.
    Expired,
    /// Another operation has to be looked at first.
    NeedsAttention,
}

impl Code {
    /// The word in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::InUse => "in-use",
            Self::Unsupported => "unsupported",
            Self::Held => "held",
            Self::NotFound => "not-found",
            Self::Exists => "exists",
            Self::Invalid => "invalid",
            Self::NoSpace => "no-space",
            Self::Permission => "permission",
            Self::Drift => "drift",
            Self::BadImage => "bad-image",
            Self::Io => "io",
            Self::Timeout => "timeout",
            Self::Cancelled => "cancelled",
            Self::Expired => "expired",
            Self::NeedsAttention => "needs-attention",
        }
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// What went wrong, in words for people and one for programs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// The kind of trouble.
    pub code: Code,
    /// What happened, and why.
    pub message: String,
    /// What can be done about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Whether it was found before anything was touched.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub refused: bool,
}

impl Failure {
    /// Something failed.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None, refused: false }
    }

    /// Adds what can be done about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Marks it as found before anything was touched.
    #[must_use]
    pub fn refused(mut self) -> Self {
        self.refused = true;
        self
    }
}

/// Whether a step can be taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reversal {
    /// The driver can undo it, also after the steps behind it were undone.
    Undoable,
    /// Undoable until it has taken effect; once it is done (or found done) the operation only goes forward.
    PointOfNoReturn,
    /// Lies behind the point of no return.
    ForwardOnly,
}

/// Which snapshots' `Deleted` events a step brings, and when.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Poison {
    /// None.
    #[default]
    Nothing,
    /// With its `StepStarted`: it is the first that touches their data.
    AtStart(Vec<SnapshotId>),
    /// With its `StepFinished`: the hypervisor deletes in one call, or only a mark is set.
    AtFinish(Vec<SnapshotId>),
    /// With its `StepFinished`: they are deleted for the user, and the hypervisor merges their data later.
    Hidden(Vec<SnapshotId>),
}

/// The smallest thing a driver does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// What it does, as `op show` and the progress bar print it: `adopt vda`, `switch`.
    pub name: String,
    /// Whether it can be taken back.
    pub reversal: Reversal,
    /// The snapshots that it ends.
    #[serde(default, skip_serializing_if = "is_nothing")]
    pub poison: Poison,
    /// All that the driver needs to do it, resolve it or undo it; only the driver reads it.
    pub data: serde_json::Value,
}

fn is_nothing(poison: &Poison) -> bool {
    *poison == Poison::Nothing
}

/// What an operation was asked to do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Request {
    /// Take a snapshot.
    Create(SnapshotCreateRequested),
    /// Go back to one.
    Revert(SnapshotRevertRequested),
    /// Delete some.
    Delete(SnapshotDeleteRequested),
    /// Change what the hypervisor keeps about one.
    Edit(SnapshotEditRequested),
    /// Fold tombstones away.
    Merge(MergeStarted),
    /// Let go of the domain.
    Unregister(DomainUnregisterRequested),
}

impl Request {
    /// The request that an event makes, if it makes one.
    pub fn of(event: &Event) -> Option<Self> {
        match event {
            Event::SnapshotCreateRequested(r) => Some(Self::Create(r.clone())),
            Event::SnapshotRevertRequested(r) => Some(Self::Revert(r.clone())),
            Event::SnapshotDeleteRequested(r) => Some(Self::Delete(r.clone())),
            Event::SnapshotEditRequested(r) => Some(Self::Edit(r.clone())),
            Event::MergeStarted(r) => Some(Self::Merge(r.clone())),
            Event::DomainUnregisterRequested(r) => Some(Self::Unregister(r.clone())),
            _ => None,
        }
    }

    /// The word in `op list`.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Create(_) => "create",
            Self::Revert(_) => "revert",
            Self::Delete(_) => "delete",
            Self::Edit(_) => "edit",
            Self::Merge(_) => "merge",
            Self::Unregister(_) => "unregister",
        }
    }

    /// The snapshots that it is about, the first one first.
    pub fn snapshots(&self) -> Vec<SnapshotId> {
        match self {
            Self::Create(r) => vec![r.snapshot],
            Self::Revert(r) => vec![r.snapshot],
            Self::Delete(r) => r.snapshots.clone(),
            Self::Edit(r) => vec![r.edit.snapshot],
            Self::Merge(r) => r.plan.snapshots.clone(),
            Self::Unregister(_) => Vec::new(),
        }
    }
}

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
            self.learnt.taken = learnt.taken.or(self.learnt.taken);
            self.learnt.state = learnt.state.or(self.learnt.state);
            self.learnt.native = learnt.native.or(self.learnt.native.take());
            self.learnt.left.extend(learnt.left);
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
mod tests {
    use super::*;
    use crate::event::{
        HowFinished, OperationFailed, OperationNeedsAttention, OperationPlanned, OperationStepFinished,
        OperationStepStarted, OperationSucceeded, OperationUndoFinished, OperationUndoStarted,
    };

    fn failure() -> Failure {
        Failure::new(Code::Io, "no")
    }

    fn started(step: usize) -> Event {
        OperationStepStarted { step }.into()
    }

    fn finished(step: usize) -> Event {
        OperationStepFinished {
            step,
            how: HowFinished::Executed,
            changes: vec![],
            learnt: serde_json::Value::Null,
        }
        .into()
    }

    fn undo(step: usize) -> Event {
        OperationUndoStarted { step, failure: failure() }.into()
    }

    fn undone(step: usize) -> Event {
        OperationUndoFinished { step, changes: vec![] }.into()
    }

    /// Runs two-step histories through `next`; `Err` names the event that could not follow.
    fn run(events: &[Event]) -> Result<Phase, usize> {
        events
            .iter()
            .enumerate()
            .try_fold(Phase::Requested, |phase, (index, event)| phase.next(event, 2).ok_or(index))
    }

    #[test]
    fn a_whole_life_forward() {
        let planned: Event = OperationPlanned { steps: vec![] }.into();
        let end =
            run(&[planned, started(0), finished(0), started(1), finished(1), OperationSucceeded {}.into()]);
        assert_eq!(end, Ok(Phase::Ended { outcome: Outcome::Succeeded, failure: None }));
    }

    #[test]
    fn a_whole_life_back() {
        let planned: Event = OperationPlanned { steps: vec![] }.into();
        let failed: Event = OperationFailed { failure: failure() }.into();
        let end = run(&[
            planned,
            started(0),
            finished(0),
            started(1),
            undo(1),
            undone(1),
            undo(0),
            undone(0),
            failed,
        ]);
        assert_eq!(end, Ok(Phase::Ended { outcome: Outcome::Failed, failure: Some(failure()) }));
    }

    #[test]
    fn what_someone_says_of_a_stuck_step_leads_on_again_or_out() {
        let attention: Event = OperationNeedsAttention { failure: failure() }.into();
        let said = |verdict| -> Event {
            OperationResolved { verdict, reason: "seen".to_owned(), changes: vec![] }.into()
        };
        let planned = || Event::from(OperationPlanned { steps: vec![] });
        let stuck = |last| run(&[planned(), started(0), attention.clone(), last]);
        assert_eq!(stuck(said(Verdict::Done)), Ok(Phase::Ready { step: 1 }));
        assert_eq!(stuck(said(Verdict::NotDone)), Ok(Phase::Ready { step: 0 }));
        assert!(matches!(stuck(said(Verdict::Abandon)), Ok(Phase::Ended { outcome: Outcome::Failed, .. })));
        let back = run(&[planned(), started(0), undo(0), attention.clone(), said(Verdict::Done)]);
        assert_eq!(back, Ok(Phase::Undone { step: 0, failure: failure() }));
        assert_eq!(run(&[planned(), started(0), said(Verdict::Done)]), Err(2), "nothing needed attention");
        assert_eq!(run(&[planned(), attention.clone(), said(Verdict::Done)]), Err(2), "no step was in hand");
    }

    #[test]
    fn the_stages_of_hooks_follow_one_another_and_a_hook_that_was_cut_short_may_begin_again() {
        use HookPhase::{After, Before};
        let started = |hook| Event::from(crate::event::OperationHookStarted { hook });
        let ended = |hook| Event::from(crate::event::OperationHookFinished { hook, failure: None });
        let planned = || Event::from(OperationPlanned { steps: vec![] });
        let failed = || Event::from(OperationFailed { failure: failure() });
        let attention = || Event::from(OperationNeedsAttention { failure: failure() });
        let follow = |events: &[Event]| {
            let request = DomainUnregisterRequested {
                wish: crate::event::UnregisterWish::Untouched,
                request: crate::event::RequestTerms::default(),
            };
            let mut operation = Operation {
                id: OperationId::from_uuid(uuid::Uuid::nil()),
                request: Request::Unregister(request),
                seq: 1,
                requested: Timestamp::UNIX_EPOCH,
                actor: Actor::Engine,
                cause: None,
                steps: vec![],
                phase: Phase::Requested,
                attempts: 0,
                learnt: Learnt::default(),
                stages: HookStages::default(),
            };
            let broken = events.iter().position(|event| operation.apply(event, 2).is_err());
            broken.map_or(Ok(operation.stages), Err)
        };
        let stages = |before, after| Ok(HookStages { before, after });
        let all = [
            started(Before),
            started(Before),
            ended(Before),
            planned(),
            started(After),
            ended(After),
            failed(),
        ];
        assert_eq!(follow(&all), stages(HookStage::Finished, HookStage::Finished));
        assert_eq!(follow(&all[..5]), stages(HookStage::Finished, HookStage::Started));
        for (events, at) in [
            (vec![ended(Before)], 0),
            (vec![started(Before), ended(After)], 1),
            (vec![started(Before), ended(Before), started(Before)], 2),
            (vec![planned(), started(Before)], 1),
            (vec![started(After), ended(After), started(After)], 2),
            (vec![attention(), started(After)], 1),
            (vec![failed(), started(After)], 1),
        ] {
            assert_eq!(follow(&events), Err(at), "{events:?}");
        }
    }

    #[test]
    fn illegal_histories_are_refused_at_the_event_that_breaks_them() {
        let planned = || Event::from(OperationPlanned { steps: vec![] });
        let failed = || Event::from(OperationFailed { failure: failure() });
        for (events, at) in [
            (vec![started(0)], 0),
            (vec![planned(), started(1)], 1),
            (vec![planned(), started(0), started(0)], 2),
            (vec![planned(), started(0), finished(1)], 2),
            (vec![planned(), started(0), failed()], 2),
            (vec![planned(), started(0), finished(0), failed()], 3),
            (vec![planned(), started(0), finished(0), OperationSucceeded {}.into()], 3),
            (vec![planned(), started(0), finished(0), started(1), undo(0)], 4),
            (vec![planned(), started(0), finished(0), started(1), undo(1), undone(1), failed()], 6),
            (vec![planned(), planned()], 1),
            (vec![failed(), failed()], 1),
        ] {
            assert_eq!(run(&events), Err(at), "{events:?}");
        }
    }
}
