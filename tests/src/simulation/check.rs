//! The invariants, checked after every restart and after every operation.

use std::collections::{BTreeMap, BTreeSet};

use snaptree_drivers::sim::{INJECTED, SimDriver};
use snaptree_engine::driver::{Observation, SeenSnapshot};
use snaptree_engine::event::{Envelope, Hash};
use snaptree_engine::layer::Role;
use snaptree_engine::log::{EventFilter, EventLog};
use snaptree_engine::operation::{Code, Outcome, Phase};
use snaptree_engine::project::DomainState;
use snaptree_engine::{DomainId, SnapshotId, StreamId};
use snaptree_store::{Store, Verification};

use super::model::{Listed, Model};
use super::world::World;

/// What was broken, and how.
#[derive(Clone, Debug)]
pub struct Violation {
    /// The invariant, in a word or two.
    pub invariant: &'static str,
    /// What was found.
    pub what: String,
}

/// A violation of `invariant`.
pub(super) fn broken<T>(invariant: &'static str, what: impl Into<String>) -> Result<T, Violation> {
    Err(Violation { invariant, what: what.into() })
}

/// What can fail outside of the thing under test.
pub(super) trait Must<T> {
    /// A failure is a violation, too.
    fn must(self, what: &'static str) -> Result<T, Violation>;
}

impl<T, E: std::fmt::Display> Must<T> for Result<T, E> {
    fn must(self, what: &'static str) -> Result<T, Violation> {
        self.map_err(|error| Violation { invariant: what, what: error.to_string() })
    }
}

/// A domain with its model, and the projection of all its events from the first one on.
pub(super) struct Watched {
    pub id: DomainId,
    pub model: Model,
    pub rebuilt: DomainState,
}

impl Watched {
    /// Reads what was appended since the last look from the store: after a restart, when nothing else is known.
    pub(super) async fn read_up(&mut self, store: &Store) -> Result<(), Violation> {
        let stream = StreamId::Domain(self.id);
        let read = store.read_stream(&stream, self.rebuilt.version, u64::MAX, 1 << 20).await;
        read.must("the log can be read")?.iter().try_for_each(|envelope| self.apply(envelope))
    }

    /// Takes in what this life appended. That the store gives the same is looked at when the seed ends.
    pub(super) fn catch_up(&mut self, world: &World) -> Result<(), Violation> {
        world.take_news(self.id).iter().try_for_each(|envelope| self.apply(envelope))
    }

    fn apply(&mut self, envelope: &Envelope) -> Result<(), Violation> {
        if envelope.version <= self.rebuilt.version {
            return Ok(());
        }
        self.rebuilt.apply(envelope);
        self.model.apply(envelope).must("the log tells a sound story")
    }

    /// All that must hold when nothing is going on.
    pub(super) fn check(
        &mut self,
        world: &World,
        driver: &SimDriver,
        served: &DomainState,
        seen: &Observation,
    ) -> Result<(), Violation> {
        if *served != self.rebuilt {
            return broken("2: the log rebuilds what was served", format!("{served:?}\n{:?}", self.rebuilt));
        }
        self.check_operations(world, served)?;
        if !self.model.registered {
            return Ok(());
        }
        self.check_tree(served)?;
        let resting = served.open.is_empty();
        self.check_contents(driver, served, resting)?;
        if resting {
            if served.domain.as_ref().is_some_and(|domain| domain.capabilities.merges_itself) {
                check_snapshots(&self.model.listed, served, seen)?;
            } else {
                check_layers(served, seen)?;
            }
        }
        Ok(())
    }

    fn check_operations(&self, world: &World, served: &DomainState) -> Result<(), Violation> {
        for open in &served.open {
            let attention = matches!(open.phase, Phase::NeedsAttention { .. });
            let behind = served
                .open
                .iter()
                .any(|first| first.seq < open.seq && matches!(first.phase, Phase::NeedsAttention { .. }));
            if !attention && !behind {
                return broken("4: an operation has an outcome", format!("{open:?} is open"));
            }
        }
        for (id, asked) in &self.model.operations {
            let is_open = served.open.iter().any(|open| open.id == *id);
            if asked.outcome.is_some() == is_open {
                return broken("4: an operation has one outcome", format!("{id}: {asked:?}"));
            }
            if asked.attention && !world.was_denied(*id) {
                return broken("needs attention for nothing", format!("{id}: {:?}", asked.failure));
            }
            if asked.outcome == Some(Outcome::Succeeded) || asked.outcome.is_none() {
                continue;
            }
            let Some(failure) = &asked.failure else {
                return broken("a failure has a reason", format!("{id}"));
            };
            let lost = asked.request.snapshots().iter().any(|id| self.model.lost.contains(id));
            let known = if asked.outcome == Some(Outcome::Expired) {
                failure.code == Code::Expired
            } else if asked.outcome == Some(Outcome::Cancelled) {
                failure.code == Code::Cancelled && asked.called_off
            } else if failure.code == Code::Drift && lost {
                failure.refused
            } else if failure.refused {
                matches!(failure.code, Code::NotFound | Code::Exists | Code::Unsupported)
            } else {
                failure.message.contains(INJECTED) || failure.message.contains("written meanwhile")
            };
            if !known {
                return broken("an operation fails for no reason", format!("{id}: {failure:?}: {asked:?}"));
            }
        }
        Ok(())
    }

    fn check_tree(&self, served: &DomainState) -> Result<(), Violation> {
        let listed: BTreeMap<_, _> = served.tree.iter().map(|s| (s.id, (s.name.clone(), s.parent))).collect();
        let expected: BTreeMap<_, _> =
            self.model.snapshots.iter().map(|(id, k)| (*id, (k.name.clone(), k.parent))).collect();
        if listed != expected {
            return broken("the tree follows libvirt's rules", format!("{listed:?}\nnot\n{expected:?}"));
        }
        let current = served.tree.current().map(|current| current.id);
        if current != self.model.current {
            let expected = self.model.current;
            return broken("current follows libvirt's rules", format!("{current:?}, not {expected:?}"));
        }
        Ok(())
    }

    fn check_contents(
        &mut self,
        driver: &SimDriver,
        served: &DomainState,
        resting: bool,
    ) -> Result<(), Violation> {
        let kept = driver.snapshots(served).must("the hypervisor can be asked")?;
        for (id, known) in self.model.snapshots.iter_mut() {
            if known.lost {
                continue;
            }
            // Also while an operation rests: what it has deleted so far is no longer listed.
            let Some(found) = kept.get(id) else {
                return broken("1: a live snapshot is there", format!("{id} is gone"));
            };
            if !known.holdings.contains(found) {
                let expected = &known.holdings;
                let what = format!("{id} '{}' holds\n{found:?}\nnot\n{expected:?}", known.name);
                return broken("1: a snapshot's content never changes", what);
            }
            known.holdings = vec![found.clone()];
        }
        if resting {
            let found = driver.holding(served).must("the hypervisor can be asked")?;
            if !self.model.machine.contains(&found) {
                let expected = &self.model.machine;
                return broken("5: the machine is as it was left", format!("{found:?}\nnot\n{expected:?}"));
            }
            self.model.machine = vec![found];
        }
        Ok(())
    }
}

/// The hypervisor that keeps snapshots itself has those that the outcomes, and whoever used it by hand, left there;
/// one that does not carry our mark, or was forgotten, stands for its parent.
fn check_snapshots(listed: &Listed, served: &DomainState, seen: &Observation) -> Result<(), Violation> {
    let by_native: BTreeMap<&str, _> = seen.snapshots.iter().map(|s| (s.native.as_str(), s)).collect();
    let hidden = |listed: &SeenSnapshot| {
        served.forgot(listed) || listed.id.is_some_and(|id| served.tombstones.contains_key(&id))
    };
    let ours = |native: Option<&String>| -> Option<SnapshotId> {
        let mut next = native.and_then(|native| by_native.get(native.as_str()));
        while let Some(found) = next {
            if let Some(id) = found.id.filter(|_| !hidden(found)) {
                return Some(id);
            }
            next = found.parent.as_ref().and_then(|parent| by_native.get(parent.as_str()));
        }
        None
    };
    let known = || seen.snapshots.iter().filter(|listed| !hidden(listed));
    let found = Listed {
        parents: known().filter_map(|s| Some((s.id?, ours(s.parent.as_ref())))).collect(),
        current: ours(seen.current.as_ref()),
        unmarked: known().filter(|s| s.id.is_none()).count(),
    };
    if found != *listed {
        return broken("3: the hypervisor has what the log says", format!("{found:?}\nnot\n{listed:?}"));
    }
    for (id, stone) in &served.tombstones {
        if stone.deferred.as_deref().is_none_or(str::is_empty) {
            return broken("a tombstone is merged, or says why not", format!("{id}: {stone:?}"));
        }
    }
    Ok(())
}

/// The layers are those of the log, and nothing that is deleted is forgotten.
fn check_layers(served: &DomainState, seen: &Observation) -> Result<(), Violation> {
    const INVARIANT: &str = "3: the layers are what the log says";
    if seen.generation != served.layers.generation {
        let what = format!("{:?}, not {:?}", seen.generation, served.layers.generation);
        return broken(INVARIANT, what);
    }
    let mut known = BTreeSet::new();
    for disk in served.domain.iter().flat_map(|domain| &domain.disks) {
        let is_it = |file: &std::path::PathBuf| file.ends_with(disk.name.to_string());
        if !seen.files.keys().any(is_it) {
            return broken("the registered image is never unlinked", disk.name.to_string());
        }
    }
    for (disk, layers) in &served.layers.disks {
        // What was adopted and put back is the user's image again.
        if layers.layers.is_empty() {
            continue;
        }
        let active = layers.active_layer().and_then(|(_, layer)| layer.file.file_name());
        if active.and_then(|name| name.to_str()) != seen.detail["active"][disk.to_string()].as_str() {
            return broken(INVARIANT, format!("{disk}: the machine writes {:?}", seen.detail));
        }
        for (id, layer) in &layers.layers {
            known.insert(&layer.file);
            let Some(facts) = seen.files.get(&layer.file) else {
                return broken(INVARIANT, format!("{id} is gone"));
            };
            let below = layer.parent.as_ref().and_then(|parent| layers.layers.get(parent));
            if facts.backing.as_ref() != below.map(|below| &below.file) {
                return broken(INVARIANT, format!("{id} stands on {:?}, not {below:?}", facts.backing));
            }
            if layer.stamp.is_some_and(|stamp| stamp != facts.stamp) {
                return broken(INVARIANT, format!("frozen {id} was written: {facts:?}, not {layer:?}"));
            }
            if let Role::Tombstone(dead) = layers.role(id, &served.tree) {
                let reason = dead.and_then(|dead| served.tombstones.get(&dead));
                if reason.is_none_or(|stone| stone.deferred.as_deref().is_none_or(str::is_empty)) {
                    return broken("a tombstone is merged, or says why not", format!("{id}: {reason:?}"));
                }
            }
        }
    }
    let unknown = seen.files.keys().find(|file| {
        // An image that was not adopted yet is the user's.
        let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let adopted =
            |disk: &str| served.layers.disks.iter().any(|(n, l)| n.to_string() == disk && l.active.is_some());
        !known.contains(file) && (name.contains('-') || adopted(name))
    });
    match unknown {
        Some(file) => broken("6: no file that the log does not know", format!("{}", file.display())),
        None => Ok(()),
    }
}

/// Every event whose append returned is there. Returns the last event looked at.
pub(super) async fn check_log(world: &World, store: &Store, since: u64) -> Result<u64, Violation> {
    let new = store.read(since, &EventFilter::default(), 1 << 20).await.must("the log can be read")?;
    let hashes: BTreeMap<u64, Hash> = new.iter().map(|envelope| (envelope.seq, envelope.hash)).collect();
    for (seq, hash) in world.take_appended() {
        if hashes.get(&seq) != Some(&hash) {
            return broken("4: no event is lost whose append returned", format!("event {seq}"));
        }
    }
    Ok(new.last().map_or(since, |last| last.seq))
}

/// The chain of hashes holds from the first event to the last.
pub(super) fn check_chain(store: &Store) -> Result<(), Violation> {
    match store.verify(None).must("the log can be verified")? {
        Verification::Sound(_) => Ok(()),
        other => broken("the hash chain holds", format!("{other:?}")),
    }
}
