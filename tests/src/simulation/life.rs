//! One process from its start to its end, and what outlives it: the hypervisor, the folder, and the model.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::SignedDuration;
use serde_json::json;
use snaptree_drivers::sim::{Fault, SimDriver};
use snaptree_engine::command::Command;
use snaptree_engine::domain::DriverKind;
use snaptree_engine::driver::{NoWatch, Registration};
use snaptree_engine::engine::{Clock, Engine, Requester, Settings};
use snaptree_engine::event::{Actor, DomainChanged, Envelope, Origin};
use snaptree_engine::log::{Append, EventFilter, EventLog, LogError, NewEvent};
use snaptree_engine::operation::Phase;
use snaptree_engine::project::DomainState;
use snaptree_engine::{DiskName, DomainName, OperationId, StreamId};
use snaptree_store::{LockWait, Store};

use super::check::{Must, Violation, Watched, broken, check_chain, check_log};
use super::coverage::Place;
use super::model::Model;
use super::world::{Aim, Recorder, World, domain_id};
use super::{CRASHES_MIN, OPERATIONS_MIN};
use crate::random::Random;

/// The domains: their profiles and disks.
const DOMAINS: [(&str, &str, &[&str]); 4] = [
    ("layers", "qemu", &["vda", "vdb"]),
    ("box", "virtualbox", &["sda"]),
    ("any", "libvirt-test", &["vda", "vdb"]),
    ("host", "esx", &["sda"]),
];

/// Acts of a life before it is killed at the next place.
const ACTS_OF_A_LIFE: u32 = 14;

/// How a life ended, if nobody killed it.
pub(super) enum End {
    /// All that a seed has to bring is done; the log.
    Finished(Vec<Envelope>),
    /// The program ended by itself.
    Restart,
}

/// A request that was given with a key.
#[derive(Clone)]
pub(super) struct Keyed {
    pub domain: usize,
    pub key: String,
    pub command: Command,
    pub operation: Option<OperationId>,
}

/// Everything that outlives a process.
pub(super) struct Cast {
    pub world: World,
    pub random: Random,
    pub driver: SimDriver,
    pub watched: Vec<Watched>,
    pub keyed: Vec<Keyed>,
    pub names: u32,
    pub operations: u32,
    pub crashes: u32,
    /// The last event whose place in the log was looked at.
    verified: u64,
    dir: PathBuf,
    story: Vec<String>,
}

/// One process.
pub(super) struct Life {
    pub engine: Engine,
    pub store: Arc<Store>,
    pub requester: Requester,
}

fn requester() -> Requester {
    let origin = Origin { uid: 0, host: "sim".to_owned(), pid: 1, via: "cli".to_owned(), sudo_user: None };
    Requester { actor: Actor::User("sim".to_owned()), origin }
}

impl Cast {
    pub(super) fn new(seed: u64, folder: &Path) -> Self {
        let world = World::new(seed);
        let driver = SimDriver::in_memory().with_faults(Arc::new(world.clone()));
        Self {
            world,
            random: Random::new(seed),
            driver,
            watched: Vec::new(),
            keyed: Vec::new(),
            names: 0,
            operations: 0,
            crashes: 0,
            verified: 0,
            dir: folder.join("state"),
            story: Vec::new(),
        }
    }

    pub(super) fn story(&self) -> &[String] {
        &self.story
    }

    pub(super) fn tell(&mut self, what: impl Into<String>) {
        self.story.push(what.into());
    }

    /// All events, as they are on disk.
    pub(super) fn events(&self) -> Vec<Envelope> {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let Ok(store) = Store::open_reader(&self.dir) else { return Vec::new() };
        runtime.block_on(store.read(0, &EventFilter::default(), 1 << 20)).unwrap_or_default()
    }

    pub(super) fn killed(&mut self) {
        self.crashes += 1;
        self.world.aim(None);
        self.tell("killed");
    }

    fn open(&self) -> Result<Life, Violation> {
        let store = Store::open_writer(&self.dir, LockWait { timeout: Duration::from_secs(5) });
        let store = Arc::new(store.must("the store can be opened")?);
        let log = Arc::new(Recorder { store: Arc::clone(&store), world: self.world.clone() });
        let settings = Settings { merge_copy_bytes_max: 5 * 1024, ..Settings::default() };
        let engine = Engine::new(log)
            .with_driver(DriverKind::Sim, Arc::new(self.driver.clone()))
            .with_clock(Arc::new(self.world.clone()))
            .with_ids(Arc::new(self.world.clone()))
            .with_hooks(Arc::new(self.world.clone()))
            .with_settings(settings);
        Ok(Life { engine, store, requester: requester() })
    }

    /// Lives until it is killed, or all is done.
    pub(super) async fn live(&mut self, number: u32) -> Result<End, Violation> {
        self.world.no_step();
        self.world.forget_news();
        let last = self.crashes >= CRASHES_MIN && self.operations >= OPERATIONS_MIN;
        let zombie =
            if number > 0 && !last && self.random.chance(15) { Some(self.zombie().await?) } else { None };
        let life = self.open()?;
        if number == 0 {
            self.register(&life).await?;
        }
        if !last && self.random.chance(35) {
            let aim = self.choose_aim();
            self.aim(aim);
        }
        if number > 0 {
            self.meanwhile(&life).await?;
            self.recover(&life).await?;
        }
        if let Some(zombie) = zombie {
            self.bury(&life, zombie).await?;
        }
        if last {
            return self.finish(&life).await;
        }
        let aim = self.choose_aim();
        self.aim(aim);
        let mut acts = 0;
        while self.operations < OPERATIONS_MIN || self.crashes < CRASHES_MIN {
            if acts == ACTS_OF_A_LIFE {
                self.aim(Aim::Any(0));
            }
            acts += 1;
            self.act(&life).await?;
        }
        self.world.aim(None);
        Ok(End::Restart)
    }

    fn aim(&mut self, aim: Aim) {
        self.tell(format!("to be killed at {aim:?}"));
        self.world.aim(Some(aim));
    }

    fn choose_aim(&mut self) -> Aim {
        const AFTER: [Place; 9] = [
            Place::AppendBefore,
            Place::AppendAfter,
            Place::Started,
            Place::Before,
            Place::Half,
            Place::After,
            Place::Done,
            Place::UndoBefore,
            Place::UndoAfter,
        ];
        match self.random.below(10) {
            0..3 => Aim::Any(u32::try_from(self.random.below(70)).unwrap_or(0)),
            3..6 => {
                let place = *self.random.pick(&Place::ALL[1..]);
                Aim::At(place, u32::try_from(self.random.below(4)).unwrap_or(0))
            }
            _ => Aim::AfterFault(*self.random.pick(&Fault::ALL), *self.random.pick(&AFTER)),
        }
    }

    async fn register(&mut self, life: &Life) -> Result<(), Violation> {
        for (number, (name, profile, disks)) in DOMAINS.into_iter().enumerate() {
            let disks = disks.iter().map(|disk| (DiskName::new(*disk).expect("a name"), PathBuf::new()));
            let registration = Registration {
                id: domain_id(number),
                name: DomainName::new(name).expect("a name"),
                driver: DriverKind::Sim,
                disks: disks.collect(),
                options: json!({"profile": profile}),
                taken: BTreeMap::new(),
            };
            let (domain, _) = life
                .engine
                .register(&life.requester, registration, BTreeMap::new())
                .await
                .must("a domain can be registered")?;
            let model = Model::new(&domain);
            self.watched.push(Watched { id: domain.id, model, rebuilt: DomainState::default() });
            self.watched[number].catch_up(&self.world)?;
        }
        Ok(())
    }

    /// What the guests do while the program is gone.
    async fn meanwhile(&mut self, life: &Life) -> Result<(), Violation> {
        for number in 0..self.watched.len() {
            self.watched[number].read_up(&life.store).await?;
            if self.watched[number].model.registered && self.random.chance(40) {
                self.guest(number)?;
            }
        }
        Ok(())
    }

    async fn recover(&mut self, life: &Life) -> Result<(), Violation> {
        self.tell("recover");
        life.engine.recover(&life.requester, &NoWatch).await.must("recovery comes to its end")?;
        for number in 0..self.watched.len() {
            self.see_to_attention(life, number).await?;
            // What a crash left of merges is taken up by whoever drives the domain next.
            self.drive(life, number).await?;
            self.check(life, number).await?;
        }
        self.verified = check_log(&self.world, &life.store, self.verified).await?;
        Ok(())
    }

    pub(super) async fn drive(&mut self, life: &Life, number: usize) -> Result<(), Violation> {
        let id = self.watched[number].id;
        if self.watched[number].model.registered {
            let driven = life.engine.drive(&life.requester, id, &NoWatch).await;
            driven.must("a domain can be driven")?;
        }
        Ok(())
    }

    /// Someone looks at what needs attention, and lets it try again.
    pub(super) async fn see_to_attention(&mut self, life: &Life, number: usize) -> Result<(), Violation> {
        let id = self.watched[number].id;
        for _ in 0..4 {
            self.watched[number].catch_up(&self.world)?;
            let open = &self.watched[number].rebuilt.open;
            let waiting = open.iter().find(|open| matches!(open.phase, Phase::NeedsAttention { .. }));
            let Some(waiting) = waiting.map(|open| open.id) else { return Ok(()) };
            self.check(life, number).await?;
            self.tell(format!("retry {waiting}"));
            let retry = Command::Retry(waiting);
            let retried = life.engine.submit(&life.requester, id, &retry, None).await;
            retried.must("an operation can be retried")?;
            self.drive(life, number).await?;
        }
        broken("a retry leads on", "four were not enough")
    }

    pub(super) async fn check(&mut self, life: &Life, number: usize) -> Result<(), Violation> {
        let id = self.watched[number].id;
        self.watched[number].catch_up(&self.world)?;
        let served = life.engine.load(id).await.must("the domain can be loaded")?;
        let seen = life.engine.observe(&served).await.must("the hypervisor can be asked")?;
        self.watched[number].check(&self.world, &self.driver, &served, &seen)
    }

    /// A process that has lost the lock, and does not know it.
    async fn zombie(&mut self) -> Result<Life, Violation> {
        self.tell("a process loses its lock");
        let zombie = self.open()?;
        self.label(&zombie).await.must("the owner can append")?;
        std::fs::remove_file(self.dir.join(snaptree_store::lock::LOCK_FILE))
            .must("the lock can be stolen")?;
        Ok(zombie)
    }

    /// Nothing that it writes reaches the log any more.
    async fn bury(&mut self, life: &Life, zombie: Life) -> Result<(), Violation> {
        self.label(life).await.must("the owner can append")?;
        match self.label(&zombie).await {
            Err(LogError::Fenced { .. }) => Ok(()),
            other => broken("a process that lost the lock is fenced", format!("{other:?}")),
        }
    }

    /// Appends what is always allowed.
    async fn label(&mut self, life: &Life) -> Result<(), LogError> {
        let stream = StreamId::Domain(self.watched[0].id);
        let labels = BTreeMap::from([("tier".parse().expect("a key"), format!("t{}", self.names))]);
        self.names += 1;
        let event = DomainChanged { name: None, labels: Some(labels) }.into();
        let event = NewEvent { stream, event, operation: None, cause: None, key: None };
        let Requester { actor, origin } = life.requester.clone();
        let append = Append { expect: vec![], actor, origin, at: self.world.now(), events: vec![event] };
        life.engine.log().append(append).await.map(|_| ())
    }

    /// The clock is set: back an hour, ahead a year.
    pub(super) fn jump(&mut self) {
        let hours = if self.random.chance(50) { -1 } else { 24 * 365 };
        self.tell(format!("the clock jumps by {hours} h"));
        self.world.jump(SignedDuration::from_hours(hours));
    }

    async fn finish(&mut self, life: &Life) -> Result<End, Violation> {
        self.world.aim(None);
        self.world.fault_chance(0);
        for number in 0..self.watched.len() {
            self.drive(life, number).await?;
            self.check(life, number).await?;
            let all = life
                .store
                .read_stream(&StreamId::Domain(self.watched[number].id), 0, u64::MAX, 1 << 20)
                .await
                .must("the log can be read")?;
            let mut whole = DomainState::default();
            whole.apply_all(&all);
            if whole != self.watched[number].rebuilt {
                return broken("2: the log rebuilds what was served", "at the end");
            }
        }
        check_log(&self.world, &life.store, self.verified).await?;
        check_chain(&life.store)?;
        let all = life.store.read(0, &EventFilter::default(), 1 << 20).await;
        Ok(End::Finished(all.must("the log can be read")?))
    }
}
