//! The engine itself on a simulated hypervisor that fails, and with a state that another process took over.

#![allow(clippy::expect_used, reason = "a test")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::Value;
use snaptree_drivers::sim::{Direction, Fault, FaultPoint, Faults, SimDriver};
use snaptree_engine::DomainName;
use snaptree_engine::command::{Command, Create};
use snaptree_engine::domain::{Domain, DriverKind};
use snaptree_engine::driver::{Driver, Hooks, NoWatch, Registration};
use snaptree_engine::engine::{Engine, EngineError, Requester, Settings, Submitted};
use snaptree_engine::event::{Actor, Event, Origin};
use snaptree_engine::log::LogError;
use snaptree_engine::operation::Outcome;
use snaptree_store::{LockWait, Store};

/// What goes wrong with the first tries of every step.
struct First {
    fault: Fault,
    times: usize,
    met: AtomicUsize,
}

impl Faults for First {
    fn fault(&self, point: &FaultPoint) -> Option<Fault> {
        assert_eq!(point.direction, Direction::Forward, "nothing has to be taken back");
        (self.met.fetch_add(1, Ordering::SeqCst) < self.times).then_some(self.fault)
    }
}

fn requester() -> Requester {
    let origin = Origin { uid: 0, host: "h".to_owned(), pid: 1, via: "test".to_owned(), sudo_user: None };
    Requester { actor: Actor::User("ada".to_owned()), origin }
}

/// An engine with one domain, on a state in that folder.
async fn engine(folder: &Path, faults: Option<Arc<First>>) -> (Engine, Domain) {
    let store = Store::open_writer(folder, LockWait { timeout: Duration::ZERO }).expect("a state");
    let mut sim = SimDriver::new(folder.to_owned());
    if let Some(faults) = faults {
        sim = sim.with_faults(faults);
    }
    let driver: Arc<dyn Driver> = Arc::new(sim);
    let quick = Settings { retry_delay_ms_min: 1, retry_delay_ms_max: 10, ..Settings::default() };
    let engine = Engine::new(Arc::new(store)).with_driver(DriverKind::Sim, driver).with_settings(quick);
    let registration = Registration {
        id: engine.fresh_domain_id(),
        name: DomainName::new("web").expect("a name"),
        driver: DriverKind::Sim,
        disks: vec![],
        options: Value::Null,
        taken: Default::default(),
    };
    let (domain, _) =
        engine.register(&requester(), registration, Default::default()).await.expect("registered");
    (engine, domain)
}

/// A driver that fails three times and then works, and one whose answer is lost after the create took place, or that
/// goes on after its caller is gone: exactly one snapshot exists afterwards.
#[tokio::test]
async fn a_create_that_fails_or_loses_its_answer_makes_exactly_one_snapshot() {
    for (fault, times) in [
        (Fault::Transient, 3),
        (Fault::Busy, 3),
        (Fault::LostReply, 1),
        (Fault::GoesOn, 1),
        (Fault::HalfDone, 1),
        (Fault::Hang, 3),
    ] {
        let folder = tempfile::tempdir().expect("a folder");
        let faults = Arc::new(First { fault, times, met: AtomicUsize::new(0) });
        let (engine, domain) = engine(folder.path(), Some(faults.clone())).await;
        let command = Command::Create(Create::default());
        let submitted = engine.submit(&requester(), domain.id, &command, None).await.expect("accepted");
        let Submitted::Operation(operation) = submitted else { panic!("{submitted:?}") };
        let driven = engine.drive(&requester(), domain.id, &NoWatch).await.expect("driven");
        let what = fault.as_str();
        assert_eq!(driven.carried[0].outcome, Some(Outcome::Succeeded), "{what}: {:?}", driven.carried);
        assert_eq!(driven.state.tree.len(), 1, "{what}");
        assert_eq!(engine.observe(&driven.state).await.expect("observed").snapshots.len(), 1, "{what}");
        assert!(faults.met.load(Ordering::SeqCst) >= times, "{what}: met");

        let events = engine.operation_events(operation).await.expect("events");
        let count = |kind: &str| events.iter().filter(|event| event.event.kind() == kind).count();
        assert_eq!(count("Snapshot.Created"), 1, "{what}");
        let told = match fault {
            Fault::Transient | Fault::Busy => count("Operation.AttemptFailed"),
            _ => count("System.Recovered"),
        };
        assert_eq!(told, times, "{what}: each failure is in the log");
    }
}

/// Gives the state to another owner when a place is reached for the n-th time.
struct TakenOver {
    database: PathBuf,
    place: &'static str,
    nth: usize,
    reached: AtomicUsize,
}

impl Hooks for TakenOver {
    fn reached(&self, name: &str) {
        if name == self.place && self.reached.fetch_add(1, Ordering::SeqCst) + 1 == self.nth {
            let database = rusqlite::Connection::open(&self.database).expect("the database");
            database.execute_batch("UPDATE owner SET epoch = epoch + 1").expect("another owner");
        }
    }
}

/// Everything that the simulated hypervisor keeps; nothing before it was ever asked for anything.
fn hypervisor(folder: &Path) -> Vec<Vec<u8>> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder.join("sim"))
        .into_iter()
        .flatten()
        .map(|entry| entry.expect("an entry").path())
        .collect();
    files.sort();
    files.iter().map(|file| std::fs::read(file).expect("a file")).collect()
}

/// Whatever it was about to do: a process that the state was taken from writes nothing and touches nothing more.
#[tokio::test]
async fn a_process_that_lost_the_state_touches_nothing_more() {
    // The append of the plan; and the append of the outcome, with the effect behind it.
    for (nth, touched) in [(1, false), (2, true)] {
        let folder = tempfile::tempdir().expect("a folder");
        let (engine, domain) = engine(folder.path(), None).await;
        let hooks = TakenOver {
            database: folder.path().join("snaptree.db"),
            place: "append.before",
            nth,
            reached: AtomicUsize::new(0),
        };
        let engine = engine.with_hooks(Arc::new(hooks));
        let before = hypervisor(folder.path());
        let command = Command::Create(Create::default());
        engine.submit(&requester(), domain.id, &command, None).await.expect("it owns the state still");
        let head = engine.log().head().await.expect("a head");
        let events = u64::from(touched) * 2;
        for _ in 0..2 {
            let driven = engine.drive(&requester(), domain.id, &NoWatch).await;
            assert!(matches!(driven, Err(EngineError::Log(LogError::Fenced { .. }))), "{nth}: {driven:?}");
            assert_eq!(engine.log().head().await.expect("a head").seq, head.seq + events, "{nth}");
            assert_eq!(hypervisor(folder.path()) != before, touched, "{nth}");
        }
        assert!(engine.submit(&requester(), domain.id, &command, None).await.is_err(), "{nth}");
        drop(engine);

        // The next owner finds the operation, and ends it with one effect.
        let store = Store::open_writer(folder.path(), LockWait { timeout: Duration::from_secs(10) });
        let driver: Arc<dyn Driver> = Arc::new(SimDriver::new(folder.path().to_owned()));
        let next = Engine::new(Arc::new(store.expect("the state"))).with_driver(DriverKind::Sim, driver);
        let recovered = next.recover(&requester(), &NoWatch).await.expect("recovered").operations;
        assert_eq!(recovered[0].outcome, Some(Outcome::Succeeded), "{recovered:?}");
        let state = next.load(domain.id).await.expect("the domain");
        assert_eq!(state.tree.len(), 1);
        assert_eq!(next.observe(&state).await.expect("observed").snapshots.len(), 1);
        let log = next.log().read(0, &Default::default(), 1_000).await.expect("the log");
        let created = log.iter().filter(|event| matches!(event.event, Event::SnapshotCreated(_))).count();
        assert_eq!(created, 1);
    }
}
