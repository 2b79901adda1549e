//! The clock of a year and its leaps, its ids, and the moment at which the process is killed.

use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use jiff::{SignedDuration, Timestamp};
use snaptree_drivers::sim::{Fault, FaultPoint, Faults};
use snaptree_engine::driver::Hooks;
use snaptree_engine::engine::Clock;
use snaptree_engine::event::Uptime;
use snaptree_engine::ids::IdSource;
use uuid::Uuid;

use crate::random::Random;

/// What a killed process leaves on the stack.
pub struct Killed;

/// The clock, the ids, and the end of the process. Clones are the same one.
#[derive(Clone)]
pub struct Sky(Arc<Mutex<Inner>>);

struct Inner {
    /// The time in truth.
    now: Timestamp,
    /// How far the clock is from it.
    off: SignedDuration,
    /// How far the clocks of hosts are from ours.
    hosts_off: SignedDuration,
    begin: Timestamp,
    boot: u128,
    random: Random,
    ids: u64,
    /// How many more places it may pass.
    places_left: Option<u64>,
}

impl Sky {
    /// A clock that stands at `begin`.
    pub fn new(begin: Timestamp, seed: u64) -> Self {
        let random = Random::new(seed ^ 0x0059_6561_7200_0000);
        let off = SignedDuration::ZERO;
        let (hosts_off, boot) = (off, 1);
        let inner = Inner { now: begin, off, hosts_off, begin, boot, random, ids: 0, places_left: None };
        Self(Arc::new(Mutex::new(inner)))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the clock shows.
    pub fn time(&self) -> Timestamp {
        let inner = self.inner();
        inner.now + inner.off
    }

    /// What time it is in truth.
    pub fn truth(&self) -> Timestamp {
        self.inner().now
    }

    /// When it is in truth what the clock shows then.
    pub fn truth_at(&self, shown: Timestamp) -> Timestamp {
        shown - self.inner().off
    }

    /// Lets time pass until then, in truth; it never goes back.
    pub fn go_to(&self, truth: Timestamp) {
        let mut inner = self.inner();
        inner.now = inner.now.max(truth);
    }

    /// The clock leaps: it is that far from the truth from here on, and the clocks of hosts that far from it.
    pub fn leap(&self, off: SignedDuration, hosts_off: SignedDuration) {
        let mut inner = self.inner();
        (inner.off, inner.hosts_off) = (off, hosts_off);
    }

    /// The machine is booted anew.
    pub fn boot(&self) {
        self.inner().boot += 1;
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

    fn uptime(&self) -> Option<Uptime> {
        let inner = self.inner();
        let ms = u64::try_from(inner.now.duration_since(inner.begin).as_millis()).expect("it goes forward");
        Some(Uptime { boot: Uuid::from_u128(inner.boot), ms })
    }

    async fn sleep_until(&self, until: Timestamp) {
        self.go_to(self.truth_at(until));
    }
}

impl Faults for Sky {
    fn fault(&self, _point: &FaultPoint) -> Option<Fault> {
        None
    }

    fn clock_off(&self) -> SignedDuration {
        self.inner().hosts_off
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
