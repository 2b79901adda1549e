//! Snapshots and domains as they are shown: the shapes of the JSON documents.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::Serialize;
use snaptree_drivers::qemu::{MachineFacts, Runs, machine_of};
use snaptree_drivers::virtualbox;
use snaptree_engine::domain::{Domain, RunState};
use snaptree_engine::event::{Actor, MemoryKind};
use snaptree_engine::layer::{DiskLayers, Layer, MemoryWay, Role};
use snaptree_engine::log::ClockOrder;
use snaptree_engine::operation::{Failure, Request};
use snaptree_engine::project::DomainState;
use snaptree_engine::reconcile::drift::Finding;
use snaptree_engine::reconcile::space::{Frees, Occupied};
use snaptree_engine::tree::{Hold, Labels, Snapshot};
use snaptree_engine::{DiskName, LayerId, OperationId, SnapshotId};

use crate::context::Prefix;

/// Whether a snapshot can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PhaseWord {
    /// It can.
    Ready,
    /// Its delete was asked for.
    Deleting,
    /// The hypervisor no longer has it.
    Lost,
    /// It is deleted, and its data is still there.
    Tombstone,
}

/// A snapshot in `list`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SnapshotView {
    /// Its id.
    pub id: SnapshotId,
    /// Its name.
    pub name: String,
    /// Its name at the hypervisor, where that is another one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub real_name: Option<String>,
    /// What the user wrote about it.
    pub description: Option<String>,
    /// Its parent's name; for a tombstone, the live snapshot that its data is built upon.
    pub parent: Option<String>,
    /// Its children's names.
    pub children: Vec<String>,
    /// Whether it is the current one.
    pub current: bool,
    /// The machine's state when it was taken.
    pub state: Option<&'static str>,
    /// When it was taken.
    pub created: Option<Timestamp>,
    /// Labels.
    pub labels: Labels,
    /// Whether a hold is in force.
    pub held: bool,
    /// Whether it can be used.
    pub phase: PhaseWord,
    /// For a tombstone: why its data is still there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// For a tombstone: when it was deleted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deleted: Option<Timestamp>,
    /// Bytes that its layers occupy; none if they cannot be seen.
    pub allocated: Option<u64>,
    /// What deleting it would free; none for a tombstone, and where its layers cannot be seen.
    pub frees: Option<FreesView>,
}

/// What a delete frees, once the data is merged: an estimate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct FreesView {
    /// At least so many bytes; negative where copies into several children may take more than it frees.
    pub at_least: i64,
    /// At most so many bytes.
    pub at_most: u64,
}

impl From<Frees> for FreesView {
    fn from(frees: Frees) -> Self {
        Self { at_least: frees.at_least_bytes, at_most: frees.at_most_bytes }
    }
}

/// What `--at` came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct AtView {
    /// The last event that counts.
    pub seq: u64,
    /// Whether the clock was monotone up to there.
    pub clock: &'static str,
}

impl AtView {
    /// None for now.
    pub fn of(prefix: Prefix) -> Option<Self> {
        let clock = match prefix.clock? {
            ClockOrder::Monotone => "monotone",
            ClockOrder::WentBack => "went-back",
        };
        Some(Self { seq: prefix.seq, clock })
    }
}

/// The document of `list` and `tree`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ListView {
    /// The domain's name.
    pub domain: String,
    /// The current snapshot's name.
    pub current: Option<String>,
    /// The snapshots, in the order in which they were taken, or as was asked for.
    pub snapshots: Vec<SnapshotView>,
    /// The moment asked about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at: Option<AtView>,
}

/// A layer file of a snapshot, in `show`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DiskView {
    /// The disk's name.
    pub name: DiskName,
    /// The file that the snapshot's content is in.
    pub file: Option<PathBuf>,
    /// What the guest sees as the disk's size.
    pub virtual_size: Option<u64>,
    /// Bytes that the file occupies, if it can be seen.
    pub allocated: Option<u64>,
}

/// A memory file, in `show` and `domain show`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryView {
    /// Whose memory it is.
    pub snapshot: SnapshotId,
    /// The file.
    pub file: PathBuf,
    /// Its length in bytes.
    pub size: u64,
    /// Bytes that it occupies, if it can be seen.
    pub allocated: Option<u64>,
    /// How it was taken: `background`, or `stopped` where the guest was stopped until it was written.
    pub way: MemoryWay,
}

impl MemoryView {
    /// The memory of a snapshot, where it is in a file of its own.
    pub fn of(state: &DomainState, snapshot: SnapshotId, files: Files) -> Option<Self> {
        let memory = state.layers.memory.get(&snapshot)?;
        Some(Self {
            snapshot,
            file: memory.file.clone(),
            size: memory.stamp.size_bytes,
            allocated: Some(&memory.file).filter(|_| files == Files::Seen).and_then(|file| allocated(file)),
            way: memory.way,
        })
    }
}

/// The document of `show`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ShowView {
    /// The domain's name.
    pub domain: String,
    /// What `list` shows.
    #[serde(flatten)]
    pub snapshot: SnapshotView,
    /// Whether and where the machine's memory is kept.
    pub memory: MemoryKind,
    /// The file that it is kept in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_file: Option<MemoryView>,
    /// The disks that it holds.
    pub disks: Vec<DiskView>,
    /// What the machine wrote besides when it was taken.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<String>,
    /// Who asked for it.
    pub made_by: Actor,
    /// The operation that made it.
    pub operation: Option<OperationId>,
    /// The hold, also one that is over.
    pub hold: Option<Hold>,
    /// The moment asked about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at: Option<AtView>,
}

/// A domain in `domain list` and `domain show`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DomainView {
    /// All that the log says of it.
    #[serde(flatten)]
    pub domain: Domain,
    /// How many snapshots it has.
    pub snapshots: usize,
    /// The current one's name.
    pub current: Option<String>,
    /// How many deleted snapshots' data is still there.
    pub tombstones: usize,
    /// Operations that are not over.
    pub open_operations: Vec<OperationId>,
    /// The files that Snaptree answers for, disk by disk.
    pub layers: Vec<LayerView>,
    /// The files in which the memory of snapshots is kept.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub memory: Vec<MemoryView>,
    /// Who runs its machine, where one domain is looked at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub machine: Option<MachineView>,
    /// Where hypervisor and log disagree, as far as it is known: what `drift` wrote down, and what can be seen at once.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub drift: BTreeSet<Finding>,
}

/// Who runs a machine.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MachineView {
    /// `apart`, `attached`, `commands`, `managed`.
    pub run_by: &'static str,
    /// QEMU's QMP socket.
    pub qmp: Option<PathBuf>,
    /// The guest agent's socket.
    pub agent: Option<PathBuf>,
    /// Whether somebody is at work with it, also where its guest is paused; none if that cannot be seen.
    pub running: Option<bool>,
    /// What it does; none if that cannot be seen.
    pub now: Option<RunState>,
}

impl From<MachineFacts> for MachineView {
    fn from(facts: MachineFacts) -> Self {
        let run_by = match facts.runs {
            Runs::Apart => "apart",
            Runs::Attached { .. } => "attached",
            Runs::Commands { .. } => "commands",
            Runs::Managed { .. } => "managed",
        };
        let qmp = facts.runs.qmp().map(PathBuf::from);
        Self {
            run_by,
            qmp,
            agent: facts.agent,
            running: facts.now.map(|now| now != RunState::Off),
            now: facts.now,
        }
    }
}

/// One file of a domain.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerView {
    /// The disk.
    pub disk: DiskName,
    /// The layer's id.
    pub layer: LayerId,
    /// The file.
    pub file: PathBuf,
    /// The layer that it is built upon.
    pub parent: Option<LayerId>,
    /// What it stands for.
    pub role: &'static str,
    /// The snapshot that it reads as, alive or deleted.
    pub snapshot: Option<SnapshotId>,
}

/// The layer graph, disk by disk.
fn layers(state: &DomainState) -> Vec<LayerView> {
    let of_disk = |(disk, layers): (&DiskName, &DiskLayers)| -> Vec<LayerView> {
        let view = |(id, layer): (&LayerId, &Layer)| LayerView {
            disk: disk.clone(),
            layer: id.clone(),
            file: layer.file.clone(),
            parent: layer.parent.clone(),
            role: match layers.role(id, &state.tree) {
                Role::Active => "active",
                Role::Frozen(_) => "frozen",
                Role::Tombstone(_) => "tombstone",
            },
            snapshot: layer.snapshot,
        };
        layers.layers.iter().map(view).collect()
    };
    state.layers.disks.iter().flat_map(of_disk).collect()
}

impl DomainView {
    /// With who runs its machine, which is looked at. None for a domain that was never registered.
    pub async fn with_machine(state: &DomainState) -> Option<Self> {
        let machine = machine_of(state).await.map(MachineView::from);
        let mut view = Self { machine, ..Self::of(state)? };
        if let Some(disks) = virtualbox::disks_now(state) {
            view.domain.disks = disks;
        }
        if let Some(Failure { message: why, hint: help, .. }) = virtualbox::gone(state) {
            view.drift.insert(Finding::MachineGone { why, help });
        }
        Some(view)
    }

    /// None for a domain that was never registered.
    pub fn of(state: &DomainState) -> Option<Self> {
        Some(Self {
            domain: state.domain.clone()?,
            snapshots: state.tree.len(),
            current: current_name(state),
            tombstones: state.tombstones.len(),
            open_operations: state.open.iter().map(|operation| operation.id).collect(),
            layers: layers(state),
            memory: state
                .layers
                .memory
                .keys()
                .filter_map(|id| MemoryView::of(state, *id, Files::Unseen))
                .collect(),
            machine: None,
            drift: state.drift.clone(),
        })
    }
}

/// The name of a domain, for messages.
pub fn domain_name(state: &DomainState) -> String {
    state.domain.as_ref().map_or_else(|| "?".to_owned(), |domain| domain.name.to_string())
}

/// The current snapshot's name.
pub fn current_name(state: &DomainState) -> Option<String> {
    state.tree.current().map(|snapshot| snapshot.name.to_string())
}

/// Which snapshots are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// Those that live.
    Live,
    /// And those that were deleted and whose data is still there.
    All,
}

/// Whether the files are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Files {
    /// They are: the answer is about now.
    Seen,
    /// They are not.
    Unseen,
}

/// The snapshots of a domain, in the order in which they were taken.
pub fn snapshots(state: &DomainState, at: Timestamp, which: Which, files: Files) -> Vec<SnapshotView> {
    let index = state.tree.children_index();
    let occupied = occupied(state, files);
    let mut views: Vec<SnapshotView> = state
        .tree
        .iter()
        .map(|snapshot| {
            let children = index.get(&Some(snapshot.id)).map_or(&[][..], Vec::as_slice);
            live(state, snapshot, children, at, &occupied)
        })
        .collect();
    if which == Which::All {
        views.extend(tombstones(state, &occupied));
    }
    views.sort_by(|a, b| taken(a).cmp(&taken(b)).then(a.name.cmp(&b.name)).then(a.id.cmp(&b.id)));
    views
}

/// When a snapshot was taken; of a tombstone, when it was deleted.
fn taken(snapshot: &SnapshotView) -> Option<Timestamp> {
    snapshot.created.or(snapshot.deleted)
}

/// A live snapshot.
pub fn live(
    state: &DomainState,
    snapshot: &Snapshot,
    children: &[&Snapshot],
    at: Timestamp,
    occupied: &Occupied<'_>,
) -> SnapshotView {
    let parent = snapshot.parent.and_then(|id| state.tree.get(id));
    SnapshotView {
        id: snapshot.id,
        name: snapshot.name.to_string(),
        description: snapshot.description.clone(),
        parent: parent.map(|parent| parent.name.to_string()),
        real_name: snapshot.real_name.clone(),
        children: children.iter().map(|child| child.name.to_string()).collect(),
        current: state.tree.current().is_some_and(|current| current.id == snapshot.id),
        state: Some(snapshot.state.as_str()),
        created: Some(snapshot.created),
        labels: snapshot.labels.clone(),
        held: snapshot.hold.as_ref().is_some_and(|hold| hold.in_force(at)),
        phase: phase(state, snapshot),
        reason: None,
        deleted: None,
        allocated: occupied.allocated_bytes(snapshot.id),
        frees: occupied.frees(&[snapshot.id]).map(FreesView::from),
    }
}

fn phase(state: &DomainState, snapshot: &Snapshot) -> PhaseWord {
    let deleting = state.open.iter().any(|operation| {
        matches!(&operation.request, Request::Delete(request) if request.snapshots.contains(&snapshot.id))
    });
    match (snapshot.lost, deleting) {
        (true, _) => PhaseWord::Lost,
        (false, true) => PhaseWord::Deleting,
        (false, false) => PhaseWord::Ready,
    }
}

fn tombstones(state: &DomainState, occupied: &Occupied<'_>) -> Vec<SnapshotView> {
    let view = |(id, stone): (&SnapshotId, &snaptree_engine::project::Tombstone)| SnapshotView {
        id: *id,
        name: stone.name.to_string(),
        real_name: None,
        description: None,
        parent: built_upon(state, *id).map(|snapshot| snapshot.name.to_string()),
        children: Vec::new(),
        current: false,
        state: None,
        created: None,
        labels: Labels::new(),
        held: false,
        phase: PhaseWord::Tombstone,
        reason: Some(stone.deferred.clone().unwrap_or_else(|| "not merged yet".to_owned())),
        deleted: Some(stone.deleted),
        allocated: occupied.allocated_bytes(*id),
        frees: None,
    };
    state.tombstones.iter().map(view).collect()
}

/// The nearest live snapshot below a tombstone, in the layer graph.
fn built_upon(state: &DomainState, id: SnapshotId) -> Option<&Snapshot> {
    state.layers.disks.values().find_map(|disk| {
        let (layer, _) = disk.layer_of(id)?;
        let below = disk.chain(layer).into_iter().skip(1).filter_map(|layer| disk.layers.get(layer));
        below.filter_map(|layer| layer.snapshot).find_map(|snapshot| state.tree.get(snapshot))
    })
}

/// What the layers occupy, as far as they can be seen.
pub fn occupied(state: &DomainState, files: Files) -> Occupied<'_> {
    Occupied::new(state, |file| if files == Files::Seen { allocated(file) } else { None })
}

fn allocated(file: &Path) -> Option<u64> {
    std::fs::metadata(file).ok().map(|found| found.blocks() * 512)
}

/// The disks that a snapshot holds, with the files that its content is in.
pub fn disks(state: &DomainState, snapshot: &Snapshot, files: Files) -> Vec<DiskView> {
    let view = |name: &DiskName| {
        let layer = state.layers.disks.get(name).and_then(|disk: &DiskLayers| disk.layer_of(snapshot.id));
        let file = layer.map(|(_, layer)| layer.file.clone());
        let seen = file.as_deref().filter(|_| files == Files::Seen);
        DiskView {
            name: name.clone(),
            allocated: seen.and_then(allocated),
            virtual_size: layer.map(|(_, layer)| layer.virtual_size_bytes),
            file,
        }
    };
    snapshot.disks.iter().map(view).collect()
}
