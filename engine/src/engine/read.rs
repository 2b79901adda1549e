//! What the log tells, read.

use jiff::Timestamp;
use tracing::instrument;

use super::{Engine, EngineError, Requester};
use crate::command::reject;
use crate::driver::Observation;
use crate::event::{Actor, CheckpointKept, Envelope, Event};
use crate::ids::{DomainId, DomainName, OperationId, StreamId};
use crate::log::{Checkpoint, DomainRow, EventFilter, LogError, NewEvent, OF_THE_LOG, SeqAt};
use crate::near::nearest;
use crate::operation::Code;
use crate::project::{DomainState, PROJECTOR};

/// How many events are read from a stream at once.
const PAGE_EVENTS: usize = 4_096;

/// There is no domain of that name, and which one was perhaps meant.
fn unknown_domain(wanted: &str, known: &[DomainRow]) -> EngineError {
    let shown: String = wanted.chars().filter(|c| !c.is_control()).take(60).collect();
    let hint = match nearest(wanted, known.iter().map(|row| row.name.as_str())) {
        Some(near) => format!("did you mean '{near}'? `snaptree domain list` lists all of them"),
        None => "`snaptree domain list` lists them, `snaptree domain add` registers one".to_owned(),
    };
    reject(Code::NotFound, format!("there is no domain '{shown}'")).hint(hint).into()
}

impl Engine {
    /// The registered domains, in the order of their names.
    ///
    /// # Errors
    /// The store failed.
    pub async fn domains(&self) -> Result<Vec<DomainRow>, EngineError> {
        Ok(self.log.domains(u64::MAX).await?)
    }

    /// Finds a registered domain by name or id.
    ///
    /// # Errors
    /// `NotFound`, or the store failed.
    pub async fn find_domain(&self, wanted: &str) -> Result<DomainId, EngineError> {
        self.find_domain_at(wanted, u64::MAX).await
    }

    /// Finds a domain that was registered when the log ended at `seq_max`.
    ///
    /// # Errors
    /// `NotFound`, or the store failed.
    pub async fn find_domain_at(&self, wanted: &str, seq_max: u64) -> Result<DomainId, EngineError> {
        if let Ok(id) = wanted.parse::<DomainId>() {
            return match self.load_at(id, seq_max).await {
                Ok(state) if state.registered => Ok(id),
                Ok(_) => Err(unknown_domain(wanted, &self.log.domains(seq_max).await?)),
                // What contradicts itself is told by whoever works with it, and its log can be read.
                Err(EngineError::Illegal { .. }) => Ok(id),
                Err(error) => Err(error),
            };
        }
        if seq_max == u64::MAX
            && let Ok(name) = DomainName::new(wanted)
            && let Some(row) = self.log.domain_by_name(&name).await?
        {
            match self.load(row.id).await {
                Ok(state) if state.registered && state.domain.as_ref().is_some_and(|d| d.name == name) => {
                    return Ok(row.id);
                }
                Ok(_) => tracing::warn!(domain = %name, "the list of domains is not what the log says"),
                Err(EngineError::Illegal { .. } | EngineError::Log(LogError::Damaged(_))) => {}
                Err(error) => return Err(error),
            }
        }
        // What is not in a read model may have been taken out of it.
        let known = self.log.domains(seq_max.min(OF_THE_LOG)).await?;
        let found = known.iter().find(|row| row.name.as_str() == wanted);
        found.map(|row| row.id).ok_or_else(|| unknown_domain(wanted, &known))
    }

    /// The domain as the log tells it.
    ///
    /// # Errors
    /// The store failed, or the log contradicts itself.
    pub async fn load(&self, domain: DomainId) -> Result<DomainState, EngineError> {
        self.load_at(domain, u64::MAX).await
    }

    /// The domain as the log told it when it ended at `seq_max`.
    ///
    /// # Errors
    /// The store failed, or the log contradicts itself.
    #[instrument(skip(self))]
    pub async fn load_at(&self, domain: DomainId, seq_max: u64) -> Result<DomainState, EngineError> {
        let state = self.read_at(domain, seq_max).await?;
        match state.illegal.clone() {
            Some(source) => Err(EngineError::Illegal { domain, source }),
            None => Ok(state),
        }
    }

    /// The same, also where the log contradicts itself.
    async fn read_at(&self, domain: DomainId, seq_max: u64) -> Result<DomainState, EngineError> {
        let stream = StreamId::Domain(domain);
        let mut state = match self.loaded.get(domain, seq_max) {
            Some(state) => state,
            None => self.checkpointed(&stream, seq_max).await?.unwrap_or_default(),
        };
        let known = state.version;
        loop {
            let page = self.log.read_stream(&stream, state.version, seq_max, PAGE_EVENTS).await?;
            state.apply_all(&page);
            if page.len() < PAGE_EVENTS {
                break;
            }
        }
        if seq_max == u64::MAX && state.version != known && state.illegal.is_none() {
            self.loaded.keep(domain, &state);
        }
        Ok(state)
    }

    /// A domain as far as its log can be followed: where it contradicts itself, all that it says; where an event cannot be
    /// read, its registration. It is enough to know which machine and which files are its.
    ///
    /// # Errors
    /// The store failed, for this domain and all others.
    pub async fn load_as_far_as_known(&self, domain: DomainId) -> Result<DomainState, EngineError> {
        match self.read_at(domain, u64::MAX).await {
            Err(error) if error.spares_others() => {
                tracing::warn!(%domain, error = &error as &dyn std::error::Error, "only its registration is known");
                let mut state = DomainState::default();
                let first = self.log.read_stream(&StreamId::Domain(domain), 0, u64::MAX, 1).await;
                state.apply_all(&first.unwrap_or_default());
                Ok(state)
            }
            other => other,
        }
    }

    /// What the stored checkpoint of a stream says, if the log says that it is the one that was stored.
    async fn checkpointed(
        &self,
        stream: &StreamId,
        seq_max: u64,
    ) -> Result<Option<DomainState>, EngineError> {
        let Some(checkpoint) = self.log.checkpoint(stream, PROJECTOR, seq_max).await? else {
            return Ok(None);
        };
        let next = self.log.read_stream(stream, checkpoint.version, seq_max, 1).await?;
        let stored = CheckpointKept::of(PROJECTOR, &checkpoint.state);
        let witnessed =
            next.iter().any(|next| matches!(&next.event, Event::CheckpointKept(kept) if *kept == stored));
        if !witnessed {
            tracing::warn!(%stream, "a checkpoint is not the one that was stored, and is not used");
            return Ok(None);
        }
        Ok(serde_json::from_str(&checkpoint.state).ok())
    }

    /// Whether the stored checkpoint of a domain, if there is one, is what its events come to from the first on.
    pub(crate) async fn checkpoint_is_true(&self, domain: DomainId) -> Result<bool, EngineError> {
        let stream = StreamId::Domain(domain);
        let Some(checkpoint) = self.log.checkpoint(&stream, PROJECTOR, u64::MAX).await? else {
            return Ok(true);
        };
        let mut state = DomainState::default();
        while state.version < checkpoint.version {
            let page = self.log.read_stream(&stream, state.version, checkpoint.seq, PAGE_EVENTS).await?;
            if page.is_empty() {
                break;
            }
            state.apply_all(&page);
        }
        Ok(serde_json::from_str::<DomainState>(&checkpoint.state).is_ok_and(|stored| stored == state))
    }

    /// Keeps what a worker knows of its domain, so that it need not be read again.
    pub(crate) fn remember(&self, state: &DomainState) {
        if let (Some(domain), None) = (&state.domain, &state.illegal) {
            self.loaded.keep(domain.id, state);
        }
    }

    /// Keeps a checkpoint of `state`, whose last event is `last`, and returns the event that says so. Where somebody
    /// appended meanwhile there is none this time.
    pub(crate) async fn keep_checkpoint(
        &self,
        requester: &Requester,
        state: &DomainState,
        last: &Envelope,
    ) -> Option<Envelope> {
        let stream = StreamId::Domain(state.domain.as_ref()?.id);
        let text = serde_json::to_string(state).ok()?;
        let told = CheckpointKept::of(PROJECTOR, &text);
        let told = NewEvent::of_itself(stream.clone(), told.into());
        let requester = Requester { actor: Actor::Engine, origin: requester.origin.clone() };
        let told = match self.append(&requester, vec![(stream.clone(), state.version)], vec![told]).await {
            Ok(told) => told.into_iter().next(),
            Err(error) => {
                tracing::debug!(%error, "no checkpoint is kept; nothing depends on it");
                return None;
            }
        };
        let checkpoint = Checkpoint {
            stream,
            version: state.version,
            seq: state.seq,
            hash: last.hash.to_string(),
            projector: PROJECTOR,
            state: text,
        };
        if let Err(error) = self.log.save_checkpoint(checkpoint).await {
            tracing::debug!(%error, "the checkpoint was not kept; nothing depends on it");
        }
        told
    }

    /// The prefix of the log that a time stands for.
    ///
    /// # Errors
    /// The store failed.
    pub async fn seq_at(&self, at: Timestamp) -> Result<SeqAt, EngineError> {
        Ok(self.log.seq_at(at).await?)
    }

    /// The events of an operation.
    ///
    /// # Errors
    /// The store failed.
    pub async fn operation_events(&self, operation: OperationId) -> Result<Vec<Envelope>, EngineError> {
        let filter = EventFilter { operation: Some(operation), ..EventFilter::default() };
        Ok(self.log.read(0, &filter, usize::MAX >> 1).await?)
    }

    /// What the hypervisor says is there.
    ///
    /// # Errors
    /// The hypervisor could not be asked.
    pub async fn observe(&self, state: &DomainState) -> Result<Observation, EngineError> {
        self.driver_of(state)?.observe(state).await.map_err(EngineError::Driver)
    }
}
