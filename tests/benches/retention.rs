//! Planning retention: for 100,000 snapshots, and beside `restic forget --dry-run` for as many as a restic repository
//! can be given in a minute or two.
//!
//! restic is looked for where `tests/lab/peers` puts it; without it only our own figures are printed. restic is a
//! process, which opens a repository and reads a file for each snapshot; ours is the function that `policy plan` and a
//! run call, on a tree that is in memory. So restic is also measured on a repository with one snapshot, and the second
//! ratio is about what comes with more snapshots alone.

#![allow(missing_docs, clippy::expect_used, reason = "a bench binary")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use snaptree_engine::SnapshotId;
use snaptree_policies::file::Policy;
use snaptree_policies::retention::{Candidate, File, Node, Shape, Standing, Trust};
use snaptree_tests::measure::{Times, processor_time, time};
use snaptree_tests::random::Random;
use uuid::Uuid;

const ROUNDS: usize = 20;
const MANY: usize = 100_000;
/// What a plan for so many may take.
const LIMIT: Duration = Duration::from_millis(100);
/// Snapshots that restic takes one by one, and how often it copies all that it has.
const RESTIC_TAKEN: usize = 32;
const RESTIC_DOUBLINGS: u32 = 8;
const RESTIC_ROUNDS: usize = 5;

const KEEP: [(&str, usize); 6] =
    [("last", 3), ("hourly", 24), ("daily", 7), ("weekly", 5), ("monthly", 12), ("yearly", 10)];

/// The last moment of the bench.
fn now() -> Timestamp {
    "2026-11-23T12:00:00Z".parse().expect("a time")
}

fn policy(keep: &str) -> Policy {
    let text = format!(
        "name = \"p\"\ndomains = [\"*\"]\nschedule = \"hourly\"\ntimezone = \"Europe/Vienna\"\nmax-depth = 10000\n\
         [keep]\n{keep}"
    );
    Policy::from_toml(&text).expect("a policy")
}

/// A chain of so many snapshots, one an hour, each with changes of some size.
fn chain(count: usize) -> (Vec<Candidate>, Shape) {
    let mut random = Random::new(1);
    let mut shape = Shape::default();
    let mut candidates = Vec::with_capacity(count);
    let first = now() - SignedDuration::from_hours(i64::try_from(count).expect("few"));
    let mut parent = None;
    for number in 1..=count {
        let id = SnapshotId::from_uuid(Uuid::from_u128((0x7 << 76) | (0b10 << 62) | number as u128));
        let bytes = 65_536 + random.next_u64() % (1 << 30);
        shape.nodes.insert(id, Node { parent, bytes, file: File::Layer });
        parent = Some(id);
        let created = first + SignedDuration::from_hours(i64::try_from(number).expect("few"));
        candidates.push(Candidate { snapshot: id, created, seq: number as u64, standing: Standing::Counted });
    }
    shape.current = parent;
    (candidates, shape)
}

/// What planning so often came to.
struct Planned {
    times: Times,
    /// How long a processor worked for one plan, on average: what a loaded machine does not change.
    worked: Duration,
    deletes: usize,
}

fn planned(policy: &Policy, count: usize) -> Planned {
    let (candidates, shape) = chain(count);
    let mut times = Times::default();
    let mut deletes = 0;
    let began = processor_time();
    for _ in 0..ROUNDS {
        let start = Instant::now();
        let plan = policy.plan(&candidates, &shape, now(), Trust::Sound);
        times.push(start.elapsed());
        deletes = plan.deletes.len() + plan.postponed.len();
    }
    let worked = (processor_time() - began) / u32::try_from(ROUNDS).expect("few");
    Planned { times, worked, deletes }
}

fn ours() {
    let usual: String = KEEP.iter().map(|(rule, count)| format!("{rule} = {count}\n")).collect();
    for (what, keep) in [
        ("the usual rules", usual.as_str()),
        ("every hour, as far as max-depth goes", "hourly = \"all\"\n"),
        ("5,000 hours, and every day", "hourly = 5000\ndaily = \"all\"\n"),
    ] {
        let Planned { times, worked, deletes } = planned(&policy(keep), MANY);
        times.print(&format!("{MANY} snapshots, {what}: {deletes} deletes"), None);
        let limit = LIMIT.as_secs_f64() * 1e3;
        let (ratio, worked) = (times.median_ms() / limit, worked.as_secs_f64() * 1e3);
        println!("{:<58} x{ratio:.2} of the {limit} ms that it may take; processor: {worked:.1} ms", "");
    }
}

fn restic() -> Option<PathBuf> {
    let peers = std::env::var_os("SNAPTREE_PEERS")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/lab/peers"), PathBuf::from);
    Some(peers.join("root/usr/bin/restic")).filter(|program| program.exists())
}

/// A repository of restic's.
struct Repository<'a> {
    restic: &'a Path,
    folder: tempfile::TempDir,
}

impl<'a> Repository<'a> {
    fn new(restic: &'a Path) -> Self {
        // Where fsync costs nothing, if there is such a place.
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder");
        std::fs::write(folder.path().join("file"), "").expect("written");
        let repository = Self { restic, folder };
        time(&mut repository.command(&["init", "--quiet"]));
        repository
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.restic);
        command
            .args(args)
            .env("RESTIC_REPOSITORY", self.folder.path().join("repository"))
            .env("RESTIC_CACHE_DIR", self.folder.path().join("cache"))
            .env("RESTIC_PASSWORD", "x")
            .env("TZ", "Europe/Vienna");
        command
    }

    fn take(&self, at: Timestamp) {
        let file = self.folder.path().join("file");
        let at = at.strftime("%Y-%m-%d %H:%M:%S").to_string();
        let args = ["backup", "--quiet", "--time", &at, file.to_str().expect("a path")];
        time(&mut self.command(&args));
    }

    fn count(&self) -> usize {
        std::fs::read_dir(self.folder.path().join("repository/snapshots")).expect("a folder").count()
    }

    fn forget(&self) -> Times {
        let mut args = ["forget", "--dry-run", "--quiet", "--group-by", ""].map(str::to_owned).to_vec();
        args.extend(KEEP.iter().map(|(rule, count)| format!("--keep-{rule}={count}")));
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let mut times = Times::default();
        for _ in 0..RESTIC_ROUNDS {
            times.push(time(&mut self.command(&args)));
        }
        times
    }
}

fn beside_restic(restic: &Path) {
    let version = Command::new(restic).arg("version").output().expect("restic runs").stdout;
    println!("\n{}", String::from_utf8_lossy(&version).trim());
    let one = Repository::new(restic);
    one.take(now());
    let opening = one.forget();
    let start = Instant::now();
    let repository = Repository::new(restic);
    for number in 0..RESTIC_TAKEN {
        repository.take(now() - SignedDuration::from_hours(i64::try_from(number * 37).expect("few")));
    }
    for number in 0..RESTIC_DOUBLINGS {
        time(&mut repository.command(&["rewrite", "--quiet", "--new-host", &format!("host-{number}")]));
    }
    let count = repository.count();
    println!(
        "{count} snapshots: {RESTIC_TAKEN} that it took, and copies of them; made in {:.0} s",
        start.elapsed().as_secs_f64()
    );
    let usual: String = KEEP.iter().map(|(rule, count)| format!("{rule} = {count}\n")).collect();
    let ours = planned(&policy(&usual), count).times;
    let theirs = repository.forget();
    ours.print(&format!("Snaptree's plan for {count} snapshots, in memory"), None);
    opening.print("restic forget --dry-run, 1 snapshot, the whole process", Some(&ours));
    theirs.print(&format!("restic forget --dry-run, {count} snapshots"), Some(&ours));
    let more = (theirs.median_ms() - opening.median_ms()).max(0.0);
    println!(
        "{:<58} {more:>8.2} ms{:>28}x{:.2}",
        "what comes with more snapshots alone",
        "",
        more / ours.median_ms()
    );
}

fn main() {
    ours();
    match restic() {
        Some(restic) => beside_restic(&restic),
        None => {
            println!("\nrestic is not there (tests/lab/peers unpacks it), so nothing is compared with it")
        }
    }
}
