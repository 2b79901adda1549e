//! The clock of a year, its ids, and the moment at which the process is killed.

use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use jiff::Timestamp;
use snaptree_engine::driver::Hooks;
use snaptree_engine::engine::Clock;
use snaptree_engine::ids::IdSource;
use uuid::Uuid;

use crate::random::Random;

/// What a killed process leaves on the stack.
pub struct Killed;

/// The clock, the ids, and the end of the process. Clones are the same one.
#[derive(Clone)]
pub struct Sky(Arc<Mutex<Inner>>);

struct Inner {
    now: Timestamp,
    random: Random,
    ids: u64,
    /// How many more places it may pass.
    places_left: Option<u64>,
}

impl Sky {
    /// A clock that stands at `begin`.
    pub fn new(begin: Timestamp, seed: u64) -> Self {
        let random = Random::new(seed ^ 0x0059_6561_7200_0000);
        Self(Arc::new(Mutex::new(Inner { now: begin, random, ids: 0, places_left: None })))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the clock shows.
    pub fn time(&self) -> Timestamp {
        self.inner().now
    }

    /// Sets the clock; never back.
    pub fn go_to(&self, time: Timestamp) {
        let mut inner = self.inner();
        inner.now = inner.now.max(time);
    }

    /// The process is killed at the `places`-th place that it reaches from here on.
    pub fn doom(&self, places: u64) {
        self.inner().places_left = Some(places);
    }

    /// It is not to be killed after all. Says whether it was.
    pub fn spare(&self) -> bool {
        self.inner().places_left.take().is_some()
    }

    /// Whether it will be killed.
    pub fn is_doomed(&self) -> bool {
        self.inner().places_left.is_some()
    }
}

#[async_trait]
impl Clock for Sky {
    fn now(&self) -> Timestamp {
        self.time()
    }

    async fn sleep_until(&self, until: Timestamp) {
        self.go_to(until);
    }
}

impl IdSource for Sky {
    fn next(&self) -> Uuid {
        let mut inner = self.inner();
        inner.ids += 1;
        let ids = inner.ids;
        inner.random.id(ids)
    }
}

impl Hooks for Sky {
    fn reached(&self, _name: &str) {
        let mut inner = self.inner();
        let Some(left) = &mut inner.places_left else { return };
        *left -= 1;
        if *left == 0 {
            inner.places_left = None;
            drop(inner);
            resume_unwind(Box::new(Killed));
        }
    }
}
