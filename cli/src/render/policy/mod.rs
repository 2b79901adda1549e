//! Policies: what is printed about them, as JSON and for people.

mod text;

pub use text::{list, next, plan, run, runs, set, words};

use jiff::Timestamp;
use serde::Serialize;
use snaptree_engine::event::PolicyRequest;
use snaptree_engine::project::DomainState;
use snaptree_engine::{DomainName, OperationId, PolicyName};
use snaptree_policies::file::Policy;
use snaptree_policies::retention::{Decision, Depth, LongRun, Plan};
use snaptree_policies::runner::RunOutcome;

use crate::exit::ErrorView;
use crate::story::HookStory;
use crate::wire::{ClockView, LeftOut};

/// A policy in the list.
#[derive(Debug, Serialize)]
pub struct PolicyView {
    /// Its name.
    pub name: PolicyName,
    /// Its schedule as text; none if it cannot be read.
    pub schedule: Option<String>,
    /// Its time zone.
    pub timezone: Option<String>,
    /// The domains that it is for.
    pub domains: Vec<DomainName>,
    /// Why it does not run.
    pub suspended: Option<String>,
    /// The last run's instant.
    pub last: Option<Timestamp>,
    /// When it runs next.
    pub next: Option<Timestamp>,
    /// Why it cannot be read.
    pub error: Option<String>,
}

/// How many snapshots there are in the long run.
#[derive(Debug, Serialize)]
pub struct LongRunView {
    /// `levels`, `more-than` or `grows`.
    pub how: &'static str,
    /// How many.
    pub snapshots: Option<usize>,
}

impl From<LongRun> for LongRunView {
    fn from(long_run: LongRun) -> Self {
        match long_run {
            LongRun::Levels { snapshots } => Self { how: "levels", snapshots: Some(snapshots) },
            LongRun::MoreThan { snapshots } => Self { how: "more-than", snapshots: Some(snapshots) },
            LongRun::Grows => Self { how: "grows", snapshots: None },
        }
    }
}

/// The verdict on a snapshot.
#[derive(Debug, Serialize)]
pub struct VerdictView {
    /// Its name.
    pub snapshot: String,
    /// When it was taken.
    pub created: Timestamp,
    /// `keep`, `delete` or `delete-later`.
    pub verdict: &'static str,
    /// Why.
    pub reasons: Vec<String>,
    /// For a delete: bytes that its merge copies at most.
    pub bytes_moved: Option<u64>,
    /// For a delete: bytes that are free afterwards at least.
    pub bytes_freed: Option<u64>,
}

/// What retention would do to a domain.
#[derive(Debug, Serialize)]
pub struct DomainPlanView {
    /// The domain.
    pub domain: DomainName,
    /// What its disk stands upon afterwards.
    pub depth: u32,
    /// Whether that is more than it may be.
    pub too_deep: bool,
    /// The snapshots, the newest first.
    pub snapshots: Vec<VerdictView>,
}

/// What retention would do.
#[derive(Debug, Serialize)]
pub struct PlanView {
    /// The policy.
    pub policy: PolicyName,
    /// Why deletes are held back, if they are.
    pub clock: Option<ClockView>,
    /// What should be known of it, in words.
    pub notes: Vec<String>,
    /// How many snapshots a disk may stand upon.
    pub max_depth: u32,
    /// In the long run.
    pub long_run: LongRunView,
    /// Domain by domain.
    pub domains: Vec<DomainPlanView>,
    /// Domains that could not be looked at.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<LeftOut>,
}

impl DomainPlanView {
    /// The plan for a domain in words.
    pub fn of(domain: DomainName, state: &DomainState, plan: &Plan) -> Self {
        let (depth, too_deep) = match plan.depth {
            Depth::Fits(depth) => (depth, false),
            Depth::Exceeds(depth) => (depth, true),
        };
        let snapshots = plan.verdicts.iter().map(|verdict| {
            let now = plan.deletes.iter().find(|delete| delete.snapshot == verdict.snapshot);
            let later = plan.postponed.iter().find(|delete| delete.snapshot == verdict.snapshot);
            let cost = now.or(later);
            let name = state.tree.get(verdict.snapshot).map(|snapshot| snapshot.name.to_string());
            VerdictView {
                snapshot: name.unwrap_or_else(|| verdict.snapshot.to_string()),
                created: verdict.created,
                verdict: match (verdict.decision, later) {
                    (Decision::Keep, _) => "keep",
                    (Decision::Delete, None) => "delete",
                    (Decision::Delete, Some(_)) => "delete-later",
                },
                reasons: verdict.reasons.iter().map(ToString::to_string).collect(),
                bytes_moved: cost.map(|delete| delete.bytes_moved_max),
                bytes_freed: cost.map(|delete| delete.bytes_freed_min),
            }
        });
        Self { domain, depth, too_deep, snapshots: snapshots.collect() }
    }
}

impl PlanView {
    /// How many snapshots would go, now or later.
    pub fn deletes(&self) -> usize {
        let verdicts = self.domains.iter().flat_map(|domain| &domain.snapshots);
        verdicts.filter(|verdict| verdict.verdict != "keep").count()
    }
}

/// A delete of a run.
#[derive(Debug, Serialize)]
pub struct DeleteView {
    /// The snapshot's name.
    pub snapshot: String,
    /// The operation; none if it was refused.
    pub operation: Option<OperationId>,
    /// How it ended; none while it is open.
    pub outcome: Option<&'static str>,
    /// Why it goes.
    pub reasons: Vec<String>,
    /// Why it was refused, or did not succeed.
    pub error: Option<ErrorView>,
}

/// A run on one domain.
#[derive(Debug, Serialize)]
pub struct RanView {
    /// The domain.
    pub domain: DomainName,
    /// The name of the snapshot.
    pub snapshot: String,
    /// The operation; none if it was refused.
    pub operation: Option<OperationId>,
    /// How it ended; none while it is open.
    pub outcome: Option<&'static str>,
    /// Why it failed or was refused.
    pub error: Option<ErrorView>,
    /// The programs around it that were started.
    pub hooks: Vec<HookView>,
    /// The deletes that followed.
    pub deletes: Vec<DeleteView>,
}

/// A program before or after a run.
#[derive(Debug, Serialize)]
pub struct HookView {
    /// `before` or `after`.
    pub hook: &'static str,
    /// `done` or `failed`; none while it is at work.
    pub outcome: Option<&'static str>,
    /// Why it failed.
    pub error: Option<ErrorView>,
}

impl From<&HookStory> for HookView {
    fn from(hook: &HookStory) -> Self {
        let word = if hook.failure.is_some() { "failed" } else { "done" };
        Self {
            hook: hook.phase.as_str(),
            outcome: hook.ended.then_some(word),
            error: hook.failure.as_ref().map(ErrorView::from),
        }
    }
}

impl RanView {
    /// What is to be said of the programs around it: those that failed and did not end it.
    pub(super) fn hooks_failed(&self) -> impl Iterator<Item = (&'static str, &ErrorView)> {
        let ended_it = |hook: &&HookView| hook.hook == "before" && self.outcome != Some("succeeded");
        let failed = self.hooks.iter().filter(move |hook| !ended_it(hook));
        failed.filter_map(|hook| Some((hook.hook, hook.error.as_ref()?)))
    }
}

impl DeleteView {
    /// A request for a delete, and how it ended.
    pub fn of(request: &PolicyRequest, outcome: RunOutcome, error: Option<ErrorView>) -> Self {
        Self {
            snapshot: request.snapshot.clone(),
            operation: request.operation,
            outcome: outcome.as_str(),
            reasons: request.reasons.clone(),
            error,
        }
    }
}

/// The document of `policy run`.
#[derive(Debug, Serialize)]
pub struct RunView {
    /// The policy.
    pub policy: String,
    /// The run's instant.
    pub planned: Option<Timestamp>,
    /// Domain by domain.
    pub runs: Vec<RanView>,
    /// Domains whose snapshots could not be looked through for what is to go.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<LeftOut>,
    /// Why the policy was suspended after it, if it was.
    pub suspended: Option<String>,
    /// Why deletes are held back, if they are.
    pub clock: Option<ClockView>,
}

/// What a run or a skip was.
#[derive(Debug, Serialize)]
#[serde(tag = "what", rename_all = "kebab-case")]
pub enum What {
    /// It ran.
    Ran {
        /// The planned instant, or when it was asked for.
        planned: Timestamp,
        /// Who asked for it; none if it was due.
        asked_by: Option<String>,
        /// What came of it.
        #[serde(flatten)]
        ran: RanView,
    },
    /// It was skipped.
    Skipped {
        /// The domain.
        domain: DomainName,
        /// The first instant.
        first: Timestamp,
        /// The last.
        last: Timestamp,
        /// How many.
        count: u32,
        /// Whether there are more.
        more: bool,
        /// `no-catch-up`, `caught-up` or `too-late`.
        why: String,
    },
}

/// A line of `policy runs`.
#[derive(Debug, Serialize)]
pub struct EntryView {
    /// The policy.
    pub policy: PolicyName,
    /// When it was recorded.
    pub at: Timestamp,
    /// What it was.
    #[serde(flatten)]
    pub what: What,
}

/// A line of `policy next`.
#[derive(Debug, Serialize)]
pub struct NextView {
    /// When.
    pub at: Timestamp,
    /// The planned instant.
    pub planned: Timestamp,
    /// The policy.
    pub policy: PolicyName,
    /// The domain.
    pub domain: DomainName,
}

/// What of a policy changes.
#[derive(Debug, Serialize)]
pub struct ChangeView {
    /// The key, such as `keep.last`.
    pub key: String,
    /// What it was.
    pub old: Option<serde_json::Value>,
    /// What it is to be.
    pub new: Option<serde_json::Value>,
}

/// The document of `policy set`.
#[derive(Debug, Serialize)]
pub struct SetView {
    /// The policy's name.
    pub name: PolicyName,
    /// `new`, `changed` or `same`.
    pub change: &'static str,
    /// What changes; empty for a new one.
    pub changes: Vec<ChangeView>,
    /// Whether nothing was written.
    pub dry_run: bool,
    /// What retention would do.
    pub plan: PlanView,
}

/// What differs between two policies, key by key.
pub fn changes(old: &Policy, new: &Policy) -> Vec<ChangeView> {
    let [old, new] = [old, new].map(|policy| {
        let mut value = serde_json::to_value(policy).unwrap_or_default();
        // As the policy file has them.
        if let Some(rules) = value.pointer_mut("/keep/rules") {
            let written = policy.keep.rules().iter().map(|rule| rule.to_string().into());
            *rules = serde_json::Value::Array(written.collect());
        }
        value
    });
    let mut found = Vec::new();
    compare(String::new(), Some(&old), Some(&new), &mut found);
    found
}

fn compare(
    key: String,
    old: Option<&serde_json::Value>,
    new: Option<&serde_json::Value>,
    found: &mut Vec<ChangeView>,
) {
    use serde_json::Value::Object;
    if old == new {
        return;
    }
    if let (Some(Object(before)), Some(Object(after))) = (old, new) {
        let keys: std::collections::BTreeSet<&String> = before.keys().chain(after.keys()).collect();
        for name in keys {
            let path = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
            compare(path, before.get(name), after.get(name), found);
        }
        return;
    }
    found.push(ChangeView { key, old: old.cloned(), new: new.cloned() });
}
