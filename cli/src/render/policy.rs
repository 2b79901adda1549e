//! Policies: what is printed about them, as JSON and for people.

use std::fmt::Write as _;

use jiff::Timestamp;
use serde::Serialize;
use snaptree_engine::event::{Event, PolicyRequest, RunPart};
use snaptree_engine::project::DomainState;
use snaptree_engine::reconcile::merge::human_bytes;
use snaptree_engine::{DomainName, OperationId, PolicyName};
use snaptree_policies::file::Policy;
use snaptree_policies::retention::{Decision, Depth, LongRun, Plan};
use snaptree_policies::runner::RunOutcome;

use super::table::{Cell, table};
use super::text::{Look, count, safe};
use crate::exit::ErrorView;

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

impl LongRunView {
    fn words(&self, depth_max: u32) -> String {
        let number = self.snapshots.unwrap_or_default();
        let pressed = number > usize::try_from(depth_max).unwrap_or(usize::MAX) || self.how != "levels";
        let limit = if pressed { format!("; max-depth {depth_max} holds it down") } else { String::new() };
        match self.how {
            "levels" => {
                format!("In the long run: up to {} of each domain{limit}.\n", count(number, "snapshot"))
            }
            "more-than" => format!("In the long run: more than {number} snapshots of each domain{limit}.\n"),
            _ => "In the long run: more and more snapshots; a rule keeps all, and there is no max-age.\n"
                .to_owned(),
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
    /// How many snapshots a disk may stand upon.
    pub max_depth: u32,
    /// In the long run.
    pub long_run: LongRunView,
    /// Domain by domain.
    pub domains: Vec<DomainPlanView>,
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
    /// Why it was refused.
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
    /// The deletes that followed.
    pub deletes: Vec<DeleteView>,
}

impl DeleteView {
    /// A request for a delete, and how it ended.
    pub fn of(request: &PolicyRequest, outcome: RunOutcome) -> Self {
        Self {
            snapshot: request.snapshot.clone(),
            operation: request.operation,
            outcome: outcome.as_str(),
            reasons: request.reasons.clone(),
            error: request.refused.as_ref().map(ErrorView::from),
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

/// What happened to a policy.
pub fn words(event: &Event, look: &Look) -> String {
    match event {
        Event::PolicyDefined(_) => "defined the policy".to_owned(),
        Event::PolicyRemoved(_) => "ended the policy; its snapshots stay".to_owned(),
        Event::PolicySuspended(e) => format!("suspended the policy: {}", e.reason),
        Event::PolicyResumed(_) => "let the policy run again".to_owned(),
        Event::PolicyFired(e) => {
            let requests: Vec<&PolicyRequest> = e.domains.iter().flat_map(|run| &run.requests).collect();
            let refused = requests.iter().filter(|request| request.refused.is_some()).count();
            let what = match e.part {
                RunPart::Snapshots => "snapshot",
                RunPart::Retention => "delete",
            };
            let asked = count(requests.len().saturating_sub(refused), what);
            let by = e.asked_by.as_ref().map(|by| format!(", asked for by {by}")).unwrap_or_default();
            let not = if refused > 0 { format!(", {refused} refused") } else { String::new() };
            format!("run of {}: {asked}{not}{by}", look.time(e.planned))
        }
        Event::PolicySkipped(e) => {
            let more = if e.more { "at least " } else { "" };
            let runs = count(usize::try_from(e.count).unwrap_or(usize::MAX), "run");
            format!("skipped {more}{runs} of {} from {}: {}", e.name, look.time(e.first), e.why)
        }
        _ => String::new(),
    }
}

/// What differs between two policies, key by key.
pub fn changes(old: &Policy, new: &Policy) -> Vec<ChangeView> {
    let [old, new] = [old, new].map(|policy| serde_json::to_value(policy).unwrap_or_default());
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

/// The table of policies.
pub fn list(views: &[PolicyView], look: &Look) -> String {
    let row = |view: &PolicyView| {
        let time = |at: Option<Timestamp>| at.map(|at| look.time(at)).unwrap_or_default();
        let note = match (&view.error, &view.suspended) {
            (Some(error), _) => format!("cannot be read: {}", safe(error)),
            (None, Some(reason)) => format!("suspended: {}", safe(reason)),
            (None, None) => String::new(),
        };
        vec![
            Cell::painted(view.name.as_str(), |text| look.paint.name(text)),
            Cell::plain(view.schedule.clone().unwrap_or_default()),
            Cell::plain(view.timezone.clone().unwrap_or_default()),
            Cell::plain(view.domains.len().to_string()),
            Cell::plain(time(view.last)),
            Cell::plain(time(view.next)),
            Cell::painted(&note, |text| look.paint.warn(text)),
        ]
    };
    let rows: Vec<_> = views.iter().map(row).collect();
    table(&["NAME", "SCHEDULE", "ZONE", "DOMAINS", "LAST", "NEXT", ""], &rows, look.paint)
}

/// A plan, snapshot by snapshot.
pub fn plan(view: &PlanView, look: &Look) -> String {
    let mut text = String::new();
    for domain in &view.domains {
        // Writing to a String does not fail.
        let _ = writeln!(text, "{}", look.paint.bold(safe(domain.domain.as_str())));
        let rows: Vec<_> = domain.snapshots.iter().map(|verdict| verdict_row(verdict, look)).collect();
        if rows.is_empty() {
            text.push_str("no snapshots\n");
        } else {
            text.push_str(&table(&["", "SNAPSHOT", "CREATED", "FREES", "WHY"], &rows, look.paint));
        }
        let going = domain.snapshots.iter().filter(|verdict| verdict.verdict != "keep").count();
        let freed = domain.snapshots.iter().filter_map(|verdict| verdict.bytes_freed).sum();
        let _ = write!(text, "{} to delete", count(going, "snapshot"));
        if going > 0 {
            let _ = write!(text, ", which frees {}", human_bytes(freed));
        }
        let _ = writeln!(text, "; the disk then stands upon {}.", domain.depth);
        if domain.too_deep {
            let _ = writeln!(
                text,
                "{}",
                look.paint.warn("That is more than max-depth: no new snapshot is taken.")
            );
        }
        text.push('\n');
    }
    text.push_str(&view.long_run.words(view.max_depth));
    text
}

fn verdict_row(verdict: &VerdictView, look: &Look) -> Vec<Cell> {
    vec![
        Cell::painted(verdict.verdict, |text| match verdict.verdict {
            "keep" => look.paint.good(text),
            _ => look.paint.bad(text),
        }),
        Cell::painted(&safe(&verdict.snapshot), |text| look.paint.name(text)),
        Cell::plain(look.time(verdict.created)),
        Cell::plain(verdict.bytes_freed.map(human_bytes).unwrap_or_default()),
        Cell::plain(safe(&verdict.reasons.join("; ")).into_owned()),
    ]
}

/// The outcome of a run, domain by domain.
pub fn run(view: &RunView, look: &Look) -> String {
    view.runs.iter().map(|ran| format!("{}\n", ran_words(ran, look))).collect()
}

fn ran_words(ran: &RanView, look: &Look) -> String {
    let outcome = ran.outcome.unwrap_or("open");
    let word = if outcome == "succeeded" { look.paint.good(outcome) } else { look.paint.warn(outcome) };
    let mut text =
        format!("{}: snapshot '{}' {word}", look.paint.name(safe(ran.domain.as_str())), safe(&ran.snapshot));
    if let Some(error) = &ran.error {
        let _ = write!(text, ": {}", safe(&error.message));
    }
    for delete in &ran.deletes {
        let _ = write!(
            text,
            "\n  delete '{}' {} ({})",
            safe(&delete.snapshot),
            delete.outcome.unwrap_or("open"),
            safe(&delete.reasons.join("; "))
        );
    }
    text
}

/// What ran and what was skipped.
pub fn runs(views: &[EntryView], look: &Look) -> String {
    let row = |view: &EntryView| {
        let (domain, planned, outcome, words) = match &view.what {
            What::Ran { planned, ran, asked_by } => {
                let mut words = format!("'{}'", safe(&ran.snapshot));
                if let Some(error) = &ran.error {
                    let _ = write!(words, ": {}", safe(&error.message));
                }
                if !ran.deletes.is_empty() {
                    let _ = write!(words, ", deleted {}", ran.deletes.len());
                }
                if let Some(by) = asked_by {
                    let _ = write!(words, ", asked for by {}", safe(by));
                }
                (&ran.domain, *planned, ran.outcome.unwrap_or("open").to_owned(), words)
            }
            What::Skipped { domain, first, count, more, why, .. } => {
                let more = if *more { "at least " } else { "" };
                (domain, *first, "skipped".to_owned(), format!("{more}{count}: {}", safe(why)))
            }
        };
        vec![
            Cell::plain(look.time(planned)),
            Cell::plain(view.policy.as_str()),
            Cell::painted(&safe(domain.as_str()), |text| look.paint.name(text)),
            Cell::painted(&outcome, |text| match text {
                "succeeded" => look.paint.good(text),
                _ => look.paint.warn(text),
            }),
            Cell::plain(words),
        ]
    };
    let rows: Vec<_> = views.iter().map(row).collect();
    table(&["PLANNED", "POLICY", "DOMAIN", "OUTCOME", ""], &rows, look.paint)
}

/// What will run.
pub fn next(views: &[NextView], look: &Look) -> String {
    let row = |view: &NextView| {
        vec![
            Cell::plain(look.time(view.at)),
            Cell::plain(view.policy.as_str()),
            Cell::painted(&safe(view.domain.as_str()), |text| look.paint.name(text)),
        ]
    };
    let rows: Vec<_> = views.iter().map(row).collect();
    table(&["AT", "POLICY", "DOMAIN"], &rows, look.paint)
}

/// What of a policy changes, for people.
pub fn set(view: &SetView, look: &Look) -> String {
    let mut text = match view.change {
        "new" => format!("Policy '{}' is new.\n", view.name),
        "same" => format!("Policy '{}' says the same already.\n", view.name),
        _ => format!("Policy '{}' changes:\n", view.name),
    };
    let shown = |value: &Option<serde_json::Value>| match value {
        Some(serde_json::Value::String(value)) => value.clone(),
        Some(value) => value.to_string(),
        None => "nothing".to_owned(),
    };
    for change in &view.changes {
        let (old, new) = (shown(&change.old), shown(&change.new));
        let _ = writeln!(text, "  {}: {} -> {}", safe(&change.key), safe(&old), look.paint.bold(safe(&new)));
    }
    text.push('\n');
    text.push_str(&plan(&view.plan, look));
    text
}
