//! Planning: which steps a request takes. Pure; all that is known of the world is in the observation.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use snaptree_engine::domain::{Domain, RunState};
use snaptree_engine::driver::{FileFacts, Observation, Plan};
use snaptree_engine::event::{DeleteWhat, MemoryKind, SnapshotDeleteRequested, SnapshotRevertRequested};
use snaptree_engine::layer::{DiskLayers, Layer, MemoryFile};
use snaptree_engine::operation::{Code, Failure, Poison, Request, Reversal, STEPS_MAX, Step};
use snaptree_engine::project::DomainState;
use snaptree_engine::tree::Snapshot;
use snaptree_engine::{DiskName, DomainName, LayerId, OperationId, SnapshotId};

use super::config::{LeftOut, QemuConfig};
use super::generation;
use super::internal::is_internal;
use super::live::{LiveMachine, Run};
use super::lock::in_use;
use super::observe::Detail;
use super::runs::Runs;
use super::step::{
    DropLayers, Dropped, Expect, Guard, KeptMemory, Live, LoadMemory, Next, QemuStep, Quiesce, Switch, Turn,
    Under,
};

/// Plans a request.
pub(super) fn plan(
    operation: OperationId,
    request: &Request,
    state: &DomainState,
    observation: &Observation,
    left_out: LeftOut,
) -> Result<Plan, Failure> {
    let (domain, config) = QemuConfig::of(state).map_err(Failure::refused)?;
    let detail = Detail::of(observation).map_err(Failure::refused)?;
    let machine = detail.machine.at_work(observation, &config).map(Option::<&LiveMachine>::cloned);
    let planner = Planner {
        operation,
        state,
        seen: observation,
        domain,
        config,
        machine,
        detail,
        left_out,
        steps: Vec::new(),
        turns: Vec::new(),
        costs: Plan::default(),
    };
    planner.plan(request).map_err(Failure::refused)
}

/// A plan in the making.
pub(super) struct Planner<'a> {
    pub(super) operation: OperationId,
    pub(super) state: &'a DomainState,
    pub(super) seen: &'a Observation,
    pub(super) domain: &'a Domain,
    pub(super) config: QemuConfig,
    pub(super) detail: Detail,
    pub(super) left_out: LeftOut,
    /// The machine, if it runs; why it cannot be worked with, if it does.
    machine: Result<Option<LiveMachine>, Failure>,
    pub(super) steps: Vec<Step>,
    /// The generations that the steps so far switch to.
    turns: Vec<String>,
    pub(super) costs: Plan,
}

impl Planner<'_> {
    fn plan(mut self, request: &Request) -> Result<Plan, Failure> {
        if let Request::Unregister(request) = request {
            self.unregister(request.wish, &request.request.give_up)?;
        } else {
            self.check_sound()?;
            match request {
                Request::Create(request) => self.create(request)?,
                Request::Revert(request) => self.revert(request)?,
                Request::Delete(request) => self.delete(request)?,
                Request::Merge(request) => self.merge(&request.plan)?,
                Request::Edit(_) => {
                    return Err(Failure::new(Code::Unsupported, "QEMU keeps no names of snapshots"));
                }
                Request::Unregister(_) => {}
            }
        }
        if self.steps.len() > STEPS_MAX {
            return Err(Failure::new(Code::Unsupported, "the request would take too many steps"));
        }
        Ok(Plan { steps: self.steps, ..self.costs })
    }

    /// Nobody has the machine's disks open but a machine that answers, and everything is as the log says.
    pub(super) fn check_sound(&self) -> Result<(), Failure> {
        super::drift::check(self.state, self.seen, &self.config, &self.detail)?;
        match self.machine()? {
            Some(machine) => machine.check(self.state, &self.config),
            None => Ok(()),
        }
    }

    /// The machine, if it runs.
    pub(super) fn machine(&self) -> Result<Option<&LiveMachine>, Failure> {
        self.machine.as_ref().map(Option::as_ref).map_err(Clone::clone)
    }

    /// Whether the running machine has a layer open.
    pub(super) fn under(&self, file: &Path) -> Result<Under, Failure> {
        let open = self.machine()?.is_some_and(|machine| machine.node_of(file).is_some());
        Ok(if open { Under::Guest } else { Under::Nobody })
    }

    /// A switch of what the running machine writes; none if it is off.
    pub(super) fn live(&self) -> Result<Option<Live>, Failure> {
        Ok(self.machine()?.map(|machine| Live { was: machine.run, quiesce: Quiesce::No }))
    }

    /// The same with the guest's file systems frozen meanwhile. A machine that is off has none that are in use.
    pub(super) fn at_rest(&self, live: Live) -> Result<Live, Failure> {
        let name = &self.domain.name;
        match (live.was, &self.config.agent) {
            (_, None) => Err(super::live::no_agent(name)),
            (Run::Running, Some(_)) => Ok(Live { quiesce: Quiesce::ByAgent, ..live }),
            (Run::Paused | Run::Stuck, Some(_)) => Err(Failure::new(
                Code::Unsupported,
                format!("domain '{name}' is paused, and a guest agent only hears while its machine runs"),
            )
            .hint("let it go on and try again, or leave out --quiesce")),
        }
    }

    /// Refuses what cannot be done while the machine runs.
    pub(super) fn check_off(&self) -> Result<(), Failure> {
        match (self.machine()?, self.seen.in_use.first()) {
            (Some(_), Some(holder)) => Err(in_use(holder)),
            _ => Ok(()),
        }
    }

    pub(super) fn push(
        &mut self,
        name: impl Into<String>,
        reversal: Reversal,
        poison: Poison,
        step: &QemuStep,
    ) -> Result<(), Failure> {
        let data = serde_json::to_value(step).map_err(|error| {
            Failure::new(Code::Invalid, format!("a step cannot be written down: {error}"))
        })?;
        self.steps.push(Step { name: name.into(), reversal, poison, data });
        Ok(())
    }

    /// The next switch: from the generation of the last step that switches to this step's.
    pub(super) fn turn(&mut self) -> Turn {
        let previous = self.turns.last().cloned().or_else(|| self.state.layers.generation.clone());
        let generation = generation::name(self.operation, self.steps.len());
        self.turns.push(generation.clone());
        Turn { layers: self.config.layers.clone(), previous, generation }
    }

    pub(super) fn empty_switch(&mut self) -> Switch {
        Switch {
            turn: self.turn(),
            fresh: Vec::new(),
            freeze: Vec::new(),
            push: Vec::new(),
            restack: Vec::new(),
            guard: Vec::new(),
            gone: Vec::new(),
            live: None,
            memory: None,
            next: None,
            left_out: Vec::new(),
            beside: LeftOut::Warn,
        }
    }

    /// What the machine writes of a disk.
    pub(super) fn written(&self, disk: &DiskName) -> Result<PathBuf, Failure> {
        self.config.written(disk, self.state).ok_or_else(|| {
            Failure::new(Code::NotFound, format!("domain '{}' has no disk '{disk}'", self.domain.name))
        })
    }

    /// What the machine, if it runs, writes besides the disks of its domain, in words.
    pub(super) fn written_beside(&self) -> Result<Vec<String>, Failure> {
        let mut ours = BTreeSet::new();
        for disk in &self.domain.disks {
            ours.insert(self.written(&disk.name)?);
        }
        Ok(self.machine()?.map_or_else(Vec::new, |machine| machine.writes_beside(|file| ours.contains(file))))
    }

    /// Refuses a snapshot, or the return to one, that would put a machine's memory beside disks of another instant.
    pub(super) fn check_whole(&self, what: &str) -> Result<(), Failure> {
        match self.written_beside()? {
            beside if beside.is_empty() => Ok(()),
            beside => Err(not_whole(&self.domain.name, &beside, what)),
        }
    }

    pub(super) fn disk(&self, name: &DiskName) -> Result<&DiskLayers, Failure> {
        self.state
            .layers
            .disks
            .get(name)
            .ok_or_else(|| Failure::new(Code::Invalid, format!("disk '{name}' has no layers")))
    }

    pub(super) fn layer<'s>(&'s self, disk: &DiskName, id: &LayerId) -> Result<&'s Layer, Failure> {
        self.disk(disk)?.layers.get(id).ok_or_else(|| {
            Failure::new(Code::Invalid, format!("layer {id} of disk '{disk}' is not in the log"))
        })
    }

    /// What was observed of an image.
    pub(super) fn facts(&self, file: &Path) -> Result<&FileFacts, Failure> {
        self.seen.files.get(file).ok_or_else(|| match self.seen.unreadable.get(file) {
            Some(reason) => {
                Failure::new(Code::BadImage, format!("image {} cannot be used: {reason}", file.display()))
            }
            None => Failure::new(Code::Drift, format!("image {} is missing", file.display())),
        })
    }

    pub(super) fn no_foreign_dependants(&self, file: &Path) -> Result<(), Failure> {
        match self.seen.foreign_dependants.get(file).and_then(|found| found.first()) {
            Some(foreign) => Err(Failure::new(
                Code::Drift,
                format!(
                    "{}, which Snaptree does not know, is built upon {}",
                    foreign.display(),
                    file.display()
                ),
            )
            .hint("move its data elsewhere, or put it upon another image, and try again")),
            None => Ok(()),
        }
    }

    fn revert(&mut self, request: &SnapshotRevertRequested) -> Result<(), Failure> {
        let snapshot = self.state.tree.get(request.snapshot).filter(|snapshot| !snapshot.lost);
        let snapshot =
            snapshot.ok_or_else(|| Failure::new(Code::NotFound, "the snapshot is not there any more"))?;
        if is_internal(self.state, snapshot.id) {
            return self.load(request, snapshot);
        }
        let state = snapshot.state;
        let after = self.run_state_after(request, state)?;
        let memory = match after {
            RunState::Off => None,
            _ => self.memory_of(snapshot)?,
        };
        if memory.is_none() {
            self.end_machine()?;
        }
        if memory.is_some() {
            self.check_whole("a snapshot with memory does not hold it, and would be loaded beside it")?;
        }
        let ran = self.machine()?.is_some();
        let (mut drop, mut old) = (Vec::new(), Vec::new());
        let mut switch = self.empty_switch();
        for disk in self.reverted_disks(snapshot, memory.as_ref())? {
            let layers = self.disk(disk)?;
            let (target, held) = layers.layer_of(snapshot.id).ok_or_else(|| {
                Failure::new(
                    Code::Drift,
                    format!("no layer of disk '{disk}' holds snapshot '{}'", snapshot.name),
                )
            })?;
            let (active, current) = layers
                .active_layer()
                .ok_or_else(|| Failure::new(Code::Drift, format!("disk '{disk}' has no active layer")))?;
            let (target, held, active, current) =
                (target.clone(), held.clone(), active.clone(), current.clone());
            drop.push(self.dropped(disk, &active, &current)?);
            self.check_owner(&held.file)?;
            let facts = self.facts(&held.file)?.clone();
            switch.fresh.push(self.fresh(disk, (target, held.file.clone()), held.mode, &facts));
            // What it wrote until now is given up; what it writes from now on, should this be cut short, is not. A
            // machine that is ended for it writes until then.
            let stamp = self.facts(&current.file)?.stamp;
            let expect = if ran { Expect::Anything } else { Expect::Untouched { stamp } };
            // Beside the one that runs the next one is started.
            if memory.is_none() || !ran {
                switch.guard.push(Guard { file: current.file.clone(), expect });
            }
            old.push(current.file.clone());
            switch.gone.push((disk.clone(), active));
            self.costs.lost.push(format!("what the machine wrote to {disk} since its last snapshot"));
        }
        let next = memory.as_ref().and_then(|memory| self.next(&switch, memory));
        switch.next.clone_from(&next);
        self.push("switch", Reversal::PointOfNoReturn, Poison::Nothing, &QemuStep::Switch(switch))?;
        let (Some(memory), Some(next)) = (memory, next) else {
            self.drop_step(drop, Vec::new())?;
            return self.start_machine(after);
        };
        let load = LoadMemory { next, old, memory: memory.file, stamp: memory.stamp, wish: after };
        self.push("load the memory", Reversal::ForwardOnly, Poison::Nothing, &QemuStep::Resume(load))?;
        self.drop_step(drop, Vec::new())
    }

    /// The disks that a revert puts back: those of the snapshot that the machine still has.
    fn reverted_disks<'s>(
        &self,
        snapshot: &'s Snapshot,
        memory: Option<&MemoryFile>,
    ) -> Result<Vec<&'s DiskName>, Failure> {
        let name = &self.domain.name;
        let left = self.state.left_by_revert(snapshot.id);
        if memory.is_some() && !left.is_empty() {
            return Err(Failure::new(
                Code::Unsupported,
                format!(
                    "the memory of snapshot '{}' is of a machine with other disks than domain '{name}' has now: {}",
                    snapshot.name,
                    left.join("; ")
                ),
            )
            .hint("--off reverts the disks alone; or give the domain the disks again that it had"));
        }
        let disks: Vec<&DiskName> =
            snapshot.disks.iter().filter(|disk| self.config.disks.contains_key(*disk)).collect();
        if disks.is_empty() {
            return Err(Failure::new(
                Code::Unsupported,
                format!("snapshot '{}' holds none of the disks that domain '{name}' has now", snapshot.name),
            )
            .hint(format!("snaptree domain disk add {name} NAME=FILE puts a disk back")));
        }
        Ok(disks)
    }

    /// The memory of a snapshot, if it has one in a file of its own; as it was when it was kept.
    fn memory_of(&self, snapshot: &Snapshot) -> Result<Option<MemoryFile>, Failure> {
        let memory = match (snapshot.memory, self.state.layers.memory.get(&snapshot.id)) {
            (MemoryKind::External, Some(memory)) => memory,
            _ => return Ok(None),
        };
        if !matches!(self.config.runs, Runs::Managed { .. }) {
            return Err(Failure::new(
                Code::Unsupported,
                format!("domain '{}' is started by someone else, and not with its memory", self.domain.name),
            )
            .hint("a domain that is registered with --launch can be reverted to it"));
        }
        let what = match self.seen.memory.get(&memory.file) {
            Some(found) if *found == memory.stamp => return Ok(Some(memory.clone())),
            Some(_) => "was changed since it was kept",
            None => "is missing",
        };
        Err(Failure::new(Code::Drift, format!("memory file {} {what}", memory.file.display())).hint(
            "its disks are not touched by that; delete the snapshot if its memory is not to be had back",
        ))
    }

    /// The QEMU that is started on the new layers; paths of its own beside those of the one that runs.
    fn next(&self, switch: &Switch, memory: &MemoryFile) -> Option<Next> {
        let Runs::Managed { qmp, pid_file, .. } = &self.config.runs else { return None };
        // Shorter than the machine's own, so that they fit where that does.
        let random: String = self.operation.to_string().chars().rev().take(12).collect();
        let disks = self.config.disks.iter().map(|(name, paths)| {
            let fresh = switch.fresh.iter().find(|fresh| fresh.disk == *name).map(|fresh| fresh.file.clone());
            let layers = self.state.layers.disks.get(name);
            let active = || Some(layers?.active_layer()?.1.file.clone());
            (name.clone(), fresh.or_else(active).unwrap_or_else(|| paths.resolved.clone()))
        });
        Some(Next {
            qmp: qmp.with_file_name(format!("{random}.qmp")),
            pid_file: pid_file.with_file_name(format!("{random}.pid")),
            disks: disks.collect(),
            memory: Some(KeptMemory { file: memory.file.clone(), stamp: memory.stamp }),
        })
    }

    /// A layer that may be unlinked.
    pub(super) fn dropped(
        &mut self,
        disk: &DiskName,
        id: &LayerId,
        layer: &Layer,
    ) -> Result<Dropped, Failure> {
        let file = layer.file.clone();
        if layer.registered {
            return Err(Failure::new(
                Code::Unsupported,
                format!(
                    "{} is the registered image of disk '{disk}', which is never removed",
                    file.display()
                ),
            ));
        }
        self.no_foreign_dependants(&file)?;
        let facts = self.facts(&file)?.clone();
        if facts.internal_snapshots > 0 {
            return Err(Failure::new(
                Code::Unsupported,
                format!("{} has snapshots inside the image, which would be lost", file.display()),
            )
            .hint("qemu-img snapshot -l shows them"));
        }
        self.costs.bytes_freed = self.costs.bytes_freed.saturating_add(facts.allocated_bytes);
        Ok(Dropped { disk: disk.clone(), layer: id.clone(), file, inode: facts.stamp.inode })
    }

    pub(super) fn drop_step(
        &mut self,
        drop: Vec<Dropped>,
        memory: Vec<(SnapshotId, PathBuf)>,
    ) -> Result<(), Failure> {
        if drop.is_empty() && memory.is_empty() {
            return Ok(());
        }
        let step = DropLayers { layers: self.config.layers.clone(), drop, memory };
        self.push("drop", Reversal::ForwardOnly, Poison::Nothing, &QemuStep::Drop(step))
    }

    /// A delete only marks: the data is folded away by merges of its own.
    fn delete(&mut self, request: &SnapshotDeleteRequested) -> Result<(), Failure> {
        let unique: BTreeSet<SnapshotId> = request.snapshots.iter().copied().collect();
        if let Some(missing) = unique.iter().find(|id| !self.state.tree.contains(**id)) {
            return Err(Failure::new(Code::NotFound, format!("snapshot {missing} is not there any more")));
        }
        if request.snapshots.iter().all(|id| is_internal(self.state, *id)) {
            return self.erase(&request.snapshots, request.what);
        }
        let switch = self.empty_switch();
        let poison = Poison::AtFinish(request.snapshots.clone());
        self.push("mark as deleted", Reversal::PointOfNoReturn, poison, &QemuStep::Switch(switch))?;
        if request.what == DeleteWhat::Metadata {
            return Ok(());
        }
        let kept = |id: &SnapshotId| Some((*id, self.state.layers.memory.get(id)?.file.clone()));
        let memory: Vec<(SnapshotId, PathBuf)> = unique.iter().filter_map(kept).collect();
        self.drop_step(Vec::new(), memory)
    }
}

/// The refusal of a snapshot that would not hold all that the machine writes.
pub(super) fn not_whole(domain: &DomainName, beside: &[String], what: &str) -> Failure {
    Failure::new(
        Code::Unsupported,
        format!("the machine also writes {}, no disk of domain '{domain}': {what}", beside.join(" and ")),
    )
    .hint(format!(
        "snaptree domain disk add {domain} NAME=FILE registers a disk; or take it from the machine"
    ))
}
