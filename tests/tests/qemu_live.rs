//! Random operations under a guest that writes all the time, on a real QEMU, against a model kept beside it.
//!
//! `SNAPTREE_SEED=N` repeats a run's choices, `SNAPTREE_OPERATIONS=N` makes it longer.

#![cfg(feature = "lab")]
#![allow(clippy::expect_used, reason = "a test")]

use std::collections::BTreeSet;
use std::process::Stdio;

use snaptree_tests::alive::Alive;
use snaptree_tests::images::tool;
use snaptree_tests::random::Random;
use snaptree_tests::running::{Way, wait_until};

/// More snapshots than this are not made, so that a run stays short.
const SNAPSHOTS_MAX: usize = 12;

#[derive(Debug, Default)]
struct Counts {
    creates: usize,
    deletes: usize,
    live_merges: usize,
    merges_off: usize,
    deferred: usize,
    reverts: usize,
    power_cuts: usize,
}

struct Run {
    alive: Alive,
    way: Way,
    random: Random,
    named: usize,
    /// The snapshots that were taken while the machine was off.
    taken_off: BTreeSet<String>,
    counts: Counts,
}

impl Run {
    fn any_snapshot(&mut self) -> Option<String> {
        let names: Vec<String> = self.alive.model.snapshots.keys().cloned().collect();
        (!names.is_empty()).then(|| self.random.pick(&names).clone())
    }

    fn runs(&self) -> bool {
        self.alive.running.pid().is_some()
    }

    /// One random operation; says what it was.
    fn act(&mut self) -> String {
        if !self.runs() && self.random.chance(50) {
            return self.power();
        }
        match self.random.below(100) {
            0..=34 if self.alive.model.snapshots.len() < SNAPSHOTS_MAX => self.create(),
            35..=51 => self.revert(),
            52..=57 => self.power(),
            58..=61 => {
                self.alive.running.program.json(0, &["reconcile", "web"]);
                "reconcile".to_owned()
            }
            _ => self.delete(),
        }
    }

    fn create(&mut self) -> String {
        self.named += 1;
        let name = format!("s{}", self.named);
        if self.runs() {
            let rounds = u32::try_from(self.random.below(12)).expect("a small number");
            self.alive.running.wait_for_rounds(rounds);
        } else {
            self.taken_off.insert(name.clone());
        }
        self.alive.create(&name);
        self.counts.creates += 1;
        format!("create {name}")
    }

    fn revert(&mut self) -> String {
        let Some(name) = self.any_snapshot() else { return self.create() };
        // Whoever is not asked to end a machine does not end it.
        let by_hand = self.way == Way::Attached && self.runs();
        if by_hand {
            let refused = self.alive.running.program.json(4, &["revert", "web", &name]);
            assert_eq!(refused["error"]["code"], "in-use", "{refused}");
            self.alive.running.kill();
        }
        let ran = self.runs();
        self.alive.running.program.json(0, &["revert", "web", &name]);
        self.alive.model.revert(&name);
        self.counts.reverts += 1;
        if by_hand {
            self.alive.running.start_by_hand();
        }
        // A managed machine gets the state that the snapshot has.
        if self.way == Way::Managed && self.taken_off.contains(&name) {
            assert!(!self.runs(), "{name} is of a machine that was off");
        } else if by_hand || ran {
            self.alive.expect_booted_from(&name);
        }
        format!("revert {name}")
    }

    /// The power fails, or comes back; some operations then find the machine off.
    fn power(&mut self) -> String {
        if self.runs() {
            self.alive.running.kill();
            self.counts.power_cuts += 1;
            if self.random.chance(40) {
                return "power off".to_owned();
            }
        }
        if self.random.chance(50) {
            self.alive.running.start();
            return "power on".to_owned();
        }
        self.alive.running.start_by_hand();
        "power on, by hand".to_owned()
    }

    fn delete(&mut self) -> String {
        let Some(name) = self.any_snapshot() else { return self.create() };
        let mut args = vec!["delete".to_owned(), "web".to_owned(), name.clone()];
        let mut going = BTreeSet::from([name.clone()]);
        match self.random.below(12) {
            0 => {
                args.extend(["--children", "--yes"].map(str::to_owned));
                going.extend(self.alive.model.descendants(&name));
            }
            1 => {
                args.extend(["--children-only", "--yes"].map(str::to_owned));
                going = self.alive.model.descendants(&name);
            }
            _ => {}
        }
        match self.random.below(10) {
            0 => args.push("--now".to_owned()),
            1 => args.push("--defer".to_owned()),
            _ => {}
        }
        let runs = self.runs();
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let done = self.alive.running.program.json(0, &args);
        assert_eq!(done["outcome"], "succeeded", "{done}");
        for merge in done["merges"].as_array().expect("merges") {
            match (merge["outcome"].as_str(), runs) {
                (Some("succeeded"), true) => self.counts.live_merges += 1,
                (Some("succeeded"), false) => self.counts.merges_off += 1,
                (Some("deferred"), _) => self.counts.deferred += 1,
                other => panic!("{other:?}: {done}"),
            }
        }
        self.counts.deletes += 1;
        going.iter().for_each(|name| self.alive.model.delete(name));
        format!("{args:?}")
    }
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().map_or(default, |text| text.parse().expect("a number"))
}

fn random_operations(way: Way, operations: u64) -> Counts {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
    let seed = number("SNAPTREE_SEED", u64::from(clock.subsec_nanos()));
    let operations = number("SNAPTREE_OPERATIONS", operations);
    println!("{way:?}: repeat with SNAPTREE_SEED={seed} SNAPTREE_OPERATIONS={operations}");
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder");
    let mut alive = Alive::new(folder.path(), way);
    alive.running.start();
    alive.running.wait_for_rounds(2);
    let mut run = Run {
        alive,
        way,
        random: Random::new(seed),
        named: 0,
        taken_off: BTreeSet::new(),
        counts: Counts::default(),
    };
    for number in 0..operations {
        let what = format!("seed {seed}, operation {number}: {}", run.act());
        println!("{what}");
        if number % 50 == 49 {
            run.alive.forget_read();
        }
        run.alive.check(&what);
        if run.runs() {
            run.alive.expect_alive(&what);
        }
    }
    run.alive.forget_read();
    run.alive.check("the end");
    assert_eq!(run.alive.running.program.json(0, &["audit", "verify"])["ok"], true);
    println!("{way:?}, {operations} operations: {:?}", run.counts);
    run.counts
}

#[test]
fn under_a_managed_machine_every_snapshot_stays_what_it_was() {
    let counts = random_operations(Way::Managed, 200);
    assert!(counts.live_merges > 0 && counts.reverts > 0, "the run exercised too little: {counts:?}");
}

#[test]
fn under_an_attached_machine_every_snapshot_stays_what_it_was() {
    let counts = random_operations(Way::Attached, 40);
    assert!(counts.live_merges > 0 && counts.reverts > 0, "the run exercised too little: {counts:?}");
}

#[test]
fn under_a_machine_with_commands_every_snapshot_stays_what_it_was() {
    let counts = random_operations(Way::Commands, 40);
    assert!(counts.live_merges > 0 && counts.reverts > 0, "the run exercised too little: {counts:?}");
}

/// Ctrl-C does not wait for a merge that takes hours: QEMU's job is ended, and the merge is done another time.
#[test]
fn a_merge_under_the_guest_is_called_off_while_qemu_is_at_it() {
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder");
    let mut alive = Alive::new(folder.path(), Way::Managed);
    alive.running.start();
    alive.create("a");
    alive.running.wait_for_rounds(30);
    alive.create("b");
    let settings = "[qemu]\njob-speed = \"64 KiB/s\"\n";
    let slow = alive.running.program.with_settings(&folder.path().join("slow"), settings);
    let trace = folder.path().join("trace");
    let mut command = slow.with_fault(&format!("trace={}", trace.display())).command(&["delete", "web", "b"]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    wait_until("QEMU merges", || {
        std::fs::read_to_string(&trace).is_ok_and(|reached| reached.contains("qemu.live.pull.started"))
    });
    tool("kill", &["-INT", &child.id().to_string()]);
    let ended = child.wait_with_output().expect("it ends");
    alive.model.delete("b");
    let reached = std::fs::read_to_string(&trace).expect("the trace");
    assert!(!reached.contains("qemu.live.pull.done"), "it was merged all the same: {ended:?}");
    let operations = alive.running.program.json(0, &["op", "list"]);
    let merge =
        operations["operations"].as_array().expect("operations").iter().find(|op| op["kind"] == "merge");
    assert_eq!(merge.expect("a merge")["outcome"], "cancelled", "{operations}");
    alive.check("called off");
    alive.expect_alive("it was called off");

    let merged = alive.running.program.json(0, &["reconcile", "web"]);
    assert!(merged.to_string().contains("succeeded"), "{merged}");
    alive.check("merged later");
}
