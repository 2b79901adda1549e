//! One policy, as the log tells it: the projection of its stream.

use std::collections::{BTreeMap, VecDeque};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use snaptree_engine::event::{
    Actor, Envelope, Event, PolicyFired, PolicyRequest, PolicyRun, PolicySkipped, RunPart,
};
use snaptree_engine::{DomainId, DomainName, PolicyName};

use super::clock::Seen;
use crate::file::Policy;
use crate::leap::Reading;
use crate::schedule::History;

/// The version of this projector. A checkpoint of another version is dropped.
pub const PROJECTOR: u32 = 2;

/// How many of the last runs are kept of each domain: what the next look needs. Whoever wants to tell of more reads the
/// log, see [`told`](super::told).
pub const RUNS_KEPT_MAX: usize = 4;

/// What a policy says, and since when.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Definition {
    /// The policy; or why this program cannot read it.
    pub policy: Result<Policy, String>,
    /// The text that it was read from.
    pub source: String,
    /// When it was defined.
    pub at: Timestamp,
}

/// Why a policy does not run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Suspension {
    /// Why.
    pub reason: String,
    /// Who suspended it.
    pub by: Actor,
    /// Since when.
    pub at: Timestamp,
}

/// What a run asked of one domain.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// The planned instant, or when it was asked for.
    pub planned: Timestamp,
    /// When it was recorded.
    pub at: Timestamp,
    /// Who asked for it; none if it was due.
    pub asked_by: Option<Actor>,
    /// The domain.
    pub domain: DomainId,
    /// Its name then.
    pub name: DomainName,
    /// The request for the snapshot.
    pub create: PolicyRequest,
    /// The requests for deletes that followed; none if retention has not run, or had nothing to delete.
    pub deletes: Option<Vec<PolicyRequest>>,
}

/// Planned instants that were passed over.
#[derive(Clone, Debug, PartialEq)]
pub struct Skip {
    /// When that was recorded.
    pub at: Timestamp,
    /// What.
    pub skipped: PolicySkipped,
}

/// A run or a skip.
#[derive(Clone, Debug, PartialEq)]
pub enum Entry {
    /// It ran.
    Ran(Run),
    /// It was skipped.
    Skipped(Skip),
}

/// One policy, as the log tells it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyState {
    /// Its name.
    pub name: PolicyName,
    /// What it says; none once it was removed.
    pub definition: Option<Definition>,
    /// Why it does not run, if it does not.
    pub suspended: Option<Suspension>,
    /// What of it this program cannot read. It does not run then until it is defined anew.
    #[serde(skip)]
    pub sick: Option<String>,
    /// Nothing before this is ever due: when it was defined, last changed, or resumed.
    pub since: Timestamp,
    /// What ran and what was skipped, domain by domain.
    #[serde(with = "alike")]
    pub histories: BTreeMap<DomainId, History>,
    /// The last runs of each domain, in the order of the log.
    #[serde(with = "by_domain")]
    runs: BTreeMap<DomainId, VecDeque<Run>>,
    /// The planned instant of the last run.
    pub last: Option<Timestamp>,
    /// The last event, and what the clocks showed then.
    pub seen: Option<Seen>,
    /// The version of the last event applied.
    pub version: u64,
}

impl PolicyState {
    /// A policy of which the log has said nothing yet.
    pub fn new(name: PolicyName) -> Self {
        Self {
            name,
            definition: None,
            suspended: None,
            sick: None,
            since: Timestamp::MIN,
            histories: BTreeMap::new(),
            runs: BTreeMap::new(),
            last: None,
            seen: None,
            version: 0,
        }
    }

    /// The policy, if it is defined and can be read.
    pub fn policy(&self) -> Option<&Policy> {
        self.definition.as_ref().filter(|_| self.sick.is_none())?.policy.as_ref().ok()
    }

    /// The policy, if it runs by itself.
    pub fn running(&self) -> Option<&Policy> {
        self.policy().filter(|_| self.suspended.is_none())
    }

    /// Whether there is such a policy: one that this program cannot read is one, too.
    pub fn is_there(&self) -> bool {
        self.definition.is_some() || self.sick.is_some()
    }

    /// Why this program cannot read the policy, if it cannot.
    pub fn problem(&self) -> Option<&str> {
        let unreadable = || self.definition.as_ref()?.policy.as_ref().err();
        self.sick.as_ref().or_else(unreadable).map(String::as_str)
    }

    /// Whether a checkpoint of it is as good as its events: another program may read what this one cannot.
    pub(super) fn can_be_kept(&self) -> bool {
        self.problem().is_none()
    }

    /// The last runs of a domain, the newest first.
    pub fn runs_of(&self, domain: DomainId) -> impl Iterator<Item = &Run> {
        self.runs.get(&domain).into_iter().flat_map(|runs| runs.iter().rev())
    }

    /// The last run on a domain.
    pub fn last_run(&self, domain: DomainId) -> Option<&Run> {
        self.runs_of(domain).next()
    }

    /// The last run on each domain.
    pub fn last_runs(&self) -> impl Iterator<Item = &Run> {
        self.runs.values().filter_map(VecDeque::back)
    }

    /// Whether one of the runs that are kept is of that instant.
    pub fn has_run(&self, planned: Timestamp) -> bool {
        self.runs.values().flatten().any(|run| run.planned == planned)
    }

    /// The event of that version cannot be read.
    pub(super) fn cannot_read(&mut self, version: u64, why: String) {
        self.version = version;
        self.sick = Some(why);
    }

    /// Applies the next event of the stream. Total: what is not a policy's changes nothing.
    pub fn apply(&mut self, envelope: &Envelope) {
        self.version = envelope.version;
        let uptime = match &envelope.event {
            Event::PolicyFired(e) => e.uptime,
            _ => None,
        };
        self.seen = Some(Seen { seq: envelope.seq, reading: Reading { at: envelope.at, uptime } });
        match &envelope.event {
            Event::PolicyDefined(e) => {
                let policy = Policy::deserialized(&e.policy);
                if !self.policy().zip(policy.as_ref().ok()).is_some_and(|(old, new)| same_times(old, new)) {
                    self.since = envelope.at;
                }
                self.definition = Some(Definition { policy, source: e.source.clone(), at: envelope.at });
                self.sick = None;
            }
            Event::PolicyRemoved(_) => {
                self.sick = None;
                self.definition = None;
                self.suspended = None;
            }
            Event::PolicySuspended(e) => {
                let by = envelope.actor.clone();
                self.suspended = Some(Suspension { reason: e.reason.clone(), by, at: envelope.at });
            }
            Event::PolicyResumed(_) => {
                self.suspended = None;
                self.since = envelope.at;
            }
            Event::PolicyFired(e) => self.fired(e, envelope.at),
            Event::PolicySkipped(e) => {
                self.histories.entry(e.domain).or_default().skipped(e.last, envelope.at);
            }
            _ => {}
        }
    }

    fn fired(&mut self, fired: &PolicyFired, at: Timestamp) {
        for one in &fired.domains {
            match fired.part {
                RunPart::Snapshots => {
                    // A run that somebody asked for takes no planned instant's place.
                    if fired.asked_by.is_none() {
                        self.histories.entry(one.domain).or_default().fired(fired.planned);
                    }
                    self.last = Some(fired.planned);
                    let Some(run) = Run::of(fired, one, at) else { continue };
                    let runs = self.runs.entry(one.domain).or_default();
                    if runs.len() == RUNS_KEPT_MAX {
                        runs.pop_front();
                    }
                    runs.push_back(run);
                }
                RunPart::Retention => {
                    let runs = self.runs.get_mut(&one.domain);
                    let mut runs = runs.into_iter().flat_map(|runs| runs.iter_mut().rev());
                    if let Some(run) = runs.find(|run| run.planned == fired.planned) {
                        run.deletes = Some(one.requests.clone());
                    }
                }
            }
        }
    }
}

impl Run {
    /// What a run asked of one domain, recorded at `at`.
    pub(super) fn of(fired: &PolicyFired, one: &PolicyRun, at: Timestamp) -> Option<Self> {
        Some(Self {
            planned: fired.planned,
            at,
            asked_by: fired.asked_by.clone(),
            domain: one.domain,
            name: one.name.clone(),
            create: one.requests.first()?.clone(),
            deletes: None,
        })
    }
}

/// Histories with their domains: most domains of a policy have the same one, and it is written once.
mod alike {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use snaptree_engine::DomainId;

    use crate::schedule::History;

    pub(super) fn serialize<S: Serializer>(
        histories: &BTreeMap<DomainId, History>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let mut alike: BTreeMap<&History, Vec<DomainId>> = BTreeMap::new();
        for (domain, history) in histories {
            alike.entry(history).or_default().push(*domain);
        }
        alike.into_iter().collect::<Vec<_>>().serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<BTreeMap<DomainId, History>, D::Error> {
        let alike: Vec<(History, Vec<DomainId>)> = Deserialize::deserialize(deserializer)?;
        let one = |(history, domains): (History, Vec<DomainId>)| {
            domains.into_iter().map(move |domain| (domain, history.clone()))
        };
        Ok(alike.into_iter().flat_map(one).collect())
    }
}

/// Runs by domain: each says which one it is of.
mod by_domain {
    use std::collections::{BTreeMap, VecDeque};

    use serde::{Deserialize, Deserializer, Serializer};
    use snaptree_engine::DomainId;

    use super::Run;

    pub(super) fn serialize<S: Serializer>(
        runs: &BTreeMap<DomainId, VecDeque<Run>>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(runs.values().flatten())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<BTreeMap<DomainId, VecDeque<Run>>, D::Error> {
        let runs: Vec<Run> = Deserialize::deserialize(deserializer)?;
        let mut by_domain: BTreeMap<DomainId, VecDeque<Run>> = BTreeMap::new();
        for run in runs {
            by_domain.entry(run.domain).or_default().push_back(run);
        }
        Ok(by_domain)
    }
}

/// Whether both run on the same domains at the same times, so that what is due stays due.
fn same_times(old: &Policy, new: &Policy) -> bool {
    (&old.select, &old.schedule, &old.timezone, old.jitter)
        == (&new.select, &new.schedule, &new.timezone, new.jitter)
}

impl Policy {
    /// Reads what `Policy.Defined` recorded.
    fn deserialized(value: &serde_json::Value) -> Result<Self, String> {
        serde_json::from_value(value.clone()).map_err(|error| error.to_string())
    }
}
