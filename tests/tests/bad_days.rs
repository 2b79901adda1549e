//! Bad days of the state directory and of the disks, with real images beside them: what is full, locked or damaged is
//! said, nothing is half left, no snapshot's content changes, and once it is put right the same command works.

#![cfg(feature = "lab")]
#![allow(clippy::expect_used, reason = "a test")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use snaptree_tests::images::text;
use snaptree_tests::kept::KeptLog;
use snaptree_tests::lab::{DISKS, Lab, Model};
use snaptree_tests::program::Ran;
use snaptree_tests::random::Random;
use snaptree_tests::rewind::Rewind;
use snaptree_tests::scenarios::{branched, expect_nothing_open, snapshot};
use snaptree_tests::small::SmallDisk;

const ONE_DISK: &[&str] = &[DISKS[0]];
/// The exit code of a Rust program that panicked.
const PANICKED: i32 = 101;

fn error_of(ran: &Ran) -> (String, String) {
    let error = &ran.json()["error"];
    let word = |key: &str| error[key].as_str().unwrap_or_else(|| panic!("{key} in {ran:?}")).to_owned();
    (word("code"), word("message"))
}

/// Expects that `recover` ends what is open, and that everything is as before the command or as after it; says which.
fn recovered(lab: &mut Lab, what: &str, apply: impl Fn(&mut Model)) -> bool {
    let told = lab.program.json(0, &["recover"]);
    expect_nothing_open(lab, &format!("{what}, after {told}"));
    let mut after = lab.model.clone();
    apply(&mut after);
    let took_place = lab.tree_is(&after);
    if took_place {
        lab.model = after;
    }
    lab.check(what);
    assert_eq!(lab.program.json(0, &["audit", "verify"])["ok"], true, "{what}");
    took_place
}

#[test]
fn a_state_directory_that_is_full_at_any_append_costs_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let state = SmallDisk::mount(&folder.path().join("state"), "16M");
    let mut lab = Lab::with_disks(folder.path(), ONE_DISK);
    let mut came = BTreeMap::new();
    // Up to the most that one create appends to the write-ahead log, and on.
    for left_kib in (0..=144).step_by(12) {
        let name = format!("s{left_kib}");
        lab.write("vda", left_kib / 12 * 3, 3, 7);
        state.fill(left_kib as u64 * 1024);
        let ran = lab.program.run(&["create", "web", &name, "--json"]);
        let what = format!("{left_kib} KiB left: {ran:?}");
        let code = ran.code.expect("an exit code");
        assert!([0, 1, 5].contains(&code), "{what}");
        if code != 0 {
            let (word, message) = error_of(&ran);
            assert!(word == "no-space" && message.contains("full"), "{what}");
        }
        *came.entry(code).or_insert(0) += 1;
        // Reading goes on meanwhile.
        lab.program.json(0, &["list", "web"]);
        state.empty();
        let model = lab.model.clone();
        let took_place = recovered(&mut lab, &what, |model| model.create(&name, ONE_DISK));
        assert!(took_place || code != 0, "{what}");
        if !took_place {
            assert_eq!(lab.model, model);
            lab.program.json(0, &["create", "web", &name]);
            lab.model.create(&name, ONE_DISK);
            lab.check(&format!("{what}, asked for again"));
        }
    }
    println!("full at an append: exit codes {came:?}");
    assert_eq!(
        came.keys().collect::<Vec<_>>(),
        [&0, &1, &5],
        "refused at once, cut in the middle, done: {came:?}"
    );
}

#[test]
fn a_merge_that_does_not_fit_is_put_off_with_the_reason_and_done_when_there_is_space() {
    let mut put_off = 0;
    for left_kib in [0, 64, 160, 256, 400, 600] {
        let folder = tempfile::tempdir().expect("a folder");
        let small = SmallDisk::mount(&folder.path().join("images"), "24M");
        let mut lab = Lab::with_state(small.path(), &folder.path().join("state"), ONE_DISK);
        lab.program = lab.program.with_settings(&folder.path().join("settings"), "[space]\nmargin = 0\n");
        branched(&mut lab);
        // What b holds is more than what is left.
        small.fill(left_kib * 1024);
        let ran = lab.program.run(&["delete", "web", "b", "--json"]);
        let what = format!("{left_kib} KiB left: {ran:?}");
        match ran.code {
            Some(0) => {
                let merges = ran.json()["merges"].as_array().cloned().unwrap_or_default();
                let late: Vec<_> = merges.iter().filter(|merge| merge["outcome"] != "succeeded").collect();
                put_off += usize::from(!late.is_empty());
                for merge in late {
                    assert!(merge["reason"].as_str().is_some_and(|why| why.contains("space")), "{what}");
                }
            }
            code => {
                assert!(matches!(code, Some(1 | 4)), "{what}");
                assert_eq!(error_of(&ran).0, "no-space", "{what}");
            }
        }
        expect_nothing_open(&lab, &what);
        small.empty();
        if !recovered(&mut lab, &what, |model| model.delete("b")) {
            lab.program.json(0, &["delete", "web", "b"]);
            lab.model.delete("b");
        }
        lab.program.json(0, &["reconcile", "web"]);
        lab.check(&format!("{what}, with space again"));
        let stones = &lab.program.json(0, &["reconcile", "web"])["domains"][0]["deferred"];
        assert_eq!(*stones, serde_json::json!([]), "{what}: folded away");
        snapshot(&mut lab, "afterwards", 50);
        lab.check(&what);
    }
    assert!(put_off > 0, "no merge was put off");
}

/// Another program that has the database for itself.
struct Locker(Child);

impl Locker {
    fn lock(database: &Path) -> Self {
        let mut shell = Command::new("sqlite3")
            .arg(database)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("sqlite3 starts");
        let mut stdin = shell.stdin.take().expect("a pipe");
        stdin.write_all(b"BEGIN EXCLUSIVE;\n.print held\n").expect("it reads");
        shell.stdin = Some(stdin);
        let mut said = String::new();
        BufReader::new(shell.stdout.take().expect("a pipe")).read_line(&mut said).expect("it answers");
        assert_eq!(said.trim(), "held");
        Self(shell)
    }
}

impl Drop for Locker {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

#[test]
fn a_database_that_another_program_has_locked_is_waited_for_and_then_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut lab = Lab::with_disks(folder.path(), ONE_DISK);
    snapshot(&mut lab, "one", 1);
    let database = folder.path().join("state/snaptree.db");

    let locked = Locker::lock(&database);
    let ran = lab.program.run(&["create", "web", "two", "--json"]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(error_of(&ran).1.contains("another program"), "{ran:?}");
    assert_eq!(lab.program.json(0, &["list", "web"])["current"], "one", "reading goes on");
    assert!(!something_is_open(&lab), "nothing was begun");
    drop(locked);
    lab.check("after the lock");
    snapshot(&mut lab, "two", 2);

    // The same in the middle of an operation: it stays open, and is finished.
    let mut cut =
        lab.program.with_fault("qemu.switch.done=stop").command(&["revert", "web", "one", "--json"]);
    let cut = cut.stdout(Stdio::piped()).spawn().expect("it starts");
    snaptree_tests::program::wait_until_stopped(cut.id());
    let locked = Locker::lock(&database);
    snaptree_tests::images::tool("kill", &["-CONT", &cut.id().to_string()]);
    let output = cut.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(5), "{output:?}");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("another program"), "{said}");
    drop(locked);
    assert!(recovered(&mut lab, "locked in the middle", |model| model.revert("one")));
}

fn something_is_open(lab: &Lab) -> bool {
    lab.program.json(0, &["op", "list", "--open"])["operations"] != serde_json::json!([])
}

/// What a damaged log led to.
#[derive(Default, Debug)]
struct Flips {
    tried: usize,
    seen_by_verify: usize,
    refused: usize,
    done: usize,
}

/// Exit codes and standard outputs.
type Answers = Vec<(i32, String)>;

/// Asks a log for all that it tells; first whether it is sound.
fn ask_everything(lab: &Lab, what: &str) -> Answers {
    let questions: [&[&str]; 6] = [
        &["audit", "verify"],
        &["list", "web"],
        &["show", "web", "b"],
        &["log"],
        &["op", "list"],
        &["domain", "show", "web"],
    ];
    let answer = |args: &[&str]| {
        let ran = lab.program.run(&[args, &["--json"][..]].concat());
        let code = ran.code.unwrap_or_else(|| panic!("{what}, {args:?}: {ran:?}"));
        assert!(code != PANICKED && !ran.stderr.contains("panicked"), "{what}, {args:?}: {ran:?}");
        (code, ran.stdout)
    };
    questions.into_iter().map(answer).collect()
}

/// Asks a damaged log for everything, and for an operation.
fn damage(lab: &mut Lab, base: &Model, sound: Option<&Answers>, what: &str, flips: &mut Flips) {
    flips.tried += 1;
    let answers = ask_everything(lab, what);
    flips.seen_by_verify += usize::from(answers[0].0 != 0);
    // Where verify finds nothing, nothing is told otherwise. (A write-ahead log whose sums are wrong ends earlier for
    // SQLite, and nothing in the file tells that it went on.)
    if let Some(sound) = sound.filter(|_| answers[0].0 == 0) {
        assert_eq!(&answers, sound, "{what}");
    }
    assert_eq!(lab.check_images(what, &[base]), 0, "reading changes nothing");
    let (command, apply): (&[&str], fn(&mut Model)) = match flips.tried % 3 {
        0 => (&["create", "web", "new"], |model| model.create("new", ONE_DISK)),
        1 => (&["revert", "web", "a"], |model| model.revert("a")),
        _ => (&["delete", "web", "c"], |model| model.delete("c")),
    };
    let ran = lab.program.run(&[command, &["--json"][..]].concat());
    let code = ran.code.unwrap_or_else(|| panic!("{what}, {command:?}: {ran:?}"));
    assert!(code != PANICKED && !ran.stderr.contains("panicked"), "{what}, {command:?}: {ran:?}");
    let mut after = base.clone();
    apply(&mut after);
    let came = lab.check_images(&format!("{what}, {command:?}: {ran:?}"), &[base, &after]);
    if code == 0 {
        assert_eq!(came, 1, "{what}, {command:?} said that it is done: {ran:?}");
        flips.done += 1;
    } else {
        flips.refused += 1;
    }
}

#[test]
fn a_flipped_byte_or_page_anywhere_in_the_database_is_no_panic_and_changes_no_image() {
    let folder = tempfile::tempdir().expect("a folder");
    let machine = folder.path().join("machine");
    std::fs::create_dir(&machine).expect("a folder");
    let mut lab = Lab::with_disks(&machine, ONE_DISK);
    let database = machine.join("state/snaptree.db");
    // Who reads what was keeps what is new in the write-ahead log; a connection that cannot write leaves it there.
    let reader = rusqlite::Connection::open_with_flags(&database, rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY)
        .expect("the database");
    reader.execute_batch("BEGIN; SELECT count(*) FROM events").expect("it is read");
    branched(&mut lab);
    lab.check("before it all");
    drop(reader);
    let base = lab.model.clone();
    let mut random = Random::new(20_261_123);
    let mut flips = Flips::default();
    // Once with the newest events in the write-ahead log, once with all in the file.
    for checkpointed in [false, true] {
        if checkpointed {
            snaptree_tests::images::tool("sqlite3", &[text(&database), "PRAGMA wal_checkpoint(TRUNCATE)"]);
        }
        let rewind = Rewind::of(&machine, &folder.path().join(format!("inodes-{checkpointed}")));
        let kept = KeptLog::of(&machine.join("state"));
        let sound = ask_everything(&lab, "before it all");
        let file = usize::from(!checkpointed);
        let size = kept.sizes()[file];
        assert!(size > 8 * 4096, "{:?}", kept.sizes());
        // The header, bytes anywhere, whole pages of noise and of zeros.
        for n in 0..30 {
            let (at, with) = match n {
                0..4 => (random.below(100), vec![0xff]),
                4..22 => {
                    let at = random.below(size);
                    (at, vec![kept.bytes(file, at, 1)[0] ^ (1 << random.below(8))])
                }
                22..26 => (
                    random.below(size / 4096) * 4096,
                    (0..512).flat_map(|_| random.next_u64().to_ne_bytes()).collect(),
                ),
                _ => (random.below(size / 4096) * 4096, vec![0; 4096]),
            };
            let what = format!("{} bytes at {at} of file {file}", with.len());
            rewind.restore();
            kept.damaged(file, at, &with).put_back();
            damage(&mut lab, &base, checkpointed.then_some(&sound), &what, &mut flips);
        }
        rewind.restore();
    }
    println!("{flips:?}");
    assert!(
        flips.tried >= 50 && flips.seen_by_verify > 0 && flips.refused > 0 && flips.done > 0,
        "{flips:?}"
    );
    // What was never damaged is as it was.
    lab.check("after it all");
}
