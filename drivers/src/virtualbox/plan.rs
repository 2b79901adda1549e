//! From a request to steps. Pure.

use std::collections::BTreeMap;

use snaptree_engine::domain::RunState;
use snaptree_engine::driver::{Observation, Plan};
use snaptree_engine::event::{
    DeleteWhat, MemoryKind, MergeWish, SnapshotCreateRequested, SnapshotDeleteRequested, SnapshotEdited,
    SnapshotRevertRequested, UnregisterWish,
};
use snaptree_engine::operation::{Code, Failure, Poison, Request, Reversal, Step};
use snaptree_engine::project::DomainState;
use snaptree_engine::reconcile::merge::MergePlan;
use snaptree_engine::tree::SnapshotState;
use snaptree_engine::{OperationId, SnapshotId};
use uuid::Uuid;

use super::disks;
use super::mark::Marked;
use super::observe::{self, Detail, Found};
use super::settings::Snap;
use super::step::{Action, Words};

/// VirtualBox's own limit (`SETTINGS_SNAPSHOT_DEPTH_MAX`).
pub(super) const DEPTH_MAX: usize = 250;
/// An empty image: its header, and the table of its blocks (VirtualBox, VDICore.h).
const HEAD_BYTES: u64 = 2 << 20;
const BLOCK_BYTES: u64 = 1 << 20;
const ENTRY_BYTES: u64 = 4;
/// What the name of a deleted snapshot begins with that VirtualBox merges later.
pub(super) const HIDDEN: &str = "~deleted~";

/// Judges again what may have changed since the request was decided, and plans it.
pub(super) fn plan(
    operation: OperationId,
    request: &Request,
    state: &DomainState,
    seen: &Observation,
) -> Result<Plan, Failure> {
    // Letting go of a domain touches nothing, so it works also when there is nothing left to touch.
    if let Request::Unregister(request) = request
        && request.wish != UnregisterWish::Flatten
    {
        return Ok(Plan::default());
    }
    let detail = Detail::of(seen)?;
    let mut planner = Planner { operation, state, seen, detail: &detail, plan: Plan::default() };
    planner.check_whole(request)?;
    match request {
        Request::Create(request) => planner.create(request)?,
        Request::Revert(request) => planner.revert(request)?,
        Request::Delete(request) => planner.delete(request)?,
        Request::Edit(request) => planner.edit(&request.edit)?,
        Request::Merge(request) => planner.merge(&request.plan)?,
        Request::Unregister(_) => planner.flatten()?,
    }
    Ok(planner.plan)
}

struct Planner<'a> {
    operation: OperationId,
    state: &'a DomainState,
    seen: &'a Observation,
    detail: &'a Detail,
    plan: Plan,
}

/// What is left of the tree while a plan deletes: parents, and where the machine stands.
struct Left {
    parents: BTreeMap<Uuid, Option<Uuid>>,
    current: Option<Uuid>,
}

impl Left {
    /// How many snapshots and states stand upon a snapshot.
    fn children(&self, uuid: Uuid) -> usize {
        self.parents.values().filter(|parent| **parent == Some(uuid)).count()
    }

    fn remove(&mut self, uuid: Uuid) {
        let parent = self.parents.remove(&uuid).flatten();
        for above in self.parents.values_mut().chain([&mut self.current]) {
            if *above == Some(uuid) {
                *above = parent;
            }
        }
    }
}

impl<'a> Planner<'a> {
    /// What VirtualBox left broken is repaired first, where that cannot make anything up.
    fn check_whole(&mut self, request: &Request) -> Result<(), Failure> {
        if self.detail.found == Found::BeforeRename {
            self.push(
                "repair the settings".to_owned(),
                Reversal::Undoable,
                Poison::Nothing,
                &Action::Repair,
            )?;
        }
        let Some(missing) = self.detail.missing.first() else { return Ok(()) };
        // Only a deleted snapshot's data may be replaced by nothing.
        if matches!(request, Request::Merge(_)) {
            return Ok(());
        }
        let file = self.detail.settings.media.get(missing).map(|medium| medium.file.display().to_string());
        let message =
            format!("the image {} is gone, and the machine's settings name it", file.unwrap_or_default());
        let hint = if self.state.tombstones.is_empty() {
            "put it back from a backup"
        } else {
            "a delete may have been cut short: `snaptree reconcile` finishes it"
        };
        Err(Failure::new(Code::Drift, message).hint(hint))
    }

    fn push(
        &mut self,
        name: String,
        reversal: Reversal,
        poison: Poison,
        action: &Action,
    ) -> Result<(), Failure> {
        let data = serde_json::to_value(action).map_err(|e| Failure::new(Code::Invalid, e.to_string()))?;
        self.plan.steps.push(Step { name, reversal, poison, data });
        Ok(())
    }

    fn create(&mut self, request: &SnapshotCreateRequested) -> Result<(), Failure> {
        if self.seen.run_state != RunState::Off && request.memory == MemoryKind::No {
            let message = "VirtualBox takes a machine that is not off with its memory only";
            return Err(
                Failure::new(Code::Unsupported, message).hint("leave out --disk-only, or switch it off")
            );
        }
        if self.detail.settings.depth() >= DEPTH_MAX {
            let message =
                format!("VirtualBox takes {DEPTH_MAX} snapshots in a row at most, and there are as many");
            return Err(Failure::new(Code::Unsupported, message).hint("delete some snapshots of the chain"));
        }
        if self.seen.snapshots.iter().any(|listed| listed.id == Some(request.snapshot)) {
            let message = format!("VirtualBox already has snapshot {}", request.snapshot);
            return Err(Failure::new(Code::Drift, message));
        }
        let text = checked(request.description.as_deref().unwrap_or_default())?;
        let marked = Marked { text, mark: Some((request.snapshot, self.operation)) };
        let action = Action::Take {
            snapshot: request.snapshot,
            name: request.name.to_string(),
            description: marked.write(),
            live: self.seen.run_state == RunState::Running,
        };
        let disks = self.state.domain.iter().flat_map(|domain| domain.snapshotted());
        self.plan.peak_space_bytes =
            disks.map(|disk| HEAD_BYTES + disk.virtual_size_bytes / BLOCK_BYTES * ENTRY_BYTES).sum();
        self.push(format!("take '{}'", request.name), Reversal::Undoable, Poison::Nothing, &action)
    }

    fn revert(&mut self, request: &SnapshotRevertRequested) -> Result<(), Failure> {
        let snap = self.listed(request.snapshot)?;
        if request.run_state == Some(RunState::Paused) {
            return Err(Failure::new(Code::Unsupported, "VirtualBox starts no machine paused"));
        }
        let on = self.seen.run_state != RunState::Off;
        if on && request.run_state != Some(RunState::Running) {
            let message = "the machine is not off, and VirtualBox reverts only one that is";
            return Err(Failure::new(Code::InUse, message).hint(
                "`snaptree domain stop` ends it; with --running it is powered off, reverted and started",
            ));
        }
        let starts = match request.run_state {
            Some(wanted) => wanted == RunState::Running,
            None => self
                .state
                .tree
                .get(request.snapshot)
                .is_some_and(|known| known.state == SnapshotState::Running),
        };
        let name = self.name_of(request.snapshot)?;
        let images = self.detail.settings.images.values().copied().collect();
        let mut reversal = Reversal::PointOfNoReturn;
        if on {
            self.push("power off".to_owned(), reversal, Poison::Nothing, &Action::PowerOff)?;
            self.plan.lost.push("what the machine has in its memory".to_owned());
            reversal = Reversal::ForwardOnly;
        }
        let action = Action::Restore { native: snap.uuid, images };
        self.push(format!("revert to {name}"), reversal, Poison::Nothing, &action)?;
        if starts {
            self.push("start".to_owned(), Reversal::ForwardOnly, Poison::Nothing, &Action::Start)?;
        }
        let known = self.seen.disks.as_deref().unwrap_or_default();
        self.plan.lost.extend(disks::detached(known, &self.detail.settings, snap));
        self.plan.lost.push("what the machine did since its last snapshot".to_owned());
        Ok(())
    }

    fn edit(&mut self, edit: &SnapshotEdited) -> Result<(), Failure> {
        let name = self.name_of(edit.snapshot)?;
        let snap = self.listed(edit.snapshot)?;
        let mut marked = Marked::parse(&snap.description);
        if let Some(text) = &edit.description {
            marked.text = checked(text)?;
        }
        let before = Words { name: snap.name.clone(), description: snap.description.clone() };
        let after = Words {
            name: edit.name.as_ref().map_or_else(|| snap.name.clone(), ToString::to_string),
            description: marked.write(),
        };
        let action = Action::Edit { native: snap.uuid, before, after };
        self.push(format!("edit {name}"), Reversal::Undoable, Poison::Nothing, &action)
    }

    /// Snapshots go one by one, children first. What cannot be merged in its turn is hidden.
    fn delete(&mut self, request: &SnapshotDeleteRequested) -> Result<(), Failure> {
        if request.what == DeleteWhat::Metadata {
            return Ok(());
        }
        let mut left = self.left();
        for &snapshot in &request.snapshots {
            let name = self.name_of(snapshot)?;
            let snap = self.listed(snapshot)?;
            let (uuid, hidden) = (snap.uuid, format!("{HIDDEN}{}", snap.name));
            let reversal =
                if self.plan.steps.is_empty() { Reversal::PointOfNoReturn } else { Reversal::ForwardOnly };
            self.plan.lost.push(format!("snapshot {name}"));
            if request.merge == MergeWish::Defer || !self.may_merge(snap, &left) {
                let action = Action::Hide { native: uuid, name: hidden };
                self.push(format!("hide {name}"), reversal, Poison::Hidden(vec![snapshot]), &action)?;
            } else {
                left.remove(uuid);
                let action = Action::Delete { native: uuid };
                self.push(format!("delete {name}"), reversal, Poison::AtStart(vec![snapshot]), &action)?;
            }
        }
        Ok(())
    }

    fn left(&self) -> Left {
        let settings = &self.detail.settings;
        Left {
            parents: settings.snapshots.iter().map(|snap| (snap.uuid, snap.parent)).collect(),
            current: settings.current,
        }
    }

    /// Whether VirtualBox can merge a snapshot when those that are not in `left` are gone.
    fn may_merge(&self, snap: &Snap, left: &Left) -> bool {
        let settings = &self.detail.settings;
        let stands =
            |current: Option<Uuid>| usize::from(!snap.images.is_empty() && current == Some(snap.uuid));
        let own = settings.children(snap.uuid) + stands(settings.current);
        // Linked clones and the like, which no delete of ours takes away.
        let foreign = settings.images_upon(snap).saturating_sub(own);
        // It is merged by the engine when there is room.
        let room = self.seen.room.as_ref();
        let full = room.and_then(|room| observe::shortage(observe::merge_bytes(snap, self.detail), room));
        left.children(snap.uuid) + stands(left.current) + foreign <= 1 && full.is_none()
    }

    /// Merges what was deleted before. What somebody else removed meanwhile is merged already.
    fn merge(&mut self, merge: &MergePlan) -> Result<(), Failure> {
        for snapshot in &merge.snapshots {
            let Some(native) = self.native(*snapshot) else { continue };
            let name = self.state.tombstones.get(snapshot).map_or("", |tombstone| tombstone.name.as_str());
            let action = Action::Delete { native };
            self.push(format!("merge '{name}'"), Reversal::PointOfNoReturn, Poison::Nothing, &action)?;
        }
        Ok(())
    }

    /// Ends our snapshots and keeps the disks as they are. What others made meanwhile is not ours to remove.
    fn flatten(&mut self) -> Result<(), Failure> {
        let mut ours: Vec<(usize, SnapshotId, Uuid)> = Vec::new();
        for id in
            self.state.tree.iter().map(|snapshot| snapshot.id).chain(self.state.tombstones.keys().copied())
        {
            if let Some(native) = self.native(id) {
                ours.push((self.depth_of(native), id, native));
            }
        }
        ours.sort_by_key(|(depth, ..)| std::cmp::Reverse(*depth));
        for (_, id, native) in ours {
            let reversal =
                if self.plan.steps.is_empty() { Reversal::PointOfNoReturn } else { Reversal::ForwardOnly };
            let live = self.state.tree.get(id);
            let poison = if live.is_some() { Poison::AtStart(vec![id]) } else { Poison::Nothing };
            let name = live.map_or_else(|| "what was deleted".to_owned(), |live| format!("'{}'", live.name));
            self.push(format!("delete {name}"), reversal, poison, &Action::Delete { native })?;
        }
        self.plan.lost = self.state.tree.iter().map(|known| format!("snapshot '{}'", known.name)).collect();
        Ok(())
    }

    fn depth_of(&self, uuid: Uuid) -> usize {
        let settings = &self.detail.settings;
        std::iter::successors(settings.snapshot(uuid), |snap| settings.snapshot(snap.parent?))
            .take(settings.snapshots.len())
            .count()
    }

    fn native(&self, snapshot: SnapshotId) -> Option<Uuid> {
        self.seen.snapshots.iter().find(|listed| listed.id == Some(snapshot))?.native.parse().ok()
    }

    /// The snapshot's name in quotes.
    fn name_of(&self, snapshot: SnapshotId) -> Result<String, Failure> {
        let found = self.state.tree.get(snapshot).map(|known| format!("'{}'", known.name));
        found.ok_or_else(|| Failure::new(Code::NotFound, format!("there is no snapshot {snapshot}")))
    }

    fn listed(&self, snapshot: SnapshotId) -> Result<&'a Snap, Failure> {
        let found = self.native(snapshot).and_then(|native| self.detail.settings.snapshot(native));
        match found {
            Some(snap) => Ok(snap),
            None => {
                let message = format!("VirtualBox no longer has snapshot {}", self.name_of(snapshot)?);
                Err(Failure::new(Code::Drift, message).hint("delete it with --metadata to forget it"))
            }
        }
    }
}

/// A description that VirtualBox keeps as it is: other control characters become U+FFFD in its settings, and a carriage
/// return a newline.
fn checked(text: &str) -> Result<String, Failure> {
    match text.chars().find(|c| c.is_control() && !matches!(c, '\n' | '\t')) {
        Some(c) => {
            let message = format!(
                "VirtualBox keeps no control character such as U+{:04X} in a description",
                u32::from(c)
            );
            Err(Failure::new(Code::Invalid, message))
        }
        None => Ok(text.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use snaptree_engine::driver::Room;

    use super::*;
    use crate::virtualbox::settings::{Kind, Medium, Settings};

    const ONE: u128 = 1;

    /// A machine with one snapshot on a base of 100 MiB, upon which as much was written.
    fn detail() -> Detail {
        let (base, above) = (Uuid::from_u128(10), Uuid::from_u128(11));
        let medium = |parent| Medium {
            file: "/vm/x.vdi".into(),
            format: "VDI".to_owned(),
            parent,
            kind: Kind::Normal,
        };
        let place = |image| BTreeMap::from([("sata-0-0".to_owned(), image)]);
        let snap = Snap {
            uuid: Uuid::from_u128(ONE),
            parent: None,
            name: "one".to_owned(),
            description: String::new(),
            taken: None,
            online: false,
            images: place(base),
        };
        let settings = Settings {
            current: Some(snap.uuid),
            snapshots: vec![snap],
            images: place(above),
            media: BTreeMap::from([(base, medium(None)), (above, medium(Some(base)))]),
            ..Settings::default()
        };
        let sizes = BTreeMap::from([(base, 100 << 20), (above, 100 << 20)]);
        Detail {
            file: "/vm/vm.vbox".into(),
            found: Found::InPlace,
            settings,
            missing: vec![],
            sizes,
            repairs: vec![],
        }
    }

    fn steps(request: &Request, run_state: RunState, free_bytes: u64) -> Result<Vec<String>, Failure> {
        let id = SnapshotId::from_uuid(Uuid::from_u128(7));
        let mut state = DomainState::default();
        let snapshot = json!({
            "id": id, "name": "one", "created": "2026-01-01T00:00:00Z", "state": "shutoff", "memory": "no",
            "disks": [], "made_by": "user:x", "native": Uuid::from_u128(ONE),
        });
        let tree = json!({ "snapshots": { id.to_string(): snapshot }, "current": id });
        state.tree = serde_json::from_value(tree).unwrap();
        let mut seen = observe::observation(&state, run_state, &detail()).unwrap();
        seen.room = Some(Room { folder: "/vm".into(), free_bytes });
        let plan = plan(OperationId::from_uuid(Uuid::nil()), request, &state, &seen)?;
        Ok(plan.steps.into_iter().map(|step| step.name).collect())
    }

    #[test]
    fn a_machine_that_runs_is_reverted_only_where_powering_it_off_is_asked_for() {
        let snapshot = SnapshotId::from_uuid(Uuid::from_u128(7));
        let revert = |wish: serde_json::Value| {
            Request::Revert(serde_json::from_value(json!({"snapshot": snapshot, "run_state": wish})).unwrap())
        };
        let room = 1 << 40;
        assert_eq!(steps(&revert(json!(null)), RunState::Off, room).unwrap(), ["revert to 'one'"]);
        assert_eq!(
            steps(&revert(json!("running")), RunState::Off, room).unwrap(),
            ["revert to 'one'", "start"]
        );
        assert_eq!(steps(&revert(json!(null)), RunState::Running, room).unwrap_err().code, Code::InUse);
        assert_eq!(
            steps(&revert(json!("running")), RunState::Running, room).unwrap(),
            ["power off", "revert to 'one'", "start"]
        );
    }

    #[test]
    fn what_there_is_no_room_to_merge_is_hidden() {
        let snapshot = SnapshotId::from_uuid(Uuid::from_u128(7));
        let delete = json!({"snapshots": [snapshot], "named": [snapshot], "scope": "named", "what": "snapshot", "merge": "auto"});
        let delete = Request::Delete(serde_json::from_value(delete).unwrap());
        assert_eq!(steps(&delete, RunState::Off, 1 << 40).unwrap(), ["delete 'one'"]);
        assert_eq!(steps(&delete, RunState::Off, 150 << 20).unwrap(), ["hide 'one'"]);
    }
}
