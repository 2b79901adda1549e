//! Planning merges, and the end of a domain.

use std::collections::BTreeSet;
use std::path::PathBuf;

use snaptree_engine::event::UnregisterWish;
use snaptree_engine::layer::{DiskLayers, Layer, Role};
use snaptree_engine::operation::{Code, Failure, Poison, Reversal};
use snaptree_engine::reconcile::merge::{MergeAction, MergePlan};
use snaptree_engine::reconcile::space;
use snaptree_engine::{DiskName, LayerId};

use super::config::PathWish;
use super::plan::Planner;
use super::qcow2::Backing;
use super::step::{
    Clean, Dropped, Expect, Flatten, Guard, Place, Placed, Pull, Push, QemuStep, Restack, Switch, Under,
    Writer,
};

impl Planner<'_> {
    /// Pulls and pushes, then one switch, then one unlinking.
    pub(super) fn merge(&mut self, plan: &MergePlan) -> Result<(), Failure> {
        let mut pushes = Vec::new();
        let mut drop = Vec::new();
        for action in &plan.actions {
            match action {
                MergeAction::Drop { disk, layer } => {
                    self.check_tombstone(disk, layer)?;
                    self.check_dependants(disk, layer, &[])?;
                    drop.push(self.drop_of(disk, layer)?);
                }
                MergeAction::Fold { .. } => {
                    return Err(Failure::new(Code::Unsupported, "QEMU keeps no list of snapshots"));
                }
                MergeAction::Pull { disk, vanish, dependants, onto } => {
                    drop.extend(self.pull(disk, vanish, dependants, onto)?);
                }
                MergeAction::Push { disk, from, into, between } => {
                    let (push, dropped) = self.push_down(disk, from, into, between)?;
                    if push.writer == Writer::Nobody {
                        let step = QemuStep::Push(push.clone());
                        // QEMU itself puts what stands on the layer onto the other file.
                        let reversal = match push.under {
                            Under::Nobody => Reversal::Undoable,
                            Under::Guest => Reversal::PointOfNoReturn,
                        };
                        self.push(format!("push {disk}"), reversal, Poison::Nothing, &step)?;
                    }
                    pushes.push(push);
                    drop.extend(dropped);
                }
            }
        }
        let mut switch = self.empty_switch();
        for push in &pushes {
            self.restack(&mut switch, push)?;
        }
        switch.push = pushes;
        switch.gone = drop.iter().map(|dropped| (dropped.disk.clone(), dropped.layer.clone())).collect();
        let pushed = switch.push.iter().find(|push| push.writer == Writer::Machine);
        if pushed.is_some() {
            switch.live = self.live()?;
        }
        let name =
            pushed.map_or_else(|| "switch".to_owned(), |push| format!("push {} and switch", push.disk));
        self.push(name, Reversal::PointOfNoReturn, Poison::Nothing, &QemuStep::Switch(switch))?;
        self.drop_step(drop, Vec::new())?;
        self.costs.bytes_moved = plan.bytes_moved;
        self.costs.peak_space_bytes = space::growth_bytes(&plan.actions, &self.state.layers, self.seen);
        Ok(())
    }

    fn drop_of(&mut self, disk: &DiskName, id: &LayerId) -> Result<Dropped, Failure> {
        let layer = self.layer(disk, id)?.clone();
        self.dropped(disk, id, &layer)
    }

    /// Only what no snapshot and no machine needs may be folded.
    fn check_tombstone(&self, disk: &DiskName, id: &LayerId) -> Result<(), Failure> {
        self.layer(disk, id)?;
        match self.disk(disk)?.role(id, &self.state.tree) {
            Role::Tombstone(_) => Ok(()),
            Role::Active | Role::Frozen(_) => Err(stale(disk, id)),
        }
    }

    /// The layers that are built upon `id` are these and no others.
    fn check_dependants(&self, disk: &DiskName, id: &LayerId, expected: &[LayerId]) -> Result<(), Failure> {
        let found: BTreeSet<&LayerId> = self.disk(disk)?.dependants(id).collect();
        if found == expected.iter().collect() { Ok(()) } else { Err(stale(disk, id)) }
    }

    fn writer(&self, disk: &DiskName, id: &LayerId) -> Result<Writer, Failure> {
        let active = self.disk(disk)?.active.as_ref() == Some(id);
        Ok(if active { Writer::Machine } else { Writer::Nobody })
    }

    fn no_internal_snapshots(&self, layer: &Layer) -> Result<(), Failure> {
        if self.facts(&layer.file)?.internal_snapshots == 0 {
            return Ok(());
        }
        Err(Failure::new(
            Code::Unsupported,
            format!("{} has snapshots inside the image, which a merge would damage", layer.file.display()),
        ))
    }

    /// One step per dependant; what vanishes is returned.
    fn pull(
        &mut self,
        disk: &DiskName,
        vanish: &[LayerId],
        dependants: &[LayerId],
        onto: &LayerId,
    ) -> Result<Vec<Dropped>, Failure> {
        let mut below = onto;
        let mut dropped = Vec::new();
        for (index, id) in vanish.iter().enumerate() {
            self.check_tombstone(disk, id)?;
            if self.layer(disk, id)?.parent.as_ref() != Some(below) {
                return Err(stale(disk, id));
            }
            let above = vanish.get(index + 1).map(std::slice::from_ref).unwrap_or(dependants);
            self.check_dependants(disk, id, above)?;
            dropped.push(self.drop_of(disk, id)?);
            below = id;
        }
        if vanish.is_empty() || dependants.is_empty() {
            return Err(stale(disk, onto));
        }
        let stamps = self.stamps(disk, onto)?;
        let from = self.layer(disk, below)?.file.clone();
        let onto_file = self.layer(disk, onto)?.file.clone();
        for id in dependants {
            let layer = self.layer(disk, id)?.clone();
            self.no_internal_snapshots(&layer)?;
            let mut chain = stamps.clone();
            for vanishing in vanish {
                chain.extend(self.stamps(disk, vanishing)?);
            }
            let step = Pull {
                under: self.under(&layer.file)?,
                disk: disk.clone(),
                layer: id.clone(),
                file: layer.file,
                mode: layer.mode,
                writer: self.writer(disk, id)?,
                from: below.clone(),
                from_file: from.clone(),
                onto: onto.clone(),
                onto_file: onto_file.clone(),
                below: chain,
            };
            let name = format!("pull into {id}");
            self.push(name, Reversal::Undoable, Poison::Nothing, &QemuStep::Pull(step))?;
        }
        Ok(dropped)
    }

    fn stamps(
        &self,
        disk: &DiskName,
        id: &LayerId,
    ) -> Result<Vec<(PathBuf, snaptree_engine::layer::FileStamp)>, Failure> {
        let file = self.layer(disk, id)?.file.clone();
        let stamp = self.facts(&file)?.stamp;
        Ok(vec![(file, stamp)])
    }

    /// The push, and what vanishes.
    fn push_down(
        &mut self,
        disk: &DiskName,
        from: &LayerId,
        into: &LayerId,
        between: &[LayerId],
    ) -> Result<(Push, Vec<Dropped>), Failure> {
        let mut below = into;
        let mut dropped = Vec::new();
        self.check_tombstone(disk, into)?;
        for id in between.iter().chain([from]) {
            if id != from {
                self.check_tombstone(disk, id)?;
            }
            if self.layer(disk, id)?.parent.as_ref() != Some(below) {
                return Err(stale(disk, id));
            }
            self.check_dependants(disk, below, std::slice::from_ref(id))?;
            dropped.push(self.drop_of(disk, id)?);
            below = id;
        }
        let (upper, lower) = (self.layer(disk, from)?.clone(), self.layer(disk, into)?.clone());
        self.no_foreign_dependants(&lower.file)?;
        let virtual_size_bytes = self.facts(&upper.file)?.virtual_size_bytes;
        let mut files = Vec::new();
        for id in between {
            files.push(self.layer(disk, id)?.file.clone());
        }
        for file in files.iter().chain([&lower.file]) {
            if self.facts(file)?.virtual_size_bytes != virtual_size_bytes {
                return Err(Failure::new(
                    Code::Unsupported,
                    format!(
                        "disk '{disk}' was resized in between, and only layers of one size can be pushed"
                    ),
                ));
            }
        }
        let push = Push {
            under: self.under(&upper.file)?,
            disk: disk.clone(),
            from: from.clone(),
            from_file: upper.file,
            from_mode: upper.mode,
            writer: self.writer(disk, from)?,
            into: into.clone(),
            into_file: lower.file,
            into_mode: lower.mode,
            between: files,
            virtual_size_bytes,
        };
        Ok((push, dropped))
    }

    /// What stood on the pushed layer stands on the file that took its content.
    fn restack(&self, switch: &mut Switch, push: &Push) -> Result<(), Failure> {
        for id in self.disk(&push.disk)?.dependants(&push.from) {
            let layer = self.layer(&push.disk, id)?;
            switch.restack.push(Restack {
                disk: push.disk.clone(),
                layer: id.clone(),
                file: layer.file.clone(),
                mode: layer.mode,
                writer: self.writer(&push.disk, id)?,
                old_file: push.from_file.clone(),
                onto: push.into.clone(),
                onto_file: push.into_file.clone(),
            });
        }
        if push.writer == Writer::Machine && push.under == Under::Nobody {
            switch.guard.push(Guard { file: push.from_file.clone(), expect: Expect::Anything });
        }
        Ok(())
    }

    /// The end of a domain.
    pub(super) fn unregister(&mut self, wish: UnregisterWish) -> Result<(), Failure> {
        let adopted: Vec<(DiskName, DiskLayers)> = self
            .state
            .layers
            .disks
            .iter()
            .filter(|(_, layers)| layers.active_layer().is_some())
            .map(|(name, layers)| (name.clone(), layers.clone()))
            .collect();
        if wish != UnregisterWish::Flatten {
            return Ok(());
        }
        self.erase_all()?;
        if adopted.is_empty() {
            return Ok(());
        }
        self.check_sound()?;
        self.check_off()?;
        let kept = adopted.iter().find(|(disk, _)| !self.config.disks.contains_key(disk));
        if let Some((disk, _)) = kept {
            return Err(Failure::new(
                Code::Unsupported,
                format!(
                    "disk '{disk}' was taken from the domain with its layers kept, and they would be lost"
                ),
            )
            .hint("--keep-layers leaves all files; or put the disk back first: snaptree domain disk add"));
        }
        let mut placed = Vec::new();
        let mut drop = Vec::new();
        let mut keep = Vec::new();
        for (disk, layers) in &adopted {
            placed.extend(self.placed(disk, layers)?);
            for (id, layer) in &layers.layers {
                self.no_foreign_dependants(&layer.file)?;
                drop.push((disk.clone(), id.clone(), layer.file.clone()));
            }
            keep.extend(self.config.disks.get(disk).map(|paths| paths.resolved.clone()));
        }
        let ended = self.state.tree.iter().map(|snapshot| snapshot.id).collect();
        let layers = self.config.layers.clone();
        let place = Place { layers: layers.clone(), disks: placed };
        let poison = Poison::AtFinish(ended);
        self.push("place plain images", Reversal::PointOfNoReturn, poison, &QemuStep::Place(place))?;
        let memory = self.state.layers.memory.iter();
        let memory = memory.map(|(id, memory)| (*id, memory.file.clone())).collect();
        let clean = Clean { layers, drop, memory, keep };
        self.push("clean", Reversal::ForwardOnly, Poison::Nothing, &QemuStep::Clean(clean))
    }

    /// Whether the lowest layer is built upon a file that is not a layer.
    fn has_base(&self, lowest: Option<&Layer>) -> bool {
        lowest.is_some_and(|layer| self.detail.backing.contains_key(&layer.file))
    }

    /// What is put at a registered path: the layer itself where it stands alone, else a flat copy.
    fn placed(&mut self, disk: &DiskName, layers: &DiskLayers) -> Result<Option<Placed>, Failure> {
        let (Some((_, active)), Some(paths)) = (layers.active_layer(), self.config.disks.get(disk)) else {
            return Ok(None);
        };
        let resolved = paths.resolved.clone();
        let facts = self.facts(&active.file)?.clone();
        let placed = |file: PathBuf, inode: Option<u64>| Placed {
            disk: disk.clone(),
            resolved: resolved.clone(),
            file,
            inode,
            mode: active.mode,
            active: active.file.clone(),
            stamp: facts.stamp,
        };
        if active.parent.is_none() {
            let in_place = self.config.keep_path == PathWish::Keep && active.file == resolved;
            return Ok((!in_place).then(|| placed(active.file.clone(), Some(facts.stamp.inode))));
        }
        let lowest = layers.layers.values().find(|layer| layer.registered);
        // Without a format in the header nobody can say how to read the base: then everything is copied.
        let own_backing = lowest.and_then(|layer| {
            let backing = self.detail.backing.get(&layer.file).filter(|backing| backing.format.is_some())?;
            let name = if backing.is_protocol() { backing.name.clone() } else { backing.file(&layer.file) };
            Some(Backing { name, format: backing.format.clone() })
        });
        let into = self.config.layers.join(format!("{disk}-{}.flat", self.operation));
        let allocated = layers.layers.values().filter_map(|layer| self.seen.files.get(&layer.file));
        let moved: u64 = allocated.map(|facts| facts.allocated_bytes).sum();
        let full = space::full_bytes(facts.virtual_size_bytes);
        // What lies in a base that is copied, too, is not known.
        let is_copied_whole = own_backing.is_none() && self.has_base(lowest);
        let copied = if is_copied_whole { full } else { moved.min(full) };
        self.costs.bytes_moved = self.costs.bytes_moved.saturating_add(moved);
        self.costs.bytes_freed = self.costs.bytes_freed.saturating_add(moved);
        self.costs.peak_space_bytes = self.costs.peak_space_bytes.saturating_add(copied);
        let step = Flatten {
            disk: disk.clone(),
            layers: self.config.layers.clone(),
            from: active.file.clone(),
            stamp: facts.stamp,
            own_backing,
            virtual_size_bytes: facts.virtual_size_bytes,
            mode: active.mode,
            into: into.clone(),
        };
        self.push(format!("flatten {disk}"), Reversal::Undoable, Poison::Nothing, &QemuStep::Flatten(step))?;
        Ok(Some(placed(into, None)))
    }
}

/// The plan does not fit the layers any more.
fn stale(disk: &DiskName, id: &LayerId) -> Failure {
    Failure::new(
        Code::Invalid,
        format!("layer {id} of disk '{disk}' is not what it was when this merge was planned"),
    )
}
