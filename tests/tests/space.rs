//! Room on the file system: what does not fit is refused before anything is touched, what a delete frees is said
//! beforehand, and merges go no faster than they may.

#![cfg(feature = "lab")]
#![allow(clippy::expect_used, reason = "a test")]

use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use serde_json::Value;
use snaptree_tests::alive::Alive;
use snaptree_tests::images::{text, tool};
use snaptree_tests::lab::{DISKS, Lab};
use snaptree_tests::program::Program;
use snaptree_tests::running::{Running, Way, wait_until};
use snaptree_tests::scenarios::{branched, chain, snapshot};
use snaptree_tests::small::SmallDisk;

const ONE_DISK: &[&str] = &[DISKS[0]];
const MIB: u64 = 1 << 20;
/// Tables and headers of a small image: what an estimate from allocation cannot know exactly.
const TABLES_BYTES: u64 = 64 << 10;

/// A machine whose images are on a small file system, and the settings that it has.
struct Tight {
    folder: tempfile::TempDir,
    small: SmallDisk,
    lab: Lab,
}

impl Tight {
    fn new(margin: &str) -> Self {
        Self::with_settings(&format!("[space]\nmargin = \"{margin}\"\n"))
    }

    fn with_settings(settings: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let small = SmallDisk::mount(&folder.path().join("images"), "24M");
        let lab = Lab::with_state(small.path(), &folder.path().join("state"), ONE_DISK);
        let mut tight = Self { folder, small, lab };
        tight.set(settings);
        tight
    }

    fn set(&mut self, settings: &str) {
        self.lab.program = self.lab.program.with_settings(&self.folder.path().join("settings"), settings);
    }

    fn margin(&mut self, margin: &str) {
        self.set(&format!("[space]\nmargin = \"{margin}\"\n"));
    }

    fn listed(&self, name: &str) -> Value {
        let listed = self.lab.program.json(0, &["list", "web", "--all"]);
        let snapshots = listed["snapshots"].as_array().expect("snapshots");
        let found = snapshots.iter().find(|snapshot| snapshot["name"] == name);
        found.unwrap_or_else(|| panic!("{name} in {listed}")).clone()
    }

    fn events(&self) -> usize {
        let ran = self.lab.program.run(&["log", "--json"]);
        ran.stdout.lines().count()
    }
}

fn expect_all_of(text: &Value, parts: &[&str]) {
    let text = text.as_str().unwrap_or_else(|| panic!("no text: {text}"));
    for part in parts {
        assert!(text.contains(part), "'{part}' in: {text}");
    }
}

/// Bytes that the files of a folder and of those in it occupy.
fn occupied(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry"));
    entries
        .filter(|entry| entry.file_name() != "filler")
        .map(|entry| match entry.file_type().expect("a kind") {
            kind if kind.is_dir() => occupied(&entry.path()),
            kind if kind.is_file() => entry.metadata().expect("it is there").blocks() * 512,
            _ => 0,
        })
        .sum()
}

#[test]
fn a_create_without_room_is_refused_with_the_figures_and_touches_nothing() {
    let mut tight = Tight::new("4 MiB");
    snapshot(&mut tight.lab, "a", 1);
    tight.small.fill(4 * MIB + (64 << 10));
    let layers = std::fs::read_dir(&tight.lab.layers).expect("the layers").count();

    let dry = tight.lab.program.json(4, &["create", "web", "b", "--dry-run"]);
    assert_eq!(dry["error"]["code"], "no-space", "{dry}");
    let refused = tight.lab.program.json(4, &["create", "web", "b"]);
    assert_eq!(refused["error"]["code"], "no-space", "{refused}");
    assert_eq!(refused["steps"], serde_json::json!([]), "{refused}");
    let folder = text(&tight.lab.layers).to_owned();
    expect_all_of(
        &refused["error"]["message"],
        &["256.0 KiB", "4.1 MiB", "4.0 MiB", "space.margin", &folder],
    );
    expect_all_of(&refused["error"]["hint"], &["free some", "space.margin"]);
    assert_eq!(std::fs::read_dir(&tight.lab.layers).expect("the layers").count(), layers);
    tight.lab.check("refused");

    // The way back is not closed: it gives up more than it takes.
    tight.margin("24 MiB");
    tight.lab.program.json(0, &["revert", "web", "a"]);
    tight.lab.model.revert("a");
    tight.margin("3 MiB");
    snapshot(&mut tight.lab, "b", 2);
    tight.lab.check("with a smaller margin");
}

#[test]
fn a_merge_without_room_is_deferred_with_the_figures_and_done_when_there_is_room() {
    let mut tight = Tight::new("2 MiB");
    branched(&mut tight.lab);
    tight.small.fill(2 * MIB + (64 << 10));
    let before = occupied(tight.small.path());

    let dry = tight.lab.program.json(0, &["delete", "web", "b", "--dry-run"]);
    assert_eq!(dry["merges"][0]["outcome"], "deferred", "{dry}");
    assert!(dry["peak_space"].as_u64() > Some(64 << 10), "{dry}");

    // At once it cannot be: then nothing is deleted either.
    let events = tight.events();
    let refused = tight.lab.program.json(4, &["delete", "web", "b", "--now"]);
    assert_eq!(refused["error"]["code"], "no-space", "{refused}");
    expect_all_of(&refused["error"]["message"], &["cannot be merged now", "space.margin"]);
    assert!(tight.events() > events, "that it was refused is in the log");
    tight.lab.check("refused with --now");

    let done = tight.lab.program.json(0, &["delete", "web", "b"]);
    tight.lab.model.delete("b");
    assert_eq!(done["outcome"], "succeeded", "{done}");
    assert_eq!(done["merges"][0]["outcome"], "deferred", "{done}");
    let what = ["2.1 MiB", "2.0 MiB", "space.margin", "snaptree reconcile", text(&tight.lab.layers)];
    expect_all_of(&done["merges"][0]["reason"], &what);
    let tombstone = tight.listed("b");
    assert_eq!(
        (&tombstone["phase"], &tombstone["frees"]),
        (&"tombstone".into(), &Value::Null),
        "{tombstone}"
    );
    expect_all_of(&tombstone["reason"], &what);
    tight.lab.check("deferred");
    assert!(occupied(tight.small.path()) <= before + (64 << 10), "no data was moved");

    tight.small.empty();
    let reconciled = tight.lab.program.json(0, &["reconcile", "web"]);
    assert_eq!(reconciled["domains"][0]["deferred"], serde_json::json!([]), "{reconciled}");
    tight.lab.check("with room again");
    assert_eq!(
        tight.lab.program.json(0, &["list", "web", "--all"])["snapshots"].as_array().map(Vec::len),
        Some(3)
    );
}

#[test]
fn a_flattened_image_without_room_is_refused_and_the_domain_stays() {
    let mut tight = Tight::new("1 MiB");
    chain(&mut tight.lab);
    tight.small.fill(MIB + (256 << 10));
    let refused = tight.lab.program.json(4, &["domain", "remove", "web", "--flatten", "--yes"]);
    assert_eq!(refused["error"]["code"], "no-space", "{refused}");
    tight.lab.check("refused");
    tight.small.empty();
    tight.lab.program.json(0, &["domain", "remove", "web", "--flatten", "--yes"]);
    tight.lab.check_machine("flattened");
}

/// The file of a snapshot, and what it occupies by `qemu-img info`.
fn measured(shown: &Value) -> u64 {
    let file = shown["disks"][0]["file"].as_str().expect("a file");
    let info = tool("qemu-img", &["info", "-U", "--output=json", file]);
    let info: Value = serde_json::from_slice(&info.stdout).expect("JSON");
    info["actual-size"].as_u64().expect("a size")
}

/// What stands before it, the snapshot that is deleted, and where that stands.
type Case = (fn(&mut Lab), &'static str, &'static str);

#[test]
fn sizes_are_those_of_the_files_and_a_delete_frees_what_was_said() {
    let cases: [Case; 6] = [
        (branched, "c", "a leaf"),
        (branched, "b", "two dependants"),
        (branched, "d", "under the machine"),
        (chain, "b", "one dependant"),
        (chain, "a", "in the registered image"),
        (chain, "c", "one dependant, the machine"),
    ];
    for (prepare, name, what) in cases {
        let mut tight = Tight::new("0");
        prepare(&mut tight.lab);
        let program = &tight.lab.program;
        for snapshot in program.json(0, &["list", "web"])["snapshots"].as_array().expect("snapshots") {
            let name = snapshot["name"].as_str().expect("a name");
            let shown = program.json(0, &["show", "web", name]);
            assert_eq!(shown["allocated"], measured(&shown), "{what}: {shown}");
            for key in ["allocated", "frees"] {
                assert_eq!(shown[key], snapshot[key], "{what}: list and show agree");
            }
        }
        let said = tight.listed(name)["frees"].clone();
        let dry = program.json(0, &["delete", "web", name, "--dry-run"]);
        assert_eq!(dry["frees"], said, "{what}: {dry}");
        let before = i64::try_from(occupied(tight.small.path())).expect("small");
        program.json(0, &["delete", "web", name]);
        let freed = before - i64::try_from(occupied(tight.small.path())).expect("small");
        println!("{what}: freed {freed}, said {said}");
        let tables = i64::try_from(TABLES_BYTES).expect("small");
        let least = said["at_least"].as_i64().expect("a number");
        let most = said["at_most"].as_i64().expect("a number");
        assert!(least - tables <= freed && freed <= most + tables, "{what}: freed {freed}, said {said}");
        assert!(most > 0, "{what}: {said}");
        if what == "a leaf" {
            assert_eq!(least, most, "{what}: nothing else needs it");
        }
        tight.lab.model.delete(name);
        tight.lab.check(what);
    }
}

#[test]
fn the_past_and_what_cannot_be_seen_have_no_sizes() {
    let mut tight = Tight::new("0");
    chain(&mut tight.lab);
    let listed = tight.lab.program.json(0, &["list", "web", "--at", "0s"]);
    let snapshot = &listed["snapshots"][0];
    assert_eq!((&snapshot["allocated"], &snapshot["frees"]), (&Value::Null, &Value::Null), "{listed}");
}

/// 3 MiB.
#[test]
fn a_push_by_qemu_img_goes_no_faster_than_job_speed() {
    let folder = tempfile::tempdir().expect("a folder");
    let settings = "[qemu]\njob-speed = \"1 MiB/s\"\n";
    let mut lab = Lab::with_disks(folder.path(), ONE_DISK);
    lab.program = lab.program.with_settings(&folder.path().join("settings"), settings);
    let shown = lab.program.json(0, &["config", "show"]);
    assert_eq!(shown["settings"]["qemu"]["job-speed"], MIB, "{shown}");
    lab.write("vda", 0, 200, 1);
    lab.program.json(0, &["create", "web", "a"]);
    lab.model.create("a", ONE_DISK);
    // 192 blocks of 16 KiB.
    lab.write("vda", 0, 192, 2);
    // The registered image can only take the push of what stands on it.
    let began = Instant::now();
    let done = lab.program.json(0, &["delete", "web", "a"]);
    let took = began.elapsed();
    assert_eq!(done["merges"][0]["outcome"], "succeeded", "{done}");
    assert!(took >= Duration::from_secs(2), "3 MiB took {took:?}");
    lab.model.delete("a");
    lab.check("pushed slowly");
}

/// A daemon, ended when dropped.
struct Daemon(Child);

impl Daemon {
    /// Starts one, with a connection to it.
    fn start(program: &Program) -> (Self, UnixStream) {
        let socket = program.state.join("snaptree.sock");
        let daemon = Self(program.command(&["serve"]).spawn().expect("it starts"));
        let mut stream = None;
        wait_until("the daemon listens", || {
            stream = UnixStream::connect(&socket).ok();
            stream.is_some()
        });
        (daemon, stream.expect("a connection"))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        tool("kill", &[&self.0.id().to_string()]);
        self.0.wait().ok();
    }
}

/// Lets a daemon look at the tombstones of `web`, and returns all that it tells of it.
fn reconcile_by_daemon(running: &Running) -> Vec<Value> {
    let (_daemon, mut stream) = Daemon::start(&running.program);
    let request = "POST /v1/domains/web/reconcile HTTP/1.0\r\nhost: x\r\ncontent-length: 0\r\n\r\n";
    stream.write_all(request.as_bytes()).expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    let body = answer.split_once("\r\n\r\n").expect("an answer").1;
    body.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

#[test]
fn the_daemon_merges_once_there_is_room_and_nobody_has_to_ask() {
    let mut tight = Tight::with_settings("[space]\nmargin = \"2 MiB\"\n[drift]\nevery = \"200ms\"\n");
    branched(&mut tight.lab);
    tight.small.fill(2 * MIB + (64 << 10));
    let (_daemon, _connection) = Daemon::start(&tight.lab.program);
    let done = tight.lab.program.json(0, &["delete", "web", "b"]);
    tight.lab.model.delete("b");
    assert_eq!(done["merges"][0]["outcome"], "deferred", "{done}");
    tight.small.empty();
    wait_until("it is merged", || {
        let listed = tight.lab.program.json(0, &["list", "web", "--all"]);
        listed["snapshots"].as_array().is_some_and(|snapshots| snapshots.len() == 3)
    });
    tight.lab.check("merged by the daemon");
}

#[test]
fn under_a_machine_a_merge_waits_for_room_goes_no_faster_than_it_may_and_tells_how_far_it_is() {
    let folder = tempfile::tempdir().expect("a folder");
    let settings =
        |running: &Running, text: &str| running.program.with_settings(&folder.path().join("settings"), text);
    let mut alive = Alive::new(folder.path(), Way::Managed);
    alive.running.start();
    alive.running.wait_for_rounds(2);
    alive.create("a");
    // Some MiB, 64 KiB a round.
    alive.running.wait_for_rounds(48);
    alive.create("b");

    alive.running.program = settings(&alive.running, "[space]\nmargin = \"1024 TiB\"\n");
    let refused = alive.running.program.json(4, &["create", "web", "c"]);
    assert_eq!(refused["error"]["code"], "no-space", "{refused}");
    let done = alive.running.program.json(0, &["delete", "web", "a"]);
    alive.model.delete("a");
    assert_eq!(done["merges"][0]["outcome"], "deferred", "{done}");
    expect_all_of(&done["merges"][0]["reason"], &["space.margin"]);
    alive.check("deferred");

    alive.running.program = settings(&alive.running, "[qemu]\njob-speed = \"1 MiB/s\"\n");
    let began = Instant::now();
    let lines = reconcile_by_daemon(&alive.running);
    let took = began.elapsed();
    // The daemon looks at what is left over when it starts, and may have begun with it before it was asked.
    let listed = alive.running.program.json(0, &["op", "list"]);
    let merges =
        listed["operations"].as_array().expect("operations").iter().filter(|op| op["kind"] == "merge");
    let outcomes: Vec<&Value> = merges.map(|merge| &merge["outcome"]).collect();
    assert_eq!(outcomes, ["succeeded"], "{listed}; told: {lines:?}");
    let progress: Vec<u64> = lines
        .iter()
        .filter(|line| line["progress"]["bytes"]["total"].as_u64() > Some(MIB))
        .filter_map(|line| line["progress"]["bytes"]["done"].as_u64())
        .collect();
    assert!(progress.iter().max() > progress.iter().min(), "it moves: {progress:?}");
    assert!(took >= Duration::from_secs(2), "some MiB took {took:?}");
    alive.running.program = settings(&alive.running, "");
    alive.check("merged slowly");
    alive.expect_alive("a slow merge");
}
