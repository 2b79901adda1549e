//! Planning: which steps a request takes. Pure; all that is known of the world is in the observation.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use snaptree_engine::domain::Domain;
use snaptree_engine::driver::{FileFacts, Observation, Plan};
use snaptree_engine::event::{
    MemoryKind, Place, SnapshotCreateRequested, SnapshotDeleteRequested, SnapshotRevertRequested,
};
use snaptree_engine::layer::{DiskLayers, Layer};
use snaptree_engine::operation::{Code, Failure, Poison, Request, Reversal, STEPS_MAX, Step};
use snaptree_engine::project::DomainState;
use snaptree_engine::{DiskName, LayerId, OperationId, SnapshotId};

use super::config::{DEPTH_MAX, DiskPaths, PathWish, QemuConfig};
use super::generation;
use super::internal::is_internal;
use super::live::{LiveMachine, Run};
use super::lock::in_use;
use super::observe::{Detail, Entry};
use super::step::{
    Adopt, DropLayers, Dropped, Expect, Freeze, Fresh, Guard, Live, OwnBacking, QemuStep, Quiesce, Switch,
    Turn, Under,
};

/// About what an empty overlay occupies.
const OVERLAY_BYTES: u64 = 256 << 10;

/// Plans a request.
pub(super) fn plan(
    operation: OperationId,
    request: &Request,
    state: &DomainState,
    observation: &Observation,
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
    /// The machine, if it runs; why it cannot be worked with, if it does.
    machine: Result<Option<LiveMachine>, Failure>,
    pub(super) steps: Vec<Step>,
    /// The generations that the steps so far switch to.
    turns: Vec<String>,
    pub(super) costs: Plan,
}

/// A disk's active layer as it is, or as it will be once the image is adopted.
struct Top {
    layer: LayerId,
    file: PathBuf,
    mode: u32,
    facts: FileFacts,
    expect: Expect,
    depth: usize,
}

impl Planner<'_> {
    fn plan(mut self, request: &Request) -> Result<Plan, Failure> {
        if let Request::Unregister(request) = request {
            self.unregister(request.wish)?;
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
    fn at_rest(&self, live: Live) -> Result<Live, Failure> {
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

    fn create(&mut self, request: &SnapshotCreateRequested) -> Result<(), Failure> {
        if self.state.tree.contains(request.snapshot) {
            return Err(Failure::new(Code::Exists, format!("snapshot '{}' is already there", request.name)));
        }
        if request.place == Place::Internal {
            return self.save(request);
        }
        if request.memory != MemoryKind::No && !request.before_revert {
            return Err(Failure::new(
                Code::Unsupported,
                "the memory of a machine that is off cannot be kept",
            ));
        }
        let mut tops = Vec::new();
        for disk in &request.disks {
            let Some(paths) = self.config.disks.get(disk).cloned() else {
                return Err(Failure::new(
                    Code::NotFound,
                    format!("domain '{}' has no disk '{disk}'", self.domain.name),
                ));
            };
            let adopted = self.state.layers.disks.get(disk).and_then(|layers| layers.active_layer());
            let top = match adopted {
                Some((id, layer)) => self.top(disk, id, layer)?,
                None => self.adopt(disk, &paths)?,
            };
            self.check_top(disk, &top)?;
            tops.push((disk.clone(), top));
        }
        let mut switch = self.empty_switch();
        switch.live = self
            .live()?
            .map(|live| if request.quiesce { self.at_rest(live) } else { Ok(live) })
            .transpose()?;
        for (disk, top) in tops {
            switch.fresh.push(self.fresh(&disk, (top.layer.clone(), top.file.clone()), top.mode, &top.facts));
            if switch.live.is_none() {
                switch.guard.push(Guard { file: top.file.clone(), expect: top.expect });
            }
            switch.freeze.push(Freeze {
                disk,
                layer: top.layer,
                file: top.file,
                mode: top.mode,
                snapshot: request.snapshot,
            });
        }
        self.push("switch", Reversal::PointOfNoReturn, Poison::Nothing, &QemuStep::Switch(switch))
    }

    fn top(&self, disk: &DiskName, id: &LayerId, layer: &Layer) -> Result<Top, Failure> {
        let facts = self.facts(&layer.file)?.clone();
        let bases = self.config.disks.get(disk).map_or(0, |paths| paths.bases.len());
        let depth = self.disk(disk)?.chain(id).len() + bases;
        let expect = Expect::Untouched { stamp: facts.stamp };
        Ok(Top { layer: id.clone(), file: layer.file.clone(), mode: layer.mode, facts, expect, depth })
    }

    fn check_top(&self, disk: &DiskName, top: &Top) -> Result<(), Failure> {
        if top.depth >= DEPTH_MAX {
            return Err(Failure::new(
                Code::Unsupported,
                format!("the chain of disk '{disk}' has {} layers, and {DEPTH_MAX} is the most", top.depth),
            )
            .hint("delete snapshots, so that their layers can be merged"));
        }
        self.check_owner(&top.file)
    }

    /// A new layer gets the owner of the one below it.
    fn check_owner(&self, below: &Path) -> Result<(), Failure> {
        let owner = self.detail.owners.get(below).copied();
        if self.detail.uid == 0 || owner.is_none_or(|owner| owner == self.detail.uid) {
            return Ok(());
        }
        Err(Failure::new(
            Code::Permission,
            format!(
                "image {} belongs to another user, and only root can give him the new layer",
                below.display()
            ),
        )
        .hint("run snaptree as root, or as the owner of the image"))
    }

    fn fresh(&mut self, disk: &DiskName, on: (LayerId, PathBuf), mode: u32, facts: &FileFacts) -> Fresh {
        let layer = LayerId::new(disk, self.operation);
        self.costs.peak_space_bytes = self.costs.peak_space_bytes.saturating_add(OVERLAY_BYTES);
        Fresh {
            disk: disk.clone(),
            file: self.config.file(&layer),
            layer,
            on: on.0,
            on_file: on.1,
            mode,
            virtual_size_bytes: facts.virtual_size_bytes,
        }
    }

    /// Plans the adoption of a registered image.
    fn adopt(&mut self, disk: &DiskName, paths: &DiskPaths) -> Result<Top, Failure> {
        let image = &paths.resolved;
        let facts = self.facts(image)?.clone();
        match self.detail.registered.get(disk) {
            Some(Entry::File { links: 1, .. }) => {}
            Some(Entry::File { links, .. }) => {
                return Err(Failure::new(
                    Code::Invalid,
                    format!("image {} has {links} names (hard links); a machine started by another one would miss \
                             its snapshots", image.display()),
                )
                .hint("remove the other names, or make copies of them"));
            }
            _ => {
                return Err(Failure::new(
                    Code::Drift,
                    format!("{} is no image file any more", image.display()),
                ));
            }
        }
        let own_backing = self.own_backing(image)?;
        let layer = LayerId::adopted(disk, self.operation);
        let file = match self.config.keep_path {
            PathWish::Keep => image.clone(),
            PathWish::Follow => {
                // What is built upon the path would read the machine's current disk from then on.
                self.no_foreign_dependants(image)?;
                self.config.file(&layer)
            }
        };
        let own_backing = own_backing.filter(|_| self.config.keep_path == PathWish::Follow);
        if own_backing.is_some() && self.machine()?.is_some() {
            return Err(Failure::new(
                Code::InUse,
                format!(
                    "image {} names what it is built upon by a relative path, which cannot be changed while the \
                     machine runs",
                    image.display()
                ),
            )
            .hint("shut the machine down for the first snapshot"));
        }
        let expect = match own_backing {
            Some(_) => Expect::SameFile { stamp: facts.stamp },
            None => Expect::Untouched { stamp: facts.stamp },
        };
        let step = Adopt {
            disk: disk.clone(),
            layer: layer.clone(),
            resolved: image.clone(),
            file: file.clone(),
            keep_path: self.config.keep_path,
            stamp: facts.stamp,
            mode: facts.mode,
            virtual_size_bytes: facts.virtual_size_bytes,
            own_backing,
            under: self.under(image)?,
            turn: self.turn(),
        };
        self.check_owner(image)?;
        self.push(format!("adopt {disk}"), Reversal::Undoable, Poison::Nothing, &QemuStep::Adopt(step))?;
        Ok(Top { layer, file, mode: facts.mode, facts, expect, depth: 1 + paths.bases.len() })
    }

    /// A relative backing name, with what it means.
    fn own_backing(&self, image: &Path) -> Result<Option<OwnBacking>, Failure> {
        let Some(backing) = self.detail.backing.get(image) else { return Ok(None) };
        if backing.is_protocol() {
            return Err(Failure::new(
                Code::Unsupported,
                format!(
                    "image {} is built upon {}, which is no file",
                    image.display(),
                    backing.name.display()
                ),
            ));
        }
        if backing.name.is_absolute() {
            return Ok(None);
        }
        if backing.format.is_none() {
            return Err(Failure::new(
                Code::BadImage,
                format!("image {} does not say which format its backing file has", image.display()),
            )
            .hint("write it into the header: qemu-img rebase -u -b BACKING -F FORMAT IMAGE"));
        }
        Ok(Some(OwnBacking { old: backing.clone(), absolute: backing.file(image) }))
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
        self.end_machine()?;
        let ran = self.machine()?.is_some();
        let mut drop = Vec::new();
        let mut switch = self.empty_switch();
        for disk in &snapshot.disks {
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
            switch.guard.push(Guard { file: current.file.clone(), expect });
            switch.gone.push((disk.clone(), active));
            self.costs.lost.push(format!("what the machine wrote to {disk} since its last snapshot"));
        }
        self.push("switch", Reversal::PointOfNoReturn, Poison::Nothing, &QemuStep::Switch(switch))?;
        self.drop_step(drop)?;
        self.start_machine(after)
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

    pub(super) fn drop_step(&mut self, drop: Vec<Dropped>) -> Result<(), Failure> {
        if drop.is_empty() {
            return Ok(());
        }
        let step = DropLayers { layers: self.config.layers.clone(), drop };
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
        self.push("mark as deleted", Reversal::PointOfNoReturn, poison, &QemuStep::Switch(switch))
    }
}
