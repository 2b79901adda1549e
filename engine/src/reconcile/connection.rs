//! Connections: what several domains share on their way to a hypervisor; how many may use one at once, and when it
//! is left alone.
//!
//! ```text
//!          a failure, and fewer than FAILURES_MAX in a row
//!              +-----+
//!              v     |
//!   +-----> Closed --+
//!   |          | as many failures in a row
//!   |          v
//!   |   Open(until, pause) <-----------------+
//!   |          | `until` has passed: one     | it fails: twice the pause, at most PAUSE_MS_MAX
//!   |          v call is let through         |
//!   |      HalfOpen(pause) ------------------+
//!   |          |
//!   +----------+ the hypervisor answers
//! ```
//!
//! The one call that is let through is a look at the machine, whatever was to be asked of it: others wait for what it
//! comes to, and a step may take hours.
//!
//! Only failures of the classes `Transient` and `Unknown` count: a hypervisor that says that it is busy, or that it
//! will not, has answered. An answer closes the breaker in every state, also one that was asked for before it opened.
//!
//! A call has a slot of its connection, and one of all, only while the driver is asked: a worker that sleeps between
//! two tries holds neither. While the breaker is open no driver is asked. What the caller gets then is for the
//! program to say, see [`WhenSuspended`]: the daemon's workers wait, a command in the foreground is told.
//!
//! Architecture Invariant: [`Breaker`] is pure; time comes in as an argument.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, Semaphore, SemaphorePermit};

use crate::domain::{Access, Domain};
use crate::driver::{
    Driver, DriverError, ErrorClass, Head, Kept, Observation, Plan, PowerWish, Probe, Registration,
    Resolution, StepContext, StepReport, Touched,
};
use crate::ids::OperationId;
use crate::operation::{Code, Failure, Request, Step};
use crate::project::DomainState;
use crate::settings::{Clock, Settings, Stop};

/// So many failures in a row open the breaker. More than one operation's tries, so that one broken machine alone does
/// not keep the others waiting.
pub const FAILURES_MAX: u32 = 10;
/// The first time for which a connection is left alone.
const PAUSE_MS_MIN: u64 = 5_000;
/// The longest.
const PAUSE_MS_MAX: u64 = 300_000;

/// What several domains share on their way to a hypervisor: a driver on this host, or a remote host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ConnectionId(String);

impl ConnectionId {
    /// The connection of that name.
    pub fn new(name: impl Into<String>) -> Self {
        Self(name.into())
    }
}

impl fmt::Display for ConnectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a call gets while its connection is suspended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenSuspended {
    /// A failure that says until when, and why.
    #[default]
    Fail,
    /// Its turn, later.
    Wait,
}

/// A circuit breaker. See the drawing in the module's documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Breaker {
    /// Calls are let through.
    Closed {
        /// How many failed in a row.
        failures: u32,
    },
    /// No call is let through.
    Open {
        /// How many failed in a row.
        failures: u32,
        /// Not before this.
        until: Timestamp,
        /// How long it was opened for, in milliseconds.
        pause_ms: u64,
    },
    /// One call was let through, to see whether the hypervisor answers.
    HalfOpen {
        /// How many failed in a row.
        failures: u32,
        /// How long it was open, in milliseconds.
        pause_ms: u64,
    },
}

/// Whether a call is let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// It is.
    Go,
    /// It is, and what it comes to decides for the others.
    Probe,
    /// Not before this.
    NotBefore(Timestamp),
    /// Not before the probe that is under way has ended.
    AfterProbe,
}

/// What a call came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// The hypervisor answered, if only to refuse.
    Answer,
    /// It did not.
    Failure,
    /// Nobody waited for the answer.
    Nothing,
}

impl Breaker {
    /// Asks to be let through at `now`.
    #[must_use]
    pub fn admit(self, now: Timestamp) -> (Self, Admission) {
        match self {
            Self::Closed { .. } => (self, Admission::Go),
            Self::HalfOpen { .. } => (self, Admission::AfterProbe),
            // A clock that was set back would keep it open for long.
            Self::Open { failures, until, pause_ms } if until <= now || until > after(now, pause_ms) => {
                (Self::HalfOpen { failures, pause_ms }, Admission::Probe)
            }
            Self::Open { until, .. } => (self, Admission::NotBefore(until)),
        }
    }

    /// A call that was let through as `admission` came to `heard` at `now`.
    #[must_use]
    pub fn heard(self, admission: Admission, heard: Heard, now: Timestamp) -> Self {
        let probe = admission == Admission::Probe;
        match (self, heard) {
            (_, Heard::Answer) => Self::Closed { failures: 0 },
            (Self::Closed { failures }, Heard::Failure) if failures + 1 < FAILURES_MAX => {
                Self::Closed { failures: failures + 1 }
            }
            (Self::Closed { failures }, Heard::Failure) => {
                let until = after(now, PAUSE_MS_MIN);
                Self::Open { failures: failures + 1, until, pause_ms: PAUSE_MS_MIN }
            }
            (Self::HalfOpen { failures, pause_ms }, Heard::Failure) if probe => {
                let pause_ms = (pause_ms * 2).min(PAUSE_MS_MAX);
                Self::Open { failures: failures.saturating_add(1), until: after(now, pause_ms), pause_ms }
            }
            (Self::HalfOpen { failures, pause_ms }, Heard::Nothing) if probe => {
                Self::Open { failures, until: now, pause_ms }
            }
            (unchanged, Heard::Failure | Heard::Nothing) => unchanged,
        }
    }
}

fn after(now: Timestamp, pause_ms: u64) -> Timestamp {
    let pause = SignedDuration::from_millis(i64::try_from(pause_ms).unwrap_or(i64::MAX));
    now.checked_add(pause).unwrap_or(now)
}

/// How a connection stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionState {
    /// Which one.
    pub connection: ConnectionId,
    /// `closed`, `open` or `half-open`, as circuit breakers have it: `open` lets nothing through.
    pub breaker: String,
    /// How many calls failed in a row.
    pub failures: u32,
    /// Until when it is left alone; none if it is not.
    pub suspended_until: Option<Timestamp>,
    /// The last failure, while any is counted.
    pub last_error: Option<String>,
    /// How many calls are under way.
    pub under_way: usize,
}

impl fmt::Display for ConnectionState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { connection, failures, .. } = self;
        write!(f, "the connection {connection} is ")?;
        match (self.breaker.as_str(), self.suspended_until) {
            (_, Some(until)) => write!(f, "suspended until {until:.0} ")?,
            ("closed", None) => f.write_str("in use ")?,
            (_, None) => f.write_str("being tried ")?,
        }
        write!(f, "after {failures} failures in a row")?;
        self.last_error.iter().try_for_each(|error| write!(f, ": {error}"))
    }
}

/// One connection.
struct Line {
    id: ConnectionId,
    slots: Semaphore,
    slots_max: usize,
    health: Mutex<Health>,
    /// Told when the breaker lets calls through again, or may.
    moved: Notify,
}

struct Health {
    breaker: Breaker,
    last_error: String,
}

impl Line {
    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn admit(&self, now: Timestamp) -> Admission {
        let mut health = self.health();
        let (breaker, admission) = health.breaker.admit(now);
        health.breaker = breaker;
        admission
    }

    fn heard(&self, admission: Admission, heard: Heard, error: Option<&DriverError>, now: Timestamp) {
        let mut health = self.health();
        let before = health.breaker;
        health.breaker = before.heard(admission, heard, now);
        if let (Heard::Failure, Some(error)) = (heard, error) {
            health.last_error = error.to_string();
        }
        match (before, health.breaker) {
            (Breaker::Closed { .. } | Breaker::HalfOpen { .. }, Breaker::Open { failures, until, .. })
                if heard == Heard::Failure =>
            {
                let error = &health.last_error;
                tracing::warn!(connection = %self.id, failures, %until, error, "the connection is suspended");
            }
            (Breaker::Open { .. } | Breaker::HalfOpen { .. }, Breaker::Closed { .. }) => {
                tracing::warn!(connection = %self.id, "the connection works again");
            }
            _ => {}
        }
        let moved = before != health.breaker;
        drop(health);
        if moved {
            self.moved.notify_waiters();
        }
    }

    fn suspended(&self) -> DriverError {
        DriverError::new(ErrorClass::Transient, Code::Io, self.state().to_string())
            .hint("see to the hypervisor; it is tried again by itself")
    }

    fn state(&self) -> ConnectionState {
        let health = self.health();
        let (breaker, failures, suspended_until) = match health.breaker {
            Breaker::Closed { failures } => ("closed", failures, None),
            Breaker::Open { failures, until, .. } => ("open", failures, Some(until)),
            Breaker::HalfOpen { failures, .. } => ("half-open", failures, None),
        };
        ConnectionState {
            connection: self.id.clone(),
            breaker: breaker.to_owned(),
            failures,
            suspended_until,
            last_error: (failures > 0).then(|| health.last_error.clone()),
            under_way: self.slots_max.saturating_sub(self.slots.available_permits()),
        }
    }
}

/// All connections of a program. Clones of an engine share them.
pub struct Connections {
    overall: Semaphore,
    per_connection_max: usize,
    lines: Mutex<BTreeMap<ConnectionId, Arc<Line>>>,
}

impl Connections {
    /// With the bounds that the settings say.
    pub fn new(settings: &Settings) -> Self {
        Self {
            overall: Semaphore::new(settings.concurrency_max.clamp(1, Semaphore::MAX_PERMITS)),
            per_connection_max: settings.concurrency_per_connection_max.clamp(1, Semaphore::MAX_PERMITS),
            lines: Mutex::default(),
        }
    }

    fn line(&self, id: ConnectionId) -> Arc<Line> {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || {
            Arc::new(Line {
                id: id.clone(),
                slots: Semaphore::new(self.per_connection_max),
                slots_max: self.per_connection_max,
                health: Mutex::new(Health {
                    breaker: Breaker::Closed { failures: 0 },
                    last_error: String::new(),
                }),
                moved: Notify::new(),
            })
        };
        Arc::clone(lines.entry(id.clone()).or_insert_with(new))
    }

    /// How one stands.
    pub fn state(&self, id: ConnectionId) -> ConnectionState {
        self.line(id).state()
    }

    /// How those that were used stand.
    pub fn states(&self) -> Vec<ConnectionState> {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.values().map(|line| line.state()).collect()
    }
}

/// The right to ask a driver; given back when it is dropped.
struct Turn<'a> {
    line: &'a Line,
    clock: &'a dyn Clock,
    admission: Admission,
    open: bool,
    _slots: (SemaphorePermit<'a>, SemaphorePermit<'a>),
}

impl Turn<'_> {
    fn end<T>(mut self, done: &Result<T, DriverError>) {
        self.open = false;
        let heard = match done.as_ref().map_err(|error| error.class) {
            Err(ErrorClass::Transient | ErrorClass::Unknown) => Heard::Failure,
            Ok(_) | Err(ErrorClass::Busy | ErrorClass::Permanent) => Heard::Answer,
        };
        self.line.heard(self.admission, heard, done.as_ref().err(), self.clock.now());
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if self.open {
            self.line.heard(self.admission, Heard::Nothing, None, self.clock.now());
        }
    }
}

/// A driver that is asked within the bounds of its connections.
pub(crate) struct Bounded {
    pub(crate) driver: Arc<dyn Driver>,
    pub(crate) connections: Arc<Connections>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) stop: Stop,
    pub(crate) when_suspended: WhenSuspended,
}

/// The failure of a call that was never made, since the work is to end or the operation was called off.
fn not_asked() -> DriverError {
    DriverError::new(
        ErrorClass::Transient,
        Code::Cancelled,
        "the hypervisor was not asked any more, since this is to end",
    )
}

/// Whether a call failed because it was never made.
pub(crate) fn was_not_asked(error: &DriverError) -> bool {
    error.class == ErrorClass::Transient && error.failure.code == Code::Cancelled
}

/// How long a call may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Length {
    /// It only looks.
    Short,
    /// As long as the work takes, which may be hours.
    Long,
}

impl Bounded {
    async fn ask<T>(
        &self,
        state: &DomainState,
        operation: Option<OperationId>,
        length: Length,
        call: impl Future<Output = Result<T, DriverError>>,
    ) -> Result<T, DriverError> {
        let Some(domain) = &state.domain else { return call.await };
        let line = self.connections.line(self.driver.connection(domain));
        loop {
            let turn = tokio::select! {
                biased;
                turn = self.turn(&line) => turn?,
                () = self.stop.interrupts(operation) => return Err(not_asked()),
            };
            if turn.admission == Admission::Probe && length == Length::Long {
                let seen = self.driver.observe(state).await;
                turn.end(&seen);
                continue;
            }
            let done = call.await;
            turn.end(&done);
            return done;
        }
    }

    /// Waits for slots and for the breaker. No slot is held while the connection is suspended.
    async fn turn<'a>(&'a self, line: &'a Line) -> Result<Turn<'a>, DriverError> {
        loop {
            let moved = line.moved.notified();
            tokio::pin!(moved);
            moved.as_mut().enable();
            // First its own, so that those who wait for one connection keep nobody from the others.
            let own = line.slots.acquire().await.map_err(|_| not_asked())?;
            let overall = self.connections.overall.acquire().await.map_err(|_| not_asked())?;
            let admission = line.admit(self.clock.now());
            match admission {
                Admission::Go | Admission::Probe => {
                    let clock = &*self.clock;
                    return Ok(Turn { line, clock, admission, open: true, _slots: (own, overall) });
                }
                Admission::NotBefore(_) | Admission::AfterProbe
                    if self.when_suspended == WhenSuspended::Fail =>
                {
                    return Err(line.suspended());
                }
                Admission::NotBefore(until) => {
                    drop((own, overall));
                    tokio::select! {
                        biased;
                        () = self.clock.sleep_until(until) => {}
                        () = moved => {}
                    }
                }
                Admission::AfterProbe => {
                    drop((own, overall));
                    moved.await;
                }
            }
        }
    }
}

#[async_trait]
impl Driver for Bounded {
    fn connection(&self, domain: &Domain) -> ConnectionId {
        self.driver.connection(domain)
    }

    async fn probe(&self, registration: &Registration) -> Result<Probe, DriverError> {
        self.driver.probe(registration).await
    }

    async fn observe(&self, state: &DomainState) -> Result<Observation, DriverError> {
        self.ask(state, None, Length::Short, self.driver.observe(state)).await
    }

    async fn observe_all(
        &self,
        states: &[&DomainState],
    ) -> Result<Vec<Result<Observation, DriverError>>, DriverError> {
        match states.first() {
            Some(first) => self.ask(first, None, Length::Short, self.driver.observe_all(states)).await,
            None => Ok(Vec::new()),
        }
    }

    fn plan(
        &self,
        operation: OperationId,
        request: &Request,
        state: &DomainState,
        observation: &Observation,
    ) -> Result<Plan, Failure> {
        self.driver.plan(operation, request, state, observation)
    }

    async fn execute(&self, context: &StepContext<'_>, step: &Step) -> Result<StepReport, DriverError> {
        let call = self.driver.execute(context, step);
        self.ask(context.state, Some(context.operation), Length::Long, call).await
    }

    fn resolve(&self, context: &StepContext<'_>, step: &Step, observation: &Observation) -> Resolution {
        self.driver.resolve(context, step, observation)
    }

    fn forget(&self, state: &DomainState) {
        self.driver.forget(state);
    }

    fn touches(&self, step: &Step) -> Option<Touched> {
        self.driver.touches(step)
    }

    async fn kept_head(&self, state: &DomainState) -> Result<Option<Head>, DriverError> {
        self.driver.kept_head(state).await
    }

    async fn kept(&self, state: &DomainState) -> Result<Option<Kept>, DriverError> {
        self.driver.kept(state).await
    }

    async fn undo(&self, context: &StepContext<'_>, step: &Step) -> Result<StepReport, DriverError> {
        self.ask(context.state, None, Length::Long, self.driver.undo(context, step)).await
    }

    async fn access(&self, state: &DomainState, wish: &serde_json::Value) -> Result<Access, DriverError> {
        self.ask(state, None, Length::Long, self.driver.access(state, wish)).await
    }

    async fn power(&self, state: &DomainState, wish: PowerWish) -> Result<(), DriverError> {
        self.ask(state, None, Length::Long, self.driver.power(state, wish)).await
    }

    async fn settle(&self, state: &DomainState, operation: OperationId) -> Result<(), DriverError> {
        self.ask(state, None, Length::Long, self.driver.settle(state, operation)).await
    }
}

#[cfg(test)]
mod tests;
