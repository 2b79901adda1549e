//! From a request to steps, and from an observation to what became of a step. Pure.

use snaptree_engine::SnapshotId;
use snaptree_engine::domain::{Disk, RunState};
use snaptree_engine::driver::{Observation, Plan, Remedy, Resolution, SeenSnapshot, StepReport};
use snaptree_engine::event::{
    DeleteWhat, MemoryKind, SnapshotCreateRequested, SnapshotDeleteRequested, SnapshotEdited,
    SnapshotRevertRequested, UnregisterWish,
};
use snaptree_engine::operation::{Code, Failure, Poison, Request, Reversal};
use snaptree_engine::project::DomainState;
use snaptree_engine::tree::SnapshotState;

use super::config::domain;
use super::observe::Detail;
use super::step::{Action, Before, PowerOn, Text, Wanted, not_at_rest, taken};
use super::vim::{Task, TaskState};

/// Judges again what may have changed since the request was decided; capabilities cannot have.
pub(super) fn plan(
    request: &Request,
    state: &DomainState,
    observation: &Observation,
) -> Result<Plan, Failure> {
    let planner = Planner { state, observation, detail: Detail::of(observation)? };
    match request {
        // Letting go of a domain touches nothing.
        Request::Unregister(request) if request.wish != UnregisterWish::Flatten => Ok(Plan::default()),
        Request::Unregister(_) => planner.flatten(),
        Request::Create(request) => planner.create(request),
        Request::Revert(request) => planner.revert(request),
        Request::Delete(request) => planner.delete(request),
        Request::Edit(request) => planner.edit(&request.edit),
        Request::Merge(_) => unsupported("the host merges when it deletes"),
    }
}

fn unsupported<T>(why: impl Into<String>) -> Result<T, Failure> {
    Err(Failure::new(Code::Unsupported, why))
}

struct Planner<'a> {
    state: &'a DomainState,
    observation: &'a Observation,
    detail: Detail,
}

impl Planner<'_> {
    fn create(&self, request: &SnapshotCreateRequested) -> Result<Plan, Failure> {
        self.answers()?;
        let can = &domain(self.state)?.capabilities;
        if self.depth() >= can.depth_max {
            let message = format!("snapshots can be {} deep on a host, and they are", can.depth_max);
            return Err(Failure::new(Code::Unsupported, message).hint("delete some of the chain"));
        }
        if self.detail.marks.contains_key(&request.snapshot) {
            let message = format!("the host already has snapshot {}", request.snapshot);
            return Err(Failure::new(Code::Drift, message));
        }
        can_be_sent(request.description.as_deref().unwrap_or_default())?;
        let power = self.observation.run_state;
        let content = match (request.memory, request.quiesce) {
            (MemoryKind::No, true) => Wanted::DisksAtRest,
            (MemoryKind::No, false) => Wanted::Disks,
            _ => Wanted::Memory,
        };
        if content == Wanted::DisksAtRest
            && power == RunState::Running
            && self.detail.tools_run == Some(false)
        {
            let message = "VMware Tools do not run in the guest, so it cannot be brought to rest";
            return Err(Failure::new(Code::Unsupported, message).hint("start them, or leave out --quiesce"));
        }
        let action = Action::Create {
            snapshot: request.snapshot,
            name: request.name.as_str().to_owned(),
            description: request.description.clone(),
            content,
            power,
        };
        let step = action.step(format!("take '{}'", request.name), Reversal::Undoable, Poison::Nothing)?;
        Ok(Plan { steps: vec![step], ..Plan::default() })
    }

    fn revert(&self, request: &SnapshotRevertRequested) -> Result<Plan, Failure> {
        self.answers()?;
        let name = self.name_of(request.snapshot)?;
        let seen = self.seen(request.snapshot)?;
        let comes_to = match seen.state {
            Some(SnapshotState::Running) => RunState::Running,
            Some(SnapshotState::Paused) => RunState::Paused,
            Some(SnapshotState::Shutoff | SnapshotState::DiskSnapshot) | None => RunState::Off,
        };
        if request.run_state == Some(RunState::Paused) && comes_to != RunState::Paused {
            let message =
                format!("a revert to {name} cannot leave the machine paused: vSphere knows no such state");
            return Err(Failure::new(Code::Unsupported, message).hint("leave out --paused"));
        }
        let power_on = match request.run_state {
            Some(RunState::Off) => PowerOn::Suppressed,
            _ => PowerOn::AsTaken,
        };
        let known = |task: &Task| (task.id.clone(), task.queued);
        let before = Before {
            current: self.observation.current.clone(),
            power: self.observation.run_state,
            booted: self.detail.booted.clone(),
            tasks: self.detail.tasks.iter().map(known).collect(),
        };
        let action =
            Action::Revert { snapshot: request.snapshot, native: seen.native.clone(), power_on, before };
        let mut steps =
            vec![action.step(format!("revert to {name}"), Reversal::PointOfNoReturn, Poison::Nothing)?];
        if request.run_state == Some(RunState::Running) && comes_to != RunState::Running {
            steps.push(Action::Start.step("start".to_owned(), Reversal::ForwardOnly, Poison::Nothing)?);
        }
        let mut lost = self.detached(request.snapshot);
        lost.push("what the machine did since its last snapshot".to_owned());
        Ok(Plan { steps, lost, ..Plan::default() })
    }

    /// What a revert detaches, in words: a snapshot brings the machine's devices back, too.
    fn detached(&self, snapshot: SnapshotId) -> Vec<String> {
        let Some(known) = self.state.tree.get(snapshot) else { return Vec::new() };
        let now = self.observation.disks.iter().flatten().filter(|disk| disk.left_out.is_none());
        let gone = now.filter(|disk| !known.disks.contains(&disk.name));
        let words = |disk: &Disk| {
            format!("disk '{}', which the snapshot does not have: it is detached from the machine", disk.name)
        };
        gone.map(words).collect()
    }

    fn edit(&self, edit: &SnapshotEdited) -> Result<Plan, Failure> {
        let old = self.name_of(edit.snapshot)?;
        let seen = self.seen(edit.snapshot)?;
        let from = Text { name: seen.name.clone(), description: seen.description.clone() };
        let mut to = from.clone();
        if let Some(name) = &edit.name {
            name.as_str().clone_into(&mut to.name);
        }
        if let Some(description) = &edit.description {
            can_be_sent(description)?;
            to.description = Some(description.clone()).filter(|text| !text.is_empty());
        }
        let action = Action::Edit { snapshot: edit.snapshot, native: seen.native.clone(), to, from };
        let step = action.step(format!("edit {old}"), Reversal::Undoable, Poison::Nothing)?;
        Ok(Plan { steps: vec![step], ..Plan::default() })
    }

    fn delete(&self, request: &SnapshotDeleteRequested) -> Result<Plan, Failure> {
        match request.what {
            DeleteWhat::Snapshot => self.remove(&request.snapshots),
            DeleteWhat::Metadata => {
                let mut plan = Plan::default();
                for (index, &snapshot) in request.snapshots.iter().enumerate() {
                    let name = format!("forget {}", self.name_of(snapshot)?);
                    let (reversal, poison) = (nth(index), Poison::AtFinish(vec![snapshot]));
                    plan.steps.push(Action::Forget { snapshot }.step(name, reversal, poison)?);
                }
                Ok(plan)
            }
        }
    }

    /// One after the other, in the order given: children first.
    fn remove(&self, snapshots: &[SnapshotId]) -> Result<Plan, Failure> {
        self.answers()?;
        let mut plan = Plan::default();
        for (index, &snapshot) in snapshots.iter().enumerate() {
            let name = self.name_of(snapshot)?;
            let native = self.seen(snapshot)?.native.clone();
            plan.lost.push(format!("snapshot {name}"));
            let action = Action::Remove { snapshot, native };
            let poison = Poison::AtFinish(vec![snapshot]);
            plan.steps.push(action.step(format!("delete {name}"), nth(index), poison)?);
        }
        plan.steps.push(Action::Consolidate.step(
            "consolidate".to_owned(),
            Reversal::ForwardOnly,
            Poison::Nothing,
        )?);
        Ok(plan)
    }

    /// Ends our snapshots and keeps the disks as they are. What others made there is not ours to remove.
    fn flatten(&self) -> Result<Plan, Failure> {
        let tree = &self.state.tree;
        let mut ended: Vec<SnapshotId> = Vec::with_capacity(tree.len());
        for root in tree.roots() {
            let mut below = tree.descendants(root.id);
            below.reverse();
            ended.extend(below);
            ended.push(root.id);
        }
        ended.retain(|snapshot| self.seen(*snapshot).is_ok());
        if ended.is_empty() { Ok(Plan::default()) } else { self.remove(&ended) }
    }

    /// Whether the machine can be worked on at all.
    fn answers(&self) -> Result<(), Failure> {
        if let Some(question) = &self.detail.question {
            let message =
                format!("the machine waits for an answer, and no task goes on until then: {question}");
            return Err(Failure::new(Code::InUse, message).hint("answer it with vSphere's own client"));
        }
        match self.detail.connection.as_deref() {
            None | Some("connected") => Ok(()),
            Some(other) => {
                let message = format!("the machine is '{other}' at its host: it cannot be worked on");
                Err(Failure::new(Code::Io, message).hint("see to the host in the vCenter"))
            }
        }
    }

    /// The snapshot's name in quotes.
    fn name_of(&self, snapshot: SnapshotId) -> Result<String, Failure> {
        let found = self.state.tree.get(snapshot).map(|known| format!("'{}'", known.name));
        found.ok_or_else(|| Failure::new(Code::NotFound, format!("there is no snapshot {snapshot}")))
    }

    fn seen(&self, snapshot: SnapshotId) -> Result<&SeenSnapshot, Failure> {
        let found = self.observation.snapshots.iter().find(|seen| seen.id == Some(snapshot));
        let name = || self.name_of(snapshot).unwrap_or_else(|_| snapshot.to_string());
        found.ok_or_else(|| {
            Failure::new(Code::Drift, format!("the host no longer has snapshot {}", name()))
                .hint("delete it with --metadata to forget it")
        })
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

/// XML cannot carry every character.
fn can_be_sent(text: &str) -> Result<(), Failure> {
    let forbidden =
        |c: char| c.is_control() && !matches!(c, '\t' | '\n' | '\r') || matches!(c, '\u{fffe}' | '\u{ffff}');
    match text.chars().find(|c| forbidden(*c)) {
        Some(c) => {
            let message = format!("a description cannot hold the character U+{:04X} on a host", u32::from(c));
            Err(Failure::new(Code::Invalid, message))
        }
        None => Ok(()),
    }
}

const fn nth(index: usize) -> Reversal {
    if index == 0 { Reversal::PointOfNoReturn } else { Reversal::ForwardOnly }
}

pub(super) fn resolve(action: &Action, observation: &Observation) -> Resolution {
    let detail = match Detail::of(observation) {
        Ok(detail) => detail,
        Err(failure) => return Resolution::HalfDone(Remedy::AskSomeone(failure)),
    };
    let done = || Resolution::Done(StepReport::default());
    let lists = |native: &str| observation.snapshots.iter().any(|seen| seen.native == native);
    match action {
        Action::Create { snapshot, content, power, .. } => {
            match detail.marks.get(snapshot).map_or(&[][..], Vec::as_slice) {
                [] => Resolution::NotDone,
                [mark] => match (not_at_rest(mark, *content, *power), taken(mark, *power)) {
                    (None, Ok(report)) => Resolution::Done(report),
                    (Some(failure), _) | (None, Err(failure)) => {
                        Resolution::HalfDone(Remedy::TakeBack(failure))
                    }
                },
                // A call that came twice: the younger ones are to go.
                [_, ..] => Resolution::HalfDone(Remedy::Finish),
            }
        }
        Action::Revert { native, before, .. } => reverted(native, before, observation, &detail),
        Action::Start if observation.run_state == RunState::Running => done(),
        Action::Remove { native, .. } if !lists(native) => done(),
        Action::Consolidate if !detail.consolidation_needed => done(),
        Action::Start | Action::Remove { .. } | Action::Consolidate => Resolution::NotDone,
        Action::Forget { .. } => done(),
        Action::Edit { native, to, .. } => {
            let seen = observation.snapshots.iter().find(|seen| seen.native == *native);
            match seen {
                Some(seen) if seen.name == to.name && seen.description == to.description => done(),
                _ => Resolution::NotDone,
            }
        }
    }
}

/// What became of a revert. The host's own account of its tasks tells; where it has none any more, whether the machine
/// stands elsewhere, or is powered otherwise, than before.
fn reverted(native: &str, before: &Before, observation: &Observation, detail: &Detail) -> Resolution {
    let is_new = |task: &&Task| !before.tasks.contains(&(task.id.clone(), task.queued));
    let is_ours =
        |task: &&Task| task.user.as_ref().is_none_or(|user| user.eq_ignore_ascii_case(&detail.user));
    let ours = detail.tasks.iter().filter(|task| task.is_revert()).filter(is_new).filter(is_ours);
    let stands = observation.current.as_deref() == Some(native);
    let moved = stands && before.current.as_deref() != Some(native);
    match ours.max_by_key(|task| task.queued).map(|task| task.state) {
        Some(TaskState::Success) if stands => Resolution::Done(StepReport::default()),
        // It is not known how much of it took place; a revert may be made twice, and the guest did nothing since.
        Some(TaskState::Error) if moved => Resolution::HalfDone(Remedy::Finish),
        Some(_) => Resolution::NotDone,
        None if moved => Resolution::Done(StepReport::default()),
        None => {
            let powered = before.power != observation.run_state || before.booted != detail.booted;
            if stands && powered { Resolution::Done(StepReport::default()) } else { Resolution::NotDone }
        }
    }
}

#[cfg(test)]
mod tests;
