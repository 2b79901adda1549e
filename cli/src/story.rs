//! An operation's life as its events tell it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use jiff::Timestamp;
use serde::Serialize;
use snaptree_engine::around::HookPhase;
use snaptree_engine::event::{Actor, Envelope, Event, Origin};
use snaptree_engine::operation::{Failure, Outcome, Request, Verdict};
use snaptree_engine::{OperationId, SnapshotId};

/// What became of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum StepOutcome {
    /// It is done.
    Done,
    /// It is taken back.
    Undone,
    /// It is not known to be done.
    NotDone,
    /// It would be done; the answer to a dry run.
    Planned,
}

/// A step and what became of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StepView {
    /// What it does.
    pub name: String,
    /// What became of it.
    pub outcome: StepOutcome,
}

/// A program before or after, and what became of it.
#[derive(Clone, Debug)]
pub struct HookStory {
    /// Which of the two.
    pub phase: HookPhase,
    /// Whether its end is known.
    pub ended: bool,
    /// What went wrong.
    pub failure: Option<Failure>,
}

/// An operation's life.
#[derive(Clone, Debug)]
pub struct Story {
    /// Its id.
    pub id: OperationId,
    /// What was asked.
    pub request: Request,
    /// When.
    pub requested: Timestamp,
    /// By whom.
    pub actor: Actor,
    /// From where.
    pub origin: Origin,
    /// Its steps.
    pub steps: Vec<StepView>,
    /// The programs around it that were started.
    pub hooks: Vec<HookStory>,
    /// How it ended; none while it is open.
    pub outcome: Option<Outcome>,
    /// When it ended.
    pub finished: Option<Timestamp>,
    /// Why it did not succeed, or what stands in the way.
    pub failure: Option<Failure>,
    /// Whether it waits for someone.
    pub needs_attention: bool,
    /// The names of snapshots, as far as its events tell them.
    pub names: BTreeMap<SnapshotId, String>,
    /// The snapshots that it deleted.
    pub deleted: Vec<SnapshotId>,
    /// Files that stay of a domain that was let go.
    pub left: Vec<PathBuf>,
}

impl Story {
    /// Reads the events of one operation, in order; none without a request.
    pub fn of(events: &[Envelope]) -> Option<Self> {
        let (first, request) =
            events.iter().find_map(|event| Request::of(&event.event).map(|request| (event, request)))?;
        let mut story = Self {
            id: first.operation?,
            request,
            requested: first.at,
            actor: first.actor.clone(),
            origin: first.origin.clone(),
            steps: Vec::new(),
            hooks: Vec::new(),
            outcome: None,
            finished: None,
            failure: None,
            needs_attention: false,
            names: BTreeMap::new(),
            deleted: Vec::new(),
            left: Vec::new(),
        };
        events.iter().for_each(|event| story.follow(event));
        Some(story)
    }

    fn follow(&mut self, envelope: &Envelope) {
        match &envelope.event {
            Event::SnapshotCreateRequested(e) => {
                self.names.insert(e.snapshot, e.name.to_string());
            }
            Event::SnapshotDeleted(e) => {
                self.names.insert(e.snapshot, e.name.to_string());
                self.deleted.push(e.snapshot);
            }
            Event::DomainUnregistered(e) => self.left.clone_from(&e.left),
            Event::OperationPlanned(e) => {
                let step = |step: &snaptree_engine::operation::Step| StepView {
                    name: step.name.clone(),
                    outcome: StepOutcome::NotDone,
                };
                self.steps = e.steps.iter().map(step).collect();
            }
            Event::OperationHookStarted(e) => {
                // One that was cut short is started again.
                self.hooks.retain(|hook| hook.phase != e.hook);
                self.hooks.push(HookStory { phase: e.hook, ended: false, failure: None });
            }
            Event::OperationHookFinished(e) => {
                if let Some(hook) = self.hooks.iter_mut().find(|hook| hook.phase == e.hook) {
                    hook.ended = true;
                    hook.failure.clone_from(&e.failure);
                }
            }
            Event::OperationStepFinished(e) => self.set(e.step, StepOutcome::Done),
            Event::OperationUndoStarted(e) => self.failure = Some(e.failure.clone()),
            Event::OperationUndoFinished(e) => self.set(e.step, StepOutcome::Undone),
            Event::OperationSucceeded(_) => self.end(envelope, Outcome::Succeeded, None),
            Event::OperationFailed(e) => self.end(envelope, Outcome::Failed, Some(&e.failure)),
            Event::OperationCancelled(e) => self.end(envelope, Outcome::Cancelled, Some(&e.failure)),
            Event::OperationExpired(e) => self.end(envelope, Outcome::Expired, Some(&e.failure)),
            Event::OperationResolved(e) if e.verdict == Verdict::Abandon => {
                self.end(envelope, Outcome::Failed, e.abandoned().as_ref());
            }
            Event::OperationNeedsAttention(e) => {
                self.needs_attention = true;
                self.failure = Some(e.failure.clone());
            }
            Event::OperationRetried(_) | Event::OperationResolved(_) => {
                self.needs_attention = false;
                self.failure = None;
            }
            _ => {}
        }
    }

    fn set(&mut self, step: usize, outcome: StepOutcome) {
        if let Some(step) = self.steps.get_mut(step) {
            step.outcome = outcome;
        }
    }

    fn end(&mut self, envelope: &Envelope, outcome: Outcome, failure: Option<&Failure>) {
        self.outcome = Some(outcome);
        self.finished = Some(envelope.at);
        self.needs_attention = false;
        self.failure = failure.cloned();
    }

    /// The word for how it stands: an outcome, `needs-attention`, or none while it is open.
    pub fn outcome_word(&self) -> Option<&'static str> {
        match self.outcome {
            Some(outcome) => Some(outcome.as_str()),
            None if self.needs_attention => Some("needs-attention"),
            None => None,
        }
    }
}

/// Where the process that carried an operation ended, and another took it up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The index of the first event that the other process wrote.
    pub before: usize,
    /// The process that ended.
    pub pid: u32,
    /// The process that took it up.
    pub next_pid: u32,
}

/// The places at which an operation was cut short: each owner of the state has an epoch of its own.
pub fn cuts(events: &[Envelope]) -> Vec<Cut> {
    let pairs = events.iter().zip(events.iter().skip(1)).enumerate();
    pairs
        .filter(|(_, (one, next))| one.epoch != next.epoch)
        .map(|(index, (one, next))| Cut { before: index + 1, pid: one.origin.pid, next_pid: next.origin.pid })
        .collect()
}
