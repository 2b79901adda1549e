//! Bad days of processes and clocks, on real images: tools that hang, fail or lose their answers, two programs at once,
//! signals in the middle, and clocks that jump.

#![cfg(feature = "lab")]
#![allow(clippy::expect_used, reason = "a test")]

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use snaptree_tests::images::tool;
use snaptree_tests::lab::{DISKS, Lab, Model};
use snaptree_tests::program::{Program, wait_until_stopped};
use snaptree_tests::scenarios::{branched, chain, expect_nothing_open, snapshot};
use snaptree_tests::wrapped::Wrapped;

const ONE_DISK: &[&str] = &[DISKS[0]];
/// Nobody waits longer than this for a program that was told to end.
const ENDS_WITHIN: Duration = Duration::from_secs(10);
/// A qemu-img that hangs for 3 s at its first write and then goes on: the first time that it creates, rebases, ...
const SLOW: &str = "[ -e $FOLDER/$1 ] && exec qemu-img \"$@\"\necho 1 > $FOLDER/$1\n\
                    exec strace -f -o /dev/null -e trace=pwrite64 -e inject=pwrite64:delay_enter=3000000:when=1 \
                    qemu-img \"$@\"";

fn message(answer: &Value) -> &str {
    answer["error"]["message"].as_str().unwrap_or_else(|| panic!("no message in {answer}"))
}

/// The kinds of an operation's events, in order.
fn kinds(program: &Program, operation: &str) -> Vec<String> {
    let told = program.run(&["log", "--operation", operation, "--json"]);
    let kind = |line: &str| {
        let event: Value = serde_json::from_str(line).expect("an event a line");
        event["kind"].as_str().expect("a kind").to_owned()
    };
    told.stdout.lines().map(kind).collect()
}

fn times(kinds: &[String], kind: &str) -> usize {
    kinds.iter().filter(|found| *found == kind).count()
}

#[test]
fn a_tool_that_hangs_past_its_time_and_then_finishes_has_one_effect() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut lab = Lab::with_disks(folder.path(), ONE_DISK);
    branched(&mut lab);
    let settings = "[qemu]\ntool-timeout = \"1s\"\ncopy-timeout = \"1s\"\n";
    let wrapped = Wrapped::new(&folder.path().join("tool"), SLOW);
    let slow = wrapped.on(&lab.program.with_settings(&folder.path().join("settings"), settings));

    let answer = slow.json(0, &["create", "web", "new"]);
    lab.model.create("new", ONE_DISK);
    lab.check("a create");
    let kinds = kinds(&slow, answer["operation"].as_str().expect("an id"));
    assert_eq!(times(&kinds, "Snapshot.Created"), 1, "{kinds:?}");
    assert_eq!(times(&kinds, "Operation.StepFinished"), 1, "{kinds:?}");
    assert!(times(&kinds, "System.Recovered") >= 1, "the log tells that it was not known: {kinds:?}");
    let shown = slow.run(&["op", "show", answer["operation"].as_str().expect("an id")]).stdout;
    assert!(shown.contains("took longer than 1 s"), "{shown}");

    assert_eq!(wrapped.number("create"), 1, "it was slow");

    // A pull that takes longer than it may is finished all the same, or put off; it is never half done.
    slow.json(0, &["delete", "web", "b"]);
    lab.model.delete("b");
    lab.check("a delete");
    assert_eq!(wrapped.number("rebase"), 1, "it was slow");
    lab.check("its merge");
    assert_eq!(lab.program.json(0, &["list", "web", "--all"])["snapshots"].as_array().map(Vec::len), Some(4));
}

#[test]
fn a_tool_that_hangs_for_good_is_ended_and_its_step_done_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut lab = Lab::with_disks(folder.path(), ONE_DISK);
    snapshot(&mut lab, "one", 1);
    // The first run stops before it does anything, and nobody lets it go on.
    let script = "[ -e $FOLDER/hung ] || { echo $$ > $FOLDER/hung; kill -STOP $$; }; exec qemu-img \"$@\"";
    let wrapped = Wrapped::new(&folder.path().join("tool"), script);
    let program =
        lab.program.with_settings(&folder.path().join("settings"), "[qemu]\ntool-timeout = \"1s\"\n");
    wrapped.on(&program).json(0, &["create", "web", "two"]);
    lab.model.create("two", ONE_DISK);
    lab.check("afterwards");
    let hung = Path::new("/proc").join(wrapped.number("hung").to_string());
    let command = std::fs::read_to_string(hung.join("cmdline")).unwrap_or_default();
    assert!(!command.contains("qemu-img"), "the one that hung is gone: {command:?}");
}

/// What may go wrong with the first three runs of qemu-img, and what a create comes to.
#[test]
fn a_tool_that_fails_three_times_and_then_works_makes_one_snapshot() {
    for failure in [
        "echo 'qemu-img: x: Could not open x: Failed to get \"write\" lock' >&2; exit 1",
        "echo 'qemu-img: x: Cannot allocate memory' >&2; exit 1",
        "kill -9 $$",
    ] {
        let folder = tempfile::tempdir().expect("a folder");
        let mut lab = Lab::with_disks(folder.path(), ONE_DISK);
        snapshot(&mut lab, "one", 1);
        let script = format!(
            "n=$(($(cat $FOLDER/runs 2>/dev/null || echo 0) + 1)); echo $n > $FOLDER/runs\n\
             if [ $n -le 3 ]; then {failure}; fi\nexec qemu-img \"$@\""
        );
        let wrapped = Wrapped::new(&folder.path().join("tool"), &script);
        let answer = wrapped.on(&lab.program).json(0, &["create", "web", "two"]);
        assert_eq!(wrapped.number("runs"), 4, "{failure}");
        lab.model.create("two", ONE_DISK);
        lab.check(failure);
        let kinds = kinds(&lab.program, answer["operation"].as_str().expect("an id"));
        let tries = times(&kinds, "Operation.AttemptFailed") + times(&kinds, "System.Recovered");
        assert_eq!(tries, 3, "each failure is in the log: {kinds:?}");
        expect_nothing_open(&lab, failure);
    }
}

/// The work is done, and nobody is told: by a kill, by the exit code that a shell gives for one, by silence.
#[test]
fn a_tool_whose_answer_is_lost_after_its_work_makes_one_snapshot() {
    for loss in ["kill -9 $$", "exit 137", "sleep 1000 <&-"] {
        let folder = tempfile::tempdir().expect("a folder");
        let mut lab = Lab::with_disks(folder.path(), ONE_DISK);
        snapshot(&mut lab, "one", 1);
        let script = format!(
            "qemu-img \"$@\" || exit\n[ -e $FOLDER/lost ] && exit 0\necho 1 > $FOLDER/lost\nexec 0<&-\n{loss}"
        );
        let wrapped = Wrapped::new(&folder.path().join("tool"), &script);
        let settings = "[qemu]\ntool-timeout = \"1s\"\n";
        let program = wrapped.on(&lab.program.with_settings(&folder.path().join("settings"), settings));
        let answer = program.json(0, &["create", "web", "two"]);
        assert_eq!(wrapped.number("lost"), 1, "{loss}");
        lab.model.create("two", ONE_DISK);
        lab.check(loss);
        let kinds = kinds(&lab.program, answer["operation"].as_str().expect("an id"));
        assert_eq!(times(&kinds, "Snapshot.Created"), 1, "{loss}: {kinds:?}");
        assert_eq!(times(&kinds, "System.Recovered"), 1, "{loss}: {kinds:?}");
        snapshot(&mut lab, "three", 3);
        lab.check(loss);
    }
}

/// An error that says nothing is no reason to try again: it is taken back, and asked for again it works.
#[test]
fn a_tool_that_reports_an_error_after_its_work_is_believed_and_nothing_stays() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut lab = Lab::with_disks(folder.path(), ONE_DISK);
    snapshot(&mut lab, "one", 1);
    let script = "qemu-img \"$@\"; echo 'qemu-img: x: Input/output error' >&2; exit 1";
    let wrapped = Wrapped::new(&folder.path().join("tool"), script);
    let answer = wrapped.on(&lab.program).json(1, &["create", "web", "two"]);
    assert!(message(&answer).contains("Input/output error"), "{answer}");
    lab.check("taken back");
    snapshot(&mut lab, "two", 2);
    lab.check("asked for again");
}

/// Starts a command that stops itself at a fault point.
fn stopped_at(program: &Program, place: &str, args: &[&str]) -> Child {
    let mut command = program.with_fault(&format!("{place}=stop")).command(args);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    wait_until_stopped(child.id());
    child
}

fn signal(child: &Child, name: &str) {
    tool("kill", &[&format!("-{name}"), &child.id().to_string()]);
}

/// Sends the signal and expects an end by itself in time.
fn told_to_end(child: Child, name: &str) -> Output {
    let begun = Instant::now();
    signal(&child, name);
    signal(&child, "CONT");
    let output = child.wait_with_output().expect("it ends");
    assert!(begun.elapsed() < ENDS_WITHIN, "it took {:?}", begun.elapsed());
    assert_eq!(output.status.signal(), None, "it ends by itself: {output:?}");
    output
}

/// The place at which a command is stopped, the command, and what the model says of it.
type Interrupted = (&'static str, &'static [&'static str], fn(&mut Model));

#[test]
fn a_signal_in_the_middle_finishes_or_parks_the_step_and_says_what_is_open() {
    let create = |model: &mut Model| model.create("new", ONE_DISK);
    let cases: [Interrupted; 5] = [
        ("append.after", &["create", "web", "new"], create),
        ("qemu.switch.begin", &["create", "web", "new"], create),
        ("qemu.switch.renamed", &["revert", "web", "a"], |model| model.revert("a")),
        ("qemu.switch.done", &["delete", "web", "b"], |model| model.delete("b")),
        ("qemu.pull.started", &["delete", "web", "b"], |model| model.delete("b")),
    ];
    for (place, args, apply) in cases {
        for name in ["TERM", "INT"] {
            let folder = tempfile::tempdir().expect("a folder");
            let mut lab = Lab::with_disks(folder.path(), ONE_DISK);
            branched(&mut lab);
            let what = format!("{args:?}, SIG{name} at {place}");
            let output = told_to_end(stopped_at(&lab.program, place, args), name);
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            let open = lab.program.json(0, &["op", "list", "--open"]);
            let open = open["operations"].as_array().expect("operations").len();
            let code = output.status.code();
            assert!(matches!(code, Some(0 | 1 | 5)), "{what}: {output:?}");
            if open > 0 && code == Some(5) {
                assert!(said.contains("recover"), "{what}: {said}");
            }
            assert_eq!(code == Some(5), open > 0 && code != Some(0), "{what}: {open} open, {output:?}");
            lab.program.json(0, &["recover"]);
            expect_nothing_open(&lab, &what);
            let mut after = lab.model.clone();
            apply(&mut after);
            if lab.tree_is(&after) {
                lab.model = after;
            }
            assert!(code != Some(0) || lab.tree_is(&lab.model), "{what}");
            lab.check(&what);
        }
    }
}

#[test]
fn a_signal_while_a_tool_hangs_parks_the_step_and_recovery_finishes_it() {
    for name in ["TERM", "INT"] {
        let folder = tempfile::tempdir().expect("a folder");
        let mut lab = Lab::with_disks(folder.path(), ONE_DISK);
        branched(&mut lab);
        let wrapped = Wrapped::new(
            &folder.path().join("tool"),
            "echo $$ > $FOLDER/hung; kill -STOP $$; exec qemu-img \"$@\"",
        );
        let mut command = wrapped.on(&lab.program).command(&["revert", "web", "a", "--json"]);
        // The tool that lives on would keep a pipe of standard error open.
        let child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("it starts");
        let hung = wait_for_number(&wrapped, "hung");
        wait_until_stopped(hung);
        let output = told_to_end(child, name);
        assert_eq!(output.status.code(), Some(5), "{output:?}");
        let answer: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!(answer["outcome"], Value::Null, "{answer}");
        assert_eq!(answer["error"]["code"], "parked", "{answer}");
        assert!(answer["error"]["hint"].as_str().is_some_and(|hint| hint.contains("recover")), "{answer}");

        // What was left goes on, and recovery waits for it.
        tool("kill", &["-CONT", &hung.to_string()]);
        let recovered = lab.program.json(0, &["recover"]);
        assert_eq!(recovered["operations"][0]["outcome"], "succeeded", "{recovered}");
        lab.model.revert("a");
        lab.check(name);
    }
}

/// A layer is pulled while its header cannot be written. Where that is not to be had, it is pulled all the same.
#[test]
fn a_layer_is_pulled_without_the_driver_that_refuses_writes_without_direct_ones_and_where_it_has_a_bitmap() {
    let refuse = |word: &str, says: &str| {
        format!(
            "case \"$*\" in *{word}*) echo \"qemu-img: Could not open 'x': {says}\" >&2; echo 1 > $FOLDER/refused; exit 1;; \
             esac\n"
        )
    };
    let last = "exec qemu-img \"$@\"";
    let no_driver = refuse("blkdebug", "Unknown driver 'blkdebug'") + last;
    let no_direct = refuse("directsync", "filesystem does not support O_DIRECT") + &no_driver;
    // QEMU writes the header of an image that holds a dirty bitmap when it opens it.
    let bitmap = "case \"$*\" in *directsync*) echo 1 > $FOLDER/refused;; esac\n\
                  [ $1 = create ] || exec qemu-img \"$@\"\nqemu-img \"$@\" || exit\n\
                  while [ $# -gt 2 ]; do shift; done\nexec qemu-img bitmap --add \"$1\" backup";
    for script in [no_driver.as_str(), &no_direct, bitmap] {
        let folder = tempfile::tempdir().expect("a folder");
        let mut lab = Lab::with_disks(folder.path(), ONE_DISK);
        let wrapped = Wrapped::new(&folder.path().join("tool"), script);
        let program = wrapped.on(&lab.program);
        let plain = std::mem::replace(&mut lab.program, program);
        branched(&mut lab);
        // A pull cannot bring a bitmap along, so whoever deletes has to give it up.
        let give_up: &[&str] = if script == bitmap { &["--give-up", "backup"] } else { &[] };
        let deleted = lab.program.json(0, &[&["delete", "web", "b"], give_up].concat());
        assert_eq!(deleted["merges"][0]["outcome"], "succeeded", "{script}: {deleted}");
        assert_eq!(wrapped.number("refused"), 1, "{script}");
        lab.program = plain;
        lab.model.delete("b");
        lab.check(script);
    }
}

/// Ctrl-C does not wait for a merge that takes hours: qemu-img is ended, and the merge is done another time.
#[test]
fn a_merge_by_qemu_img_is_called_off_while_it_is_at_work() {
    // What two stand upon is pulled up into each; what one stands upon takes it into the registered image.
    let ways: [(fn(&mut Lab), _, _); 2] = [(branched, "b", "rebase"), (chain, "a", "commit")];
    for (lay, deleted, command) in ways {
        let folder = tempfile::tempdir().expect("a folder");
        let mut lab = Lab::with_disks(folder.path(), ONE_DISK);
        lay(&mut lab);
        let script =
            format!("[ $1 = {command} ] || exec qemu-img \"$@\"\necho $$ > $FOLDER/at-work; exec sleep 600");
        let wrapped = Wrapped::new(&folder.path().join("tool"), &script);
        let mut asked = wrapped.on(&lab.program).command(&["delete", "web", deleted]);
        let child = asked.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
        let at_work = wait_for_number(&wrapped, "at-work");
        told_to_end(child, "INT");
        assert!(!Path::new("/proc").join(at_work.to_string()).exists(), "{command} goes on");
        lab.model.delete(deleted);
        lab.check(command);
        let operations = lab.program.json(0, &["op", "list"]);
        let operations = operations["operations"].as_array().expect("operations");
        let merge = operations.iter().find(|operation| operation["kind"] == "merge").expect("a merge");
        assert_eq!(merge["outcome"], "cancelled", "{merge}");
        let merged = lab.program.json(0, &["reconcile", "web"]);
        assert!(merged.to_string().contains("succeeded"), "{merged}");
        lab.check("merged later");
    }
}

/// The number that a script writes, once it is there.
fn wait_for_number(wrapped: &Wrapped, name: &str) -> u32 {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(number) = u32::try_from(wrapped.number(name)).ok().filter(|number| *number > 0) {
            return number;
        }
        assert!(Instant::now() < deadline, "it was never written");
        std::thread::yield_now();
    }
}

#[test]
fn a_second_program_is_told_who_has_the_state_and_takes_over_when_that_one_is_gone() {
    for place in ["qemu.switch.prepared", "qemu.switch.renamed"] {
        let folder = tempfile::tempdir().expect("a folder");
        let mut lab = Lab::with_disks(folder.path(), ONE_DISK);
        branched(&mut lab);
        let mut first = stopped_at(&lab.program, place, &["revert", "web", "a"]);
        for args in [&["create", "web", "new"][..], &["recover"], &["delete", "web", "c"]] {
            let refused = lab.program.json(4, &[args, &["--lock-timeout", "0"]].concat());
            assert_eq!(refused["error"]["code"], "in-use", "{refused}");
            assert!(message(&refused).contains(&first.id().to_string()), "{refused}");
        }
        // The frozen one holds what it holds; nobody else touched an image.
        let mut after = lab.model.clone();
        after.revert("a");
        lab.check_images(place, &[&lab.model.clone(), &after]);
        first.kill().expect("it is killed");
        first.wait().expect("it ends");
        let created = lab.program.json(0, &["create", "web", "new"]);
        assert_eq!(created["outcome"], "succeeded");
        lab.model.revert("a");
        lab.model.create("new", ONE_DISK);
        lab.check(place);
    }
}

/// The program under a clock that is off by this much (`-1h`, `+365d`).
fn at(program: &Program, offset: &str) -> Program {
    let library = ["x86_64-linux-gnu", "aarch64-linux-gnu"]
        .map(|machine| PathBuf::from(format!("/usr/lib/{machine}/faketime/libfaketime.so.1")))
        .into_iter()
        .find(|path| path.exists())
        .expect("libfaketime, which the lab installs");
    let mut program = program.clone();
    program.environment.retain(|(name, _)| *name != "FAKETIME");
    program
        .with_env("LD_PRELOAD", library.to_str().expect("a path"))
        .with_env("FAKETIME", offset)
        .with_env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
}

#[test]
fn a_clock_that_jumps_back_and_ahead_changes_no_order_and_loses_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut lab = Lab::with_disks(folder.path(), ONE_DISK);
    let real = lab.program.clone();
    snapshot(&mut lab, "now", 1);
    lab.program = at(&real, "-1h");
    snapshot(&mut lab, "an-hour-ago", 2);
    real.json(0, &["hold", "web", "now", "--reason", "kept", "--until", "30d"]);
    lab.program = at(&real, "+365d");
    snapshot(&mut lab, "in-a-year", 3);
    // By that clock the hold is over; by the real one it is not.
    let ahead = at(&real, "+365d");
    assert_eq!(real.json(4, &["delete", "web", "now"])["error"]["code"], "held");
    ahead.json(0, &["delete", "web", "now", "--dry-run"]);
    lab.program = real.clone();
    snapshot(&mut lab, "now-again", 4);
    lab.check("after all jumps");
    assert_eq!(real.json(0, &["audit", "verify"])["ok"], true);

    // The order of the log is that of seq; its times are what the clocks said.
    let log = real.run(&["log", "--kind", "Snapshot.Created", "--json"]).stdout;
    let events: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).expect("an event")).collect();
    let names: Vec<&str> = events.iter().filter_map(|event| event["data"]["name"].as_str()).collect();
    assert_eq!(names, ["now", "an-hour-ago", "in-a-year", "now-again"]);
    let whens: Vec<&str> = events.iter().filter_map(|event| event["at"].as_str()).collect();
    assert!(whens[1] < whens[0] && whens[0] < whens[3] && whens[3] < whens[2], "{whens:?}");
    let seqs: Vec<u64> = events.iter().filter_map(|event| event["seq"].as_u64()).collect();
    assert!(seqs.is_sorted(), "{seqs:?}");

    // A moment that lies before some event and after a later one is answered, and said to be so.
    let told = real.run(&["tree", "web", "--at", whens[1]]);
    assert_eq!(told.code, Some(0), "{told:?}");
    assert!(told.stderr.contains("clock") || told.stdout.contains("clock"), "{told:?}");
}

#[test]
fn a_request_that_waited_by_a_clock_that_jumped_ahead_expires_and_one_that_jumped_back_does_not() {
    for (offset, outcome) in [("+365d", "expired"), ("-1h", "succeeded")] {
        let folder = tempfile::tempdir().expect("a folder");
        let mut lab = Lab::with_disks(folder.path(), ONE_DISK);
        branched(&mut lab);
        // The request alone is in the log.
        let ran = lab.program.with_fault("append.before=kill").run(&["revert", "web", "a"]);
        assert_eq!(ran.code, None, "{ran:?}");
        let recovered = at(&lab.program, offset).json(0, &["recover"]);
        assert_eq!(recovered["operations"][0]["outcome"], outcome, "{offset}: {recovered}");
        if outcome == "succeeded" {
            lab.model.revert("a");
        }
        lab.check(offset);
    }
}
