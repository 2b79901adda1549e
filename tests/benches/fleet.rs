//! Many domains: a thousand operations at once beside the least time that they can take, and what ten thousand
//! domains cost a daemon that has nothing to do.

#![allow(missing_docs, clippy::expect_used, reason = "a bench binary")]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use snaptree_drivers::sim::{Fault, FaultPoint, Faults, SimDriver};
use snaptree_engine::command::{Command, Create};
use snaptree_engine::domain::DriverKind;
use snaptree_engine::driver::Registration;
use snaptree_engine::engine::{Engine, Requester, Settings};
use snaptree_engine::event::{Actor, Origin};
use snaptree_engine::reconcile::dispatch::{Dispatcher, Following, Notice};
use snaptree_engine::{DomainId, DomainName};
use snaptree_store::{LockWait, Store};
use snaptree_tests::program::Program;
use tokio::task::JoinSet;

const DOMAINS: usize = 1_000;
const AT_ONCE: usize = 100;
const STEP: Duration = Duration::from_millis(50);
const ROUNDS: usize = 5;
const IDLE_DOMAINS: usize = 10_000;
const IDLE: Duration = Duration::from_secs(20);

/// Every step takes as long.
struct Slow;

#[async_trait]
impl Faults for Slow {
    fn fault(&self, _point: &FaultPoint) -> Option<Fault> {
        None
    }

    async fn latency(&self, _point: &FaultPoint) {
        tokio::time::sleep(STEP).await;
    }
}

fn requester() -> Requester {
    let origin = Origin { uid: 0, host: "bench".to_owned(), pid: 1, via: "cli".to_owned(), sudo_user: None };
    Requester { actor: Actor::User("bench".to_owned()), origin }
}

fn engine(state: &Path) -> Engine {
    let store = Store::open_writer(state, LockWait { timeout: Duration::ZERO }).expect("a store");
    let settings =
        Settings { concurrency_max: AT_ONCE, concurrency_per_connection_max: AT_ONCE, ..Settings::default() };
    let driver = SimDriver::new(state.to_owned()).with_faults(Arc::new(Slow));
    Engine::new(Arc::new(store)).with_driver(DriverKind::Sim, Arc::new(driver)).with_settings(settings)
}

async fn register(engine: &Engine, count: usize, profile: &str) -> Vec<DomainId> {
    let mut tasks = JoinSet::new();
    for number in 0..count {
        let registration = Registration {
            id: engine.fresh_domain_id(),
            name: DomainName::new(format!("vm-{number}")).expect("a name"),
            driver: DriverKind::Sim,
            disks: Vec::new(),
            options: serde_json::json!({ "profile": profile }),
            taken: Default::default(),
        };
        let engine = engine.clone();
        tasks.spawn(async move {
            engine.register(&requester(), registration, Default::default()).await.expect("registered").0.id
        });
    }
    tasks.join_all().await
}

/// One snapshot of each domain; says how long that took, and how much CPU time.
async fn snapshot_all(dispatcher: &Dispatcher, domains: &[DomainId]) -> (Duration, Duration) {
    let begun = Instant::now();
    let ticks = cpu_ticks(std::process::id());
    let mut tasks = JoinSet::new();
    for domain in domains {
        let (dispatcher, domain) = (dispatcher.clone(), *domain);
        tasks.spawn(async move {
            let command = Command::Create(Create::default());
            dispatcher.submit(&requester(), domain, &command, None).await.expect("accepted");
            let Following::Running(mut notices) = dispatcher.follow(domain) else { return };
            while !matches!(notices.recv().await, Ok(Notice::Rested(_)) | Err(_)) {}
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.expect("a task");
    }
    (begun.elapsed(), TICK * u32::try_from(cpu_ticks(std::process::id()) - ticks).expect("a short time"))
}

/// A fresh fleet each time: one operation each.
async fn busy(folder: &Path, profile: &str) {
    let mut ratios = Vec::new();
    for round in 0..ROUNDS {
        let engine = engine(&folder.join(format!("{profile}-{round}")));
        let domains = register(&engine, DOMAINS, profile).await;
        let dispatcher = Dispatcher::new(&engine, requester());
        let (took, cpu) = snapshot_all(&dispatcher, &domains).await;
        let mut steps = 0;
        for domain in &domains {
            let state = engine.load(*domain).await.expect("a state");
            assert_eq!((state.tree.len(), state.open.len()), (1, 0), "every one has its snapshot");
            let made_in = state.tree.current().expect("a snapshot").made_in;
            let events =
                engine.operation_events(made_in.expect("made by an operation")).await.expect("events");
            steps += events.iter().filter(|event| event.event.kind() == "Operation.StepStarted").count();
        }
        let ideal = STEP.mul_f64(steps as f64 / AT_ONCE as f64);
        let ratio = took.as_secs_f64() / ideal.as_secs_f64();
        println!(
            "{DOMAINS} creates, profile {profile}, {AT_ONCE} at once: {steps} steps of {STEP:?}  \
             {:>7.0} ms, ideal {:>6.0} ms  x{ratio:.3}  ({:.2} ms of CPU an operation)",
            took.as_secs_f64() * 1e3,
            ideal.as_secs_f64() * 1e3,
            cpu.as_secs_f64() * 1e3 / DOMAINS as f64,
        );
        ratios.push(ratio);
    }
    ratios.sort_by(f64::total_cmp);
    println!(
        "  x{:.3} of the ideal at best, x{:.3} in the median (to be within x1.3)",
        ratios[0],
        ratios[ROUNDS / 2]
    );
}

/// What Linux counts CPU time in.
const TICK: Duration = Duration::from_millis(10);

/// User and system time of a process, in clock ticks.
fn cpu_ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process lives");
    let rest = stat.rsplit_once(") ").expect("its fields").1;
    rest.split(' ').skip(11).take(2).map(|ticks| ticks.parse::<u64>().expect("ticks")).sum()
}

/// What a daemon with many domains and nothing to do costs.
fn idle(folder: &Path) {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let state = folder.join("idle");
    runtime.block_on(async { register(&engine(&state), IDLE_DOMAINS, "qemu").await });
    drop(runtime);
    let program = Program::release(&state);
    let begun = Instant::now();
    let mut daemon =
        program.command(&["serve"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("it starts");
    let mut line = String::new();
    BufReader::new(daemon.stderr.take().expect("a pipe")).read_line(&mut line).expect("its log");
    println!("{IDLE_DOMAINS} domains: listening after {:.0} ms", begun.elapsed().as_secs_f64() * 1e3);
    // It looks once at every domain; then it is at rest.
    let mut before = cpu_ticks(daemon.id());
    loop {
        std::thread::sleep(Duration::from_secs(1));
        let now = cpu_ticks(daemon.id());
        if now == before && now > 0 {
            break;
        }
        before = now;
    }
    println!("{IDLE_DOMAINS} domains: {} ms of CPU to look at each once", before * 10);
    std::thread::sleep(IDLE);
    let ticks = cpu_ticks(daemon.id()) - before;
    let share = ticks as f64 / 100.0 / IDLE.as_secs_f64() * 100.0;
    println!("{IDLE_DOMAINS} domains, nothing to do: {share:.3} % of a core over {IDLE:?} (to be under 1 %)");
    daemon.kill().expect("it can be killed");
    daemon.wait().expect("it ends");
}

fn folder() -> tempfile::TempDir {
    // What is measured is Snaptree, not this machine's disk.
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder")
}

fn main() {
    let place: Option<PathBuf> = std::env::var_os("SNAPTREE_BENCH_DIR").map(PathBuf::from);
    let own = folder();
    let folder = place.as_deref().unwrap_or(own.path());
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        busy(folder, "default").await;
        busy(folder, "qemu").await;
    });
    drop(runtime);
    idle(folder);
}
