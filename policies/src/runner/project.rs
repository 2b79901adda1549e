//! One policy, as the log tells it: the projection of its stream.

use std::collections::{BTreeMap, VecDeque};

use jiff::Timestamp;
use snaptree_engine::event::{Actor, Envelope, Event, PolicyFired, PolicyRequest, PolicySkipped, RunPart};
use snaptree_engine::{DomainId, DomainName, PolicyName};

use crate::file::Policy;
use crate::schedule::History;

/// How many of the last runs, and of the last skips, are kept to be told of.
pub const RUNS_KEPT_MAX: usize = 10_000;

/// What a policy says, and since when.
#[derive(Clone, Debug)]
pub struct Definition {
    /// The policy; or why this program cannot read it.
    pub policy: Result<Policy, String>,
    /// The text that it was read from.
    pub source: String,
    /// When it was defined.
    pub at: Timestamp,
}

/// Why a policy does not run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Suspension {
    /// Why.
    pub reason: String,
    /// Who suspended it.
    pub by: Actor,
    /// Since when.
    pub at: Timestamp,
}

/// What a run asked of one domain.
#[derive(Clone, Debug, PartialEq)]
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
#[derive(Clone, Debug)]
pub struct PolicyState {
    /// Its name.
    pub name: PolicyName,
    /// What it says; none once it was removed.
    pub definition: Option<Definition>,
    /// Why it does not run, if it does not.
    pub suspended: Option<Suspension>,
    /// Nothing before this is ever due: when it was defined, last changed, or resumed.
    pub since: Timestamp,
    /// What ran and what was skipped, domain by domain.
    pub histories: BTreeMap<DomainId, History>,
    /// The last runs and skips, in the order of the log.
    pub entries: VecDeque<Entry>,
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
            since: Timestamp::MIN,
            histories: BTreeMap::new(),
            entries: VecDeque::new(),
            version: 0,
        }
    }

    /// The policy, if it is defined and can be read.
    pub fn policy(&self) -> Option<&Policy> {
        self.definition.as_ref()?.policy.as_ref().ok()
    }

    /// The policy, if it runs by itself.
    pub fn running(&self) -> Option<&Policy> {
        self.policy().filter(|_| self.suspended.is_none())
    }

    /// The last runs, the newest first.
    pub fn runs(&self) -> impl Iterator<Item = &Run> {
        self.entries.iter().rev().filter_map(|entry| match entry {
            Entry::Ran(run) => Some(run),
            Entry::Skipped(_) => None,
        })
    }

    /// The last run on a domain.
    pub fn last_run(&self, domain: DomainId) -> Option<&Run> {
        self.runs().find(|run| run.domain == domain)
    }

    /// Applies the next event of the stream. Total: what is not a policy's changes nothing.
    pub fn apply(&mut self, envelope: &Envelope) {
        self.version = envelope.version;
        match &envelope.event {
            Event::PolicyDefined(e) => {
                let policy = Policy::deserialized(&e.policy);
                if !self.policy().zip(policy.as_ref().ok()).is_some_and(|(old, new)| same_times(old, new)) {
                    self.since = envelope.at;
                }
                self.definition = Some(Definition { policy, source: e.source.clone(), at: envelope.at });
            }
            Event::PolicyRemoved(_) => {
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
                self.keep(Entry::Skipped(Skip { at: envelope.at, skipped: e.clone() }));
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
                    let Some(create) = one.requests.first() else { continue };
                    self.keep(Entry::Ran(Run {
                        planned: fired.planned,
                        at,
                        asked_by: fired.asked_by.clone(),
                        domain: one.domain,
                        name: one.name.clone(),
                        create: create.clone(),
                        deletes: None,
                    }));
                }
                RunPart::Retention => {
                    let run = self.entries.iter_mut().rev().find_map(|entry| match entry {
                        Entry::Ran(run) if run.domain == one.domain && run.planned == fired.planned => {
                            Some(run)
                        }
                        _ => None,
                    });
                    if let Some(run) = run {
                        run.deletes = Some(one.requests.clone());
                    }
                }
            }
        }
    }

    fn keep(&mut self, entry: Entry) {
        if self.entries.len() == RUNS_KEPT_MAX {
            self.entries.pop_front();
        }
        self.entries.push_back(entry);
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
