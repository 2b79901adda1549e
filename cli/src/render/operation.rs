//! What an operation came to: the document of `create`, `revert`, `delete` and `domain remove`, and the same in words.

use std::path::PathBuf;

use serde::Serialize;
use snaptree_engine::OperationId;
use snaptree_engine::reconcile::merge::human_bytes;

use super::list::{freed, taken};
use super::text::{Look, count, safe};
use super::view::FreesView;
use crate::exit::ErrorView;
use crate::story::StepView;

/// What became of a deleted snapshot's data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MergeView {
    /// The merge; none if there is none yet.
    pub operation: Option<OperationId>,
    /// The snapshot that it was.
    pub snapshot: String,
    /// `succeeded`, `failed`, `cancelled`, `deferred`; in a dry run `planned` or `deferred`; none while it is open.
    pub outcome: Option<&'static str>,
    /// Why, or which way.
    pub reason: Option<String>,
}

/// What a request would cost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Cost {
    /// Bytes that would be copied.
    pub bytes_moved: u64,
    /// Bytes that would be free again.
    pub bytes_freed: u64,
    /// Bytes that are needed at the worst moment.
    pub peak_space: u64,
    /// A delete: what it frees once its data is merged, copies taken off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frees: Option<FreesView>,
    /// What would be lost for good.
    pub lost: Vec<String>,
}

/// The document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OperationView {
    /// The operation; none for a dry run.
    pub operation: Option<OperationId>,
    /// How it ended, `needs-attention`, `planned` for a dry run; none while it is open.
    pub outcome: Option<&'static str>,
    /// The first of `snapshots`.
    pub snapshot: Option<String>,
    /// The names of the snapshots that it is about.
    pub snapshots: Vec<String>,
    /// The current snapshot afterwards.
    pub current: Option<String>,
    /// What was done.
    pub steps: Vec<StepView>,
    /// What became of the data of what was deleted.
    pub merges: Vec<MergeView>,
    /// Files of Snaptree's that stay; only for a domain that was let go.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub left: Vec<PathBuf>,
    /// What the machine wrote besides when a snapshot was taken, and it does not hold; for a revert, what it leaves as it
    /// is.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<String>,
    /// Dry run: what it would cost.
    #[serde(flatten)]
    pub cost: Option<Cost>,
    /// Why it did not succeed.
    pub error: Option<ErrorView>,
    /// `create`, `revert`, ...
    #[serde(skip)]
    pub kind: &'static str,
    /// The domain's name.
    #[serde(skip)]
    pub domain: String,
    /// The parent of a snapshot that was created.
    #[serde(skip)]
    pub parent: Option<String>,
}

fn quoted(names: &[String]) -> String {
    let names: Vec<String> = names.iter().map(|name| format!("'{}'", safe(name))).collect();
    names.join(", ")
}

/// What was done, in words; empty for what was not.
pub fn done(view: &OperationView, look: &Look) -> String {
    let domain = safe(&view.domain).into_owned();
    let mut out = match view.kind {
        "create" => {
            let on = match &view.parent {
                Some(parent) => format!(", a child of '{}'", safe(parent)),
                None => ", a root".to_owned(),
            };
            format!("Created snapshot {} of {domain}{on}.\n", look.paint.bold(quoted(&view.snapshots)))
        }
        "revert" => format!("Reverted {domain} to {}.\n", look.paint.bold(quoted(&view.snapshots))),
        "delete" => {
            let current = match &view.current {
                Some(current) => format!("current is '{}'", safe(current)),
                None => "there is no current snapshot".to_owned(),
            };
            format!("Deleted {} of {domain}; {current}.\n", look.paint.bold(quoted(&view.snapshots)))
        }
        "unregister" => format!("Let go of {domain}.\n"),
        _ => String::new(),
    };
    out.push_str(&left_out(view, look));
    for file in &view.left {
        out.push_str(&format!("  {} stays\n", safe(&file.display().to_string())));
    }
    for merge in &view.merges {
        out.push_str(&format!("  {}\n", merged(merge, look)));
    }
    out
}

fn left_out(view: &OperationView, look: &Look) -> String {
    let line = |medium: &String| {
        let tag = look.paint.warn("left out:");
        match view.kind {
            "revert" => format!("  {} {}\n", look.paint.warn("left as it is:"), safe(medium)),
            _ => format!(
                "  {tag} {}, which the machine writes too: a revert leaves it as it is\n",
                safe(medium)
            ),
        }
    };
    view.left_out.iter().map(line).collect()
}

fn merged(merge: &MergeView, look: &Look) -> String {
    let name = safe(&merge.snapshot);
    let reason = merge.reason.as_deref().map(safe).unwrap_or_default();
    match merge.outcome {
        Some("succeeded") => format!("{} the data of '{name}' ({reason})", look.paint.good("merged")),
        Some("planned") => format!("would merge the data of '{name}' ({reason})"),
        Some("deferred") => {
            format!("{} the data of '{name}' stays for now: {reason}", look.paint.warn("deferred:"))
        }
        Some(other) => format!("{} merging the data of '{name}': {reason}", look.paint.bad(other)),
        None => format!("{} merging the data of '{name}': {reason}", look.paint.warn("not finished")),
    }
}

/// What would be done, in words.
pub fn planned(view: &OperationView, look: &Look) -> String {
    let mut out =
        format!("Would {} {} in {}.\n", view.kind, quoted(&view.snapshots), count(view.steps.len(), "step"));
    for (index, step) in view.steps.iter().enumerate() {
        out.push_str(&format!("  {}. {}\n", index + 1, safe(&step.name)));
    }
    for merge in &view.merges {
        out.push_str(&format!("  {}\n", merged(merge, look)));
    }
    out.push_str(&left_out(view, look));
    if let Some(cost) = &view.cost {
        for lost in &cost.lost {
            out.push_str(&format!("  {} {}\n", look.paint.warn("lost:"), safe(lost)));
        }
        if let Some(frees) = cost.frees {
            let taken = taken(frees).map(|taken| format!(", {taken}")).unwrap_or_default();
            out.push_str(&format!("  once all of it is merged, it frees {}{taken}\n", freed(frees)));
        }
        if cost.bytes_moved > 0 || cost.bytes_freed > 0 || cost.peak_space > 0 {
            out.push_str(&format!(
                "  copies {} at most, removes files of {}, needs {} at the worst moment\n",
                human_bytes(cost.bytes_moved),
                human_bytes(cost.bytes_freed),
                human_bytes(cost.peak_space),
            ));
        }
    }
    let current =
        view.current.as_deref().map_or_else(|| "none".to_owned(), |name| format!("'{}'", safe(name)));
    out.push_str(&format!("  current afterwards: {current}\nNothing was written or touched.\n"));
    out
}
