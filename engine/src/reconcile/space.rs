//! Whether there is room for what is planned, and what deleting a snapshot would give back. Pure: estimates from what
//! the files occupy.
//!
//! # What is assumed
//! A layer grows by no more than what is copied into it, and occupies no more than its whole disk and its tables do.
//! Two layers that become one occupy at least what the larger one did, and at most both together. What a guest
//! discarded upon a layer can make it less, which no file tells from outside.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use jiff::Timestamp;

use crate::driver::{Observation, Plan};
use crate::event::{Actor, MergeWish, SnapshotDeleteRequested};
use crate::ids::{LayerId, SnapshotId};
use crate::layer::{DiskLayers, Layer, LayerGraph, Role};
use crate::operation::{Code, Failure, Request};
use crate::project::DomainState;
use crate::reconcile::merge::{self, MergeAction, MergePolicy, Verdict, human_bytes};

/// How much of a file system is left free; the setting `space.margin`. A machine that runs goes on writing while its
/// layers are merged.
pub const MARGIN_BYTES_DEFAULT: u64 = 64 << 20;
/// An image's tables take at most this part of its disk's size (entries of 8 bytes for clusters of 512) ...
const TABLES_PART: u64 = 64;
/// ... and this besides.
const TABLES_BYTES: u64 = 1 << 20;

/// Why there is not room for `needed_bytes` more, of which `margin_bytes` stay free; none if there is, or if nobody
/// knows how much there is. What needs nothing always fits.
pub(super) fn shortage(needed_bytes: u64, seen: &Observation, margin_bytes: u64) -> Option<String> {
    let room = seen.room.as_ref()?;
    if needed_bytes <= room.free_bytes.saturating_sub(margin_bytes) {
        return None;
    }
    Some(format!(
        "it may need {} of space; {} are free in {}, and {} are to stay free (space.margin)",
        human_bytes(needed_bytes),
        human_bytes(room.free_bytes),
        room.folder.display(),
        human_bytes(margin_bytes),
    ))
}

/// Refuses what there is no room for; nothing was touched then.
pub(crate) fn check(needed_bytes: u64, seen: &Observation, margin_bytes: u64) -> Result<(), Failure> {
    match shortage(needed_bytes, seen, margin_bytes) {
        None => Ok(()),
        Some(sentence) => Err(Failure::new(Code::NoSpace, sentence)
            .hint("free some there; with a smaller space.margin in the settings less stays free")
            .refused()),
    }
}

/// What makes room on the domain's file system without needing any: the snapshot whose deletion frees most, or nothing.
fn way_out(state: &DomainState, seen: &Observation) -> String {
    let occupied = Occupied::new(state, |file| {
        let image = seen.files.get(file).map(|facts| facts.allocated_bytes);
        image.or_else(|| Some(seen.memory.get(file)?.size_bytes))
    });
    let freed = |id: SnapshotId| occupied.frees(&[id]).map_or(0, |frees| frees.at_least_bytes);
    let best = state.tree.iter().max_by_key(|snapshot| freed(snapshot.id));
    match best.map(|snapshot| (snapshot, u64::try_from(freed(snapshot.id)).unwrap_or(0))) {
        Some((snapshot, bytes @ 1..)) => format!(
            "free some there: `snaptree delete` of snapshot '{}' frees at least {}; with a smaller space.margin in the \
             settings less stays free",
            snapshot.name,
            human_bytes(bytes)
        ),
        _ => "free some there: make the file system larger, or move other files away from it, since deleting a snapshot \
              of this domain frees nothing there now; with a smaller space.margin in the settings less stays free"
            .to_owned(),
    }
}

/// Refuses a plan that there is no room for.
pub(crate) fn check_plan(
    request: &Request,
    plan: &Plan,
    (state, seen): (&DomainState, &Observation),
    margin_bytes: u64,
) -> Result<(), Failure> {
    // A revert gives up more than the empty layers that it makes, and may be the way out of a full disk.
    let margin_bytes = if matches!(request, Request::Revert(_)) { 0 } else { margin_bytes };
    check(plan.peak_space_bytes, seen, margin_bytes).map_err(|failure| failure.hint(way_out(state, seen)))
}

/// Puts off the merges that there is no room for.
pub(super) fn within_room(
    found: Vec<Verdict>,
    state: &DomainState,
    seen: &Observation,
    margin_bytes: u64,
) -> Vec<Verdict> {
    let mut within = Vec::new();
    for verdict in found {
        let Verdict::Merge(plan) = &verdict else {
            within.push(verdict);
            continue;
        };
        match shortage(growth_bytes(&plan.actions, &state.layers, seen), seen, margin_bytes) {
            None => within.push(verdict),
            Some(shortage) => {
                let reason = format!(
                    "{shortage}; the next operation on the domain tries again, and so does `snaptree reconcile`"
                );
                let defer =
                    |snapshot: &SnapshotId| Verdict::Defer { snapshot: *snapshot, reason: reason.clone() };
                within.extend(plan.snapshots.iter().map(defer));
            }
        }
    }
    within
}

/// What a delete leaves to be merged.
pub(crate) struct Foreseen {
    /// The domain after the delete, before any merge.
    pub(crate) after: DomainState,
    /// What becomes of the data of what is deleted.
    pub(crate) verdicts: Vec<Verdict>,
    /// Bytes that are needed at the worst moment of the merges.
    pub(crate) peak_bytes: u64,
}

/// Looks ahead of a delete.
///
/// # Errors
/// Its merges are asked for at once, and there is no room for one of them.
pub(crate) fn foresee(
    state: &DomainState,
    delete: &SnapshotDeleteRequested,
    (by, at): (&Actor, Timestamp),
    seen: &Observation,
    policy: MergePolicy,
) -> Result<Foreseen, Failure> {
    let mut after = state.clone();
    after.delete_all(delete, by, at);
    let mut verdicts = merge::verdicts_given_room(&after, seen, policy);
    verdicts.retain(|verdict| verdict.is_about(&delete.snapshots));
    let mut peak_bytes = 0;
    for verdict in &verdicts {
        let Verdict::Merge(plan) = verdict else { continue };
        let needed_bytes = growth_bytes(&plan.actions, &after.layers, seen);
        peak_bytes = needed_bytes.max(peak_bytes);
        if delete.merge == MergeWish::Now {
            check(needed_bytes, seen, policy.margin_bytes).map_err(|failure| Failure {
                message: format!("the data cannot be merged now: {}", failure.message),
                ..failure
            })?;
        }
    }
    let verdicts = within_room(verdicts, &after, seen, policy.margin_bytes);
    Ok(Foreseen { after, verdicts, peak_bytes })
}

/// Bytes that a disk's image occupies at most.
pub fn full_bytes(virtual_size_bytes: u64) -> u64 {
    virtual_size_bytes.saturating_add(virtual_size_bytes / TABLES_PART).saturating_add(TABLES_BYTES)
}

/// Bytes that the layers which take others' data may grow by; what was folded away is unlinked only after that.
pub fn growth_bytes(actions: &[MergeAction], graph: &LayerGraph, seen: &Observation) -> u64 {
    let growth = |action: &MergeAction| -> u64 {
        let (disk, taken, takers): (_, Vec<&LayerId>, &[LayerId]) = match action {
            MergeAction::Drop { .. } | MergeAction::Fold { .. } => return 0,
            MergeAction::Pull { disk, vanish, dependants, .. } => (disk, vanish.iter().collect(), dependants),
            MergeAction::Push { disk, from, into, between } => {
                (disk, between.iter().chain([from]).collect(), std::slice::from_ref(into))
            }
        };
        let Some(layers) = graph.disks.get(disk) else { return 0 };
        let allocated = |id: &LayerId| {
            let layer = layers.layers.get(id)?;
            Some((layer, seen.files.get(&layer.file).map_or(0, |facts| facts.allocated_bytes)))
        };
        let copied = sum(taken.into_iter().filter_map(allocated).map(|(_, bytes)| bytes));
        let grown = takers.iter().filter_map(allocated).map(|(layer, bytes)| grows_by(layer, bytes, copied));
        sum(grown)
    };
    sum(actions.iter().map(growth))
}

/// Bytes that a layer grows by at most when `copied` bytes are copied into it.
fn grows_by(layer: &Layer, allocated_bytes: u64, copied_bytes: u64) -> u64 {
    copied_bytes.min(full_bytes(layer.virtual_size_bytes).saturating_sub(allocated_bytes))
}

fn sum(bytes: impl Iterator<Item = u64>) -> u64 {
    bytes.fold(0, u64::saturating_add)
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// What deleting snapshots gives back, once their data is folded away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Frees {
    /// At least so many bytes. Negative where the data is copied into several dependants, and that may take more than
    /// the layer gives back.
    pub at_least_bytes: i64,
    /// At most so many bytes.
    pub at_most_bytes: u64,
}

impl Frees {
    fn add(&mut self, other: Self) {
        self.at_least_bytes = self.at_least_bytes.saturating_add(other.at_least_bytes);
        self.at_most_bytes = self.at_most_bytes.saturating_add(other.at_most_bytes);
    }
}

/// What the layers of a domain occupy, snapshot by snapshot.
#[derive(Debug)]
pub struct Occupied<'a> {
    disks: Vec<DiskSizes<'a>>,
    /// What the memory of a snapshot occupies; none for a file that cannot be seen.
    memory_bytes: BTreeMap<SnapshotId, Option<u64>>,
}

#[derive(Debug)]
struct DiskSizes<'a> {
    layers: &'a BTreeMap<LayerId, Layer>,
    dependants: HashMap<&'a LayerId, Vec<&'a LayerId>>,
    of_snapshot: HashMap<SnapshotId, &'a LayerId>,
    tombstones: BTreeSet<&'a LayerId>,
    allocated_bytes: HashMap<&'a LayerId, u64>,
}

impl<'a> Occupied<'a> {
    /// Asks for what each file occupies; none for one that cannot be seen.
    pub fn new(state: &'a DomainState, allocated_bytes: impl Fn(&Path) -> Option<u64>) -> Self {
        let sizes = |disk: &'a DiskLayers| {
            let mut sizes = DiskSizes {
                layers: &disk.layers,
                dependants: HashMap::new(),
                of_snapshot: HashMap::new(),
                tombstones: BTreeSet::new(),
                allocated_bytes: HashMap::new(),
            };
            for (id, layer) in &disk.layers {
                sizes.of_snapshot.extend(layer.snapshot.map(|snapshot| (snapshot, id)));
                sizes.allocated_bytes.extend(allocated_bytes(&layer.file).map(|bytes| (id, bytes)));
                if let Some(parent) = &layer.parent {
                    sizes.dependants.entry(parent).or_default().push(id);
                }
                if matches!(disk.role(id, &state.tree), Role::Tombstone(_)) {
                    sizes.tombstones.insert(id);
                }
            }
            sizes
        };
        let memory = state.layers.memory.iter().map(|(id, memory)| (*id, allocated_bytes(&memory.file)));
        Self { memory_bytes: memory.collect(), disks: state.layers.disks.values().map(sizes).collect() }
    }

    /// Bytes that the layers and the memory of a snapshot, alive or deleted, occupy; none if none of it can be seen.
    pub fn allocated_bytes(&self, snapshot: SnapshotId) -> Option<u64> {
        let of_disk =
            |disk: &DiskSizes<'_>| disk.allocated_bytes.get(disk.of_snapshot.get(&snapshot)?).copied();
        let memory = self.memory_bytes.get(&snapshot).copied().flatten();
        self.disks.iter().filter_map(of_disk).chain(memory).reduce(u64::saturating_add)
    }

    /// What deleting these snapshots together would give back; none if a layer that counts cannot be seen.
    pub fn frees(&self, snapshots: &[SnapshotId]) -> Option<Frees> {
        let mut frees = None;
        for disk in &self.disks {
            let gone: BTreeSet<&LayerId> =
                snapshots.iter().filter_map(|id| disk.of_snapshot.get(id).copied()).collect();
            if !gone.is_empty() {
                let of_disk = Going { disk, gone, unlinked: BTreeSet::new() }.frees()?;
                frees.get_or_insert_with(Frees::default).add(of_disk);
            }
        }
        for bytes in snapshots.iter().filter_map(|id| self.memory_bytes.get(id)) {
            let bytes = (*bytes)?;
            let of_memory = Frees { at_least_bytes: signed(bytes), at_most_bytes: bytes };
            frees.get_or_insert_with(Frees::default).add(of_memory);
        }
        frees
    }
}

/// A disk of which some layers go.
struct Going<'d, 'a> {
    disk: &'d DiskSizes<'a>,
    gone: BTreeSet<&'a LayerId>,
    unlinked: BTreeSet<&'a LayerId>,
}

impl<'a> Going<'_, 'a> {
    fn frees(mut self) -> Option<Frees> {
        let mut frees = Frees::default();
        // What nothing stands upon any more goes as a whole, and with it what only it stood upon.
        let mut open: Vec<&'a LayerId> = self.gone.iter().copied().collect();
        let mut left = BTreeSet::new();
        while let Some(id) = open.pop() {
            let Some(layer) = self.disk.layers.get(id).filter(|_| self.is_dead(id)) else { continue };
            if layer.registered || !self.standing_on(id).is_empty() {
                left.insert(id);
                continue;
            }
            self.unlinked.insert(id);
            left.remove(id);
            let bytes = *self.disk.allocated_bytes.get(id)?;
            frees.add(Frees { at_least_bytes: signed(bytes), at_most_bytes: bytes });
            open.extend(&layer.parent);
        }
        while let Some(id) = left.first().copied() {
            let together = self.together(id);
            left.retain(|id| !together.contains(id));
            frees.add(self.folded(&together)?);
        }
        Some(frees)
    }

    /// Whether no snapshot and no machine needs it once those are gone.
    fn is_dead(&self, id: &LayerId) -> bool {
        !self.unlinked.contains(id) && (self.gone.contains(id) || self.disk.tombstones.contains(id))
    }

    fn standing_on(&self, id: &LayerId) -> Vec<&'a LayerId> {
        let dependants = self.disk.dependants.get(id).into_iter().flatten().copied();
        dependants.filter(|id| !self.unlinked.contains(id)).collect()
    }

    /// The dead layers that stand upon one another around `id`.
    fn together(&self, id: &'a LayerId) -> BTreeSet<&'a LayerId> {
        let mut found = BTreeSet::new();
        let mut open = vec![id];
        while let Some(id) = open.pop() {
            if self.is_dead(id) && found.insert(id) {
                open.extend(self.standing_on(id));
                open.extend(self.disk.layers.get(id).and_then(|layer| layer.parent.as_ref()));
            }
        }
        found
    }

    /// What folding dead layers into those that stand upon them gives back.
    fn folded(&self, dead: &BTreeSet<&'a LayerId>) -> Option<Frees> {
        let bytes = |id: &LayerId| self.disk.allocated_bytes.get(id).copied();
        let standing: Vec<&LayerId> = dead.iter().flat_map(|id| self.standing_on(id)).collect();
        let tops: Vec<&LayerId> = standing.iter().copied().filter(|id| !dead.contains(id)).collect();
        if let ([top], true) = (tops.as_slice(), standing.len() == dead.len()) {
            // One upon the other: whichever way they are merged, one file is left.
            let all: Vec<u64> = dead.iter().chain([top]).map(|id| bytes(id)).collect::<Option<_>>()?;
            let total = sum(all.iter().copied());
            let full = full_bytes(self.disk.layers.get(*top)?.virtual_size_bytes);
            let most = total - all.iter().max()?;
            return Some(Frees {
                at_least_bytes: signed(total.saturating_sub(full)).min(signed(most)),
                at_most_bytes: most,
            });
        }
        // What everything stands upon can only be folded once one dependant is left.
        let stays = |id: &&LayerId| {
            self.disk.layers.get(*id).is_none_or(|layer| layer.registered || layer.parent.is_none())
        };
        let going: Vec<u64> =
            dead.iter().filter(|id| !stays(id)).map(|id| bytes(id)).collect::<Option<_>>()?;
        let total = sum(going.into_iter());
        let grown = tops.iter().map(|id| Some(grows_by(self.disk.layers.get(*id)?, bytes(id)?, total)));
        let grown = sum(grown.collect::<Option<Vec<u64>>>()?.into_iter());
        Some(Frees { at_least_bytes: signed(total).saturating_sub(signed(grown)), at_most_bytes: total })
    }
}
