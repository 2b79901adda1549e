//! Snapshots inside the images, with memory, on a real QEMU: random operations against a model, and the traps of
//! snapshot-load.
//!
//! `SNAPTREE_SEED=N` repeats a run's choices, `SNAPTREE_OPERATIONS=N` makes it longer; `SNAPTREE_TEST_ACCEL=kvm` runs the
//! guests by KVM.

#![cfg(feature = "lab")]
#![allow(clippy::expect_used, reason = "a test")]

use std::process::Stdio;
use std::time::Instant;

use serde_json::json;
use snaptree_tests::images::{text, tool};
use snaptree_tests::inside::Inside;
use snaptree_tests::lab::DISKS;
use snaptree_tests::program::wait_until_stopped;
use snaptree_tests::random::Random;
use snaptree_tests::running::{Way, wait_until};

/// More snapshots than this are not made, so that a run stays short.
const SNAPSHOTS_MAX: usize = 10;

#[derive(Debug, Default)]
struct Counts {
    memory_creates: usize,
    memory_reverts: usize,
    creates_off: usize,
    reverts_off: usize,
    deletes: usize,
    power_cuts: usize,
}

struct Run {
    inside: Inside,
    way: Way,
    random: Random,
    named: usize,
    counts: Counts,
}

impl Run {
    fn runs(&self) -> bool {
        self.inside.running.pid().is_some()
    }

    fn any_snapshot(&mut self) -> Option<String> {
        let names: Vec<String> = self.inside.model.snapshots.keys().cloned().collect();
        (!names.is_empty()).then(|| self.random.pick(&names).clone())
    }

    /// One random operation; says what it was.
    fn act(&mut self) -> String {
        if !self.runs() && self.random.chance(60) {
            self.start();
            return "power on".to_owned();
        }
        match self.random.below(100) {
            0..=39 if self.inside.model.snapshots.len() < SNAPSHOTS_MAX => self.create(),
            40..=79 => self.revert(),
            80..=84 => {
                self.inside.running.kill();
                self.counts.power_cuts += 1;
                "power off".to_owned()
            }
            _ => self.delete(),
        }
    }

    fn start(&mut self) {
        self.inside.running.start();
        // A guest that has not begun to count has no difference that could be compared.
        self.inside.running.wait_for_rounds(2);
    }

    fn create(&mut self) -> String {
        self.named += 1;
        let name = format!("s{}", self.named);
        if self.runs() {
            self.inside.running.wait_for_rounds(u32::try_from(self.random.below(6)).expect("a small number"));
            self.counts.memory_creates += 1;
        } else {
            self.counts.creates_off += 1;
        }
        self.inside.create(&name);
        format!("create {name}")
    }

    fn revert(&mut self) -> String {
        let Some(name) = self.any_snapshot() else { return self.create() };
        let with_memory = self.inside.marks.contains_key(&name);
        let revert = ["revert", "web", &name];
        // Whoever is not asked to start or end a machine does not.
        if self.way == Way::Attached && with_memory != self.runs() {
            let refused = self.inside.running.program.json(4, &revert);
            assert!(refused["error"]["hint"].is_string(), "{refused}");
            if with_memory { self.start() } else { self.inside.running.kill() }
        }
        let ran = self.runs();
        let since = Instant::now();
        self.inside.running.program.json(0, &revert);
        self.inside.model.revert(&name);
        if with_memory {
            self.inside.expect_at(&name, since);
            self.counts.memory_reverts += 1;
            return format!("revert {name}, with memory");
        }
        self.counts.reverts_off += 1;
        match self.way {
            Way::Commands if ran => self.inside.expect_alive(&name),
            _ => {
                assert!(!self.runs(), "{name} is of a machine that was off");
                let kept = &self.inside.model.snapshots[&name].contents;
                assert_eq!(self.inside.disks(), DISKS.map(|disk| kept[disk]), "the disks are at {name}");
            }
        }
        format!("revert {name}")
    }

    fn delete(&mut self) -> String {
        let Some(name) = self.any_snapshot() else { return self.create() };
        let all = self.random.chance(15);
        let mut going = if all { self.inside.model.descendants(&name) } else { Default::default() };
        going.insert(name.clone());
        let scope = if all { &["--children", "--yes"][..] } else { &["--yes"] };
        let done = self.inside.running.program.json(0, &[&["delete", "web", &*name][..], scope].concat());
        assert_eq!(done["outcome"], "succeeded", "{done}");
        assert_eq!(done["merges"], json!([]), "there is nothing to merge: {done}");
        for gone in &going {
            self.inside.model.delete(gone);
            self.inside.marks.remove(gone);
        }
        self.counts.deletes += 1;
        format!("delete {going:?}")
    }
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().map_or(default, |text| text.parse().expect("a number"))
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder")
}

fn random_operations(way: Way, operations: u64) -> Counts {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
    let seed = number("SNAPTREE_SEED", u64::from(clock.subsec_nanos()));
    let operations = number("SNAPTREE_OPERATIONS", operations);
    println!("{way:?}: repeat with SNAPTREE_SEED={seed} SNAPTREE_OPERATIONS={operations}");
    let folder = folder();
    let inside = Inside::new(folder.path(), way);
    let random = Random::new(seed);
    let mut run = Run { inside, way, random, named: 0, counts: Counts::default() };
    run.start();
    for number in 0..operations {
        let what = format!("seed {seed}, operation {number}: {}", run.act());
        println!("{what}");
        run.inside.check_tree(&what);
        if run.runs() {
            run.inside.expect_alive(&what);
        }
        if number % 10 == 9 {
            run.inside.check(&what);
        }
    }
    run.inside.check("the end");
    assert_eq!(run.inside.running.program.json(0, &["audit", "verify"])["ok"], true);
    run.inside.running.program.json(0, &["drift", "web"]);
    println!("{way:?}, {operations} operations: {:?}", run.counts);
    run.counts
}

#[test]
fn in_a_managed_machine_memory_and_disk_stay_of_one_instant() {
    let counts = random_operations(Way::Managed, 40);
    assert!(
        counts.memory_creates > 2 && counts.memory_reverts > 2,
        "the run exercised too little: {counts:?}"
    );
}

#[test]
fn in_an_attached_machine_memory_and_disk_stay_of_one_instant() {
    let counts = random_operations(Way::Attached, 20);
    assert!(counts.memory_creates > 1, "the run exercised too little: {counts:?}");
}

#[test]
fn in_a_machine_with_commands_memory_and_disk_stay_of_one_instant() {
    let counts = random_operations(Way::Commands, 20);
    assert!(counts.memory_creates > 1, "the run exercised too little: {counts:?}");
}

/// QEMU leaves a guest stopped for ever whose load failed before anything was touched.
#[test]
fn a_load_that_touched_nothing_leaves_the_guest_running() {
    let folder = folder();
    let mut inside = Inside::new(folder.path(), Way::Attached);
    inside.running.start();
    inside.running.wait_for_rounds(2);
    inside.create("a");
    let stopped = inside.running.program.with_fault("qemu.load.begin=stop");
    let mut revert = stopped.command(&["revert", "web", "a", "--json"]);
    let revert = revert.stdout(Stdio::piped()).spawn().expect("it starts");
    wait_until_stopped(revert.id());
    // After everything was checked, somebody takes the snapshot away.
    let arguments = json!({ "job-id": "x", "tag": inside.tag("a"), "devices": DISKS });
    inside.qmp("snapshot-delete", &arguments);
    wait_until("it is deleted", || {
        let jobs = inside.qmp("query-jobs", &json!({}));
        jobs.as_array().expect("jobs").iter().any(|job| job["id"] == "x" && job["status"] == "concluded")
    });
    tool("kill", &["-CONT", &revert.id().to_string()]);
    let ended = revert.wait_with_output().expect("it ends");
    assert_eq!(ended.status.code(), Some(5), "{ended:?}");
    assert!(String::from_utf8_lossy(&ended.stdout).contains("does not exist"), "{ended:?}");
    inside.expect_alive("a load that failed");
    assert_eq!(inside.qmp("query-status", &json!({}))["status"], "running");
}

/// QEMU reverts the disks first; where the memory fails after that, the guest must never go on. The folder has to outlive
/// the machine: who ends it finds it there.
fn load_into_another_size(way: Way) -> (tempfile::TempDir, Inside, std::process::Output) {
    let folder = folder();
    let mut inside = Inside::new(folder.path(), way);
    inside.running.start();
    inside.running.wait_for_rounds(2);
    inside.create("a");
    inside.running.kill();
    inside.running.start_by_hand_with(&["-m", "32"]);
    inside.running.wait_for_rounds(5);
    let revert = inside.running.program.command(&["revert", "web", "a", "--json"]).output().expect("it runs");
    (folder, inside, revert)
}

#[test]
fn a_torn_load_is_done_anew_in_a_fresh_process() {
    let since = Instant::now();
    let (_folder, mut inside, revert) = load_into_another_size(Way::Managed);
    assert_eq!(revert.status.code(), Some(0), "{revert:?}");
    inside.model.revert("a");
    inside.expect_at("a", since);
    inside.check("a load in two tries");
}

#[test]
fn a_torn_load_ends_a_machine_that_snaptree_may_not_start() {
    let (_folder, inside, revert) = load_into_another_size(Way::Attached);
    assert_eq!(revert.status.code(), Some(5), "{revert:?}");
    let said = String::from_utf8_lossy(&revert.stdout).into_owned();
    assert!(said.contains("needs-attention") || said.contains("the machine is off"), "{said}");
    wait_until("QEMU has ended", || inside.running.pid().is_none());
    let kept = &inside.model.snapshots["a"].contents;
    assert_eq!(inside.disks(), DISKS.map(|disk| kept[disk]), "the disks are of one instant");
}

#[test]
fn the_two_kinds_are_not_mixed_and_a_create_follows_the_domain() {
    let folder = folder();
    let mut inside = Inside::new(folder.path(), Way::Managed);
    let program = inside.running.program.clone();
    program.json(0, &["create", "web", "outside"]);
    let refused = program.json(4, &["create", "web", "x", "--internal"]);
    assert!(refused["error"]["message"].as_str().expect("a text").contains("not mixed"), "{refused}");
    program.json(0, &["delete", "web", "outside"]);
    inside.create("a");
    // Without a word about it, it goes where the others are.
    inside.running.start();
    inside.running.wait_for_rounds(2);
    let refused = program.json(4, &["create", "web", "x", "--disk-only"]);
    assert!(
        refused["error"]["message"].as_str().expect("a text").contains("must include the memory"),
        "{refused}"
    );
    program.json(0, &["create", "web", "b"]);
    assert_eq!(program.json(0, &["show", "web", "b"])["memory"], "internal");
    let xml = program.run(&["xml", "web", "a"]).stdout;
    assert!(xml.contains("<disk name='vda' snapshot='internal'/>"), "{xml}");
    inside.running.kill();
    program.json(0, &["domain", "remove", "web", "--flatten"]);
    let info = tool("qemu-img", &["info", "--output=json", text(&inside.running.paths[0])]);
    let info: serde_json::Value = serde_json::from_slice(&info.stdout).expect("JSON");
    assert_eq!(info["snapshots"], serde_json::Value::Null, "{info}");
}

/// What QEMU is not told of would be of another instant.
#[test]
fn a_machine_that_writes_another_disk_is_refused() {
    let folder = folder();
    let mut inside = Inside::new(folder.path(), Way::Attached);
    let other = folder.path().join("other.raw");
    std::fs::write(&other, vec![0; 1 << 20]).expect("a disk");
    let drive = format!("file={},format=raw,if=virtio", text(&other));
    inside.running.start_by_hand_with(&["-drive", &drive]);
    inside.running.wait_for_rounds(1);
    let refused = inside.running.program.json(4, &["create", "web", "a", "--internal"]);
    assert!(refused["error"]["message"].as_str().expect("a text").contains("other.raw"), "{refused}");
}

#[test]
fn a_revert_that_keeps_is_undone_by_a_revert() {
    let folder = folder();
    let mut inside = Inside::new(folder.path(), Way::Managed);
    inside.running.start();
    inside.running.wait_for_rounds(2);
    inside.create("a");
    inside.running.wait_for_rounds(10);
    let planned = inside.running.program.json(0, &["revert", "web", "a", "--keep", "--dry-run"]);
    assert_eq!(planned["lost"], json!([]), "{planned}");
    assert_eq!(planned["steps"].as_array().expect("steps").len(), 2, "{planned}");
    let before = inside.counters();
    let since = Instant::now();
    inside.running.program.json(0, &["revert", "web", "a", "--keep"]);
    inside.expect_at("a", since);
    let listed = inside.running.program.json(0, &["list", "web"]);
    let names = listed["snapshots"].as_array().expect("snapshots").iter();
    let kept = names
        .filter_map(|snapshot| snapshot["name"].as_str())
        .find(|name| name.starts_with("before-revert-"));
    let kept = kept.expect("it is kept").to_owned();
    let (rounds, disk) = before.expect("it ran");
    let mark = snaptree_tests::inside::Mark { rounds: (rounds, rounds + 50), ahead: disk - rounds };
    inside.marks.insert(kept.clone(), mark);
    let since = Instant::now();
    inside.running.program.json(0, &["revert", "web", &kept]);
    inside.expect_at(&kept, since);
}

/// A snapshot that somebody took out of an image is lost, and what others keep there is none of ours.
#[test]
fn a_tag_that_vanished_is_lost_and_foreign_tags_are_left_alone() {
    let folder = folder();
    let mut inside = Inside::new(folder.path(), Way::Managed);
    let image = text(&inside.running.paths[0]).to_owned();
    tool("qemu-img", &["snapshot", "-c", "mine", &image]);
    inside.create("a");
    inside.create("b");
    let program = inside.running.program.clone();
    program.json(0, &["drift", "web"]);
    tool("qemu-img", &["snapshot", "-d", &inside.tag("a"), &image]);
    let found = program.json(5, &["drift", "web"]);
    assert!(found.to_string().contains("snapshot-lost"), "{found}");
    assert!(program.run(&["revert", "web", "a", "--json"]).code == Some(4));
    program.json(0, &["delete", "web", "a"]);
    let info = tool("qemu-img", &["snapshot", "-l", &image]);
    assert!(String::from_utf8_lossy(&info.stdout).contains("mine"));
}
