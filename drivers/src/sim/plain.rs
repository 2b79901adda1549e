//! A machine whose hypervisor copies, deletes and merges in one call, as a [`Host`].

use std::collections::BTreeMap;

use jiff::Timestamp;
use snaptree_engine::domain::Domain;
use snaptree_engine::driver::{Observation, Plan, Resolution, SeenSnapshot, StepContext, StepReport};
use snaptree_engine::operation::{Code, Failure, Request, Step};
use snaptree_engine::project::DomainState;
use snaptree_engine::{DiskName, OperationId, SnapshotId};

use super::host::{At, Effects, Freshness, GoingOn, Host};
use super::machine::{Content, Machine, Power};
use super::plan::{self, Detail};
use super::step::Action;
use super::{ByHand, json};

impl Host for Machine {
    fn new(domain: &Domain) -> Self {
        Self::new(domain.disks.iter().map(|disk| disk.name.clone()))
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

    fn by_hand(&mut self, act: &ByHand) -> Result<(), Failure> {
        match act {
            ByHand::Take(name) => {
                self.take_unmarked(name);
                Ok(())
            }
            ByHand::Remove(snapshot) => self.remove(*snapshot),
            ByHand::Revert(snapshot) => self.revert(*snapshot, None),
            ByHand::Rename(snapshot, name) => self.edit(*snapshot, Some(name), None),
        }
    }

    fn contents(&self) -> BTreeMap<DiskName, Content> {
        self.disks.clone()
    }

    fn kept(
        &self,
        _state: &DomainState,
        snapshot: SnapshotId,
    ) -> Result<(BTreeMap<DiskName, Content>, Power), Failure> {
        self.marked(snapshot).map(|kept| (kept.disks.clone(), kept.power))
    }

    fn recognise(&mut self, state: &DomainState) {
        self.recognise(state);
    }

    fn observe(found: Option<(Self, Freshness)>, domain: &Domain) -> Result<Observation, Failure> {
        let deleting = plan::deleting(domain)?;
        let (machine, detail) = match found {
            Some((mut machine, Freshness::Used)) => {
                let last_operation = machine.last_operation.take();
                (machine, Detail::Present { last_operation })
            }
            Some((machine, Freshness::New)) => (machine, Detail::New),
            None => (Self::new(std::iter::empty()), Detail::Missing),
        };
        let snapshots = machine.snapshots.iter().map(|kept| SeenSnapshot {
            id: kept.mark,
            native: kept.native.to_string(),
            parent: kept.parent.map(|parent| parent.to_string()),
            name: kept.name.clone(),
            description: kept.description.clone(),
            taken: None,
            state: Some(kept.power.run_state().into()),
            helper: None,
            stays: deleting.forbids(machine.children(kept.native)),
        });
        let snapshots = snapshots.collect();
        Ok(Observation {
            disks: None,
            at: Timestamp::now(),
            run_state: machine.power.run_state(),
            in_use: Vec::new(),
            files: BTreeMap::default(),
            unreadable: BTreeMap::default(),
            memory: BTreeMap::default(),
            foreign_dependants: BTreeMap::default(),
            inside: BTreeMap::default(),
            generation: None,
            room: None,
            snapshots,
            current: machine.current.map(|current| current.to_string()),
            detail: json(&detail)?,
        })
    }

    fn plan(
        _operation: OperationId,
        request: &Request,
        state: &DomainState,
        observation: &Observation,
    ) -> Result<Plan, Failure> {
        plan::plan(request, state, observation)
    }

    fn resolve(context: &StepContext<'_>, _step: &Step, observation: &Observation) -> Resolution {
        plan::resolve(context.operation, context.index, observation)
    }

    fn kind(step: &Step) -> Result<(&'static str, Effects), Failure> {
        Ok((Action::of(step)?.word(), Effects::One))
    }

    fn begin(&mut self, _domain: &Domain, _at: At, _step: &Step) -> Result<(), Failure> {
        Ok(())
    }

    fn perform(&mut self, domain: &Domain, at: At, step: &Step) -> Result<StepReport, Failure> {
        let action = Action::of(step)?;
        let applied = self.last_operation.as_ref().is_some_and(|last| last.is(at.operation, at.index));
        if let (Action::Delete { snapshot }, false) = (&action, applied) {
            let children = self.children(self.marked(*snapshot)?.native);
            if let Some(reason) = plan::deleting(domain)?.forbids(children) {
                return Err(Failure::new(Code::Invalid, reason));
            }
        }
        let learnt = action.apply(self, at.operation, at.index, at.now)?;
        // This hypervisor has no layers that could change.
        Ok(StepReport { changes: Vec::new(), learnt })
    }

    fn take_back(&mut self, _domain: &Domain, at: At, step: &Step) -> Result<StepReport, Failure> {
        Action::of(step)?.take_back(self, at.operation, at.index)?;
        Ok(StepReport::default())
    }
}
