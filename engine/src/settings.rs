//! What an engine is given besides a log and drivers: a clock, settings, and a way to be asked to stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;

use crate::reconcile::merge::COPY_BYTES_MAX_DEFAULT;

/// Where time comes from. The system's in production, virtual in the simulation.
#[async_trait]
pub trait Clock: Send + Sync {
    /// Now.
    fn now(&self) -> Timestamp;
    /// Returns at `until`, or at once if that has passed.
    async fn sleep_until(&self, until: Timestamp);
}

/// The system's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

#[async_trait]
impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        Timestamp::now()
    }

    async fn sleep_until(&self, until: Timestamp) {
        let wait = until.duration_since(Timestamp::now());
        if let Ok(wait) = Duration::try_from(wait) {
            tokio::time::sleep(wait).await;
        }
    }
}

/// What becomes of snapshots that somebody else made at the hypervisor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Foreign {
    /// They are taken into the tree, and a revert made there moves the current pointer.
    #[default]
    Adopt,
    /// They are only told of.
    Report,
}

/// What can be set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Most bytes that a merge with several dependants may copy (`merge.copy-max`).
    pub merge_copy_bytes_max: u64,
    /// How often a step that failed for a passing reason is tried in all.
    pub attempts_max: u32,
    /// The first pause before another try; it doubles each time.
    pub retry_delay_ms_min: u64,
    /// The longest pause before another try.
    pub retry_delay_ms_max: u64,
    /// How long after it was asked for a create or a revert may begin; none for ever.
    pub first_step_s_max: Option<u64>,
    /// What becomes of what somebody else did at the hypervisor (`drift.foreign`).
    pub foreign: Foreign,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            merge_copy_bytes_max: COPY_BYTES_MAX_DEFAULT,
            attempts_max: 5,
            retry_delay_ms_min: 200,
            retry_delay_ms_max: 30_000,
            first_step_s_max: Some(3_600),
            foreign: Foreign::Adopt,
        }
    }
}

/// Asks the work in hand to end: what can be undone is undone, the rest is parked for `recover`.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Asks for it.
    pub fn ask(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Whether it was asked for.
    pub fn asked(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}
