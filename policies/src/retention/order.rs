//! In which order to delete, so that the merges move the least data.
//!
//! A deleted snapshot's data goes into what stands upon it, or what stands upon it goes down into its file, whichever
//! is less. So neighbours that are all to go, and the one above them that stays, end in one file, and every byte
//! outside the largest of these files has to move at least once. Beginning at the largest and going outward, it moves
//! exactly once.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;

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
    /// How many snapshots the hypervisor lets a disk stand upon for long, where it sets a limit: one fewer than it
    /// takes, since the next one is taken before the oldest goes.
    pub depth_max: Option<NonZeroU32>,
}

impl Shape {
    /// `current` and its ancestors, nearest first: what the machine's disk stands upon.
    pub fn chain(&self) -> impl Iterator<Item = SnapshotId> {
        let known = |id: Option<SnapshotId>| self.nodes.get_key_value(&id?);
        std::iter::successors(known(self.current), move |(_, node)| known(node.parent))
            .map(|(id, _)| *id)
            .take(self.nodes.len())
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

/// What stands directly upon a snapshot: another one, by its place in [`Ordering::ids`], or what the machine writes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Upon {
    Snapshot(usize),
    Active,
}

/// The tree by places in a list, since a row of deletes may be a hundred thousand long.
struct Ordering<'a> {
    shape: &'a Shape,
    ids: Vec<SnapshotId>,
    nodes: Vec<Node>,
    parents: Vec<Option<usize>>,
    going: Vec<bool>,
    /// How many of what stays will stand upon a snapshot once all is done.
    staying: Vec<usize>,
    /// What stands upon it, and stays or has something upon it that does.
    heirs: Vec<Option<Upon>>,
    /// What goes, each after all that stands upon it.
    children_first: Vec<usize>,
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
    for at in ordering.children_first.iter().copied() {
        match ordering.staying[at] {
            0 => free.push(ordering.free(at)),
            1 if ordering.begins_row(at) => rows.push(ordering.row(at)),
            1 => {}
            several => copied.push(ordering.copied(at, several)),
        }
    }
    let cost = |row: &Vec<Delete>| row.iter().map(|delete| delete.bytes_moved_max).sum::<u64>();
    rows.sort_by_cached_key(|row| (cost(row), row.first().map(|delete| delete.snapshot)));
    free.into_iter().chain(rows.into_iter().flatten()).chain(copied).collect()
}

impl<'a> Ordering<'a> {
    fn new(shape: &'a Shape, going: &BTreeSet<SnapshotId>) -> Self {
        let ids: Vec<SnapshotId> = shape.nodes.keys().copied().collect();
        let nodes: Vec<Node> = shape.nodes.values().copied().collect();
        let place = |id: SnapshotId| ids.binary_search(&id).ok();
        // Ids sort by time, so mostly a snapshot stands upon the one before it in the list.
        let parent_of = |at: usize, parent: SnapshotId| {
            let before = at.checked_sub(1).filter(|before| ids[*before] == parent);
            before.or_else(|| place(parent))
        };
        let parents = nodes.iter().enumerate().map(|(at, node)| parent_of(at, node.parent?)).collect();
        let mut left = going.iter().peekable();
        let is_going = |id: &SnapshotId| {
            while left.next_if(|going| *going < id).is_some() {}
            left.next_if_eq(&id).is_some()
        };
        let going = ids.iter().map(is_going).collect();
        let current = shape.current.and_then(place);
        let (staying, heirs) = (vec![0; ids.len()], vec![None; ids.len()]);
        let mut ordering =
            Self { shape, ids, nodes, parents, going, staying, heirs, children_first: Vec::new() };
        if let Some(current) = current {
            ordering.inherit(current, Upon::Active, 1);
        }
        ordering.count();
        ordering
    }

    /// Counts what stays upon each snapshot, from the leaves down.
    fn count(&mut self) {
        let mut children_going = vec![0_usize; self.ids.len()];
        for at in 0..self.ids.len() {
            match self.parents[at] {
                Some(parent) if self.going[at] => children_going[parent] += 1,
                Some(parent) => self.inherit(parent, Upon::Snapshot(at), 1),
                None => {}
            }
        }
        let mut open: Vec<usize> =
            (0..self.ids.len()).filter(|at| self.going[*at] && children_going[*at] == 0).collect();
        while let Some(at) = open.pop() {
            self.children_first.push(at);
            let Some(parent) = self.parents[at] else { continue };
            self.inherit(parent, Upon::Snapshot(at), self.staying[at]);
            children_going[parent] -= 1;
            if self.going[parent] && children_going[parent] == 0 {
                open.push(parent);
            }
        }
    }

    fn inherit(&mut self, at: usize, upon: Upon, staying: usize) {
        self.staying[at] += staying;
        if staying > 0 {
            self.heirs[at] = Some(upon);
        }
    }

    fn free(&self, at: usize) -> Delete {
        Delete { snapshot: self.ids[at], bytes_moved_max: 0, bytes_freed_min: self.nodes[at].bytes }
    }

    fn copied(&self, at: usize, dependants: usize) -> Delete {
        let times = u64::try_from(dependants).unwrap_or(u64::MAX);
        // In the registered image it stays until one dependant is left.
        let bytes = if self.nodes[at].file == File::Registered { 0 } else { self.nodes[at].bytes };
        Delete { snapshot: self.ids[at], bytes_moved_max: bytes.saturating_mul(times), bytes_freed_min: 0 }
    }

    /// Whether it is the lowest of its row.
    fn begins_row(&self, at: usize) -> bool {
        self.parents[at].is_none_or(|parent| !self.going[parent] || self.staying[parent] != 1)
    }

    /// The deletes of the row that begins at `lowest`, outward from its largest file.
    fn row(&self, lowest: usize) -> Vec<Delete> {
        let mut row = Vec::new();
        let mut sizes = Vec::new();
        let mut next = Some(Upon::Snapshot(lowest));
        while let Some(upon) = next {
            next = None;
            match upon {
                Upon::Active => sizes.push(self.shape.active_bytes),
                Upon::Snapshot(at) => {
                    sizes.push(self.nodes[at].bytes);
                    if self.going[at] {
                        row.push(self.ids[at]);
                        next = self.heirs[at];
                    }
                }
            }
        }
        let largest = match self.nodes[lowest].file {
            File::Registered => 0,
            File::Layer => (0..sizes.len()).max_by_key(|at| sizes[*at]).unwrap_or(0),
        };
        let moves = |at: usize, moved: usize| Delete {
            snapshot: row[at],
            bytes_moved_max: sizes[moved],
            bytes_freed_min: 0,
        };
        let upward = (largest..row.len()).map(|at| moves(at, at + 1));
        let downward = (0..largest.min(row.len())).rev().map(|at| moves(at, at));
        upward.chain(downward).collect()
    }
}
