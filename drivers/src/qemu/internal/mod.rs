//! Internal snapshots: inside the images, in qcow2's own snapshot table, with the machine's memory if it ran.
//!
//! ```text
//!            the machine runs                            it is off
//!   create   snapshot-save   (memory in the first disk)  qemu-img snapshot -c, disk by disk
//!   revert   snapshot-load   in the process that runs    qemu-img snapshot -a, disk by disk; with memory a process
//!                                                        that waits (-S), then snapshot-load
//!   delete   snapshot-delete                             qemu-img snapshot -d, disk by disk
//!
//!   snapshot-load ─▶ concluded ─▶ run state as wished
//!        └─▶ failed ─▶ no disk touched: the guest goes on (QEMU leaves it stopped)
//!                 └─▶ otherwise its memory and its disks are of two instants: end QEMU, begin anew with a fresh process
//! ```
//! The tag in an image is `st-<snapshot id>`, never the user's name: qemu-img takes a name that is a number for an id.
//! The entry in the table is written last, so a tag that is there stands for a whole disk. Which snapshot a disk is at is
//! told by its first table alone ([`table::Entry::is_active`]), without any mark of ours.
//!
//! Jobs of QEMU are not dismissed by whoever began them: one that is concluded says, also to a successor, that it was
//! carried through in this very process. The next step dismisses what others left.
//!
//! Architecture Invariant: a guest never goes on whose memory may be of another instant than one of its disks.

mod erase;
mod load;
mod plan;
mod resolve;
mod save;
pub(super) mod table;

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use snaptree_engine::domain::RunState;
use snaptree_engine::driver::{DriverError, StepContext};
use snaptree_engine::project::DomainState;
use snaptree_engine::tree::Snapshot;
use snaptree_engine::{DiskName, OperationId, SnapshotId};

use super::adopt::unreadable;
use super::live::Run;
use super::step::{Expect, QemuStep};
use table::{Entry, read};

pub(super) use plan::{is_internal, listed};

/// What begins a tag of ours.
const TAG: &str = "st-";

/// What QEMU may be busy for however little memory there is.
const BUSY: Duration = Duration::from_secs(60);
/// 20 MB/s: a disk that is slower than that holds up more than a snapshot.
const SLOWEST_BYTES_PER_MS: u64 = 20_000;

/// The tag of a snapshot of ours.
pub(super) fn tag(snapshot: SnapshotId) -> String {
    format!("{TAG}{snapshot}")
}

/// The snapshot of ours that a tag stands for.
pub(super) fn snapshot_of(tag: &str) -> Option<SnapshotId> {
    tag.strip_prefix(TAG)?.parse().ok()
}

/// A disk of an internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Image {
    pub(super) disk: DiskName,
    /// What the machine writes.
    pub(super) file: PathBuf,
    /// How it must be found before anything is done.
    pub(super) expect: Expect,
}

/// A machine that runs, as it was at planning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Runs {
    pub(super) was: Run,
    /// The size of its memory: how long QEMU may be busy with it follows from that.
    pub(super) ram_bytes: u64,
}

/// `QemuStep::Save`: takes an internal snapshot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Save {
    pub(super) snapshot: SnapshotId,
    /// The first one takes the memory.
    pub(super) images: Vec<Image>,
    /// None: the machine is off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) live: Option<Runs>,
}

/// `QemuStep::Load`: goes back to an internal snapshot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Load {
    pub(super) snapshot: SnapshotId,
    pub(super) images: Vec<Image>,
    /// None: the disks alone, of a machine that is off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) memory: Option<Memory>,
}

/// Memory that is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Memory {
    /// What the machine shall do afterwards.
    pub(super) wish: RunState,
    /// What it did at planning.
    pub(super) was: RunState,
    /// How much there is to be loaded.
    pub(super) bytes: u64,
}

/// `QemuStep::Erase`: deletes an internal snapshot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Erase {
    pub(super) snapshot: SnapshotId,
    pub(super) images: Vec<Image>,
}

impl Image {
    /// The snapshot's entry in the image, if it is there.
    fn entry(&self, snapshot: SnapshotId) -> Result<Option<Entry>, DriverError> {
        let tag = tag(snapshot);
        let table = read(&self.file).map_err(|error| unreadable(&self.file, &error))?;
        Ok(table.into_iter().find(|entry| entry.tag == tag))
    }
}

/// The entries of all images; an image that has none is left out.
fn entries(images: &[Image], snapshot: SnapshotId) -> Result<Vec<Entry>, DriverError> {
    let mut found = Vec::new();
    for image in images {
        found.extend(image.entry(snapshot)?);
    }
    Ok(found)
}

/// The id of a step's job at QEMU.
fn job_id(context: &StepContext<'_>, job: Job) -> String {
    super::live::node_name(context.operation, context.index, job as usize)
}

/// The jobs that a step may have QEMU do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Job {
    /// Saves or loads, in the process that ran.
    First = 0,
    /// Deletes a tag.
    Delete = 1,
    /// Loads in a process that was started for it.
    Afresh = 2,
}

/// How long QEMU may hear nothing because it works on so much memory. While it saves, its main loop waits.
pub(super) fn busy(memory_bytes: u64) -> Duration {
    match memory_bytes {
        0 => Duration::ZERO,
        bytes => BUSY + Duration::from_millis(bytes / SLOWEST_BYTES_PER_MS),
    }
}

/// How long a QEMU that does not answer may be at work for an operation.
pub(super) fn patience(state: &DomainState, operation: OperationId) -> Duration {
    let open = state.operation(operation);
    let steps = open.iter().flat_map(|open| &open.steps).filter_map(|step| QemuStep::of(step).ok());
    let bytes = steps.map(|step| match step {
        QemuStep::Save(save) => save.live.map_or(0, |live| live.ram_bytes),
        QemuStep::Load(load) => load.memory.map_or(0, |memory| memory.bytes),
        _ => 0,
    });
    busy(bytes.max().unwrap_or(0))
}

/// Whether the machine's memory belongs to a snapshot.
fn has_memory(snapshot: &Snapshot) -> bool {
    snapshot.memory == snaptree_engine::event::MemoryKind::Internal
}
