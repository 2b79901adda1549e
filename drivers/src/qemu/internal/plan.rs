//! Planning internal snapshots. Pure.

use std::collections::BTreeMap;
use std::path::PathBuf;

use snaptree_engine::SnapshotId;
use snaptree_engine::domain::RunState;
use snaptree_engine::driver::{Observation, SeenSnapshot};
use snaptree_engine::event::{DeleteWhat, MemoryKind, SnapshotCreateRequested, SnapshotRevertRequested};
use snaptree_engine::operation::{Code, Failure, Poison, Reversal};
use snaptree_engine::project::DomainState;
use snaptree_engine::tree::Snapshot;

use super::table::Entry;
use super::{Erase, Image, Load, Memory, Runs, Save, has_memory, tag};
use crate::qemu::live::Run;
use crate::qemu::plan::Planner;
use crate::qemu::runs::Runs as RunBy;
use crate::qemu::step::{Expect, QemuStep};

/// What QEMU keeps beside the memory itself: devices, tables.
const DEVICES_BYTES: u64 = 16 << 20;
/// QEMU would pass over a disk that it is not told of, and the snapshot would be of two instants.
pub(super) const NOT_HELD: &str = "an internal snapshot would not hold it";

/// Whether a snapshot is an internal one: none of the layers reads as it.
pub(in crate::qemu) fn is_internal(state: &DomainState, snapshot: SnapshotId) -> bool {
    state.layers.disks.values().all(|disk| disk.layer_of(snapshot).is_none())
}

/// Whether nothing but what the machine writes is there of any disk, so that internal snapshots are no danger to a layer.
fn stands_alone(state: &DomainState) -> bool {
    state.layers.disks.values().all(|disk| disk.layers.len() <= 1)
}

fn refused(code: Code, message: impl Into<String>, hint: impl Into<String>) -> Failure {
    Failure::new(code, message).hint(hint)
}

impl Planner<'_> {
    /// Every disk of the domain, in its order.
    fn images(&self) -> Result<Vec<Image>, Failure> {
        let mut images = Vec::new();
        for disk in &self.domain.disks {
            let file = self.written(&disk.name)?;
            // What a machine writes that runs, or that is ended for it, is given up until then.
            let expect = match self.machine()? {
                Some(_) => Expect::Anything,
                None => Expect::Untouched { stamp: self.facts(&file)?.stamp },
            };
            images.push(Image { disk: disk.name.clone(), file, expect });
        }
        Ok(images)
    }

    /// Takes an internal snapshot.
    pub(in crate::qemu) fn save(&mut self, request: &SnapshotCreateRequested) -> Result<(), Failure> {
        let name = &self.domain.name;
        if !stands_alone(self.state) || !self.state.tombstones.is_empty() {
            return Err(refused(
                Code::Unsupported,
                format!("domain '{name}' has layers of external snapshots, and the two kinds are not mixed"),
                "leave out --internal, or delete its snapshots first",
            ));
        }
        if request.disks.len() < self.domain.disks.len() {
            // libvirt's rule, in its words.
            return Err(refused(
                Code::Unsupported,
                "internal and full system snapshots require all disks to be selected for snapshot",
                "select all of them",
            ));
        }
        let images = self.images()?;
        let tag = tag(request.snapshot);
        if images.iter().any(|image| self.detail.entry(&image.file, &tag).is_some()) {
            return Err(Failure::new(Code::Exists, format!("an image has a snapshot {tag} already")));
        }
        let live = match self.machine()? {
            None => None,
            Some(_) if request.memory == MemoryKind::No => {
                // libvirt's rule, in its words.
                return Err(refused(
                    Code::Unsupported,
                    "internal snapshot of a running VM must include the memory state",
                    "leave out --disk-only, or shut the machine down",
                ));
            }
            Some(machine) => {
                self.check_whole(NOT_HELD)?;
                Some(Runs { was: self.may_be_saved(machine.run)?, ram_bytes: machine.ram_bytes })
            }
        };
        if let Some(live) = live {
            let needed_bytes = live.ram_bytes.saturating_add(DEVICES_BYTES);
            self.costs.bytes_moved = live.ram_bytes;
            self.costs.peak_space_bytes = self.costs.peak_space_bytes.saturating_add(needed_bytes);
        }
        let step = QemuStep::Save(Save { snapshot: request.snapshot, images, live });
        self.push("save", Reversal::Undoable, Poison::Nothing, &step)
    }

    fn may_be_saved(&self, run: Run) -> Result<Run, Failure> {
        match run {
            Run::Running | Run::Paused => Ok(run),
            Run::Stuck => Err(refused(
                Code::Unsupported,
                format!(
                    "domain '{}' is stopped by an error, and its memory cannot be kept now",
                    self.domain.name
                ),
                "QEMU's query-status tells which; put it right, let it go on, and try again",
            )),
        }
    }

    /// Reverts to an internal snapshot.
    pub(in crate::qemu) fn load(
        &mut self,
        request: &SnapshotRevertRequested,
        snapshot: &Snapshot,
    ) -> Result<(), Failure> {
        let images = self.images()?;
        self.check_loadable(snapshot, &images)?;
        self.costs.lost.push("what the machine did since its last snapshot".to_owned());
        if has_memory(snapshot) {
            return self.load_memory(request, snapshot, images);
        }
        let after = self.run_state_after(request, snapshot.state)?;
        self.end_machine()?;
        let step = QemuStep::Load(Load { snapshot: snapshot.id, images, memory: None });
        self.push("load", Reversal::PointOfNoReturn, Poison::Nothing, &step)?;
        self.start_machine(after)
    }

    /// All that can be known before a disk is touched.
    fn check_loadable(&self, snapshot: &Snapshot, images: &[Image]) -> Result<(), Failure> {
        let tag = tag(snapshot.id);
        for (index, image) in images.iter().enumerate() {
            let file = &image.file;
            self.no_foreign_dependants(file)?;
            let Some(entry) = self.detail.entry(file, &tag) else {
                return Err(refused(
                    Code::Drift,
                    format!("image {} has no snapshot '{}' ({tag}) any more", file.display(), snapshot.name),
                    "delete it with --metadata to forget it",
                ));
            };
            if index == 0 && has_memory(snapshot) && entry.memory_bytes == 0 {
                return Err(Failure::new(
                    Code::Drift,
                    format!("image {} has no memory with snapshot '{}'", file.display(), snapshot.name),
                ));
            }
            let open = self.machine()?.and_then(|machine| machine.node_of(file));
            if self.detail.bitmaps.contains_key(file) || open.is_some_and(|node| node.has_bitmaps) {
                return Err(refused(
                    Code::Unsupported,
                    format!("image {} has dirty bitmaps, and QEMU loads no snapshot then", file.display()),
                    "remove them (QMP block-dirty-bitmap-remove, qemu-img bitmap --remove) and try again",
                ));
            }
        }
        Ok(())
    }

    fn load_memory(
        &mut self,
        request: &SnapshotRevertRequested,
        snapshot: &Snapshot,
        images: Vec<Image>,
    ) -> Result<(), Failure> {
        let kept = images.first().and_then(|first| self.detail.entry(&first.file, &tag(snapshot.id)));
        let bytes = kept.map_or(0, |entry| entry.memory_bytes);
        let wish = match (request.run_state, snapshot.state) {
            (Some(RunState::Off), _) => {
                return Err(Failure::new(
                    Code::Unsupported,
                    "memory cannot be loaded into a machine that is off",
                ));
            }
            (Some(wish), _) => wish,
            (None, snaptree_engine::tree::SnapshotState::Paused) => RunState::Paused,
            (None, _) => RunState::Running,
        };
        let was = match self.machine()? {
            Some(machine) => {
                self.check_whole(NOT_HELD)?;
                machine.run.state()
            }
            None => RunState::Off,
        };
        let name = &self.domain.name;
        match (&self.config.runs, was) {
            (RunBy::Managed { .. } | RunBy::Commands { qmp: Some(_), .. }, _) => {}
            (RunBy::Attached { .. }, RunState::Running | RunState::Paused) => {}
            (RunBy::Attached { .. }, RunState::Off) => {
                return Err(refused(
                    Code::Unsupported,
                    format!(
                        "snapshot '{}' has memory, and domain '{name}' is off and started by someone else",
                        snapshot.name
                    ),
                    "start the machine and try again: the snapshot is loaded into it",
                ));
            }
            (RunBy::Apart | RunBy::Commands { qmp: None, .. }, _) => {
                return Err(refused(
                    Code::Unsupported,
                    format!(
                        "snapshot '{}' has memory, and QEMU of domain '{name}' cannot be reached",
                        snapshot.name
                    ),
                    "register the domain with --qmp or --launch",
                ));
            }
        }
        let memory = Some(Memory { wish, was, bytes });
        let step = QemuStep::Load(Load { snapshot: snapshot.id, images, memory });
        // QEMU reverts the disks first, and the memory may fail after that: there is only a way on.
        self.push("load with memory", Reversal::ForwardOnly, Poison::Nothing, &step)
    }

    /// Deletes internal snapshots, one after the other.
    pub(in crate::qemu) fn erase(
        &mut self,
        snapshots: &[SnapshotId],
        what: DeleteWhat,
    ) -> Result<(), Failure> {
        if what == DeleteWhat::Metadata {
            return Ok(());
        }
        let images = self.images()?;
        for snapshot in snapshots {
            let name = self.state.tree.get(*snapshot).map(|known| known.name.to_string()).unwrap_or_default();
            let step = QemuStep::Erase(Erase { snapshot: *snapshot, images: images.clone() });
            let poison = Poison::AtStart(vec![*snapshot]);
            self.push(format!("erase '{name}'"), Reversal::ForwardOnly, poison, &step)?;
            self.costs.lost.push(format!("snapshot '{name}'"));
        }
        Ok(())
    }
}

impl Planner<'_> {
    /// Deletes every internal snapshot of ours.
    pub(in crate::qemu) fn erase_all(&mut self) -> Result<(), Failure> {
        let tree = &self.state.tree;
        let below = tree.roots().into_iter().flat_map(|root| {
            let mut ids = tree.descendants(root.id);
            ids.push(root.id);
            ids
        });
        let all: Vec<SnapshotId> = below.filter(|id| is_internal(self.state, *id)).collect();
        if all.is_empty() {
            return Ok(());
        }
        self.check_sound()?;
        self.erase(&all, DeleteWhat::Snapshot)
    }
}

/// Snapshots of ours that the images have, for [`Observation::snapshots`].
pub(in crate::qemu) fn listed(
    state: &DomainState,
    tables: &BTreeMap<PathBuf, Vec<Entry>>,
    seen: &mut Observation,
) {
    let mut tags: BTreeMap<&str, (usize, &Entry)> = BTreeMap::new();
    for entry in tables.values().flatten() {
        tags.entry(&entry.tag).and_modify(|(count, _)| *count += 1).or_insert((1, entry));
    }
    let disks = state.domain.as_ref().map_or(0, |domain| domain.disks.len());
    for (tag, (count, entry)) in tags {
        let Some(id) = super::snapshot_of(tag).filter(|_| count == disks) else { continue };
        seen.snapshots.push(SeenSnapshot {
            id: Some(id),
            native: tag.to_owned(),
            parent: None,
            name: tag.to_owned(),
            description: None,
            taken: entry.taken,
            state: None,
            stays: None,
            helper: None,
        });
    }
}
