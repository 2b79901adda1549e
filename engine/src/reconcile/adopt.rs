//! Taking over what somebody else did at the hypervisor: snapshots made or renamed there, and a revert. Pure.
//!
//! A backup's helper is not taken over: it goes by itself.
//!
//! Only where the hypervisor keeps the list of its snapshots by itself. What is gone there is marked lost by
//! [`drift`](crate::reconcile::drift), and never taken out of the tree: someone may ask where it went.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use sha2::{Digest, Sha256};

use crate::decide::TEXT_BYTES_MAX;
use crate::domain::{Disk, Domain};
use crate::driver::{Observation, SeenSnapshot};
use crate::event::{
    Actor, DomainChanged, Event, MemoryKind, SnapshotAdopted, SnapshotEdited, SnapshotReverted,
};
use crate::ids::{DiskName, NAME_BYTES_MAX, SnapshotId, SnapshotName};
use crate::project::DomainState;
use crate::tree::{Labels, Snapshot, SnapshotState};

/// Most snapshots that are adopted of one domain at once; the rest is next time.
pub const ADOPTED_MAX: usize = 1_000;

/// The events that take over what the hypervisor has and the log does not. `fresh` gives ids.
///
/// A snapshot's parent is the one that it has there, or that one's nearest live ancestor. Where the machine stands on
/// another live snapshot than the log says, somebody reverted it, and the pointer follows.
pub(crate) fn adoption(
    state: &DomainState,
    seen: &Observation,
    now: Timestamp,
    fresh: &dyn Fn() -> SnapshotId,
) -> Vec<Event> {
    let Some(domain) = state.domain.as_ref().filter(|domain| domain.capabilities.merges_itself) else {
        return Vec::new();
    };
    let mut adopter = Adopter {
        domain,
        state,
        listed: seen.snapshots.iter().map(|listed| (listed.native.as_str(), listed)).collect(),
        ids: BTreeMap::new(),
    };
    let live = |listed: &SeenSnapshot| listed.id.filter(|id| state.tree.contains(*id));
    adopter.ids =
        seen.snapshots.iter().filter_map(|listed| Some((listed.native.as_str(), live(listed)?))).collect();
    let foreign: Vec<&SeenSnapshot> = adopter.foreign(seen).into_iter().take(ADOPTED_MAX).collect();
    for listed in &foreign {
        adopter.ids.insert(&listed.native, listed.id.unwrap_or_else(fresh));
    }
    let (edits, mut names) = followed(state, seen);
    let given = names.give(foreign.iter().map(|listed| (listed.native.as_str(), listed.name.as_str())));
    let mut events: Vec<Event> = disks(domain, seen).map(Event::from).into_iter().collect();
    events.extend(edits.into_iter().map(Event::from));
    let adopted = |listed: &&SeenSnapshot| {
        adopter.adopted(listed, given.get(listed.native.as_str())?.clone(), seen, now)
    };
    events.extend(foreign.iter().filter_map(adopted));
    let stands = seen.current.as_deref().and_then(|native| adopter.nearest(Some(native)));
    if let Some(stands) = stands.filter(|id| state.tree.current().map(|current| current.id) != Some(*id)) {
        events.push(SnapshotReverted { snapshot: stands }.into());
    }
    events
}

/// The disks that were attached, detached or changed since somebody looked last.
fn disks(domain: &Domain, seen: &Observation) -> Option<DomainChanged> {
    let disks = seen.disks.clone().filter(|disks| *disks != domain.disks)?;
    Some(DomainChanged { disks: Some(disks), ..DomainChanged::default() })
}

/// How a machine's disks have changed, in words; nothing for what a user does not see.
pub(crate) fn disk_changes(before: &[Disk], now: &[Disk]) -> Vec<String> {
    let find = |disks: &[Disk], name: &DiskName| disks.iter().find(|disk| disk.name == *name).cloned();
    let mut words = Vec::new();
    for gone in before.iter().filter(|disk| find(now, &disk.name).is_none()) {
        words.push(format!("disk '{}' was detached from the machine", gone.name));
    }
    for disk in now {
        let known = find(before, &disk.name);
        if known.is_none() {
            words.push(format!("disk '{}' was attached to the machine", disk.name));
        }
        match &disk.left_out {
            Some(why) if known.as_ref().is_none_or(|known| known.left_out.as_ref() != Some(why)) => {
                words.push(format!("disk '{}' is no part of snapshots ({why})", disk.name));
            }
            None if known.as_ref().is_some_and(|known| known.left_out.is_some()) => {
                words.push(format!("disk '{}' is part of snapshots from now on", disk.name));
            }
            _ => {}
        }
    }
    words
}

/// What was changed there of names and descriptions, where the hypervisor keeps them.
pub(crate) fn edits(state: &DomainState, seen: &Observation) -> Vec<SnapshotEdited> {
    followed(state, seen).0
}

/// The same, and the names that are taken then.
///
/// A name is followed where it is another one there than the last time. So a name that stands for one which another
/// snapshot had, or which cannot be one here, stays as it was told, whatever becomes of the other.
fn followed<'a>(state: &DomainState, seen: &'a Observation) -> (Vec<SnapshotEdited>, Names<'a>) {
    let mut names = Names {
        taken: state.tree_after_open().iter().map(|snapshot| snapshot.name.clone()).collect(),
        there: seen.snapshots.iter().map(|listed| listed.name.as_str()).collect(),
    };
    if !state.domain.as_ref().is_some_and(|domain| domain.capabilities.keeps_names) {
        return (Vec::new(), names);
    }
    let mut ours: Vec<(&Snapshot, &SeenSnapshot)> =
        seen.snapshots.iter().filter_map(|listed| Some((state.tree.get(listed.id?)?, listed))).collect();
    ours.sort_by_key(|(known, _)| (known.created, known.id));
    let renamed: Vec<_> =
        ours.iter().filter(|(known, listed)| listed.name != known.name_there()).copied().collect();
    // A name that somebody gave up there is free for the others.
    for (known, _) in &renamed {
        names.taken.remove(&known.name);
    }
    let given = names.give(renamed.iter().map(|(_, listed)| (listed.native.as_str(), listed.name.as_str())));
    let mut edits = Vec::new();
    for (known, listed) in ours {
        let described = listed.description.clone().filter(|text| text.len() <= TEXT_BYTES_MAX);
        let description = described.unwrap_or_default();
        let changed = description != known.description.as_deref().unwrap_or_default();
        let name = given.get(listed.native.as_str()).cloned();
        if !changed && name.is_none() {
            continue;
        }
        let real_name = name.as_ref().and_then(|name| real_name(listed, name));
        let description = changed.then_some(description);
        edits.push(SnapshotEdited { snapshot: known.id, name, real_name, description, labels: None });
    }
    (edits, names)
}

/// The name at the hypervisor, where that is another one.
fn real_name(listed: &SeenSnapshot, name: &SnapshotName) -> Option<String> {
    Some(listed.name.clone()).filter(|real| real != name.as_str())
}

/// The names that are taken here, and those that the hypervisor lists.
struct Names<'a> {
    taken: BTreeSet<SnapshotName>,
    there: BTreeSet<&'a str>,
}

impl Names<'_> {
    /// A name for each of what the hypervisor lists, by its own id: its name there, where it can have it here and nobody
    /// has it; else one that stands for it. The former are given first, so that no stand-in takes a real name.
    fn give<'s>(
        &mut self,
        listed: impl Iterator<Item = (&'s str, &'s str)>,
    ) -> BTreeMap<&'s str, SnapshotName> {
        let mut given = BTreeMap::new();
        let mut others = Vec::new();
        for (native, real) in listed {
            match SnapshotName::new(real).ok().filter(|name| !self.taken.contains(name)) {
                Some(name) => {
                    self.taken.insert(name.clone());
                    given.insert(native, name);
                }
                None => others.push((native, real)),
            }
        }
        for (native, real) in others {
            if let Some(name) = self.stand_in(native, real) {
                self.taken.insert(name.clone());
                given.insert(native, name);
            }
        }
        given
    }

    /// A name that nobody has here or there. For one that another has it is numbered; for one that cannot be a name here it
    /// says so by a tag of the snapshot's own, which no one else gives to a name.
    fn stand_in(&self, native: &str, real: &str) -> Option<SnapshotName> {
        let base = match SnapshotName::new(real) {
            Ok(_) => shortened(real).to_owned(),
            Err(_) => format!("{} [{}]", cleaned(real), tag(native)),
        };
        let numbered = (2..).map_while(|number| SnapshotName::new(format!("{base} ({number})")).ok());
        let plain = SnapshotName::new(base.clone()).ok();
        plain
            .into_iter()
            .chain(numbered)
            .find(|name| !self.taken.contains(name) && !self.there.contains(name.as_str()))
    }
}

struct Adopter<'a> {
    domain: &'a Domain,
    state: &'a DomainState,
    listed: BTreeMap<&'a str, &'a SeenSnapshot>,
    /// Our ids, by the hypervisor's; tombstones are not among them.
    ids: BTreeMap<&'a str, SnapshotId>,
}

impl<'a> Adopter<'a> {
    /// What is listed and is not ours, parents before their children.
    fn foreign(&self, seen: &'a Observation) -> Vec<&'a SeenSnapshot> {
        let ours = |listed: &SeenSnapshot| {
            listed
                .id
                .is_some_and(|id| self.state.tree.contains(id) || self.state.tombstones.contains_key(&id))
        };
        let mut foreign: Vec<(usize, &SeenSnapshot)> = seen
            .snapshots
            .iter()
            .filter(|listed| !ours(listed) && listed.helper.is_none() && !self.state.forgot(listed))
            .map(|listed| (self.above(Some(&listed.native)).count(), listed))
            .collect();
        // Of two with one name the older one has it.
        foreign
            .sort_by(|(depth, a), (other, b)| (depth, a.taken, &a.native).cmp(&(other, b.taken, &b.native)));
        foreign.into_iter().map(|(_, listed)| listed).collect()
    }

    /// A listed snapshot and what it stands upon there. Ends at a loop.
    fn above<'s>(&'s self, native: Option<&'s str>) -> impl Iterator<Item = &'s str> {
        let parent = |native: &&'s str| self.listed.get(native).and_then(|listed| listed.parent.as_deref());
        std::iter::successors(native, parent).take(self.listed.len() + 1)
    }

    /// Ours among a listed snapshot and what it stands upon, the nearest one.
    fn nearest(&self, native: Option<&str>) -> Option<SnapshotId> {
        self.above(native).find_map(|native| self.ids.get(native).copied())
    }

    fn adopted(
        &self,
        listed: &SeenSnapshot,
        name: SnapshotName,
        seen: &Observation,
        now: Timestamp,
    ) -> Option<Event> {
        let id = self.ids.get(listed.native.as_str()).copied()?;
        let parent = self.nearest(listed.parent.as_deref());
        let children = seen
            .snapshots
            .iter()
            .filter(|child| self.nearest(child.parent.as_deref()) == Some(id))
            .filter_map(|child| self.ids.get(child.native.as_str()).copied())
            .filter(|child| self.state.tree.contains(*child))
            .collect();
        let state = listed.state.unwrap_or(SnapshotState::Shutoff);
        let memory = match state {
            SnapshotState::Running | SnapshotState::Paused => MemoryKind::Internal,
            SnapshotState::Shutoff | SnapshotState::DiskSnapshot => MemoryKind::No,
        };
        let snapshot = Snapshot {
            id,
            real_name: real_name(listed, &name),
            name,
            description: listed
                .description
                .clone()
                .filter(|text| !text.is_empty() && text.len() <= TEXT_BYTES_MAX),
            parent,
            created: listed.taken.unwrap_or(now),
            state,
            memory,
            disks: self.domain.snapshotted().map(|disk| disk.name.clone()).collect(),
            labels: Labels::new(),
            hold: None,
            made_by: Actor::Engine,
            made_in: None,
            lost: false,
            native: Some(listed.native.clone()),
            left_out: self.domain.left_out(),
        };
        Some(SnapshotAdopted { snapshot, listed_as: listed.name.clone(), children }.into())
    }
}

/// What can be in a name here.
fn cleaned(real: &str) -> String {
    let plain: String = real.chars().map(|c| if c.is_control() || c == '/' { '_' } else { c }).collect();
    let plain = shortened(plain.trim_start_matches(['.', '-', ' ']).trim_end());
    if plain.is_empty() { "unnamed".to_owned() } else { plain.to_owned() }
}

/// A few digits that are the snapshot's own.
fn tag(native: &str) -> String {
    Sha256::digest(native).iter().take(4).map(|byte| format!("{byte:02x}")).collect()
}

/// As much of a name as leaves room for a number.
fn shortened(name: &str) -> &str {
    let mut end = name.len().min(NAME_BYTES_MAX - 32);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    &name[..end]
}
