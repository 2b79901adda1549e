//! Snapshots with the machine's memory, and the way back to them, on a real QEMU.
//!
//! The guest counts in its memory and on its disk, so a mixture of two instants shows in one line that it prints.
//! `SNAPTREE_SEED=N` repeats the random run, `SNAPTREE_OPERATIONS=N` makes it longer (each kind of operation at least a
//! third of them), `SNAPTREE_TEST_ACCEL=kvm` has the guest run on KVM.

#![cfg(feature = "lab")]
#![allow(clippy::expect_used, reason = "a test")]

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use snaptree_tests::alive::Alive;
use snaptree_tests::images::text;
use snaptree_tests::program::wait_until_stopped;
use snaptree_tests::random::Random;
use snaptree_tests::running::{Way, becomes};

/// More snapshots than this are not kept, so that a run stays short.
const SNAPSHOTS_MAX: usize = 8;

/// A machine that runs, and its folder, which has to outlive it: who ends the machine finds it there.
fn stage() -> (tempfile::TempDir, Alive) {
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder");
    let mut alive = Alive::new(folder.path(), Way::Managed);
    alive.running.start();
    alive.running.wait_for_rounds(2);
    (folder, alive)
}

fn memory_file(alive: &Alive, name: &str) -> PathBuf {
    let shown = alive.running.program.json(0, &["show", "web", name]);
    PathBuf::from(shown["memory_file"]["file"].as_str().expect("a memory file"))
}

fn revert(alive: &mut Alive, name: &str) {
    let printed = alive.running.printed();
    alive.running.program.json(0, &["revert", "web", name]);
    alive.model.revert(name);
    alive.expect_resumed_from(name, printed);
}

/// One random operation; which one.
fn act(alive: &mut Alive, random: &mut Random, number: usize) -> &'static str {
    let names: Vec<String> = alive.model.snapshots.keys().cloned().collect();
    match number % 5 {
        1 | 3 => {
            // To what runs, is paused, or is off.
            match random.below(4) {
                0 => {
                    alive.running.program.json(0, &["domain", "stop", "web", "--force"]);
                }
                1 => {
                    let paused = random.pick::<String>(&names);
                    alive.running.program.json(0, &["revert", "web", paused, "--paused"]);
                    alive.model.revert(paused);
                }
                _ => {}
            }
            let name: &String = random.pick(&names);
            revert(alive, name);
            "revert"
        }
        0 | 2 if names.len() < SNAPSHOTS_MAX => {
            alive.create_with_memory(&format!("s{number}"));
            "create"
        }
        _ => {
            for name in &names[..names.len().saturating_sub(SNAPSHOTS_MAX / 2)] {
                alive.running.program.json(0, &["delete", "web", name]);
                alive.model.delete(name);
            }
            "delete"
        }
    }
}

#[test]
fn memory_and_disks_are_of_one_instant_whatever_is_done() {
    let number = |name: &str, default: u64| {
        std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
    };
    let seed = number("SNAPTREE_SEED", 6);
    let operations = usize::try_from(number("SNAPTREE_OPERATIONS", 24)).expect("a number");
    println!("SNAPTREE_SEED={seed} SNAPTREE_OPERATIONS={operations}");
    let (_folder, mut alive) = stage();
    let mut random = Random::new(seed);
    let (mut creates, mut reverts, mut deletes) = (0, 0, 0);
    for operation in 0..operations {
        let apart = alive.running.apart();
        let done = act(&mut alive, &mut random, operation);
        match done {
            "create" => creates += 1,
            "revert" => reverts += 1,
            _ => deletes += 1,
        }
        let what = format!("operation {operation}, {done}");
        alive.check(&what);
        alive.expect_alive(&what);
        if done != "revert" {
            assert_eq!(alive.running.apart(), apart, "{what}: the guest is the same");
        }
    }
    println!("{creates} creates with memory, {reverts} reverts to memory, {deletes} deletes");
    assert!(creates * 10 >= operations * 3 && reverts * 10 >= operations * 3, "{creates} and {reverts}");
    assert_eq!(alive.running.program.json(0, &["audit", "verify"])["ok"], true);
}

#[test]
fn memory_that_cannot_be_loaded_takes_nothing_from_the_machine() {
    let (_folder, mut alive) = stage();
    alive.create_with_memory("a");
    alive.running.wait_for_rounds(3);
    let file = memory_file(&alive, "a");
    // As if the disk had rotten: what tells of a change is as it was.
    let kept = fs::metadata(&file).expect("it is there").modified().expect("a time");
    let opened = fs::OpenOptions::new().write(true).open(&file).expect("it opens");
    let length = opened.metadata().expect("a length").len();
    opened.write_all_at(&vec![0xff; 4096], length / 8).expect("it is written");
    opened.set_modified(kept).expect("the time");
    drop(opened);

    let ran = alive.running.program.run(&["revert", "web", "a", "--yes"]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stderr.contains("cannot be loaded, and nothing was given up"), "{ran:?}");
    assert!(alive.running.pid().is_some(), "it runs on");
    alive.check("after memory that could not be loaded");
    alive.expect_alive("memory that could not be loaded");
}

#[test]
fn a_memory_file_that_was_changed_is_drift_and_blocks_what_needs_it_alone() {
    let (_folder, mut alive) = stage();
    alive.create_with_memory("a");
    alive.create_with_memory("b");
    let [first, second] = ["a", "b"].map(|name| memory_file(&alive, name));
    fs::File::options().append(true).open(&first).expect("it opens").set_len(1).expect("it is cut");
    fs::remove_file(&second).expect("it goes");
    for name in ["a", "b"] {
        let refused = alive.running.program.json(4, &["revert", "web", name]);
        assert_eq!(refused["error"]["code"], "drift", "{refused}");
    }
    let drift = alive.running.program.run(&["drift", "web"]);
    for file in [&first, &second] {
        assert!(drift.stdout.contains(text(file)), "{drift:?}");
    }
    alive.expect_alive("refusals");
    alive.create("c");
    for name in ["a", "b"] {
        alive.running.program.json(0, &["delete", "web", name]);
        alive.model.delete(name);
    }
    assert!(!first.exists(), "it goes with its snapshot");
    alive.check("without memory");
}

#[test]
fn memory_goes_with_its_snapshot_and_is_counted_meanwhile() {
    let (_folder, mut alive) = stage();
    alive.create("plain");
    alive.create_with_memory("a");
    let file = memory_file(&alive, "a");
    let bytes = fs::metadata(&file).expect("it is there").len();
    let shown = alive.running.program.json(0, &["show", "web", "a"]);
    assert_eq!(shown["memory"], "external");
    assert_eq!(shown["memory_file"]["size"], bytes);
    assert_eq!(shown["memory_file"]["way"], "background");
    assert!(shown["frees"]["at_least"].as_i64().is_some_and(|frees| frees >= 4096), "{shown}");
    assert!(shown["allocated"].as_u64().is_some_and(|all| all > bytes), "{shown}");
    let xml = alive.running.program.run(&["xml", "web", "a"]).stdout;
    assert!(xml.contains(&format!("<memory snapshot='external' file='{}'/>", text(&file))), "{xml}");
    alive.running.program.json(0, &["delete", "web", "a"]);
    alive.model.delete("a");
    assert!(!file.exists());
    alive.check("deleted");

    alive.create_with_memory("b");
    let file = memory_file(&alive, "b");
    alive.running.program.json(0, &["domain", "stop", "web", "--force"]);
    let refused = alive.running.program.json(4, &["create", "web", "off", "--memory"]);
    assert!(refused["error"]["message"].as_str().is_some_and(|text| text.contains("is off")), "{refused}");
    alive.running.program.json(0, &["domain", "remove", "web", "--flatten", "--yes"]);
    assert!(!file.exists());
}

#[test]
fn where_memory_cannot_be_written_in_the_background_the_guest_stands_still_for_it_and_that_is_said() {
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder");
    let mut alive = Alive::new(folder.path(), Way::Managed);
    // No kernel tells of writes to memory that is a file on a disk and may be written by others, too.
    let shared = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder on a disk");
    let launch = format!(
        "{} -object memory-backend-file,id=ram,size=16M,share=on,mem-path={} -machine memory-backend=ram",
        launch_of(&alive),
        text(shared.path())
    );
    alive.running.program.json(0, &["domain", "set", "web", "--launch", &launch]);
    alive.running.start();
    alive.running.wait_for_rounds(2);

    let apart = alive.running.apart();
    let told = alive.running.program.run(&["create", "web", "a", "--memory"]);
    assert_eq!(told.code, Some(0), "{told:?}");
    assert!(told.stderr.contains("the guest was stopped while its memory was written"), "{told:?}");
    alive.created("a");
    alive.has_memory("a", apart);
    alive.expect_alive("memory that was taken of a guest that stood still");
    let shown = alive.running.program.json(0, &["show", "web", "a"]);
    assert_eq!(shown["memory_file"]["way"], "stopped");
    alive.running.wait_for_rounds(3);
    revert(&mut alive, "a");
    alive.check("reverted to it");
}

#[test]
fn a_revert_that_keeps_the_memory_is_undone_by_a_revert() {
    let (_folder, mut alive) = stage();
    alive.create_with_memory("a");
    alive.running.wait_for_rounds(3);
    let (printed, apart) = (alive.running.printed(), alive.running.apart());
    alive.running.program.json(0, &["revert", "web", "a", "--keep"]);
    let list = alive.running.program.json(0, &["list", "web"]);
    let snapshots = list["snapshots"].as_array().expect("snapshots");
    let kept = snapshots.iter().find(|snapshot| snapshot["name"] != "a").expect("one more");
    assert_eq!(kept["parent"], "a", "{list}");
    let kept = kept["name"].as_str().expect("a name").to_owned();
    assert_eq!(alive.running.program.json(0, &["show", "web", &kept])["memory"], "external");
    alive.created(&kept);
    alive.has_memory(&kept, apart);
    alive.model.revert("a");
    alive.expect_resumed_from("a", printed);
    alive.check("reverted, with what was before kept");

    revert(&mut alive, &kept);
    alive.check("back where it was");
}

/// A QEMU that has its memory has its disks as well (7.2), so that another one is refused; or it holds no locks until its
/// guest goes on (10), and must not go on then.
#[test]
fn a_machine_that_was_started_meanwhile_is_never_joined_by_one_with_old_memory() {
    let (_folder, mut alive) = stage();
    alive.create_with_memory("a");
    alive.running.program.json(0, &["domain", "stop", "web", "--force"]);
    let mut command =
        alive.running.program.with_fault("qemu.load.begin@1=stop").command(&["revert", "web", "a", "--yes"]);
    let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("it starts");
    wait_until_stopped(child.id());
    let mut other = other_qemu(&alive);
    let before = alive.running.counters();
    let runs_or_is_refused =
        becomes(|| other.try_wait().is_ok_and(|ended| ended.is_some()) || alive.running.counters() != before);
    assert!(runs_or_is_refused, "the other one does something");
    let is_refused = other.try_wait().expect("it is ours").is_some();
    let printed = alive.running.printed();
    let resumed = Command::new("kill").args(["-CONT", &child.id().to_string()]).status();
    assert!(resumed.expect("kill runs").success());
    let ended = child.wait_with_output().expect("it ends");
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    if is_refused {
        assert_eq!(ended.status.code(), Some(0), "{said}");
        alive.model.revert("a");
        alive.expect_resumed_from("a", printed);
        return alive.check("after another one was refused");
    }
    assert_eq!(ended.status.code(), Some(1), "{said}");
    assert!(other.try_wait().expect("it is ours").is_none(), "the other one goes on: {said}");
    assert!(becomes(|| alive.running.lines_since(printed).len() > 3));
    let boots: std::collections::BTreeSet<i64> =
        alive.running.lines_since(printed).iter().map(|(m, d)| i64::from(*d) - i64::from(*m)).collect();
    assert_eq!(boots.len(), 1, "one guest alone writes: {boots:?}");
    other.kill().expect("it is ours");
    other.wait().expect("it ended");
    assert!(said.contains("somebody else started the machine meanwhile"), "{said}");
    alive.running.program.json(0, &["recover"]);
    alive.model.revert("a");
    alive.check("after the other one");
}

/// How Snaptree starts the machine.
fn launch_of(alive: &Alive) -> String {
    let shown: Value = alive.running.program.json(0, &["domain", "show", "web"]);
    shown["config"]["runs"]["launch"].as_str().expect("a launch command").to_owned()
}

/// A QEMU that somebody starts on the registered paths, with a monitor of its own.
fn other_qemu(alive: &Alive) -> std::process::Child {
    let folder = alive.running.paths[0].parent().expect("a folder");
    let beside = |name: &str| folder.join(name).to_str().expect("text").to_owned();
    let mut words = launch_of(alive);
    for (from, to) in [
        ("{vda}", beside("vda.qcow2")),
        ("{vdb}", beside("vdb.qcow2")),
        ("{vda.format}", "qcow2".to_owned()),
        ("{qmp}", beside("other.qmp")),
        ("{pidfile}", beside("other.pid")),
        ("{incoming}", String::new()),
    ] {
        words = words.replace(from, &to);
    }
    let mut words = words.split_whitespace();
    let program = words.next().expect("a program");
    Command::new(Path::new(program)).args(words).stdin(Stdio::null()).spawn().expect("it starts")
}
