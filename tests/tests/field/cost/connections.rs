//! A connection that is suspended while work waits for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use snaptree_drivers::sim::{Direction, Fault, FaultPoint, Faults, SimDriver};
use snaptree_engine::around::{Around, Hook, HookCall, HookRunner, OnFailure};
use snaptree_engine::command::{Command, Create};
use snaptree_engine::domain::DriverKind;
use snaptree_engine::engine::{Clock, Engine, Settings, SystemClock};
use snaptree_engine::event::Event;
use snaptree_engine::log::{EventFilter, EventLog as _};
use snaptree_engine::operation::Failure;
use snaptree_engine::reconcile::dispatch::Dispatcher;
use snaptree_engine::together::{Beside, Decided, Wanted};
use snaptree_engine::{DomainId, PolicyName, StreamId};
use snaptree_tests::fleet::{Fleet, requester};

/// The system's clock, which counts how often it is asked.
#[derive(Default)]
struct Asked(AtomicU64);

#[async_trait]
impl Clock for Asked {
    fn now(&self) -> Timestamp {
        self.0.fetch_add(1, Ordering::SeqCst);
        SystemClock.now()
    }

    async fn sleep_until(&self, until: Timestamp) {
        SystemClock.sleep_until(until).await;
    }
}

/// Nothing answers.
struct Gone;

impl Faults for Gone {
    fn fault(&self, point: &FaultPoint) -> Option<Fault> {
        (point.direction == Direction::Forward).then_some(Fault::Transient)
    }
}

/// Programs that do nothing.
struct Willing;

#[async_trait]
impl HookRunner for Willing {
    async fn run(&self, _call: &HookCall<'_>) -> Result<(), Failure> {
        Ok(())
    }
}

async fn create(engine: &Engine, domain: DomainId, around: Option<Around>) {
    let wanted =
        Wanted { domain, command: Command::Create(Create::default()), key: format!("key-{domain}"), around };
    let stream = StreamId::Policy(PolicyName::new("p").expect("a name"));
    let mut beside = Beside { stream, version: 0, matters: &|_| false };
    let tell = |_: &[Decided]| Vec::<Event>::new();
    engine.submit_together(&requester(), &mut beside, &[wanted], &tell).await.expect("asked");
}

#[test]
fn c3_who_ends_while_a_connection_is_suspended_between_hooks_does_not_spin() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    let clock = Arc::new(Asked::default());
    let asked = Arc::clone(&clock);
    runtime.block_on(async {
        let fleet = Fleet::new(2, "2026-01-01T00:00:00Z").await;
        let driver = SimDriver::new(fleet.folder.path().to_owned()).with_faults(Arc::new(Gone));
        let settings = Settings {
            attempts_max: 40,
            retry_delay_ms_min: 1,
            retry_delay_ms_max: 1,
            ..Settings::default()
        };
        let engine = fleet
            .engine()
            .with_driver(DriverKind::Sim, Arc::new(driver))
            .with_settings(settings)
            .with_hook_runner(Arc::new(Willing))
            .with_clock(clock);
        let dispatcher = Dispatcher::new(&engine, requester());
        // The first one's tries suspend the connection.
        create(&engine, fleet.domains[0], None).await;
        dispatcher.wake(fleet.domains[0]);
        while engine.connections().iter().all(|connection| connection.suspended_until.is_none()) {
            tokio::task::yield_now().await;
        }
        // The second one has its program before behind it, and has to look at the machine.
        let program = vec!["/bin/true".to_owned()];
        let before =
            Hook { program, timeout_s: 1, environment: Default::default(), on_failure: OnFailure::Abort };
        let around = Around { after: Some(before.clone()), before: Some(before) };
        create(&engine, fleet.domains[1], Some(around)).await;
        dispatcher.wake(fleet.domains[1]);
        let filter =
            EventFilter { kind: Some("Operation.HookFinished".to_owned()), ..EventFilter::default() };
        let hook_is_done = async || !fleet.log.read(0, &filter, 1).await.expect("the log").is_empty();
        while !hook_is_done().await {
            tokio::task::yield_now().await;
        }
        let before = asked.0.load(Ordering::SeqCst);
        // The connection is left alone for seconds: the work in hand waits for it, as long as it is let.
        let ended = tokio::time::timeout(Duration::from_millis(300), dispatcher.stop()).await;
        let times = asked.0.load(Ordering::SeqCst) - before;
        assert!(times < 1_000, "the time was asked for {times} times");
        assert!(ended.is_err(), "what lies between its hooks is seen through");
    });
    runtime.shutdown_background();
}
