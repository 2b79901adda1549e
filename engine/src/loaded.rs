//! Domains as this process saw them last, so that a load reads only what was appended since.
//!
//! The log is append-only, so a state that was true at its version is never wrong later, only old.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::ids::DomainId;
use crate::project::DomainState;

/// Most domains that are kept; with more, whoever comes starts anew.
const DOMAINS_MAX: usize = 256;

/// The states kept.
#[derive(Debug, Default)]
pub(crate) struct Loaded(Mutex<BTreeMap<DomainId, DomainState>>);

impl Loaded {
    fn states(&self) -> MutexGuard<'_, BTreeMap<DomainId, DomainState>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The domain as it was at some moment not after `seq_max`.
    pub(crate) fn get(&self, domain: DomainId, seq_max: u64) -> Option<DomainState> {
        self.states().get(&domain).filter(|state| state.seq <= seq_max).cloned()
    }

    /// Keeps a sound state, unless a newer one is there.
    pub(crate) fn keep(&self, domain: DomainId, state: &DomainState) {
        let mut states = self.states();
        if states.get(&domain).is_some_and(|kept| kept.version >= state.version) {
            return;
        }
        if states.len() >= DOMAINS_MAX && !states.contains_key(&domain) {
            states.clear();
        }
        states.insert(domain, state.clone());
    }
}
