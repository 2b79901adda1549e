//! Many simulated machines under policies, with a clock that stands until it is set, and a log that counts what is read.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use snaptree_drivers::sim::SimDriver;
use snaptree_engine::domain::DriverKind;
use snaptree_engine::driver::{Head, NoWatch, Registration};
use snaptree_engine::engine::{Clock, Engine, Requester};
use snaptree_engine::event::{Actor, Envelope, Origin};
use snaptree_engine::ids::IdSource as _;
use snaptree_engine::log::{
    Append, Checkpoint, DomainRow, EventFilter, EventLog, LogError, OperationFilter, OperationRow, SeqAt,
};
use snaptree_engine::{DomainId, DomainName, LabelKey, PolicyName, StreamId};
use snaptree_policies::runner::{Book, Scheduler, define};
use snaptree_store::{DATABASE_FILE, LockWait, Store};

/// A log that counts the events that are read from it.
pub struct Counted {
    store: Arc<Store>,
    events: AtomicU64,
}

impl Counted {
    /// How many events were read since this was asked last.
    pub fn read_since(&self) -> u64 {
        self.events.swap(0, Ordering::SeqCst)
    }

    fn count(&self, events: Vec<Envelope>) -> Vec<Envelope> {
        self.events.fetch_add(events.len() as u64, Ordering::SeqCst);
        events
    }
}

#[async_trait]
impl EventLog for Counted {
    async fn append(&self, append: Append) -> Result<Vec<Envelope>, LogError> {
        self.store.append(append).await
    }

    async fn read_stream(
        &self,
        stream: &StreamId,
        version: u64,
        seq_max: u64,
        count: usize,
    ) -> Result<Vec<Envelope>, LogError> {
        self.store.read_stream(stream, version, seq_max, count).await.map(|events| self.count(events))
    }

    async fn read(&self, seq: u64, filter: &EventFilter, count: usize) -> Result<Vec<Envelope>, LogError> {
        self.store.read(seq, filter, count).await.map(|events| self.count(events))
    }

    async fn head(&self) -> Result<Head, LogError> {
        self.store.head().await
    }

    async fn by_key(&self, stream: &StreamId, key: &str) -> Result<Option<Envelope>, LogError> {
        self.store.by_key(stream, key).await
    }

    async fn checkpoint(
        &self,
        stream: &StreamId,
        projector: u32,
        seq_max: u64,
    ) -> Result<Option<Checkpoint>, LogError> {
        self.store.checkpoint(stream, projector, seq_max).await
    }

    async fn save_checkpoint(&self, checkpoint: Checkpoint) -> Result<(), LogError> {
        self.store.save_checkpoint(checkpoint).await
    }

    async fn domains(&self, seq_max: u64) -> Result<Vec<DomainRow>, LogError> {
        self.store.domains(seq_max).await
    }

    async fn domain_by_name(&self, name: &DomainName) -> Result<Option<DomainRow>, LogError> {
        self.store.domain_by_name(name).await
    }

    async fn policies(&self) -> Result<Vec<PolicyName>, LogError> {
        self.store.policies().await
    }

    async fn operations(
        &self,
        filter: &OperationFilter,
        count: usize,
    ) -> Result<Vec<OperationRow>, LogError> {
        self.store.operations(filter, count).await
    }

    async fn seq_at(&self, at: Timestamp) -> Result<SeqAt, LogError> {
        self.store.seq_at(at).await
    }
}

/// A clock that stands until it is set, or slept past.
struct Standing(Mutex<Timestamp>);

#[async_trait]
impl Clock for Standing {
    fn now(&self) -> Timestamp {
        *self.0.lock().expect("no test panics with it")
    }

    async fn sleep_until(&self, until: Timestamp) {
        let mut now = self.0.lock().expect("no test panics with it");
        *now = until.max(*now);
    }
}

/// The machines, their state, and the clock.
pub struct Fleet {
    /// Where all of it is.
    pub folder: tempfile::TempDir,
    /// The log.
    pub log: Arc<Counted>,
    /// The machines, `vm-0` and on.
    pub domains: Vec<DomainId>,
    clock: Arc<Standing>,
}

/// The origin of what tests ask for.
pub fn origin() -> Origin {
    Origin { uid: 0, host: "h".to_owned(), pid: 1, via: "test".to_owned(), sudo_user: None }
}

/// Who asks in tests.
pub fn requester() -> Requester {
    Requester { actor: Actor::User("ada".to_owned()), origin: origin() }
}

impl Fleet {
    /// So many machines, at this time, in memory.
    ///
    /// # Panics
    /// Anything fails.
    pub async fn new(domains: usize, now: &str) -> Self {
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder");
        let store = Store::open_writer(folder.path(), LockWait { timeout: Duration::ZERO }).expect("a state");
        let log = Arc::new(Counted { store: Arc::new(store), events: AtomicU64::new(0) });
        let clock = Arc::new(Standing(Mutex::new(now.parse().expect("a time"))));
        let mut fleet = Self { folder, log, domains: Vec::new(), clock };
        let engine = fleet.engine();
        for number in 0..domains {
            let registration = Registration {
                id: DomainId::from_uuid(snaptree_engine::ids::UuidV7.next()),
                name: DomainName::new(format!("vm-{number}")).expect("a name"),
                driver: DriverKind::Sim,
                disks: vec![],
                options: serde_json::Value::Null,
                taken: BTreeMap::default(),
            };
            let labels = [(LabelKey::new("all").expect("a label"), "yes".to_owned())].into();
            let (domain, _) = engine.register(&requester(), registration, labels).await.expect("registered");
            fleet.domains.push(domain.id);
        }
        fleet
    }

    /// An engine that remembers nothing, as after a start.
    pub fn engine(&self) -> Engine {
        let driver = SimDriver::new(self.folder.path().to_owned());
        Engine::new(self.log.clone())
            .with_driver(DriverKind::Sim, Arc::new(driver))
            .with_clock(self.clock.clone())
    }

    /// Defines a policy.
    ///
    /// # Panics
    /// It is none.
    pub async fn set(&self, policy: &str) {
        define(&self.engine(), &requester(), &mut Book::default(), policy).await.expect("a policy");
    }

    /// Sets the clock.
    ///
    /// # Panics
    /// A test panicked while it was asked.
    pub fn go_to(&self, time: Timestamp) {
        *self.clock.0.lock().expect("no test panics with it") = time;
    }

    /// What a scheduler does until nothing is due or open.
    ///
    /// # Panics
    /// The store fails, or an operation cannot be driven.
    pub async fn live(&self, engine: &Engine, scheduler: &mut Scheduler) {
        loop {
            let tick = scheduler.tick().await.expect("a look");
            for domain in &tick.woken {
                engine.drive(&requester(), *domain, &NoWatch).await.expect("driven");
            }
            let again = tick.next_at.is_some_and(|next| next <= engine.now());
            if tick.woken.is_empty() && !again {
                return;
            }
        }
    }

    /// The same by a process that starts now.
    ///
    /// # Panics
    /// As [`Fleet::live`].
    pub async fn life(&self) {
        let engine = self.engine();
        let mut scheduler = Scheduler::new(engine.clone(), origin()).await.expect("a scheduler");
        self.live(&engine, &mut scheduler).await;
    }

    /// Changes rows of the database behind the program's back.
    ///
    /// # Panics
    /// It cannot.
    pub fn forge(&self, sql: &str) {
        forge(self.folder.path(), sql);
    }
}

/// Changes rows of a state's database behind the program's back.
///
/// # Panics
/// It cannot.
pub fn forge(state: &std::path::Path, sql: &str) {
    let database = rusqlite::Connection::open(state.join(DATABASE_FILE)).expect("the database");
    let all = format!("DROP TRIGGER IF EXISTS events_no_update; {sql};");
    database.execute_batch(&all).expect("forged");
}
