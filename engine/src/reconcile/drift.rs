//! Where the hypervisor and the log disagree, and no operation of ours explains it. Pure.
//!
//! A tombstone is no drift: what the hypervisor still holds of a deleted snapshot is ours. Nothing found here is ever
//! deleted or put right by itself; it is recorded, shown, and what it makes unsafe is refused when it is planned. What of
//! it is taken over is [`adopt`]'s.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::domain::Disk;
use crate::driver::{DriverError, ErrorClass, Observation, SeenSnapshot};
use crate::event::Place;
use crate::ids::{DiskName, LayerId, SnapshotId, SnapshotName};
use crate::layer::Role;
use crate::operation::{Code, Failure};
use crate::project::DomainState;
use crate::reconcile::adopt;

/// One difference.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(tag = "finding", rename_all = "kebab-case")]
pub enum Finding {
    /// The hypervisor does not have the machine any more.
    MachineGone {
        /// What it says, in words.
        why: String,
        /// What can be done about it.
        help: Option<String>,
    },
    /// The machine has other disks than the log says.
    DisksChanged {
        /// How, in words.
        changes: Vec<String>,
    },
    /// The hypervisor no longer has a snapshot of the log, or a file that it reads from.
    SnapshotLost {
        /// The snapshot.
        snapshot: SnapshotId,
        /// Its name.
        name: SnapshotName,
    },
    /// The hypervisor lists a snapshot that nobody asked Snaptree for.
    SnapshotFound {
        /// The hypervisor's own id.
        native: String,
        /// Its name there.
        name: String,
    },
    /// The hypervisor lists a snapshot that is there only for a while: a backup's. It is left alone.
    HelperFound {
        /// The hypervisor's own id.
        native: String,
        /// Its name there.
        name: String,
        /// Whose it is, in words.
        whose: String,
    },
    /// The hypervisor has a snapshot of ours under another name or description.
    SnapshotChanged {
        /// The snapshot.
        snapshot: SnapshotId,
        /// Its name in the log.
        name: SnapshotName,
        /// Its name there.
        found: String,
    },
    /// The machine stands on another snapshot than the log says.
    CurrentMoved {
        /// What the log says.
        expected: Option<SnapshotId>,
        /// The hypervisor's own id of what it says.
        found: Option<String>,
    },
    /// A file that nobody may write was written.
    LayerWritten {
        /// The disk.
        disk: DiskName,
        /// The layer.
        layer: LayerId,
        /// Its file.
        file: PathBuf,
    },
    /// A file of the log is gone.
    LayerMissing {
        /// The disk.
        disk: DiskName,
        /// The layer.
        layer: LayerId,
        /// Its file.
        file: PathBuf,
    },
    /// The file of a snapshot's memory was written, and nobody may.
    MemoryWritten {
        /// The snapshot.
        snapshot: SnapshotId,
        /// The file.
        file: PathBuf,
    },
    /// The file of a snapshot's memory is gone.
    MemoryMissing {
        /// The snapshot.
        snapshot: SnapshotId,
        /// The file.
        file: PathBuf,
    },
    /// A file that Snaptree did not make lies among its own.
    FileFound {
        /// The file.
        file: PathBuf,
    },
    /// A file outside the log is built upon what the machine writes, by the log: it may be the machine's real disk.
    BuiltUpon {
        /// What the log says that the machine writes.
        file: PathBuf,
        /// What is built upon it.
        above: PathBuf,
    },
    /// What the machine writes has a snapshot inside that somebody else made.
    InsideFound {
        /// The file.
        file: PathBuf,
        /// The snapshot's name there.
        name: String,
    },
    /// The machine's disks are switched to something else than the log says.
    GenerationMoved {
        /// What the log says.
        expected: Option<String>,
        /// What is there.
        found: Option<String>,
    },
}

/// What looking for drift came to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drift {
    /// Where the hypervisor and the log disagree.
    pub findings: BTreeSet<Finding>,
    /// Snapshots that somebody else made, and that were taken over just now.
    pub adopted: Vec<SnapshotName>,
    /// How the machine's disks have changed, in words; taken over just now.
    #[serde(default)]
    pub disks: Vec<String>,
}

/// What a failed look tells of a machine that is not there; none if it only could not be looked at.
pub fn gone(error: &DriverError) -> Option<Finding> {
    let is_gone = error.class == ErrorClass::Permanent && error.failure.code == Code::NotFound;
    let Failure { message, hint, .. } = &error.failure;
    is_gone.then(|| Finding::MachineGone { why: message.clone(), help: hint.clone() })
}

/// All differences. While an operation is open there are none: its step may be half done.
pub fn findings(state: &DomainState, seen: &Observation) -> BTreeSet<Finding> {
    if !state.open.is_empty() || !state.registered {
        return BTreeSet::new();
    }
    let mut found = BTreeSet::new();
    // A hypervisor that merges by itself keeps the list of its snapshots by itself; elsewhere there are only layers.
    if state.domain.as_ref().is_some_and(|domain| domain.capabilities.merges_itself) {
        compare_snapshots(state, seen, &mut found);
        if let (Some(domain), Some(disks)) = (&state.domain, &seen.disks) {
            let changes = adopt::disk_changes(&domain.disks, disks);
            found.extend((!changes.is_empty()).then_some(Finding::DisksChanged { changes }));
        }
    } else if state.place() == Some(Place::Internal) {
        compare_inside(state, seen, &mut found);
    }
    compare_layers(state, seen, &mut found);
    compare_written(state, seen, &mut found);
    found
}

/// What somebody else put upon or into the files that the machine writes.
fn compare_written(state: &DomainState, seen: &Observation, found: &mut BTreeSet<Finding>) {
    let is_frozen = |file: &PathBuf| {
        let mut disks = state.layers.disks.values();
        disks.any(|disk| {
            disk.layers.iter().any(|(id, layer)| layer.file == *file && disk.active.as_ref() != Some(id))
        })
    };
    for (file, above) in seen.foreign_dependants.iter().filter(|(file, _)| !is_frozen(file)) {
        let upon = |above: &PathBuf| Finding::BuiltUpon { file: file.clone(), above: above.clone() };
        found.extend(above.iter().map(upon));
    }
    // Where the machine's own snapshots are inside the images, another one there is in nobody's way.
    if state.place() == Some(Place::Internal) {
        return;
    }
    for (file, inside) in seen.inside.iter().filter(|(file, _)| !is_frozen(file)) {
        let within = |name: &String| Finding::InsideFound { file: file.clone(), name: name.clone() };
        found.extend(inside.snapshots.iter().map(within));
    }
}

/// Snapshots inside the images: the driver lists those of ours that are whole, and none of others.
fn compare_inside(state: &DomainState, seen: &Observation, found: &mut BTreeSet<Finding>) {
    let is_there = |id| seen.snapshots.iter().any(|listed| listed.id == Some(id));
    for snapshot in state.tree.iter().filter(|snapshot| !is_there(snapshot.id)) {
        found.insert(Finding::SnapshotLost { snapshot: snapshot.id, name: snapshot.name.clone() });
    }
    for listed in seen.snapshots.iter().filter(|listed| !state.forgot(listed)) {
        if listed.id.is_some_and(|id| !state.tree.contains(id)) {
            found.insert(Finding::SnapshotFound { native: listed.native.clone(), name: listed.name.clone() });
        }
    }
}

fn compare_snapshots(state: &DomainState, seen: &Observation, found: &mut BTreeSet<Finding>) {
    let marked = |id| seen.snapshots.iter().find(|listed| listed.id == Some(id));
    for snapshot in state.tree.iter().filter(|snapshot| marked(snapshot.id).is_none()) {
        found.insert(Finding::SnapshotLost { snapshot: snapshot.id, name: snapshot.name.clone() });
    }
    for listed in &seen.snapshots {
        let ours = listed.id.is_some_and(|id| state.tree.contains(id) || state.tombstones.contains_key(&id));
        if ours || state.forgot(listed) {
            continue;
        }
        if let Some(whose) = listed.helper.clone() {
            let (native, name) = (listed.native.clone(), listed.name.clone());
            found.insert(Finding::HelperFound { native, name, whose });
        } else {
            found.insert(Finding::SnapshotFound { native: listed.native.clone(), name: listed.name.clone() });
        }
    }
    for edit in adopt::edits(state, seen) {
        if let (Some(known), Some(listed)) = (state.tree.get(edit.snapshot), marked(edit.snapshot)) {
            let (snapshot, name) = (known.id, known.name.clone());
            found.insert(Finding::SnapshotChanged { snapshot, name, found: listed.name.clone() });
        }
    }
    let expected = state.tree.current().map(|current| current.id);
    if expected != nearest_live(state, seen) {
        found.insert(Finding::CurrentMoved { expected, found: seen.current.clone() });
    }
}

/// The snapshot that the machine stands on, or its nearest ancestor there that is not deleted or forgotten.
fn nearest_live(state: &DomainState, seen: &Observation) -> Option<SnapshotId> {
    let listed: BTreeMap<&str, &SeenSnapshot> =
        seen.snapshots.iter().map(|listed| (listed.native.as_str(), listed)).collect();
    let current = seen.current.as_deref().and_then(|native| listed.get(native).copied());
    let parent = |of: &&SeenSnapshot| of.parent.as_deref().and_then(|native| listed.get(native).copied());
    std::iter::successors(current, parent)
        .take(listed.len())
        .filter(|standing| !state.forgot(standing))
        .find_map(|standing| standing.id.filter(|id| state.tree.contains(*id)))
}

fn compare_layers(state: &DomainState, seen: &Observation, found: &mut BTreeSet<Finding>) {
    if state.layers.generation != seen.generation {
        let (expected, generation) = (state.layers.generation.clone(), seen.generation.clone());
        found.insert(Finding::GenerationMoved { expected, found: generation });
    }
    for (disk, layers) in &state.layers.disks {
        for (id, layer) in &layers.layers {
            let (disk, file) = (disk.clone(), layer.file.clone());
            let Some(facts) = seen.files.get(&layer.file) else {
                if let Role::Frozen(snapshot) = layers.role(id, &state.tree)
                    && let Some(lost) = state.tree.get(snapshot)
                {
                    found.insert(Finding::SnapshotLost { snapshot, name: lost.name.clone() });
                }
                found.insert(Finding::LayerMissing { disk, layer: id.clone(), file });
                continue;
            };
            if layer.stamp.is_some_and(|stamp| stamp != facts.stamp) {
                found.insert(Finding::LayerWritten { disk, layer: id.clone(), file });
            }
        }
    }
    for (snapshot, memory) in &state.layers.memory {
        let (snapshot, file) = (*snapshot, memory.file.clone());
        match seen.memory.get(&memory.file) {
            None => found.insert(Finding::MemoryMissing { snapshot, file }),
            Some(stamp) => *stamp != memory.stamp && found.insert(Finding::MemoryWritten { snapshot, file }),
        };
    }
    // The registered image of a disk that was never snapshotted is seen, and is no layer yet.
    let adopted =
        |disk: &Disk| state.layers.disks.get(&disk.name).is_some_and(|known| known.active.is_some());
    if state.domain.as_ref().is_some_and(|domain| domain.disks.iter().all(adopted)) {
        let ours: BTreeSet<&PathBuf> = state.layers.files().collect();
        let foreign = seen.files.keys().chain(seen.unreadable.keys()).filter(|file| !ours.contains(file));
        found.extend(foreign.map(|file| Finding::FileFound { file: file.clone() }));
    }
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| "nothing".to_owned());
        match self {
            Self::MachineGone { why, help: Some(help) } => write!(f, "{why}; {help}"),
            Self::MachineGone { why, help: None } => f.write_str(why),
            Self::DisksChanged { changes } => f.write_str(&changes.join("; ")),
            Self::SnapshotLost { name, .. } => write!(f, "snapshot '{name}' is lost: its data is not there"),
            Self::SnapshotFound { native, name } => {
                write!(f, "the hypervisor has a snapshot '{name}' ({native}) that was not made by Snaptree")
            }
            Self::HelperFound { native, name, whose } => {
                write!(f, "the hypervisor has a snapshot '{name}' ({native}), {whose}: it is left alone")
            }
            Self::SnapshotChanged { name, found, .. } if name.as_str() == found => {
                write!(f, "the description of snapshot '{name}' was changed at the hypervisor")
            }
            Self::SnapshotChanged { name, found, .. } => {
                write!(f, "snapshot '{name}' is called '{found}' at the hypervisor")
            }
            Self::CurrentMoved { expected, found } => write!(
                f,
                "the machine stands on {}, and the log says {}",
                or_none(found),
                or_none(&expected.map(|id| id.to_string()))
            ),
            Self::LayerWritten { disk, file, .. } => {
                write!(f, "{} of {disk} was written, and nobody may write it", file.display())
            }
            Self::LayerMissing { disk, file, .. } => write!(f, "{} of {disk} is missing", file.display()),
            Self::MemoryWritten { file, .. } => {
                write!(f, "memory file {} was written, and nobody may write it", file.display())
            }
            Self::MemoryMissing { file, .. } => write!(f, "memory file {} is missing", file.display()),
            Self::FileFound { file } => write!(f, "{} was not made by Snaptree", file.display()),
            Self::BuiltUpon { file, above } => write!(
                f,
                "{}, which Snaptree does not know, is built upon {}, which the machine writes by the log: is it the \
                 machine's disk now?",
                above.display(),
                file.display()
            ),
            Self::InsideFound { file, name } => {
                write!(f, "{} has a snapshot '{name}' inside that was not made by Snaptree", file.display())
            }
            Self::GenerationMoved { expected, found } => {
                write!(
                    f,
                    "the disks are switched to {}, and the log says {}",
                    or_none(found),
                    or_none(expected)
                )
            }
        }
    }
}
