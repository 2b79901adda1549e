//! A log that was restored from an older copy: what is kept beside the layers is ahead of it, and is taken over
//! before anything else is written.
//!
//! The sign is a head that the layers' side knows and the log does not: an event of that number and hash. It is looked
//! for whenever a domain is about to be worked on, so that a copy put back under a running installation is noticed too.

use std::collections::BTreeSet;

use crate::driver::{ErrorClass, Head, Kept};
use crate::engine::{Engine, EngineError, Requester};
use crate::event::{Actor, Event, OperationNeedsAttention, OperationResolved, SystemRestored};
use crate::ids::{DomainId, OperationId, SnapshotName, StreamId};
use crate::log::{EventFilter, NewEvent, OF_THE_LOG};
use crate::operation::{Code, Failure, Phase, Verdict};
use crate::project::DomainState;
use crate::tree::Tree;

const WHY: &str =
    "the log was restored from an older copy, and what became of this is in what was taken over";

impl Engine {
    /// The domain as the log tells it, after what is kept beside its layers was taken over, if the log was behind.
    ///
    /// # Errors
    /// The store failed, or what is kept there cannot be read.
    pub(crate) async fn load_for_work(
        &self,
        requester: &Requester,
        domain: DomainId,
    ) -> Result<DomainState, EngineError> {
        let state = self.load(domain).await?;
        if !state.registered {
            return Ok(state);
        }
        let driver = self.driver_of(&state)?;
        let head = driver.kept_head(&state).await.map_err(EngineError::Driver)?;
        let Some(head) = head else { return Ok(state) };
        let taken_over = state.restored_from == Some((head.seq, head.hash.to_string()));
        if taken_over || self.has(head).await? {
            return Ok(state);
        }
        let kept = driver.kept(&state).await.map_err(|error| match error.class {
            ErrorClass::Permanent => EngineError::Rejected(error.failure.refused()),
            _ => EngineError::Driver(error),
        })?;
        let Some(kept) = kept else { return Ok(state) };
        tracing::warn!(%domain, seq = head.seq, "the log is older than what is kept beside the layers");
        let stream = StreamId::Domain(domain);
        let requester = Requester { actor: Actor::Engine, origin: requester.origin.clone() };
        self.append(&requester, vec![(stream.clone(), state.version)], events(&stream, &state, kept)).await?;
        self.load(domain).await
    }

    /// What is kept elsewhere and contradicts the log, in sentences: checkpoints that are not what the events come to, and
    /// layers whose manifest knows of an event that the log does not have.
    ///
    /// # Errors
    /// The store failed.
    pub async fn contradictions(&self) -> Result<Vec<String>, EngineError> {
        let mut found = Vec::new();
        for row in self.log.domains(OF_THE_LOG).await? {
            if !self.checkpoint_is_true(row.id).await? {
                found.push(format!("the checkpoint of domain '{}' is not what its events come to", row.name));
            }
            let Ok(state) = self.load(row.id).await else { continue };
            let Ok(driver) = self.driver_of(&state) else { continue };
            // A hypervisor that cannot be asked is no contradiction.
            let Ok(Some(head)) = driver.kept_head(&state).await else { continue };
            let taken_over = state.restored_from == Some((head.seq, head.hash.to_string()));
            if !taken_over && !self.has(head).await? {
                found.push(format!(
                    "the layers of domain '{}' know of event {}, which this log does not have: it is an older copy, or \
                     has lost its newest events; the next request takes over what is kept there",
                    row.name, head.seq
                ));
            }
        }
        Ok(found)
    }

    /// Whether that event is in the log.
    async fn has(&self, head: Head) -> Result<bool, EngineError> {
        let Some(before) = head.seq.checked_sub(1) else { return Ok(true) };
        let found = self.log.read(before, &EventFilter::default(), 1).await?;
        Ok(found.first().is_some_and(|event| event.seq == head.seq && event.hash == head.hash))
    }
}

/// What is open in the old log ends, and the rest is replaced.
fn events(stream: &StreamId, state: &DomainState, kept: Kept) -> Vec<NewEvent> {
    let new = |operation: Option<OperationId>, event: Event| NewEvent {
        stream: stream.clone(),
        event,
        operation,
        cause: None,
        key: None,
    };
    let mut events = Vec::new();
    for open in &state.open {
        if !matches!(open.phase, Phase::NeedsAttention { .. }) {
            let failure = Failure::new(Code::Drift, WHY);
            events.push(new(Some(open.id), OperationNeedsAttention { failure }.into()));
        }
        let resolved =
            OperationResolved { verdict: Verdict::Abandon, reason: WHY.to_owned(), changes: Vec::new() };
        events.push(new(Some(open.id), resolved.into()));
    }
    let restored = SystemRestored {
        seq: kept.head.seq,
        hash: kept.head.hash.to_string(),
        switched_by: kept.switched_by,
        adopted: missing_in(&kept.tree, &state.tree),
        gone: missing_in(&state.tree, &kept.tree),
        tree: kept.tree,
        tombstones: kept.tombstones,
        layers: kept.layers,
    };
    events.push(new(None, restored.into()));
    events
}

/// The names of the snapshots of `tree` that are not in `other`.
fn missing_in(tree: &Tree, other: &Tree) -> Vec<SnapshotName> {
    let names: BTreeSet<&SnapshotName> =
        tree.iter().filter(|snapshot| !other.contains(snapshot.id)).map(|snapshot| &snapshot.name).collect();
    names.into_iter().cloned().collect()
}
