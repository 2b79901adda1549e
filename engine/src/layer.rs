//! The layer graph: per disk, the image files and what each is built upon.
//!
//! It is physical where the [snapshot tree](crate::tree) is logical. A layer *is* a file. What a layer
//! reads as may belong to a snapshot that lives, to one that was deleted (a *tombstone*), or to the running
//! machine (*active*); which of the three is derived, so the two structures cannot contradict each other.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::ids::{DiskName, LayerId, SnapshotId};
use crate::tree::Tree;

/// What tells that a frozen file was not touched since it was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileStamp {
    /// The inode number.
    pub inode: u64,
    /// The file's length in bytes.
    pub size_bytes: u64,
    /// The time of the last write, in nanoseconds since the epoch.
    pub mtime_ns: i64,
}

/// One image file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// The file: absolute, resolved.
    pub file: PathBuf,
    /// The layer that it is built upon; none for the lowest one that Snaptree knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<LayerId>,
    /// The snapshot whose content this layer reads as, alive or deleted; none for the active layer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapshotId>,
    /// The permission bits that the file had before it was frozen.
    pub mode: u32,
    /// What the guest sees as the disk's size.
    pub virtual_size_bytes: u64,
    /// Whether it is the image that the user registered: that file is never unlinked.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub registered: bool,
    /// The file as it was when it was last made or changed by Snaptree; none while the machine writes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stamp: Option<FileStamp>,
}

/// One disk's layers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskLayers {
    /// The layer that the machine writes; none before the disk was adopted.
    pub active: Option<LayerId>,
    /// Every file that Snaptree answers for.
    pub layers: BTreeMap<LayerId, Layer>,
}

/// How the memory of a machine was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryWay {
    /// The guest ran on while it was written.
    Background,
    /// The guest was stopped until it was written.
    Stopped,
}

/// The memory of a machine at the moment of a snapshot, in a file of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryFile {
    /// The file: absolute, resolved.
    pub file: PathBuf,
    /// The file as it was when it was whole.
    pub stamp: FileStamp,
    /// How it was taken.
    pub way: MemoryWay,
}

/// What a layer stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The machine writes it.
    Active,
    /// It holds a live snapshot.
    Frozen(SnapshotId),
    /// It holds a deleted snapshot, or nothing that anyone asked to keep.
    Tombstone(Option<SnapshotId>),
}

impl DiskLayers {
    /// The layers that are built directly upon `layer`.
    pub fn dependants<'a>(&'a self, layer: &'a LayerId) -> impl Iterator<Item = &'a LayerId> {
        self.layers.iter().filter(move |(_, l)| l.parent.as_ref() == Some(layer)).map(|(id, _)| id)
    }

    /// What `layer` stands for while `tree` is the snapshot tree.
    pub fn role(&self, id: &LayerId, tree: &Tree) -> Role {
        if self.active.as_ref() == Some(id) {
            return Role::Active;
        }
        match self.layers.get(id).and_then(|layer| layer.snapshot) {
            Some(snapshot) if tree.contains(snapshot) => Role::Frozen(snapshot),
            deleted => Role::Tombstone(deleted),
        }
    }

    /// The layer that reads as `snapshot`.
    pub fn layer_of(&self, snapshot: SnapshotId) -> Option<(&LayerId, &Layer)> {
        self.layers.iter().find(|(_, layer)| layer.snapshot == Some(snapshot))
    }

    /// The active layer with its id.
    pub fn active_layer(&self) -> Option<(&LayerId, &Layer)> {
        let id = self.active.as_ref()?;
        self.layers.get_key_value(id)
    }

    /// `layer` and all it is built upon, topmost first. Ends at a cycle, which no sound log has.
    pub fn chain<'a>(&'a self, layer: &'a LayerId) -> Vec<&'a LayerId> {
        let mut chain = Vec::new();
        let mut next = Some(layer);
        while let Some((id, layer)) = next.and_then(|id| self.layers.get_key_value(id)) {
            if chain.len() > self.layers.len() {
                break;
            }
            chain.push(id);
            next = layer.parent.as_ref();
        }
        chain
    }
}

/// All disks of a domain.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerGraph {
    /// By target name.
    pub disks: BTreeMap<DiskName, DiskLayers>,
    /// The machine's memory at the moment of a snapshot, where that is kept in a file of its own.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub memory: BTreeMap<SnapshotId, MemoryFile>,
    /// The name of the generation folder that is switched on; none before the first adoption.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<String>,
}

impl LayerGraph {
    /// The disk's layers; adds the disk if it was unknown.
    fn disk_mut(&mut self, disk: &DiskName) -> &mut DiskLayers {
        self.disks.entry(disk.clone()).or_default()
    }

    /// Every file that Snaptree answers for.
    pub fn files(&self) -> impl Iterator<Item = &PathBuf> {
        let layers = self.disks.values().flat_map(|disk| disk.layers.values().map(|layer| &layer.file));
        layers.chain(self.memory.values().map(|memory| &memory.file))
    }

    /// Applies one recorded change. Total: what names an unknown layer changes nothing.
    pub fn apply(&mut self, change: &LayerChange) {
        match change {
            LayerChange::Added { disk, layer, facts } => {
                self.disk_mut(disk).layers.insert(layer.clone(), facts.clone());
            }
            LayerChange::Frozen { disk, layer, snapshot, stamp } => {
                if let Some(layer) = self.disk_mut(disk).layers.get_mut(layer) {
                    layer.snapshot = Some(*snapshot);
                    layer.stamp = Some(*stamp);
                }
            }
            LayerChange::Activated { disk, layer } => {
                let disk = self.disk_mut(disk);
                if let Some(facts) = disk.layers.get_mut(layer) {
                    facts.snapshot = None;
                    facts.stamp = None;
                    disk.active = Some(layer.clone());
                }
            }
            LayerChange::Rebased { disk, layer, parent, stamp } => {
                if let Some(layer) = self.disk_mut(disk).layers.get_mut(layer) {
                    layer.parent = parent.clone();
                    layer.stamp = *stamp;
                }
            }
            LayerChange::Pushed { disk, from, into, stamp } => self.disk_mut(disk).push(from, into, *stamp),
            LayerChange::Dropped { disk, layer } => {
                let disk = self.disk_mut(disk);
                disk.layers.remove(layer);
                disk.active.take_if(|active| active == layer);
            }
            LayerChange::Stamped { disk, layer, stamp } => {
                if let Some(layer) = self.disk_mut(disk).layers.get_mut(layer) {
                    layer.stamp = Some(*stamp);
                }
            }
            LayerChange::MemoryKept { snapshot, memory } => {
                self.memory.insert(*snapshot, memory.clone());
            }
            LayerChange::MemoryDropped { snapshot } => {
                self.memory.remove(snapshot);
            }
            LayerChange::Switched { generation } => self.generation.clone_from(generation),
        }
    }
}

impl DiskLayers {
    /// `into` reads as `from` did, and stands for what `from` stood for; what was built on `from` is built on `into`.
    fn push(&mut self, from: &LayerId, into: &LayerId, stamp: Option<FileStamp>) {
        if !self.layers.contains_key(from) || !self.layers.contains_key(into) {
            return;
        }
        let snapshot = self.layers.get_mut(from).and_then(|layer| layer.snapshot.take());
        for layer in self.layers.values_mut() {
            if layer.parent.as_ref() == Some(from) {
                layer.parent = Some(into.clone());
            }
        }
        if let Some(layer) = self.layers.get_mut(into) {
            layer.snapshot = snapshot;
            layer.stamp = stamp;
        }
        if self.active.as_ref() == Some(from) {
            self.active = Some(into.clone());
        }
    }
}

/// One change of the layer graph, as a step's outcome records it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "change", rename_all = "kebab-case")]
pub enum LayerChange {
    /// A file was made, or an existing one adopted.
    Added {
        /// The disk.
        disk: DiskName,
        /// The new layer.
        layer: LayerId,
        /// All that is known of it.
        facts: Layer,
    },
    /// A layer was frozen as `snapshot`'s content.
    Frozen {
        /// The disk.
        disk: DiskName,
        /// The layer.
        layer: LayerId,
        /// Whose content it is.
        snapshot: SnapshotId,
        /// The file as it was frozen.
        stamp: FileStamp,
    },
    /// The machine writes this layer from now on. The former active layer holds nothing then.
    Activated {
        /// The disk.
        disk: DiskName,
        /// The layer.
        layer: LayerId,
    },
    /// A layer was put upon another one, and reads as before.
    Rebased {
        /// The disk.
        disk: DiskName,
        /// The layer.
        layer: LayerId,
        /// What it is built upon now.
        parent: Option<LayerId>,
        /// The file afterwards; none for the active layer.
        stamp: Option<FileStamp>,
    },
    /// `from` went down into `into`, whose file now is what `from`'s was.
    Pushed {
        /// The disk.
        disk: DiskName,
        /// The layer whose content moved.
        from: LayerId,
        /// The file that took it.
        into: LayerId,
        /// `into` afterwards; none if it is active.
        stamp: Option<FileStamp>,
    },
    /// The file was unlinked.
    Dropped {
        /// The disk.
        disk: DiskName,
        /// The layer.
        layer: LayerId,
    },
    /// Snaptree changed a frozen file's header or mode, not what it reads as.
    Stamped {
        /// The disk.
        disk: DiskName,
        /// The layer.
        layer: LayerId,
        /// The file afterwards.
        stamp: FileStamp,
    },
    /// A snapshot's memory is in that file.
    MemoryKept {
        /// Whose memory it is.
        snapshot: SnapshotId,
        /// The file.
        memory: MemoryFile,
    },
    /// The file of a snapshot's memory was unlinked.
    MemoryDropped {
        /// Whose memory it was.
        snapshot: SnapshotId,
    },
    /// Another generation is switched on, or none any more.
    Switched {
        /// Its folder's name.
        generation: Option<String>,
    },
}
