//! Policies through the real engine, store and simulated hypervisor, with a clock of the tests' own; and the commands by
//! the built program.

#![allow(clippy::expect_used, reason = "these are tests")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use snaptree_drivers::sim::{Direction, Fault, FaultPoint, Faults, SimDriver};
use snaptree_engine::command::{Command, Create, SnapshotRef};
use snaptree_engine::domain::DriverKind;
use snaptree_engine::driver::{Hooks, NoHooks, NoWatch, Registration};
use snaptree_engine::engine::{Clock, Engine, Requester, Settings};
use snaptree_engine::event::{Actor, Event, Origin};
use snaptree_engine::log::{EventFilter, EventLog};
use snaptree_engine::{DomainId, DomainName, PolicyName};
use snaptree_policies::file::Policy;
use snaptree_policies::retention::{LongRun, Trust, long_run};
use snaptree_policies::runner::{
    Book, Entry, Firing, For, Notable, Scheduler, chosen, define, fire, plan_of, resume, told,
};
use snaptree_store::{LockWait, Store};
use snaptree_tests::daemon::Daemon;
use snaptree_tests::images::tool;
use snaptree_tests::program::Program;

/// A clock that stands until it is set.
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

/// Refuses every step of the kinds `create` or `delete` while that is on.
#[derive(Default)]
struct Refusing {
    creates: AtomicBool,
    deletes: AtomicBool,
}

#[async_trait]
impl Faults for Refusing {
    fn fault(&self, point: &FaultPoint) -> Option<Fault> {
        let refused = match point.word {
            "create" => &self.creates,
            "delete" => &self.deletes,
            _ => return None,
        };
        let forward = point.direction == Direction::Forward;
        (forward && refused.load(Ordering::SeqCst)).then_some(Fault::Permanent)
    }
}

/// Panics when any place is reached for the n-th time: the end of a process, as far as the state can tell.
struct DieAt {
    left: AtomicU64,
}

impl Hooks for DieAt {
    fn reached(&self, name: &str) {
        assert!(self.left.fetch_sub(1, Ordering::SeqCst) != 1, "killed at {name}");
    }
}

/// A state with machines of the simulated hypervisor.
struct Lab {
    folder: tempfile::TempDir,
    store: Arc<Store>,
    clock: Arc<Standing>,
    faults: Arc<Refusing>,
    domains: Vec<DomainId>,
}

fn at(text: &str) -> Timestamp {
    text.parse().expect("a time")
}

fn origin() -> Origin {
    Origin { uid: 0, host: "h".to_owned(), pid: 1, via: "test".to_owned(), sudo_user: None }
}

fn ada() -> Requester {
    Requester { actor: Actor::User("ada".to_owned()), origin: origin() }
}

impl Lab {
    async fn new(domains: usize) -> Self {
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder");
        let store = Store::open_writer(folder.path(), LockWait { timeout: Duration::ZERO }).expect("a state");
        let clock = Arc::new(Standing(Mutex::new(at("2026-01-01T00:00:30Z"))));
        let faults = Arc::new(Refusing::default());
        let mut lab = Self { folder, store: Arc::new(store), clock, faults, domains: Vec::new() };
        for number in 1..=domains {
            lab.register(&format!("web-{number}"), Value::Null).await;
        }
        lab
    }

    async fn register(&mut self, name: &str, options: Value) {
        let registration = Registration {
            id: DomainId::from_uuid(uuid::Uuid::now_v7()),
            name: DomainName::new(name).expect("a name"),
            driver: DriverKind::Sim,
            disks: vec![],
            options,
            taken: BTreeMap::default(),
        };
        let engine = self.engine(Arc::new(NoHooks));
        let (domain, _) =
            engine.register(&ada(), registration, BTreeMap::default()).await.expect("registered");
        self.domains.push(domain.id);
    }

    /// An engine that remembers nothing, as after a start.
    fn engine(&self, hooks: Arc<dyn Hooks>) -> Engine {
        let driver = SimDriver::new(self.folder.path().to_owned()).with_faults(self.faults.clone());
        Engine::new(self.store.clone())
            .with_driver(DriverKind::Sim, Arc::new(driver))
            .with_settings(Settings { attempts_max: 1, ..Settings::default() })
            .with_clock(self.clock.clone())
            .with_hooks(hooks)
    }

    async fn set(&self, policy: &str) {
        let engine = self.engine(Arc::new(NoHooks));
        define(&engine, &ada(), &mut Book::default(), policy).await.expect("a policy");
    }

    fn go_to(&self, time: Timestamp) {
        *self.clock.0.lock().expect("no test panics with it") = time;
    }

    /// What a process that starts now does until nothing is due or open; says what it had to tell.
    async fn life(&self, hooks: Arc<dyn Hooks>) -> Vec<Notable> {
        let engine = self.engine(hooks);
        engine.recover(&ada(), &NoWatch).await.expect("recovered");
        let mut scheduler = Scheduler::new(engine.clone(), origin()).await.expect("a scheduler");
        let mut notable = Vec::new();
        self.live(&engine, &mut scheduler, &mut notable).await;
        notable
    }

    async fn live(&self, engine: &Engine, scheduler: &mut Scheduler, notable: &mut Vec<Notable>) {
        loop {
            let tick = scheduler.tick().await.expect("a look");
            for domain in &tick.woken {
                engine.drive(&ada(), *domain, &NoWatch).await.expect("driven");
            }
            let told = !tick.notable.is_empty();
            notable.extend(tick.notable);
            let again = tick.next_at.is_some_and(|next| next <= engine.now());
            if tick.woken.is_empty() && !told && !again {
                return;
            }
        }
    }

    async fn book(&self) -> Book {
        Book::read(&self.engine(Arc::new(NoHooks))).await.expect("the log")
    }

    /// The planned instants that ran on a domain, in the order of the log.
    async fn ran(&self, domain: usize) -> Vec<String> {
        let planned = |entry| match entry {
            Entry::Ran(run) if run.domain == self.domains[domain] => Some(run.planned.to_string()),
            _ => None,
        };
        self.entries().await.into_iter().filter_map(planned).collect()
    }

    /// What ran and what was skipped, in the order of the log.
    async fn entries(&self) -> Vec<Entry> {
        let book = self.book().await;
        let state = book.find("p").expect("the policy");
        let mut told = told(&self.engine(Arc::new(NoHooks)), state, usize::MAX).await.expect("the log");
        told.reverse();
        told
    }

    async fn skipped(&self) -> Vec<(u32, String)> {
        let skip = |entry: Entry| match entry {
            Entry::Skipped(skip) => Some((skip.skipped.count, skip.skipped.why)),
            Entry::Ran(_) => None,
        };
        self.entries().await.into_iter().filter_map(skip).collect()
    }

    async fn snapshots(&self, domain: usize) -> Vec<String> {
        let state = self.engine(Arc::new(NoHooks)).load(self.domains[domain]).await.expect("the domain");
        assert!(state.open.is_empty(), "{:?}", state.open);
        let mut snapshots: Vec<_> =
            state.tree.iter().map(|snapshot| (snapshot.created, snapshot.name.to_string())).collect();
        snapshots.sort();
        snapshots.into_iter().map(|(_, name)| name).collect()
    }

    async fn events(&self, kind: &str) -> usize {
        let filter = EventFilter { kind: Some(kind.to_owned()), ..EventFilter::default() };
        self.store.read(0, &filter, usize::MAX >> 1).await.expect("the log").len()
    }
}

const HOURLY: &str = "name = \"p\"\ndomains = [\"web-*\"]\nschedule = \"every 1h\"\n[keep]\nlast = 2\n";

#[tokio::test]
async fn a_due_run_happens_once_on_each_domain_however_often_it_is_looked_for() {
    let lab = Lab::new(3).await;
    lab.set(HOURLY).await;
    assert_eq!(lab.life(Arc::new(NoHooks)).await, []);
    assert_eq!(lab.ran(0).await, [""; 0], "nothing before the policy was defined");
    lab.go_to(at("2026-01-01T01:00:00Z"));
    for _ in 0..3 {
        lab.life(Arc::new(NoHooks)).await;
    }
    for domain in 0..3 {
        assert_eq!(lab.ran(domain).await, ["2026-01-01T01:00:00Z"]);
        assert_eq!(lab.snapshots(domain).await, ["p-20260101T010000Z"]);
    }
    assert_eq!(lab.events("Policy.Fired").await, 1, "one run, with all its domains");
}

#[tokio::test]
async fn killed_at_every_place_a_run_and_its_deletes_happen_once() {
    let mut deaths = 0;
    for place in 1.. {
        let lab = Lab::new(2).await;
        lab.set(HOURLY).await;
        for hour in 1..=2 {
            lab.go_to(at("2026-01-01T00:00:00Z") + SignedDuration::from_hours(hour));
            lab.life(Arc::new(NoHooks)).await;
        }
        lab.go_to(at("2026-01-01T03:00:00Z"));
        let lab = Arc::new(lab);
        let dying = Arc::clone(&lab);
        let life =
            tokio::spawn(async move { dying.life(Arc::new(DieAt { left: AtomicU64::new(place) })).await });
        let survived = life.await.is_ok();
        lab.life(Arc::new(NoHooks)).await;
        for domain in 0..2 {
            let all: Vec<String> = (1..=3).map(|hour| format!("2026-01-01T0{hour}:00:00Z")).collect();
            assert_eq!(lab.ran(domain).await, all, "killed at place {place}");
            let kept = ["p-20260101T020000Z", "p-20260101T030000Z"];
            assert_eq!(lab.snapshots(domain).await, kept, "killed at place {place}");
        }
        assert_eq!(lab.events("Snapshot.CreateRequested").await, 6, "killed at place {place}");
        assert_eq!(lab.events("Snapshot.DeleteRequested").await, 2, "killed at place {place}");
        if survived {
            break;
        }
        deaths += 1;
    }
    assert!(deaths > 20, "{deaths} places");
}

#[tokio::test]
async fn after_a_week_the_last_run_stands_for_all_or_is_left_out_as_the_policy_says() {
    for (rule, ran, skipped) in [
        ("catch-up = \"once\"", vec!["2026-01-08T00:00:00Z"], vec![(167, "caught-up".to_owned())]),
        ("catch-up = \"none\"", vec![], vec![(168, "no-catch-up".to_owned())]),
        ("window = \"10m\"", vec![], vec![(168, "too-late".to_owned())]),
    ] {
        let lab = Lab::new(1).await;
        lab.set(&HOURLY.replace("[keep]", &format!("{rule}\n[keep]"))).await;
        lab.go_to(at("2026-01-08T00:30:00Z"));
        lab.life(Arc::new(NoHooks)).await;
        lab.life(Arc::new(NoHooks)).await;
        assert_eq!(lab.ran(0).await, ran, "{rule}");
        assert_eq!(lab.skipped().await, skipped, "{rule}");
    }
}

#[tokio::test]
async fn a_clock_that_jumps_ahead_and_back_neither_loses_nor_doubles_a_run() {
    let lab = Lab::new(1).await;
    lab.set(HOURLY).await;
    for time in ["01:00:00", "02:00:00", "01:30:00", "02:00:00", "03:00:00"] {
        lab.go_to(at(&format!("2026-01-01T{time}Z")));
        lab.life(Arc::new(NoHooks)).await;
    }
    // A day ahead by mistake, and back.
    for time in
        ["2026-01-02T04:00:00Z", "2026-01-01T04:00:00Z", "2026-01-01T05:00:00Z", "2026-01-02T04:30:00Z"]
    {
        lab.go_to(at(time));
        lab.life(Arc::new(NoHooks)).await;
    }
    let mut ran = lab.ran(0).await;
    ran.sort();
    let expected =
        ["01T01", "01T02", "01T03", "01T04", "01T05", "02T04"].map(|time| format!("2026-01-{time}:00:00Z"));
    assert_eq!(ran, expected);
}

#[tokio::test]
async fn a_run_that_failed_deletes_nothing_and_many_in_a_row_suspend_the_policy() {
    let lab = Lab::new(2).await;
    lab.set(&HOURLY.replace("[keep]", "suspend-after = 3\n[keep]")).await;
    let mut notable = Vec::new();
    for hour in 1..=7 {
        lab.faults.creates.store(hour > 2, Ordering::SeqCst);
        lab.go_to(at("2026-01-01T00:00:00Z") + SignedDuration::from_hours(hour));
        notable.extend(lab.life(Arc::new(NoHooks)).await);
    }
    assert_eq!(lab.ran(0).await.len(), 5, "two that succeeded, three that failed, then none");
    assert_eq!(lab.snapshots(0).await, ["p-20260101T010000Z", "p-20260101T020000Z"]);
    let failed = notable.iter().filter(|notable| matches!(notable, Notable::Failed { .. })).count();
    let suspended = notable.iter().filter(|notable| matches!(notable, Notable::Suspended { .. })).count();
    assert_eq!((failed, suspended), (6, 1), "{notable:?}");
    let book = lab.book().await;
    let reason = &book.find("p").expect("the policy").suspended.as_ref().expect("suspended").reason;
    assert_eq!(reason, "3 runs in a row took no snapshot");

    // Resumed, it runs from then on, and retention goes on.
    lab.faults.creates.store(false, Ordering::SeqCst);
    let engine = lab.engine(Arc::new(NoHooks));
    resume(&engine, &ada(), &mut Book::default(), "p").await.expect("resumed");
    lab.life(Arc::new(NoHooks)).await;
    assert_eq!(lab.ran(0).await.len(), 5, "what it missed does not run");
    lab.go_to(at("2026-01-01T08:00:00Z"));
    lab.life(Arc::new(NoHooks)).await;
    assert_eq!(lab.snapshots(0).await, ["p-20260101T020000Z", "p-20260101T080000Z"]);
}

#[tokio::test]
async fn a_delete_that_fails_is_told_of_once_and_asked_for_again_by_the_next_run() {
    let lab = Lab::new(1).await;
    lab.set(HOURLY).await;
    let mut notable = Vec::new();
    for hour in 1..=4 {
        lab.faults.deletes.store(hour == 3, Ordering::SeqCst);
        lab.go_to(at("2026-01-01T00:00:00Z") + SignedDuration::from_hours(hour));
        notable.extend(lab.life(Arc::new(NoHooks)).await);
        // A start has nothing to tell of what was told before.
        notable.extend(lab.life(Arc::new(NoHooks)).await);
    }
    let told = notable.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(
        told,
        ["snapshot 'p-20260101T010000Z' of web-1 was not deleted: failed: a fault on demand: permanent"]
    );
    assert_eq!(lab.snapshots(0).await, ["p-20260101T030000Z", "p-20260101T040000Z"]);
}

#[tokio::test]
async fn what_is_held_or_was_made_by_others_stays_and_a_domain_that_refuses_keeps_no_other_back() {
    let mut lab = Lab::new(2).await;
    // One that cannot be quiesced.
    lab.register("web-3", serde_json::json!({ "profile": "virtualbox" })).await;
    lab.set(&HOURLY.replace("[keep]", "[snapshot]\nquiesce = true\n[keep]")).await;
    let engine = lab.engine(Arc::new(NoHooks));
    let foreign = Create { name: Some("mine".parse().expect("a name")), ..Default::default() };
    engine.submit(&ada(), lab.domains[0], &Command::Create(foreign), None).await.expect("asked");
    engine.drive(&ada(), lab.domains[0], &NoWatch).await.expect("driven");
    // The name that the second domain's run would have is taken.
    let taken = Create { name: Some("p-20260101T020000Z".parse().expect("a name")), ..Default::default() };
    engine.submit(&ada(), lab.domains[1], &Command::Create(taken), None).await.expect("asked");
    engine.drive(&ada(), lab.domains[1], &NoWatch).await.expect("driven");
    for hour in 1..=4 {
        lab.go_to(at("2026-01-01T00:00:00Z") + SignedDuration::from_hours(hour));
        let notable = lab.life(Arc::new(NoHooks)).await;
        let told = matches!(&*notable, [Notable::Failed { domain, why, .. }]
            if why.starts_with("refused: ") && domain.as_str() == "web-3");
        assert!(told, "{notable:?}");
        if hour == 1 {
            let hold = Command::Hold {
                snapshot: SnapshotRef::Name("p-20260101T010000Z".parse().expect("a name")),
                reason: "evidence".to_owned(),
                until: None,
            };
            engine.submit(&ada(), lab.domains[0], &hold, None).await.expect("held");
        }
    }
    let hours =
        |hours: &[u32]| hours.iter().map(|hour| format!("p-20260101T0{hour}0000Z")).collect::<Vec<_>>();
    assert_eq!(lab.snapshots(0).await, [vec!["mine".to_owned()], hours(&[1, 3, 4])].concat());
    assert_eq!(
        lab.snapshots(1).await,
        [hours(&[2]), hours(&[3, 4])].concat(),
        "the foreign one is there still, and the run's own, which had another name, is gone"
    );
    let filter = EventFilter { kind: Some("Snapshot.Created".to_owned()), ..EventFilter::default() };
    let created = lab.store.read(0, &filter, 100).await.expect("the log");
    let names = created.iter().filter_map(|envelope| match &envelope.event {
        Event::SnapshotCreated(e) => Some(e.snapshot.name.as_str()),
        _ => None,
    });
    assert_eq!(names.filter(|name| *name == "p-20260101T020000Z-2").count(), 1);
}

#[tokio::test]
async fn a_delete_of_a_policy_says_why_and_in_whose_name() {
    let lab = Lab::new(1).await;
    lab.set(HOURLY).await;
    for hour in 1..=3 {
        lab.go_to(at("2026-01-01T00:00:00Z") + SignedDuration::from_hours(hour));
        lab.life(Arc::new(NoHooks)).await;
    }
    let filter = EventFilter { kind: Some("Snapshot.DeleteRequested".to_owned()), ..EventFilter::default() };
    let deletes = lab.store.read(0, &filter, 10).await.expect("the log");
    let [delete] = &*deletes else { panic!("{deletes:?}") };
    assert_eq!(delete.actor, Actor::Policy(PolicyName::new("p").expect("a name")));
    let Event::SnapshotDeleteRequested(request) = &delete.event else { panic!("{delete:?}") };
    assert_eq!(request.reasons, ["last 2: full with newer ones"]);
    let key = delete.key.as_deref().expect("a key");
    assert!(key.starts_with(&format!("p/2026-01-01T03:00:00Z/{}/delete/", lab.domains[0])), "{key}");
}

/// Runs `days` of an hourly policy with crashes in between, and compares what is there with what was foretold.
async fn many_days(days: i64) {
    let policy = "name = \"p\"\ndomains = [\"web-*\"]\nschedule = \"hourly\"\ntimezone = \"Europe/Vienna\"\n[keep]\nlast = 3\nhourly = 12\ndaily = 7\nweekly = 3\n";
    let lab = Lab::new(1).await;
    lab.set(policy).await;
    let policy = Policy::from_toml(policy).expect("a policy");
    let begin = at("2026-01-01T00:00:00Z");
    let LongRun::Levels { snapshots: foretold } =
        long_run(&policy.schedule, &policy.keep, begin, policy.zone())
    else {
        panic!("it levels off")
    };
    let mut engine = lab.engine(Arc::new(NoHooks));
    let mut scheduler = Scheduler::new(engine.clone(), origin()).await.expect("a scheduler");
    let mut most = 0;
    for hour in 1..=days * 24 {
        lab.go_to(begin + SignedDuration::from_hours(hour));
        if hour % 500 == 0 {
            let place = u64::try_from(hour / 500).expect("a number");
            let dying = lab.engine(Arc::new(DieAt { left: AtomicU64::new(place) }));
            let mut doomed = Scheduler::new(dying.clone(), origin()).await.expect("a scheduler");
            let crash = tokio::spawn(async move {
                let tick = doomed.tick().await.expect("a look");
                for domain in tick.woken {
                    dying.drive(&ada(), domain, &NoWatch).await.expect("driven");
                }
            });
            let _ = crash.await;
            engine = lab.engine(Arc::new(NoHooks));
            engine.recover(&ada(), &NoWatch).await.expect("recovered");
            scheduler = Scheduler::new(engine.clone(), origin()).await.expect("a scheduler");
        }
        lab.live(&engine, &mut scheduler, &mut Vec::new()).await;
        let state = engine.load(lab.domains[0]).await.expect("the domain");
        if hour > days * 24 - 24 * 28 {
            most = most.max(state.tree.len());
        }
        if hour % 97 == 0 {
            assert_eq!(
                plan_of(&policy, &state, engine.now(), For::Show, Trust::Sound).deletes,
                [],
                "planning twice changes nothing"
            );
        }
    }
    let runs = usize::try_from(days * 24).expect("a number");
    assert_eq!(lab.events("Snapshot.Created").await, runs, "every hour, once");
    assert_eq!(lab.events("Snapshot.Deleted").await + lab.snapshots(0).await.len(), runs);
    assert!(most <= foretold && most + 1 >= foretold, "{most} were there, {foretold} were foretold");
}

#[tokio::test]
async fn two_months_end_with_as_many_snapshots_as_the_plan_foretold() {
    many_days(60).await;
}

#[tokio::test]
#[ignore = "minutes: a year of hours"]
async fn a_year_ends_with_as_many_snapshots_as_the_plan_foretold() {
    many_days(365).await;
}

fn hourly_file(folder: &Path, text: &str) -> String {
    let file = folder.join("policy.toml");
    std::fs::write(&file, text).expect("written");
    file.to_str().expect("a path of the tests").to_owned()
}

#[test]
fn the_commands_on_policies_give_the_documented_json() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = Program::new(folder.path().join("state"));
    program.json(0, &["domain", "add", "web-1", "--driver", "sim", "--label", "tier=prod"]);
    program.json(0, &["domain", "add", "db", "--driver", "sim"]);
    let yearly =
        "name = \"yearly\"\nlabels = { tier = \"prod\" }\nschedule = \"2190-01-01\"\n[keep]\nlast = 1\n";
    let file = hourly_file(folder.path(), yearly);
    let mut told = vec![("set --dry-run", program.json(0, &["policy", "set", &file, "--dry-run"]))];
    assert_eq!(program.json(0, &["policy", "list"])["policies"], serde_json::json!([]));
    told.push(("set", program.json(0, &["policy", "set", &file])));
    told.push(("list", program.json(0, &["policy", "list"])));
    told.push(("show", program.json(0, &["policy", "show", "yearly"])));
    told.push(("run", program.json(0, &["policy", "run", "yearly"])));
    told.push(("plan", program.json(0, &["policy", "plan", "yearly", "web-1"])));
    hourly_file(folder.path(), &yearly.replace("last = 1", "last = 2\nmax-age = \"1y\""));
    told.push(("set again", program.json(0, &["policy", "set", &file])));
    told.push(("next", program.json(0, &["policy", "next", "--count", "2"])));
    told.push(("suspend", program.json(0, &["policy", "suspend", "yearly", "--reason", "a test"])));
    told.push(("list", program.json(0, &["policy", "list"])));
    told.push(("resume", program.json(0, &["policy", "resume", "yearly"])));
    told.push(("runs", program.json(0, &["policy", "runs", "yearly"])));
    told.push(("remove", program.json(0, &["policy", "remove", "yearly"])));
    let text: String = told.iter().map(|(command, answer)| format!("{command}\n{answer:#}\n\n")).collect();
    insta::with_settings!({filters => vec![
        (r"\d{8}T\d{6}Z", "[TIME]"),
        (r#""20[0-8]\d-\d\d-\d\dT[^"]*Z""#, "\"[AT]\""),
        (r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f-]{21}", "[ID]"),
        (r"user:[a-z0-9_-]+", "user:[NAME]"),
    ]}, {
        insta::assert_snapshot!(text);
    });
}

#[test]
fn through_a_daemon_the_commands_on_policies_do_the_same() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = Program::new(folder.path().join("state"));
    program.json(0, &["domain", "add", "web-1", "--driver", "sim"]);
    let _daemon = Daemon::start(&program);
    let file =
        hourly_file(folder.path(), &HOURLY.replace("every 1h", "2190-01-01").replace("last = 2", "last = 1"));
    assert_eq!(program.json(0, &["policy", "set", &file])["change"], "new");
    let first = program.json(0, &["policy", "run", "p"]);
    let run = &first["runs"][0];
    assert_eq!((&run["outcome"], &run["deletes"]), (&"succeeded".into(), &serde_json::json!([])), "{first}");
    let first_name = run["snapshot"].as_str().expect("a name");
    let second = program.json(0, &["policy", "run", "p", "web-1"]);
    let deleted = &second["runs"][0]["deletes"][0];
    assert_eq!(
        (&deleted["snapshot"], &deleted["outcome"]),
        (&first_name.into(), &"succeeded".into()),
        "{second}"
    );
    program.json(0, &["policy", "suspend", "p", "--reason", "x"]);
    program.json(0, &["policy", "resume", "p"]);
    let log = program.run(&["log", "--kind", "Policy.", "--json"]).stdout;
    assert!(log.contains("\"via\":\"socket\""), "{log}");
    program.json(0, &["policy", "remove", "p"]);
    assert_eq!(program.json(3, &["policy", "run", "p"])["error"]["code"], "not-found");
}

#[test]
fn a_program_is_told_of_a_run_that_took_no_snapshot() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = Program::new(folder.path().join("state"));
    program.json(0, &["domain", "add", "web-1", "--driver", "sim"]);
    let pipe = folder.path().join("pipe");
    tool("mkfifo", &[pipe.to_str().expect("a path of the tests")]);
    let script = "test \"$SNAPTREE_OUTCOME $SNAPTREE_DOMAIN\" = 'failure web-1' && cat > \"$0\"";
    let command = serde_json::json!(["/bin/sh", "-c", script, pipe]);
    // Nothing may go, and the disk may stand upon one snapshot alone.
    let policy = format!(
        "name = \"p\"\ndomains = [\"web-*\"]\nschedule = \"every 1s\"\nmax-depth = 1\n[notify]\ncommand = {command}\n"
    );
    let file = hourly_file(folder.path(), &policy);
    program.json(0, &["policy", "set", &file]);
    let _daemon = Daemon::start(&program);
    let told = std::fs::read_to_string(&pipe).expect("the program's words");
    let told: Value = serde_json::from_str(told.lines().next().expect("a line")).expect("JSON");
    assert_eq!((&told["policy"], &told["domain"]), (&"p".into(), &"web-1".into()), "{told}");
    assert_eq!((&told["occasion"], &told["suspended"]), (&"failure".into(), &false.into()), "{told}");
    assert!(told["message"].as_str().expect("words").contains("max-depth is 1"), "{told}");
}

#[test]
fn what_cannot_be_asked_of_policies_is_refused_with_its_reason() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = Program::new(folder.path().join("state"));
    program.json(0, &["domain", "add", "web-1", "--driver", "sim"]);
    let file = hourly_file(folder.path(), HOURLY);
    program.json(0, &["policy", "set", &file]);
    let says = |code: i32, args: &[&str], words: &str| {
        let answer = program.json(code, args);
        let message = answer["error"]["message"].as_str().expect("a message");
        assert!(message.contains(words), "{args:?}: {message}");
    };
    says(3, &["policy", "show", "q"], "there is no policy 'q'");
    says(3, &["policy", "run", "p", "web-9"], "there is no domain 'web-9'");
    program.json(0, &["domain", "add", "db", "--driver", "sim"]);
    says(4, &["policy", "run", "p", "db"], "policy 'p' is not for domain 'db'");
    says(4, &["policy", "resume", "p"], "is not suspended");
    program.json(0, &["policy", "suspend", "p", "--reason", "x"]);
    says(4, &["policy", "suspend", "p", "--reason", "y"], "suspended already: x");
    program.json(0, &["policy", "remove", "p"]);
    says(3, &["policy", "run", "p"], "there is no policy 'p'");
    for (text, words) in
        [("name = \"p\"", "line 1"), ("name = \"p\"\ndomains = [\"*\"]\nschedul = \"hourly\"\n", "schedule")]
    {
        let file = hourly_file(folder.path(), text);
        says(4, &["policy", "set", &file], words);
    }
}

#[test]
fn a_daemon_that_is_killed_again_and_again_takes_each_planned_snapshot_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = Program::new(folder.path().join("state"));
    for name in ["web-1", "web-2"] {
        program.json(0, &["domain", "add", name, "--driver", "sim"]);
    }
    let file = hourly_file(folder.path(), &HOURLY.replace("1h", "1s"));
    program.json(0, &["policy", "set", &file]);
    for fault in
        ["append.before@1", "append.after@2", "append.after@5", "sim.create.after@2", "append.before@9"]
    {
        let ran = program.with_fault(&format!("{fault}=kill")).run(&["serve"]);
        assert_eq!(ran.code, None, "killed by a signal: {ran:?}");
    }
    program.json(0, &["policy", "suspend", "p", "--reason", "enough"]);
    program.json(0, &["recover"]);
    let runs = program.json(0, &["policy", "runs", "--count", "1000"]);
    let mut seen = BTreeMap::new();
    for run in runs["runs"].as_array().expect("runs").iter().filter(|run| run["what"] == "ran") {
        assert_eq!(run["outcome"], "succeeded", "{run}");
        let key = (run["domain"].to_string(), run["planned"].to_string());
        assert_eq!(seen.insert(key, ()), None, "{run}");
    }
    let created = program.run(&["log", "--kind", "Snapshot.Created", "--json"]).stdout.lines().count();
    assert_eq!(created, seen.len());
    assert!(created >= 4, "{runs:#}");
    program.json(0, &["audit", "verify"]);
}

#[test]
fn runs_that_fail_in_the_foreground_suspend_the_policy_too() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = Program::new(folder.path().join("state"));
    program.json(0, &["domain", "add", "web-1", "--driver", "sim"]);
    let policy =
        "name = \"p\"\ndomains = [\"*\"]\nschedule = \"2190-01-01\"\nmax-depth = 1\nsuspend-after = 2\n";
    program.json(0, &["policy", "set", &hourly_file(folder.path(), policy)]);
    // The disk may stand upon one snapshot, and nothing may go: from the second run on, each fails.
    assert_eq!(program.json(0, &["policy", "run", "p"])["suspended"], Value::Null);
    assert_eq!(program.json(4, &["policy", "run", "p"])["suspended"], Value::Null);
    let ran = program.run(&["policy", "run", "p", "--json"]);
    assert_eq!(ran.code, Some(4), "{ran:?}");
    assert_eq!(ran.json()["suspended"], "2 runs in a row took no snapshot");
    assert!(ran.stderr.contains("`snaptree policy resume p`"), "{ran:?}");
    let list = program.json(0, &["policy", "list"]);
    assert_eq!(list["policies"][0]["suspended"], "2 runs in a row took no snapshot");
    // Resumed, the count begins anew.
    program.json(0, &["policy", "resume", "p"]);
    assert_eq!(program.json(4, &["policy", "run", "p"])["suspended"], Value::Null);
}

#[tokio::test]
async fn a_second_run_within_a_second_takes_the_next_free_name() {
    let lab = Lab::new(1).await;
    lab.set(&HOURLY.replace("last = 2", "last = 9")).await;
    let engine = lab.engine(Arc::new(NoHooks));
    let book = Book::read(&engine).await.expect("read");
    let state = book.find("p").expect("the policy");
    let policy = state.policy().expect("it can be read");
    let domains = chosen(&engine, policy).await.expect("chosen");
    let by = Actor::User("ada".to_owned());
    let mut names = Vec::new();
    for micros in [0, 1, 400_000] {
        let book = Book::read(&engine).await.expect("read");
        let planned = at("2026-03-01T00:00:00Z") + SignedDuration::from_micros(micros);
        let firing = Firing { planned, asked_by: Some(&by), domains: &domains, skipped: &[] };
        let state = book.find("p").expect("the policy");
        let ran = fire(&engine, &origin(), state, policy, firing).await.expect("fired");
        assert!(ran[0].operation().is_some(), "{ran:?}");
        names.push(ran[0].request.snapshot.clone());
    }
    assert_eq!(names, ["p-20260301T000000Z", "p-20260301T000000Z-2", "p-20260301T000000Z-3"]);
}
