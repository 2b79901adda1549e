//! Programs around a snapshot: what a policy wants run before and after, and the port to whoever runs them.
//!
//! ```text
//!   Requested --HookStarted(before)--> the program --HookFinished(before)--> planned, carried out as ever
//!                                                      | failed, "abort"
//!                                                      v
//!   the outcome is known --HookStarted(after)--> the program --HookFinished(after)--> the outcome is written
//! ```
//!
//! The operation is open until the program after it has ended, so a crash anywhere in between leads back to it by the
//! ordinary recovery. A program whose end is not known is run again: it runs at least once, and may run twice.
//!
//! Architecture Invariant: once the program before was started, the one after runs, however the operation ends; also
//! before it rests because it needs attention.

use std::collections::BTreeMap;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::event::Actor;
use crate::ids::{DomainName, OperationId, SnapshotName};
use crate::operation::{Code, Failure, Operation, Outcome, Phase, Request};

/// What a hook's failure means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnFailure {
    /// The operation fails and takes no snapshot.
    Abort,
    /// It goes on.
    GoOn,
}

/// A program to be run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hook {
    /// The program, by its absolute path, and its arguments.
    pub program: Vec<String>,
    /// How long it may take.
    pub timeout_s: u64,
    /// Added to its environment.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub environment: BTreeMap<String, String>,
    /// What its failure means.
    pub on_failure: OnFailure,
}

/// The programs around an operation. They are part of the request: a policy that changes meanwhile changes nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Around {
    /// Before anything is looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<Hook>,
    /// When the outcome is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<Hook>,
}

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HookPhase {
    /// The one before.
    Before,
    /// The one after.
    After,
}

impl HookPhase {
    /// The word in JSON and in `SNAPTREE_PHASE`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Before => "before",
            Self::After => "after",
        }
    }
}

/// How far a program has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HookStage {
    /// It was not started.
    #[default]
    NotRun,
    /// It was started, and its end is not known.
    Started,
    /// It has ended, well or not.
    Finished,
}

/// How far the programs around an operation have come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookStages {
    /// The one before.
    pub before: HookStage,
    /// The one after.
    pub after: HookStage,
}

impl HookStages {
    /// Whether neither was ever started.
    pub fn is_untouched(&self) -> bool {
        *self == Self::default()
    }

    pub(crate) fn of(&mut self, phase: HookPhase) -> &mut HookStage {
        match phase {
            HookPhase::Before => &mut self.before,
            HookPhase::After => &mut self.after,
        }
    }
}

impl Operation {
    /// The programs around it.
    pub fn around(&self) -> Option<&Around> {
        match &self.request {
            Request::Create(request) => request.request.around.as_ref(),
            _ => None,
        }
    }

    /// The program that has to run before it is planned.
    pub(crate) fn hook_before(&self) -> Option<&Hook> {
        let hook = self.around()?.before.as_ref()?;
        (self.phase == Phase::Requested && self.stages.before != HookStage::Finished).then_some(hook)
    }

    /// The program that has to run before this end is written; none if the operation never had its turn.
    pub(crate) fn hook_after(&self, end: HookEnd) -> Option<&Hook> {
        let around = self.around()?;
        let hook = around.after.as_ref()?;
        let had_its_turn = if around.before.is_some() {
            self.stages.before != HookStage::NotRun
        } else {
            self.phase != Phase::Requested || end == HookEnd::Ended(Outcome::Failed)
        };
        (had_its_turn && self.stages.after != HookStage::Finished).then_some(hook)
    }

    /// Whether something waits for the program after it: it is not left alone without need then.
    pub(crate) fn is_within_hooks(&self) -> bool {
        self.stages.before != HookStage::NotRun && self.hook_after(HookEnd::NeedsAttention).is_some()
    }
}

/// What the program after is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HookEnd {
    /// The operation ends so.
    Ended(Outcome),
    /// It can go neither on nor back by itself.
    NeedsAttention,
}

impl HookEnd {
    /// The word in `SNAPTREE_OUTCOME`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ended(outcome) => outcome.as_str(),
            Self::NeedsAttention => "needs-attention",
        }
    }
}

/// A program that is to be run now.
#[derive(Clone, Copy, Debug)]
pub struct HookCall<'a> {
    /// Which program.
    pub hook: &'a Hook,
    /// Before or after.
    pub phase: HookPhase,
    /// What it is told of the end; none before.
    pub end: Option<HookEnd>,
    /// The operation that it belongs to.
    pub operation: OperationId,
    /// Who asked for that.
    pub actor: &'a Actor,
    /// The domain.
    pub domain: &'a DomainName,
    /// The snapshot.
    pub snapshot: &'a SnapshotName,
}

/// The port to processes.
#[async_trait]
pub trait HookRunner: Send + Sync {
    /// Runs a program to its end; past its time it is ended, with all that it began.
    ///
    /// Where an earlier run of the same program for the same operation may still be at work (its Snaptree was killed),
    /// it is waited for first.
    ///
    /// # Errors
    /// It could not be started, failed, or took too long; the failure says which, with the end of what it wrote.
    async fn run(&self, call: &HookCall<'_>) -> Result<(), Failure>;
}

/// Runs nothing, and says so.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoHookRunner;

#[async_trait]
impl HookRunner for NoHookRunner {
    async fn run(&self, _call: &HookCall<'_>) -> Result<(), Failure> {
        Err(Failure::new(Code::Unsupported, "this program runs no hooks"))
    }
}
