//! All policies, as the log tells them.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use snaptree_engine::engine::{Engine, EngineError};
use snaptree_engine::event::{Actor, Envelope, Event, PolicyRun, RunPart};
use snaptree_engine::log::{Checkpoint, DomainRow, EventFilter, LogError};
use snaptree_engine::operation::{Code, Failure};
use snaptree_engine::project::DomainState;
use snaptree_engine::{DomainId, DomainName, PolicyName, StreamId};

use super::project::{PROJECTOR, PolicyState};
use super::told::{PAGE_EVENTS, readable};
use crate::file::Policy;
use snaptree_engine::near::nearest;

/// How many events of all policies are read at once.
const NEWS_EVENTS: usize = 4_096;
/// A policy's checkpoint is kept each time that so many requests were read since the last one.
const CHECKPOINT_REQUESTS: usize = 1_024;

/// What a run asked for, new in the log.
#[derive(Clone, Debug, PartialEq)]
pub enum News {
    /// A snapshot of a domain.
    Snapshot(PolicyName, DomainId),
    /// Deletes of snapshots of a domain.
    Deletes(PolicyName, PolicyRun),
}

/// All policies, as the log tells them.
///
/// The first reading begins at the policies' checkpoints, and each one after it where the one before ended. A policy of
/// which an event cannot be read is [sick](PolicyState::sick), and none of the others is.
#[derive(Debug, Default)]
pub struct Book {
    /// Shared, since a policy of many domains is not copied at every look.
    policies: BTreeMap<PolicyName, Arc<PolicyState>>,
    /// How much was read of each since its checkpoint.
    since: BTreeMap<PolicyName, usize>,
    /// Up to which event all was read; none before the first time.
    seq: Option<u64>,
    /// How many events were read.
    events: u64,
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

    /// Reads what was appended since. Returns what runs asked for in it; nothing the first time.
    ///
    /// # Errors
    /// The store failed.
    pub async fn refresh(&mut self, engine: &Engine) -> Result<Vec<News>, EngineError> {
        let head = engine.log().head().await?.seq;
        let mut news = Vec::new();
        match self.seq {
            Some(seq) if seq >= head => return Ok(news),
            Some(seq) => match self.follow(engine, seq, head, &mut news).await {
                Err(LogError::Damaged(_)) => self.follow_each(engine, &mut news).await?,
                other => other?,
            },
            None => {
                self.follow_each(engine, &mut news).await?;
                news.clear();
            }
        }
        self.seq = Some(self.seq.map_or(head, |seq| seq.max(head)));
        Ok(news)
    }

    /// How many events were read so far.
    pub const fn events_read(&self) -> u64 {
        self.events
    }

    /// Reads the events of all policies after `seq`, of which the last one to be read is not after `head`.
    async fn follow(
        &mut self,
        engine: &Engine,
        seq: u64,
        head: u64,
        news: &mut Vec<News>,
    ) -> Result<(), LogError> {
        let filter = EventFilter { kind: Some("Policy.".to_owned()), ..EventFilter::default() };
        let mut seq = seq;
        while seq < head {
            let page = engine.log().read(seq, &filter, NEWS_EVENTS).await?;
            for envelope in &page {
                seq = envelope.seq;
                if let StreamId::Policy(name) = &envelope.stream {
                    self.apply(engine, name, envelope, news).await;
                }
            }
            if page.len() < NEWS_EVENTS {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Reads the streams of the policies, one by one, each from where it was read to, or from its checkpoint.
    async fn follow_each(&mut self, engine: &Engine, news: &mut Vec<News>) -> Result<(), LogError> {
        for name in engine.log().policies().await? {
            let stream = StreamId::Policy(name.clone());
            if !self.policies.contains_key(&name)
                && let Some(checkpoint) = engine.log().checkpoint(&stream, PROJECTOR, u64::MAX).await?
                && let Ok(state) = serde_json::from_str::<PolicyState>(&checkpoint.state)
                && (&state.name, state.version) == (&name, checkpoint.version)
            {
                self.policies.insert(name.clone(), Arc::new(state));
            }
            loop {
                let version = self.policies.get(&name).map_or(0, |state| state.version);
                let page = readable(&**engine.log(), &stream, version, PAGE_EVENTS).await?;
                for event in &page {
                    match event {
                        Ok(envelope) => self.apply(engine, &name, envelope, news).await,
                        Err(unreadable) => {
                            self.state(&name).cannot_read(unreadable.version, unreadable.why.clone())
                        }
                    }
                }
                if page.len() < PAGE_EVENTS {
                    break;
                }
            }
        }
        Ok(())
    }

    fn state(&mut self, name: &PolicyName) -> &mut PolicyState {
        let new = || Arc::new(PolicyState::new(name.clone()));
        Arc::make_mut(self.policies.entry(name.clone()).or_insert_with(new))
    }

    /// Applies an event, unless it was applied before.
    async fn apply(&mut self, engine: &Engine, name: &PolicyName, envelope: &Envelope, news: &mut Vec<News>) {
        self.events += 1;
        let state = self.state(name);
        if envelope.version <= state.version {
            return;
        }
        state.apply(envelope);
        let mut requests = 1;
        if let Event::PolicyFired(e) = &envelope.event {
            requests = e.domains.len();
            news.extend(e.domains.iter().map(|run| match e.part {
                RunPart::Snapshots => News::Snapshot(name.clone(), run.domain),
                RunPart::Retention => News::Deletes(name.clone(), run.clone()),
            }));
        }
        let since = self.since.entry(name.clone()).or_default();
        *since += requests;
        if *since >= CHECKPOINT_REQUESTS {
            *since = 0;
            self.keep(engine, name, envelope).await;
        }
    }

    /// Keeps a checkpoint of a policy, whose last event is `last`.
    async fn keep(&self, engine: &Engine, name: &PolicyName, last: &Envelope) {
        let Some(state) = self.policies.get(name).filter(|state| state.can_be_kept()) else { return };
        let Ok(text) = serde_json::to_string(&**state) else { return };
        let checkpoint = Checkpoint {
            stream: StreamId::Policy(name.clone()),
            version: last.version,
            seq: last.seq,
            hash: last.hash.to_string(),
            projector: PROJECTOR,
            state: text,
        };
        if let Err(error) = engine.log().save_checkpoint(checkpoint).await {
            tracing::debug!(%error, policy = %name, "the checkpoint was not kept; nothing depends on it");
        }
    }

    /// The policies that are defined, by name; those that this program cannot read among them.
    pub fn defined(&self) -> impl Iterator<Item = &PolicyState> {
        self.all().filter(|state| state.is_there())
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
    pub fn shared(&self, name: &PolicyName) -> Option<Arc<PolicyState>> {
        self.policies.get(name).cloned()
    }

    /// The policy of that name.
    ///
    /// # Errors
    /// There is none.
    pub fn find(&self, name: &str) -> Result<&PolicyState, Failure> {
        let found = PolicyName::new(name).ok().and_then(|name| self.policies.get(&name));
        found.map(AsRef::as_ref).filter(|state| state.is_there()).ok_or_else(|| {
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
/// The store failed. A domain whose log cannot be followed or read is left out.
pub async fn chosen(engine: &Engine, policy: &Policy) -> Result<Vec<Chosen>, EngineError> {
    chosen_of(engine, engine.domains().await?, policy).await
}

/// Those of `rows` that `policy` is for.
pub(super) async fn chosen_of(
    engine: &Engine,
    rows: Vec<DomainRow>,
    policy: &Policy,
) -> Result<Vec<Chosen>, EngineError> {
    let mut chosen = Vec::new();
    for row in rows {
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
    let first = match engine.log().read_stream(&StreamId::Domain(domain), 0, u64::MAX, 1).await {
        // Its runs are refused with the reason.
        Err(LogError::Damaged(_)) => Vec::new(),
        other => other?,
    };
    Ok(first.first().map_or(Timestamp::MIN, |envelope| envelope.at))
}
