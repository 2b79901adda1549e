//! What ran and what was skipped, read from the log, the newest first: the cost is that of what is told.

use std::collections::BTreeMap;

use jiff::Timestamp;
use snaptree_engine::engine::{Engine, EngineError};
use snaptree_engine::event::{Envelope, Event, PolicyRequest, RunPart};
use snaptree_engine::log::{EventLog, LogError};
use snaptree_engine::{DomainId, StreamId};

use super::project::{Entry, PolicyState, Run, Skip};

/// How many events are read from a stream at once.
pub(super) const PAGE_EVENTS: usize = 256;
/// How many are read first by whoever goes back.
const FIRST_PAGE_EVENTS: usize = 16;

/// The last runs and skips of a policy up to what `state` knows, the newest first, at most `count`.
///
/// # Errors
/// The store failed.
pub async fn told(engine: &Engine, state: &PolicyState, count: usize) -> Result<Vec<Entry>, EngineError> {
    let mut back = Back::new(engine, state);
    let mut told = Vec::new();
    while told.len() < count
        && let Some(page) = back.page().await?
    {
        told.extend(page);
    }
    told.truncate(count);
    Ok(told)
}

/// A policy's runs and skips, from the newest back.
pub(super) struct Back<'a> {
    engine: &'a Engine,
    stream: StreamId,
    /// All that is not after it is still to be read.
    version: u64,
    /// How many events are read next: the further back, the more at once.
    page: usize,
    /// Deletes of runs that come further back.
    deletes: BTreeMap<(DomainId, Timestamp), Vec<PolicyRequest>>,
}

impl<'a> Back<'a> {
    pub(super) fn new(engine: &'a Engine, state: &PolicyState) -> Self {
        let stream = StreamId::Policy(state.name.clone());
        Self { engine, stream, version: state.version, page: FIRST_PAGE_EVENTS, deletes: BTreeMap::new() }
    }

    /// What comes next, the newest first; none once all was read.
    pub(super) async fn page(&mut self) -> Result<Option<Vec<Entry>>, EngineError> {
        if self.version == 0 {
            return Ok(None);
        }
        let count = self.page.min(usize::try_from(self.version).unwrap_or(self.page));
        self.page = PAGE_EVENTS.min(2 * self.page);
        let before = self.version - count as u64;
        let page = readable(&**self.engine.log(), &self.stream, before, count).await?;
        self.version = before;
        let mut entries = Vec::new();
        for envelope in page.into_iter().rev().filter_map(Result::ok) {
            match &envelope.event {
                Event::PolicyFired(fired) => {
                    for one in fired.domains.iter().rev() {
                        let key = (one.domain, fired.planned);
                        if fired.part == RunPart::Retention {
                            self.deletes.entry(key).or_insert_with(|| one.requests.clone());
                        } else if let Some(run) = Run::of(fired, one, envelope.at) {
                            entries.push(Entry::Ran(Run { deletes: self.deletes.remove(&key), ..run }));
                        }
                    }
                }
                Event::PolicySkipped(e) => {
                    entries.push(Entry::Skipped(Skip { at: envelope.at, skipped: e.clone() }));
                }
                _ => {}
            }
        }
        Ok(Some(entries))
    }
}

/// An event that this program cannot read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Unreadable {
    /// Its place in the stream.
    pub(super) version: u64,
    /// What is wrong with it.
    pub(super) why: String,
}

/// The events of a stream after `version`, at most `count`; one that cannot be read keeps none of the others back.
pub(super) async fn readable(
    log: &dyn EventLog,
    stream: &StreamId,
    version: u64,
    count: usize,
) -> Result<Vec<Result<Envelope, Unreadable>>, LogError> {
    match log.read_stream(stream, version, u64::MAX, count).await {
        Ok(page) => return Ok(page.into_iter().map(Ok).collect()),
        Err(LogError::Damaged(_)) => {}
        Err(error) => return Err(error),
    }
    let mut page = Vec::new();
    for before in version..version.saturating_add(count as u64) {
        match log.read_stream(stream, before, u64::MAX, 1).await {
            Ok(one) if one.is_empty() => break,
            Ok(one) => page.extend(one.into_iter().map(Ok)),
            Err(LogError::Damaged(why)) => page.push(Err(Unreadable { version: before + 1, why })),
            Err(error) => return Err(error),
        }
    }
    Ok(page)
}
