use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};

use super::*;
use crate::domain::{Capabilities, Domain, DriverKind, RunState};
use crate::ids::{DomainId, DomainName};

fn at(ms: i64) -> Timestamp {
    Timestamp::from_millisecond(ms).unwrap()
}

const CLOSED: Breaker = Breaker::Closed { failures: 0 };

fn open(until_ms: i64, pause_ms: u64) -> Breaker {
    Breaker::Open { failures: 10, until: at(until_ms), pause_ms }
}

const fn half_open(pause_ms: u64) -> Breaker {
    Breaker::HalfOpen { failures: 10, pause_ms }
}

#[test]
fn who_is_let_through() {
    let not_before = |ms| Admission::NotBefore(at(ms));
    for (breaker, now, after, admission) in [
        (CLOSED, 0, CLOSED, Admission::Go),
        (Breaker::Closed { failures: 9 }, 0, Breaker::Closed { failures: 9 }, Admission::Go),
        (open(5_000, 5_000), 4_999, open(5_000, 5_000), not_before(5_000)),
        (open(5_000, 5_000), 5_000, half_open(5_000), Admission::Probe),
        // The clock was set back by an hour.
        (open(5_000, 5_000), -3_600_000, half_open(5_000), Admission::Probe),
        (half_open(5_000), 9_000, half_open(5_000), Admission::AfterProbe),
    ] {
        assert_eq!(breaker.admit(at(now)), (after, admission), "{breaker:?} at {now}");
    }
}

#[test]
fn what_follows_from_what_is_heard() {
    use Admission::{Go, Probe};
    use Heard::{Answer, Failure, Nothing};
    let opened_longer = |pause_ms: u64| Breaker::Open {
        failures: 11,
        until: at(7_000 + i64::try_from(pause_ms).unwrap()),
        pause_ms,
    };
    for (breaker, admission, heard, after) in [
        (CLOSED, Go, Failure, Breaker::Closed { failures: 1 }),
        (Breaker::Closed { failures: 8 }, Go, Failure, Breaker::Closed { failures: 9 }),
        (Breaker::Closed { failures: 9 }, Go, Failure, open(12_000, 5_000)),
        (Breaker::Closed { failures: 9 }, Go, Answer, CLOSED),
        (Breaker::Closed { failures: 9 }, Go, Nothing, Breaker::Closed { failures: 9 }),
        // Calls from before it opened: only an answer tells something new.
        (open(9_000, 5_000), Go, Failure, open(9_000, 5_000)),
        (open(9_000, 5_000), Go, Answer, CLOSED),
        (half_open(5_000), Go, Failure, half_open(5_000)),
        (half_open(5_000), Go, Nothing, half_open(5_000)),
        (half_open(5_000), Probe, Answer, CLOSED),
        (half_open(5_000), Probe, Failure, opened_longer(10_000)),
        (half_open(200_000), Probe, Failure, opened_longer(300_000)),
        (half_open(300_000), Probe, Failure, opened_longer(300_000)),
        // Whoever tried gave up: the next one tries at once.
        (half_open(5_000), Probe, Nothing, open(7_000, 5_000)),
    ] {
        assert_eq!(breaker.heard(admission, heard, at(7_000)), after, "{breaker:?} {admission:?} {heard:?}");
    }
}

/// A clock that jumps to where it is slept to.
#[derive(Default)]
struct Jumping(AtomicI64);

#[async_trait]
impl Clock for Jumping {
    fn now(&self) -> Timestamp {
        at(self.0.load(Ordering::SeqCst))
    }

    async fn sleep_until(&self, until: Timestamp) {
        self.0.fetch_max(until.as_millisecond(), Ordering::SeqCst);
    }
}

/// A hypervisor that fails so many times, and counts how many ask it at once.
struct Flaky {
    failures: AtomicUsize,
    asked: AtomicUsize,
    at_once: AtomicUsize,
    at_once_max: AtomicUsize,
    settled: AtomicUsize,
}

impl Flaky {
    fn new(failures: usize) -> Arc<Self> {
        Arc::new(Self {
            failures: AtomicUsize::new(failures),
            asked: AtomicUsize::new(0),
            at_once: AtomicUsize::new(0),
            at_once_max: AtomicUsize::new(0),
            settled: AtomicUsize::new(0),
        })
    }
}

#[async_trait]
impl Driver for Flaky {
    async fn probe(&self, _: &Registration) -> Result<Probe, DriverError> {
        Err(not_asked())
    }

    async fn observe(&self, _: &DomainState) -> Result<Observation, DriverError> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let now = self.at_once.fetch_add(1, Ordering::SeqCst) + 1;
        self.at_once_max.fetch_max(now, Ordering::SeqCst);
        tokio::task::yield_now().await;
        self.at_once.fetch_sub(1, Ordering::SeqCst);
        let left = self.failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        if left.is_ok() {
            return Err(DriverError::unknown(Code::Timeout, "no answer"));
        }
        Ok(Observation {
            at: at(0),
            run_state: RunState::Off,
            in_use: Vec::new(),
            files: BTreeMap::new(),
            unreadable: BTreeMap::new(),
            memory: BTreeMap::new(),
            foreign_dependants: BTreeMap::new(),
            disks: None,
            inside: BTreeMap::new(),
            generation: None,
            room: None,
            snapshots: Vec::new(),
            current: None,
            detail: serde_json::Value::Null,
        })
    }

    fn plan(&self, _: OperationId, _: &Request, _: &DomainState, _: &Observation) -> Result<Plan, Failure> {
        Ok(Plan::default())
    }

    async fn execute(&self, _: &StepContext<'_>, _: &Step) -> Result<StepReport, DriverError> {
        Err(not_asked())
    }

    fn resolve(&self, _: &StepContext<'_>, _: &Step, _: &Observation) -> Resolution {
        Resolution::NotDone
    }

    async fn undo(&self, _: &StepContext<'_>, _: &Step) -> Result<StepReport, DriverError> {
        Err(not_asked())
    }

    /// Never ends: what settles may take hours.
    async fn settle(&self, _: &DomainState, _: OperationId) -> Result<(), DriverError> {
        self.settled.fetch_add(1, Ordering::SeqCst);
        std::future::pending().await
    }
}

fn state() -> DomainState {
    let capabilities = Capabilities {
        memory: false,
        memory_external: false,
        disk_only: false,
        quiesce: false,
        internal: false,
        disk_selection: false,
        children_only: false,
        metadata_only: false,
        merges_itself: false,
        keeps_names: false,
        name_bytes_max: 255,
        depth_max: 10,
    };
    let domain = Domain {
        id: DomainId::from_uuid(uuid::Uuid::nil()),
        name: DomainName::new("web").unwrap(),
        driver: DriverKind::Sim,
        disks: Vec::new(),
        config: serde_json::Value::Null,
        labels: BTreeMap::new(),
        capabilities,
    };
    DomainState { domain: Some(domain), registered: true, ..DomainState::default() }
}

fn bounded(driver: &Arc<Flaky>, when_suspended: WhenSuspended) -> Arc<Bounded> {
    let settings = Settings { concurrency_max: 3, concurrency_per_connection_max: 2, ..Settings::default() };
    Arc::new(Bounded {
        driver: Arc::clone(driver) as Arc<dyn Driver>,
        connections: Arc::new(Connections::new(&settings)),
        clock: Arc::new(Jumping::default()),
        stop: Stop::default(),
        when_suspended,
    })
}

#[tokio::test]
async fn no_more_ask_at_once_than_the_connection_bears() {
    let driver = Flaky::new(0);
    let bounded = bounded(&driver, WhenSuspended::Fail);
    let tasks: Vec<_> = (0..20)
        .map(|_| {
            let bounded = Arc::clone(&bounded);
            tokio::spawn(async move { bounded.observe(&state()).await.map(|_| ()) })
        })
        .collect();
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    assert_eq!(driver.asked.load(Ordering::SeqCst), 20);
    assert_eq!(driver.at_once_max.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_suspended_connection_says_so_and_is_not_asked() {
    let driver = Flaky::new(usize::MAX);
    let bounded = bounded(&driver, WhenSuspended::Fail);
    for _ in 0..FAILURES_MAX {
        bounded.observe(&state()).await.unwrap_err();
    }
    let error = bounded.observe(&state()).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "the connection sim is suspended until 1970-01-01T00:00:05Z after 10 failures in a row: no answer"
    );
    assert_eq!(driver.asked.load(Ordering::SeqCst), 10);
    let states = bounded.connections.states();
    assert_eq!((states[0].breaker.as_str(), states[0].failures, states[0].under_way), ("open", 10, 0));
    assert_eq!(states[0].suspended_until, Some(at(5_000)));
}

#[tokio::test]
async fn who_waits_for_a_suspended_connection_gets_an_answer_once_it_works_again() {
    // Ten open it; two probes fail, after 5 s and after 10 s more; the third is answered after 20 s more.
    let driver = Flaky::new(12);
    let bounded = bounded(&driver, WhenSuspended::Wait);
    let mut failed = 0;
    while bounded.observe(&state()).await.is_err() {
        failed += 1;
    }
    assert_eq!((failed, bounded.clock.now()), (12, at(35_000)));
    assert_eq!(bounded.connections.states()[0].breaker, "closed");
}

#[tokio::test]
async fn who_is_to_end_does_not_wait_for_a_slot() {
    let driver = Flaky::new(0);
    let bounded = bounded(&driver, WhenSuspended::Wait);
    let line = bounded.connections.line(ConnectionId::new("sim"));
    let _taken = line.slots.acquire_many(2).await.unwrap();
    let web = state();
    let ends = bounded.observe(&web);
    bounded.stop.park();
    assert!(was_not_asked(&ends.await.unwrap_err()));
    assert_eq!(driver.asked.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn c3_what_is_tried_after_a_suspension_is_a_look_and_no_call_that_takes_hours() {
    // Ten open it, and the first look after that fails, too.
    let driver = Flaky::new(11);
    let bounded = bounded(&driver, WhenSuspended::Wait);
    for _ in 0..FAILURES_MAX {
        bounded.observe(&state()).await.unwrap_err();
    }
    let works = {
        let bounded = Arc::clone(&bounded);
        tokio::spawn(async move { bounded.settle(&state(), OperationId::from_uuid(uuid::Uuid::nil())).await })
    };
    while driver.settled.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(driver.asked.load(Ordering::SeqCst), 12, "it was looked twice before the work began");
    assert_eq!(bounded.clock.now(), at(15_000));
    // It is at work, and nobody waits for what it comes to.
    assert_eq!(bounded.connections.states()[0].breaker, "closed");
    bounded.observe(&state()).await.unwrap();
    works.abort();
}
