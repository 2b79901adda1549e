//! Looking for drift: observe, take over what somebody else did, write down what is left.

use std::collections::{BTreeMap, BTreeSet};

use crate::driver::{DriverError, Observation};
use crate::engine::{Engine, EngineError, Foreign, Requester};
use crate::event::{Actor, DriftCleared, DriftFound, Event};
use crate::ids::{DomainId, SnapshotId, SnapshotName, StreamId};
use crate::log::NewEvent;
use crate::project::DomainState;
use crate::reconcile::adopt;
use crate::reconcile::connection::ConnectionId;
use crate::reconcile::drift::{self, Drift, Finding};

impl Engine {
    /// Compares the hypervisor with the log, takes over what somebody else did there if the settings say so, writes
    /// down what is new and what is gone, and returns what there is.
    ///
    /// # Errors
    /// The hypervisor could not be asked, or the store failed.
    pub async fn drift(&self, requester: &Requester, domain: DomainId) -> Result<Drift, EngineError> {
        let state = self.load_for_work(requester, domain).await?;
        if !state.open.is_empty() {
            return Ok(Drift { findings: state.drift, adopted: Vec::new(), disks: Vec::new() });
        }
        let seen = self.driver_of(&state)?.observe(&state).await;
        self.looked_at(requester, domain, state, seen).await
    }

    /// A machine that is not there is a difference, too; what was known of its snapshots is left as it is.
    async fn looked_at(
        &self,
        requester: &Requester,
        domain: DomainId,
        state: DomainState,
        seen: Result<Observation, DriverError>,
    ) -> Result<Drift, EngineError> {
        match seen {
            Ok(seen) => self.compared(requester, domain, state, seen).await,
            Err(error) => {
                let gone = drift::gone(&error).ok_or(EngineError::Driver(error))?;
                let mut findings = state.drift.clone();
                findings.retain(|known| !matches!(known, Finding::MachineGone { .. }));
                findings.insert(gone);
                self.note(requester, &state, &findings).await?;
                Ok(Drift { findings, adopted: Vec::new(), disks: Vec::new() })
            }
        }
    }

    /// Writes down what is new, and what is gone.
    async fn note(
        &self,
        requester: &Requester,
        state: &DomainState,
        findings: &BTreeSet<Finding>,
    ) -> Result<(), EngineError> {
        let new = findings.difference(&state.drift);
        let gone = state.drift.difference(findings);
        // What is gone comes first: a lost snapshot that was renamed is found under its new name, and stays lost.
        let events: Vec<Event> = gone
            .map(|finding| DriftCleared { finding: finding.clone() }.into())
            .chain(new.map(|finding| DriftFound { finding: finding.clone() }.into()))
            .collect();
        if events.is_empty() { Ok(()) } else { self.record(requester, state, events).await }
    }

    /// The same of many domains, in the order given, those of one connection looked at together. One that cannot be
    /// looked at keeps none of the others back.
    ///
    /// # Errors
    /// The store failed.
    pub async fn drift_all(
        &self,
        requester: &Requester,
        domains: &[DomainId],
    ) -> Result<Vec<(DomainId, Result<Drift, EngineError>)>, EngineError> {
        let mut drifts = BTreeMap::new();
        let mut together: BTreeMap<ConnectionId, Vec<(DomainId, DomainState)>> = BTreeMap::new();
        for domain in domains {
            match of_one(self.to_be_compared(requester, *domain).await)? {
                Ok((Some(connection), state)) => {
                    together.entry(connection).or_default().push((*domain, state))
                }
                Ok((None, state)) => {
                    drifts.insert(
                        *domain,
                        Ok(Drift { findings: state.drift, adopted: Vec::new(), disks: Vec::new() }),
                    );
                }
                Err(error) => {
                    drifts.insert(*domain, Err(error));
                }
            }
        }
        for states in together.into_values() {
            for ((domain, state), seen) in self.observe_together(states).await? {
                let looked_at = of_one(self.looked_at(requester, domain, state, seen).await)?;
                drifts.insert(domain, looked_at);
            }
        }
        Ok(domains.iter().filter_map(|domain| Some((*domain, drifts.remove(domain)?))).collect())
    }

    /// The domain, and the connection over which it is to be compared; none while something is open for it.
    async fn to_be_compared(
        &self,
        requester: &Requester,
        domain: DomainId,
    ) -> Result<(Option<ConnectionId>, DomainState), EngineError> {
        let state = self.load_for_work(requester, domain).await?;
        let connection = match &state.domain {
            Some(known) if state.open.is_empty() => Some(self.driver(known.driver)?.connection(known)),
            _ => None,
        };
        Ok((connection, state))
    }

    /// What the hypervisor says of domains of one connection. Where it cannot be asked at all, that is each one's answer.
    async fn observe_together(
        &self,
        states: Vec<(DomainId, DomainState)>,
    ) -> Result<Vec<((DomainId, DomainState), Result<Observation, DriverError>)>, EngineError> {
        let Some((_, first)) = states.first() else { return Ok(Vec::new()) };
        let driver = self.driver_of(first)?;
        let asked: Vec<&DomainState> = states.iter().map(|(_, state)| state).collect();
        let seen = match driver.observe_all(&asked).await {
            Ok(seen) => seen,
            Err(error) => {
                let again =
                    || DriverError { class: error.class, failure: error.failure.clone(), source: None };
                states.iter().map(|_| Err(again())).collect()
            }
        };
        Ok(states.into_iter().zip(seen).collect())
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
        let changed = taken_over.iter().find_map(|event| match event {
            Event::DomainChanged(changed) => changed.disks.as_deref(),
            _ => None,
        });
        let before = state.domain.as_ref().map_or(&[][..], |domain| domain.disks.as_slice());
        let disks = changed.map(|now| adopt::disk_changes(before, now)).unwrap_or_default();
        if !taken_over.is_empty() {
            self.record(requester, &state, taken_over).await?;
            state = self.load(domain).await?;
            seen = self.observe(&state).await?;
        }
        let findings = drift::findings(&state, &seen);
        self.note(requester, &state, &findings).await?;
        Ok(Drift { findings, adopted, disks })
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

/// Sets apart what concerns one domain alone from what ends the look at all of them.
fn of_one<T>(looked: Result<T, EngineError>) -> Result<Result<T, EngineError>, EngineError> {
    match looked {
        Err(error) if !error.spares_others() => Err(error),
        other => Ok(other),
    }
}
