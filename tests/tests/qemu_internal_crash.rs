//! Snaptree, QEMU, and both are killed at every named place of every operation on snapshots inside the images, running and
//! off, with two disks.
//!
//! After `recover` nothing is open, the tree is the one before or the one after, every snapshot reads as it did, and the
//! guest goes on with memory and disk of one instant, or is off with its two disks of one instant.
//!
//! By default some places are tried, each with one of the three; `SNAPTREE_POINTS=all` tries them all with each,
//! `SNAPTREE_POINTS=N` about N an operation.

#![cfg(feature = "lab")]
#![allow(clippy::expect_used, reason = "a test")]

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Stdio;
use std::time::Instant;

use snaptree_tests::inside::{Inside, Mark};
use snaptree_tests::lab::{DISKS, Model};
use snaptree_tests::rewind::Rewind;
use snaptree_tests::running::{Hash, Way};
use snaptree_tests::victim::{Tally, Victim, numbered, points, signal, stopped, tell};

/// How many places of an operation are tried by default.
const POINTS: usize = 4;
/// What is tried again is tried again at once: the pauses between are nothing that is tried here.
const SETTINGS: &str = "[retry]\ndelay-min = \"1ms\"\ndelay-max = \"10ms\"\n";

/// Whether the machine runs when the operation begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Power {
    On,
    Off,
}

struct Scenario {
    name: &'static str,
    power: Power,
    command: &'static [&'static str],
}

/// There are `off`, taken of the machine when it was off, and upon it `a` and `b`, both with memory.
const CREATE: Scenario = Scenario {
    name: "a create with memory",
    power: Power::On,
    command: &["create", "web", "new", "--internal"],
};
const CREATE_OFF: Scenario =
    Scenario { name: "a create of a machine that is off", power: Power::Off, ..CREATE };
const REVERT: Scenario =
    Scenario { name: "a revert with memory", command: &["revert", "web", "a"], ..CREATE };
const REVERT_FROM_OFF: Scenario =
    Scenario { name: "a revert with memory of a machine that is off", power: Power::Off, ..REVERT };
const REVERT_TO_OFF: Scenario =
    Scenario { name: "a revert to a machine that was off", command: &["revert", "web", "off"], ..REVERT };
const REVERT_OFF: Scenario =
    Scenario { name: "a revert of a machine that is off", power: Power::Off, ..REVERT_TO_OFF };
const DELETE: Scenario =
    Scenario { name: "a delete of two", command: &["delete", "web", "a", "--children", "--yes"], ..CREATE };
const DELETE_OFF: Scenario =
    Scenario { name: "a delete of two of a machine that is off", power: Power::Off, ..DELETE };

struct Stage {
    scenario: Scenario,
    inside: Inside,
    model: Model<Hash>,
    marks: BTreeMap<String, Mark>,
    rewind: Rewind,
    folder: tempfile::TempDir,
}

/// What stood when something was killed.
struct Killed {
    /// The place.
    at: String,
    pid: Option<u32>,
    since: Instant,
    counters: Option<(u32, u32)>,
}

impl Stage {
    fn new(scenario: Scenario) -> Self {
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder");
        let machine = folder.path().join("machine");
        std::fs::create_dir(&machine).expect("a folder");
        let mut inside = Inside::new(&machine, Way::Managed);
        inside.running.program =
            inside.running.program.with_settings(&folder.path().join("settings"), SETTINGS);
        inside.create("off");
        inside.running.start();
        for name in ["a", "b"] {
            inside.running.wait_for_rounds(2);
            inside.create(name);
        }
        inside.running.wait_for_rounds(2);
        inside.running.kill();
        let rewind = Rewind::of(&machine, &folder.path().join("inodes"));
        Self { scenario, model: inside.model.clone(), marks: inside.marks.clone(), inside, rewind, folder }
    }

    /// Puts everything back, and starts the machine if it shall run.
    fn begin(&mut self) {
        self.inside.running.kill();
        self.rewind.restore();
        self.inside.model = self.model.clone();
        self.inside.marks = self.marks.clone();
        if self.scenario.power == Power::On {
            self.inside.running.start();
            self.inside.running.wait_for_rounds(2);
        }
    }

    fn places(&mut self) -> Vec<(String, usize)> {
        self.begin();
        let trace = self.folder.path().join("trace");
        let fault = format!("trace={}", trace.display());
        let ran = self.inside.running.program.with_fault(&fault).run(self.scenario.command);
        assert_eq!(ran.code, Some(0), "{}: {ran:?}", self.scenario.name);
        numbered(&trace)
    }

    /// Kills at a place. None if the operation ended before it came there.
    fn kill_at(&mut self, place: &str, reach: usize, victim: Victim) -> Option<Killed> {
        self.begin();
        let since = Instant::now();
        let counters = self.inside.counters();
        let stopping = self.inside.running.program.with_fault(&format!("{place}@{reach}=stop"));
        let mut command = stopping.command(self.scenario.command);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts");
        if !stopped(&mut child) {
            return None;
        }
        let pid = self.inside.running.pid();
        if victim != Victim::Snaptree {
            self.inside.running.kill();
        }
        if victim == Victim::Qemu {
            signal(child.id(), "CONT");
        } else {
            child.kill().expect("it is ours");
        }
        child.wait().expect("it ended");
        Some(Killed { at: place.to_owned(), pid, since, counters })
    }

    /// Recovers, and expects all that has to be true. Whether the operation took place.
    fn recover(&mut self, what: &str, victim: Victim, killed: &Killed) -> bool {
        let ran = self.inside.running.program.run(&["recover", "--json"]);
        if ran.code != Some(0) {
            panic!("{what}: {ran:?}\n{}", self.inside.running.program.run(&["log", "web"]).stdout);
        }
        let what = &format!("{what}, after {}", ran.stdout);
        let listed = self.inside.running.program.json(0, &["op", "list"]);
        for operation in listed["operations"].as_array().expect("operations") {
            assert!(operation["outcome"].is_string(), "{what}: {operation}");
            assert_ne!(operation["outcome"], "needs-attention", "{what}: {operation}");
        }
        let after = self.settle(killed);
        self.inside.check(what);
        self.expect_machine(what, victim, killed, after);
        if self.inside.running.pid().is_none() {
            self.inside.running.start();
            self.inside.running.wait_for_rounds(2);
        }
        self.inside.create("afterwards");
        self.inside.check(&format!("{what}, a snapshot afterwards"));
        self.inside.expect_alive(what);
        assert_eq!(self.inside.running.program.json(0, &["audit", "verify"])["ok"], true, "{what}");
        after
    }

    /// Whether the operation took place, by the tree; the model goes with it.
    fn settle(&mut self, killed: &Killed) -> bool {
        let mut after = self.model.clone();
        match *self.scenario.command {
            ["create", ..] => after.create("new", &[]),
            ["revert", _, name, ..] => after.revert(name),
            _ => ["b", "a"].iter().for_each(|name| after.delete(name)),
        }
        if !self.inside.tree_is(&after) {
            return false;
        }
        match *self.scenario.command {
            ["create", ..] => self.inside.created("new", killed.counters),
            _ => self.inside.model = after,
        }
        true
    }

    fn expect_machine(&mut self, what: &str, victim: Victim, killed: &Killed, after: bool) {
        let pid = self.inside.running.pid();
        match (after, self.scenario.command) {
            (true, ["revert", _, "a", ..]) if pid.is_some() => self.inside.expect_at("a", killed.since),
            (true, ["revert", _, "a", ..]) => {
                // It was loaded whole, and then it was killed.
                assert_ne!(victim, Victim::Snaptree, "{what}: it runs");
                let is_loading = killed.at.starts_with("qemu.load.") && killed.at != "qemu.load.done";
                assert!(!is_loading, "{what}: it runs");
                let paths = self.inside.running.paths.clone();
                self.inside.running.read(what, &paths);
            }
            (true, ["revert", ..]) => {
                assert_eq!(pid, None, "{what}: it is off");
                let kept = &self.inside.model.snapshots["off"].contents;
                assert_eq!(self.inside.disks(), DISKS.map(|disk| kept[disk]), "{what}: the disks");
            }
            _ => {
                let ran = self.scenario.power == Power::On && victim == Victim::Snaptree;
                assert_eq!(pid.is_some(), ran, "{what}: it runs as before");
                assert!(!ran || pid == killed.pid, "{what}: it is the same process");
                if ran {
                    self.inside.expect_alive(what);
                } else {
                    let paths = self.inside.running.paths.clone();
                    self.inside.running.read(what, &paths);
                }
            }
        }
    }
}

fn kill_everywhere(scenario: Scenario) {
    let mut stage = Stage::new(scenario);
    let name = stage.scenario.name;
    let places = stage.places();
    let mut table: BTreeMap<Victim, Tally> = BTreeMap::new();
    for ((place, reach), victim) in points(&places, POINTS) {
        let what = format!("{name}: {victim:?} killed at {place}@{reach}");
        let tried = catch_unwind(AssertUnwindSafe(|| {
            let killed = stage.kill_at(&place, reach, victim)?;
            Some(stage.recover(&what, victim, &killed))
        }));
        let tally = table.entry(victim).or_default();
        match tried {
            Ok(None) => tally.missed += 1,
            Ok(Some(after)) => {
                tally.recovered += 1;
                tally.before += usize::from(!after);
            }
            Err(_) => tally.failed.push(what),
        }
    }
    tell(name, places.len(), &table);
}

#[test]
fn a_create_with_memory_recovers() {
    kill_everywhere(CREATE);
}

#[test]
fn a_create_of_a_machine_that_is_off_recovers() {
    kill_everywhere(CREATE_OFF);
}

#[test]
fn a_revert_with_memory_recovers() {
    kill_everywhere(REVERT);
}

#[test]
fn a_revert_with_memory_of_a_machine_that_is_off_recovers() {
    kill_everywhere(REVERT_FROM_OFF);
}

#[test]
fn a_revert_to_a_machine_that_was_off_recovers() {
    kill_everywhere(REVERT_TO_OFF);
}

#[test]
fn a_revert_of_a_machine_that_is_off_recovers() {
    kill_everywhere(REVERT_OFF);
}

#[test]
fn a_delete_recovers() {
    kill_everywhere(DELETE);
}

#[test]
fn a_delete_of_a_machine_that_is_off_recovers() {
    kill_everywhere(DELETE_OFF);
}
