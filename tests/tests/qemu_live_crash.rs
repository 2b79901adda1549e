//! Snaptree, QEMU, and both are killed at every named place of every kind of operation under a running guest.
//!
//! After `recover` nothing is open, the tree is the one before or the one after the operation, every snapshot reads as
//! it did, and the guest goes on: the same one where QEMU was not killed, else from a disk that lost nothing of what it
//! had written.
//!
//! By default some places are tried, each with one of the three; `SNAPTREE_POINTS=all` tries them all with each,
//! `SNAPTREE_POINTS=N` about N an operation.

#![cfg(feature = "lab")]
#![allow(clippy::expect_used, reason = "a test")]

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use snaptree_tests::agent::{Agent, Freeze};
use snaptree_tests::alive::Alive;
use snaptree_tests::images::text;
use snaptree_tests::lab::Model;
use snaptree_tests::rewind::Rewind;
use snaptree_tests::running::{Hash, Running, Way, wait_until};
use snaptree_tests::victim::{Tally, Victim, numbered, points, signal, stopped, tell};

/// How many places of an operation are tried by default.
const POINTS: usize = 9;

/// A tool that cannot be run is tried again at once: the pauses between are nothing that is tried here.
const SETTINGS: &str = "[retry]\ndelay-min = \"1ms\"\ndelay-max = \"10ms\"\n";

/// An operation under a running guest.
struct Scenario {
    name: &'static str,
    prepare: fn(&mut Alive),
    command: &'static [&'static str],
    /// What the model says of it; nothing for a create, whose content nobody knows before.
    apply: Option<fn(&mut Model<Hash>)>,
}

/// The machine stands on the last of these.
fn snapshots(alive: &mut Alive, names: &[&str]) {
    for name in names {
        alive.create(name);
        alive.running.wait_for_rounds(2);
    }
}

/// a <- b <- c, and b <- d; the machine stands on d.
fn branched(alive: &mut Alive) {
    snapshots(alive, &["a", "b", "c"]);
    alive.running.program.json(0, &["revert", "web", "b"]);
    alive.model.revert("b");
    alive.running.wait_for_rounds(2);
    snapshots(alive, &["d"]);
}

const FIRST_CREATE: Scenario = Scenario {
    name: "the first create, with adoption",
    prepare: |_| {},
    command: &["create", "web", "new"],
    apply: None,
};
const CREATE: Scenario =
    Scenario { name: "a create", prepare: |alive| snapshots(alive, &["a", "b"]), ..FIRST_CREATE };
const QUIESCED: Scenario =
    Scenario { name: "a quiesced create", command: &["create", "web", "new", "--quiesce"], ..CREATE };
const REVERT: Scenario = Scenario {
    name: "a revert",
    prepare: branched,
    command: &["revert", "web", "a"],
    apply: Some(|model| model.revert("a")),
};
const PULL: Scenario = Scenario {
    name: "a delete pulled into two dependants",
    prepare: branched,
    command: &["delete", "web", "b"],
    apply: Some(|model| model.delete("b")),
};
const COMMIT: Scenario = Scenario {
    name: "a delete in the middle of the chain",
    prepare: |alive| snapshots(alive, &["a", "b", "c"]),
    command: &["delete", "web", "b"],
    apply: Some(|model| model.delete("b")),
};
const ROOT: Scenario = Scenario {
    name: "a delete of the root",
    command: &["delete", "web", "a"],
    apply: Some(|model| model.delete("a")),
    ..COMMIT
};
const CURRENT: Scenario = Scenario {
    name: "a delete of the current one",
    command: &["delete", "web", "c"],
    apply: Some(|model| model.delete("c")),
    ..COMMIT
};
const ALL: Scenario = Scenario {
    name: "a delete of all",
    command: &["delete", "web", "a", "--children", "--yes"],
    apply: Some(|model| ["c", "b", "a"].iter().for_each(|name| model.delete(name))),
    ..COMMIT
};

const MEMORY: Scenario =
    Scenario { name: "a create with memory", command: &["create", "web", "new", "--memory"], ..CREATE };
const FIRST_MEMORY: Scenario = Scenario {
    name: "the first create, with adoption and memory",
    command: &["create", "web", "new", "--memory"],
    ..FIRST_CREATE
};
/// a, with memory <- b; the machine stands on b.
const RESUME: Scenario = Scenario {
    name: "a revert to memory",
    prepare: |alive| {
        alive.create_with_memory("a");
        alive.running.wait_for_rounds(3);
        snapshots(alive, &["b"]);
    },
    command: &["revert", "web", "a"],
    apply: Some(|model| model.revert("a")),
};

const PIVOT: Scenario =
    Scenario { name: "a commit of what the guest writes", prepare: |alive| snapshots(alive, &["a"]), ..ROOT };

/// The machine in front of the operation, as often as it is wanted.
struct Stage {
    scenario: Scenario,
    alive: Alive,
    model: Model<Hash>,
    /// Whoever brings the guest's file systems to rest.
    agent: Agent,
    /// None: all is made anew, for an image that shall be adopted must have one name, so nothing can keep its inode.
    rewind: Option<Rewind>,
    /// Where the machine is.
    machine: PathBuf,
    /// How often all was made anew.
    anew: usize,
    folder: tempfile::TempDir,
}

impl Stage {
    fn new(scenario: Scenario) -> Self {
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder");
        let agent = Agent::scripted(&folder.path().join("agent"));
        agent.takes(Freeze::Done);
        let machine = folder.path().join("machine");
        let mut alive = Self::prepared(&scenario, folder.path(), &machine);
        alive.running.kill();
        let rewind =
            (!alive.model.snapshots.is_empty()).then(|| Rewind::of(&machine, &folder.path().join("inodes")));
        Self { scenario, model: alive.model.clone(), alive, agent, rewind, machine, anew: 0, folder }
    }

    fn prepared(scenario: &Scenario, folder: &Path, machine: &Path) -> Alive {
        std::fs::create_dir(machine).expect("a folder");
        let agent = folder.join("agent");
        let mut alive = Alive::of(Running::with_options(machine, Way::Managed, &["--agent", text(&agent)]));
        alive.running.program = alive.running.program.with_settings(&folder.join("settings"), SETTINGS);
        alive.running.start();
        alive.running.wait_for_rounds(2);
        (scenario.prepare)(&mut alive);
        alive
    }

    /// Puts everything back, and starts the machine.
    fn begin(&mut self) {
        self.kill_machine();
        let Some(rewind) = &self.rewind else {
            self.anew += 1;
            // A folder of its own: the machine before is dropped when the next one runs.
            let next = self.folder.path().join(format!("machine-{}", self.anew));
            self.alive = Self::prepared(&self.scenario, self.folder.path(), &next);
            let before = std::mem::replace(&mut self.machine, next);
            std::fs::remove_dir_all(before).expect("the folder");
            return;
        };
        rewind.restore();
        self.alive.model = self.model.clone();
        self.alive.running.start();
        self.alive.running.wait_for_rounds(2);
    }

    /// A guest that boots again has nothing frozen.
    fn kill_machine(&mut self) {
        self.alive.running.kill();
        self.agent.boots();
    }

    /// The places that the operation reaches, each with the number of the reach.
    fn places(&mut self) -> Vec<(String, usize)> {
        self.begin();
        let trace = self.folder.path().join("trace");
        let fault = format!("trace={}", trace.display());
        let ran = self.alive.running.program.with_fault(&fault).run(self.scenario.command);
        assert_eq!(ran.code, Some(0), "{}: {ran:?}", self.scenario.name);
        numbered(&trace)
    }

    /// The operation, stopped at a place. None if it ended before it came there.
    fn stop_at(&mut self, place: &str, reach: usize) -> Option<Child> {
        self.begin();
        let program = &self.alive.running.program;
        let fault = format!("{place}@{reach}=stop");
        let mut command = program.with_fault(&fault).command(self.scenario.command);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts");
        stopped(&mut child).then_some(child)
    }

    fn stands(&self) -> Killed {
        let running = &self.alive.running;
        Killed { ran: running.pid(), counters: running.counters(), printed: running.printed() }
    }

    /// Kills at a place. None if the operation ended before it came there.
    fn kill_at(&mut self, place: &str, reach: usize, victim: Victim) -> Option<Killed> {
        let mut child = self.stop_at(place, reach)?;
        let mut killed = self.stands();
        if victim != Victim::Snaptree {
            self.kill_machine();
            // What the guest printed since it was looked at counts, too.
            killed.counters = self.alive.running.counters();
        }
        if victim == Victim::Qemu {
            signal(child.id(), "CONT");
        } else {
            child.kill().expect("it is ours");
        }
        child.wait().expect("it ended");
        Some(killed)
    }

    /// Kills QEMU at one of its own system calls after that place. None if it made fewer of them.
    fn kill_in_call(&mut self, place: &str, calls: &str, at: usize) -> Option<Killed> {
        let mut child = self.stop_at(place, 1).unwrap_or_else(|| panic!("{place} is not reached"));
        let mut killed = self.stands();
        let qemu = killed.ran.expect("it runs");
        let mut tracer = Command::new("strace")
            .args(["-f", "-q", "-o", "/dev/null", "-p", &qemu.to_string(), "-e", &format!("trace={calls}")])
            .args(["-e", &format!("inject={calls}:signal=SIGKILL:when={at}")])
            .stderr(Stdio::null())
            .spawn()
            .expect("strace starts");
        wait_until("QEMU is traced", || {
            let status = std::fs::read_to_string(format!("/proc/{qemu}/status")).unwrap_or_default();
            !status.contains("TracerPid:\t0\n")
        });
        signal(child.id(), "CONT");
        child.wait().expect("it ended");
        let lives = self.alive.running.pid() == Some(qemu);
        // strace lets go of whom it traces when it is told to end; over a dead one it may wait for ever.
        signal(tracer.id(), if lives { "TERM" } else { "KILL" });
        wait_until("strace is gone", || tracer.try_wait().expect("it is ours").is_some());
        if lives {
            return None;
        }
        killed.counters = self.alive.running.counters();
        Some(killed)
    }

    /// Recovers, and expects all that has to be true. Whether the operation took place.
    fn recover(&mut self, what: &str, victim: Victim, killed: &Killed) -> bool {
        let ran = self.alive.running.program.run(&["recover", "--json"]);
        if ran.code != Some(0) {
            panic!("{what}: {ran:?}\n{}", self.alive.running.program.run(&["log", "web"]).stdout);
        }
        let what = &format!("{what}, after {}", ran.stdout);
        self.expect_nothing_open(what);
        assert!(!self.agent.is_frozen(), "{what}: the guest's file systems are thawed");
        let after = self.settle(what);
        if victim == Victim::Snaptree {
            assert!(self.alive.running.pid().is_some() || killed.ran.is_none(), "{what}: the machine runs");
        }
        let same = killed.ran.is_some() && self.alive.running.pid() == killed.ran;
        let ran = self.alive.running.pid().is_some();
        if !ran {
            self.alive.running.start();
        }
        let reverts = self.scenario.command[0] == "revert";
        match (reverts && after, same) {
            (true, _) if ran && self.resumes() => self.alive.expect_resumed_from("a", killed.printed),
            // It went on, and then its QEMU was killed.
            (true, _) if self.resumes() => self.alive.expect_alive(what),
            (true, _) => self.alive.expect_booted_from("a"),
            (false, true) => self.alive.expect_alive(what),
            (false, false) => self.expect_nothing_lost(what, killed),
        }
        // The boot of which the snapshot is.
        let mut apart = killed.apart();
        if !after {
            let printed = self.alive.running.printed();
            apart = Some(self.alive.running.apart());
            self.alive.running.program.json(0, self.scenario.command);
            self.apply();
            if self.resumes() {
                self.alive.expect_resumed_from("a", printed);
            }
        }
        if let (true, Some(apart)) = (self.scenario.command.contains(&"--memory"), apart) {
            self.alive.has_memory("new", apart);
            let printed = self.alive.running.printed();
            self.alive.running.program.json(0, &["revert", "web", "new"]);
            self.alive.expect_resumed_from("new", printed);
        }
        self.alive.check(what);
        assert_eq!(self.alive.running.program.json(0, &["audit", "verify"])["ok"], true, "{what}");
        self.alive.create("afterwards");
        self.alive.check(&format!("{what}, a snapshot afterwards"));
        self.alive.expect_alive(what);
        after
    }

    /// Whether the operation brings a memory back.
    fn resumes(&self) -> bool {
        self.scenario.name == RESUME.name
    }

    fn expect_nothing_open(&self, what: &str) {
        let listed = self.alive.running.program.json(0, &["op", "list"]);
        for operation in listed["operations"].as_array().expect("operations") {
            assert!(operation["outcome"].is_string(), "{what}: {operation}");
            assert_ne!(operation["outcome"], "needs-attention", "{what}: {operation}");
        }
    }

    /// Whether the operation took place, by the tree; the model goes with it.
    fn settle(&mut self, what: &str) -> bool {
        let mut after = self.alive.model.clone();
        match self.scenario.apply {
            Some(apply) => apply(&mut after),
            None => after.create("new", &[]),
        }
        if self.alive.tree_is(&after) {
            self.apply();
            self.alive.check(what);
            return true;
        }
        self.alive.check(what);
        false
    }

    fn apply(&mut self) {
        match self.scenario.apply {
            Some(apply) => apply(&mut self.alive.model),
            None => self.alive.created("new"),
        }
    }

    /// The guest was booted again, from a disk that has all that it had said to be there.
    fn expect_nothing_lost(&self, what: &str, killed: &Killed) {
        let (_, said) = killed.counters.unwrap_or_default();
        self.alive.expect_alive(what);
        let (memory, disk) = self.alive.running.counters().expect("it printed");
        assert!(disk - memory >= said, "{what}: the disk came back at round {}, after {said}", disk - memory);
    }
}

/// What stood when something was killed.
struct Killed {
    /// QEMU's process id.
    ran: Option<u32>,
    counters: Option<(u32, u32)>,
    /// How much the guest had printed.
    printed: usize,
}

impl Killed {
    fn apart(&self) -> Option<i64> {
        self.counters.map(|(memory, disk)| i64::from(disk) - i64::from(memory))
    }
}

fn kill_everywhere(scenario: Scenario) {
    let mut stage = Stage::new(scenario);
    let name = stage.scenario.name;
    let places = stage.places();
    let points = points(&places, POINTS);
    let mut table: BTreeMap<Victim, Tally> = BTreeMap::new();
    for ((place, reach), victim) in points {
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

/// The calls by which QEMU's jobs change an image.
const CALLS: [&str; 2] = ["pwrite64,pwritev", "fdatasync"];

/// Kills QEMU in the middle of a job, and of the flush after it.
fn kill_in_calls(scenario: Scenario, places: &[&str]) {
    let mut stage = Stage::new(scenario);
    let most = if std::env::var("SNAPTREE_POINTS").is_ok_and(|wanted| wanted == "all") { 12 } else { 3 };
    let (mut recovered, mut missed) = (0, 0);
    for place in places {
        for calls in CALLS {
            for at in 1..=most {
                let what = format!("{}: QEMU killed at {calls} {at} after {place}", stage.scenario.name);
                match stage.kill_in_call(place, calls, at) {
                    Some(killed) => {
                        stage.recover(&what, Victim::Qemu, &killed);
                        recovered += 1;
                    }
                    None => missed += 1,
                }
            }
        }
    }
    println!("{}: in QEMU's own calls: recovered {recovered}, missed {missed}", stage.scenario.name);
    assert!(recovered > 0, "nothing was killed");
}

#[test]
fn a_commit_that_qemu_dies_in_recovers() {
    // What is in the registered image goes no other way.
    kill_in_calls(ROOT, &["qemu.live.push.started", "qemu.live.job.concluded"]);
}

#[test]
fn a_pull_that_qemu_dies_in_recovers() {
    kill_in_calls(PULL, &["qemu.live.pull.started", "qemu.live.job.concluded"]);
}

#[test]
fn a_commit_of_what_the_guest_writes_that_qemu_dies_in_recovers() {
    kill_in_calls(PIVOT, &["qemu.live.commit.started", "qemu.live.stopped", "qemu.live.pivoted"]);
}

#[test]
fn the_first_create_under_a_guest_recovers() {
    kill_everywhere(FIRST_CREATE);
}

#[test]
fn a_create_under_a_guest_recovers() {
    kill_everywhere(CREATE);
}

#[test]
fn a_quiesced_create_recovers() {
    kill_everywhere(QUIESCED);
}

#[test]
fn a_create_with_memory_recovers() {
    kill_everywhere(MEMORY);
}

#[test]
fn the_first_create_with_memory_recovers() {
    kill_everywhere(FIRST_MEMORY);
}

#[test]
fn a_revert_to_memory_recovers() {
    kill_everywhere(RESUME);
}

#[test]
fn a_revert_of_a_running_machine_recovers() {
    kill_everywhere(REVERT);
}

#[test]
fn a_pull_under_a_guest_recovers() {
    kill_everywhere(PULL);
}

#[test]
fn a_commit_under_a_guest_recovers() {
    kill_everywhere(COMMIT);
}

#[test]
fn a_delete_of_the_root_under_a_guest_recovers() {
    kill_everywhere(ROOT);
}

#[test]
fn a_delete_of_the_current_one_under_a_guest_recovers() {
    kill_everywhere(CURRENT);
}

#[test]
fn a_pivot_under_a_guest_recovers() {
    kill_everywhere(PIVOT);
}

#[test]
fn a_delete_of_all_under_a_guest_recovers() {
    kill_everywhere(ALL);
}
