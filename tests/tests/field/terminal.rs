//! U: at the terminal.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Stdio;

use snaptree_tests::daemon::Daemon;
use snaptree_tests::program::{Program, Ran};

/// A program on a state with the domain `web` on the simulated hypervisor.
fn web() -> (tempfile::TempDir, Program) {
    let folder = tempfile::tempdir().expect("a folder");
    let program = Program::new(folder.path().join("state"));
    program.json(0, &["domain", "add", "web", "--driver", "sim"]);
    (folder, program)
}

fn create(program: &Program, name: &str) {
    program.json(0, &["create", "web", name]);
}

fn message(ran: &Ran) -> String {
    assert!(ran.stdout.is_empty(), "a refusal goes to standard error: {ran:?}");
    ran.stderr.clone()
}

/// The widest line, in characters.
fn widest(text: &str) -> usize {
    text.lines().map(|line| line.chars().count()).max().unwrap_or(0)
}

#[test]
fn u1_a_chain_is_drawn_flat_and_indented_only_where_it_branches() {
    let (_folder, program) = web();
    for number in 0..20 {
        create(&program, &format!("s{number:02}"));
    }
    let tree = program.run(&["tree", "web"]).stdout;
    assert_eq!(tree.lines().count(), 21, "{tree}");
    for (number, line) in tree.lines().skip(1).take(19).enumerate() {
        assert!(line.starts_with(&format!("○ s{number:02} ")), "{tree}");
    }
    assert!(tree.contains("\n● s19 ← current"), "{tree}");

    program.json(0, &["revert", "web", "s04", "--yes"]);
    create(&program, "side");
    let tree = program.run(&["tree", "web"]).stdout;
    // The line to the current snapshot is the main one.
    assert!(tree.contains("\n├─○ s05") && tree.contains("\n│ ○ s06"), "{tree}");
    assert!(tree.contains("\n● side ← current"), "{tree}");
}

#[test]
fn u1_a_long_run_is_folded_but_for_what_there_is_something_to_say_of() {
    let (_folder, program) = web();
    for number in 0..30 {
        create(&program, &format!("s{number:02}"));
    }
    program.json(0, &["hold", "web", "s20", "--reason", "audit"]);
    let folded = program.run(&["tree", "web", "--fold"]).stdout;
    let expected = ["web", "○ s00", "○ s01", "○ s02", "┆ 15 snapshots more", "○ s18", "○ s19", "○ s20"];
    let shown: Vec<&str> = folded.lines().collect();
    for (line, start) in shown.iter().zip(expected) {
        assert!(line.starts_with(start), "{folded}");
    }
    assert!(shown.len() < 20 && folded.contains("s29 ← current"), "{folded}");
    let full = program.run(&["tree", "web"]).stdout;
    assert_eq!(full.lines().count(), 31, "where the output is no terminal, nothing is folded: {full}");
}

#[cfg(feature = "lab")]
#[test]
fn u1_u7_no_line_wraps_on_a_terminal_of_80_columns() {
    let (_folder, program) = web();
    let long =
        "a description that goes on for much longer than anybody would want to read in a table of snapshots";
    for number in 0..12 {
        let name = format!("a-rather-long-name-of-a-snapshot-number-{number:02}");
        program.json(0, &["create", "web", &name, "--description", long, "--label", "made-by=somebody"]);
    }
    for command in ["tree web", "tree web --full", "list web"] {
        let line =
            format!("stty rows 24 cols 80; {} --state {} {command}", program_path(), program.state.display());
        let output = std::process::Command::new("script")
            .args(["-qec", &line, "/dev/null"])
            .env("NO_COLOR", "1")
            .stdin(Stdio::null())
            .output()
            .expect("script of bsdutils");
        let text = String::from_utf8_lossy(&output.stdout).replace('\r', "");
        assert!(text.contains("a-rather-long-name"), "{command}: {text}");
        assert!(widest(&text) <= 80, "{command} has a line of {}: {text}", widest(&text));
    }
}

#[cfg(feature = "lab")]
fn program_path() -> String {
    snaptree_tests::program::snaptree().display().to_string()
}

#[cfg(feature = "lab")]
#[test]
fn u2_a_machine_that_runs_is_told_of_when_it_is_registered_without_its_qmp_socket() {
    let folder = tempfile::tempdir().expect("a folder");
    let image = folder.path().join("d.qcow2");
    snaptree_tests::images::make_qcow2(&image);
    // Whatever has the image open for writing as QEMU does.
    let mut holder = std::process::Command::new("qemu-io")
        .arg(&image)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("qemu-io");
    let mut stdin = holder.stdin.take().expect("a pipe");
    stdin.write_all(b"length\n").expect("it reads");
    let mut answer = [0; 1];
    holder.stdout.as_mut().expect("a pipe").read_exact(&mut answer).expect("it has opened the image");
    let program = Program::new(folder.path().join("state"));
    let disk = format!("vda={}", image.display());
    let added = program.json(0, &["domain", "add", "web", "--driver", "qemu", "--disk", &disk]);
    let notes = added["notes"].to_string();
    drop(stdin);
    holder.wait().expect("it ends");
    assert!(notes.contains("the machine runs now") && notes.contains("domain set web --qmp"), "{notes}");
}

#[test]
fn u3_more_than_what_was_named_is_deleted_only_when_somebody_said_so() {
    let (_folder, program) = web();
    for name in ["a", "b", "c"] {
        create(&program, name);
    }
    let refused = program.run(&["delete", "web", "a", "--children"]);
    assert_eq!(refused.code, Some(4), "{refused:?}");
    let told = message(&refused);
    assert!(told.contains("3 snapshots of web: 'a', 'b', 'c'") && told.contains("--yes"), "{told}");
    let refused = program.json(4, &["delete", "web", "a", "--children-only"]);
    assert_eq!(refused["error"]["code"], "unconfirmed");
    assert_eq!(program.json(0, &["list", "web"])["snapshots"].as_array().map(Vec::len), Some(3));
    // What is named, or has nothing below it, needs no more words.
    program.json(0, &["delete", "web", "c", "--children"]);
    program.json(0, &["delete", "web", "a", "--children", "--yes"]);
    assert_eq!(program.json(0, &["list", "web"])["snapshots"].as_array().map(Vec::len), Some(0));
}

#[test]
fn u4_a_moment_before_the_machine_was_registered_is_told_as_that() {
    let (_folder, program) = web();
    create(&program, "a");
    for args in [&["tree", "web", "--at", "2h"][..], &["list", "web", "--at", "2020-01-01"]] {
        let ran = program.run(args);
        assert_eq!(ran.code, Some(3), "{ran:?}");
        assert!(message(&ran).contains("web was not registered then: it is since "), "{ran:?}");
    }
    let ran = program.run(&["tree", "nobody", "--at", "2h"]);
    assert!(message(&ran).contains("there is no domain 'nobody'"), "{ran:?}");
}

#[test]
fn u5_other_programs_words_and_typing_errors_lead_to_what_was_meant() {
    let (_folder, program) = web();
    program.json(0, &["domain", "add", "toy", "--driver", "sim"]);
    create(&program, "upgrade");
    for (word, meant) in [
        ("restore", "revert"),
        ("rollback", "revert"),
        ("undo", "revert"),
        ("rm", "delete"),
        ("snapshot-list", "list"),
        ("snapshot-revert", "revert"),
    ] {
        let ran = program.run(&[word, "web"]);
        assert_eq!(ran.code, Some(2), "{ran:?}");
        let told = message(&ran);
        assert!(told.contains(&format!("'{meant}'")) && !told.contains("'serve'"), "{word}: {told}");
    }
    let told = message(&program.run(&["list", "tyo"]));
    assert!(told.contains("did you mean 'toy'?"), "{told}");
    for command in ["show", "revert", "delete"] {
        let told = message(&program.run(&[command, "web", "upgrdae"]));
        assert!(told.contains("did you mean 'upgrade'?"), "{command}: {told}");
    }
    let told = message(&program.run(&["list", "something-else"]));
    assert!(!told.contains("did you mean"), "{told}");
}

#[test]
fn u7_the_list_is_in_the_order_of_time_and_shows_descriptions() {
    let (_folder, program) = web();
    program.json(0, &["create", "web", "z-first", "--description", "before anything\nand more"]);
    create(&program, "m-second");
    create(&program, "a-third");
    let names = |args: &[&str]| program.run(args).stdout.lines().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(names(&["list", "web", "--names"]), ["z-first", "m-second", "a-third"]);
    assert_eq!(names(&["list", "web", "--names", "--sort", "name"]), ["a-third", "m-second", "z-first"]);
    let list = program.run(&["list", "web"]).stdout;
    assert!(list.contains("DESCRIPTION") && list.contains("before anything …"), "{list}");
}

#[test]
fn a9_recover_beside_a_daemon_tells_how_what_was_open_ended() {
    let (_folder, program) = web();
    // Two operations that a killed program left open.
    for name in ["a", "b"] {
        let killed = program.with_fault("append.after=kill").run(&["create", "web", name]);
        assert_ne!(killed.code, Some(0), "{killed:?}");
    }
    let daemon = Daemon::start(&program);
    let recovered = program.json(0, &["recover"]);
    let open: Vec<_> = recovered["operations"].as_array().expect("accounts").iter().collect();
    assert!(
        open.iter().all(|one| !one["outcome"].is_null()),
        "nothing is open, so all have ended: {recovered}"
    );
    let text = program.run(&["recover"]);
    assert!(!text.stdout.contains("still open"), "{text:?}");
    daemon.end();
}

#[test]
fn a9_a_cancel_that_worked_is_no_error() {
    let (_folder, program) = web();
    let parked = program.with_fault("append.after=kill").run(&["create", "web", "a"]);
    assert_ne!(parked.code, Some(0), "{parked:?}");
    let open = program.json(0, &["op", "list", "--open"]);
    let id = open["operations"][0]["operation"].as_str().expect("an open operation").to_owned();
    let ran = program.run(&["op", "cancel", &id]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stdout.starts_with("Cancelled the create of web"), "{ran:?}");
    assert!(!ran.stderr.contains("error"), "{ran:?}");
}

#[test]
fn a9_output_that_cannot_be_written_is_told_of() {
    let (_folder, program) = web();
    for args in [&["list", "web", "--json"][..], &["domain", "list"], &["log", "--json"]] {
        let full = std::fs::File::create("/dev/full").expect("Linux has it");
        let output = program.command(args).stdout(full).stderr(Stdio::piped()).output().expect("it runs");
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(told.contains("No space left on device"), "{args:?}: {told}");
    }
}

#[test]
fn a9_the_kind_of_an_event_may_be_written_without_its_group() {
    let (_folder, program) = web();
    create(&program, "a");
    program.json(0, &["delete", "web", "a"]);
    let log = program.run(&["log", "--kind", "deleted", "--json"]);
    assert_eq!((log.code, log.stdout.lines().count()), (Some(0), 1), "{log:?}");
    let told = message(&program.run(&["log", "--kind", "nonsense"]));
    assert!(!told.contains("did you mean") && told.contains("Snapshot"), "{told}");
}

#[test]
fn h7_while_the_daemon_is_held_up_by_others_requests_are_told_that_it_is_busy() {
    let (_folder, program) = web();
    let daemon = Daemon::start(&program);
    let socket: PathBuf = program.state.join("snaptree.sock");
    let holders: Vec<UnixStream> = (0..512)
        .map(|_| {
            let mut stream = UnixStream::connect(&socket).expect("it listens");
            stream.write_all(b"POST /v1/domains HT").expect("it takes half a head");
            stream
        })
        .collect();
    for number in 0..6 {
        let ran = program.run(&["create", "web", &format!("s{number}")]);
        assert_eq!(ran.code, Some(4), "{ran:?}");
        assert!(ran.stderr.contains("others are being served"), "{ran:?}");
    }
    drop(holders);
    daemon.end();
    assert_eq!(program.json(0, &["op", "list"])["operations"].as_array().map(Vec::len), Some(0));
}
