//! Policies, for people.

use std::fmt::Write as _;

use jiff::Timestamp;
use snaptree_engine::event::{Event, PolicyRequest, RunPart};
use snaptree_engine::reconcile::merge::human_bytes;

use super::super::list::left_out;
use super::super::table::{Cell, table};
use super::super::text::{Look, count, safe};
use super::{
    DeleteView, EntryView, LongRunView, NextView, PlanView, PolicyView, RanView, RunView, SetView,
    VerdictView, What,
};

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
    table(&["NAME", "SCHEDULE", "ZONE", "DOMAINS", "LAST", "NEXT", ""], &rows, look)
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
            text.push_str(&table(&["", "SNAPSHOT", "CREATED", "FREES", "WHY"], &rows, look));
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
    text.extend(view.left_out.iter().map(|domain| left_out(domain, look)));
    text.push_str(&view.long_run.words(view.max_depth));
    for note in view.clock.iter().map(|clock| &clock.message).chain(&view.notes) {
        let _ = writeln!(text, "{}", look.paint.warn(safe(note)));
    }
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
    let ran = view.runs.iter().map(|ran| format!("{}\n", ran_words(ran, look)));
    ran.chain(view.left_out.iter().map(|domain| left_out(domain, look))).collect()
}

fn ran_words(ran: &RanView, look: &Look) -> String {
    let outcome = ran.outcome.unwrap_or("open");
    let word = if outcome == "succeeded" { look.paint.good(outcome) } else { look.paint.warn(outcome) };
    let mut text =
        format!("{}: snapshot '{}' {word}", look.paint.name(safe(ran.domain.as_str())), safe(&ran.snapshot));
    if let Some(error) = &ran.error {
        let _ = write!(text, ": {}", safe(&error.message));
    }
    for (hook, error) in ran.hooks_failed() {
        let _ = write!(text, "\n  hook {hook} {}: {}", look.paint.warn("failed"), safe(&error.message));
    }
    for delete in &ran.deletes {
        let _ = write!(
            text,
            "\n  delete '{}' {} ({})",
            safe(&delete.snapshot),
            delete.outcome.unwrap_or("open"),
            safe(&delete.reasons.join("; "))
        );
        if let Some(error) = &delete.error {
            let _ = write!(text, ": {}", safe(&error.message));
        }
    }
    text
}

/// How the deletes of a run ended: those that did not succeed have not deleted anything.
fn deletes_words(deletes: &[DeleteView]) -> String {
    let mut words = String::new();
    let of = |wanted: fn(&DeleteView) -> bool| deletes.iter().filter(|delete| wanted(delete)).count();
    let deleted = of(|delete| delete.outcome == Some("succeeded"));
    let open = of(|delete| delete.outcome.is_none());
    if deleted > 0 {
        let _ = write!(words, ", deleted {deleted}");
    }
    if open > 0 {
        let _ = write!(words, ", {} open", count(open, "delete"));
    }
    for delete in deletes {
        let Some(outcome) = delete.outcome.filter(|outcome| *outcome != "succeeded") else { continue };
        let _ = write!(words, ", delete of '{}' {outcome}", safe(&delete.snapshot));
        if let Some(error) = &delete.error {
            let _ = write!(words, ": {}", safe(&error.message));
        }
    }
    words
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
                for (hook, error) in ran.hooks_failed() {
                    let _ = write!(words, ", hook {hook} failed: {}", safe(&error.message));
                }
                words.push_str(&deletes_words(&ran.deletes));
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
    table(&["PLANNED", "POLICY", "DOMAIN", "OUTCOME", ""], &rows, look)
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
    table(&["AT", "POLICY", "DOMAIN"], &rows, look)
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
