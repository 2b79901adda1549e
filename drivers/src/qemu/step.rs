//! The steps that the driver plans. They are data: journaled before anything is done, and enough to do a step,
//! to tell what became of it, and to take it back.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use snaptree_engine::domain::RunState;
use snaptree_engine::layer::FileStamp;
use snaptree_engine::operation::{Code, Failure, Step};
use snaptree_engine::{DiskName, LayerId, SnapshotId};

use super::config::{LeftOut, PathWish};
use super::internal::{Erase, Load, Save};
use super::live::Run;
use super::qcow2::{Backing, FormatOptions};

/// One step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub(super) enum QemuStep {
    /// Takes a registered image into the layers folder.
    Adopt(Adopt),
    /// Switches to another generation.
    Switch(Switch),
    /// A layer takes what it needs of the tombstones below it.
    Pull(Pull),
    /// A frozen layer goes down into the tombstone below it.
    Push(Push),
    /// Unlinks layers that nothing needs.
    Drop(DropLayers),
    /// Copies a disk's current content into one plain file.
    Flatten(Flatten),
    /// Brings what a disk is back into its registered image.
    Fold(Fold),
    /// Puts plain images at the registered paths.
    Place(Place),
    /// Removes all that Snaptree made for the domain.
    Clean(Clean),
    /// Starts or ends the machine.
    Power(Power),
    /// The memory that a switch began to take is kept.
    Keep(KeepMemory),
    /// The machine goes on from its memory.
    Resume(LoadMemory),
    /// Takes an internal snapshot.
    Save(Save),
    /// Goes back to one.
    Load(Load),
    /// Deletes one.
    Erase(Erase),
}

impl QemuStep {
    /// What a journaled step says.
    pub(super) fn of(step: &Step) -> Result<Self, Failure> {
        Self::deserialize(&step.data).map_err(|error| {
            Failure::new(Code::Invalid, format!("step '{}' cannot be read: {error}", step.name))
                .hint("was it planned by another version of snaptree?")
        })
    }
}

impl QemuStep {
    /// Whether the machine may run while it is done.
    pub(super) fn is_under_machine(&self) -> bool {
        match self {
            Self::Adopt(adopt) => adopt.under == Under::Guest,
            Self::Switch(switch) => switch.live.is_some(),
            Self::Pull(pull) => pull.under == Under::Guest,
            Self::Push(push) => push.under == Under::Guest,
            Self::Power(_) | Self::Keep(_) | Self::Erase(_) => true,
            Self::Save(save) => save.live.is_some(),
            Self::Load(load) => load.memory.is_some(),
            Self::Resume(_)
            | Self::Drop(_)
            | Self::Flatten(_)
            | Self::Fold(_)
            | Self::Place(_)
            | Self::Clean(_) => false,
        }
    }
}

/// From one generation to the next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Turn {
    /// The layers folder.
    pub(super) layers: PathBuf,
    /// The generation that is switched on until then; none before the first.
    pub(super) previous: Option<String>,
    /// The one that is switched on.
    pub(super) generation: String,
}

/// Whether the machine writes a layer, or a snapshot (or tombstone) holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Writer {
    /// The machine may write it while it runs.
    Machine,
    /// Nobody.
    Nobody,
}

/// Whether the machine may have the layers open that a step works on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Under {
    /// It must not: the step was planned for files that nobody uses.
    #[default]
    Nobody,
    /// It may; if it is off by then, qemu-img does the work.
    Guest,
}

impl Under {
    /// For what is not written down.
    pub(super) fn is_nobody(&self) -> bool {
        *self == Self::Nobody
    }
}

/// [`QemuStep::Power`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Power {
    pub(super) wish: RunState,
    /// What it was at planning.
    pub(super) was: RunState,
}

/// A switch under a running machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Live {
    /// Whether the guest ran when this was planned, and has to run again afterwards.
    pub(super) was: Run,
    /// Whether the guest's file systems are frozen for the moment of the snapshot.
    #[serde(default, skip_serializing_if = "Quiesce::is_no")]
    pub(super) quiesce: Quiesce,
}

/// Whether the guest is asked to quiesce.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Quiesce {
    /// It is not.
    #[default]
    No,
    /// By the guest agent.
    ByAgent,
}

impl Quiesce {
    /// For what is not written down.
    pub(super) fn is_no(&self) -> bool {
        *self == Self::No
    }
}

/// [`QemuStep::Adopt`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Adopt {
    pub(super) disk: DiskName,
    pub(super) layer: LayerId,
    /// Where the image is.
    pub(super) resolved: PathBuf,
    /// Where it will be; the same path where it is kept.
    pub(super) file: PathBuf,
    pub(super) keep_path: PathWish,
    /// As it was at planning.
    pub(super) stamp: FileStamp,
    pub(super) mode: u32,
    pub(super) virtual_size_bytes: u64,
    /// The image's own backing name is relative, and would not be found from the layers folder.
    pub(super) own_backing: Option<OwnBacking>,
    #[serde(default, skip_serializing_if = "Under::is_nobody")]
    pub(super) under: Under,
    pub(super) turn: Turn,
    /// Whether nobody closed it: it is mended first, as QEMU would at its next start. Upon an image that is not, QEMU
    /// builds, and then writes into clusters of it that are in use (seen).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) unclosed: bool,
}

/// A backing name that becomes absolute.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct OwnBacking {
    pub(super) old: Backing,
    pub(super) absolute: PathBuf,
}

/// [`QemuStep::Switch`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Switch {
    pub(super) turn: Turn,
    /// New overlays, each to be its disk's active layer.
    pub(super) fresh: Vec<Fresh>,
    /// Active layers that a snapshot holds from now on.
    pub(super) freeze: Vec<Freeze>,
    /// Layers whose content is in another file from now on.
    pub(super) push: Vec<Push>,
    /// Layers that are put upon another file with the same content.
    pub(super) restack: Vec<Restack>,
    /// Files that nobody may write while it is switched.
    pub(super) guard: Vec<Guard>,
    /// Layers that the operation unlinks afterwards; the manifest leaves them out.
    pub(super) gone: Vec<(DiskName, LayerId)>,
    /// What the machine writes is switched under it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) live: Option<Live>,
    /// The machine's memory is taken with its disks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) memory: Option<TakeMemory>,
    /// The next QEMU is started before the switch, and waits for its memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) next: Option<Next>,
    /// What the machine wrote besides at planning, in words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) left_out: Vec<String>,
    /// What is done if it writes anything besides at the moment of the snapshot.
    #[serde(default, skip_serializing_if = "LeftOut::is_told")]
    pub(super) beside: LeftOut,
}

/// Where a machine's memory goes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct TakeMemory {
    pub(super) file: PathBuf,
    /// Whose owner, group and label it gets.
    pub(super) like: PathBuf,
    pub(super) mode: u32,
}

/// A QEMU that waits for its memory beside the one that runs. The paths are its own until that one is gone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Next {
    pub(super) qmp: PathBuf,
    pub(super) pid_file: PathBuf,
    /// What it opens.
    pub(super) disks: BTreeMap<DiskName, PathBuf>,
    /// What it loads before the disks are switched, where that can be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) memory: Option<KeptMemory>,
}

/// A memory file that is loaded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct KeptMemory {
    pub(super) file: PathBuf,
    /// As it was when it was kept.
    pub(super) stamp: FileStamp,
}

/// [`QemuStep::Keep`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct KeepMemory {
    pub(super) turn: Turn,
    pub(super) snapshot: SnapshotId,
    pub(super) file: PathBuf,
    pub(super) mode: u32,
    pub(super) live: Live,
}

/// [`QemuStep::Resume`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct LoadMemory {
    pub(super) next: Next,
    /// What the machine wrote until then.
    pub(super) old: Vec<PathBuf>,
    pub(super) memory: PathBuf,
    pub(super) stamp: FileStamp,
    /// What the machine does afterwards.
    pub(super) wish: RunState,
}

/// A new overlay.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Fresh {
    pub(super) disk: DiskName,
    pub(super) layer: LayerId,
    pub(super) file: PathBuf,
    pub(super) on: LayerId,
    pub(super) on_file: PathBuf,
    pub(super) mode: u32,
    pub(super) virtual_size_bytes: u64,
}

/// An active layer that is frozen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Freeze {
    pub(super) disk: DiskName,
    pub(super) layer: LayerId,
    pub(super) file: PathBuf,
    pub(super) mode: u32,
    pub(super) snapshot: SnapshotId,
}

/// [`QemuStep::Push`], and its part of a switch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Push {
    pub(super) disk: DiskName,
    pub(super) from: LayerId,
    pub(super) from_file: PathBuf,
    pub(super) from_mode: u32,
    /// Who writes `from`, and so `into` afterwards.
    pub(super) writer: Writer,
    pub(super) into: LayerId,
    pub(super) into_file: PathBuf,
    pub(super) into_mode: u32,
    /// The tombstones between, lowest first.
    pub(super) between: Vec<PathBuf>,
    pub(super) virtual_size_bytes: u64,
    #[serde(default, skip_serializing_if = "Under::is_nobody")]
    pub(super) under: Under,
}

/// A layer that gets another parent with the same content.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Restack {
    pub(super) disk: DiskName,
    pub(super) layer: LayerId,
    pub(super) file: PathBuf,
    pub(super) mode: u32,
    pub(super) writer: Writer,
    pub(super) old_file: PathBuf,
    pub(super) onto: LayerId,
    pub(super) onto_file: PathBuf,
}

/// A file that nobody may write while it is switched.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Guard {
    pub(super) file: PathBuf,
    pub(super) expect: Expect,
}

/// How a guarded file must be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "expect", rename_all = "kebab-case")]
pub(super) enum Expect {
    /// Its content is given up, or was compared otherwise.
    Anything,
    /// As it was at planning.
    Untouched {
        /// The stamp then.
        stamp: FileStamp,
    },
    /// Only its header was rewritten since the planning, by the adoption.
    SameFile {
        /// The stamp before that.
        stamp: FileStamp,
    },
}

impl Expect {
    /// Whether a file with that stamp is as expected.
    pub(super) fn holds(self, found: FileStamp) -> bool {
        match self {
            Self::Anything => true,
            Self::Untouched { stamp } => stamp == found,
            Self::SameFile { stamp } => (stamp.inode, stamp.size_bytes) == (found.inode, found.size_bytes),
        }
    }
}

/// [`QemuStep::Pull`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Pull {
    pub(super) disk: DiskName,
    pub(super) layer: LayerId,
    pub(super) file: PathBuf,
    pub(super) mode: u32,
    pub(super) writer: Writer,
    /// What it stands on: the highest of the tombstones.
    pub(super) from: LayerId,
    pub(super) from_file: PathBuf,
    pub(super) onto: LayerId,
    pub(super) onto_file: PathBuf,
    /// What it is built upon now, and how those files were at planning.
    pub(super) below: Vec<(PathBuf, FileStamp)>,
    #[serde(default, skip_serializing_if = "Under::is_nobody")]
    pub(super) under: Under,
}

/// [`QemuStep::Drop`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct DropLayers {
    pub(super) layers: PathBuf,
    pub(super) drop: Vec<Dropped>,
    /// Memory of snapshots that are gone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) memory: Vec<(SnapshotId, PathBuf)>,
}

/// A layer that is unlinked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Dropped {
    pub(super) disk: DiskName,
    pub(super) layer: LayerId,
    pub(super) file: PathBuf,
    pub(super) inode: u64,
}

/// [`QemuStep::Flatten`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Flatten {
    pub(super) disk: DiskName,
    pub(super) layers: PathBuf,
    /// The active layer.
    pub(super) from: PathBuf,
    pub(super) stamp: FileStamp,
    /// What the plain image is built upon: what the registered one was.
    pub(super) own_backing: Option<Backing>,
    pub(super) virtual_size_bytes: u64,
    /// How the registered image is laid out; none in a plan that was made before that was kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) format: Option<FormatOptions>,
    pub(super) mode: u32,
    /// The plain image.
    pub(super) into: PathBuf,
}

/// [`QemuStep::Place`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Place {
    pub(super) layers: PathBuf,
    pub(super) disks: Vec<Placed>,
}

/// A plain image that is put at its registered path.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Placed {
    pub(super) disk: DiskName,
    pub(super) resolved: PathBuf,
    /// The plain image: a flat copy, or the layer itself.
    pub(super) file: PathBuf,
    /// The inode of the layer itself; none for a flat copy, which is made after the planning.
    pub(super) inode: Option<u64>,
    pub(super) mode: u32,
    /// The active layer, which nobody may have written since it was copied.
    pub(super) active: PathBuf,
    pub(super) stamp: FileStamp,
    /// How the layer came to what the machine's disk is, if by another layer's content.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) folded: Option<Fold>,
}

/// [`QemuStep::Fold`]: the registered image takes what the machine's disk is, and so keeps whatever else it holds. Every
/// other snapshot reads wrong from then on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Fold {
    /// The active layer.
    pub(super) from: PathBuf,
    /// The registered image, with the mode that it has in the end.
    pub(super) into: PathBuf,
    pub(super) mode: u32,
}

/// [`QemuStep::Clean`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Clean {
    pub(super) layers: PathBuf,
    pub(super) drop: Vec<(DiskName, LayerId, PathBuf)>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) memory: Vec<(SnapshotId, PathBuf)>,
    /// The images that are at the registered paths now.
    pub(super) keep: Vec<PathBuf>,
    /// Which of them named what it is built upon by a relative name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) relative: Vec<(PathBuf, Backing)>,
}
