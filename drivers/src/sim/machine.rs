//! What the simulated hypervisor keeps of one machine, and what can happen to it. No I/O.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use snaptree_engine::domain::RunState;
use snaptree_engine::event::{Hash, MemoryKind};
use snaptree_engine::operation::{Code, Failure};
use snaptree_engine::project::DomainState;
use snaptree_engine::tree::SnapshotState;
use snaptree_engine::{DiskName, OperationId, SnapshotId};

use super::host::GoingOn;
use super::{BLOCKS, DISK_BYTES};

/// A disk's blocks by number. What was never written, or was written with zero, is not in it: so two contents
/// that read alike are alike. Shared, since a machine is copied as a whole whenever it is looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(in crate::sim) struct Content(pub(in crate::sim) Arc<BTreeMap<u64, u64>>);

impl Content {
    fn write(&mut self, block: u64, value: u64) {
        let blocks = Arc::make_mut(&mut self.0);
        if value == 0 {
            blocks.remove(&block);
        } else {
            blocks.insert(block, value);
        }
    }

    /// The SHA-256, in hex, of all that the disk reads as.
    pub(in crate::sim) fn sha256(&self) -> String {
        let mut hasher = Sha256::new();
        for block in 0..BLOCKS {
            hasher.update(self.0.get(&block).copied().unwrap_or(0).to_be_bytes());
        }
        Hash(hasher.finalize().into()).to_string()
    }

    fn is_sound(&self) -> bool {
        self.0.iter().all(|(block, value)| *block < BLOCKS && *value != 0)
    }
}

/// Whether the machine runs; it has a memory exactly while it is not off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case", deny_unknown_fields)]
pub(in crate::sim) enum Power {
    Off,
    Running { memory: u64 },
    Paused { memory: u64 },
}

impl Power {
    pub(in crate::sim) const fn run_state(self) -> RunState {
        match self {
            Self::Off => RunState::Off,
            Self::Running { .. } => RunState::Running,
            Self::Paused { .. } => RunState::Paused,
        }
    }

    pub(in crate::sim) const fn memory(self) -> Option<u64> {
        match self {
            Self::Off => None,
            Self::Running { memory } | Self::Paused { memory } => Some(memory),
        }
    }

    /// Brought to that run state: a machine that was off boots with an empty memory.
    pub(in crate::sim) fn brought_to(self, run_state: RunState) -> Self {
        let memory = self.memory().unwrap_or(0);
        match run_state {
            RunState::Off => Self::Off,
            RunState::Running => Self::Running { memory },
            RunState::Paused => Self::Paused { memory },
        }
    }
}

/// A snapshot, as this hypervisor keeps it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(in crate::sim) struct Kept {
    /// The hypervisor's own id.
    pub native: u64,
    /// Snaptree's id; none once Snaptree forgot it.
    pub mark: Option<SnapshotId>,
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    pub parent: Option<u64>,
    pub disks: BTreeMap<DiskName, Content>,
    /// What a revert brings the machine to; off for one without memory.
    pub power: Power,
}

/// The last step that took effect, written together with the effect: it alone tells what became of a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(in crate::sim) struct Applied {
    pub operation: OperationId,
    pub step: usize,
    /// What the step's report says.
    pub learnt: Value,
}

impl Applied {
    pub(in crate::sim) fn is(&self, operation: OperationId, step: usize) -> bool {
        self.operation == operation && self.step == step
    }
}

/// One machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(in crate::sim) struct Machine {
    pub power: Power,
    pub disks: BTreeMap<DiskName, Content>,
    /// Parents stand before their children.
    pub snapshots: Vec<Kept>,
    pub current: Option<u64>,
    /// A native id is never used twice.
    pub next_native: u64,
    pub last_operation: Option<Applied>,
    /// What goes on though its client is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub going_on: Option<GoingOn>,
}

impl Machine {
    /// A machine that was never switched on.
    pub(in crate::sim) fn new(disks: impl Iterator<Item = DiskName>) -> Self {
        Self {
            power: Power::Off,
            disks: disks.map(|disk| (disk, Content::default())).collect(),
            snapshots: Vec::new(),
            current: None,
            next_native: 1,
            last_operation: None,
            going_on: None,
        }
    }

    /// Says what contradicts itself. Nothing in what this program writes does.
    pub(in crate::sim) fn check(&self) -> Result<(), String> {
        let (mut seen, mut marks) = (BTreeSet::new(), BTreeSet::new());
        for kept in &self.snapshots {
            if kept.parent.is_some_and(|parent| !seen.contains(&parent)) {
                return Err(format!("the parent of snapshot {} does not stand before it", kept.native));
            }
            if kept.native >= self.next_native || !seen.insert(kept.native) {
                return Err(format!("the snapshot id {} is used twice", kept.native));
            }
            if kept.mark.is_some_and(|mark| !marks.insert(mark)) {
                return Err(format!("snapshot {} carries another one's mark", kept.native));
            }
            if kept.disks.keys().any(|disk| !self.disks.contains_key(disk)) {
                return Err(format!("snapshot {} holds a disk that the machine has not", kept.native));
            }
        }
        if self.next_native == u64::MAX {
            return Err("no snapshot ids are left".to_owned());
        }
        if self.current.is_some_and(|current| !seen.contains(&current)) {
            return Err("the current snapshot does not exist".to_owned());
        }
        let kept = self.snapshots.iter().flat_map(|kept| kept.disks.values());
        if !self.disks.values().chain(kept).all(Content::is_sound) {
            return Err(format!("a disk has blocks outside of its {DISK_BYTES} bytes, or empty ones"));
        }
        Ok(())
    }

    /// The snapshot that carries our mark.
    pub(in crate::sim) fn marked(&self, mark: SnapshotId) -> Result<&Kept, Failure> {
        self.position(mark).map(|position| &self.snapshots[position])
    }

    fn position(&self, mark: SnapshotId) -> Result<usize, Failure> {
        self.snapshots
            .iter()
            .position(|kept| kept.mark == Some(mark))
            .ok_or_else(|| Failure::new(Code::Drift, format!("the hypervisor no longer has snapshot {mark}")))
    }

    /// The guest writes a block. Its memory counts the writes, so that memory and disks tell the same moment.
    pub(in crate::sim) fn write(&mut self, disk: &DiskName, block: u64, value: u64) -> Result<(), Failure> {
        let content = self
            .disks
            .get_mut(disk)
            .ok_or_else(|| Failure::new(Code::NotFound, format!("the machine has no disk '{disk}'")))?;
        if block >= BLOCKS {
            return Err(Failure::new(Code::Invalid, format!("'{disk}' has {BLOCKS} blocks, and no {block}")));
        }
        content.write(block, value);
        if let Power::Running { memory } = &mut self.power {
            *memory = memory.wrapping_add(1);
        }
        Ok(())
    }

    /// Takes a snapshot, which becomes current; returns its native id and the state that it was taken in.
    pub(in crate::sim) fn take(
        &mut self,
        mark: SnapshotId,
        (name, description): (&str, Option<&str>),
        disks: &BTreeSet<DiskName>,
        memory: MemoryKind,
    ) -> Result<(u64, SnapshotState), Failure> {
        if let Some(unknown) = disks.iter().find(|disk| !self.disks.contains_key(*disk)) {
            return Err(Failure::new(Code::Drift, format!("the machine no longer has disk '{unknown}'")));
        }
        if self.position(mark).is_ok() {
            return Err(Failure::new(Code::Drift, format!("the hypervisor already has snapshot {mark}")));
        }
        let (power, state) = match (memory, self.power) {
            (_, Power::Off) => (Power::Off, SnapshotState::Shutoff),
            (MemoryKind::No, _) => (Power::Off, SnapshotState::DiskSnapshot),
            (_, power) => (power, power.run_state().into()),
        };
        let held = self.disks.iter().filter(|(disk, _)| disks.contains(*disk));
        let held = held.map(|(disk, content)| (disk.clone(), content.clone())).collect();
        let native = self.keep(Some(mark), name, held, power);
        self.describe(native, description);
        Ok((native, state))
    }

    /// Takes a snapshot of everything, which does not carry our mark.
    pub(in crate::sim) fn take_unmarked(&mut self, name: &str) {
        let (held, power) = (self.disks.clone(), self.power);
        self.keep(None, name, held, power);
    }

    fn keep(
        &mut self,
        mark: Option<SnapshotId>,
        name: &str,
        disks: BTreeMap<DiskName, Content>,
        power: Power,
    ) -> u64 {
        let native = self.next_native;
        self.next_native += 1;
        let (name, parent) = (name.to_owned(), self.current.replace(native));
        self.snapshots.push(Kept { native, mark, name, description: None, parent, disks, power });
        native
    }

    fn describe(&mut self, native: u64, description: Option<&str>) {
        if let Some(kept) = self.snapshots.iter_mut().find(|kept| kept.native == native) {
            kept.description = description.filter(|text| !text.is_empty()).map(str::to_owned);
        }
    }

    /// Changes what is kept about a snapshot; what is not given stays.
    pub(in crate::sim) fn edit(
        &mut self,
        mark: SnapshotId,
        name: Option<&str>,
        description: Option<&str>,
    ) -> Result<(), Failure> {
        let position = self.position(mark)?;
        let kept = &mut self.snapshots[position];
        if let Some(name) = name {
            name.clone_into(&mut kept.name);
        }
        let native = kept.native;
        if description.is_some() {
            self.describe(native, description);
        }
        Ok(())
    }

    /// How many snapshots stand upon one.
    pub(in crate::sim) fn children(&self, native: u64) -> usize {
        self.snapshots.iter().filter(|kept| kept.parent == Some(native)).count()
    }

    /// Goes back to a snapshot. Disks that it does not hold stay as they are.
    pub(in crate::sim) fn revert(
        &mut self,
        mark: SnapshotId,
        run_state: Option<RunState>,
    ) -> Result<(), Failure> {
        let kept = &self.snapshots[self.position(mark)?];
        self.power = run_state.map_or(kept.power, |wanted| kept.power.brought_to(wanted));
        self.current = Some(kept.native);
        self.disks.extend(kept.disks.iter().map(|(disk, content)| (disk.clone(), content.clone())));
        Ok(())
    }

    /// Removes a snapshot: its children, and the current pointer, move to its parent.
    pub(in crate::sim) fn remove(&mut self, mark: SnapshotId) -> Result<(), Failure> {
        let removed = self.snapshots.remove(self.position(mark)?);
        let parents = self.snapshots.iter_mut().map(|kept| &mut kept.parent);
        for pointer in parents.chain([&mut self.current]) {
            if *pointer == Some(removed.native) {
                *pointer = removed.parent;
            }
        }
        Ok(())
    }

    /// Knows again the snapshots that somebody else made and the log adopted.
    pub(in crate::sim) fn recognise(&mut self, state: &DomainState) {
        let live = state.tree.iter().map(|snapshot| (snapshot.id, snapshot.native.as_ref()));
        let dead = state.tombstones.iter().map(|(id, tombstone)| (*id, tombstone.native.as_ref()));
        for (id, native) in live.chain(dead) {
            let Some(native) = native.and_then(|native| native.parse::<u64>().ok()) else { continue };
            if let Some(kept) = self.snapshots.iter_mut().find(|kept| kept.native == native) {
                kept.mark = Some(id);
            }
        }
    }
}
