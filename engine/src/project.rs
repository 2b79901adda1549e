//! What is true now: the projection of one domain's stream.
//!
//! Architecture Invariant: [`DomainState::apply`] is total. A recorded event never fails to apply; one that
//! contradicts an operation's history is kept in [`DomainState::illegal`], and loading the domain is refused.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::around::HookStages;
use crate::domain::Domain;
use crate::driver::{Learnt, SeenSnapshot};
use crate::event::{
    Actor, DeleteWhat, Envelope, Event, MergeWish, Place, SnapshotDeleteRequested, SnapshotDeleted,
    SystemRestored,
};
use crate::ids::{DiskName, OperationId, SnapshotId, SnapshotName};
use crate::layer::{LayerChange, LayerGraph};
use crate::operation::{IllegalHistory, Operation, Phase, Poison, Request, Verdict};
use crate::reconcile::drift::Finding;
use crate::tree::{Snapshot, Tree};

/// The version of this projector. A checkpoint of another version is dropped.
pub const PROJECTOR: u32 = 5;

/// A deleted snapshot whose data the hypervisor still holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tombstone {
    /// The name that it had; free again since.
    pub name: SnapshotName,
    /// When it was deleted.
    pub deleted: Timestamp,
    /// Who deleted it.
    pub deleted_by: Actor,
    /// The event that deleted it; the cause of its merge.
    pub seq: u64,
    /// The hypervisor's own id of it, where it keeps a list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub native: Option<String>,
    /// When its data was asked to be folded away.
    pub wish: MergeWish,
    /// What somebody else keeps inside its layers and may go with them, by its name there.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub give_up: BTreeSet<String>,
    /// Why it is not folded away yet, if that was found out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deferred: Option<String>,
}

/// How a snapshot that Snaptree was told to forget is known again in the hypervisor's list.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Forgotten {
    /// By our mark.
    Marked(SnapshotId),
    /// By the hypervisor's own id.
    Native(String),
}

/// Where what is left of a deleted snapshot would be.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Remains {
    /// In layers, if any are its own.
    InLayers,
    /// In the hypervisor's list.
    Listed,
}

/// When a snapshot was taken, by the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dated {
    /// The event that made it known. Of two snapshots the one with the greater is the later, whatever clocks said.
    pub seq: u64,
    /// When it was taken. What a hypervisor's own clock says counts as far as it lies between the request and the
    /// record of it, so that a host whose clock is wrong dates nothing.
    pub at: Timestamp,
}

/// Whether the hypervisor has a snapshot.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Presence {
    There,
    Lost,
}

/// One domain, as the log tells it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DomainState {
    /// What it is; none before it was registered.
    pub domain: Option<Domain>,
    /// Whether Snaptree still looks after it.
    pub registered: bool,
    /// Its snapshots.
    pub tree: Tree,
    /// When each of them was taken, by the log.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub dated: BTreeMap<SnapshotId, Dated>,
    /// Its files.
    pub layers: LayerGraph,
    /// The operations without an outcome, in the order of their requests.
    pub open: Vec<Operation>,
    /// Deleted snapshots whose data is still there.
    pub tombstones: BTreeMap<SnapshotId, Tombstone>,
    /// The head of a lost log whose outcome was taken over last: its sequence number and its hash (hex).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restored_from: Option<(u64, String)>,
    /// Snapshots whose metadata alone was deleted: what the hypervisor still has of them is none of ours.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub forgotten: BTreeSet<Forgotten>,
    /// Where the hypervisor and the log disagreed when that was last looked at.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub drift: BTreeSet<Finding>,
    /// The version of the last event applied.
    pub version: u64,
    /// Its place in the log.
    pub seq: u64,
    /// The first event that could not follow, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub illegal: Option<IllegalHistory>,
}

impl DomainState {
    /// What a revert to a snapshot leaves as it is, in words: disks that came to the domain, or were taken from it, since.
    pub fn left_by_revert(&self, snapshot: SnapshotId) -> Vec<String> {
        let (Some(domain), Some(snapshot)) = (&self.domain, self.tree.get(snapshot)) else {
            return Vec::new();
        };
        if domain.capabilities.merges_itself {
            // It has the machine's whole list of devices in its snapshots; what it would detach is lost.
            return domain.left_out();
        }
        let has = |name: &DiskName| domain.disks.iter().any(|disk| disk.name == *name);
        let added = domain.disks.iter().filter(|disk| !snapshot.disks.contains(&disk.name));
        let added = added.map(|disk| format!("disk '{}', which the snapshot does not hold", disk.name));
        let removed = snapshot.disks.iter().filter(|name| !has(name));
        let removed = removed.map(|name| format!("disk '{name}', which the domain has no more"));
        added.chain(removed).collect()
    }

    /// Applies the next event of the stream.
    pub fn apply(&mut self, envelope: &Envelope) {
        self.version = envelope.version;
        self.seq = envelope.seq;
        if let Some(request) = Request::of(&envelope.event) {
            self.begin(envelope, request);
            return;
        }
        match &envelope.event {
            Event::DomainRegistered(e) => {
                self.domain = Some(e.domain.clone());
                self.registered = true;
            }
            Event::DomainChanged(e) => {
                if let Some(domain) = &mut self.domain {
                    if let Some(name) = &e.name {
                        domain.name = name.clone();
                    }
                    if let Some(labels) = &e.labels {
                        domain.labels.clone_from(labels);
                    }
                    if let Some(access) = &e.access {
                        domain.config.clone_from(&access.config);
                        domain.capabilities.clone_from(&access.capabilities);
                        if let Some(disks) = &access.disks {
                            domain.disks.clone_from(disks);
                        }
                    }
                    if let Some(disks) = &e.disks {
                        domain.disks.clone_from(disks);
                    }
                }
            }
            Event::DomainUnregistered(_) => self.registered = false,
            Event::SnapshotCreated(e) => {
                self.dated.insert(e.snapshot.id, self.dated(envelope, &e.snapshot));
                self.tree.create(e.snapshot.clone());
            }
            Event::SnapshotReverted(e) => self.tree.revert(e.snapshot),
            Event::SnapshotAdopted(e) => {
                let dated = Dated { seq: envelope.seq, at: e.snapshot.created };
                self.dated.insert(e.snapshot.id, dated);
                self.tree.adopt(e.known(), &e.children);
            }
            Event::SystemRestored(e) => self.restore(envelope, e),
            Event::SnapshotDeleted(e) => self.delete(envelope, e),
            Event::SnapshotEdited(_) | Event::SnapshotHeld(_) | Event::SnapshotReleased(_) => {
                self.mark(&envelope.event);
            }
            Event::MergeDeferred(e) => {
                if let Some(tombstone) = self.tombstones.get_mut(&e.snapshot) {
                    tombstone.deferred = Some(e.reason.clone());
                }
            }
            Event::DriftFound(e) => {
                self.mark_lost(&e.finding, Presence::Lost);
                self.drift.insert(e.finding.clone());
            }
            Event::DriftCleared(e) => {
                self.mark_lost(&e.finding, Presence::There);
                self.drift.remove(&e.finding);
            }
            Event::MergeFinished(e) => self.folded(&e.snapshots),
            Event::DomainRepaired(_)
            | Event::SystemOpened(_)
            | Event::SystemRecovered(_)
            | Event::CheckpointKept(_) => {}
            _ => self.advance(envelope),
        }
    }

    /// Applies events in order.
    pub fn apply_all<'a>(&mut self, envelopes: impl IntoIterator<Item = &'a Envelope>) {
        envelopes.into_iter().for_each(|envelope| self.apply(envelope));
    }

    fn dated(&self, envelope: &Envelope, snapshot: &Snapshot) -> Dated {
        let open = self.open.iter().find(|open| Some(open.id) == envelope.operation);
        let requested = open.map(|open| open.requested).filter(|requested| *requested <= envelope.at);
        let at = snapshot.created.clamp(requested.unwrap_or(envelope.at), envelope.at);
        Dated { seq: envelope.seq, at }
    }

    fn begin(&mut self, envelope: &Envelope, request: Request) {
        let Some(id) = envelope.operation else { return };
        self.open.push(Operation {
            id,
            request,
            seq: envelope.seq,
            requested: envelope.at,
            actor: envelope.actor.clone(),
            cause: envelope.cause,
            steps: Vec::new(),
            phase: Phase::Requested,
            attempts: 0,
            learnt: Learnt::default(),
            stages: HookStages::default(),
        });
    }

    /// An `Operation.*` event.
    fn advance(&mut self, envelope: &Envelope) {
        let Some(position) = self.open.iter().position(|open| Some(open.id) == envelope.operation) else {
            self.illegal = self.illegal.take().or_else(|| {
                Some(IllegalHistory {
                    operation: envelope.operation.unwrap_or(OperationId::from_uuid(uuid::Uuid::nil())),
                    phase: "no request".to_owned(),
                    event: envelope.event.kind().to_owned(),
                    seq: envelope.seq,
                })
            });
            return;
        };
        let in_hand = self.open[position].step_in_hand();
        if let Err(illegal) = self.open[position].apply(&envelope.event, envelope.seq) {
            self.illegal.get_or_insert(illegal);
            return;
        }
        let done = match &envelope.event {
            Event::OperationStepFinished(e) => Some(e.step),
            Event::OperationResolved(e) if e.verdict == Verdict::Done => in_hand,
            _ => None,
        };
        if let Some(Poison::AtStart(gone)) =
            done.and_then(|step| self.open[position].steps.get(step)).map(|step| step.poison.clone())
        {
            self.folded(&gone);
        }
        match &envelope.event {
            Event::OperationStepFinished(e) => self.change_layers(&e.changes),
            Event::OperationUndoFinished(e) => self.change_layers(&e.changes),
            Event::OperationResolved(e) => self.change_layers(&e.changes),
            _ => {}
        }
        if self.open[position].phase.is_ended() {
            let ended = self.open.remove(position);
            self.bury_unborn(envelope, &ended);
        }
    }

    /// A create that failed after it had taken effect: what the layers hold of its snapshot is a tombstone.
    fn bury_unborn(&mut self, envelope: &Envelope, ended: &Operation) {
        let Request::Create(request) = &ended.request else { return };
        let id = request.snapshot;
        let stands = self.layers.disks.values().any(|disk| disk.layer_of(id).is_some());
        if stands && !self.tree.contains(id) {
            let tombstone = Tombstone {
                name: request.name.clone(),
                deleted: envelope.at,
                deleted_by: envelope.actor.clone(),
                seq: envelope.seq,
                wish: MergeWish::Auto,
                give_up: BTreeSet::new(),
                native: None,
                deferred: None,
            };
            self.tombstones.insert(id, tombstone);
        }
    }

    fn change_layers(&mut self, changes: &[LayerChange]) {
        changes.iter().for_each(|change| self.layers.apply(change));
        if !changes.is_empty() {
            let held: BTreeSet<SnapshotId> = self
                .layers
                .disks
                .values()
                .flat_map(|disk| disk.layers.values().filter_map(|layer| layer.snapshot))
                .collect();
            self.tombstones.retain(|id, _| held.contains(id));
        }
    }

    /// A hypervisor that merges by itself has done so with the data of these.
    fn folded(&mut self, snapshots: &[SnapshotId]) {
        if self.domain.as_ref().is_some_and(|domain| domain.capabilities.merges_itself) {
            self.tombstones.retain(|id, _| !snapshots.contains(id));
        }
    }

    fn delete(&mut self, envelope: &Envelope, deleted: &SnapshotDeleted) {
        let id = deleted.snapshot;
        let open = self.open.iter().find(|open| Some(open.id) == envelope.operation);
        let (wish, what) = match open.map(|open| &open.request) {
            Some(Request::Delete(request)) => (request.merge, request.what),
            _ => (MergeWish::Auto, DeleteWhat::Snapshot),
        };
        if what == DeleteWhat::Metadata {
            self.forgotten.insert(Forgotten::Marked(id));
            let native = self.tree.get(id).and_then(|snapshot| snapshot.native.clone());
            self.forgotten.extend(native.map(Forgotten::Native));
        }
        let by = (&envelope.actor, envelope.at, envelope.seq);
        let give_up = match open.map(|open| &open.request) {
            Some(Request::Delete(request)) => request.request.give_up.clone(),
            _ => BTreeSet::new(),
        };
        self.bury(id, wish, by, if deleted.stays { Remains::Listed } else { Remains::InLayers });
        if let Some(tombstone) = self.tombstones.get_mut(&id) {
            tombstone.give_up = give_up;
        }
    }

    /// Takes a snapshot out of the tree; what is still held of it becomes a tombstone.
    fn bury(
        &mut self,
        id: SnapshotId,
        wish: MergeWish,
        (by, at, seq): (&Actor, Timestamp, u64),
        remains: Remains,
    ) {
        let stands =
            remains == Remains::Listed || self.layers.disks.values().any(|disk| disk.layer_of(id).is_some());
        if let Some(snapshot) = self.tree.get(id).filter(|_| stands) {
            let (name, native) = (snapshot.name.clone(), snapshot.native.clone());
            let deleted_by = by.clone();
            let tombstone = Tombstone {
                name,
                deleted: at,
                deleted_by,
                seq,
                native,
                wish,
                give_up: BTreeSet::new(),
                deferred: None,
            };
            self.tombstones.insert(id, tombstone);
        }
        self.tree.delete(id);
        self.dated.remove(&id);
    }

    /// Takes over what is kept beside the layers.
    fn restore(&mut self, envelope: &Envelope, restored: &SystemRestored) {
        self.tree = restored.tree.clone();
        self.dated.retain(|id, _| restored.tree.contains(*id));
        for snapshot in restored.tree.iter() {
            let dated = Dated { seq: envelope.seq, at: snapshot.created };
            self.dated.entry(snapshot.id).or_insert(dated);
        }
        self.layers = restored.layers.clone();
        self.drift.clear();
        self.restored_from = Some((restored.seq, restored.hash.clone()));
        let tombstone = |name: &SnapshotName| Tombstone {
            name: name.clone(),
            deleted: envelope.at,
            deleted_by: envelope.actor.clone(),
            seq: envelope.seq,
            native: None,
            wish: MergeWish::Auto,
            give_up: BTreeSet::new(),
            deferred: None,
        };
        self.tombstones = restored.tombstones.iter().map(|(id, name)| (*id, tombstone(name))).collect();
    }

    /// The state as it would be if these were deleted now.
    pub(crate) fn delete_all(&mut self, delete: &SnapshotDeleteRequested, by: &Actor, at: Timestamp) {
        for id in &delete.snapshots {
            self.bury(*id, delete.merge, (by, at, self.seq), Remains::InLayers);
            if let Some(tombstone) = self.tombstones.get_mut(id) {
                tombstone.give_up.clone_from(&delete.request.give_up);
            }
        }
    }

    /// What is written about a snapshot.
    fn mark(&mut self, event: &Event) {
        match event {
            Event::SnapshotEdited(e) => {
                if let Some(snapshot) = self.tree.get_mut(e.snapshot) {
                    e.apply(snapshot);
                }
            }
            Event::SnapshotHeld(e) => {
                if let Some(snapshot) = self.tree.get_mut(e.snapshot) {
                    snapshot.hold = Some(e.hold.clone());
                }
            }
            Event::SnapshotReleased(e) => {
                if let Some(snapshot) = self.tree.get_mut(e.snapshot) {
                    snapshot.hold = None;
                }
            }
            _ => {}
        }
    }

    fn mark_lost(&mut self, finding: &Finding, presence: Presence) {
        if let Finding::SnapshotLost { snapshot, .. } = finding
            && let Some(snapshot) = self.tree.get_mut(*snapshot)
        {
            snapshot.lost = presence == Presence::Lost;
        }
    }

    /// Whether a snapshot of the hypervisor's list was forgotten on purpose.
    pub fn forgot(&self, listed: &SeenSnapshot) -> bool {
        let marked = listed.id.is_some_and(|id| self.forgotten.contains(&Forgotten::Marked(id)));
        marked || self.forgotten.contains(&Forgotten::Native(listed.native.clone()))
    }

    /// The operation of that id, while it is open.
    pub fn operation(&self, id: OperationId) -> Option<&Operation> {
        self.open.iter().find(|operation| operation.id == id)
    }

    /// Where the domain keeps its snapshots, by those that it has or will have; none while there are none. One that none of
    /// the layers reads as is inside the images, where the driver has both kinds.
    pub fn place(&self) -> Option<Place> {
        let can = self.domain.as_ref().map(|domain| &domain.capabilities);
        let can = can.is_some_and(|can| can.internal && !can.merges_itself);
        let open = self.open.iter().find_map(|operation| match &operation.request {
            Request::Create(request) => Some(request.place),
            _ => None,
        });
        let stands =
            |snapshot: &Snapshot| self.layers.disks.values().any(|disk| disk.layer_of(snapshot.id).is_some());
        let of_tree = self
            .tree
            .iter()
            .next()
            .map(|snapshot| if can && !stands(snapshot) { Place::Internal } else { Place::Usual });
        of_tree.or(open)
    }

    /// The tree as it will be when all open requests have been carried out; what a new request is judged by.
    pub fn tree_after_open(&self) -> std::borrow::Cow<'_, Tree> {
        use std::borrow::Cow;
        let mut tree = Cow::Borrowed(&self.tree);
        for operation in &self.open {
            match &operation.request {
                Request::Create(request) if !tree.contains(request.snapshot) => {
                    let snapshot = request.predicted(operation);
                    tree.to_mut().create(snapshot);
                }
                Request::Revert(request) => tree.to_mut().revert(request.snapshot),
                Request::Edit(request) => {
                    if let Some(snapshot) = tree.to_mut().get_mut(request.edit.snapshot) {
                        request.edit.apply(snapshot);
                    }
                }
                Request::Delete(request) => {
                    for id in &request.snapshots {
                        tree.to_mut().delete(*id);
                    }
                }
                _ => {}
            }
        }
        tree
    }
}
