//! Requesting merges: the worker's own work, when nothing else is open.

use crate::driver::Observation;
use crate::engine::EngineError;
use crate::event::{Actor, MergeDeferred, MergeStarted};
use crate::ids::OperationId;
use crate::log::NewEvent;
use crate::reconcile::merge::{self, MergeAction, MergePlan, Verdict};

use super::Worker;

impl Worker<'_> {
    /// Looks at the tombstones and requests the first merge that is possible. Says whether there is one.
    pub(super) async fn begin_merge(
        &mut self,
        tried: &mut Vec<Vec<MergeAction>>,
    ) -> Result<bool, EngineError> {
        let blocked = !self.state.open.is_empty() || !self.state.registered;
        if blocked || !merge::is_called_for(&self.state) {
            return Ok(false);
        }
        let seen = self.driver.observe(&self.state).await.map_err(EngineError::Driver)?;
        let verdicts = self.verdicts(&seen);
        self.note_deferrals(&verdicts).await?;
        let plan = verdicts.into_iter().find_map(|verdict| match verdict {
            Verdict::Merge(plan) if !tried.contains(&plan.actions) => Some(plan),
            _ => None,
        });
        let Some(plan) = plan else { return Ok(false) };
        tried.push(plan.actions.clone());
        self.request_merge(plan).await?;
        Ok(true)
    }

    pub(super) fn verdicts(&self, seen: &Observation) -> Vec<Verdict> {
        merge::verdicts(&self.state, seen, self.policy)
    }

    pub(super) async fn request_merge(&mut self, plan: MergePlan) -> Result<(), EngineError> {
        let cause = plan.snapshots.iter().find_map(|id| self.state.tombstones.get(id)).map(|stone| stone.seq);
        let event = NewEvent {
            stream: self.stream.clone(),
            event: MergeStarted { plan }.into(),
            operation: Some(OperationId::from_uuid(self.engine.ids.next())),
            cause,
            key: None,
        };
        Ok(self.append(Actor::Engine, vec![event]).await?)
    }

    /// Writes down why a tombstone stays, once per reason.
    pub(super) async fn note_deferrals(&mut self, verdicts: &[Verdict]) -> Result<(), EngineError> {
        let mut events = Vec::new();
        for verdict in verdicts {
            let Verdict::Defer { snapshot, reason } = verdict else { continue };
            let stone = self.state.tombstones.get(snapshot);
            if let Some(stone) = stone.filter(|stone| stone.deferred.as_ref() != Some(reason)) {
                let event = MergeDeferred { snapshot: *snapshot, reason: reason.clone() };
                let cause = Some(stone.seq);
                let stream = self.stream.clone();
                events.push(NewEvent { stream, event: event.into(), operation: None, cause, key: None });
            }
        }
        if events.is_empty() {
            return Ok(());
        }
        Ok(self.append(Actor::Engine, events).await?)
    }
}
