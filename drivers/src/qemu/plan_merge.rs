//! Planning merges.

use std::collections::BTreeSet;
use std::path::PathBuf;

use snaptree_engine::layer::{Layer, Role};
use snaptree_engine::operation::{Code, Failure, Poison, Reversal};
use snaptree_engine::reconcile::merge::{MergeAction, MergePlan};
use snaptree_engine::reconcile::space;
use snaptree_engine::{DiskName, LayerId};

use super::plan::Planner;
use super::step::{Dropped, Expect, Guard, Pull, Push, QemuStep, Restack, Switch, Under, Writer};

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
        let mut size_below = 0;
        for file in [&lower.file].into_iter().chain(&files).chain([&upper.file]) {
            let size = self.facts(file)?.virtual_size_bytes;
            if size < size_below {
                return Err(Failure::new(
                    Code::Unsupported,
                    format!("disk '{disk}' was made smaller in between, and its layers cannot be pushed"),
                ));
            }
            size_below = size;
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
}

/// The plan does not fit the layers any more.
fn stale(disk: &DiskName, id: &LayerId) -> Failure {
    Failure::new(
        Code::Invalid,
        format!("layer {id} of disk '{disk}' is not what it was when this merge was planned"),
    )
}
