//! A policy of seconds on real qcow2 images under `snaptree serve`, which is killed again and again.
//!
//! `SNAPTREE_SEED=N` chooses the moments and the writes, `SNAPTREE_SECONDS=N` how long it goes on (60).

#![cfg(feature = "lab")]
#![allow(clippy::expect_used, reason = "a test")]

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde_json::{Value, json};
use snaptree_tests::daemon::Daemon;
use snaptree_tests::images::{Content, Leaks};
use snaptree_tests::lab::{Lab, Snapshot};
use snaptree_tests::program::Program;
use snaptree_tests::random::Random;

const POLICY: &str =
    "name = \"p\"\ndomains = [\"web\"]\nschedule = \"every 2s\"\nsuspend-after = 50\n[keep]\nlast = 3\n";
/// How many snapshots the policy keeps.
const KEPT: usize = 3;
const KILLS: usize = 10;
/// Every other kill is at one of these, on its first, second or third reach.
const PLACES: [&str; 5] = [
    "qemu.switch.begin",
    "qemu.switch.prepared",
    "qemu.switch.locked",
    "qemu.switch.renamed",
    "qemu.switch.done",
];
/// A daemon that does nothing for so long has a fault.
const PATIENCE: Duration = Duration::from_secs(60);

/// The log as it grows, line by line.
struct Log {
    child: Child,
    lines: Receiver<Value>,
}

impl Log {
    fn follow(program: &Program) -> Self {
        let mut child = program
            .command(&["log", "--follow", "--json"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        let lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        let (sender, receiver) = channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let event = serde_json::from_str(&line).expect("JSON");
                if sender.send(event).is_err() {
                    return;
                }
            }
        });
        Self { child, lines: receiver }
    }

    /// The next event; none if there is none until then.
    fn next_until(&self, until: Instant) -> Option<Value> {
        match self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(event) => Some(event),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => panic!("the log ended"),
        }
    }

    fn wait_for(&self, what: &str, is_it: impl Fn(&Value) -> bool) {
        let until = Instant::now() + PATIENCE;
        while !is_it(&self.next_until(until).unwrap_or_else(|| panic!("no {what} within {PATIENCE:?}"))) {}
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// A machine with one disk, and what was written to it when.
struct Run {
    lab: Lab,
    random: Random,
    /// Since when the disk has read as what.
    contents: Vec<(Timestamp, Content)>,
    kills: usize,
    killed_at_work: usize,
}

impl Run {
    fn open(&self) -> usize {
        let open = self.lab.program.json(0, &["op", "list", "--open"]);
        open["operations"].as_array().expect("operations").len()
    }

    /// The machine writes, if nothing is under way: a machine that writes while its snapshot is taken makes it fail.
    /// Meanwhile the daemon stands still, so that it is known on which side of each snapshot the write is. Says whether
    /// it wrote.
    fn write_between(&mut self, daemon: &Daemon) -> bool {
        let (first, count) = (self.random.below(Content::BLOCKS), 1 + self.random.below(24));
        let pattern = u8::try_from(1 + self.random.below(255)).expect("a byte");
        daemon.while_stopped(|| {
            let idle = self.open() == 0;
            if idle {
                self.lab.write("vda", first, count, pattern);
                self.contents.push((Timestamp::now(), self.lab.model.active["vda"].clone()));
            }
            idle
        })
    }

    /// Lets the machine write whenever an operation is over.
    fn live(&mut self, daemon: &Daemon, log: &Log, until: Instant) {
        while let Some(event) = log.next_until(until) {
            if event["kind"] == "Operation.Succeeded" {
                self.write_between(daemon);
            }
        }
    }

    /// The next daemon is killed in the middle of an operation.
    fn kill_in_an_operation(&mut self, daemon: Daemon) -> Daemon {
        daemon.end();
        let place = *self.random.pick(&PLACES);
        let reach = 1 + self.random.below(3);
        Daemon::start(&self.lab.program.with_fault(&format!("{place}@{reach}=kill"))).dies();
        self.note_the_kill()
    }

    fn kill(&mut self, daemon: Daemon) -> Daemon {
        daemon.kill();
        self.note_the_kill()
    }

    fn note_the_kill(&mut self) -> Daemon {
        self.kills += 1;
        self.killed_at_work += usize::from(self.open() > 0);
        Daemon::start(&self.lab.program)
    }

    /// What the disk read as at that moment.
    fn content_at(&self, at: Timestamp) -> &Content {
        let then = self.contents.iter().rev().find(|(since, _)| *since <= at);
        &then.expect("it was written before the policy began").1
    }
}

/// The moments of the kills, from the beginning.
fn moments(random: &mut Random, whole: Duration) -> Vec<Duration> {
    let whole_ms = usize::try_from(whole.as_millis()).expect("a short time");
    let mut moments: Vec<Duration> =
        (0..KILLS).map(|_| Duration::from_millis(random.below(whole_ms) as u64)).collect();
    moments.sort_unstable();
    moments
}

fn events(program: &Program, kind: &str) -> Vec<Value> {
    let log = program.run(&["log", "--kind", kind, "--json"]).stdout;
    log.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

fn time(value: &Value) -> Timestamp {
    value.as_str().and_then(|text| text.parse().ok()).unwrap_or_else(|| panic!("no time: {value}"))
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().map_or(default, |text| text.parse().expect("a number"))
}

#[test]
fn killed_ten_times_a_policy_of_seconds_runs_once_per_instant_and_keeps_what_was_there() {
    let seed = number("SNAPTREE_SEED", 1);
    let whole = Duration::from_secs(number("SNAPTREE_SECONDS", 60));
    let folder = tempfile::tempdir().expect("a folder");
    let mut run = Run {
        lab: Lab::with_disks(folder.path(), &["vda"]),
        random: Random::new(seed),
        contents: Vec::new(),
        kills: 0,
        killed_at_work: 0,
    };
    run.lab.write("vda", 0, 40, 1);
    run.contents.push((Timestamp::now(), run.lab.model.active["vda"].clone()));
    let file = folder.path().join("policy.toml");
    std::fs::write(&file, POLICY).expect("written");
    run.lab.program.json(0, &["policy", "set", file.to_str().expect("a path of the tests")]);
    let log = Log::follow(&run.lab.program);
    let mut daemon = Daemon::start(&run.lab.program);

    let begin = Instant::now();
    for (number, moment) in moments(&mut run.random, whole).into_iter().enumerate() {
        run.live(&daemon, &log, begin + moment);
        daemon = if number % 2 == 0 { run.kill(daemon) } else { run.kill_in_an_operation(daemon) };
    }
    run.live(&daemon, &log, begin + whole);
    // One more run with its retention, which nothing cuts short; then no more.
    run.lab.program.json(0, &["policy", "suspend", "p", "--reason", "enough"]);
    let until = Instant::now() + PATIENCE;
    while !run.write_between(&daemon) {
        assert!(Instant::now() < until, "something was under way for {PATIENCE:?}");
    }
    let last = run_now(&run.lab.program);
    run.lab.program.json(0, &["reconcile"]);
    daemon.end();
    log.wait_for("end of the policy", |event| event["kind"] == "Policy.Suspended");
    check(&mut run, &last, seed);
}

/// Runs the policy by hand, and says what the snapshot is called. Within the second of a planned run the name is taken.
fn run_now(program: &Program) -> String {
    loop {
        let ran = program.run(&["policy", "run", "p", "--json"]);
        let told = &ran.json()["runs"][0];
        if ran.code == Some(0) {
            assert_eq!(told["outcome"], "succeeded", "{ran:?}");
            return told["snapshot"].as_str().expect("a name").to_owned();
        }
        assert_eq!(told["error"]["code"], "exists", "{ran:?}");
    }
}

fn check(run: &mut Run, last: &str, seed: u64) {
    let program = run.lab.program.clone();
    assert_eq!(run.kills, KILLS);
    assert!(run.killed_at_work >= KILLS / 2, "only {} operations were cut short", run.killed_at_work);
    assert_eq!(program.json(0, &["recover"])["operations"], json!([]), "nothing was left open");
    assert_eq!(program.json(0, &["audit", "verify"])["ok"], true);
    let drift = program.json(0, &["drift"]);
    assert_eq!(drift["domains"][0]["findings"], json!([]), "{drift}");

    let ran = each_instant_once(&program);
    // The one that was asked for at the end is no planned one.
    let created = events(&program, "Snapshot.Created");
    assert_eq!(created.len(), ran + 1);
    assert_eq!(
        events(&program, "Snapshot.CreateRequested").len(),
        ran + 1,
        "every request took its snapshot"
    );

    let kept = the_kept(run);
    assert_eq!(run.lab.model.current.as_deref(), Some(last));
    run.lab.tolerate_leaks(Leaks::Tolerated);
    run.lab.check("at the end");
    let tombstones = events(&program, "Snapshot.Deleted").len();
    assert_eq!(tombstones + kept.len(), created.len());
    let shown = program.json(0, &["domain", "show", "web"]);
    let layers = shown["layers"].as_array().expect("layers").len();
    assert_eq!(layers, KEPT + 1, "every deleted snapshot's data was merged: {shown}");
    println!(
        "seed {seed}: {ran} runs, {} kills ({} in the middle of an operation, {} steps resolved), {} writes, \
         {tombstones} deletes, {} merges, {} images with leaked clusters, {} different contents kept",
        run.kills,
        run.killed_at_work,
        events(&program, "System.Recovered").len(),
        run.contents.len(),
        events(&program, "Merge.Finished").len(),
        run.lab.leaking(),
        kept.iter().map(|(_, content)| format!("{content:?}")).collect::<BTreeSet<_>>().len(),
    );
}

/// Every planned instant from the first to the last ran once, or was passed over once. Says how many ran.
fn each_instant_once(program: &Program) -> usize {
    let runs = program.json(0, &["policy", "runs", "--count", "1000"]);
    let mut instants = BTreeSet::new();
    let mut ran = 0;
    let due = |run: &&Value| run["asked_by"].is_null();
    for run in runs["runs"].as_array().expect("runs").iter().filter(due) {
        let (first, last) = match run["what"].as_str() {
            Some("ran") => {
                assert_eq!(run["outcome"], "succeeded", "{run}");
                ran += 1;
                (time(&run["planned"]), time(&run["planned"]))
            }
            _ => (time(&run["first"]), time(&run["last"])),
        };
        for instant in (first.as_second()..=last.as_second()).step_by(2) {
            assert!(instants.insert(instant), "{instant} twice: {run}");
        }
    }
    let whole = instants.last().expect("runs") - instants.first().expect("runs");
    assert_eq!(i64::try_from(instants.len()).expect("few"), whole / 2 + 1, "an instant is missing: {runs:#}");
    ran
}

/// Puts the last snapshots into the model, as they have to be: each reads as the disk did when it was asked for.
fn the_kept(run: &mut Run) -> Vec<(String, Content)> {
    let requests = events(&run.lab.program, "Snapshot.CreateRequested");
    let kept: Vec<(String, Content)> = requests[requests.len() - KEPT..]
        .iter()
        .map(|request| {
            let name = request["data"]["name"].as_str().expect("a name").to_owned();
            (name, run.content_at(time(&request["at"])).clone())
        })
        .collect();
    let mut parent = None;
    for (name, content) in &kept {
        let snapshot = Snapshot {
            parent: parent.replace(name.clone()),
            contents: [("vda", content.clone())].into(),
            held: false,
        };
        run.lab.model.snapshots.insert(name.clone(), snapshot);
    }
    run.lab.model.current = parent;
    kept
}
