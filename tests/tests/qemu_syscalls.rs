//! The program, qemu-img, and both are killed at the exact system calls of every kind of operation on real images.
//!
//! By default some points of each kind are tried; `SNAPTREE_POINTS=all` tries them all, `SNAPTREE_POINTS=N` about N
//! of each way to kill, and three times as many of Snaptree's own calls on folders and modes.

#![cfg(feature = "lab")]
#![allow(clippy::expect_used, reason = "a test")]

use std::collections::BTreeMap;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use snaptree_tests::images::{Leaks, text, tool};
use snaptree_tests::scenarios::{self, Scenario, Tree, expect_nothing_open};
use snaptree_tests::scene::Scene;
use snaptree_tests::strace::{self, Fate, Point, STRUCTURE, Tool, ToolPoint, WRITES};

/// How many points of a way to kill are tried.
#[derive(Clone, Copy)]
struct Sizes {
    structure: usize,
    writes: usize,
    tool: usize,
    both: usize,
    orphaned: usize,
    /// First kills, and then kills of the recovery of each.
    again: (usize, usize),
}

impl Sizes {
    fn wanted(default: Self) -> Self {
        let Ok(wanted) = std::env::var("SNAPTREE_POINTS") else { return default };
        let all = if wanted == "all" { usize::MAX } else { wanted.parse().expect("a number, or all") };
        let again = if wanted == "all" { (16, usize::MAX) } else { (all.div_ceil(10), 10) };
        Self { structure: all.saturating_mul(3), writes: all, tool: all, both: all, orphaned: all, again }
    }
}

/// What became of the points of one way to kill.
#[derive(Default)]
struct Tally {
    recovered: usize,
    before: usize,
    missed: usize,
    leaking: usize,
    open: usize,
    failed: Vec<String>,
}

/// A point at which nothing was killed: the calls of several threads are shared out otherwise in every run.
struct Missed;

/// What an orphaned qemu-img does while a recovery is under way.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Orphan {
    /// It goes on with its work.
    GoesOn,
    /// It never does, and has to be ended.
    IsStuck,
}

/// A machine in front of the operation, and what came of every try.
struct Stage {
    scene: Scene,
    tool: Tool,
    trace: PathBuf,
    /// Whether the last operation was left open.
    left_open: bool,
    table: BTreeMap<&'static str, Tally>,
}

impl Stage {
    fn new(scenario: Scenario) -> Self {
        let scene = Scene::new(scenario);
        let tool = Tool::new(scene.folder().join("tool"));
        let trace = scene.folder().join("trace");
        Self { scene, tool, trace, left_open: false, table: BTreeMap::new() }
    }

    fn begin(&mut self, leaks: Leaks) {
        self.scene.begin();
        self.scene.lab.tolerate_leaks(leaks);
        self.left_open = false;
    }

    fn operation(&self) -> Command {
        let mut args = self.scene.scenario.command.to_vec();
        args.push("--json");
        self.scene.lab.program.command(&args)
    }

    /// The points of a command, found by letting it run undisturbed.
    fn discover(&self, command: &Command, kinds: &[&'static str]) -> Vec<Point> {
        let output = run(&mut strace::under(command, &self.trace, kinds, None));
        assert!(output.status.success(), "undisturbed: {output:?}");
        strace::points(&self.trace, kinds)
    }

    /// Runs a command that dies at a point.
    fn kill(&self, command: &Command, point: Point) -> Result<(), Missed> {
        let output = run(&mut strace::under(command, &self.trace, &[], Some(point)));
        if output.status.success() && !strace::was_killed(&self.trace) {
            return Err(Missed);
        }
        assert_eq!(output.status.code(), None, "killed by a signal: {output:?}");
        Ok(())
    }

    /// A machine could be started before anybody recovers: all its disks are as before the operation, or as after it.
    /// A qemu-img that lives on is waited for: nothing else may read what it writes.
    fn expect_bootable(&mut self, what: &str) {
        for lock in std::fs::read_dir(self.scene.machine.join("state/run")).into_iter().flatten() {
            let lock = File::open(lock.expect("an entry").path()).expect("an operation's lock");
            lock.lock().expect("qemu-img ends");
        }
        let mut after = self.scene.model.clone();
        (self.scene.scenario.apply)(&mut after);
        let one =
            self.scene.lab.machine_reads_as(&self.scene.model) || self.scene.lab.machine_reads_as(&after);
        assert!(
            one,
            "{what}: right after the kill the registered paths open neither what they did nor the new"
        );
    }

    /// Nothing is left beside the images, and no lock of an operation.
    fn expect_no_rubbish(&self, what: &str) {
        let known: Vec<&str> = self.scene.lab.paths.values().map(|path| text(path)).collect();
        for entry in std::fs::read_dir(&self.scene.machine).expect("the folder") {
            let path = entry.expect("an entry").path();
            let ours = path.ends_with("state") || path.ends_with(".snaptree") || known.contains(&text(&path));
            assert!(ours, "{what}: {} is left", path.display());
        }
        let locks =
            std::fs::read_dir(self.scene.machine.join("state/run")).expect("the locks' folder").count();
        assert_eq!(locks, 0, "{what}: locks are left");
    }

    /// Tries one point, and counts what came of it.
    fn attempt(
        &mut self,
        way: &'static str,
        what: String,
        one: impl Fn(&mut Self, &str) -> Result<Tree, Missed>,
    ) {
        let what = format!("{}, {way}, {what}", self.scene.scenario.name);
        let result = catch_unwind(AssertUnwindSafe(|| {
            let tree = one(self, &what)?;
            self.expect_no_rubbish(&what);
            Ok(tree)
        }));
        let (leaking, open) = (self.scene.lab.leaking(), self.left_open);
        let tally = self.table.entry(way).or_default();
        match result {
            Ok(Ok(tree)) => {
                tally.recovered += 1;
                tally.before += usize::from(tree == Tree::Before);
                tally.leaking += usize::from(leaking > 0);
                tally.open += usize::from(open);
            }
            Ok(Err(Missed)) => tally.missed += 1,
            Err(panic) => {
                let told = panic.downcast_ref::<String>().cloned();
                tally.failed.push(format!("{what}: {}", told.unwrap_or_else(|| "a panic".to_owned())));
            }
        }
    }

    /// (a) Snaptree dies at a call of its own.
    fn kill_snaptree(&mut self, sizes: Sizes) {
        let kinds: Vec<&str> = STRUCTURE.iter().chain(&WRITES).copied().collect();
        self.begin(Leaks::Refused);
        let points = self.discover(&self.operation(), &kinds);
        let (structure, writes) = points.into_iter().partition(|point| STRUCTURE.contains(&point.calls));
        for point in [sample(structure, sizes.structure), sample(writes, sizes.writes)].concat() {
            self.attempt("snaptree", format!("{point:?}"), |stage, what| {
                stage.begin(Leaks::Refused);
                stage.kill(&stage.operation(), point)?;
                // At a write it may be about a child that has begun, and then recovery shall meet it.
                if STRUCTURE.contains(&point.calls) {
                    stage.expect_bootable(what);
                }
                Ok(stage.scene.scenario.recover(&mut stage.scene.lab, what))
            });
        }
    }

    /// Snaptree dies at a call of its own, and its recovery at another, and then it recovers.
    fn kill_recovery(&mut self, (firsts, seconds): (usize, usize)) {
        self.begin(Leaks::Refused);
        let points = self.discover(&self.operation(), &STRUCTURE);
        for first in sample(points, firsts) {
            self.begin(Leaks::Refused);
            if self.kill(&self.operation(), first).is_err() {
                continue;
            }
            let recovery = self.scene.lab.program.command(&["recover", "--json"]);
            let points = self.discover(&recovery, &STRUCTURE);
            for second in sample(points, seconds) {
                self.attempt("recovery", format!("{first:?} then {second:?}"), |stage, what| {
                    stage.begin(Leaks::Refused);
                    stage.kill(&stage.operation(), first)?;
                    stage.kill(&recovery, second)?;
                    stage.expect_bootable(what);
                    Ok(stage.scene.scenario.recover(&mut stage.scene.lab, what))
                });
            }
        }
    }

    /// The points of qemu-img's runs, found by letting it all run undisturbed.
    fn discover_tool(&mut self) -> Vec<ToolPoint> {
        self.begin(Leaks::Refused);
        let mut command = self.operation();
        self.tool.inject(&mut command, Fate::Counted, None);
        let output = run(&mut command);
        assert!(output.status.success(), "undisturbed: {output:?}");
        self.tool.points()
    }

    /// (b) to (d): qemu-img dies alone, with Snaptree, or outlives it.
    fn kill_tool(&mut self, sizes: Sizes) {
        let points = self.discover_tool();
        for at in sample(points.clone(), sizes.tool) {
            for (way, fate) in [("qemu-img", Fate::Killed), ("qemu-img, always", Fate::KilledAgainAndAgain)] {
                self.attempt(way, format!("{at:?}"), |stage, what| stage.tool_dies(fate, at, what));
            }
        }
        for at in sample(points.clone(), sizes.both) {
            self.attempt("both", format!("{at:?}"), |stage, what| stage.both_die(at, what));
        }
        let inside: Vec<ToolPoint> = points.into_iter().filter(|at| at.after > 0).collect();
        for at in sample(inside, sizes.orphaned) {
            self.attempt("orphan", format!("{at:?}"), |stage, what| {
                stage.tool_is_orphaned(at, Orphan::GoesOn, what)
            });
        }
    }

    /// Snaptree brings it to an end by itself: done, or failed with the tree as it was. Where qemu-img cannot ever be
    /// run it may also leave the operation open, and a recovery finishes it once qemu-img can be run.
    fn tool_dies(&mut self, fate: Fate, at: ToolPoint, what: &str) -> Result<Tree, Missed> {
        self.begin(Leaks::Tolerated);
        let mut command = self.operation();
        self.tool.inject(&mut command, fate, Some(at));
        let output = run(&mut command);
        if self.tool.hit().is_none() {
            return Err(Missed);
        }
        self.left_open = fate == Fate::KilledAgainAndAgain && self.something_is_open();
        if self.left_open {
            return Ok(self.scene.scenario.recover(&mut self.scene.lab, what));
        }
        let code = output.status.code();
        assert!(matches!(code, Some(0 | 1)), "{what}: {output:?}");
        expect_nothing_open(&self.scene.lab, what);
        if code == Some(0) {
            (self.scene.scenario.apply)(&mut self.scene.lab.model);
        }
        self.scene.lab.check(&format!("{what}, by itself"));
        self.scene.lab.model = self.scene.model.clone();
        let tree = self.scene.scenario.recover(&mut self.scene.lab, what);
        assert_eq!(tree == Tree::After, code == Some(0), "{what}: it said {output:?}");
        Ok(tree)
    }

    /// Whether an operation is open; none needs anyone's verdict.
    fn something_is_open(&self) -> bool {
        let listed = self.scene.lab.program.json(0, &["op", "list", "--open"]);
        let open = listed["operations"].as_array().expect("operations");
        assert!(open.iter().all(|operation| operation["outcome"] != "needs-attention"), "{listed}");
        !open.is_empty()
    }

    fn both_die(&mut self, at: ToolPoint, what: &str) -> Result<Tree, Missed> {
        self.begin(Leaks::Tolerated);
        let mut command = self.operation();
        self.tool.inject(&mut command, Fate::BothKilled, Some(at));
        let output = run(&mut command);
        // strace itself may fail over a process that dies in its hands, and then kills nobody else.
        let strace_failed = String::from_utf8_lossy(&output.stdout).contains("strace: ptrace(");
        if self.tool.hit().is_none() || strace_failed {
            return Err(Missed);
        }
        assert_eq!(output.status.code(), None, "{what}: killed by a signal: {output:?}");
        self.expect_bootable(what);
        Ok(self.scene.scenario.recover(&mut self.scene.lab, what))
    }

    /// Snaptree dies, and qemu-img is stopped in the middle of its work.
    fn tool_is_orphaned(&mut self, at: ToolPoint, orphan: Orphan, what: &str) -> Result<Tree, Missed> {
        self.begin(Leaks::Tolerated);
        let mut command = self.operation();
        self.tool.inject(&mut command, Fate::Orphaned, Some(at));
        // The orphan has the pipes of its Snaptree's output as well, and would keep this waiting.
        let status =
            command.stdout(Stdio::null()).stderr(Stdio::null()).status().expect("the program starts");
        let Some(stopped) = self.tool.hit() else { return Err(Missed) };
        assert_eq!(status.code(), None, "{what}: killed by a signal");
        let mut recovery = self.scene.lab.program.command(&["recover", "--json"]);
        let mut recovery = recovery.stdout(Stdio::null()).spawn().expect("the program starts");
        if orphan == Orphan::GoesOn {
            tool("kill", &["-CONT", &stopped.to_string()]);
        }
        let status = recovery.wait().expect("it ends");
        assert_eq!(status.code(), Some(0), "{what}: recovery with an orphan");
        Ok(self.scene.scenario.recover(&mut self.scene.lab, what))
    }

    fn report(&self) {
        println!("{} ({} disks)", self.scene.scenario.name, self.scene.scenario.disks.len());
        println!(
            "  {:18} {:>6} {:>9} {:>6} {:>6} {:>6} {:>7} {:>6}",
            "killed", "points", "recovered", "before", "leaks", "left open", "not hit", "failed"
        );
        for (way, tally) in &self.table {
            let points = tally.recovered + tally.failed.len();
            println!(
                "  {way:18} {points:>6} {:>9} {:>6} {:>6} {:>6} {:>7} {:>6}",
                tally.recovered,
                tally.before,
                tally.leaking,
                tally.open,
                tally.missed,
                tally.failed.len()
            );
        }
        let failed: Vec<&str> =
            self.table.values().flat_map(|tally| &tally.failed).map(String::as_str).collect();
        assert!(failed.is_empty(), "{} points failed:\n{}", failed.len(), failed.join("\n"));
    }
}

fn run(command: &mut Command) -> Output {
    command.output().expect("it starts; strace is needed as well")
}

/// At most `wanted` of them, evenly spread, the first and the last among them.
fn sample<T>(all: Vec<T>, wanted: usize) -> Vec<T> {
    let count = all.len();
    if count <= wanted {
        return all;
    }
    let last = wanted.saturating_sub(1).max(1);
    let mut chosen: Vec<usize> = (0..wanted).map(|n| n * (count - 1) / last).collect();
    chosen.dedup();
    all.into_iter().enumerate().filter(|(index, _)| chosen.contains(index)).map(|(_, one)| one).collect()
}

fn matrix(scenario: Scenario, default: Sizes) {
    let sizes = Sizes::wanted(default);
    let mut stage = Stage::new(scenario);
    stage.kill_snaptree(sizes);
    stage.kill_tool(sizes);
    stage.kill_recovery(sizes.again);
    stage.report();
}

const SOME: Sizes = Sizes { structure: 8, writes: 2, tool: 3, both: 3, orphaned: 1, again: (2, 2) };
const FEW: Sizes = Sizes { structure: 4, writes: 1, tool: 2, both: 2, orphaned: 1, again: (1, 1) };

/// The grace that an orphan is given is a matter of seconds, so this is tried at two points only.
#[test]
fn an_orphan_that_is_stuck_is_ended() {
    for scenario in [scenarios::DELETE_SEVERAL, scenarios::DELETE_ROOT] {
        let mut stage = Stage::new(scenario.with_one_disk());
        let points = stage.discover_tool();
        let inside: Vec<ToolPoint> = points.into_iter().filter(|at| at.after > 0).collect();
        let at = inside[inside.len() / 2];
        stage.attempt("stuck orphan", format!("{at:?}"), |stage, what| {
            stage.tool_is_orphaned(at, Orphan::IsStuck, what)
        });
        stage.report();
    }
}

#[test]
fn the_first_create() {
    matrix(scenarios::FIRST_CREATE, SOME);
}

#[test]
fn the_first_create_of_one_disk() {
    matrix(scenarios::FIRST_CREATE.with_one_disk(), FEW);
}

#[test]
fn a_create() {
    matrix(scenarios::CREATE, SOME);
}

#[test]
fn a_revert() {
    matrix(scenarios::REVERT, SOME);
}

#[test]
fn a_revert_of_one_disk() {
    matrix(scenarios::REVERT.with_one_disk(), FEW);
}

#[test]
fn a_delete_with_several_dependants() {
    matrix(scenarios::DELETE_SEVERAL, SOME);
}

#[test]
fn a_delete_with_several_dependants_of_one_disk() {
    matrix(scenarios::DELETE_SEVERAL.with_one_disk(), FEW);
}

#[test]
fn a_delete_with_one_dependant() {
    matrix(scenarios::DELETE_ONE, SOME);
}

#[test]
fn a_delete_of_the_root() {
    matrix(scenarios::DELETE_ROOT, SOME);
}

#[test]
fn a_delete_of_the_root_of_one_disk() {
    matrix(scenarios::DELETE_ROOT.with_one_disk(), FEW);
}

#[test]
fn a_delete_of_several_in_a_row() {
    matrix(scenarios::DELETE_BRANCH, SOME);
}

#[test]
fn a_delete_of_several_in_a_row_of_one_disk() {
    matrix(scenarios::DELETE_BRANCH.with_one_disk(), FEW);
}

#[test]
fn a_delete_of_the_current_one() {
    matrix(scenarios::DELETE_CURRENT, FEW);
}
