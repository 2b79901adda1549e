//! From a request to steps, and from an observation to what became of a step. Pure.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use snaptree_engine::domain::{Domain, RunState};
use snaptree_engine::driver::{Observation, Plan, Remedy, Resolution, SeenSnapshot, StepReport};
use snaptree_engine::event::{
    DeleteWhat, MemoryKind, MergeWish, SnapshotCreateRequested, SnapshotDeleteRequested, SnapshotEdited,
    SnapshotRevertRequested, UnregisterWish,
};
use snaptree_engine::operation::{Code, Failure, Poison, Request, Reversal};
use snaptree_engine::project::DomainState;
use snaptree_engine::reconcile::merge::{MergeAction, MergePlan};
use snaptree_engine::{OperationId, SnapshotId};

use super::machine::Applied;
use super::profile::{Deleting, SimOptions};
use super::step::Action;

/// What this driver adds to an [`Observation`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "machine", rename_all = "kebab-case")]
pub(super) enum Detail {
    /// There is no machine file, and no snapshot that it would have to hold: a machine that nobody used yet.
    New,
    /// There is no machine file, though the log has snapshots.
    Missing,
    /// There is one.
    Present {
        /// The last step that took effect.
        #[serde(default)]
        last_operation: Option<Applied>,
    },
}

impl Detail {
    fn of(observation: &Observation) -> Result<Self, Failure> {
        Self::deserialize(&observation.detail).map_err(|error| {
            Failure::new(Code::Invalid, format!("the observation is none of this driver's: {error}"))
        })
    }
}

/// The log has snapshots, and the machine's file is gone.
pub(super) fn missing() -> Failure {
    Failure::new(Code::Drift, "the machine's file is gone, and the snapshots with it")
        .hint("put it back from a backup, or let go of the domain with --keep-layers")
}

pub(super) fn domain(state: &DomainState) -> Result<&Domain, Failure> {
    state.domain.as_ref().ok_or_else(|| Failure::new(Code::NotFound, "the domain is not registered"))
}

/// How the domain's hypervisor deletes.
pub(super) fn deleting(domain: &Domain) -> Result<Deleting, Failure> {
    Ok(SimOptions::read(&domain.config)?.profile.deleting())
}

/// Judges again what may have changed since the request was decided; capabilities and disks cannot have.
pub(super) fn plan(
    request: &Request,
    state: &DomainState,
    observation: &Observation,
) -> Result<Plan, Failure> {
    let planner = Planner { domain: domain(state)?, state, observation };
    // Letting go of a domain touches nothing, so it works also when there is nothing left to touch.
    if let Request::Unregister(request) = request
        && request.wish != UnregisterWish::Flatten
    {
        return Ok(Plan::default());
    }
    if Detail::of(observation)? == Detail::Missing {
        return Err(missing());
    }
    match request {
        Request::Create(request) => planner.create(request),
        Request::Revert(request) => planner.revert(request),
        Request::Delete(request) => planner.delete(request),
        Request::Unregister(_) => planner.flatten(),
        Request::Merge(request) => planner.merge(&request.plan),
        Request::Edit(request) => planner.edit(&request.edit),
    }
}

fn unsupported<T>(why: impl Into<String>) -> Result<T, Failure> {
    Err(Failure::new(Code::Unsupported, why))
}

struct Planner<'a> {
    domain: &'a Domain,
    state: &'a DomainState,
    observation: &'a Observation,
}

impl Planner<'_> {
    fn create(&self, request: &SnapshotCreateRequested) -> Result<Plan, Failure> {
        let can = &self.domain.capabilities;
        let runs = self.observation.run_state != RunState::Off;
        if request.memory == MemoryKind::No && runs && !can.disk_only {
            return unsupported("a machine that is not off can only be taken with its memory here");
        }
        if request.name.as_str().len() > can.name_bytes_max {
            let message = format!("a snapshot's name has at most {} bytes here", can.name_bytes_max);
            return Err(Failure::new(Code::Invalid, message));
        }
        if self.depth() >= can.depth_max {
            return unsupported(format!("snapshots can be {} deep here, and they are", can.depth_max));
        }
        if self.state.tree.by_name(&request.name).is_some() {
            return Err(Failure::new(
                Code::Exists,
                format!("there is already a snapshot '{}'", request.name),
            ));
        }
        if self.seen(request.snapshot).is_some() {
            let message = format!("the hypervisor already has snapshot {}", request.snapshot);
            return Err(Failure::new(Code::Drift, message));
        }
        let action = Action::Create {
            snapshot: request.snapshot,
            name: request.name.clone(),
            description: request.description.clone(),
            disks: request.disks.clone(),
            memory: request.memory,
        };
        let step = action.step(format!("take '{}'", request.name), Reversal::Undoable, Poison::Nothing)?;
        Ok(Plan { steps: vec![step], ..Plan::default() })
    }

    fn revert(&self, request: &SnapshotRevertRequested) -> Result<Plan, Failure> {
        let name = self.name_of(request.snapshot)?;
        self.must_be_seen(request.snapshot)?;
        let action = Action::Revert { snapshot: request.snapshot, run_state: request.run_state };
        let step = action.step(format!("revert to {name}"), Reversal::PointOfNoReturn, Poison::Nothing)?;
        let lost = vec!["what the machine did since its last snapshot".to_owned()];
        Ok(Plan { steps: vec![step], lost, ..Plan::default() })
    }

    fn edit(&self, edit: &SnapshotEdited) -> Result<Plan, Failure> {
        let name = self.name_of(edit.snapshot)?;
        self.must_be_seen(edit.snapshot)?;
        let action = Action::Edit {
            snapshot: edit.snapshot,
            name: edit.name.clone(),
            description: edit.description.clone(),
        };
        let step = action.step(format!("edit {name}"), Reversal::PointOfNoReturn, Poison::Nothing)?;
        Ok(Plan { steps: vec![step], ..Plan::default() })
    }

    /// Merges what was deleted before. What somebody else removed meanwhile is merged already.
    fn merge(&self, merge: &MergePlan) -> Result<Plan, Failure> {
        if merge.actions.iter().any(|action| !matches!(action, MergeAction::Fold { .. })) {
            return unsupported("this hypervisor has no layers");
        }
        let mut plan = Plan::default();
        for snapshot in merge.snapshots.iter().copied().filter(|snapshot| self.seen(*snapshot).is_some()) {
            let name = self.state.tombstones.get(&snapshot).map_or("", |tombstone| tombstone.name.as_str());
            let action = Action::Delete { snapshot };
            let step = action.step(format!("merge '{name}'"), Reversal::PointOfNoReturn, Poison::Nothing)?;
            plan.steps.push(step);
        }
        Ok(plan)
    }

    fn delete(&self, request: &SnapshotDeleteRequested) -> Result<Plan, Failure> {
        let mut plan = Plan::default();
        let deleting = deleting(self.domain)?;
        let mut left: BTreeMap<&str, Option<&str>> = self
            .observation
            .snapshots
            .iter()
            .map(|seen| (seen.native.as_str(), seen.parent.as_deref()))
            .collect();
        for (index, &snapshot) in request.snapshots.iter().enumerate() {
            let name = self.name_of(snapshot)?;
            let (action, title) = match request.what {
                DeleteWhat::Metadata => (Action::Forget { snapshot }, format!("forget {name}")),
                DeleteWhat::Snapshot => {
                    self.must_be_seen(snapshot)?;
                    plan.lost.push(format!("snapshot {name}"));
                    match self.may_merge(snapshot, request.merge, deleting, &mut left) {
                        true => (Action::Delete { snapshot }, format!("delete {name}")),
                        false => (Action::Hide { snapshot }, format!("hide {name}")),
                    }
                }
            };
            let reversal = if index == 0 { Reversal::PointOfNoReturn } else { Reversal::ForwardOnly };
            let poison = match (&action, deleting) {
                (Action::Hide { .. }, _) => Poison::Hidden(vec![snapshot]),
                (Action::Delete { .. }, Deleting::Merging { .. }) => Poison::AtStart(vec![snapshot]),
                _ => Poison::AtFinish(vec![snapshot]),
            };
            plan.steps.push(action.step(title, reversal, poison)?);
        }
        Ok(plan)
    }

    /// Whether a snapshot can be merged in its turn, with those before it gone from `left` (native ids, with their
    /// parents').
    fn may_merge<'s>(
        &'s self,
        snapshot: SnapshotId,
        wish: MergeWish,
        deleting: Deleting,
        left: &mut BTreeMap<&'s str, Option<&'s str>>,
    ) -> bool {
        let Some(native) = self.seen(snapshot).map(|seen| seen.native.as_str()) else { return true };
        let children = left.values().filter(|parent| **parent == Some(native)).count();
        let later = wish == MergeWish::Defer && deleting != Deleting::AtOnce;
        if later || deleting.forbids(children).is_some() {
            return false;
        }
        let parent = left.remove(native).flatten();
        left.values_mut().filter(|above| **above == Some(native)).for_each(|above| *above = parent);
        true
    }

    /// Ends our snapshots and keeps the disks as they are. What others made there is not ours to remove.
    fn flatten(&self) -> Result<Plan, Failure> {
        let tree = &self.state.tree;
        if tree.is_empty() && self.state.tombstones.is_empty() {
            return Ok(Plan::default());
        }
        let mut ended: Vec<SnapshotId> = Vec::with_capacity(tree.len());
        for root in tree.roots() {
            ended.extend(tree.descendants(root.id));
            ended.push(root.id);
        }
        let dead = self.state.tombstones.keys();
        let held =
            ended.iter().chain(dead).copied().filter(|snapshot| self.seen(*snapshot).is_some()).collect();
        let action = Action::Flatten { snapshots: held };
        let lost = tree.iter().map(|snapshot| format!("snapshot '{}'", snapshot.name)).collect();
        let poison = Poison::AtFinish(ended);
        let step = action.step("remove all snapshots".to_owned(), Reversal::PointOfNoReturn, poison)?;
        Ok(Plan { steps: vec![step], lost, ..Plan::default() })
    }

    /// The snapshot's name in quotes.
    fn name_of(&self, snapshot: SnapshotId) -> Result<String, Failure> {
        let found = self.state.tree.get(snapshot).map(|known| format!("'{}'", known.name));
        found.ok_or_else(|| Failure::new(Code::NotFound, format!("there is no snapshot {snapshot}")))
    }

    fn seen(&self, snapshot: SnapshotId) -> Option<&SeenSnapshot> {
        self.observation.snapshots.iter().find(|seen| seen.id == Some(snapshot))
    }

    fn must_be_seen(&self, snapshot: SnapshotId) -> Result<(), Failure> {
        if self.seen(snapshot).is_some() {
            return Ok(());
        }
        let message = format!("the hypervisor no longer has snapshot {}", self.name_of(snapshot)?);
        Err(Failure::new(Code::Drift, message).hint("delete it with --metadata to forget it"))
    }

    /// How many snapshots stand between the machine and nothing.
    fn depth(&self) -> usize {
        let find = |native: &String| self.observation.snapshots.iter().find(|seen| seen.native == *native);
        let current = self.observation.current.as_ref().and_then(find);
        std::iter::successors(current, |seen| seen.parent.as_ref().and_then(find))
            .take(self.observation.snapshots.len())
            .count()
    }
}

pub(super) fn resolve(operation: OperationId, step: usize, observation: &Observation) -> Resolution {
    match Detail::of(observation) {
        Err(failure) => Resolution::HalfDone(Remedy::AskSomeone(failure)),
        Ok(Detail::Missing) => Resolution::HalfDone(Remedy::AskSomeone(missing())),
        Ok(Detail::Present { last_operation: Some(last) }) if last.is(operation, step) => {
            Resolution::Done(StepReport { changes: Vec::new(), learnt: last.learnt })
        }
        Ok(Detail::New | Detail::Present { .. }) => Resolution::NotDone,
    }
}
