//! Planning a create: adopting what is registered, a fresh layer for each disk, the memory.

use std::path::{Path, PathBuf};

use snaptree_engine::driver::FileFacts;
use snaptree_engine::event::{MemoryKind, Place, SnapshotCreateRequested};
use snaptree_engine::layer::Layer;
use snaptree_engine::operation::{Code, Failure, Poison, Reversal};
use snaptree_engine::{DiskName, LayerId};

use super::config::{DEPTH_MAX, DiskPaths, LeftOut, PathWish, memory_file};
use super::live::Run;
use super::observe::Entry;
use super::plan::Planner;
use super::runs::Runs;
use super::step::{
    Adopt, Expect, Freeze, Fresh, Guard, KeepMemory, OwnBacking, QemuStep, Switch, TakeMemory,
};
use super::switch::no_memory;

/// About what an empty overlay occupies.
const OVERLAY_BYTES: u64 = 256 << 10;

/// A disk's active layer as it is, or as it will be once the image is adopted.
struct Top {
    layer: LayerId,
    file: PathBuf,
    mode: u32,
    facts: FileFacts,
    expect: Expect,
    depth: usize,
    is_adopted: bool,
}

impl Top {
    /// Where it is until it is adopted, and from then on.
    fn file_now(&self, paths: &DiskPaths) -> PathBuf {
        if self.is_adopted { self.file.clone() } else { paths.resolved.clone() }
    }
}

impl Planner<'_> {
    pub(super) fn create(&mut self, request: &SnapshotCreateRequested) -> Result<(), Failure> {
        if self.state.tree.contains(request.snapshot) {
            return Err(Failure::new(Code::Exists, format!("snapshot '{}' is already there", request.name)));
        }
        if request.place == Place::Internal {
            return self.save(request);
        }
        self.check_memory(request)?;
        let mut tops = Vec::new();
        for disk in &request.disks {
            let Some(paths) = &self.config.disks.get(disk).cloned() else {
                return Err(Failure::new(
                    Code::NotFound,
                    format!("domain '{}' has no disk '{disk}'", self.domain.name),
                ));
            };
            let adopted = self.state.layers.disks.get(disk).and_then(|layers| layers.active_layer());
            let top = match adopted {
                Some((id, layer)) => self.top(disk, id, layer)?,
                None => self.adopt(disk, paths)?,
            };
            self.check_top(disk, &top)?;
            self.tell_bitmaps(disk, &top.file_now(paths));
            self.check_inside(&top.file_now(paths), &request.request.give_up)?;
            tops.push((disk.clone(), top));
        }
        let mut switch = self.empty_switch();
        switch.live = self
            .live()?
            .map(|live| if request.quiesce { self.at_rest(live) } else { Ok(live) })
            .transpose()?;
        let mut keep = None;
        if let (MemoryKind::External, Some(live), Some((_, top))) =
            (request.memory, switch.live, tops.first())
        {
            let file = memory_file(&self.config.layers, self.operation);
            switch.memory = Some(TakeMemory { file: file.clone(), like: top.file.clone(), mode: top.mode });
            keep = Some((file, top.mode, live));
        }
        self.leave_out(&mut switch)?;
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
        self.push("switch", Reversal::PointOfNoReturn, Poison::Nothing, &QemuStep::Switch(switch))?;
        let Some((file, mode, live)) = keep else { return Ok(()) };
        let keep = KeepMemory { turn: self.turn(), snapshot: request.snapshot, file, mode, live };
        self.push("keep the memory", Reversal::ForwardOnly, Poison::Nothing, &QemuStep::Keep(keep))
    }

    /// What the machine writes besides is told, or is a reason not to take the snapshot.
    fn leave_out(&mut self, switch: &mut Switch) -> Result<(), Failure> {
        if switch.live.is_none() {
            return Ok(());
        }
        switch.beside = if switch.memory.is_some() { LeftOut::Refuse } else { self.left_out };
        if switch.beside == LeftOut::Refuse {
            self.check_whole(switch.not_held())?;
        }
        switch.left_out = self.written_beside()?;
        self.costs.left_out.clone_from(&switch.left_out);
        Ok(())
    }

    /// Whether the machine has a memory that can be kept, and what room that takes.
    fn check_memory(&mut self, request: &SnapshotCreateRequested) -> Result<(), Failure> {
        let name = &self.domain.name;
        match (request.memory, self.machine()?) {
            (MemoryKind::No, _) => Ok(()),
            (MemoryKind::Internal, _) if request.before_revert => Ok(()),
            (MemoryKind::Internal, _) => Err(Failure::new(
                Code::Unsupported,
                format!("the memory of domain '{name}' cannot be kept inside its images"),
            )),
            (MemoryKind::External, _) if !matches!(self.config.runs, Runs::Managed { .. }) => Err(Failure::new(
                Code::Unsupported,
                format!("domain '{name}' is started by someone else, who could not start it with its memory"),
            )
            .hint("leave out --memory; a domain that is registered with --launch can keep it")),
            // What a revert gives up is kept as far as there is anything.
            (MemoryKind::External, None) if request.before_revert => Ok(()),
            (MemoryKind::External, None) => Err(no_memory()),
            (MemoryKind::External, Some(machine)) if machine.run == Run::Stuck => Err(Failure::new(
                Code::Unsupported,
                format!("the machine of domain '{name}' is stopped by something that it must be helped out of first"),
            )
            .hint("query-status of its QEMU tells what it is; or leave out --memory")),
            (MemoryKind::External, Some(machine)) => {
                let bytes = machine.ram_bytes;
                self.costs.peak_space_bytes = self.costs.peak_space_bytes.saturating_add(bytes);
                Ok(())
            }
        }
    }

    fn top(&self, disk: &DiskName, id: &LayerId, layer: &Layer) -> Result<Top, Failure> {
        let facts = self.facts(&layer.file)?.clone();
        let bases = self.config.disks.get(disk).map_or(0, |paths| paths.bases.len());
        let depth = self.disk(disk)?.chain(id).len() + bases;
        let expect = Expect::Untouched { stamp: facts.stamp };
        Ok(Top {
            layer: id.clone(),
            file: layer.file.clone(),
            mode: layer.mode,
            facts,
            expect,
            depth,
            is_adopted: true,
        })
    }

    fn check_top(&self, disk: &DiskName, top: &Top) -> Result<(), Failure> {
        if top.depth >= DEPTH_MAX {
            return Err(Failure::new(
                Code::Unsupported,
                format!("the chain of disk '{disk}' has {} layers, and {DEPTH_MAX} is the most", top.depth),
            )
            .hint("delete snapshots, so that their layers can be merged"));
        }
        if top.is_adopted && self.detail.unclosed.contains(&top.file) && self.machine()?.is_none() {
            let file = top.file.display();
            return Err(Failure::new(
                Code::BadImage,
                format!(
                    "image {file} was not closed by who wrote it last, and must be mended before it is frozen"
                ),
            )
            .hint(format!("start the machine and shut it down, or: qemu-img check -r all {file}")));
        }
        self.check_owner(&top.file)
    }

    /// A new layer gets the owner of the one below it.
    pub(super) fn check_owner(&self, below: &Path) -> Result<(), Failure> {
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

    pub(super) fn fresh(
        &mut self,
        disk: &DiskName,
        on: (LayerId, PathBuf),
        mode: u32,
        facts: &FileFacts,
    ) -> Fresh {
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
        let unclosed = self.detail.unclosed.contains(image) && self.machine()?.is_none();
        let expect = match own_backing {
            // It is mended first, and by how much that changes it is not known.
            _ if unclosed => Expect::Anything,
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
            unclosed,
        };
        self.check_owner(image)?;
        self.push(format!("adopt {disk}"), Reversal::Undoable, Poison::Nothing, &QemuStep::Adopt(step))?;
        Ok(Top {
            layer,
            file,
            mode: facts.mode,
            facts,
            expect,
            depth: 1 + paths.bases.len(),
            is_adopted: false,
        })
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
}
