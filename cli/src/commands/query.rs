//! `list`, `tree`, `show`, `xml`, `current`: what the log tells, now or at a moment of the past.

use std::collections::BTreeMap;

use anyhow::Result;
use jiff::Timestamp;
use serde::Serialize;
use snaptree_engine::command::{SnapshotRef, Unclear};
use snaptree_engine::decide::hint_at_near;
use snaptree_engine::log::ClockOrder;
use snaptree_engine::project::DomainState;
use snaptree_engine::tree::Snapshot;
use snaptree_engine::xml;

use crate::args::inspect::{CurrentArgs, ListArgs, ShowArgs, SortBy, TreeArgs};
use crate::args::value::labels;
use crate::context::{Context, Prefix};
use crate::exit::{Exit, Trouble};
use crate::render;
use crate::render::text::{Look, safe};
use crate::render::tree::Runs;
use crate::render::view::{
    AtView, Files, ListView, MemoryView, PhaseWord, ShowView, SnapshotView, Which, current_name, disks,
    domain_name, live, occupied, snapshots,
};

/// Opens the domain as it is, or was.
async fn domain_at(context: &Context, domain: &str, at: Option<&str>) -> Result<(DomainState, Prefix)> {
    let reader = context.reader().await?;
    let prefix = reader.prefix(at).await?;
    let state = reader.domain(domain, prefix).await?;
    if let (Some(clock), false) = (prefix.clock, context.json) {
        let doubt = match clock {
            ClockOrder::Monotone => "",
            ClockOrder::WentBack => "; the clock was set back around then, so times before it do not grow",
        };
        render::note(&format!("as of event {}{doubt}", prefix.seq));
    }
    Ok((state, prefix))
}

fn list_view(state: &DomainState, prefix: Prefix, which: Which) -> ListView {
    let files = if prefix.is_past() { Files::Unseen } else { Files::Seen };
    ListView {
        domain: domain_name(state),
        current: current_name(state),
        snapshots: snapshots(state, prefix.at, which, files),
        at: AtView::of(prefix),
    }
}

/// `snaptree list`
///
/// # Errors
/// The domain is not there, or the log cannot be read.
pub async fn list(context: &Context, args: ListArgs) -> Result<Exit> {
    let (state, prefix) = domain_at(context, &args.domain, args.at.at.as_deref()).await?;
    let mut view = list_view(&state, prefix, if args.all { Which::All } else { Which::Live });
    view.snapshots.retain(|snapshot| wanted(snapshot, &args));
    match args.sort {
        // They come in this order.
        SortBy::Created => {}
        SortBy::Name => view.snapshots.sort_by(|a, b| a.name.cmp(&b.name)),
        SortBy::Size => view.snapshots.sort_by_key(|snapshot| snapshot.allocated),
    }
    if context.json {
        render::json(&view)?;
    } else if args.names {
        let names: String = view.snapshots.iter().map(|one| format!("{}\n", safe(&one.name))).collect();
        render::print(&names)?;
    } else {
        render::print(&render::list::list(&view, &Look::of_stdout()))?;
        if view.snapshots.is_empty() {
            render::note(&format!("{} has no such snapshots", safe(&view.domain)));
        }
    }
    Ok(Exit::Done)
}

fn wanted(snapshot: &SnapshotView, args: &ListArgs) -> bool {
    let live = snapshot.phase != PhaseWord::Tombstone;
    let leaf = snapshot.children.is_empty();
    (!args.roots || live && snapshot.parent.is_none())
        && (!args.leaves || live && leaf)
        && (!args.no_leaves || live && !leaf)
        && (!args.held || snapshot.held)
        && labels(&args.label).iter().all(|(key, value)| snapshot.labels.get(key) == Some(value))
}

/// `snaptree tree`
///
/// # Errors
/// The domain is not there, or the log cannot be read.
pub async fn tree(context: &Context, args: TreeArgs) -> Result<Exit> {
    let (state, prefix) = domain_at(context, &args.domain, args.at.at.as_deref()).await?;
    let view = list_view(&state, prefix, if args.all { Which::All } else { Which::Live });
    if context.json {
        render::json(&view)?;
    } else {
        let mut look = Look::of_stdout();
        look.now = prefix.at;
        let runs = if args.fold || look.columns.is_some() && !args.full { Runs::Folded } else { Runs::Drawn };
        render::print(&render::tree::tree(&view, runs, &look))?;
    }
    Ok(Exit::Done)
}

/// Finds a live snapshot.
///
/// # Errors
/// There is none, or several could be meant.
pub fn one<'a>(state: &'a DomainState, wanted: &SnapshotRef) -> Result<&'a Snapshot, Trouble> {
    wanted.find(&state.tree).map_err(|unclear| {
        let what = match wanted {
            SnapshotRef::Name(name) => format!("snapshot '{name}'"),
            SnapshotRef::There(name) => format!("snapshot '{name}'"),
            SnapshotRef::Id(id) => format!("snapshot {id}"),
            SnapshotRef::Current => "current snapshot".to_owned(),
        };
        let domain = domain_name(state);
        let hint = unclear.hint();
        match unclear {
            Unclear::Missing { .. } => {
                let hint = hint.unwrap_or_else(|| hint_at_near(&domain, &state.tree, wanted));
                Trouble::not_found(format!("{domain} has no {what}")).hint(hint)
            }
            Unclear::Several(several) => {
                let message = format!("{what} of {domain} could be any of {}", several.len());
                Trouble::new(Exit::Refused, "invalid", message).hint(hint.unwrap_or_default())
            }
        }
    })
}

/// The document of `show`.
pub fn show_view(state: &DomainState, snapshot: &Snapshot, prefix: Option<Prefix>) -> ShowView {
    let at = prefix.map_or_else(Timestamp::now, |prefix| prefix.at);
    let past = prefix.is_some_and(|prefix| prefix.is_past());
    let files = if past { Files::Unseen } else { Files::Seen };
    ShowView {
        domain: domain_name(state),
        snapshot: live(state, snapshot, &state.tree.children(snapshot.id), at, &occupied(state, files)),
        memory: snapshot.memory,
        memory_file: MemoryView::of(state, snapshot.id, files),
        disks: disks(state, snapshot, files),
        left_out: snapshot.left_out.clone(),
        made_by: snapshot.made_by.clone(),
        operation: snapshot.made_in,
        hold: snapshot.hold.clone(),
        at: prefix.and_then(AtView::of),
    }
}

/// `snaptree show`
///
/// # Errors
/// The snapshot is not there, or the log cannot be read.
pub async fn show(context: &Context, args: ShowArgs) -> Result<Exit> {
    let (state, prefix) = domain_at(context, &args.domain, args.at.at.as_deref()).await?;
    let view = show_view(&state, one(&state, &args.name)?, Some(prefix));
    if context.json {
        render::json(&view)?;
    } else {
        render::print(&render::list::show(&view, &Look::of_stdout()))?;
    }
    Ok(Exit::Done)
}

/// The document of `xml`.
#[derive(Serialize)]
struct XmlView {
    xml: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    at: Option<AtView>,
}

/// The document of `current`.
#[derive(Serialize)]
struct CurrentView {
    domain: String,
    current: String,
    snapshot: SnapshotView,
    #[serde(skip_serializing_if = "Option::is_none")]
    at: Option<AtView>,
}

/// `snaptree xml`
///
/// # Errors
/// The snapshot is not there, or the log cannot be read.
pub async fn xml(context: &Context, args: ShowArgs) -> Result<Exit> {
    let (state, prefix) = domain_at(context, &args.domain, args.at.at.as_deref()).await?;
    let snapshot = one(&state, &args.name)?;
    let domain = state.domain.as_ref().ok_or_else(|| Trouble::not_found("the domain is not registered"))?;
    let parent = snapshot.parent.and_then(|id| state.tree.get(id));
    let files: BTreeMap<_, _> = disks(&state, snapshot, Files::Unseen)
        .into_iter()
        .filter_map(|disk| Some((disk.name, disk.file?)))
        .collect();
    let memory = state.layers.memory.get(&snapshot.id).map(|memory| memory.file.as_path());
    let text = xml::write(snapshot, parent, domain, &files, memory);
    if context.json {
        render::json(&XmlView { xml: text, at: AtView::of(prefix) })?;
    } else {
        render::print(&text)?;
    }
    Ok(Exit::Done)
}

/// `snaptree current`
///
/// # Errors
/// There is no current snapshot, or the log cannot be read.
pub async fn current(context: &Context, args: CurrentArgs) -> Result<Exit> {
    let (state, prefix) = domain_at(context, &args.domain, args.at.at.as_deref()).await?;
    let snapshot = one(&state, &SnapshotRef::Current)?;
    if context.json {
        let view = show_view(&state, snapshot, Some(prefix));
        let current = snapshot.name.to_string();
        let document = CurrentView { domain: view.domain, current, snapshot: view.snapshot, at: view.at };
        render::json(&document)?;
    } else {
        render::print(&format!("{}\n", safe(snapshot.name.as_str())))?;
    }
    Ok(Exit::Done)
}
