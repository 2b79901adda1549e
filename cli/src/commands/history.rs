//! What only the log can tell: names of things that are gone, and ids that were cut short.

use anyhow::Result;
use snaptree_engine::engine::Engine;
use snaptree_engine::event::{Envelope, Event};
use snaptree_engine::log::{EventFilter, OperationFilter, OperationRow};
use snaptree_engine::project::DomainState;
use snaptree_engine::{DomainId, OperationId, SnapshotId, StreamId};

use crate::exit::Trouble;
use crate::render::words::Known;

/// Shortest part of an id that is looked for.
const ID_CHARS_MIN: usize = 4;

/// As many as there are.
pub const ALL: usize = usize::MAX >> 1;

/// How many rows are read at once.
const PAGE_ROWS: usize = 1_000;

/// Shows `look` the events that `filter` lets through, in their order: however many there are, few are held at once.
///
/// # Errors
/// The log cannot be read.
pub async fn each_event(
    engine: &Engine,
    filter: &EventFilter,
    mut look: impl FnMut(&Envelope),
) -> Result<()> {
    let mut seq = 0;
    loop {
        let page = engine.log().read(seq, filter, PAGE_ROWS).await?;
        seq = page.last().map_or(seq, |last| last.seq);
        page.iter().for_each(&mut look);
        if page.len() < PAGE_ROWS {
            return Ok(());
        }
    }
}

/// Learns what `envelope` names only by id.
///
/// # Errors
/// The log cannot be read.
pub async fn learn(engine: &Engine, known: &mut Known, envelope: &Envelope) -> Result<()> {
    known.learn(envelope);
    let StreamId::Domain(domain) = &envelope.stream else { return Ok(()) };
    if known.domain(*domain).is_none() {
        let name = name_of_domain(engine, *domain, envelope.seq).await?;
        known.name_domain(*domain, name);
    }
    if known.knows_all_of(envelope) {
        return Ok(());
    }
    learn_names(engine, known, *domain, envelope.seq).await?;
    if let Some(operation) = envelope.operation {
        let events = engine.operation_events(operation).await?;
        events.iter().for_each(|event| known.learn(event));
    }
    Ok(())
}

/// Learns the names of all snapshots that a domain had up to `seq`.
///
/// # Errors
/// The log cannot be read.
pub async fn learn_names(engine: &Engine, known: &mut Known, domain: DomainId, seq: u64) -> Result<()> {
    let filter = EventFilter {
        stream: Some(StreamId::Domain(domain)),
        kind: Some("Snapshot.".to_owned()),
        ..EventFilter::default()
    };
    each_event(engine, &filter, |event| {
        if event.seq <= seq {
            known.learn(event);
        }
    })
    .await
}

async fn name_of_domain(engine: &Engine, domain: DomainId, seq: u64) -> Result<String> {
    let filter = EventFilter {
        stream: Some(StreamId::Domain(domain)),
        kind: Some("Domain.".to_owned()),
        ..EventFilter::default()
    };
    let mut name = domain.to_string();
    each_event(engine, &filter, |event| match &event.event {
        _ if event.seq > seq => {}
        Event::DomainRegistered(e) => name = e.domain.name.to_string(),
        Event::DomainChanged(e) => {
            if let Some(new) = &e.name {
                name = new.to_string();
            }
        }
        _ => {}
    })
    .await?;
    Ok(name)
}

/// The names that a state tells: of live snapshots, and of tombstones.
pub fn names_in(state: &DomainState, id: SnapshotId) -> Option<String> {
    let live = state.tree.get(id).map(|snapshot| snapshot.name.to_string());
    live.or_else(|| state.tombstones.get(&id).map(|stone| stone.name.to_string()))
}

/// Finds an operation by its id, or by the beginning or end of it.
///
/// # Errors
/// There is none, or more than one.
pub async fn find_operation(engine: &Engine, wanted: &str) -> Result<OperationRow> {
    let exact: Option<OperationId> = wanted.parse().ok();
    let filter = OperationFilter { operation: exact, ..OperationFilter::default() };
    let unknown = || {
        let shown: String = wanted.chars().take(60).collect();
        Trouble::not_found(format!("there is no operation '{shown}'")).hint("`snaptree op list` lists them")
    };
    if exact.is_none() && wanted.len() < ID_CHARS_MIN {
        return Err(unknown().into());
    }
    let lower = wanted.to_ascii_lowercase();
    let is_meant = |row: &OperationRow| {
        let id = row.id.to_string();
        exact.is_some() || id.ends_with(&lower) || id.starts_with(&lower)
    };
    let mut rows = Vec::new();
    let mut filter = OperationFilter { after: Some(0), ..filter };
    loop {
        let page = engine.log().operations(&filter, PAGE_ROWS).await?;
        filter.after = page.last().map_or(filter.after, |last| Some(last.seq));
        let is_last = page.len() < PAGE_ROWS;
        rows.extend(page.into_iter().filter(is_meant));
        if is_last {
            break;
        }
    }
    let found = rows.pop().ok_or_else(unknown)?;
    if rows.is_empty() {
        return Ok(found);
    }
    let message = format!("'{wanted}' is part of the ids of {} operations", rows.len() + 1);
    Err(Trouble::usage(message).hint("give more of the id").into())
}
