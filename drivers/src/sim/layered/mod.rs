//! A machine whose disks are chains of layers, as QEMU's are: a snapshot freezes the active layer and puts a new one
//! upon it, a delete only marks, and the engine folds what is left.
//!
//! Code Map: here what the machine is, `step` (what the steps do to it), `plan` (which steps), `resolve` (what became
//! of one, and what it reports).

mod host;
mod plan;
mod resolve;
mod step;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use snaptree_engine::domain::Domain;
use snaptree_engine::layer::FileStamp;
use snaptree_engine::operation::{Code, Failure};
use snaptree_engine::{DiskName, DomainId, SnapshotId};

use super::BLOCKS;
use super::host::GoingOn;
use super::machine::{Applied, Content, Power};

/// A layer's file, by its name in the machine's folder. The registered image has the disk's name.
pub(super) type FileName = String;

/// What a block occupies.
pub(super) const BLOCK_BYTES: u64 = 1024;

/// One layer's file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Image {
    /// Never used twice.
    pub inode: u64,
    /// Grows with each change.
    pub changed: u64,
    /// The file that it is built upon.
    pub backing: Option<FileName>,
    /// What it holds itself; zeros too, since they hide what is below.
    pub blocks: Arc<BTreeMap<u64, u64>>,
}

/// One disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Stack {
    /// The file that the machine writes.
    pub active: FileName,
    pub images: BTreeMap<FileName, Image>,
}

/// One machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Layered {
    pub power: Power,
    pub disks: BTreeMap<DiskName, Stack>,
    /// What a revert brings the machine to, for snapshots that have a memory.
    pub memories: BTreeMap<SnapshotId, Power>,
    pub generation: Option<String>,
    /// Counts changes; also the source of inodes.
    pub ticks: u64,
    pub last_operation: Option<Applied>,
    /// What goes on though its client is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub going_on: Option<GoingOn>,
}

/// Where the file would lie.
pub(super) fn path(domain: DomainId, file: &str) -> PathBuf {
    PathBuf::from(format!("/sim/{domain}/{file}"))
}

impl Image {
    pub(super) fn stamp(&self) -> FileStamp {
        let mtime_ns = i64::try_from(self.changed).unwrap_or(i64::MAX);
        FileStamp { inode: self.inode, size_bytes: self.allocated_bytes(), mtime_ns }
    }

    pub(super) fn allocated_bytes(&self) -> u64 {
        (self.blocks.len() as u64).saturating_mul(BLOCK_BYTES)
    }
}

impl Stack {
    /// What `file` reads as: each block is the topmost layer's that has it.
    fn read(&self, file: &str) -> Content {
        let mut chain = Vec::new();
        let mut next = self.images.get(file);
        while let Some(image) = next.filter(|_| chain.len() <= self.images.len()) {
            chain.push(image);
            next = image.backing.as_ref().and_then(|below| self.images.get(below));
        }
        let mut blocks = BTreeMap::new();
        for image in chain.into_iter().rev() {
            blocks.extend(image.blocks.iter().map(|(block, value)| (*block, *value)));
        }
        blocks.retain(|_, value| *value != 0);
        Content(blocks.into())
    }

    fn image(&mut self, file: &str) -> Result<&mut Image, Failure> {
        let missing = || Failure::new(Code::Drift, format!("the machine has no file {file}"));
        self.images.get_mut(file).ok_or_else(missing)
    }
}

impl Layered {
    fn new(domain: &Domain) -> Self {
        let mut ticks = 0;
        let mut disks = BTreeMap::new();
        for disk in &domain.disks {
            ticks += 1;
            let image = Image { inode: ticks, changed: 0, backing: None, blocks: Arc::default() };
            let active = disk.name.to_string();
            let images = BTreeMap::from([(active.clone(), image)]);
            disks.insert(disk.name.clone(), Stack { active, images });
        }
        Self {
            power: Power::Off,
            disks,
            memories: BTreeMap::new(),
            generation: None,
            ticks,
            last_operation: None,
            going_on: None,
        }
    }

    fn check(&self) -> Result<(), String> {
        for (disk, stack) in &self.disks {
            if !stack.images.contains_key(&stack.active) {
                return Err(format!("disk {disk} has no active file"));
            }
            let blocks = stack.images.values().flat_map(|image| image.blocks.keys());
            if blocks.into_iter().any(|block| *block >= BLOCKS) {
                return Err(format!("disk {disk} has blocks outside of its size"));
            }
        }
        Ok(())
    }

    fn tick(&mut self) -> u64 {
        self.ticks += 1;
        self.ticks
    }

    fn stack(&mut self, disk: &DiskName) -> Result<&mut Stack, Failure> {
        let missing = || Failure::new(Code::NotFound, format!("the machine has no disk '{disk}'"));
        self.disks.get_mut(disk).ok_or_else(missing)
    }

    /// Changes a file, and marks it as changed.
    fn touch(&mut self, disk: &DiskName, file: &str) -> Result<&mut Image, Failure> {
        let tick = self.tick();
        let image = self.stack(disk)?.image(file)?;
        image.changed = tick;
        Ok(image)
    }

    fn write(&mut self, disk: &DiskName, block: u64, value: u64) -> Result<(), Failure> {
        if block >= BLOCKS {
            return Err(Failure::new(Code::Invalid, format!("'{disk}' has {BLOCKS} blocks, and no {block}")));
        }
        let active = self.stack(disk)?.active.clone();
        Arc::make_mut(&mut self.touch(disk, &active)?.blocks).insert(block, value);
        if let Power::Running { memory } = &mut self.power {
            *memory = memory.wrapping_add(1);
        }
        Ok(())
    }
}
