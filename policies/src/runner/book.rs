//! All policies, as the log tells them.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use snaptree_engine::engine::{Engine, EngineError};
use snaptree_engine::event::{Actor, Event, PolicyRun, RunPart};
use snaptree_engine::log::EventFilter;
use snaptree_engine::operation::{Code, Failure};
use snaptree_engine::project::DomainState;
use snaptree_engine::{DomainId, DomainName, PolicyName, StreamId};

use super::project::PolicyState;
use crate::file::Policy;
use snaptree_engine::near::nearest;

/// How many events are read at once.
const PAGE_EVENTS: usize = 4_096;

/// What a run asked for, new in the log.
#[derive(Clone, Debug, PartialEq)]
pub enum News {
    /// A snapshot of a domain.
    Snapshot(PolicyName, DomainId),
    /// Deletes of snapshots of a domain.
    Deletes(PolicyName, PolicyRun),
}

/// All policies, as the log tells them.
#[derive(Clone, Debug, Default)]
pub struct Book {
    /// Shared, since a policy with years of runs is not copied at every look.
    policies: BTreeMap<PolicyName, Arc<PolicyState>>,
    /// The last event that was read.
    seq: u64,
}

impl Book {
    /// Reads the log.
    ///
    /// # Errors
    /// The store failed.
    pub async fn read(engine: &Engine) -> Result<Self, EngineError> {
        let mut book = Self::default();
        book.refresh(engine).await?;
        Ok(book)
    }

    /// Reads what was appended since. Returns what runs asked for in it.
    ///
    /// # Errors
    /// The store failed.
    pub async fn refresh(&mut self, engine: &Engine) -> Result<Vec<News>, EngineError> {
        let mut news = Vec::new();
        let filter = EventFilter { kind: Some("Policy.".to_owned()), ..EventFilter::default() };
        let head = engine.log().head().await?.seq;
        while self.seq < head {
            let page = engine.log().read(self.seq, &filter, PAGE_EVENTS).await?;
            for envelope in &page {
                self.seq = envelope.seq;
                if let StreamId::Policy(name) = &envelope.stream {
                    if let Event::PolicyFired(e) = &envelope.event {
                        news.extend(e.domains.iter().map(|run| match e.part {
                            RunPart::Snapshots => News::Snapshot(name.clone(), run.domain),
                            RunPart::Retention => News::Deletes(name.clone(), run.clone()),
                        }));
                    }
                    let new = || Arc::new(PolicyState::new(name.clone()));
                    Arc::make_mut(self.policies.entry(name.clone()).or_insert_with(new)).apply(envelope);
                }
            }
            if page.len() < PAGE_EVENTS {
                self.seq = self.seq.max(head);
            }
        }
        Ok(news)
    }

    /// The policies that are defined, by name.
    pub fn defined(&self) -> impl Iterator<Item = &PolicyState> {
        self.all().filter(|state| state.definition.is_some())
    }

    /// All that ever were, by name.
    pub fn all(&self) -> impl Iterator<Item = &PolicyState> {
        self.policies.values().map(AsRef::as_ref)
    }

    /// What the log says of that name; none if it never was a policy's.
    pub fn get(&self, name: &PolicyName) -> Option<&PolicyState> {
        self.policies.get(name).map(AsRef::as_ref)
    }

    /// The same, to be kept. Who keeps it while the book is read on has it copied.
    pub(super) fn shared(&self, name: &PolicyName) -> Option<Arc<PolicyState>> {
        self.policies.get(name).cloned()
    }

    /// The policy of that name.
    ///
    /// # Errors
    /// There is none.
    pub fn find(&self, name: &str) -> Result<&PolicyState, Failure> {
        let found = PolicyName::new(name).ok().and_then(|name| self.policies.get(&name));
        found.map(AsRef::as_ref).filter(|state| state.definition.is_some()).ok_or_else(|| {
            let shown: String = name.chars().filter(|c| !c.is_control()).take(60).collect();
            let near = nearest(name, self.defined().map(|state| state.name.as_str()));
            let hint = match near {
                Some(near) => format!("did you mean '{near}'?"),
                None => {
                    "`snaptree policy list` lists them, `snaptree policy set FILE` defines one".to_owned()
                }
            };
            Failure::new(Code::NotFound, format!("there is no policy '{shown}'")).hint(hint).refused()
        })
    }
}

/// A domain that a policy is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// The domain.
    pub id: DomainId,
    /// Its name.
    pub name: DomainName,
}

/// The registered domains that `policy` is for, by name.
///
/// # Errors
/// The store failed. A domain whose log cannot be followed is left out.
pub async fn chosen(engine: &Engine, policy: &Policy) -> Result<Vec<Chosen>, EngineError> {
    let mut chosen = Vec::new();
    for row in engine.domains().await? {
        let labels = if policy.select.labels.is_empty() {
            Default::default()
        } else {
            match engine.load(row.id).await {
                Ok(DomainState { domain: Some(domain), .. }) => domain.labels,
                Ok(_) => continue,
                Err(error) if error.spares_others() => continue,
                Err(error) => return Err(error),
            }
        };
        if policy.select.matches(&row.name, &labels) {
            chosen.push(Chosen { id: row.id, name: row.name });
        }
    }
    Ok(chosen)
}

/// Who a policy's requests come from.
pub(super) fn actor(name: &PolicyName) -> Actor {
    Actor::Policy(name.clone())
}

/// When the domain was registered: no run before that was ever its.
///
/// # Errors
/// The store failed.
pub(super) async fn registered_at(engine: &Engine, domain: DomainId) -> Result<Timestamp, EngineError> {
    let first = engine.log().read_stream(&StreamId::Domain(domain), 0, u64::MAX, 1).await?;
    Ok(first.first().map_or(Timestamp::MIN, |envelope| envelope.at))
}
