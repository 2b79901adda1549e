//! What the log tells, read.

use jiff::Timestamp;
use tracing::instrument;

use super::{Engine, EngineError};
use crate::command::reject;
use crate::driver::Observation;
use crate::event::Envelope;
use crate::ids::{DomainId, DomainName, OperationId, StreamId};
use crate::log::{Checkpoint, DomainRow, EventFilter, SeqAt};
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
            let known = self.log.domains(seq_max).await?;
            return match known.iter().any(|row| row.id == id) {
                true => Ok(id),
                false => Err(unknown_domain(wanted, &known)),
            };
        }
        if seq_max == u64::MAX
            && let Ok(name) = DomainName::new(wanted)
            && let Some(row) = self.log.domain_by_name(&name).await?
        {
            return Ok(row.id);
        }
        let known = self.log.domains(seq_max).await?;
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
            None => {
                let checkpoint = self.log.checkpoint(&stream, PROJECTOR, seq_max).await?;
                checkpoint.and_then(|c| serde_json::from_str(&c.state).ok()).unwrap_or_default()
            }
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

    /// Keeps what a worker knows of its domain, so that it need not be read again.
    pub(crate) fn remember(&self, state: &DomainState) {
        if let (Some(domain), None) = (&state.domain, &state.illegal) {
            self.loaded.keep(domain.id, state);
        }
    }

    /// Keeps a checkpoint of `state`, whose last event is `last`.
    pub(crate) async fn keep_checkpoint(&self, state: &DomainState, last: &Envelope) {
        let Some(domain) = &state.domain else { return };
        let Ok(text) = serde_json::to_string(state) else { return };
        let checkpoint = Checkpoint {
            stream: StreamId::Domain(domain.id),
            version: state.version,
            seq: state.seq,
            hash: last.hash.to_string(),
            projector: PROJECTOR,
            state: text,
        };
        if let Err(error) = self.log.save_checkpoint(checkpoint).await {
            tracing::debug!(%error, "the checkpoint was not kept; nothing depends on it");
        }
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
