//! The manifest beside the layers: enough to find every snapshot's files without the log.
//!
//! It says what will be true once its generation is switched on, so a log that was restored from a backup can be
//! compared with what is on disk.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use snaptree_engine::driver::StepContext;
use snaptree_engine::event::Actor;
use snaptree_engine::layer::LayerGraph;
use snaptree_engine::operation::Request;
use snaptree_engine::tree::{Hold, Labels, Snapshot, SnapshotState, Tree};
use snaptree_engine::{DiskName, DomainId, DomainName, OperationId, SnapshotId, SnapshotName};

/// The version of the file's form.
pub(super) const FORMAT: u32 = 1;
/// Largest manifest that is read, in bytes.
pub(super) const BYTES_MAX: u64 = 64 << 20;

/// `manifest.json` of a generation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// The version of this form.
    pub format: u32,
    /// The domain.
    pub domain: DomainId,
    /// Its name.
    pub name: DomainName,
    /// The operation that made the generation.
    pub operation: OperationId,
    /// Its step.
    pub step: usize,
    /// The last event of the log then.
    pub head: ManifestHead,
    /// The current snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub current: Option<SnapshotId>,
    /// What each disk opens.
    pub disks: BTreeMap<DiskName, PathBuf>,
    /// Every live snapshot and tombstone.
    pub snapshots: Vec<ManifestSnapshot>,
    /// The files as the log has them, without their stamps.
    pub layers: LayerGraph,
}

/// The last event of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestHead {
    /// Its place.
    pub seq: u64,
    /// Its hash (hex).
    pub hash: String,
}

/// A snapshot in a [`Manifest`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ManifestSnapshot {
    /// Its id.
    pub id: SnapshotId,
    /// Its name.
    pub name: SnapshotName,
    /// The nearest ancestor that lives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<SnapshotId>,
    /// When it was taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<Timestamp>,
    /// The machine's state then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<SnapshotState>,
    /// What the user wrote about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Labels.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// The mark that forbids its deletion.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold: Option<Hold>,
    /// Who asked for it, and in which operation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made: Option<(Actor, Option<OperationId>)>,
    /// The file that reads as it, per disk.
    pub files: BTreeMap<DiskName, PathBuf>,
    /// Whether it is deleted, and only its data is still there.
    pub tombstone: bool,
}

/// Whether the generation brings about what the operation was asked for, or only prepares or follows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// It does.
    Request,
    /// It does not.
    None,
    /// It makes the layers of a snapshot that has not come to be before its memory is whole: until then what is there
    /// of it is a tombstone.
    Remains,
}

impl Manifest {
    /// The manifest of the generation that `context`'s step makes, when the layer graph is `after` then.
    pub(super) fn new(
        context: &StepContext<'_>,
        (domain, name): (DomainId, DomainName),
        after: &LayerGraph,
        effect: Effect,
    ) -> Self {
        let state = context.state;
        let deleted: BTreeSet<SnapshotId> = match context.request {
            Request::Delete(request) if effect == Effect::Request => {
                request.snapshots.iter().copied().collect()
            }
            _ => BTreeSet::new(),
        };
        let mut snapshots: Vec<ManifestSnapshot> = state
            .tree
            .iter()
            .map(|snapshot| of_live(snapshot, &state.tree, &deleted, after))
            .filter(|snapshot| !snapshot.tombstone || !snapshot.files.is_empty())
            .collect();
        snapshots.extend(state.tombstones.iter().filter_map(|(id, tombstone)| {
            let files = files(*id, after);
            (!files.is_empty() && !state.tree.contains(*id)).then(|| remains(*id, &tombstone.name, after))
        }));
        let mut current = nearest_live(state.tree.current().map(|s| s.id), &state.tree, &deleted);
        match context.request {
            Request::Create(request) if effect == Effect::Request => {
                snapshots.push(ManifestSnapshot {
                    id: request.snapshot,
                    name: request.name.clone(),
                    parent: current,
                    created: Some(context.now),
                    state: Some(state_of(context).unwrap_or(SnapshotState::Shutoff)),
                    description: request.description.clone(),
                    labels: request.labels.clone(),
                    hold: None,
                    made: made_by(context),
                    files: files(request.snapshot, after),
                    tombstone: false,
                });
                current = Some(request.snapshot);
            }
            Request::Create(request) if effect == Effect::Remains => {
                snapshots.push(remains(request.snapshot, &request.name, after));
            }
            Request::Revert(request) if effect == Effect::Request => current = Some(request.snapshot),
            _ => {}
        }
        let mut layers = after.clone();
        layers.memory.retain(|id, _| !deleted.contains(id));
        Self {
            format: FORMAT,
            domain,
            name,
            operation: context.operation,
            step: context.index,
            head: ManifestHead { seq: context.head.seq, hash: context.head.hash.to_string() },
            current,
            disks: links(after),
            snapshots,
            layers,
        }
    }
}

/// What is left of a snapshot that is not in the tree.
fn remains(id: SnapshotId, name: &SnapshotName, after: &LayerGraph) -> ManifestSnapshot {
    ManifestSnapshot {
        id,
        name: name.clone(),
        parent: None,
        created: None,
        state: None,
        description: None,
        labels: Labels::new(),
        hold: None,
        made: None,
        files: files(id, after),
        tombstone: true,
    }
}

/// The state of the machine that the snapshot was taken of, where an earlier step learnt it.
fn state_of(context: &StepContext<'_>) -> Option<SnapshotState> {
    context.state.operation(context.operation)?.learnt.state
}

/// Who asked for what is being carried out.
fn made_by(context: &StepContext<'_>) -> Option<(Actor, Option<OperationId>)> {
    let operation = context.state.operation(context.operation)?;
    Some((operation.actor.clone(), Some(operation.id)))
}

/// What each disk opens.
pub(super) fn links(graph: &LayerGraph) -> BTreeMap<DiskName, PathBuf> {
    let active = graph.disks.iter().filter_map(|(name, disk)| Some((name, disk.active_layer()?.1)));
    active.map(|(name, layer)| (name.clone(), layer.file.clone())).collect()
}

fn files(snapshot: SnapshotId, graph: &LayerGraph) -> BTreeMap<DiskName, PathBuf> {
    let held = graph.disks.iter().filter_map(|(name, disk)| Some((name, disk.layer_of(snapshot)?.1)));
    held.map(|(name, layer)| (name.clone(), layer.file.clone())).collect()
}

fn of_live(
    snapshot: &Snapshot,
    tree: &Tree,
    deleted: &BTreeSet<SnapshotId>,
    after: &LayerGraph,
) -> ManifestSnapshot {
    ManifestSnapshot {
        id: snapshot.id,
        name: snapshot.name.clone(),
        parent: nearest_live(snapshot.parent, tree, deleted),
        created: Some(snapshot.created),
        state: Some(snapshot.state),
        description: snapshot.description.clone(),
        labels: snapshot.labels.clone(),
        hold: snapshot.hold.clone(),
        made: Some((snapshot.made_by.clone(), snapshot.made_in)),
        files: files(snapshot.id, after),
        tombstone: deleted.contains(&snapshot.id),
    }
}

/// `id`, or its nearest ancestor that is not deleted.
fn nearest_live(id: Option<SnapshotId>, tree: &Tree, deleted: &BTreeSet<SnapshotId>) -> Option<SnapshotId> {
    let id = id?;
    if !deleted.contains(&id) {
        return Some(id);
    }
    tree.ancestors(id).map(|ancestor| ancestor.id).find(|ancestor| !deleted.contains(ancestor))
}
