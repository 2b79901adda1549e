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
use crate::exit::{ErrorView, Exit};
use crate::render;
use crate::render::text::{Look, count, safe, short};
use crate::render::view::domain_name;
use crate::wire::{Account, Accounts};

/// The document of `reconcile`.
#[derive(Serialize)]
struct AllReconciled {
    domains: Vec<Reconciled>,
}

/// `snaptree recover`
///
/// # Errors
/// The state cannot be used, or a hypervisor cannot be asked.
pub async fn recover(context: &Context, args: RecoverArgs) -> Result<Exit> {
    let Writer { engine, office } = open(context, &args.writer).await?;
    let accounts = office.recover().await?;
    let open = OperationFilter { open: Some(OpenOnly), ..OperationFilter::default() };
    let left = engine.log().operations(&open, ALL).await?.len();
    if context.json {
        render::json(&Accounts { operations: accounts })?;
    } else {
        render::print(&told(&accounts, left, &Look::of_stdout()))?;
    }
    Ok(if left == 0 { Exit::Done } else { Exit::Attention })
}

fn told(accounts: &[Account], left: usize, look: &Look) -> String {
    let mut out = String::new();
    for account in accounts {
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
    match (accounts.len(), left) {
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

/// `snaptree reconcile`
///
/// # Errors
/// The state cannot be used, or a hypervisor cannot be asked.
pub async fn reconcile(context: &Context, args: ReconcileArgs) -> Result<Exit> {
    let Writer { engine, office } = open(context, &args.writer).await?;
    let domains = match &args.domain {
        Some(domain) => vec![engine.find_domain(domain).await?],
        None => engine.domains().await?.into_iter().map(|row| row.id).collect(),
    };
    let mut all: Vec<Reconciled> = Vec::new();
    let mut open = 0;
    for domain in domains {
        let driven = office.reconcile(domain).await?;
        open += driven.state.open.len();
        all.push(driven.into());
        if office.is_ending() {
            break;
        }
    }
    if context.json {
        render::json(&AllReconciled { domains: all })?;
    } else {
        render::print(&all.iter().map(|one| reconciled(one, &Look::of_stdout())).collect::<String>())?;
    }
    Ok(if open == 0 { Exit::Done } else { Exit::Attention })
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
