//! What the daemon does by the clock: policies, and looking for drift.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use jiff::{SignedDuration, Timestamp};
use snaptree_engine::DomainId;
use snaptree_engine::engine::EngineError;
use snaptree_engine::log::LogError;
use snaptree_policies::file::Policy;
use snaptree_policies::runner::{Notable, Scheduler, Tick};
use tokio::sync::Notify;

use super::{Daemon, notify, own_requester};

/// How long nobody looks at most: a clock that jumps wakes no sleeper.
const LOOK_EVERY: SignedDuration = SignedDuration::from_secs(30);

/// How long the rest after a look is at most, which else is as long as the look was.
const REST_MAX: Duration = Duration::from_secs(1);

/// Wakes whoever looks what is due.
#[derive(Clone, Default)]
pub struct Policies(Arc<Notify>);

impl Policies {
    /// Something changed: look what is due.
    pub fn look_now(&self) {
        self.0.notify_one();
    }
}

/// Runs policies until the log can be written no more.
///
/// # Errors
/// Another process has taken the state over.
pub async fn policies(daemon: Arc<Daemon>) -> Result<(), EngineError> {
    let origin = own_requester().origin;
    let mut scheduler = None;
    loop {
        let began = Instant::now();
        let looked = match &mut scheduler {
            Some(scheduler) => Scheduler::tick(scheduler).await,
            None => match Scheduler::new(daemon.engine.clone(), origin.clone()).await {
                Ok(new) => scheduler.insert(new).tick().await,
                Err(error) => Err(error),
            },
        };
        let tick = match looked {
            Ok(tick) => tick,
            Err(error @ EngineError::Log(LogError::Fenced { .. })) => return Err(error),
            Err(error) => {
                tracing::error!(error = &error as &dyn std::error::Error, "policies could not be looked at");
                // What was not written is due still.
                scheduler = None;
                Tick::default()
            }
        };
        for notable in &tick.notable {
            let policy = scheduler.as_ref().and_then(|scheduler| scheduler.policy(notable.policy()));
            tell(notable, policy, daemon.engine.now());
        }
        for domain in tick.woken {
            daemon.work_on(domain);
        }
        // Whoever is woken again and again, as by many runs that end at once, leaves half of the time to others.
        tokio::time::sleep(began.elapsed().min(REST_MAX)).await;
        let now = daemon.engine.now();
        let latest = now.checked_add(LOOK_EVERY).unwrap_or(Timestamp::MAX);
        let until = tick.next_at.map_or(latest, |next| next.min(latest));
        tokio::select! {
            () = daemon.engine.sleep_until(until) => {}
            () = daemon.policies.0.notified() => {}
        }
    }
}

/// Says what happened, and lets those know whom the policy names.
fn tell(notable: &Notable, policy: Option<&Policy>, now: Timestamp) {
    let name = notable.policy();
    match notable {
        Notable::Failed { .. }
        | Notable::DeleteFailed { .. }
        | Notable::NeedsAttention { .. }
        | Notable::ClockLeapt { .. }
        | Notable::Left { .. }
        | Notable::HookFailed { .. } => {
            tracing::warn!(policy = %name, "{notable}")
        }
        Notable::Recovered { .. } | Notable::ClockBelieved { .. } => {
            tracing::info!(policy = %name, "{notable}")
        }
        Notable::Suspended { .. } => tracing::error!(policy = %name, "{notable}"),
    }
    let wanted = policy.and_then(|policy| policy.notify.clone());
    if let Some(wanted) = wanted.filter(|wanted| wanted.on.contains(&notable.occasion())) {
        notify::tell(&wanted, notable, now);
    }
}

/// Compares one domain after the other with its hypervisor, each once in `every`. Merges that were put off are looked
/// at again on the way: nobody tells when a file system has room again.
pub async fn drift(daemon: Arc<Daemon>, every: Duration) {
    let mut last: Option<DomainId> = None;
    loop {
        let mut domains: Vec<DomainId> = match daemon.engine.domains().await {
            Ok(rows) => rows.into_iter().map(|row| row.id).collect(),
            Err(_) => Vec::new(),
        };
        domains.sort_unstable();
        let many = u32::try_from(domains.len()).unwrap_or(u32::MAX).max(1);
        tokio::time::sleep(every / many).await;
        let after = domains.iter().find(|id| last.is_none_or(|last| **id > last));
        let Some(domain) = after.or(domains.first()).copied() else { continue };
        last = Some(domain);
        if daemon.dispatcher.is_stopping() {
            return;
        }
        match daemon.engine.drift(&own_requester(), domain).await {
            Ok(found) if found.findings.is_empty() => {}
            Ok(found) => {
                let count = found.findings.len();
                tracing::warn!(%domain, count, "the hypervisor and the log disagree: `snaptree drift`");
            }
            // Somebody works on it just now; it is looked at again the next time around.
            Err(EngineError::Log(LogError::Conflict { .. })) => {}
            Err(error) => {
                tracing::warn!(%domain, error = &error as &dyn std::error::Error, "drift could not be looked for");
            }
        }
        if daemon.engine.load(domain).await.is_ok_and(|state| !state.tombstones.is_empty()) {
            daemon.dispatcher.wake(domain);
        }
    }
}

/// Tells the service manager that the daemon lives, as often as it wants to hear it; never returns.
pub async fn watchdog(daemon: Arc<Daemon>) {
    let Some(within) = sd_notify::watchdog_enabled().filter(|within| !within.is_zero()) else {
        return std::future::pending().await;
    };
    loop {
        tokio::time::sleep(within / 3).await;
        // A daemon that cannot read its log is not well.
        if daemon.engine.log().head().await.is_ok() {
            tell_manager(sd_notify::NotifyState::Watchdog);
        }
    }
}

/// Tells the service manager, if there is one.
pub fn tell_manager(state: sd_notify::NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::debug!(%error, "the service manager was not told");
    }
}
