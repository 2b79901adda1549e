//! `snaptree recover` and `snaptree reconcile`.

use anyhow::Result;
use serde::Serialize;
use snaptree_engine::OperationId;
use snaptree_engine::log::{OpenOnly, OperationFilter};
use snaptree_engine::operation::{Outcome, Request};
use snaptree_engine::reconcile::worker::Driven;

use super::carry::open;
use super::history::ALL;
use crate::args::inspect::{ReconcileArgs, RecoverArgs};
use crate::context::{Context, Writer};
use crate::exit::{ErrorView, Exit, is_of_one_domain};
use crate::render;
use crate::render::text::{Look, count, safe, short};
use crate::render::view::domain_name;
use crate::wire::{Accounts, LeftOut};

/// The document of `reconcile`.
#[derive(Serialize)]
struct AllReconciled {
    domains: Vec<Reconciled>,
    left_out: Vec<LeftOut>,
}

/// `snaptree recover`
///
/// # Errors
/// The state cannot be used.
pub async fn recover(context: &Context, args: RecoverArgs) -> Result<Exit> {
    let Writer { engine, office } = open(context, &args.writer).await?;
    let came_to = office.recover().await?;
    let open = OperationFilter { open: Some(OpenOnly), ..OperationFilter::default() };
    let left = engine.log().operations(&open, ALL).await?.len();
    if context.json {
        render::json(&came_to)?;
    } else {
        render::print(&told(&came_to, left, &Look::of_stdout()))?;
    }
    Ok(exit_of(left, &came_to.left_out))
}

/// What is left open comes before what could not be looked at.
fn exit_of(open: usize, left_out: &[LeftOut]) -> Exit {
    match (open, left_out.is_empty()) {
        (0, true) => Exit::Done,
        (0, false) => Exit::Failed,
        _ => Exit::Attention,
    }
}

fn told(came_to: &Accounts, left: usize, look: &Look) -> String {
    let mut out = String::new();
    for account in &came_to.operations {
        let outcome = match account.outcome.as_deref() {
            Some("succeeded") => look.paint.good("succeeded"),
            Some(word) => look.paint.warn(word),
            None => look.paint.warn("still open"),
        };
        out.push_str(&format!(
            "{} {} of {}\n  found: {}\n  did:   {}\n  now:   {outcome}\n",
            look.paint.dim(format!("[{}]", short(account.operation))),
            look.paint.bold(safe(&account.kind)),
            look.paint.name(safe(&account.domain)),
            safe(&account.found),
            safe(&account.did),
        ));
    }
    out.extend(came_to.left_out.iter().map(|domain| render::list::left_out(domain, look)));
    match (came_to.operations.len(), left) {
        (0, 0) => out.push_str("Nothing was left open.\n"),
        (_, 0) => out.push_str("Nothing is left open.\n"),
        (_, left) => {
            out.push_str(&format!("{} left open: `snaptree op list --open`\n", count(left, "operation")))
        }
    }
    out
}

/// What came of looking at a domain's tombstones.
#[derive(Serialize)]
struct Reconciled {
    domain: String,
    operations: Vec<Merged>,
    deferred: Vec<Deferred>,
}

#[derive(Serialize)]
struct Merged {
    operation: OperationId,
    kind: &'static str,
    outcome: Option<&'static str>,
    error: Option<ErrorView>,
    #[serde(skip)]
    merge: bool,
}

#[derive(Serialize)]
struct Deferred {
    snapshot: String,
    reason: String,
}

impl From<Driven> for Reconciled {
    fn from(driven: Driven) -> Self {
        let operations = driven
            .carried
            .iter()
            .map(|carried| Merged {
                operation: carried.operation.id,
                kind: carried.operation.request.kind(),
                outcome: carried.outcome.map(Outcome::as_str),
                error: carried.failure.as_ref().map(ErrorView::from),
                merge: matches!(carried.operation.request, Request::Merge(_)),
            })
            .collect();
        let deferred = driven
            .state
            .tombstones
            .values()
            .map(|stone| Deferred {
                snapshot: stone.name.to_string(),
                reason: stone.deferred.clone().unwrap_or_else(|| "not looked at yet".to_owned()),
            })
            .collect();
        Self { domain: domain_name(&driven.state), operations, deferred }
    }
}

/// `snaptree reconcile`. A domain that cannot be looked at is told of beside the others.
///
/// # Errors
/// The state cannot be used, or the one domain that was named cannot be looked at.
pub async fn reconcile(context: &Context, args: ReconcileArgs) -> Result<Exit> {
    let Writer { engine, office } = open(context, &args.writer).await?;
    let mut all = AllReconciled { domains: Vec::new(), left_out: Vec::new() };
    let mut open = 0;
    if let Some(domain) = &args.domain {
        let driven = office.reconcile(engine.find_domain(domain).await?).await?;
        open += driven.state.open.len();
        all.domains.push(driven.into());
    } else {
        for row in engine.domains().await? {
            match office.reconcile(row.id).await {
                Ok(driven) => {
                    open += driven.state.open.len();
                    all.domains.push(driven.into());
                }
                Err(error) if is_of_one_domain(&error) => {
                    all.left_out.push(LeftOut::new(row.name, error));
                }
                Err(error) => return Err(error),
            }
            if office.is_ending() {
                break;
            }
        }
    }
    if context.json {
        render::json(&all)?;
    } else {
        let look = Look::of_stdout();
        let mut text: String = all.domains.iter().map(|one| reconciled(one, &look)).collect();
        text.extend(all.left_out.iter().map(|domain| render::list::left_out(domain, &look)));
        render::print(&text)?;
    }
    Ok(exit_of(open, &all.left_out))
}

fn reconciled(view: &Reconciled, look: &Look) -> String {
    let merged = view.operations.iter().filter(|one| one.merge && one.outcome == Some("succeeded")).count();
    let mut out = format!(
        "{}: {} done, {} waiting\n",
        look.paint.name(safe(&view.domain)),
        count(merged, "merge"),
        count(view.deferred.len(), "tombstone"),
    );
    for one in view.operations.iter().filter(|one| one.outcome != Some("succeeded")) {
        let error = one.error.as_ref().map(|error| safe(&error.message).into_owned()).unwrap_or_default();
        let outcome = look.paint.warn(one.outcome.unwrap_or("open"));
        out.push_str(&format!("  {} [{}] {outcome}: {error}\n", one.kind, short(one.operation)));
    }
    for one in &view.deferred {
        out.push_str(&format!("  '{}' stays for now: {}\n", safe(&one.snapshot), safe(&one.reason)));
    }
    out
}
