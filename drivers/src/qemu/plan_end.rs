//! Planning the end of a domain.
//!
//! ```text
//!  a layer that stands alone                    goes back to its path as it is
//!  the registered image holds what a copy        the disk's content goes down into it (Fold): it is the same file
//!  would lose: snapshots, bitmaps, its room      again, with all that it held
//!  else                                         a copy takes its place, laid out as it was (Flatten)
//! ```
//! What others keep inside the layers above it goes with those, and has to be given up by name.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use snaptree_engine::driver::FileFacts;
use snaptree_engine::event::UnregisterWish;
use snaptree_engine::layer::{DiskLayers, Layer};
use snaptree_engine::operation::{Code, Failure, Poison, Reversal};
use snaptree_engine::reconcile::space;
use snaptree_engine::{DiskName, SnapshotId};

use super::config::PathWish;
use super::inside::foreign_names;
use super::plan::Planner;
use super::qcow2::Backing;
use super::step::{Clean, Flatten, Fold, Place, Placed, QemuStep};

impl Planner<'_> {
    /// Lets go of the domain.
    pub(super) fn unregister(
        &mut self,
        wish: UnregisterWish,
        give_up: &BTreeSet<String>,
    ) -> Result<(), Failure> {
        let layers = self.state.layers.disks.iter();
        let adopted = layers.filter(|(_, layers)| layers.active_layer().is_some());
        let adopted: Vec<(DiskName, DiskLayers)> =
            adopted.map(|(name, layers)| (name.clone(), layers.clone())).collect();
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
        let mut relative = Vec::new();
        for (disk, layers) in &adopted {
            self.check_given_up(layers, give_up)?;
            placed.extend(self.placed(disk, layers)?);
            for (id, layer) in &layers.layers {
                self.no_foreign_dependants(&layer.file)?;
                drop.push((disk.clone(), id.clone(), layer.file.clone()));
            }
            keep.extend(self.config.disks.get(disk).map(|paths| paths.resolved.clone()));
            relative.extend(self.relative(disk, layers));
        }
        let ended: Vec<SnapshotId> = self.state.tree.iter().map(|snapshot| snapshot.id).collect();
        // What can be taken back comes before what cannot.
        for fold in placed.iter().filter_map(|placed| placed.folded.clone()) {
            let poison = Poison::AtStart(ended.clone());
            self.push("bring back into the image", Reversal::ForwardOnly, poison, &QemuStep::Fold(fold))?;
        }
        let layers = self.config.layers.clone();
        let place = Place { layers: layers.clone(), disks: placed };
        let poison = Poison::AtFinish(ended);
        self.push("place plain images", Reversal::PointOfNoReturn, poison, &QemuStep::Place(place))?;
        let memory = self.state.layers.memory.iter();
        let memory = memory.map(|(id, memory)| (*id, memory.file.clone())).collect();
        let clean = Clean { layers, drop, memory, keep, relative };
        self.push("clean", Reversal::ForwardOnly, Poison::Nothing, &QemuStep::Clean(clean))
    }

    /// Whatever others keep in layers that go is given up by name.
    fn check_given_up(&self, layers: &DiskLayers, give_up: &BTreeSet<String>) -> Result<(), Failure> {
        for layer in layers.layers.values().filter(|layer| !layer.registered) {
            let snapshots = self.detail.tables.get(&layer.file).map(|entries| foreign_names(entries));
            let snapshot = snapshots.iter().flatten().find(|name| !give_up.contains(*name));
            let bitmaps = self.detail.bitmaps.get(&layer.file).into_iter().flatten();
            let bitmap = bitmaps.map(|bitmap| &bitmap.name).find(|name| !give_up.contains(*name));
            let (what, name) = match (snapshot, bitmap) {
                (Some(name), _) => ("a snapshot", name),
                (None, Some(name)) => ("a dirty bitmap", name),
                (None, None) => continue,
            };
            return Err(Failure::new(
                Code::Drift,
                format!(
                    "layer {} has {what} '{name}' inside that Snaptree did not make, and it would be gone with the layer",
                    layer.file.display()
                ),
            )
            .hint(format!("give it up: --give-up '{name}'; or keep the layers: domain remove --keep-layers")));
        }
        Ok(())
    }

    /// A relative name that the registered image had for what it is built upon.
    fn relative(&self, disk: &DiskName, layers: &DiskLayers) -> Option<(PathBuf, Backing)> {
        let paths = self.config.disks.get(disk)?;
        let name = paths.relative_base.clone()?;
        let registered = layers.layers.values().find(|layer| layer.registered)?;
        let format = self.detail.backing.get(&registered.file)?.format.clone()?;
        Some((paths.resolved.clone(), Backing { name, format: Some(format) }))
    }

    /// What is put at a registered path: the layer itself where it stands alone, else the registered image or a copy.
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
            folded: None,
        };
        if active.parent.is_none() {
            let in_place = self.config.keep_path == PathWish::Keep && active.file == resolved;
            return Ok((!in_place).then(|| placed(active.file.clone(), Some(facts.stamp.inode))));
        }
        let allocated = layers.layers.values().filter_map(|layer| self.seen.files.get(&layer.file));
        let moved: u64 = allocated.map(|facts| facts.allocated_bytes).sum();
        self.costs.bytes_moved = self.costs.bytes_moved.saturating_add(moved);
        self.costs.bytes_freed = self.costs.bytes_freed.saturating_add(moved);
        if let Some((registered, inode)) = self.holds_more(layers)? {
            let needed = moved.min(space::full_bytes(facts.virtual_size_bytes));
            self.costs.peak_space_bytes = self.costs.peak_space_bytes.saturating_add(needed);
            let (from, into, mode) = (active.file.clone(), registered.clone(), active.mode);
            let folded = Some(Fold { from, into, mode });
            return Ok(Some(Placed { folded, ..placed(registered, Some(inode)) }));
        }
        let into = self.flatten(disk, layers, active, &facts, moved)?;
        Ok(Some(placed(into, None)))
    }

    /// The registered image and its inode, if it holds what a copy would lose and can take the disk's content.
    fn holds_more(&self, layers: &DiskLayers) -> Result<Option<(PathBuf, u64)>, Failure> {
        let Some((active, top)) = layers.active_layer() else { return Ok(None) };
        let mut chain = layers.chain(active).into_iter().filter_map(|id| layers.layers.get(id));
        let Some(registered) = chain.find(|layer| layer.registered) else { return Ok(None) };
        let facts = self.facts(&registered.file)?;
        let inside = self.kept_inside(&registered.file);
        // Whoever had it allocated as a whole did so to have the room.
        if inside.is_empty() && facts.allocated_bytes < facts.virtual_size_bytes {
            return Ok(None);
        }
        if self.facts(&top.file)?.virtual_size_bytes < facts.virtual_size_bytes && !inside.is_empty() {
            return Err(Failure::new(
                Code::Unsupported,
                format!(
                    "image {} has {} inside, and the machine's disk is smaller than it: a copy would lose that",
                    registered.file.display(),
                    inside.join(", ")
                ),
            )
            .hint("keep the layers: domain remove --keep-layers"));
        }
        Ok(Some((registered.file.clone(), facts.stamp.inode)))
    }

    fn kept_inside(&self, file: &Path) -> Vec<String> {
        let snapshots = self.detail.tables.get(file).into_iter().flatten();
        let bitmaps = self.detail.bitmaps.get(file).into_iter().flatten();
        let snapshots = snapshots.map(|entry| format!("snapshot '{}'", entry.tag));
        snapshots.chain(bitmaps.map(|bitmap| format!("dirty bitmap '{}'", bitmap.name))).collect()
    }

    /// A copy of the disk, laid out as the registered image is.
    fn flatten(
        &mut self,
        disk: &DiskName,
        layers: &DiskLayers,
        active: &Layer,
        facts: &FileFacts,
        moved: u64,
    ) -> Result<PathBuf, Failure> {
        let lowest = layers.layers.values().find(|layer| layer.registered);
        // Without a format in the header nobody can say how to read the base: then everything is copied.
        let own_backing = lowest.and_then(|layer| {
            let backing = self.detail.backing.get(&layer.file).filter(|backing| backing.format.is_some())?;
            let name = if backing.is_protocol() { backing.name.clone() } else { backing.file(&layer.file) };
            Some(Backing { name, format: backing.format.clone() })
        });
        let full = space::full_bytes(facts.virtual_size_bytes);
        // What lies in a base that is copied, too, is not known.
        let is_copied_whole = own_backing.is_none() && self.has_base(lowest);
        let copied = if is_copied_whole { full } else { moved.min(full) };
        self.costs.peak_space_bytes = self.costs.peak_space_bytes.saturating_add(copied);
        let into = self.config.layers.join(format!("{disk}-{}.flat", self.operation));
        let step = Flatten {
            disk: disk.clone(),
            layers: self.config.layers.clone(),
            from: active.file.clone(),
            stamp: facts.stamp,
            own_backing,
            virtual_size_bytes: facts.virtual_size_bytes,
            format: lowest.and_then(|layer| self.detail.formats.get(&layer.file)).copied(),
            mode: active.mode,
            into: into.clone(),
        };
        self.push(format!("flatten {disk}"), Reversal::Undoable, Poison::Nothing, &QemuStep::Flatten(step))?;
        Ok(into)
    }

    /// Whether the lowest layer is built upon a file that is not a layer.
    fn has_base(&self, lowest: Option<&Layer>) -> bool {
        lowest.is_some_and(|layer| self.detail.backing.contains_key(&layer.file))
    }
}
