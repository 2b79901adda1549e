//! What an engine is given besides a log and drivers: a clock, settings, and a way to be asked to stop.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use tokio::sync::watch;

use crate::event::{Actor, Uptime};
use crate::ids::OperationId;
use crate::reconcile::merge::{COPY_BYTES_MAX_DEFAULT, MergePolicy, PutOff};
use crate::reconcile::space::MARGIN_BYTES_DEFAULT;

/// Where time comes from. The system's in production, virtual in the simulation.
#[async_trait]
pub trait Clock: Send + Sync {
    /// Now.
    fn now(&self) -> Timestamp;
    /// For how long the machine has been up, which nobody can set; none if that is not known.
    fn uptime(&self) -> Option<Uptime> {
        None
    }
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

    /// From `/proc/uptime`, which goes on while the machine sleeps (proc_uptime(5): `CLOCK_BOOTTIME`).
    fn uptime(&self) -> Option<Uptime> {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        let uptime = std::fs::read_to_string("/proc/uptime").ok()?;
        let seconds: f64 = uptime.split_whitespace().next()?.parse().ok()?;
        let up = Duration::try_from_secs_f64(seconds).ok()?;
        Some(Uptime { boot: boot.trim().parse().ok()?, ms: u64::try_from(up.as_millis()).ok()? })
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
    /// How much of a file system stays free when something is created or merged there (`space.margin`).
    pub space_margin_bytes: u64,
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
    /// How many hypervisor calls may be under way at once (`concurrency.overall`).
    pub concurrency_max: usize,
    /// The same for one connection (`concurrency.per-connection`).
    pub concurrency_per_connection_max: usize,
}

impl Settings {
    /// What merges may cost by these settings.
    pub(crate) const fn merge_policy(&self) -> MergePolicy {
        MergePolicy {
            copy_bytes_max: self.merge_copy_bytes_max,
            put_off: PutOff::Leave,
            margin_bytes: self.space_margin_bytes,
        }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            merge_copy_bytes_max: COPY_BYTES_MAX_DEFAULT,
            space_margin_bytes: MARGIN_BYTES_DEFAULT,
            attempts_max: 5,
            retry_delay_ms_min: 200,
            retry_delay_ms_max: 30_000,
            first_step_s_max: Some(3_600),
            foreign: Foreign::Adopt,
            concurrency_max: 64,
            concurrency_per_connection_max: 16,
        }
    }
}

/// What the work in hand is asked to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Ending {
    /// Go on.
    #[default]
    None,
    /// End: what can be undone is undone, the rest is parked.
    TakeBack,
    /// End: everything is parked where it stands.
    Park,
}

#[derive(Debug, Default)]
struct Asked {
    ending: Ending,
    called_off: BTreeMap<OperationId, Actor>,
}

/// Asks the work in hand to end, or single operations to go back. Clones ask the same work.
#[derive(Clone, Debug)]
pub struct Stop(Arc<watch::Sender<Asked>>);

impl Default for Stop {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::default()))
    }
}

impl Stop {
    /// Asks it to end: what can be undone is undone, the rest is parked for `recover`.
    pub fn ask(&self) {
        self.0.send_modify(|asked| asked.ending = Ending::TakeBack);
    }

    /// Asks it to end where it stands: steps in hand are finished, no other begins, and nothing is taken back.
    pub fn park(&self) {
        self.0.send_modify(|asked| asked.ending = Ending::Park);
    }

    /// Whether it was asked to end.
    pub fn asked(&self) -> bool {
        self.0.borrow().ending != Ending::None
    }

    /// Whether it was asked to end where it stands.
    pub fn parks(&self) -> bool {
        self.0.borrow().ending == Ending::Park
    }

    /// Whether what can be undone is to be undone.
    pub(crate) fn takes_back(&self) -> bool {
        self.0.borrow().ending == Ending::TakeBack
    }

    /// Asks for one operation to go back, in the name of `by`.
    pub fn call_off(&self, operation: OperationId, by: Actor) {
        self.0.send_modify(|asked| {
            asked.called_off.insert(operation, by);
        });
    }

    /// Who called an operation off; none if nobody did.
    pub fn called_off(&self, operation: OperationId) -> Option<Actor> {
        self.0.borrow().called_off.get(&operation).cloned()
    }

    /// An operation that was called off is over.
    pub(crate) fn forget(&self, operation: OperationId) {
        self.0.send_if_modified(|asked| {
            asked.called_off.remove(&operation);
            false
        });
    }

    /// Returns when the work is asked to end, or `operation` was called off.
    pub(crate) async fn interrupts(&self, operation: Option<OperationId>) {
        let wanted = |asked: &Asked| {
            asked.ending != Ending::None || operation.is_some_and(|id| asked.called_off.contains_key(&id))
        };
        // Fails only without a sender, and this is one.
        let _ = self.0.subscribe().wait_for(wanted).await;
    }

    /// Returns when the work is asked to end where it stands.
    pub(crate) async fn parked(&self) {
        let _ = self.0.subscribe().wait_for(|asked| asked.ending == Ending::Park).await;
    }
}
