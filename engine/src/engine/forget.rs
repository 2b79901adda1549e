//! Letting go of a domain whose machine may not be there any more: nobody is asked, and nothing is touched.

use super::{CONFLICTS_MAX, Engine, EngineError, Requester, Submitted};
use crate::command::reject;
use crate::event::{DomainUnregistered, Event, OperationNeedsAttention, OperationResolved, UnregisterWish};
use crate::ids::{DomainId, OperationId, StreamId};
use crate::log::{LogError, NewEvent};
use crate::operation::{Code, Failure, Phase, Verdict};
use crate::project::DomainState;

const WHY: &str = "the domain was removed with --metadata, and nobody looks after what this had begun";

impl Engine {
    /// Forgets a domain. What is open for it is abandoned where it stands, with the same append.
    pub(super) async fn forget(
        &self,
        requester: &Requester,
        domain: DomainId,
    ) -> Result<Submitted, EngineError> {
        let stream = StreamId::Domain(domain);
        let mut conflicts = 0;
        loop {
            let state = self.load_as_far_as_known(domain).await?;
            if !state.registered {
                return Err(reject(Code::NotFound, "the domain is not registered").into());
            }
            let events = forgotten(&stream, &state);
            match self.append(requester, vec![(stream.clone(), state.version)], events).await {
                Ok(_) => return Ok(Submitted::Recorded),
                Err(LogError::Conflict { .. }) if conflicts < CONFLICTS_MAX => conflicts += 1,
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn forgotten(stream: &StreamId, state: &DomainState) -> Vec<NewEvent> {
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
            let failure = Failure::new(Code::Cancelled, WHY);
            events.push(new(Some(open.id), OperationNeedsAttention { failure }.into()));
        }
        let resolved =
            OperationResolved { verdict: Verdict::Abandon, reason: WHY.to_owned(), changes: Vec::new() };
        events.push(new(Some(open.id), resolved.into()));
    }
    let left = state.layers.files().cloned().collect();
    events.push(new(None, DomainUnregistered { wish: UnregisterWish::Forget, left }.into()));
    events
}
