//! A year of policies in virtual time: the real engine, the real store, the real scheduler and its retention, on the
//! simulated hypervisor, with a process that is killed now and then.
//!
//! Code Map: [`sky`] (the clock, and the moment at which the process is killed), [`rules`] (the policies, and what they
//! come to, thought out anew), [`audit`] (the log and the trees against it).
//!
//! Architecture Invariant: [`rules`] and [`audit`] use nothing of the policies crate.

pub mod audit;
pub mod rules;
pub mod sky;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use snaptree_drivers::sim::{BLOCKS, SimDriver};
use snaptree_engine::domain::DriverKind;
use snaptree_engine::driver::{NoWatch, Registration};
use snaptree_engine::engine::{Engine, Requester};
use snaptree_engine::event::{Actor, Origin};
use snaptree_engine::log::EventLog;
use snaptree_engine::{DiskName, DomainId, DomainName};
use snaptree_policies::runner::{Book, Notable, Scheduler, define};
use snaptree_store::{Commits, LockWait, Store};

use crate::measure::processor_time;
use crate::random::Random;
use audit::Audited;
use rules::POLICIES;
use sky::{Killed, Sky};

/// When it begins: half a minute past an hour.
const BEGIN_S: i64 = 1_767_225_630;
/// Places that a process may pass before it is killed, for each domain: about as many as a run has.
const PLACES_A_DOMAIN: usize = 40;
/// How often a process that is killed stays away, in percent; for up to so many hours then.
const AWAY_PERCENT: usize = 20;
const AWAY_HOURS_MAX: usize = 40;
/// How often its successor is killed while it recovers, in percent.
const AGAIN_PERCENT: usize = 15;

/// How far clocks leap, in seconds: to either side, and by that much or less.
const LEAPS_S: [i64; 6] = [10, 600, 7_200, 3 * 86_400, 40 * 86_400, 3 * 365 * 86_400];
/// How often a leap takes the clock back to the truth, in percent.
const RIGHT_AGAIN_PERCENT: usize = 60;
/// How often the clocks of hosts are wrong by as much as ours may be, in percent.
const HOSTS_WRONG_PERCENT: usize = 50;

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// How many domains; every other one has chains of layers.
    pub domains: usize,
    /// How many days.
    pub days: u32,
    /// How often the process is killed.
    pub crashes: u32,
    /// How often the clock leaps, and those of hosts with it.
    pub leaps: u32,
    /// What chance goes by.
    pub seed: u64,
}

/// How far it has come.
#[derive(Clone, Copy, Debug, Default)]
pub struct Progress {
    /// Whole days that have passed.
    pub days: u32,
    /// Events in the log.
    pub events: u64,
    /// How often the process was killed.
    pub crashes: u32,
}

/// What it came to.
#[derive(Clone, Debug)]
pub struct Figures {
    /// How often the process was killed.
    pub crashes: u32,
    /// How many of these were while it slept, after which it stayed away for hours.
    pub away: u32,
    /// What the log told.
    pub audited: Audited,
    /// How long all lives took, without the audit.
    pub lived: Duration,
    /// How long processors worked for that.
    pub worked: Duration,
    /// How much of that went into opening the store, recovering, and reading the policies, over all starts.
    pub starting: Duration,
    /// How long processors worked for the audit.
    pub auditing: Duration,
    /// The size of the database.
    pub database_bytes: u64,
}

/// What the guest of a domain wrote.
#[derive(Clone, Copy, Debug)]
pub struct Write {
    /// The last event of the log then.
    pub seq: u64,
    /// Where.
    pub block: u64,
    /// What.
    pub value: u64,
}

/// All that outlives a process.
struct Cast<'a> {
    wanted: Wanted,
    dir: &'a Path,
    sky: Sky,
    random: Random,
    driver: SimDriver,
    domains: Vec<DomainId>,
    /// When the process was up and had nothing more to do.
    looked: Vec<Timestamp>,
    writes: BTreeMap<DomainId, Vec<Write>>,
    /// The hours in which it is to be killed, the last first.
    deaths: Vec<Timestamp>,
    /// The moments at which the clock leaps, the last first.
    leaps: Vec<Timestamp>,
    progress: Progress,
    away: u32,
    starting: Duration,
}

/// One process.
struct Life {
    store: Arc<Store>,
    engine: Engine,
    scheduler: Scheduler,
}

/// How a process ended, if it was not killed at work.
enum End {
    /// The time is up.
    Finished,
    /// Killed while it slept, and away for a while.
    KilledAsleep,
    /// Killed when all was done.
    KilledAtLast,
}

fn requester() -> Requester {
    let origin =
        Origin { uid: 0, host: "year".to_owned(), pid: 1, via: "engine".to_owned(), sudo_user: None };
    Requester { actor: Actor::User("year".to_owned()), origin }
}

fn disk() -> DiskName {
    DiskName::new("vda").expect("a name")
}

/// Lives through the days in `dir`, which has to be empty, and audits what is there then. Tells of each day.
///
/// # Errors
/// What is there is not what the rules say.
///
/// # Panics
/// The engine fails.
pub fn live(wanted: Wanted, dir: &Path, tell: &mut dyn FnMut(Progress)) -> Result<Figures, String> {
    let (began, began_work) = (Instant::now(), processor_time());
    let mut cast = Cast::new(wanted, dir);
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    loop {
        let lived = catch_unwind(AssertUnwindSafe(|| runtime.block_on(cast.live(tell))));
        match lived {
            Ok(End::Finished) => break,
            Ok(End::KilledAsleep) => {
                cast.progress.crashes += 1;
                cast.away += 1;
                let hours = i64::try_from(1 + cast.random.below(AWAY_HOURS_MAX)).expect("few");
                cast.sky.go_to(cast.sky.truth() + SignedDuration::from_hours(hours));
                cast.sky.boot();
            }
            Ok(End::KilledAtLast) => cast.progress.crashes += 1,
            Err(panic) if panic.is::<Killed>() => {
                cast.progress.crashes += 1;
                let again = cast.deaths.len() > 1 && cast.random.chance(AGAIN_PERCENT);
                if again {
                    cast.deaths.pop();
                    cast.doom();
                }
            }
            Err(panic) => resume_unwind(panic),
        }
    }
    let (lived, worked) = (began.elapsed(), processor_time());
    let audited = runtime.block_on(cast.audit())?;
    let database = dir.join(snaptree_store::DATABASE_FILE);
    Ok(Figures {
        crashes: cast.progress.crashes,
        away: cast.away,
        audited,
        lived,
        worked: worked - began_work,
        starting: cast.starting,
        auditing: processor_time() - worked,
        database_bytes: std::fs::metadata(database).expect("the database").len(),
    })
}

impl<'a> Cast<'a> {
    fn new(wanted: Wanted, dir: &'a Path) -> Self {
        let begin = Timestamp::from_second(BEGIN_S).expect("a time");
        let mut random = Random::new(wanted.seed);
        let hours = usize::try_from(wanted.days).expect("few") * 24;
        let hour = |random: &mut Random| i64::try_from(1 + random.below(hours - 1)).expect("few");
        let mut deaths: Vec<Timestamp> = (0..wanted.crashes)
            .map(|_| begin + SignedDuration::from_hours(hour(&mut random)) - SignedDuration::from_secs(60))
            .collect();
        deaths.sort_unstable_by(|a, b| b.cmp(a));
        let mut leaps: Vec<Timestamp> = (0..wanted.leaps)
            .map(|_| begin + SignedDuration::from_hours(hour(&mut random)) + SignedDuration::from_secs(777))
            .collect();
        leaps.sort_unstable_by(|a, b| b.cmp(a));
        let sky = Sky::new(begin, wanted.seed);
        Self {
            wanted,
            dir,
            driver: SimDriver::in_memory().with_faults(Arc::new(sky.clone())),
            sky,
            random,
            domains: Vec::new(),
            looked: Vec::new(),
            writes: BTreeMap::new(),
            deaths,
            leaps,
            progress: Progress::default(),
            away: 0,
            starting: Duration::ZERO,
        }
    }

    fn end(&self) -> Timestamp {
        let days = SignedDuration::from_hours(i64::from(self.wanted.days) * 24);
        Timestamp::from_second(BEGIN_S).expect("a time") + days
    }

    /// The process is to be killed at one of the places that it reaches next.
    fn doom(&mut self) {
        let places = 1 + self.random.below(PLACES_A_DOMAIN * self.wanted.domains);
        self.sky.doom(u64::try_from(places).expect("few"));
    }

    async fn start(&mut self) -> Life {
        let began = processor_time();
        let wait = LockWait { timeout: Duration::from_secs(5) };
        let store = Store::open_writer_with(self.dir, wait, Commits::InPlace).expect("the store opens");
        let store = Arc::new(store);
        let sky = Arc::new(self.sky.clone());
        let engine = Engine::new(store.clone())
            .with_driver(DriverKind::Sim, Arc::new(self.driver.clone()))
            .with_clock(sky.clone())
            .with_ids(sky.clone())
            .with_hooks(sky);
        if self.domains.is_empty() {
            self.register(&engine).await;
        }
        engine.recover(&requester(), &NoWatch).await.expect("recovered");
        let scheduler = Scheduler::new(engine.clone(), requester().origin).await.expect("a scheduler");
        self.starting += processor_time() - began;
        Life { store, engine, scheduler }
    }

    async fn register(&mut self, engine: &Engine) {
        for number in 0..self.wanted.domains {
            let options = if number % 2 == 0 { Value::Null } else { json!({"profile": "qemu"}) };
            let registration = Registration {
                id: engine.fresh_domain_id(),
                name: DomainName::new(format!("vm-{number}")).expect("a name"),
                driver: DriverKind::Sim,
                disks: [(disk(), std::path::PathBuf::new())].into(),
                options,
                taken: BTreeMap::new(),
            };
            let (domain, _) =
                engine.register(&requester(), registration, BTreeMap::new()).await.expect("registered");
            self.domains.push(domain.id);
        }
        for policy in &POLICIES {
            let mut book = Book::default();
            define(engine, &requester(), &mut book, &policy.file()).await.expect("a policy");
        }
    }

    /// One process, until it is killed or the time is up.
    async fn live(&mut self, tell: &mut dyn FnMut(Progress)) -> End {
        let mut life = self.start().await;
        loop {
            let next = self.sky.truth_at(life.work().await);
            self.looked.push(self.sky.time());
            self.pass_the_day(&life, self.sky.truth(), tell).await;
            if self.leaps.last().is_some_and(|leap| *leap <= next.min(self.end())) {
                self.leap();
                continue;
            }
            if next > self.end() {
                let left = self.sky.spare() || self.deaths.pop().is_some();
                return if left { End::KilledAtLast } else { End::Finished };
            }
            self.sky.go_to(next);
            if self.deaths.last().is_some_and(|death| *death <= next) && !self.sky.is_doomed() {
                self.deaths.pop();
                if self.random.chance(AWAY_PERCENT) {
                    return End::KilledAsleep;
                }
                self.doom();
            }
        }
    }

    /// The clock leaps, or is put right, and hosts' clocks are wrong or right.
    fn leap(&mut self) {
        let Some(at) = self.leaps.pop() else { return };
        let far = |percent: usize, random: &mut Random| {
            if !random.chance(percent) {
                return SignedDuration::ZERO;
            }
            let most = LEAPS_S[random.below(LEAPS_S.len())];
            let seconds = i64::try_from(random.next_u64() % most.unsigned_abs()).expect("few") + 1;
            SignedDuration::from_secs(if random.chance(50) { seconds } else { -seconds })
        };
        let off = far(100 - RIGHT_AGAIN_PERCENT, &mut self.random);
        let hosts_off = far(HOSTS_WRONG_PERCENT, &mut self.random);
        self.sky.go_to(at);
        self.sky.leap(off, hosts_off);
    }

    /// Once a day every guest writes something.
    async fn pass_the_day(&mut self, life: &Life, now: Timestamp, tell: &mut dyn FnMut(Progress)) {
        let day = u32::try_from((now.as_second() - BEGIN_S) / 86_400).expect("few days");
        if day == self.progress.days {
            return;
        }
        let seq = life.store.head().await.expect("the head").seq;
        for id in &self.domains {
            let state = life.engine.load(*id).await.expect("the domain");
            let block = self.random.next_u64() % BLOCKS;
            let write = Write { seq, block, value: self.random.next_u64() | 1 };
            self.driver.write(&state, &disk(), block, write.value).expect("written");
            self.writes.entry(*id).or_default().push(write);
        }
        self.progress.days = day;
        self.progress.events = life.store.head().await.expect("the head").seq;
        tell(self.progress);
    }

    async fn audit(&self) -> Result<Audited, String> {
        let store = Store::open_reader(self.dir).expect("the store opens");
        let store = Arc::new(store);
        let audited = audit::audit(&store, &self.looked, &self.domains).await?;
        let engine = Engine::new(store).with_driver(DriverKind::Sim, Arc::new(self.driver.clone()));
        for id in &self.domains {
            let state = engine.load(*id).await.map_err(|error| error.to_string())?;
            let held = self.driver.snapshots(&state).map_err(|error| error.to_string())?;
            let nothing = Vec::new();
            let writes = self.writes.get(id).unwrap_or(&nothing);
            audit::end_of(&state, &held, writes, audited.left(*id))?;
        }
        Ok(audited)
    }
}

impl Life {
    /// Does what a daemon does until nothing is due or open. Says when something will be.
    async fn work(&mut self) -> Timestamp {
        loop {
            let tick = self.scheduler.tick().await.expect("a look");
            let failed = |notable: &&Notable| {
                !matches!(notable, Notable::ClockLeapt { .. } | Notable::ClockBelieved { .. })
            };
            assert_eq!(tick.notable.iter().find(failed), None, "nothing fails");
            for domain in &tick.woken {
                self.engine.drive(&requester(), *domain, &NoWatch).await.expect("driven");
            }
            let next = tick.next_at.expect("policies that run for ever");
            if tick.woken.is_empty() && next > self.engine.now() {
                return next;
            }
        }
    }
}
