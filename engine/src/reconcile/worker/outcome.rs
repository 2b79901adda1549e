//! How an operation ends: the events that make its request true, and the account of it.

use crate::around::HookEnd;
use crate::domain::Domain;
use crate::driver::Learnt;
use crate::engine::EngineError;
use crate::event::{
    DomainUnregistered, Event, MemoryKind, MergeDeferred, MergeFinished, OperationFailed, OperationSucceeded,
    SnapshotCreated, SnapshotDeleted, SnapshotReverted, UnregisterWish,
};
use crate::ids::SnapshotId;
use crate::operation::{Failure, Operation, Outcome, Request};
use crate::tree::SnapshotState;

use super::{Carried, Pass, Worker};

/// Whether a hypervisor that merges by itself may still hold the data of a deleted snapshot.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Stays {
    No,
    AtTheHypervisor,
}

impl Worker<'_> {
    /// The events that make the request true, and the outcome. `before` goes into the same commit.
    pub(super) fn outcome(&self, operation: &Operation, before: &[Event]) -> Vec<Event> {
        let mut events = Vec::new();
        let mut learnt = operation.learnt.clone();
        for event in before {
            if let Event::OperationStepFinished(e) = event
                && let Ok(now) = serde_json::from_value::<Learnt>(e.learnt.clone())
            {
                learnt.add(now);
            }
        }
        let gone: Vec<SnapshotId> = before
            .iter()
            .filter_map(|event| match event {
                Event::SnapshotDeleted(e) => Some(e.snapshot),
                _ => None,
            })
            .collect();
        match &operation.request {
            // What the layers hold of it is a tombstone.
            Request::Create(_) if learnt.failed.is_some() => {}
            Request::Create(request) => {
                let mut snapshot = request.predicted(operation);
                snapshot.parent = self.state.tree.current().map(|current| current.id);
                snapshot.created = learnt.taken.unwrap_or_else(|| self.engine.clock.now());
                snapshot.state = learnt.state.unwrap_or(SnapshotState::Shutoff);
                snapshot.native = learnt.native;
                snapshot.left_out = learnt.left_out;
                snapshot.left_out.extend(self.state.domain.iter().flat_map(Domain::left_out));
                if matches!(snapshot.state, SnapshotState::Shutoff | SnapshotState::DiskSnapshot) {
                    snapshot.memory = MemoryKind::No;
                }
                events.push(SnapshotCreated { snapshot }.into());
            }
            Request::Revert(request) => events.push(SnapshotReverted { snapshot: request.snapshot }.into()),
            Request::Delete(request) => {
                let left: Vec<_> =
                    request.snapshots.iter().copied().filter(|id| !gone.contains(id)).collect();
                events.extend(self.deleted(&left, Stays::No));
            }
            Request::Edit(request) => events.push(request.edit.clone().into()),
            Request::Merge(request) => {
                events.push(MergeFinished { snapshots: request.plan.snapshots.clone() }.into());
            }
            Request::Unregister(request) => {
                let mut left: Vec<_> = learnt.left.into_iter().collect();
                if request.wish == UnregisterWish::KeepLayers {
                    left.extend(self.state.layers.files().cloned());
                }
                events.push(DomainUnregistered { wish: request.wish, left }.into());
            }
        }
        events.push(match learnt.failed {
            Some(failure) => OperationFailed { failure }.into(),
            None => OperationSucceeded {}.into(),
        });
        events
    }

    /// One `Deleted` per snapshot that still lives.
    pub(super) fn deleted(&self, snapshots: &[SnapshotId], stays: Stays) -> Vec<Event> {
        let stays = stays == Stays::AtTheHypervisor;
        snapshots
            .iter()
            .filter_map(|id| self.state.tree.get(*id))
            .map(|snapshot| {
                SnapshotDeleted { snapshot: snapshot.id, name: snapshot.name.clone(), stays }.into()
            })
            .collect()
    }

    /// Commits the events that end an operation, and keeps what it came to. The program after it runs before that, when
    /// what was done is written and the outcome is not.
    pub(super) async fn end(
        &mut self,
        operation: &Operation,
        mut events: Vec<Event>,
    ) -> Result<Pass, EngineError> {
        let ended = events.iter().find_map(|event| match event {
            Event::OperationSucceeded(_) => Some((Outcome::Succeeded, None)),
            Event::OperationFailed(e) => Some((Outcome::Failed, Some(e.failure.clone()))),
            Event::OperationCancelled(e) => Some((Outcome::Cancelled, Some(e.failure.clone()))),
            Event::OperationExpired(e) => Some((Outcome::Expired, Some(e.failure.clone()))),
            _ => None,
        });
        if let Some((outcome, _)) = &ended {
            let end = HookEnd::Ended(*outcome);
            if operation.hook_after(end).is_some() {
                let done: Vec<Event> = events.extract_if(.., |event| is_done(event)).collect();
                if !done.is_empty() {
                    self.commit(operation, done).await?;
                }
                self.after(operation, end).await?;
            }
        }
        self.commit(operation, events).await?;
        self.engine.stop.forget(operation.id);
        if matches!((&operation.request, &ended), (Request::Unregister(_), Some((Outcome::Succeeded, _)))) {
            self.driver.forget(&self.state);
        }
        if let Some((outcome, failure)) = ended {
            let operation = operation.clone();
            let found = self.found.take();
            self.carried.push(Carried { operation, outcome: Some(outcome), failure, found });
        }
        Ok(Pass::Rests)
    }
}

/// Whether an event says of a step what became of it.
fn is_done(event: &Event) -> bool {
    matches!(event, Event::OperationStepFinished(_) | Event::OperationUndoFinished(_))
}

/// A merge that failed leaves its tombstones for later, with the reason.
pub(super) fn deferrals(operation: &Operation, failure: &Failure) -> Vec<Event> {
    let Request::Merge(request) = &operation.request else { return Vec::new() };
    let deferred =
        |snapshot: &SnapshotId| MergeDeferred { snapshot: *snapshot, reason: failure.message.clone() }.into();
    request.plan.snapshots.iter().map(deferred).collect()
}
