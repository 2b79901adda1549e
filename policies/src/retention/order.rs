//! In which order to delete, so that the merges move the least data.
//!
//! A deleted snapshot's data goes into what stands upon it, or what stands upon it goes down into its file, whichever
//! is less. So neighbours that are all to go, and the one above them that stays, end in one file, and every byte
//! outside the largest of these files has to move at least once. Beginning at the largest and going outward, it moves
//! exactly once.

use std::collections::{BTreeMap, BTreeSet};

use snaptree_engine::SnapshotId;

/// The file that holds a snapshot's changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum File {
    /// One that may vanish.
    Layer,
    /// The registered image, which never does: what stands upon it has to go down into it.
    Registered,
}

/// A snapshot in the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    /// The snapshot that it stands upon.
    pub parent: Option<SnapshotId>,
    /// What it holds beyond its parent, over all disks.
    pub bytes: u64,
    /// Where.
    pub file: File,
}

/// The tree of a domain with the sizes of its snapshots.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// Every live snapshot, whoever made it.
    pub nodes: BTreeMap<SnapshotId, Node>,
    /// The snapshot that the machine's state descends from.
    pub current: Option<SnapshotId>,
    /// What the machine has written since.
    pub active_bytes: u64,
}

impl Shape {
    /// `current` and its ancestors, nearest first: what the machine's disk stands upon.
    pub fn chain(&self) -> impl Iterator<Item = SnapshotId> {
        let known = |id: &SnapshotId| self.nodes.contains_key(id);
        let parent = move |id: &SnapshotId| self.nodes.get(id)?.parent.filter(known);
        std::iter::successors(self.current.filter(known), parent).take(self.nodes.len())
    }
}

/// A delete, and what its merge costs when it is done in its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delete {
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// Bytes to copy, at most: what two layers have in common is not known before.
    pub bytes_moved_max: u64,
    /// Bytes that are free afterwards, at least.
    pub bytes_freed_min: u64,
}

/// What stands directly upon a snapshot.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Dependant {
    Snapshot(SnapshotId),
    Active,
}

struct Ordering<'a> {
    shape: &'a Shape,
    going: &'a BTreeSet<SnapshotId>,
    dependants: BTreeMap<SnapshotId, Vec<Dependant>>,
    /// How many of what stays will stand upon a snapshot once all is done.
    staying: BTreeMap<SnapshotId, usize>,
}

/// Every snapshot of `going` that `shape` has, in the order in which deleting them moves the least data.
///
/// First what nothing stands upon, which costs nothing; then rows with one dependant in the end, the cheapest row
/// first, each outward from its largest file; then those whose data has to be copied into several. Every prefix is
/// sound, so a run may stop anywhere.
pub fn order(shape: &Shape, going: &BTreeSet<SnapshotId>) -> Vec<Delete> {
    let ordering = Ordering::new(shape, going);
    let mut free = Vec::new();
    let mut rows = Vec::new();
    let mut copied = Vec::new();
    for id in ordering.children_first() {
        match ordering.staying.get(&id).copied().unwrap_or_default() {
            0 => free.push(ordering.free(id)),
            1 if ordering.begins_row(id) => rows.push(ordering.row(id)),
            1 => {}
            several => copied.push(ordering.copied(id, several)),
        }
    }
    rows.sort_by_key(|row| {
        (row.iter().map(|delete| delete.bytes_moved_max).sum::<u64>(), row.first().map(|d| d.snapshot))
    });
    free.into_iter().chain(rows.into_iter().flatten()).chain(copied).collect()
}

impl<'a> Ordering<'a> {
    fn new(shape: &'a Shape, going: &'a BTreeSet<SnapshotId>) -> Self {
        let mut dependants: BTreeMap<SnapshotId, Vec<Dependant>> = BTreeMap::new();
        for (id, node) in &shape.nodes {
            if let Some(parent) = node.parent {
                dependants.entry(parent).or_default().push(Dependant::Snapshot(*id));
            }
        }
        if let Some(current) = shape.current {
            dependants.entry(current).or_default().push(Dependant::Active);
        }
        let mut ordering = Self { shape, going, dependants, staying: BTreeMap::new() };
        for id in ordering.children_first() {
            let staying = ordering.upon(id).iter().map(|upon| ordering.staying_in(*upon)).sum();
            ordering.staying.insert(id, staying);
        }
        ordering
    }

    fn upon(&self, id: SnapshotId) -> &[Dependant] {
        self.dependants.get(&id).map(Vec::as_slice).unwrap_or_default()
    }

    fn staying_in(&self, dependant: Dependant) -> usize {
        match dependant {
            Dependant::Snapshot(id) if self.going.contains(&id) => {
                self.staying.get(&id).copied().unwrap_or_default()
            }
            Dependant::Snapshot(_) | Dependant::Active => 1,
        }
    }

    /// What goes, each after all that stands upon it.
    fn children_first(&self) -> Vec<SnapshotId> {
        let root = |id: &&SnapshotId| {
            self.shape.nodes.get(id).is_some_and(|node| node.parent.is_none_or(|p| !self.going.contains(&p)))
        };
        let mut open: Vec<SnapshotId> = self.going.iter().filter(root).copied().collect();
        let mut found = Vec::new();
        while let Some(id) = open.pop() {
            found.push(id);
            open.extend(self.upon(id).iter().filter_map(|upon| match upon {
                Dependant::Snapshot(id) => self.going.contains(id).then_some(*id),
                Dependant::Active => None,
            }));
        }
        found.reverse();
        found
    }

    fn bytes(&self, id: SnapshotId) -> u64 {
        self.shape.nodes.get(&id).map_or(0, |node| node.bytes)
    }

    fn file(&self, id: SnapshotId) -> File {
        self.shape.nodes.get(&id).map_or(File::Layer, |node| node.file)
    }

    fn free(&self, id: SnapshotId) -> Delete {
        Delete { snapshot: id, bytes_moved_max: 0, bytes_freed_min: self.bytes(id) }
    }

    fn copied(&self, id: SnapshotId, dependants: usize) -> Delete {
        let times = u64::try_from(dependants).unwrap_or(u64::MAX);
        // In the registered image it stays until one dependant is left.
        let bytes = if self.file(id) == File::Registered { 0 } else { self.bytes(id) };
        Delete { snapshot: id, bytes_moved_max: bytes.saturating_mul(times), bytes_freed_min: 0 }
    }

    /// Whether `id` is the lowest of its row.
    fn begins_row(&self, id: SnapshotId) -> bool {
        let parent = self.shape.nodes.get(&id).and_then(|node| node.parent);
        parent.is_none_or(|parent| self.staying.get(&parent) != Some(&1))
    }

    /// The deletes of the row that begins at `lowest`, outward from its largest file.
    fn row(&self, lowest: SnapshotId) -> Vec<Delete> {
        let mut row = Vec::new();
        let mut sizes = Vec::new();
        let mut next = Some(Dependant::Snapshot(lowest));
        while let Some(dependant) = next {
            next = None;
            match dependant {
                Dependant::Active => sizes.push(self.shape.active_bytes),
                Dependant::Snapshot(id) => {
                    sizes.push(self.bytes(id));
                    if self.going.contains(&id) {
                        row.push(id);
                        next = self.upon(id).iter().copied().find(|upon| self.staying_in(*upon) > 0);
                    }
                }
            }
        }
        let largest = match self.file(lowest) {
            File::Registered => 0,
            File::Layer => (0..sizes.len()).max_by_key(|at| sizes.get(*at)).unwrap_or(0),
        };
        let moves = |at: usize, moved: usize| Delete {
            snapshot: row.get(at).copied().unwrap_or(lowest),
            bytes_moved_max: sizes.get(moved).copied().unwrap_or(0),
            bytes_freed_min: 0,
        };
        let upward = (largest..row.len()).map(|at| moves(at, at + 1));
        let downward = (0..largest.min(row.len())).rev().map(|at| moves(at, at));
        upward.chain(downward).collect()
    }
}
