//! Domains as this process saw them last, so that a load reads only what was appended since.
//!
//! The log is append-only, so a state that was true at its version is never wrong later, only old. How many are kept
//! follows from what they weigh; who was not asked for the longest goes first.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::ids::DomainId;
use crate::project::DomainState;

/// Most bytes that the states kept may weigh together, about.
const WEIGHT_BYTES_MAX: usize = 64 << 20;
/// What a state weighs whatever is in it, about, in bytes.
const STATE_BYTES: usize = 2_048;
/// What each snapshot, layer, tombstone, finding or open operation adds, about, in bytes.
const PART_BYTES: usize = 512;

/// What a state weighs in memory, about, in bytes.
fn weight(state: &DomainState) -> usize {
    let layers: usize = state.layers.disks.values().map(|disk| disk.layers.len()).sum();
    let steps: usize = state.open.iter().map(|operation| 1 + operation.steps.len()).sum();
    let parts = state.tree.len() + layers + state.tombstones.len() + state.drift.len() + steps;
    STATE_BYTES + PART_BYTES * (parts + state.forgotten.len())
}

/// A state that is kept.
#[derive(Debug)]
struct Kept {
    state: DomainState,
    weight: usize,
    /// Its place in `order`.
    used: u64,
}

#[derive(Debug, Default)]
struct States {
    kept: HashMap<DomainId, Kept>,
    /// Who was asked for when, the longest ago first.
    order: BTreeMap<u64, DomainId>,
    uses: u64,
    weight: usize,
}

impl States {
    fn used(&mut self, domain: DomainId) {
        let Some(kept) = self.kept.get_mut(&domain) else { return };
        self.uses += 1;
        self.order.remove(&kept.used);
        kept.used = self.uses;
        self.order.insert(self.uses, domain);
    }

    fn remove(&mut self, domain: DomainId) {
        if let Some(kept) = self.kept.remove(&domain) {
            self.order.remove(&kept.used);
            self.weight -= kept.weight;
        }
    }

    fn insert(&mut self, domain: DomainId, state: DomainState) {
        self.remove(domain);
        let weight = weight(&state);
        self.weight += weight;
        self.kept.insert(domain, Kept { state, weight, used: 0 });
        self.used(domain);
    }
}

/// The states kept.
#[derive(Debug, Default)]
pub(crate) struct Loaded(Mutex<States>);

impl Loaded {
    fn states(&self) -> MutexGuard<'_, States> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The domain as it was at some moment not after `seq_max`.
    pub(crate) fn get(&self, domain: DomainId, seq_max: u64) -> Option<DomainState> {
        let mut states = self.states();
        let state = states.kept.get(&domain).map(|kept| &kept.state).filter(|state| state.seq <= seq_max)?;
        let state = state.clone();
        states.used(domain);
        Some(state)
    }

    /// Keeps a sound state, unless a newer one is there.
    pub(crate) fn keep(&self, domain: DomainId, state: &DomainState) {
        let mut states = self.states();
        if states.kept.get(&domain).is_some_and(|kept| kept.state.version >= state.version) {
            return;
        }
        states.insert(domain, state.clone());
        while states.weight > WEIGHT_BYTES_MAX {
            let Some((_, longest)) = states.order.pop_first() else { break };
            states.remove(longest);
        }
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn domain(number: usize) -> DomainId {
        DomainId::from_uuid(Uuid::from_u128(u128::try_from(number).unwrap_or(0)))
    }

    fn at(version: u64) -> DomainState {
        DomainState { version, seq: version, ..DomainState::default() }
    }

    #[test]
    fn c_who_was_not_asked_for_the_longest_goes_and_nobody_else() {
        let loaded = Loaded::default();
        let most = WEIGHT_BYTES_MAX / STATE_BYTES;
        (0..most).for_each(|number| loaded.keep(domain(number), &at(1)));
        assert!(loaded.get(domain(0), 1).is_some(), "all of them are kept");
        loaded.keep(domain(most), &at(1));
        let left = |number| loaded.get(domain(number), u64::MAX).is_some();
        assert!(!left(1), "the one that was not asked for the longest");
        assert!(left(0) && (2..=most).all(left));
    }

    #[test]
    fn c_an_older_state_takes_no_newer_ones_place_and_a_newer_one_weighs_once() {
        let loaded = Loaded::default();
        for version in [3, 2, 9] {
            loaded.keep(domain(1), &at(version));
        }
        assert_eq!(loaded.get(domain(1), u64::MAX).map(|state| state.version), Some(9));
        assert_eq!(loaded.get(domain(1), 8), None, "it was later than that");
        let states = loaded.states();
        assert_eq!((states.weight, states.order.len()), (STATE_BYTES, 1));
    }
}
