//! The steps: what their data says, and what each does to a machine.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use snaptree_engine::domain::RunState;
use snaptree_engine::driver::Learnt;
use snaptree_engine::event::MemoryKind;
use snaptree_engine::layer::FileStamp;
use snaptree_engine::operation::{Code, Failure, Step};
use snaptree_engine::tree::SnapshotState;
use snaptree_engine::{DiskName, LayerId, SnapshotId};

use super::super::host::{At, Effects};
use super::super::json;
use super::super::machine::{Applied, Power};
use super::{FileName, Image, Layered};

/// From one generation to the next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Turn {
    pub previous: Option<String>,
    pub generation: String,
}

/// A layer with its file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Named {
    pub disk: DiskName,
    pub layer: LayerId,
    pub file: FileName,
}

/// A new layer, and what it stands on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Fresh {
    pub new: Named,
    pub on: LayerId,
    pub on_file: FileName,
}

/// A layer that becomes a snapshot's content, if nobody wrote it meanwhile.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Freeze {
    pub layer: Named,
    pub stamp: FileStamp,
}

/// A layer that went down into `into`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Push {
    pub from: Named,
    pub into: Named,
    /// Files between the two, lowest first.
    pub between: Vec<FileName>,
    /// Whether the machine writes `from`.
    pub active: bool,
}

/// What stood on a pushed layer, and stands on the file that took its content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Restack {
    pub layer: Named,
    pub old_file: FileName,
    pub onto: LayerId,
    pub onto_file: FileName,
    pub active: bool,
}

/// What a switch is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "for", rename_all = "kebab-case")]
pub(super) enum Purpose {
    Create { snapshot: SnapshotId, memory: MemoryKind },
    Revert { snapshot: SnapshotId, run_state: Option<RunState> },
    Delete { snapshots: Vec<SnapshotId> },
    Merge,
}

/// All disks change over at once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Switch {
    pub turn: Turn,
    pub purpose: Purpose,
    #[serde(default)]
    pub fresh: Vec<Fresh>,
    #[serde(default)]
    pub freeze: Vec<Freeze>,
    #[serde(default)]
    pub push: Vec<Push>,
    #[serde(default)]
    pub restack: Vec<Restack>,
}

/// A dependant takes what it needs of the files that vanish.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Pull {
    pub layer: Named,
    /// Lowest first.
    pub vanish: Vec<FileName>,
    pub from: LayerId,
    pub from_file: FileName,
    pub onto: LayerId,
    pub onto_file: FileName,
    pub active: bool,
}

/// A step's data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "action", rename_all = "kebab-case")]
pub(super) enum Action {
    Adopt { layer: Named, turn: Turn },
    Switch(Switch),
    Pull(Pull),
    Push(Push),
    Drop { files: Vec<Named> },
    Flatten { turn: Turn, files: Vec<Named> },
}

impl Action {
    pub(super) fn of(step: &Step) -> Result<Self, Failure> {
        Self::deserialize(&step.data).map_err(|error| {
            Failure::new(Code::Invalid, format!("step '{}' is none of this driver's: {error}", step.name))
        })
    }

    /// The word in the names of hooks, and how many effects there are.
    pub(super) fn kind(&self) -> (&'static str, Effects) {
        match self {
            Self::Adopt { .. } => ("adopt", Effects::One),
            Self::Switch(switch) => match switch.purpose {
                Purpose::Create { .. } => ("switch-create", Effects::Several),
                Purpose::Revert { .. } => ("switch-revert", Effects::Several),
                Purpose::Delete { .. } => ("switch-delete", Effects::One),
                Purpose::Merge if switch.restack.is_empty() => ("switch-merge", Effects::One),
                Purpose::Merge => ("switch-restack", Effects::Several),
            },
            Self::Pull(_) => ("pull", Effects::Several),
            Self::Push(_) => ("push", Effects::Several),
            Self::Drop { .. } => ("drop", Effects::Several),
            Self::Flatten { .. } => ("flatten", Effects::One),
        }
    }

    /// Lets the first of several effects take place.
    pub(super) fn begin(&self, machine: &mut Layered) -> Result<(), Failure> {
        match self {
            Self::Adopt { .. } | Self::Flatten { .. } => Ok(()),
            Self::Switch(switch) => switch.prepare(machine),
            Self::Pull(pull) => pull.begin(machine),
            Self::Push(push) => push.copy(machine, 1),
            Self::Drop { files } => files.first().map_or(Ok(()), |first| drop_file(machine, first)),
        }
    }

    /// Lets all of it take effect; returns what was learnt.
    pub(super) fn perform(&self, machine: &mut Layered, at: At) -> Result<Value, Failure> {
        let mut learnt = Value::Null;
        match self {
            Self::Adopt { turn, .. } => turn.take(machine)?,
            Self::Switch(switch) => learnt = switch.perform(machine, at)?,
            Self::Pull(pull) => pull.perform(machine)?,
            Self::Push(push) => push.copy(machine, usize::MAX)?,
            Self::Drop { files } => files.iter().try_for_each(|file| drop_file(machine, file))?,
            Self::Flatten { turn, files } => {
                turn.take(machine)?;
                flatten(machine, files)?;
            }
        }
        machine.last_operation =
            Some(Applied { operation: at.operation, step: at.index, learnt: learnt.clone() });
        Ok(learnt)
    }

    /// Takes it back, whether it was not, half or wholly done.
    pub(super) fn take_back(&self, machine: &mut Layered) -> Result<(), Failure> {
        match self {
            Self::Adopt { turn, .. } => {
                if machine.generation.as_ref() == Some(&turn.generation) {
                    machine.generation.clone_from(&turn.previous);
                }
                Ok(())
            }
            Self::Switch(switch) => switch.take_back(machine),
            Self::Pull(pull) => {
                let Named { disk, file, .. } = &pull.layer;
                machine.touch(disk, file)?.backing = Some(pull.from_file.clone());
                Ok(())
            }
            // What was written is masked by `from`, its only reader.
            Self::Push(_) => Ok(()),
            Self::Drop { .. } => Err(Failure::new(Code::Invalid, "what is unlinked cannot be taken back")),
            Self::Flatten { turn, .. } if machine.generation == turn.previous => Ok(()),
            Self::Flatten { .. } => Err(Failure::new(Code::Invalid, "a flatten cannot be taken back")),
        }
    }
}

/// Unlinks; what is gone already is fine.
fn drop_file(machine: &mut Layered, dropped: &Named) -> Result<(), Failure> {
    let stack = machine.stack(&dropped.disk)?;
    if stack.active == dropped.file {
        return Err(Failure::new(Code::Drift, format!("the machine writes {}", dropped.file)));
    }
    stack.images.remove(&dropped.file);
    Ok(())
}

/// One plain image under the registered name, for each disk.
fn flatten(machine: &mut Layered, files: &[Named]) -> Result<(), Failure> {
    let disks: BTreeSet<&DiskName> = files.iter().map(|file| &file.disk).collect();
    for disk in disks {
        let (inode, stack) = (machine.tick(), machine.stack(disk)?);
        let blocks = stack.read(&stack.active).0;
        let image = Image { inode, changed: inode, backing: None, blocks };
        stack.active = disk.to_string();
        stack.images = [(stack.active.clone(), image)].into();
    }
    machine.memories.clear();
    Ok(())
}

impl Turn {
    /// Switches the generation.
    fn take(&self, machine: &mut Layered) -> Result<(), Failure> {
        if machine.generation != self.previous {
            let found = machine.generation.as_deref().unwrap_or("none");
            return Err(Failure::new(
                Code::Drift,
                format!("generation {found} is switched on, and {:?} was to be left", self.previous),
            ));
        }
        machine.generation = Some(self.generation.clone());
        Ok(())
    }
}

impl Switch {
    /// Makes the new files, and puts what stood on a pushed layer onto the file that has its content.
    fn prepare(&self, machine: &mut Layered) -> Result<(), Failure> {
        if machine.generation != self.turn.previous {
            return Err(Failure::new(Code::Drift, "another generation is switched on"));
        }
        for fresh in &self.fresh {
            let inode = machine.tick();
            let backing = Some(fresh.on_file.clone());
            let image = Image { inode, changed: inode, backing, blocks: Default::default() };
            machine.stack(&fresh.new.disk)?.images.entry(fresh.new.file.clone()).or_insert(image);
        }
        for restack in &self.restack {
            machine.touch(&restack.layer.disk, &restack.layer.file)?.backing =
                Some(restack.onto_file.clone());
        }
        Ok(())
    }

    fn perform(&self, machine: &mut Layered, at: At) -> Result<Value, Failure> {
        self.prepare(machine)?;
        self.turn.take(machine)?;
        let learnt = match &self.purpose {
            Purpose::Create { snapshot, memory } => {
                let (kept, state) = taken(machine.power, *memory);
                if kept != Power::Off {
                    machine.memories.insert(*snapshot, kept);
                }
                json(&Learnt { taken: Some(at.now), state: Some(state), ..Learnt::default() })?
            }
            Purpose::Revert { snapshot, run_state } => {
                let kept = machine.memories.get(snapshot).copied().unwrap_or(Power::Off);
                machine.power = run_state.map_or(kept, |wanted| kept.brought_to(wanted));
                Value::Null
            }
            Purpose::Delete { snapshots } => {
                machine.memories.retain(|id, _| !snapshots.contains(id));
                Value::Null
            }
            Purpose::Merge => Value::Null,
        };
        for fresh in &self.fresh {
            machine.stack(&fresh.new.disk)?.active.clone_from(&fresh.new.file);
        }
        for push in self.push.iter().filter(|push| push.active) {
            push.copy(machine, usize::MAX)?;
            machine.stack(&push.into.disk)?.active.clone_from(&push.into.file);
        }
        Ok(learnt)
    }

    fn take_back(&self, machine: &mut Layered) -> Result<(), Failure> {
        if machine.generation.as_ref() == Some(&self.turn.generation) {
            return Err(Failure::new(Code::Invalid, "a switch cannot be taken back"));
        }
        for fresh in &self.fresh {
            machine.stack(&fresh.new.disk)?.images.remove(&fresh.new.file);
        }
        for restack in &self.restack {
            machine.touch(&restack.layer.disk, &restack.layer.file)?.backing = Some(restack.old_file.clone());
        }
        Ok(())
    }
}

fn taken(power: Power, memory: MemoryKind) -> (Power, SnapshotState) {
    match (memory, power) {
        (_, Power::Off) => (Power::Off, SnapshotState::Shutoff),
        (MemoryKind::No, _) => (Power::Off, SnapshotState::DiskSnapshot),
        (_, power) => (power, power.run_state().into()),
    }
}

impl Pull {
    /// The header changes before the data came over, as QEMU's does: until the step is run again it reads differently.
    fn begin(&self, machine: &mut Layered) -> Result<(), Failure> {
        let first = self.needed(machine)?.pop_first();
        let image = machine.touch(&self.layer.disk, &self.layer.file)?;
        image.backing = Some(self.onto_file.clone());
        Arc::make_mut(&mut image.blocks).extend(first);
        Ok(())
    }

    fn perform(&self, machine: &mut Layered) -> Result<(), Failure> {
        let needed = self.needed(machine)?;
        let image = machine.touch(&self.layer.disk, &self.layer.file)?;
        Arc::make_mut(&mut image.blocks).extend(needed);
        image.backing = Some(self.onto_file.clone());
        Ok(())
    }

    /// What the vanishing files hold, and the dependant does not.
    fn needed(&self, machine: &mut Layered) -> Result<std::collections::BTreeMap<u64, u64>, Failure> {
        let stack = machine.stack(&self.layer.disk)?;
        let mut needed = std::collections::BTreeMap::new();
        for file in &self.vanish {
            needed.extend(stack.image(file)?.blocks.iter().map(|(block, value)| (*block, *value)));
        }
        let own = &stack.image(&self.layer.file)?.blocks;
        needed.retain(|block, _| !own.contains_key(block));
        Ok(needed)
    }
}

impl Push {
    /// Copies at most `count` blocks of each file down.
    fn copy(&self, machine: &mut Layered, count: usize) -> Result<(), Failure> {
        let disk = &self.into.disk;
        let stack = machine.stack(disk)?;
        let mut blocks = Vec::new();
        for file in self.between.iter().chain([&self.from.file]) {
            blocks.extend(stack.image(file)?.blocks.iter().take(count).map(|(b, v)| (*b, *v)));
        }
        Arc::make_mut(&mut machine.touch(disk, &self.into.file)?.blocks).extend(blocks);
        Ok(())
    }
}
