//! T: clocks that are wrong, and clocks that leap.

#![cfg(feature = "lab")]

use std::collections::BTreeSet;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use serde_json::Value;
use snaptree_tests::daemon::Daemon;
use snaptree_tests::images::tool;
use snaptree_tests::program::Program;

/// The program under a clock that begins at that moment (UTC).
fn at(program: &Program, time: &str) -> Program {
    let library = ["x86_64-linux-gnu", "aarch64-linux-gnu"]
        .map(|machine| PathBuf::from(format!("/usr/lib/{machine}/faketime/libfaketime.so.1")))
        .into_iter()
        .find(|path| path.exists())
        .expect("libfaketime, which the lab installs");
    program
        .with_env("LD_PRELOAD", library.to_str().expect("a path"))
        .with_env("FAKETIME", &format!("@{time}"))
        .with_env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
        .with_env("TZ", "UTC")
}

/// A state with one simulated machine and a policy, under a clock that can be set.
struct Scene {
    folder: tempfile::TempDir,
    program: Program,
}

impl Scene {
    fn new(begin: &str, keep: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let program = Program::new(folder.path().join("s"));
        let scene = Self { folder, program };
        scene.at(begin).json(0, &["domain", "add", "web", "--driver", "sim"]);
        scene.set(begin, keep);
        scene
    }

    fn at(&self, time: &str) -> Program {
        at(&self.program, time)
    }

    fn set(&self, time: &str, keep: &str) {
        let file = self.folder.path().join("p.toml");
        let text = format!(
            "name = \"p\"\ndomains = [\"web\"]\nschedule = \"hourly\"\ntimezone = \"UTC\"\n[keep]\n{keep}\n"
        );
        std::fs::write(&file, text).expect("written");
        self.at(time).json(0, &["policy", "set", path(&file), "--yes"]);
    }

    /// A run by a clock that was set to `time` and that somebody says is right; what it took is there afterwards.
    fn believed(&self, time: &str) -> Value {
        let program = self.at(time);
        program.run(&["policy", "confirm-clock"]);
        self.run(time)
    }

    /// A run; what it took is there afterwards.
    fn run(&self, time: &str) -> Value {
        let ran = self.at(time).json(0, &["policy", "run", "p"]);
        let own = ran["runs"][0]["snapshot"].as_str().expect("a name").to_owned();
        assert!(self.snapshots().contains(&own), "{time}: {own} is gone: {ran}");
        ran
    }

    fn snapshots(&self) -> BTreeSet<String> {
        let list = self.program.json(0, &["list", "web"]);
        let name = |snapshot: &Value| snapshot["name"].as_str().expect("a name").to_owned();
        list["snapshots"].as_array().expect("snapshots").iter().map(name).collect()
    }

    fn plan(&self, time: &str) -> Value {
        self.at(time).json(0, &["policy", "plan", "p"])
    }

    fn events(&self, kind: &str) -> usize {
        self.program.run(&["log", "--kind", kind, "--json"]).stdout.lines().count()
    }
}

fn path(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[test]
fn t1_what_is_dated_later_than_now_displaces_nothing_and_no_run_deletes_its_own_snapshot() {
    let scene = Scene::new("2026-11-28 09:00:00", "last = 3");
    for time in ["2031-01-01 10:00:00", "2031-01-01 11:00:00", "2031-01-01 12:00:00"] {
        scene.believed(time);
    }
    let ahead = scene.snapshots();
    for hour in 14..=17 {
        scene.believed(&format!("2026-11-28 {hour}:00:00"));
    }
    let there = scene.snapshots();
    assert!(there.is_superset(&ahead), "what the clock has not reached stays: {there:?}");
    let of_today: Vec<&String> = there.difference(&ahead).collect();
    assert_eq!(of_today.len(), 3, "and uses up no count: {of_today:?}");
    assert!(of_today.iter().all(|name| !name.contains("20261128T14")), "the oldest went: {of_today:?}");
    let plan = scene.plan("2026-11-28 17:00:10");
    let future = |verdict: &&Value| verdict["reasons"][0] == "not counted: dated later than now";
    let verdicts = plan["domains"][0]["snapshots"].as_array().expect("verdicts");
    assert_eq!(verdicts.iter().filter(future).count(), 3, "{plan}");

    // By 2031 they count again, as the older ones that they are.
    scene.believed("2031-02-01 00:00:00");
    assert_eq!(scene.snapshots().intersection(&ahead).count(), 0, "three newer ones are there");
}

#[test]
fn t1_an_hour_back_is_enough() {
    let scene = Scene::new("2026-11-28 09:00:00", "last = 2");
    for time in ["09:40", "09:50", "10:00", "09:10", "09:20", "09:30", "09:40"] {
        scene.believed(&format!("2026-11-28 {time}:00"));
    }
    let there = scene.snapshots();
    assert_eq!(
        there.len(),
        4,
        "the last two by the clock as it is, and two that it has not reached: {there:?}"
    );
}

#[test]
fn t2_a_clock_that_is_a_year_ahead_once_deletes_nothing_and_is_told() {
    let scene = Scene::new("2026-11-01 00:00:00", "max-age = \"36h\"");
    for day in 1..=5 {
        scene.believed(&format!("2026-11-{day:02} 01:00:00"));
    }
    let before = scene.snapshots();
    let ran = scene.run("2027-11-05 02:00:00");
    assert_eq!(ran["runs"][0]["deletes"], Value::Array(Vec::new()), "{ran}");
    assert!(ran["clock"]["message"].as_str().is_some_and(|told| told.contains("confirm-clock")), "{ran}");
    for told in
        [scene.plan("2027-11-05 02:00:10"), scene.at("2027-11-05 02:00:10").json(0, &["policy", "runs"])]
    {
        assert!(told["clock"]["to"].as_str().is_some_and(|to| to.starts_with("2027")), "{told}");
    }
    // The clock is put right, and nothing was lost; what was taken meanwhile is of the future.
    scene.believed("2026-11-05 03:00:00");
    assert!(scene.snapshots().is_superset(&before));
    assert!(scene.events("Clock.Leapt") >= 2);
    assert_eq!(scene.program.json(0, &["audit", "verify"])["ok"], true);
}

#[test]
fn t_a_person_may_be_right_that_a_year_has_passed() {
    let scene = Scene::new("2026-11-01 00:00:00", "max-age = \"36h\"");
    scene.believed("2026-11-02 01:00:00");
    scene.run("2027-11-05 02:00:00");
    assert_eq!(scene.snapshots().len(), 2, "held back");
    scene.believed("2027-11-05 02:00:10");
    assert_eq!(scene.snapshots().len(), 2, "the one of a year ago went, and a second run took another");
    let refused = scene.at("2027-11-05 02:00:20").json(4, &["policy", "confirm-clock"]);
    assert!(
        refused["error"]["message"].as_str().is_some_and(|told| told.contains("not in doubt")),
        "{refused}"
    );
}

#[test]
fn t_a_leap_at_a_daemons_start_holds_its_deletes_and_is_notified() {
    let folder = tempfile::tempdir().expect("a folder");
    let fifo = folder.path().join("told");
    tool("mkfifo", &[path(&fifo)]);
    let script = format!("cat > {}", path(&fifo));
    let notify =
        format!("[notify]\non = [\"needs-attention\"]\ncommand = [\"/bin/sh\", \"-c\", \"{script}\"]");
    let scene = Scene::new("2026-11-01 00:00:00", "max-age = \"36h\"");
    scene.set("2026-11-01 00:00:01", &format!("max-age = \"36h\"\n{notify}"));
    scene.believed("2026-11-02 01:00:00");
    let daemon = Daemon::start(&scene.at("2027-11-05 02:00:00"));
    let mut told = String::new();
    std::fs::File::open(&fifo).expect("a pipe").read_to_string(&mut told).expect("told");
    let told: Value = serde_json::from_str(&told).expect("a document");
    assert_eq!(told["occasion"], "needs-attention", "{told}");
    assert!(told["message"].as_str().is_some_and(|told| told.contains("went forward")), "{told}");
    let socket = scene.program.state.join("snaptree.sock");
    let status = tool("curl", &["-sf", "--unix-socket", path(&socket), "http://localhost/v1/status"]);
    let status: Value = serde_json::from_slice(&status.stdout).expect("JSON");
    assert!(status["clock"]["to"].as_str().is_some_and(|to| to.starts_with("2027")), "{status}");
    daemon.kill();
    assert!(scene.snapshots().iter().any(|name| name.contains("202611")), "{:?}", scene.snapshots());
}
