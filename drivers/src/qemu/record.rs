//! What a step writes and reads, and what the log records of it when it is done. Pure.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use snaptree_engine::driver::Touched;
use snaptree_engine::layer::{FileStamp, Layer, LayerChange, MemoryFile};
use snaptree_engine::operation::{Code, Failure};
use snaptree_engine::{DiskName, LayerId, SnapshotId};

use super::config::active;
use super::internal::{Erase, Load, Save};
use super::step::{
    Adopt, Clean, DropLayers, Dropped, Fresh, KeepMemory, Pull, Push, QemuStep, Switch, Writer,
};

/// Where the stamp of a file comes from: the file itself, or an observation.
pub(super) type StampOf<'a> = &'a dyn Fn(&Path) -> Option<FileStamp>;

fn stamped(stamp_of: StampOf<'_>, file: &Path) -> Result<FileStamp, Failure> {
    stamp_of(file).ok_or_else(|| Failure::new(Code::Drift, format!("layer {} is missing", file.display())))
}

impl QemuStep {
    /// The files that the step works on; none for a step that changes what the registered paths are. A switch writes
    /// `active` for all disks, so no two go on beside one another.
    pub(super) fn touches(&self) -> Option<Touched> {
        let writes = match self {
            Self::Adopt(_)
            | Self::Flatten(_)
            | Self::Fold(_)
            | Self::Place(_)
            | Self::Clean(_)
            | Self::Power(_)
            | Self::Resume(_) => {
                return None;
            }
            Self::Keep(keep) => BTreeSet::from([keep.file.clone(), active(&keep.turn.layers)]),
            Self::Switch(switch) => return Some(switch.touches()),
            Self::Save(Save { images, .. })
            | Self::Load(Load { images, .. })
            | Self::Erase(Erase { images, .. }) => images.iter().map(|image| image.file.clone()).collect(),
            Self::Pull(pull) => BTreeSet::from([pull.file.clone()]),
            Self::Push(push) => push.writes().cloned().collect(),
            Self::Drop(drop) => drop.files().cloned().collect(),
        };
        Some(Touched { writes, reads: BTreeSet::new() })
    }
}

impl Push {
    /// The tombstones between are dropped once it is switched.
    pub(super) fn writes(&self) -> impl Iterator<Item = &PathBuf> {
        self.between.iter().chain([&self.from_file, &self.into_file])
    }
}

impl Adopt {
    /// What the log records when it is done.
    pub(super) fn changes(&self) -> Vec<LayerChange> {
        let facts = Layer {
            file: self.file.clone(),
            parent: None,
            snapshot: None,
            mode: self.mode,
            virtual_size_bytes: self.virtual_size_bytes,
            registered: true,
            stamp: None,
        };
        let (disk, layer) = (self.disk.clone(), self.layer.clone());
        vec![
            LayerChange::Added { disk: disk.clone(), layer: layer.clone(), facts },
            LayerChange::Activated { disk, layer },
            LayerChange::Switched { generation: Some(self.turn.generation.clone()) },
        ]
    }
}

impl Switch {
    pub(super) fn touches(&self) -> Touched {
        let fresh = self.fresh.iter().map(|fresh| &fresh.file);
        let freeze = self.freeze.iter().map(|freeze| &freeze.file);
        let push = self.push.iter().flat_map(Push::writes);
        let restack = self.restack.iter().map(|restack| &restack.file);
        let guard = self.guard.iter().map(|guard| &guard.file);
        let memory = self.memory.iter().map(|memory| &memory.file);
        let files = fresh.chain(freeze).chain(push).chain(restack).chain(guard).chain(memory).cloned();
        let writes = files.chain([active(&self.turn.layers)]).collect();
        let onto = self.restack.iter().flat_map(|restack| [&restack.old_file, &restack.onto_file]);
        let reads = self.fresh.iter().map(|fresh| &fresh.on_file).chain(onto).cloned();
        Touched { writes, reads: reads.collect() }
    }

    /// What the log records when it is done.
    pub(super) fn changes(&self, stamp_of: StampOf<'_>) -> Result<Vec<LayerChange>, Failure> {
        let mut changes: Vec<LayerChange> = self.fresh.iter().map(Fresh::added).collect();
        for frozen in &self.freeze {
            changes.push(LayerChange::Frozen {
                disk: frozen.disk.clone(),
                layer: frozen.layer.clone(),
                snapshot: frozen.snapshot,
                stamp: stamped(stamp_of, &frozen.file)?,
            });
        }
        changes.extend(
            self.fresh
                .iter()
                .map(|fresh| LayerChange::Activated { disk: fresh.disk.clone(), layer: fresh.layer.clone() }),
        );
        for push in &self.push {
            let stamp = match push.writer {
                Writer::Machine => None,
                Writer::Nobody => Some(stamped(stamp_of, &push.into_file)?),
            };
            let (from, into) = (push.from.clone(), push.into.clone());
            changes.push(LayerChange::Pushed { disk: push.disk.clone(), from, into, stamp });
        }
        for restack in &self.restack {
            let stamp = match restack.writer {
                Writer::Machine => None,
                Writer::Nobody => Some(stamped(stamp_of, &restack.file)?),
            };
            changes.push(LayerChange::Rebased {
                disk: restack.disk.clone(),
                layer: restack.layer.clone(),
                parent: Some(restack.onto.clone()),
                stamp,
            });
        }
        changes.push(LayerChange::Switched { generation: Some(self.turn.generation.clone()) });
        Ok(changes)
    }
}

impl Fresh {
    fn added(&self) -> LayerChange {
        LayerChange::Added {
            disk: self.disk.clone(),
            layer: self.layer.clone(),
            facts: Layer {
                file: self.file.clone(),
                parent: Some(self.on.clone()),
                snapshot: None,
                mode: self.mode,
                virtual_size_bytes: self.virtual_size_bytes,
                registered: false,
                stamp: None,
            },
        }
    }

    /// The name under which it is made, before it is moved into place.
    pub(super) fn draft(&self) -> PathBuf {
        let mut name = self.file.clone().into_os_string();
        name.push(".new");
        PathBuf::from(name)
    }
}

impl Pull {
    /// What the log records when it is done, or taken back.
    pub(super) fn rebased(&self, parent: &LayerId, stamp: FileStamp) -> LayerChange {
        LayerChange::Rebased {
            disk: self.disk.clone(),
            layer: self.layer.clone(),
            parent: Some(parent.clone()),
            stamp: (self.writer == Writer::Nobody).then_some(stamp),
        }
    }
}

impl Push {
    /// What the log records of the two files when it is done, or taken back.
    pub(super) fn stamped(&self, stamp_of: StampOf<'_>) -> Result<Vec<LayerChange>, Failure> {
        let mut changes = vec![LayerChange::Stamped {
            disk: self.disk.clone(),
            layer: self.into.clone(),
            stamp: stamped(stamp_of, &self.into_file)?,
        }];
        if self.writer == Writer::Nobody {
            let stamp = stamped(stamp_of, &self.from_file)?;
            changes.push(LayerChange::Stamped { disk: self.disk.clone(), layer: self.from.clone(), stamp });
        }
        Ok(changes)
    }
}

impl DropLayers {
    /// What is unlinked.
    pub(super) fn files(&self) -> impl Iterator<Item = &PathBuf> {
        self.drop.iter().map(|dropped| &dropped.file).chain(self.memory.iter().map(|(_, file)| file))
    }

    /// What the log records when it is done.
    pub(super) fn changes(&self) -> Vec<LayerChange> {
        let dropped = |d: &Dropped| LayerChange::Dropped { disk: d.disk.clone(), layer: d.layer.clone() };
        self.drop.iter().map(dropped).chain(memory_dropped(&self.memory)).collect()
    }
}

fn memory_dropped(memory: &[(SnapshotId, PathBuf)]) -> impl Iterator<Item = LayerChange> {
    memory.iter().map(|(snapshot, _)| LayerChange::MemoryDropped { snapshot: *snapshot })
}

impl KeepMemory {
    /// What the log records when it is done.
    pub(super) fn changes(&self, memory: MemoryFile) -> Vec<LayerChange> {
        vec![
            LayerChange::MemoryKept { snapshot: self.snapshot, memory },
            LayerChange::Switched { generation: Some(self.turn.generation.clone()) },
        ]
    }
}

impl Clean {
    /// What the log records when it is done.
    pub(super) fn changes(&self) -> Vec<LayerChange> {
        let dropped = |(disk, layer, _): &(DiskName, LayerId, PathBuf)| LayerChange::Dropped {
            disk: disk.clone(),
            layer: layer.clone(),
        };
        self.drop.iter().map(dropped).chain(memory_dropped(&self.memory)).collect()
    }
}
