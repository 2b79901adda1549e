//! What the driver needs of a machine, however the machine keeps its snapshots. No I/O.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use snaptree_engine::domain::{Domain, RunState};
use snaptree_engine::driver::{Observation, Plan, Resolution, StepContext, StepReport};
use snaptree_engine::operation::{Failure, Request, Step};
use snaptree_engine::project::DomainState;
use snaptree_engine::{DiskName, OperationId, SnapshotId};

use super::ByHand;
use super::machine::{Content, Power};

/// A step that goes on after its client is gone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct GoingOn {
    pub operation: OperationId,
    pub index: usize,
    pub step: Step,
    pub now: Timestamp,
}

/// Which step is meant, and when it began.
#[derive(Clone, Copy, Debug)]
pub(super) struct At {
    pub operation: OperationId,
    pub index: usize,
    pub now: Timestamp,
}

impl At {
    /// `clock_off` is how far the host's clock is from ours.
    pub(super) fn of(context: &StepContext<'_>, clock_off: SignedDuration) -> Self {
        let now = context.now.checked_add(clock_off).unwrap_or(context.now);
        Self { operation: context.operation, index: context.index, now }
    }
}

/// How many effects a step has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effects {
    /// It is done or not done.
    One,
    /// It can be half done.
    Several,
}

/// A machine of one kind.
pub(super) trait Host:
    Serialize + DeserializeOwned + Clone + std::fmt::Debug + Send + Sync + 'static
{
    /// One that was never switched on.
    fn new(domain: &Domain) -> Self;

    /// Says what contradicts itself. Nothing in what this program writes does.
    fn check(&self) -> Result<(), String>;

    fn has_disk(&self, disk: &DiskName) -> bool;

    fn power(&mut self) -> &mut Power;

    fn going_on(&mut self) -> &mut Option<GoingOn>;

    /// The guest writes a block.
    fn write(&mut self, disk: &DiskName, block: u64, value: u64) -> Result<(), Failure>;

    /// Someone uses the hypervisor itself, past Snaptree.
    fn by_hand(&mut self, act: &ByHand) -> Result<(), Failure>;

    /// What the disks read as now.
    fn contents(&self) -> BTreeMap<DiskName, Content>;

    /// What the disks of a snapshot read as, and what a revert brings the machine to.
    fn kept(
        &self,
        state: &DomainState,
        snapshot: SnapshotId,
    ) -> Result<(BTreeMap<DiskName, Content>, Power), Failure>;

    /// What can be seen of it from outside. None stands for a machine whose file is gone.
    fn observe(found: Option<(Self, Freshness)>, domain: &Domain) -> Result<Observation, Failure>;

    fn plan(
        operation: OperationId,
        request: &Request,
        state: &DomainState,
        observation: &Observation,
    ) -> Result<Plan, Failure>;

    fn resolve(context: &StepContext<'_>, step: &Step, observation: &Observation) -> Resolution;

    /// The word for a step in the names of hooks, and how many effects it has.
    fn kind(step: &Step) -> Result<(&'static str, Effects), Failure>;

    /// Lets the first of several effects take place.
    fn begin(&mut self, domain: &Domain, at: At, step: &Step) -> Result<(), Failure>;

    /// Lets the step, or what is left of it, take effect.
    fn perform(&mut self, domain: &Domain, at: At, step: &Step) -> Result<StepReport, Failure>;

    /// Takes a step back, whether it was not, half or wholly done.
    fn take_back(&mut self, domain: &Domain, at: At, step: &Step) -> Result<StepReport, Failure>;

    /// What goes on behind comes to its end, be it a failure that nobody hears of.
    fn let_finish(&mut self, domain: &Domain) {
        if let Some(GoingOn { operation, index, step, now }) = self.going_on().take() {
            let _ = self.perform(domain, At { operation, index, now }, &step);
        }
    }

    /// Knows again what the log adopted.
    fn recognise(&mut self, _state: &DomainState) {}

    fn bring_to(&mut self, run_state: RunState) {
        let power = self.power();
        *power = power.brought_to(run_state);
    }
}

/// Whether a machine was ever changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Freshness {
    New,
    Used,
}
