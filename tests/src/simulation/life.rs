//! One process from its start to its end, and what outlives it: the hypervisor, the folder, and the model.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::SignedDuration;
use serde_json::json;
use snaptree_drivers::sim::SimDriver;
use snaptree_engine::command::Command;
use snaptree_engine::domain::DriverKind;
use snaptree_engine::driver::{NoWatch, Registration};
use snaptree_engine::engine::{Clock, Engine, EngineError, Foreign, Requester, Settings};
use snaptree_engine::event::{Actor, DomainChanged, Envelope, Origin};
use snaptree_engine::log::{Append, EventFilter, EventLog, LogError, NewEvent};
use snaptree_engine::project::DomainState;
use snaptree_engine::{DiskName, DomainName, OperationId, StreamId};
use snaptree_store::{Commits, LockWait, Store};

use super::check::{Must, Violation, Watched, broken, check_chain, check_log};
use super::coverage::{Cell, cells};
use super::model::Model;
use super::world::{Aim, Recorder, World, domain_id};
use super::{CRASHES_MIN, OPERATIONS_MIN};
use crate::random::Random;

/// The domains: their profiles and disks.
const DOMAINS: [(&str, &str, &[&str]); 5] = [
    ("layers", "qemu", &["vda", "vdb"]),
    ("box", "virtualbox", &["sda"]),
    ("any", "libvirt-test", &["vda", "vdb"]),
    ("host", "esx", &["sda"]),
    ("late", "qemu", &["vda", "vdb"]),
];

/// The domain that nobody touches before an adoption is aimed at.
pub(super) const LATE: usize = 4;

/// Domains that are never let go of.
pub(super) const DOMAINS_MIN: usize = 3;

/// Acts toward a cell before the program is killed at the next place, whatever it is.
const ACTS_TOWARD_A_CELL: u32 = 10;
/// How often a domain is driven again when its hypervisor refuses.
const DRIVES_MAX: u32 = 6;

/// Neighbours in the table go to seeds that are far from each other: a number without a common factor with the number
/// of cells, which is looked at when the table is made.
const STRIDE: usize = 211;

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
    seed: u64,
    /// Lives that are to end in a cell, and those that did.
    lives_to_end: u32,
    lives_ended: u32,
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
        let mut random = Random::new(seed);
        let lives_to_end = CRASHES_MIN + u32::from(random.chance(30));
        Self {
            world,
            random,
            seed,
            lives_to_end,
            lives_ended: 0,
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
        let store = Store::open_writer_with(
            &self.dir,
            LockWait { timeout: Duration::from_secs(5) },
            Commits::InPlace,
        );
        let store = Arc::new(store.must("the store can be opened")?);
        let log = Arc::new(Recorder { store: Arc::clone(&store), world: self.world.clone() });
        let foreign = Foreign::Report;
        let settings = Settings { merge_copy_bytes_max: 5 * 1024, foreign, ..Settings::default() };
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
        let last = self.lives_ended >= self.lives_to_end && self.operations >= OPERATIONS_MIN;
        let zombie =
            if number > 0 && !last && self.random.chance(10) { Some(self.zombie().await?) } else { None };
        if number > 0 && zombie.is_none() && self.random.chance(15) {
            self.drop_what_can_be_made_again()?;
        }
        let life = self.open()?;
        if number == 0 {
            self.register(&life).await?;
        }
        if number > 0 {
            if !last && self.random.chance(20) {
                let places = u32::try_from(self.random.below(25)).unwrap_or(0);
                self.aim(Aim::Any(places));
            }
            self.meanwhile(&life).await?;
            self.call_off_some(&life).await?;
            self.recover(&life).await?;
            self.world.aim(None);
        }
        if let Some(zombie) = zombie {
            self.bury(&life, zombie).await?;
        }
        if last {
            return self.finish(&life).await;
        }
        let share = OPERATIONS_MIN * (self.lives_ended + 1) / (self.lives_to_end + 1);
        while self.operations < share {
            self.act(&life).await?;
        }
        if self.lives_ended < self.lives_to_end {
            self.end_in(&life, self.next_cell()).await?;
        }
        while self.operations < OPERATIONS_MIN {
            self.act(&life).await?;
        }
        Ok(End::Restart)
    }

    /// Acts until the program is killed in the cell; where that takes too long, anywhere.
    async fn end_in(&mut self, life: &Life, cell: Cell) -> Result<(), Violation> {
        self.lives_ended += 1;
        self.aim(Aim::In(cell));
        for _ in 0..ACTS_TOWARD_A_CELL {
            self.act_toward(life, cell).await?;
            if self.world.aimed_at().is_none() {
                break;
            }
        }
        // The cell was one without a crash, or would not come.
        let places = u32::try_from(self.random.below(12)).unwrap_or(0);
        self.aim(Aim::Any(places));
        loop {
            self.act(life).await?;
        }
    }

    fn aim(&mut self, aim: Aim) {
        self.tell(format!("to be killed at {aim:?}"));
        self.world.aim(Some(aim));
    }

    /// The cells in turn, from seed to seed.
    fn next_cell(&self) -> Cell {
        let cells = cells();
        debug_assert!(!cells.len().is_multiple_of(STRIDE), "the stride leads to every cell");
        let turn = self.seed.wrapping_mul(u64::from(CRASHES_MIN)).wrapping_add(u64::from(self.lives_ended));
        let turn = usize::try_from(turn % cells.len() as u64).unwrap_or(0);
        cells[turn * STRIDE % cells.len()]
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
            // A step that cannot be taken back for long leaves its operation open, and whoever drives next goes on.
            for _ in 0..DRIVES_MAX {
                match life.engine.drive(&life.requester, id, &NoWatch).await {
                    Err(EngineError::Driver(error)) => self.tell(format!("left open at {number}: {error}")),
                    driven => return driven.must("a domain can be driven").map(|_| ()),
                }
            }
            return broken("a domain can be driven", format!("{DRIVES_MAX} times were not enough"));
        }
        Ok(())
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

    /// Someone drops the checkpoints and the read model, while no process is there.
    fn drop_what_can_be_made_again(&mut self) -> Result<(), Violation> {
        self.tell("checkpoints and read model are dropped");
        let database = rusqlite::Connection::open(self.dir.join(snaptree_store::DATABASE_FILE));
        let dropped = database.and_then(|database| {
            database.execute_batch(
                "DROP TABLE IF EXISTS checkpoints; DELETE FROM read_model; DROP TABLE operations;",
            )
        });
        dropped.must("what can be made again can be dropped")
    }

    /// Nothing that it does reaches the log or a machine any more.
    async fn bury(&mut self, life: &Life, zombie: Life) -> Result<(), Violation> {
        const INVARIANT: &str = "a process that lost the lock is fenced";
        self.label(life).await.must("the owner can append")?;
        let before = life.store.head().await.must("the log can be read")?;
        let (number, command) = (0, self.command(0));
        let id = self.watched[number].id;
        let holding =
            self.driver.holding(&self.watched[number].rebuilt).must("the hypervisor can be asked")?;
        match zombie.engine.submit(&zombie.requester, id, &command, None).await {
            Err(EngineError::Log(LogError::Fenced { .. }) | EngineError::Rejected(_)) => {}
            other => return broken(INVARIANT, format!("{other:?}")),
        }
        match self.label(&zombie).await {
            Err(LogError::Fenced { .. }) => {}
            other => return broken(INVARIANT, format!("{other:?}")),
        }
        // What the owner was asked for, the other one cannot carry out.
        let open = self.submit(life, number, command).await?;
        if open.is_some() {
            let driven = zombie.engine.drive(&zombie.requester, id, &NoWatch).await;
            if !matches!(driven, Err(EngineError::Log(LogError::Fenced { .. }))) {
                return broken(INVARIANT, format!("{:?}", driven.map(|driven| driven.carried)));
            }
        }
        let after = self.driver.holding(&self.watched[number].rebuilt).must("the hypervisor can be asked")?;
        let written = life.store.head().await.must("the log can be read")?.seq - before.seq;
        if holding != after || written > 1 {
            return broken(INVARIANT, format!("{written} events, {after:?}"));
        }
        self.drive(life, number).await?;
        self.see_to_attention(life, number).await?;
        self.check(life, number).await
    }

    /// Appends what is always allowed.
    async fn label(&mut self, life: &Life) -> Result<(), LogError> {
        let stream = StreamId::Domain(self.watched[0].id);
        let labels = BTreeMap::from([("tier".parse().expect("a key"), format!("t{}", self.names))]);
        self.names += 1;
        let event = DomainChanged { labels: Some(labels), ..DomainChanged::default() }.into();
        let event = NewEvent { stream, event, operation: None, cause: None, key: None };
        let Requester { actor, origin } = life.requester.clone();
        let append = Append { expect: vec![], actor, origin, at: self.world.now(), events: vec![event] };
        life.engine.log().append(append).await.map(|_| ())
    }

    /// The clock is set: back an hour, ahead a year.
    pub(super) fn jump(&mut self) {
        let hours = if self.random.chance(50) { -1 } else { 24 * 365 };
        self.jump_by(hours);
    }

    pub(super) fn jump_by(&mut self, hours: i64) {
        self.tell(format!("the clock jumps by {hours} h"));
        self.world.jump(SignedDuration::from_hours(hours));
    }

    async fn finish(&mut self, life: &Life) -> Result<End, Violation> {
        self.world.aim(None);
        self.world.fault_chance(0);
        for number in 0..self.watched.len() {
            self.drive(life, number).await?;
            self.check(life, number).await?;
        }
        check_log(&self.world, &life.store, self.verified).await?;
        check_chain(&life.store)?;
        let all = life.store.read(0, &EventFilter::default(), 1 << 20).await.must("the log can be read")?;
        for watched in &self.watched {
            let mut whole = DomainState::default();
            let stream = StreamId::Domain(watched.id);
            whole.apply_all(all.iter().filter(|envelope| envelope.stream == stream));
            if whole != watched.rebuilt {
                return broken("2: the log rebuilds what was served", "at the end");
            }
        }
        Ok(End::Finished(all))
    }
}
