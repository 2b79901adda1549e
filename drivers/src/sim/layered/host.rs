//! The layered machine as a [`Host`].

use std::collections::BTreeMap;

use jiff::Timestamp;
use snaptree_engine::domain::Domain;
use snaptree_engine::driver::{FileFacts, Observation, Plan, Resolution, StepContext, StepReport};
use snaptree_engine::operation::{Code, Failure, Request, Step};
use snaptree_engine::project::DomainState;
use snaptree_engine::{DiskName, OperationId, SnapshotId};

use super::super::host::{At, Effects, Freshness, GoingOn, Host};
use super::super::machine::{Content, Power};
use super::super::{ByHand, DISK_BYTES, json};
use super::resolve::Detail;
use super::step::Action;
use super::{Layered, path, plan, resolve};

impl Host for Layered {
    fn new(domain: &Domain) -> Self {
        Self::new(domain)
    }

    fn check(&self) -> Result<(), String> {
        self.check()
    }

    fn has_disk(&self, disk: &DiskName) -> bool {
        self.disks.contains_key(disk)
    }

    fn power(&mut self) -> &mut Power {
        &mut self.power
    }

    fn going_on(&mut self) -> &mut Option<GoingOn> {
        &mut self.going_on
    }

    fn write(&mut self, disk: &DiskName, block: u64, value: u64) -> Result<(), Failure> {
        self.write(disk, block, value)
    }

    fn by_hand(&mut self, _act: &ByHand) -> Result<(), Failure> {
        Err(Failure::new(Code::Unsupported, "this hypervisor keeps no list of snapshots"))
    }

    fn contents(&self) -> BTreeMap<DiskName, Content> {
        self.disks.iter().map(|(disk, stack)| (disk.clone(), stack.read(&stack.active))).collect()
    }

    fn kept(
        &self,
        state: &DomainState,
        snapshot: SnapshotId,
    ) -> Result<(BTreeMap<DiskName, Content>, Power), Failure> {
        let missing = || Failure::new(Code::Drift, format!("no layer holds snapshot {snapshot}"));
        let known = state.tree.get(snapshot).ok_or_else(missing)?;
        let mut disks = BTreeMap::new();
        for disk in &known.disks {
            let layer = state.layers.disks.get(disk).and_then(|layers| layers.layer_of(snapshot));
            let file = layer.and_then(|(_, layer)| layer.file.file_name()).and_then(|name| name.to_str());
            let (file, stack) = file.zip(self.disks.get(disk)).ok_or_else(missing)?;
            if !stack.images.contains_key(file) {
                return Err(missing());
            }
            disks.insert(disk.clone(), stack.read(file));
        }
        Ok((disks, self.memories.get(&snapshot).copied().unwrap_or(Power::Off)))
    }

    fn observe(found: Option<(Self, Freshness)>, domain: &Domain) -> Result<Observation, Failure> {
        let mut seen = Observation {
            disks: None,
            at: Timestamp::now(),
            run_state: snaptree_engine::domain::RunState::Off,
            in_use: Vec::new(),
            files: BTreeMap::default(),
            unreadable: BTreeMap::default(),
            memory: BTreeMap::default(),
            foreign_dependants: BTreeMap::default(),
            inside: BTreeMap::default(),
            generation: None,
            room: None,
            snapshots: Vec::new(),
            current: None,
            detail: json(&Detail::Missing)?,
        };
        let Some((machine, _)) = found else { return Ok(seen) };
        seen.run_state = machine.power.run_state();
        seen.generation.clone_from(&machine.generation);
        for (file, image) in machine.disks.values().flat_map(|stack| &stack.images) {
            let facts = FileFacts {
                stamp: image.stamp(),
                mode: 0o600,
                allocated_bytes: image.allocated_bytes(),
                backing: image.backing.as_ref().map(|below| path(domain.id, below)),
                virtual_size_bytes: DISK_BYTES,
                internal_snapshots: 0,
            };
            seen.files.insert(path(domain.id, file), facts);
        }
        let active = machine.disks.into_iter().map(|(disk, stack)| (disk, stack.active)).collect();
        seen.detail = json(&Detail::Present { last_operation: machine.last_operation, active })?;
        Ok(seen)
    }

    fn plan(
        operation: OperationId,
        request: &Request,
        state: &DomainState,
        observation: &Observation,
    ) -> Result<Plan, Failure> {
        plan::plan(operation, request, state, observation)
    }

    fn resolve(context: &StepContext<'_>, step: &Step, observation: &Observation) -> Resolution {
        resolve::resolve(context, step, observation)
    }

    fn kind(step: &Step) -> Result<(&'static str, Effects), Failure> {
        Ok(Action::of(step)?.kind())
    }

    fn begin(&mut self, _domain: &Domain, _at: At, step: &Step) -> Result<(), Failure> {
        Action::of(step)?.begin(self)
    }

    fn perform(&mut self, domain: &Domain, at: At, step: &Step) -> Result<StepReport, Failure> {
        let action = Action::of(step)?;
        let learnt = action.perform(self, at)?;
        let changes = action.changes(domain.id, &|file| self.stamp_of(file))?;
        Ok(StepReport { changes, learnt })
    }

    fn take_back(&mut self, _domain: &Domain, _at: At, step: &Step) -> Result<StepReport, Failure> {
        let action = Action::of(step)?;
        action.take_back(self)?;
        let changes = action.changes_back(&|file| self.stamp_of(file))?;
        Ok(StepReport { changes, learnt: serde_json::Value::Null })
    }
}

impl Layered {
    fn stamp_of(&self, file: &str) -> Option<snaptree_engine::layer::FileStamp> {
        self.disks.values().find_map(|stack| stack.images.get(file)).map(super::Image::stamp)
    }
}
