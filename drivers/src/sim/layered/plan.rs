//! Which steps a request takes. Pure.

use std::path::Path;

use snaptree_engine::driver::{Observation, Plan};
use snaptree_engine::event::{
    SnapshotCreateRequested, SnapshotDeleteRequested, SnapshotRevertRequested, UnregisterWish,
};
use snaptree_engine::layer::{DiskLayers, Layer, Role};
use snaptree_engine::operation::{Code, Failure, Poison, Request, Reversal, Step};
use snaptree_engine::project::DomainState;
use snaptree_engine::reconcile::merge::{MergeAction, MergePlan};
use snaptree_engine::{DiskName, LayerId, OperationId};

use super::super::json;
use super::super::plan::missing;
use super::resolve::Detail;
use super::step::{Action, Freeze, Fresh, Named, Pull, Purpose, Push, Restack, Switch, Turn};
use super::{FileName, path};

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
    if Detail::of(seen)? == Detail::Missing {
        return Err(missing());
    }
    let mut planner =
        Planner { operation, state, seen, steps: Vec::new(), generation: state.layers.generation.clone() };
    planner.check_sound()?;
    match request {
        Request::Create(request) => planner.create(request)?,
        Request::Revert(request) => planner.revert(request)?,
        Request::Delete(request) => planner.delete(request)?,
        Request::Merge(request) => planner.merge(&request.plan)?,
        Request::Edit(_) => {
            return Err(Failure::new(Code::Unsupported, "this hypervisor keeps no names"));
        }
        Request::Unregister(_) => planner.flatten()?,
    }
    Ok(Plan { steps: planner.steps, ..Plan::default() })
}

struct Planner<'a> {
    operation: OperationId,
    state: &'a DomainState,
    seen: &'a Observation,
    steps: Vec<Step>,
    /// The generation that the steps so far switch to.
    generation: Option<String>,
}

fn drift(message: String) -> Failure {
    Failure::new(Code::Drift, message)
}

fn stale(disk: &DiskName, id: &LayerId) -> Failure {
    let message = format!("layer {id} of disk '{disk}' is not what it was when this merge was planned");
    Failure::new(Code::Invalid, message)
}

fn file_name(path: &Path) -> FileName {
    path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

impl Planner<'_> {
    /// What is frozen is as the log says.
    fn check_sound(&self) -> Result<(), Failure> {
        if self.seen.generation != self.state.layers.generation {
            return Err(drift(format!("generation {:?} is switched on", self.seen.generation)));
        }
        for layer in self.state.layers.disks.values().flat_map(|disk| disk.layers.values()) {
            let found = self.seen.files.get(&layer.file);
            let found = found.ok_or_else(|| drift(format!("{} is missing", layer.file.display())))?;
            if layer.stamp.is_some_and(|stamp| stamp != found.stamp) {
                return Err(drift(format!("{} was written by someone else", layer.file.display())));
            }
        }
        Ok(())
    }

    fn step(
        &mut self,
        name: String,
        reversal: Reversal,
        poison: Poison,
        action: &Action,
    ) -> Result<(), Failure> {
        self.steps.push(Step { name, reversal, poison, data: json(action)? });
        Ok(())
    }

    fn turn(&mut self) -> Turn {
        let generation = format!("gen-{}-{}", self.operation, self.steps.len());
        Turn { previous: self.generation.replace(generation.clone()), generation }
    }

    fn switch(&mut self, purpose: Purpose) -> Switch {
        let turn = self.turn();
        Switch { turn, purpose, fresh: vec![], freeze: vec![], push: vec![], restack: vec![] }
    }

    fn disk(&self, name: &DiskName) -> Result<&DiskLayers, Failure> {
        self.state.layers.disks.get(name).ok_or_else(|| drift(format!("disk '{name}' has no layers")))
    }

    fn layer(&self, disk: &DiskName, id: &LayerId) -> Result<&Layer, Failure> {
        self.disk(disk)?.layers.get(id).ok_or_else(|| stale(disk, id))
    }

    fn named(&self, disk: &DiskName, id: &LayerId) -> Result<Named, Failure> {
        let file = file_name(&self.layer(disk, id)?.file);
        Ok(Named { disk: disk.clone(), layer: id.clone(), file })
    }

    fn is_active(&self, disk: &DiskName, id: &LayerId) -> Result<bool, Failure> {
        Ok(self.disk(disk)?.active.as_ref() == Some(id))
    }

    fn fresh(&self, on: &Named) -> Fresh {
        let layer = LayerId::new(&on.disk, self.operation);
        let file = layer.as_str().to_owned();
        let new = Named { disk: on.disk.clone(), layer, file };
        Fresh { new, on: on.layer.clone(), on_file: on.file.clone() }
    }

    fn create(&mut self, request: &SnapshotCreateRequested) -> Result<(), Failure> {
        if self.state.tree.contains(request.snapshot) || self.state.tree.by_name(&request.name).is_some() {
            let message = format!("there is already a snapshot '{}'", request.name);
            return Err(Failure::new(Code::Exists, message));
        }
        let mut tops = Vec::new();
        for disk in &request.disks {
            let active = self.state.layers.disks.get(disk).and_then(DiskLayers::active_layer);
            tops.push(match active {
                Some((id, layer)) => {
                    Named { disk: disk.clone(), layer: id.clone(), file: file_name(&layer.file) }
                }
                None => self.adopt(disk)?,
            });
        }
        let purpose = Purpose::Create { snapshot: request.snapshot, memory: request.memory };
        let mut switch = self.switch(purpose);
        let domain = super::super::plan::domain(self.state)?.id;
        for top in tops {
            let facts = self.seen.files.get(&path(domain, &top.file));
            let stamp = facts.ok_or_else(|| drift(format!("{} is missing", top.file)))?.stamp;
            switch.fresh.push(self.fresh(&top));
            switch.freeze.push(Freeze { layer: top, stamp });
        }
        self.step("switch".to_owned(), Reversal::PointOfNoReturn, Poison::Nothing, &Action::Switch(switch))
    }

    fn adopt(&mut self, disk: &DiskName) -> Result<Named, Failure> {
        let layer = LayerId::adopted(disk, self.operation);
        let layer = Named { disk: disk.clone(), layer, file: disk.to_string() };
        let action = Action::Adopt { layer: layer.clone(), turn: self.turn() };
        self.step(format!("adopt {disk}"), Reversal::Undoable, Poison::Nothing, &action)?;
        Ok(layer)
    }

    fn revert(&mut self, request: &SnapshotRevertRequested) -> Result<(), Failure> {
        let snapshot = self.state.tree.get(request.snapshot);
        let snapshot =
            snapshot.ok_or_else(|| Failure::new(Code::NotFound, "the snapshot is not there any more"))?;
        let purpose = Purpose::Revert { snapshot: snapshot.id, run_state: request.run_state };
        let mut switch = self.switch(purpose);
        let mut files = Vec::new();
        for disk in &snapshot.disks {
            let layers = self.disk(disk)?;
            let held = layers.layer_of(snapshot.id).map(|(id, _)| id);
            let held = held.ok_or_else(|| drift(format!("no layer of '{disk}' holds the snapshot")))?;
            let active = layers.active.as_ref();
            let active = active.ok_or_else(|| drift(format!("disk '{disk}' has no active layer")))?;
            if self.layer(disk, active)?.registered {
                return Err(drift(format!("the registered image of '{disk}' would be removed")));
            }
            files.push(self.named(disk, active)?);
            let held = self.named(disk, held)?;
            switch.fresh.push(self.fresh(&held));
        }
        self.step("switch".to_owned(), Reversal::PointOfNoReturn, Poison::Nothing, &Action::Switch(switch))?;
        self.drop_step(files)
    }

    fn drop_step(&mut self, files: Vec<Named>) -> Result<(), Failure> {
        if files.is_empty() {
            return Ok(());
        }
        self.step("drop".to_owned(), Reversal::ForwardOnly, Poison::Nothing, &Action::Drop { files })
    }

    /// A delete only marks: the data is folded away by merges of its own.
    fn delete(&mut self, request: &SnapshotDeleteRequested) -> Result<(), Failure> {
        if let Some(gone) = request.snapshots.iter().find(|id| !self.state.tree.contains(**id)) {
            return Err(Failure::new(Code::NotFound, format!("snapshot {gone} is not there any more")));
        }
        let switch = self.switch(Purpose::Delete { snapshots: request.snapshots.clone() });
        let poison = Poison::AtFinish(request.snapshots.clone());
        let name = "mark as deleted".to_owned();
        self.step(name, Reversal::PointOfNoReturn, poison, &Action::Switch(switch))
    }

    /// Pulls and pushes, then one switch, then one unlinking.
    ///
    /// Whether the merge does harm to what stands on a layer is for the engine to know: this hypervisor does as told.
    fn merge(&mut self, plan: &MergePlan) -> Result<(), Failure> {
        let (mut pushes, mut files) = (Vec::new(), Vec::new());
        for action in &plan.actions {
            match action {
                MergeAction::Drop { disk, layer } => files.push(self.tombstone(disk, layer)?),
                MergeAction::Fold { .. } => {
                    return Err(Failure::new(Code::Unsupported, "this hypervisor keeps no list"));
                }
                MergeAction::Pull { disk, vanish, dependants, onto } => {
                    files.extend(self.pull(disk, vanish, dependants, onto)?);
                }
                MergeAction::Push { disk, from, into, between } => {
                    let push = self.push(disk, from, into, between)?;
                    if !push.active {
                        let name = format!("push {disk}");
                        let action = Action::Push(push.clone());
                        self.step(name, Reversal::Undoable, Poison::Nothing, &action)?;
                    }
                    for id in between.iter().chain([from]) {
                        files.push(self.named(disk, id)?);
                    }
                    pushes.push(push);
                }
            }
        }
        let mut switch = self.switch(Purpose::Merge);
        for push in &pushes {
            self.restack(&mut switch, push)?;
        }
        switch.push = pushes;
        self.step("switch".to_owned(), Reversal::PointOfNoReturn, Poison::Nothing, &Action::Switch(switch))?;
        self.drop_step(files)
    }

    fn tombstone(&self, disk: &DiskName, id: &LayerId) -> Result<Named, Failure> {
        match self.disk(disk)?.role(id, &self.state.tree) {
            Role::Tombstone(_) => self.named(disk, id),
            Role::Active | Role::Frozen(_) => Err(stale(disk, id)),
        }
    }

    /// One step per dependant; what vanishes is returned.
    fn pull(
        &mut self,
        disk: &DiskName,
        vanish: &[LayerId],
        dependants: &[LayerId],
        onto: &LayerId,
    ) -> Result<Vec<Named>, Failure> {
        let gone = vanish.iter().map(|id| self.tombstone(disk, id)).collect::<Result<Vec<_>, _>>()?;
        let from = gone.last().cloned().ok_or_else(|| stale(disk, onto))?;
        let onto = self.named(disk, onto)?;
        for id in dependants {
            if self.layer(disk, id)?.parent.as_ref() != Some(&from.layer) {
                return Err(stale(disk, id));
            }
            let pull = Pull {
                layer: self.named(disk, id)?,
                vanish: gone.iter().map(|named| named.file.clone()).collect(),
                from: from.layer.clone(),
                from_file: from.file.clone(),
                onto: onto.layer.clone(),
                onto_file: onto.file.clone(),
                active: self.is_active(disk, id)?,
            };
            let action = Action::Pull(pull);
            self.step(format!("pull into {id}"), Reversal::Undoable, Poison::Nothing, &action)?;
        }
        Ok(gone)
    }

    fn push(
        &self,
        disk: &DiskName,
        from: &LayerId,
        into: &LayerId,
        between: &[LayerId],
    ) -> Result<Push, Failure> {
        let between = between.iter().map(|id| Ok(self.tombstone(disk, id)?.file));
        Ok(Push {
            from: self.named(disk, from)?,
            into: self.tombstone(disk, into)?,
            between: between.collect::<Result<_, Failure>>()?,
            active: self.is_active(disk, from)?,
        })
    }

    /// What stood on the pushed layer stands on the file that took its content.
    fn restack(&self, switch: &mut Switch, push: &Push) -> Result<(), Failure> {
        let disk = &push.from.disk;
        for id in self.disk(disk)?.dependants(&push.from.layer) {
            switch.restack.push(Restack {
                layer: self.named(disk, id)?,
                old_file: push.from.file.clone(),
                onto: push.into.layer.clone(),
                onto_file: push.into.file.clone(),
                active: self.is_active(disk, id)?,
            });
        }
        Ok(())
    }

    /// One plain image a disk, and no snapshots.
    fn flatten(&mut self) -> Result<(), Failure> {
        let mut files = Vec::new();
        for (disk, layers) in &self.state.layers.disks {
            for id in layers.layers.keys() {
                files.push(self.named(disk, id)?);
            }
        }
        if files.is_empty() {
            return Ok(());
        }
        let ended = self.state.tree.iter().map(|snapshot| snapshot.id).collect();
        let action = Action::Flatten { turn: self.turn(), files };
        let name = "flatten".to_owned();
        self.step(name, Reversal::PointOfNoReturn, Poison::AtFinish(ended), &action)
    }
}
