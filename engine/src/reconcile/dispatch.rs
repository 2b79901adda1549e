//! The dispatcher: one worker per domain at most, woken as often as anyone likes.
//!
//! ```text
//!   wake --> Running --+-- asked again meanwhile ------------> Running, once more
//!              ^       +-- the hypervisor cannot be asked ---> Waiting(until) --+
//!              |       +-- else -----------------------------> at rest          |
//!              +----------------------- woken, or `until` has passed -----------+
//! ```
//!
//! It is level-triggered: a pass looks at what the log says is open, never at what it was woken for, so a wake-up that
//! comes twice, late, or not at all (a crash) costs nothing but time.
//!
//! What happens is published per domain to whoever follows it, in a channel with an end: who is slow is told how much
//! was missed, and nobody waits for it. [`account_since`] tells from the log what was missed.
//!
//! Architecture Invariant: no two workers of one program are at work on one domain.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::{SignedDuration, Timestamp};
use tokio::sync::{Notify, broadcast, oneshot, watch};

use crate::command::{Command, reject};
use crate::driver::{Progress, StepProgress, Watch};
use crate::engine::{Engine, EngineError, Requester, Submitted};
use crate::event::{Actor, Envelope, Event, UnregisterWish};
use crate::ids::{DomainId, OperationId, StreamId};
use crate::log::{LogError, OpenOnly, OperationFilter};
use crate::operation::{Code, Failure, Outcome, Phase, Verdict};
use crate::project::DomainState;
use crate::reconcile::connection::WhenSuspended;
use crate::reconcile::worker::{Carried, Driven};

/// How many notices a follower may lag behind.
const NOTICES_MAX: usize = 256;
/// Requests on one domain are decided one after the other; so many locks serve all domains.
const GATES: usize = 64;
/// How many events are read from a stream at once.
const PAGE_EVENTS: usize = 1_024;

/// What is to be done with a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wish {
    /// Carry out what is open.
    Drive,
    /// And look at every tombstone anew, also at those that were put off.
    Reconcile,
}

/// What is told to those who follow a domain.
#[derive(Clone, Debug)]
pub enum Notice {
    /// An event was appended.
    Happened(Arc<Envelope>),
    /// The step in hand has come so far.
    Progress(StepProgress),
    /// The worker is at rest, or waits before it tries again.
    Rested(Arc<Pass>),
}

/// What a worker's pass over a domain came to.
#[derive(Debug)]
pub struct Pass {
    /// What it carried through, or why it could not go on.
    pub came_to: Result<Driven, EngineError>,
}

/// How a domain stands, and how to hear more.
#[derive(Debug)]
pub enum Following {
    /// Nobody is at work on it.
    AtRest,
    /// The last pass failed, and there will be another.
    Waiting(Arc<Pass>),
    /// Somebody is at work on it.
    Running(broadcast::Receiver<Notice>),
}

/// How many domains are being worked on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Queue {
    /// A worker is at work.
    pub running: usize,
    /// A worker waits before it tries again, since the last try failed.
    pub waiting: usize,
}

enum Standing {
    Running,
    Waiting(Arc<Pass>),
}

/// A domain that is not at rest.
struct Slot {
    standing: Standing,
    again: Option<Wish>,
    /// Who wants to know what the next pass comes to.
    waiters: Vec<oneshot::Sender<Arc<Pass>>>,
    notices: Option<broadcast::Sender<Notice>>,
    woken: Arc<Notify>,
}

struct Inner {
    engine: Engine,
    requester: Requester,
    slots: Mutex<HashMap<DomainId, Slot>>,
    /// Domains on which nobody may begin to work. Taken after `slots`.
    apart: Mutex<HashSet<DomainId>>,
    gates: [tokio::sync::Mutex<()>; GATES],
    stopping: AtomicBool,
    at_work: watch::Sender<usize>,
    fenced: watch::Sender<bool>,
}

/// Keeps workers at work. Clones are the same dispatcher.
#[derive(Clone)]
pub struct Dispatcher(Arc<Inner>);

impl Dispatcher {
    /// A dispatcher that drives what is open in the engine's log. `requester` is the program itself: what workers
    /// find out is recorded as coming from it.
    pub fn new(engine: &Engine, requester: Requester) -> Self {
        Self(Arc::new(Inner {
            engine: engine.clone().with_suspended(WhenSuspended::Wait),
            requester,
            slots: Mutex::default(),
            apart: Mutex::default(),
            gates: std::array::from_fn(|_| tokio::sync::Mutex::default()),
            stopping: AtomicBool::new(false),
            at_work: watch::Sender::default(),
            fenced: watch::Sender::default(),
        }))
    }

    /// Wakes every domain that has open operations, then every one with data of deleted snapshots to fold away.
    ///
    /// # Errors
    /// The store failed. A domain whose log cannot be followed is left out, and told about.
    pub async fn start(&self) -> Result<(), EngineError> {
        let open = OperationFilter { open: Some(OpenOnly), ..OperationFilter::default() };
        for row in self.0.engine.log().operations(&open, usize::MAX >> 1).await? {
            self.wake(row.domain);
        }
        for row in self.0.engine.domains().await? {
            match self.0.engine.load(row.id).await {
                Ok(state) if !state.tombstones.is_empty() => self.wake(row.id),
                Ok(_) => {}
                Err(error) if !error.spares_others() => return Err(error),
                Err(error) => {
                    tracing::error!(domain = %row.name, error = &error as &dyn std::error::Error, "left alone");
                }
            }
        }
        Ok(())
    }

    /// Lets somebody look at what is open for a domain. A domain that is at work is looked at once more.
    pub fn wake(&self, domain: DomainId) {
        self.ask(domain, Wish::Drive, None);
    }

    /// Lets somebody look at a domain, at once; what is returned waits for what that comes to. None if the program is
    /// ending.
    pub fn run(&self, domain: DomainId, wish: Wish) -> impl Future<Output = Option<Arc<Pass>>> + use<> {
        let (sender, receiver) = oneshot::channel();
        self.ask(domain, wish, Some(sender));
        async { receiver.await.ok() }
    }

    /// Decides a command and writes what follows from it; an operation is then carried out.
    ///
    /// # Errors
    /// As [`Engine::submit`].
    pub async fn submit(
        &self,
        requester: &Requester,
        domain: DomainId,
        command: &Command,
        key: Option<&str>,
    ) -> Result<Submitted, EngineError> {
        let submitted = {
            let _gate = self.0.gate(domain).lock().await;
            let _apart = match command {
                Command::Unregister(UnregisterWish::Forget) => Some(self.set_apart(domain)?),
                _ => None,
            };
            self.0.engine.submit(requester, domain, command, key).await?
        };
        if submitted != Submitted::Recorded {
            self.wake(domain);
        }
        Ok(submitted)
    }

    /// Keeps workers off a domain until what is returned is dropped.
    ///
    /// What a worker writes is expected by nobody, so it must not be at work while its operations are abandoned.
    fn set_apart(&self, domain: DomainId) -> Result<Apart, EngineError> {
        let mut slots = self.0.slots();
        if matches!(slots.get(&domain), Some(Slot { standing: Standing::Running, .. })) {
            return Err(reject(Code::InUse, "an operation of this domain is being carried out just now")
                .hint("wait for it, or call it off with `snaptree op cancel`")
                .into());
        }
        self.0.apart.lock().unwrap_or_else(PoisonError::into_inner).insert(domain);
        // Whoever waits for another try looks again, and finds that there is none.
        slots.get_mut(&domain).inspect(|slot| slot.woken.notify_one());
        Ok(Apart { inner: Arc::clone(&self.0), domain })
    }

    /// Asks for an open operation to go back. It does between two steps, or is carried through where it is too late.
    ///
    /// # Errors
    /// There is no such open operation, it needs attention, or the store failed.
    pub async fn call_off(
        &self,
        by: Actor,
        domain: DomainId,
        operation: OperationId,
    ) -> Result<(), EngineError> {
        self.0.engine.may_cancel(&self.0.engine.load(domain).await?, operation)?;
        self.0.engine.stop.call_off(operation, by);
        self.wake(domain);
        Ok(())
    }

    /// How a domain stands; and if somebody is at work on it, what is told from now on.
    pub fn follow(&self, domain: DomainId) -> Following {
        match self.0.slots().get_mut(&domain) {
            None => Following::AtRest,
            Some(Slot { standing: Standing::Waiting(pass), .. }) => Following::Waiting(Arc::clone(pass)),
            Some(slot) => {
                let sender = slot.notices.get_or_insert_with(|| broadcast::channel(NOTICES_MAX).0);
                Following::Running(sender.subscribe())
            }
        }
    }

    /// How many domains are being worked on.
    pub fn queue(&self) -> Queue {
        let slots = self.0.slots();
        let waiting = slots.values().filter(|slot| matches!(slot.standing, Standing::Waiting(_))).count();
        Queue { running: slots.len() - waiting, waiting }
    }

    /// Ends: no step begins any more, those in hand are finished. Returns when all workers are at rest.
    pub async fn stop(&self) {
        self.0.stopping.store(true, Ordering::SeqCst);
        self.0.engine.stop.park();
        // Fails only without a sender, and this is one.
        let _ = self.0.at_work.subscribe().wait_for(|count| *count == 0).await;
    }

    /// Whether it is ending.
    pub fn is_stopping(&self) -> bool {
        self.0.stopping.load(Ordering::SeqCst)
    }

    /// Returns when another process has taken the state over: nothing can be written any more.
    pub async fn fenced(&self) {
        let _ = self.0.fenced.subscribe().wait_for(|fenced| *fenced).await;
    }

    fn ask(&self, domain: DomainId, wish: Wish, waiter: Option<oneshot::Sender<Arc<Pass>>>) {
        let mut slots = self.0.slots();
        if self.is_stopping() {
            return;
        }
        let slot = match slots.entry(domain) {
            Entry::Occupied(slot) => slot.into_mut(),
            Entry::Vacant(vacant) => {
                self.0.at_work.send_modify(|count| *count += 1);
                tokio::spawn(work(Arc::clone(&self.0), domain));
                vacant.insert(Slot {
                    standing: Standing::Running,
                    again: None,
                    waiters: Vec::new(),
                    notices: None,
                    woken: Arc::default(),
                })
            }
        };
        slot.again = slot.again.max(Some(wish));
        slot.waiters.extend(waiter);
        slot.woken.notify_one();
    }
}

/// What comes after a pass.
enum Next {
    Again,
    Wait(Timestamp, Arc<Notify>),
    Rest,
}

/// Counts a worker out, however it ends.
struct AtWork {
    inner: Arc<Inner>,
    domain: DomainId,
}

impl Drop for AtWork {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!(domain = %self.domain, "a worker panicked");
            self.inner.slots().remove(&self.domain);
        }
        self.inner.at_work.send_modify(|count| *count -= 1);
    }
}

/// A domain on which nobody works; what was asked for meanwhile is looked at when it ends.
struct Apart {
    inner: Arc<Inner>,
    domain: DomainId,
}

impl Drop for Apart {
    fn drop(&mut self) {
        self.inner.apart.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.domain);
        Dispatcher(Arc::clone(&self.inner)).wake(self.domain);
    }
}

/// A domain's worker, until there is nothing left to do.
async fn work(inner: Arc<Inner>, domain: DomainId) {
    let _at_work = AtWork { inner: Arc::clone(&inner), domain };
    let mut failures = 0;
    while let Some((wish, waiters)) = inner.begin(domain) {
        let watch = Published { inner: &inner, domain };
        let came_to = match wish {
            Wish::Drive => inner.engine.drive(&inner.requester, domain, &watch).await,
            Wish::Reconcile => inner.engine.reconcile(&inner.requester, domain, &watch).await,
        };
        failures = if came_to.is_ok() { 0 } else { failures + 1 };
        match inner.passed(domain, Pass { came_to }, waiters, failures) {
            Next::Again => {}
            Next::Rest => return,
            Next::Wait(until, woken) => tokio::select! {
                () = inner.engine.clock.sleep_until(until) => {}
                () = woken.notified() => {}
                () = inner.engine.stop.parked() => {}
            },
        }
    }
}

impl Inner {
    fn slots(&self) -> MutexGuard<'_, HashMap<DomainId, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_apart(&self, domain: DomainId) -> bool {
        self.apart.lock().unwrap_or_else(PoisonError::into_inner).contains(&domain)
    }

    fn gate(&self, domain: DomainId) -> &tokio::sync::Mutex<()> {
        let place = usize::from(domain.as_uuid().as_bytes()[15]) % GATES;
        &self.gates[place]
    }

    /// Takes what was asked for; none if nothing is to begin any more.
    #[allow(clippy::type_complexity, reason = "used once")]
    fn begin(&self, domain: DomainId) -> Option<(Wish, Vec<oneshot::Sender<Arc<Pass>>>)> {
        let mut slots = self.slots();
        if self.stopping.load(Ordering::SeqCst) || self.is_apart(domain) {
            slots.remove(&domain);
            return None;
        }
        let slot = slots.get_mut(&domain)?;
        slot.standing = Standing::Running;
        Some((slot.again.take().unwrap_or(Wish::Drive), std::mem::take(&mut slot.waiters)))
    }

    /// Tells what a pass came to, and decides what comes next.
    fn passed(
        &self,
        domain: DomainId,
        pass: Pass,
        waiters: Vec<oneshot::Sender<Arc<Pass>>>,
        failures: u32,
    ) -> Next {
        let pass = Arc::new(pass);
        for waiter in waiters {
            // Who does not wait any more needs no answer.
            let _ = waiter.send(Arc::clone(&pass));
        }
        let again_later = match &pass.came_to {
            Ok(_) => false,
            Err(error) => {
                tracing::warn!(%domain, error = error as &dyn std::error::Error, "could not go on");
                self.fenced.send_if_modified(|fenced| {
                    *fenced |= is_fenced(error);
                    *fenced
                });
                may_pass(error)
            }
        };
        let mut slots = self.slots();
        let Some(slot) = slots.get_mut(&domain) else { return Next::Rest };
        if slot.again.is_some() && pass.came_to.is_ok() {
            return Next::Again;
        }
        if let Some(notices) = &slot.notices {
            let _ = notices.send(Notice::Rested(Arc::clone(&pass)));
        }
        if again_later || slot.again.is_some() {
            slot.standing = Standing::Waiting(pass);
            return Next::Wait(self.retry_at(failures), Arc::clone(&slot.woken));
        }
        slots.remove(&domain);
        Next::Rest
    }

    /// Exponential backoff with full jitter and a cap.
    fn retry_at(&self, failures: u32) -> Timestamp {
        let settings = &self.engine.settings;
        let ceiling = settings
            .retry_delay_ms_min
            .saturating_mul(1 << failures.min(20))
            .min(settings.retry_delay_ms_max);
        let random = self.engine.ids.next().as_u128() % (u128::from(ceiling) + 1);
        let now = self.engine.clock.now();
        let delay = SignedDuration::from_millis(i64::try_from(random).unwrap_or(i64::MAX));
        now.checked_add(delay).unwrap_or(now)
    }

    fn publish(&self, domain: DomainId, notice: impl FnOnce() -> Notice) {
        if let Some(Slot { notices: Some(notices), .. }) = self.slots().get(&domain) {
            // Fails if nobody follows any more.
            let _ = notices.send(notice());
        }
    }
}

fn is_fenced(error: &EngineError) -> bool {
    matches!(error, EngineError::Log(LogError::Fenced { .. }))
}

/// Whether what failed may work the next time.
fn may_pass(error: &EngineError) -> bool {
    match error {
        EngineError::Driver(_) => true,
        EngineError::Log(error) => !matches!(error, LogError::Fenced { .. } | LogError::Damaged(_)),
        EngineError::Rejected(_) | EngineError::Illegal { .. } | EngineError::Json(_) => false,
    }
}

/// Tells whoever follows the domain.
struct Published<'a> {
    inner: &'a Inner,
    domain: DomainId,
}

impl Progress for Published<'_> {
    fn step_progress(&self, progress: StepProgress) {
        self.inner.publish(self.domain, || Notice::Progress(progress));
    }
}

impl Watch for Published<'_> {
    fn happened(&self, envelope: &Envelope) {
        tracing::debug!(seq = envelope.seq, kind = envelope.event.kind(), "appended");
        self.inner.publish(self.domain, || Notice::Happened(Arc::new(envelope.clone())));
    }
}

/// How an event ends its operation, or lays it to rest; none if it does neither.
pub fn ending(event: &Event) -> Option<(Option<Outcome>, Option<Failure>)> {
    let (outcome, failure) = match event {
        Event::OperationSucceeded(_) => (Some(Outcome::Succeeded), None),
        Event::OperationFailed(e) => (Some(Outcome::Failed), Some(e.failure.clone())),
        Event::OperationCancelled(e) => (Some(Outcome::Cancelled), Some(e.failure.clone())),
        Event::OperationExpired(e) => (Some(Outcome::Expired), Some(e.failure.clone())),
        Event::OperationNeedsAttention(e) => (None, Some(e.failure.clone())),
        Event::OperationResolved(e) if e.verdict == Verdict::Abandon => {
            (Some(Outcome::Failed), e.abandoned())
        }
        _ => return None,
    };
    Some((outcome, failure))
}

/// What became of the operations of a domain that were requested after version `after` of its stream, up to event
/// `seq_max`, as the log tells it. What was there before is not read again.
///
/// # Errors
/// The store failed, or the log contradicts itself.
pub async fn account_since(
    engine: &Engine,
    domain: DomainId,
    after: u64,
    seq_max: u64,
) -> Result<Driven, EngineError> {
    // Operations are told by their events since; what the domain is by then is known, or little is missing of it.
    let mut told = DomainState { version: after, ..DomainState::default() };
    let stream = StreamId::Domain(domain);
    let mut carried: Vec<Carried> = Vec::new();
    loop {
        let page = engine.log().read_stream(&stream, told.version, seq_max, PAGE_EVENTS).await?;
        for envelope in &page {
            if let Some(id) = envelope.operation {
                let ending = ending(&envelope.event);
                if ending.is_some() || matches!(envelope.event, Event::OperationRetried(_)) {
                    carried.retain(|known| known.operation.id != id);
                }
                if let Some(((outcome, failure), operation)) = ending.zip(told.operation(id).cloned()) {
                    carried.push(Carried { operation, outcome, failure, found: None });
                }
            }
            told.apply(envelope);
        }
        if page.len() < PAGE_EVENTS {
            break;
        }
    }
    let state = engine.load_at(domain, seq_max).await?;
    Ok(Driven { carried, state })
}

impl Engine {
    /// Whether an operation can be called off.
    ///
    /// # Errors
    /// It is not open, or needs attention.
    pub(crate) fn may_cancel(&self, state: &DomainState, operation: OperationId) -> Result<(), EngineError> {
        let Some(found) = state.operation(operation) else {
            return Err(reject(Code::NotFound, format!("operation {operation} is not open")).into());
        };
        if matches!(found.phase, Phase::NeedsAttention { .. }) {
            let message = format!("operation {operation} can go neither on nor back");
            return Err(reject(Code::NeedsAttention, message)
                .hint("`snaptree op retry` or `snaptree op resolve`")
                .into());
        }
        Ok(())
    }
}
