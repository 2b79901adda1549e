//! Looking for drift: observe, take over what somebody else did, write down what is left.

use std::collections::BTreeMap;

use crate::driver::Observation;
use crate::engine::{Engine, EngineError, Foreign, Requester};
use crate::event::{Actor, DriftCleared, DriftFound, Event};
use crate::ids::{DomainId, SnapshotId, SnapshotName, StreamId};
use crate::log::NewEvent;
use crate::project::DomainState;
use crate::reconcile::adopt;
use crate::reconcile::connection::ConnectionId;
use crate::reconcile::drift::{self, Drift};

impl Engine {
    /// Compares the hypervisor with the log, takes over what somebody else did there if the settings say so, writes
    /// down what is new and what is gone, and returns what there is.
    ///
    /// # Errors
    /// The hypervisor could not be asked, or the store failed.
    pub async fn drift(&self, requester: &Requester, domain: DomainId) -> Result<Drift, EngineError> {
        let state = self.load_for_work(requester, domain).await?;
        if !state.open.is_empty() {
            return Ok(Drift { findings: state.drift, adopted: Vec::new() });
        }
        let seen = self.observe(&state).await?;
        self.compared(requester, domain, state, seen).await
    }

    /// The same of many domains, those of one connection looked at together.
    ///
    /// # Errors
    /// As [`Engine::drift`]; the first failure of all ends it.
    pub async fn drift_all(
        &self,
        requester: &Requester,
        domains: &[DomainId],
    ) -> Result<Vec<(DomainId, Drift)>, EngineError> {
        let mut drifts = BTreeMap::new();
        let mut together: BTreeMap<ConnectionId, Vec<DomainState>> = BTreeMap::new();
        for domain in domains {
            let state = self.load_for_work(requester, *domain).await?;
            match &state.domain {
                Some(known) if state.open.is_empty() => {
                    let connection = self.driver(known.driver)?.connection(known);
                    together.entry(connection).or_default().push(state);
                }
                _ => {
                    drifts.insert(*domain, Drift { findings: state.drift, adopted: Vec::new() });
                }
            }
        }
        for states in together.into_values() {
            let Some(first) = states.first() else { continue };
            let asked: Vec<&DomainState> = states.iter().collect();
            let seen = self.driver_of(first)?.observe_all(&asked).await.map_err(EngineError::Driver)?;
            for (state, seen) in states.into_iter().zip(seen) {
                let Some(domain) = state.domain.as_ref().map(|domain| domain.id) else { continue };
                let seen = seen.map_err(EngineError::Driver)?;
                drifts.insert(domain, self.compared(requester, domain, state, seen).await?);
            }
        }
        Ok(domains.iter().filter_map(|domain| Some((*domain, drifts.remove(domain)?))).collect())
    }

    async fn compared(
        &self,
        requester: &Requester,
        domain: DomainId,
        mut state: DomainState,
        mut seen: Observation,
    ) -> Result<Drift, EngineError> {
        let taken_over = self.adoption(&state, &seen);
        let adopted = taken_over.iter().filter_map(|event| match event {
            Event::SnapshotAdopted(adopted) => Some(adopted.snapshot.name.clone()),
            _ => None,
        });
        let adopted: Vec<SnapshotName> = adopted.collect();
        if !taken_over.is_empty() {
            self.record(requester, &state, taken_over).await?;
            state = self.load(domain).await?;
            seen = self.observe(&state).await?;
        }
        let findings = drift::findings(&state, &seen);
        let new = findings.difference(&state.drift);
        let gone = state.drift.difference(&findings);
        // What is gone comes first: a lost snapshot that was renamed is found under its new name, and stays lost.
        let events: Vec<Event> = gone
            .map(|finding| DriftCleared { finding: finding.clone() }.into())
            .chain(new.map(|finding| DriftFound { finding: finding.clone() }.into()))
            .collect();
        if !events.is_empty() {
            self.record(requester, &state, events).await?;
        }
        Ok(Drift { findings, adopted })
    }

    /// What is to be taken over of what somebody else did at the hypervisor.
    pub(crate) fn adoption(&self, state: &DomainState, seen: &Observation) -> Vec<Event> {
        match self.settings.foreign {
            Foreign::Report => Vec::new(),
            Foreign::Adopt => {
                adopt::adoption(state, seen, self.clock.now(), &|| SnapshotId::from_uuid(self.ids.next()))
            }
        }
    }

    /// Appends what was seen of a domain, as the engine's own finding.
    async fn record(
        &self,
        requester: &Requester,
        state: &DomainState,
        events: Vec<Event>,
    ) -> Result<(), EngineError> {
        let Some(domain) = &state.domain else { return Ok(()) };
        let stream = StreamId::Domain(domain.id);
        let requester = Requester { actor: Actor::Engine, origin: requester.origin.clone() };
        let new = |event: Event| NewEvent::of_itself(stream.clone(), event);
        let events = events.into_iter().map(new).collect();
        self.append(&requester, vec![(stream.clone(), state.version)], events).await?;
        Ok(())
    }
}
