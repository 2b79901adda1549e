//! The snapshot tree: libvirt's semantics, and nothing physical.
//!
//! Several roots are legal, and a deleted name is free again. Parents are the only stored relation;
//! children and descendants are derived.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::domain::RunState;
use crate::event::{Actor, MemoryKind};
use crate::ids::{DiskName, LabelKey, OperationId, SnapshotId, SnapshotName};

/// Labels, by key.
pub type Labels = BTreeMap<LabelKey, String>;

/// A mark that forbids deletion until it is released or expires.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    /// Why.
    pub reason: String,
    /// When it ends by itself; none for never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<Timestamp>,
    /// Who set it.
    pub by: Actor,
}

impl Hold {
    /// Whether it is in force at `at`: its end is later than the moment asked about.
    pub fn in_force(&self, at: Timestamp) -> bool {
        self.until.is_none_or(|until| until > at)
    }
}

/// libvirt's states of a snapshot (`virDomainSnapshotState`), as far as a domain can be in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SnapshotState {
    /// Taken with memory, of a running machine.
    Running,
    /// Taken with memory, of a paused machine.
    Paused,
    /// Taken of a machine that was off.
    Shutoff,
    /// Disks alone, of a machine that was not off.
    DiskSnapshot,
}

impl SnapshotState {
    /// The word that libvirt prints.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Shutoff => "shutoff",
            Self::DiskSnapshot => "disk-snapshot",
        }
    }
}

impl From<RunState> for SnapshotState {
    fn from(state: RunState) -> Self {
        match state {
            RunState::Running => Self::Running,
            RunState::Paused => Self::Paused,
            RunState::Off => Self::Shutoff,
        }
    }
}

/// A snapshot that lives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Its id.
    pub id: SnapshotId,
    /// Its name, unique among the domain's live snapshots.
    pub name: SnapshotName,
    /// Its name at the hypervisor, where that is another one: one that it cannot have here, or that another has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub real_name: Option<String>,
    /// What the user wrote about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// The snapshot that was current when it was taken, or that one's nearest live ancestor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<SnapshotId>,
    /// When it was taken.
    pub created: Timestamp,
    /// The machine's state then.
    pub state: SnapshotState,
    /// Whether and where the machine's memory is kept.
    pub memory: MemoryKind,
    /// The disks that it holds.
    pub disks: BTreeSet<DiskName>,
    /// Labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: Labels,
    /// The mark that forbids its deletion.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold: Option<Hold>,
    /// Who asked for it.
    pub made_by: Actor,
    /// The operation that made it; none for one that somebody else made and Snaptree adopted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made_in: Option<OperationId>,
    /// Whether the hypervisor no longer has it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lost: bool,
    /// The hypervisor's own id, where it keeps a list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub native: Option<String>,
    /// What the machine wrote besides when it was taken, in words: media that are no disk of the domain, and that a
    /// revert leaves as they are.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<String>,
}

impl Snapshot {
    /// Its name at the hypervisor, where that keeps names.
    pub fn name_there(&self) -> &str {
        self.real_name.as_deref().unwrap_or(self.name.as_str())
    }
}

/// All live snapshots of one domain, and which of them is current.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tree {
    /// Shared, since a tree is copied for every look at a domain, and few of its snapshots change.
    #[serde(with = "shared")]
    snapshots: BTreeMap<SnapshotId, Arc<Snapshot>>,
    current: Option<SnapshotId>,
}

/// Shared snapshots are written as if they were not.
mod shared {
    use super::{Arc, BTreeMap, Snapshot, SnapshotId};
    use serde::{Deserialize as _, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(
        snapshots: &BTreeMap<SnapshotId, Arc<Snapshot>>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_map(snapshots.iter().map(|(id, snapshot)| (id, snapshot.as_ref())))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<BTreeMap<SnapshotId, Arc<Snapshot>>, D::Error> {
        let snapshots = BTreeMap::<SnapshotId, Snapshot>::deserialize(deserializer)?;
        Ok(snapshots.into_iter().map(|(id, snapshot)| (id, snapshot.into())).collect())
    }
}

/// Snapshots that make no tree.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// Two of one id, or of one name.
    #[error("there are two snapshots '{0}'")]
    Twice(SnapshotName),
    /// A snapshot that is its own ancestor.
    #[error("snapshot '{0}' is its own ancestor")]
    Loop(SnapshotName),
    /// A parent, or the current snapshot, that is not among them.
    #[error("snapshot {0} is named and not there")]
    Dangling(SnapshotId),
}

impl Tree {
    /// The tree of snapshots that come from outside the log.
    ///
    /// # Errors
    /// They make none.
    pub fn of(
        snapshots: impl IntoIterator<Item = Snapshot>,
        current: Option<SnapshotId>,
    ) -> Result<Self, TreeError> {
        let mut tree = Self { snapshots: BTreeMap::new(), current };
        let mut names = BTreeSet::new();
        for snapshot in snapshots {
            let (id, name) = (snapshot.id, snapshot.name.clone());
            if !names.insert(name.clone()) || tree.snapshots.insert(id, snapshot.into()).is_some() {
                return Err(TreeError::Twice(name));
            }
        }
        let named = tree.iter().filter_map(|snapshot| snapshot.parent).chain(current);
        if let Some(dangling) = named.into_iter().find(|id| !tree.contains(*id)) {
            return Err(TreeError::Dangling(dangling));
        }
        // Whatever cannot be reached from a root hangs in a loop.
        let index = tree.children_index();
        let mut unreached: BTreeSet<SnapshotId> = tree.snapshots.keys().copied().collect();
        let mut open = vec![None];
        while let Some(parent) = open.pop() {
            for child in index.get(&parent).into_iter().flatten() {
                unreached.remove(&child.id);
                open.push(Some(child.id));
            }
        }
        match unreached.first().and_then(|id| tree.get(*id)) {
            Some(looped) => Err(TreeError::Loop(looped.name.clone())),
            None => Ok(tree),
        }
    }

    /// How many snapshots live.
    pub fn len(&self) -> usize {
        self.snapshots.len()
    }

    /// Whether none does.
    pub fn is_empty(&self) -> bool {
        self.snapshots.is_empty()
    }

    /// Whether `id` lives.
    pub fn contains(&self, id: SnapshotId) -> bool {
        self.snapshots.contains_key(&id)
    }

    /// A live snapshot.
    pub fn get(&self, id: SnapshotId) -> Option<&Snapshot> {
        self.snapshots.get(&id).map(AsRef::as_ref)
    }

    /// For what changes in place: name, description, labels, hold.
    pub(crate) fn get_mut(&mut self, id: SnapshotId) -> Option<&mut Snapshot> {
        self.snapshots.get_mut(&id).map(Arc::make_mut)
    }

    /// The snapshot that the machine's state descends from directly.
    pub fn current(&self) -> Option<&Snapshot> {
        self.current.and_then(|id| self.get(id))
    }

    /// All live snapshots, in the order of their ids (thus of their requests).
    pub fn iter(&self) -> impl Iterator<Item = &Snapshot> {
        self.snapshots.values().map(AsRef::as_ref)
    }

    /// The live snapshot of that name.
    pub fn by_name(&self, name: &SnapshotName) -> Option<&Snapshot> {
        self.iter().find(|snapshot| snapshot.name == *name)
    }

    /// The snapshots without a parent, in the order of their names.
    pub fn roots(&self) -> Vec<&Snapshot> {
        self.sorted(|snapshot| snapshot.parent.is_none())
    }

    /// The direct children of `id`, in the order of their names.
    pub fn children(&self, id: SnapshotId) -> Vec<&Snapshot> {
        self.sorted(|snapshot| snapshot.parent == Some(id))
    }

    /// Parent to children, for walks over the whole tree; roots stand under `None`. Children are in name order.
    pub fn children_index(&self) -> BTreeMap<Option<SnapshotId>, Vec<&Snapshot>> {
        let mut index: BTreeMap<Option<SnapshotId>, Vec<&Snapshot>> = BTreeMap::new();
        for snapshot in self.iter() {
            index.entry(snapshot.parent).or_default().push(snapshot);
        }
        index.values_mut().for_each(|children| children.sort_by(|a, b| a.name.cmp(&b.name)));
        index
    }

    /// All snapshots below `id`, children before their parents, `id` itself not among them.
    ///
    /// ```
    /// # use snaptree_engine::tree::Tree;
    /// # use snaptree_engine::SnapshotId;
    /// // An unknown snapshot has none.
    /// let id = SnapshotId::from_uuid(uuid::Uuid::now_v7());
    /// assert!(Tree::default().descendants(id).is_empty());
    /// ```
    pub fn descendants(&self, id: SnapshotId) -> Vec<SnapshotId> {
        let index = self.children_index();
        let mut found = Vec::new();
        let mut open = vec![id];
        while let Some(parent) = open.pop() {
            for child in index.get(&Some(parent)).into_iter().flatten() {
                found.push(child.id);
                open.push(child.id);
            }
        }
        // Found parents first; a delete goes the other way.
        found.reverse();
        found
    }

    /// `id`'s ancestors, nearest first.
    pub fn ancestors(&self, id: SnapshotId) -> impl Iterator<Item = &Snapshot> {
        let parent_of = move |id| self.get(id).and_then(|s| s.parent).and_then(|p| self.get(p));
        std::iter::successors(parent_of(id), move |snapshot| parent_of(snapshot.id)).take(self.len())
    }

    fn sorted(&self, keep: impl Fn(&Snapshot) -> bool) -> Vec<&Snapshot> {
        let mut kept: Vec<&Snapshot> = self.iter().filter(|snapshot| keep(snapshot)).collect();
        kept.sort_by(|a, b| a.name.cmp(&b.name));
        kept
    }

    /// Created: it becomes current, and its parent is the old current.
    pub(crate) fn create(&mut self, mut snapshot: Snapshot) {
        snapshot.parent = self.current;
        self.current = Some(snapshot.id);
        self.snapshots.insert(snapshot.id, snapshot.into());
    }

    /// Adopted: it stands where the hypervisor has it, and `children` stand upon it from now on.
    pub(crate) fn adopt(&mut self, mut snapshot: Snapshot, children: &[SnapshotId]) {
        snapshot.parent = snapshot.parent.filter(|parent| self.contains(*parent));
        let above: BTreeSet<SnapshotId> = std::iter::once(snapshot.id)
            .chain(snapshot.parent)
            .chain(snapshot.parent.iter().flat_map(|parent| self.ancestors(*parent).map(|up| up.id)))
            .collect();
        for child in children.iter().filter(|child| !above.contains(child)) {
            if let Some(child) = self.get_mut(*child) {
                child.parent = Some(snapshot.id);
            }
        }
        self.snapshots.insert(snapshot.id, snapshot.into());
    }

    /// Reverted: it becomes current, parents stay.
    pub(crate) fn revert(&mut self, id: SnapshotId) {
        if self.contains(id) {
            self.current = Some(id);
        }
    }

    /// Deleted: its children move to its parent; if it was current, its parent is.
    pub(crate) fn delete(&mut self, id: SnapshotId) {
        let Some(deleted) = self.snapshots.remove(&id) else { return };
        for snapshot in self.snapshots.values_mut() {
            if snapshot.parent == Some(id) {
                Arc::make_mut(snapshot).parent = deleted.parent;
            }
        }
        if self.current == Some(id) {
            self.current = deleted.parent;
        }
    }
}
