//! The log of a year, event by event, and the trees at its end, against the rules.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::Timestamp;
use snaptree_drivers::sim::Holding;
use snaptree_engine::event::{Actor, Envelope, Event, PolicyFired, RunPart};
use snaptree_engine::log::{EventFilter, EventLog};
use snaptree_engine::project::DomainState;
use snaptree_engine::{DomainId, OperationId, SnapshotId, StreamId};
use snaptree_store::{Store, Verification};

use super::Write;
use super::rules::{POLICIES, Policy, Taken};

/// Events that are read at once.
const PAGE_EVENTS: usize = 4_096;

/// What the log told.
#[derive(Clone, Debug, Default)]
pub struct Audited {
    /// Its events.
    pub events: u64,
    /// Snapshots that were taken.
    pub created: u64,
    /// Snapshots that were deleted, each with its reasons.
    pub deleted: u64,
    /// Merges that were finished.
    pub merged: u64,
    /// Steps whose end had to be made out after a crash.
    pub resolved: u64,
    /// Planned instants that were passed over.
    pub skipped: u64,
    /// Leaps of the clock.
    pub leapt: u64,
    /// What stays of each domain.
    left: BTreeMap<DomainId, BTreeSet<String>>,
}

impl Audited {
    /// The names of the snapshots that have to be left of a domain.
    pub fn left(&self, domain: DomainId) -> &BTreeSet<String> {
        static NOTHING: BTreeSet<String> = BTreeSet::new();
        self.left.get(&domain).unwrap_or(&NOTHING)
    }

    /// How many snapshots are left in all.
    pub fn left_in_all(&self) -> usize {
        self.left.values().map(BTreeSet::len).sum()
    }
}

/// A snapshot that the log has a request for.
struct Asked {
    name: String,
    policy: usize,
    at: Timestamp,
}

/// Where the reading of the log stands.
#[derive(Default)]
struct Reading {
    audited: Audited,
    asked: BTreeMap<(DomainId, SnapshotId), Asked>,
    /// The live snapshots of each domain and policy, in the order in which they were taken.
    live: BTreeMap<(DomainId, usize), Vec<Taken>>,
    /// All that were ever taken.
    names: BTreeMap<(DomainId, usize), Vec<String>>,
    /// When the last one of each was taken, and whether the clock was in doubt then.
    last_taken: BTreeMap<(DomainId, usize), (Timestamp, bool)>,
    /// Whether the clock leapt and was not believed since.
    in_doubt: bool,
    /// The deletes that a run has told of, with the reasons.
    told: BTreeMap<OperationId, (usize, String, Vec<String>)>,
}

/// Walks the log: the chain holds, every planned instant ran once, and each delete is what the rules say and says why.
///
/// # Errors
/// It is not so.
pub async fn audit(
    store: &Arc<Store>,
    looked: &[Timestamp],
    domains: &[DomainId],
) -> Result<Audited, String> {
    match store.verify(None) {
        Ok(Verification::Sound { .. }) => {}
        other => return Err(format!("the chain does not hold: {other:?}")),
    }
    let mut reading = Reading::default();
    let mut seq = 0;
    loop {
        let page = store.read(seq, &EventFilter::default(), PAGE_EVENTS).await;
        let page = page.map_err(|error| error.to_string())?;
        let Some(last) = page.last() else { break };
        seq = last.seq;
        for envelope in &page {
            reading.read(envelope).map_err(|what| format!("event {}: {what}", envelope.seq))?;
        }
    }
    reading.audited.events = seq;
    for (number, policy) in POLICIES.iter().enumerate() {
        let expected = policy.taken(looked);
        let names: Vec<&str> = expected.iter().map(|taken| taken.name.as_str()).collect();
        for domain in domains {
            let there = reading.names.remove(&(*domain, number)).unwrap_or_default();
            if names != there {
                let difference = names.iter().zip(&there).find(|(wanted, there)| *wanted != there);
                return Err(format!(
                    "{} took {} snapshots of {domain}, not {}: {difference:?}",
                    policy.name,
                    there.len(),
                    names.len(),
                ));
            }
            let key = (*domain, number);
            let live = reading.live.remove(&key).unwrap_or_default();
            if let Some((now, false)) = reading.last_taken.get(&key) {
                let (_, going) = going(policy, &live, *now);
                if !going.is_empty() {
                    return Err(format!("{domain}: no rule keeps {going:?}, and it stays"));
                }
            }
            let left = reading.audited.left.entry(*domain).or_default();
            left.extend(live.into_iter().map(|taken| taken.name));
        }
    }
    Ok(reading.audited)
}

fn policy_of(actor: &Actor) -> Result<usize, String> {
    let Actor::Policy(name) = actor else { return Err(format!("asked for by {actor}")) };
    let found = POLICIES.iter().position(|policy| policy.name == name.as_str());
    found.ok_or_else(|| format!("there is no policy {name}"))
}

/// Those that count at `now`, and the names of those of them that no rule keeps.
fn going(policy: &Policy, live: &[Taken], now: Timestamp) -> (Vec<Taken>, BTreeSet<String>) {
    let counted: Vec<Taken> = live.iter().filter(|taken| taken.at <= now).cloned().collect();
    let stay = policy.stay(&counted);
    let going = counted.iter().filter(|taken| !stay.contains(taken.name.as_str()));
    let going = going.map(|taken| taken.name.clone()).collect();
    (counted, going)
}

impl Reading {
    fn read(&mut self, envelope: &Envelope) -> Result<(), String> {
        match (&envelope.stream, &envelope.event) {
            (StreamId::Policy(name), Event::PolicyFired(fired)) if fired.part == RunPart::Retention => {
                self.retention(policy_of(&Actor::Policy(name.clone()))?, fired, envelope.at)
            }
            (_, Event::PolicySkipped(skipped)) => {
                self.audited.skipped += u64::from(skipped.count);
                Ok(())
            }
            (_, Event::ClockLeapt(_)) => {
                self.audited.leapt += 1;
                self.in_doubt = true;
                Ok(())
            }
            (_, Event::ClockConfirmed(_)) => {
                self.in_doubt = false;
                Ok(())
            }
            (_, Event::MergeFinished(_)) => {
                self.audited.merged += 1;
                Ok(())
            }
            (_, Event::SystemRecovered(_)) => {
                self.audited.resolved += 1;
                Ok(())
            }
            (StreamId::Domain(domain), event) => self.of_domain(*domain, envelope, event),
            _ => Ok(()),
        }
    }

    fn of_domain(&mut self, domain: DomainId, envelope: &Envelope, event: &Event) -> Result<(), String> {
        match event {
            Event::SnapshotCreateRequested(request) => {
                let (name, at) = (request.name.to_string(), envelope.at);
                let asked = Asked { name, policy: policy_of(&envelope.actor)?, at };
                self.asked.insert((domain, request.snapshot), asked);
            }
            Event::SnapshotCreated(created) => {
                let Some(asked) = self.asked.get(&(domain, created.snapshot.id)) else {
                    return Err("created and not asked for".to_owned());
                };
                // What a host's clock says counts as far as the log allows it.
                let began = asked.at.min(envelope.at);
                let at = created.snapshot.created.max(began).min(envelope.at);
                let taken = Taken::new(&POLICIES[asked.policy], asked.name.clone(), at);
                self.last_taken.insert((domain, asked.policy), (envelope.at, self.in_doubt));
                self.names.entry((domain, asked.policy)).or_default().push(asked.name.clone());
                self.live.entry((domain, asked.policy)).or_default().push(taken);
                self.audited.created += 1;
            }
            Event::SnapshotDeleteRequested(request) => {
                let told = envelope.operation.and_then(|operation| self.told.get(&operation));
                let (policy, name, reasons) = told.ok_or("a delete that no run told of")?;
                let [snapshot] = &*request.snapshots else { return Err("several in one delete".to_owned()) };
                let same = self.asked.get(&(domain, *snapshot)).is_some_and(|asked| asked.name == *name);
                if !same || *reasons != request.reasons || policy_of(&envelope.actor)? != *policy {
                    return Err(format!("the delete is another than the run told of: {request:?}"));
                }
            }
            Event::SnapshotDeleted(deleted) => {
                let told = envelope.operation.and_then(|operation| self.told.remove(&operation));
                let (policy, name, _) = told.ok_or("a deleted snapshot that no run told of")?;
                let asked = self.asked.remove(&(domain, deleted.snapshot));
                let live = self.live.entry((domain, policy)).or_default();
                let before = live.len();
                live.retain(|taken| taken.name != name);
                if live.len() + 1 != before || asked.is_none_or(|asked| asked.name != name) {
                    return Err(format!("{name} was deleted and did not live"));
                }
                self.audited.deleted += 1;
            }
            _ => {}
        }
        Ok(())
    }

    /// A run of retention deletes what the rules do not keep of what is there, no more and no less, and says why. It
    /// deletes nothing while the clock is in doubt, and nothing that is dated later than now.
    fn retention(&mut self, policy: usize, fired: &PolicyFired, now: Timestamp) -> Result<(), String> {
        let rules: &Policy = &POLICIES[policy];
        for run in &fired.domains {
            let nothing = Vec::new();
            let live = self.live.get(&(run.domain, policy)).unwrap_or(&nothing);
            let (live, mut going) = going(rules, live, now);
            if self.in_doubt {
                return Err(format!("{:?} is deleted while the clock is in doubt", run.requests));
            }
            for request in &run.requests {
                let name = request.snapshot.as_str();
                let index = live.iter().position(|taken| taken.name == name);
                let index = index.ok_or_else(|| format!("{name} is to be deleted and does not live"))?;
                let reasons = rules.reasons(&live, index);
                if !going.remove(name) || request.reasons != reasons {
                    return Err(format!("{name} is deleted for {:?}; right is {reasons:?}", request.reasons));
                }
                let operation = request.operation.ok_or_else(|| format!("{name}: the delete was refused"))?;
                self.told.insert(operation, (policy, name.to_owned(), reasons));
            }
            if !going.is_empty() {
                return Err(format!("no rule keeps {going:?}, and it stays"));
            }
        }
        Ok(())
    }
}

/// The tree of a domain at the end, and what its snapshots hold.
///
/// # Errors
/// It is not as it has to be.
pub fn end_of(
    state: &DomainState,
    held: &BTreeMap<SnapshotId, Holding>,
    writes: &[Write],
    left: &BTreeSet<String>,
) -> Result<(), String> {
    let name = state.domain.as_ref().map_or("a domain", |domain| domain.name.as_str());
    if !state.open.is_empty() || !state.tombstones.is_empty() {
        return Err(format!("{name}: {} open, {} not merged", state.open.len(), state.tombstones.len()));
    }
    let there: BTreeSet<String> = state.tree.iter().map(|snapshot| snapshot.name.to_string()).collect();
    if there != *left {
        let more: Vec<_> = there.difference(left).collect();
        let fewer: Vec<_> = left.difference(&there).collect();
        return Err(format!("{name}: {more:?} should not be there, {fewer:?} should"));
    }
    for snapshot in state.tree.iter() {
        let mut blocks = BTreeMap::new();
        let taken = state.dated.get(&snapshot.id).map_or(0, |dated| dated.seq);
        let before = writes.iter().take_while(|write| write.seq < taken);
        before.for_each(|write| {
            blocks.insert(write.block, write.value);
        });
        let holds = held.get(&snapshot.id).and_then(|holding| holding.disks.values().next());
        if holds != Some(&blocks) {
            return Err(format!("{name}: {} does not hold what was there when it was taken", snapshot.name));
        }
    }
    Ok(())
}
