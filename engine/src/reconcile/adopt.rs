//! Taking over what somebody else did at the hypervisor: snapshots made or renamed there, and a revert. Pure.
//!
//! A backup's helper is not taken over: it goes by itself.
//!
//! Only where the hypervisor keeps the list of its snapshots by itself. What is gone there is marked lost by
//! [`drift`](crate::reconcile::drift), and never taken out of the tree: someone may ask where it went.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;

use crate::decide::TEXT_BYTES_MAX;
use crate::domain::Domain;
use crate::driver::{Observation, SeenSnapshot};
use crate::event::{Actor, Event, MemoryKind, SnapshotAdopted, SnapshotEdited, SnapshotReverted};
use crate::ids::{NAME_BYTES_MAX, SnapshotId, SnapshotName};
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
        names: state.tree_after_open().iter().map(|snapshot| snapshot.name.clone()).collect(),
    };
    let live = |listed: &SeenSnapshot| listed.id.filter(|id| state.tree.contains(*id));
    adopter.ids =
        seen.snapshots.iter().filter_map(|listed| Some((listed.native.as_str(), live(listed)?))).collect();
    let foreign: Vec<&SeenSnapshot> = adopter.foreign(seen).into_iter().take(ADOPTED_MAX).collect();
    for listed in &foreign {
        adopter.ids.insert(&listed.native, listed.id.unwrap_or_else(fresh));
    }
    let mut events: Vec<Event> = edits(state, seen).into_iter().map(Event::from).collect();
    // A name that somebody gave up there is free for what was made since.
    for event in &events {
        if let Event::SnapshotEdited(SnapshotEdited { snapshot, name: Some(name), .. }) = event {
            let old = state.tree.get(*snapshot).map(|known| &known.name);
            old.map(|old| adopter.names.remove(old));
            adopter.names.insert(name.clone());
        }
    }
    events.extend(foreign.iter().filter_map(|listed| adopter.adopted(listed, seen, now)));
    let stands = seen.current.as_deref().and_then(|native| adopter.nearest(Some(native)));
    if let Some(stands) = stands.filter(|id| state.tree.current().map(|current| current.id) != Some(*id)) {
        events.push(SnapshotReverted { snapshot: stands }.into());
    }
    events
}

/// What was changed there of names and descriptions, where the hypervisor keeps them.
pub(crate) fn edits(state: &DomainState, seen: &Observation) -> Vec<SnapshotEdited> {
    if !state.domain.as_ref().is_some_and(|domain| domain.capabilities.keeps_names) {
        return Vec::new();
    }
    let mut names: BTreeSet<SnapshotName> =
        state.tree_after_open().iter().map(|snapshot| snapshot.name.clone()).collect();
    let ours = seen.snapshots.iter().filter_map(|listed| Some((state.tree.get(listed.id?)?, listed)));
    let mut edits = Vec::new();
    for (known, listed) in ours {
        let described = listed.description.clone().filter(|text| text.len() <= TEXT_BYTES_MAX);
        let description = described.unwrap_or_default();
        let mut edit = SnapshotEdited { snapshot: known.id, name: None, description: None, labels: None };
        if description != known.description.as_deref().unwrap_or_default() {
            edit.description = Some(description);
        }
        if listed.name != known.name.as_str() {
            names.remove(&known.name);
            let name = free_name(&listed.name, &names);
            names.extend(name.clone());
            edit.name = name.filter(|name| *name != known.name);
        }
        if edit.name.is_some() || edit.description.is_some() {
            edits.push(edit);
        }
    }
    edits
}

struct Adopter<'a> {
    domain: &'a Domain,
    state: &'a DomainState,
    listed: BTreeMap<&'a str, &'a SeenSnapshot>,
    /// Our ids, by the hypervisor's; tombstones are not among them.
    ids: BTreeMap<&'a str, SnapshotId>,
    names: BTreeSet<SnapshotName>,
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
        foreign.sort_by_key(|(depth, _)| *depth);
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

    fn adopted(&mut self, listed: &SeenSnapshot, seen: &Observation, now: Timestamp) -> Option<Event> {
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
            name: self.name(listed)?,
            description: listed
                .description
                .clone()
                .filter(|text| !text.is_empty() && text.len() <= TEXT_BYTES_MAX),
            parent,
            created: listed.taken.unwrap_or(now),
            state,
            memory,
            disks: self.domain.disks.iter().map(|disk| disk.name.clone()).collect(),
            labels: Labels::new(),
            hold: None,
            made_by: Actor::Engine,
            made_in: None,
            lost: false,
            native: Some(listed.native.clone()),
            left_out: Vec::new(),
        };
        Some(SnapshotAdopted { snapshot, listed_as: listed.name.clone(), children }.into())
    }

    fn name(&mut self, listed: &SeenSnapshot) -> Option<SnapshotName> {
        let name = free_name(&listed.name, &self.names)?;
        self.names.insert(name.clone());
        Some(name)
    }
}

/// The name that a snapshot has there, where it can have it here and nobody else has it; else one like it.
fn free_name(listed: &str, taken: &BTreeSet<SnapshotName>) -> Option<SnapshotName> {
    let plain: String = listed.chars().filter(|c| !c.is_control() && *c != '/').collect();
    let plain = plain.trim_start_matches(['.', '-', ' ']).trim_end();
    let base = SnapshotName::new(shortened(plain))
        .or_else(|_| SnapshotName::new(format!("adopted {}", shortened(plain))))
        .or_else(|_| SnapshotName::new("adopted"))
        .ok()?;
    let numbered = (2..).map_while(|number| SnapshotName::new(format!("{base} ({number})")).ok());
    std::iter::once(base.clone()).chain(numbered).find(|name| !taken.contains(name))
}

/// As much of a name as leaves room for a number.
fn shortened(name: &str) -> &str {
    let mut end = name.len().min(NAME_BYTES_MAX - 32);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    &name[..end]
}
