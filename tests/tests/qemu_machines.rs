//! Who runs a machine decides what can be done while it runs: every such way, with what is said where it cannot.

#![cfg(feature = "lab")]
#![allow(clippy::expect_used, reason = "a test")]

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::process::Command;

use snaptree_tests::images::text;
use snaptree_tests::program::Ran;
use snaptree_tests::running::{Running, Way};

/// What the program said, as an administrator would have seen it, without what differs from run to run.
struct Transcript {
    running: Running,
    text: String,
    _folder: tempfile::TempDir,
}

impl Transcript {
    fn new(way: Way) -> Self {
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder");
        Self { running: Running::new(folder.path(), way), text: String::new(), _folder: folder }
    }

    fn say(&mut self, what: &str) {
        self.text.push_str(&format!("# {what}\n"));
    }

    fn run(&mut self, args: &[&str]) -> Ran {
        let ran = self.running.program.run(args);
        let said = format!("{}{}", ran.stdout, ran.stderr);
        let code = ran.code.map_or_else(|| "a signal".to_owned(), |code| code.to_string());
        self.text.push_str(&format!("$ snaptree {}\n{said}", args.join(" ")));
        if ran.code != Some(0) {
            self.text.push_str(&format!("(exit {code})\n"));
        }
        ran
    }

    fn start(&mut self) {
        self.running.start();
        self.running.wait_for_rounds(2);
        self.say("the machine runs");
    }

    /// Everything of the table, in its order.
    fn all(&mut self) {
        self.run(&["create", "web", "a"]);
        self.run(&["create", "web", "b"]);
        self.run(&["create", "web", "m", "--memory"]);
        self.run(&["revert", "web", "a"]);
        self.run(&["delete", "web", "a"]);
        let runs = self.running.pid().is_some();
        self.say(if runs { "the machine runs" } else { "the machine is off" });
    }

    fn expect(self, name: &str) {
        insta::with_settings!({ filters => vec![
            (r"/[^ ]*/\.tmp[A-Za-z0-9]+", "FOLDER"),
            (r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", "ID"),
            (r"operation [0-9a-f]{8}", "operation ID"),
            (r"pid [0-9]+", "pid N"),
            (r"[0-9.]+ [KM]iB", "SIZE"),
            (r"[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9:.]+[^ ]*", "TIME"),
        ] }, {
            insta::assert_snapshot!(name, self.text);
        });
    }
}

#[test]
fn a_machine_that_is_off_can_do_all_that_needs_no_memory() {
    let mut transcript = Transcript::new(Way::Apart);
    transcript.all();
    transcript.expect("off");
}

#[test]
fn a_machine_that_runs_apart_is_left_alone_until_it_is_off() {
    let mut transcript = Transcript::new(Way::Apart);
    transcript.run(&["create", "web", "first"]);
    transcript.start();
    transcript.all();
    transcript.run(&["domain", "stop", "web"]);
    transcript.expect("apart");
}

#[test]
fn an_attached_machine_can_do_all_but_a_revert() {
    let mut transcript = Transcript::new(Way::Attached);
    transcript.start();
    transcript.all();
    transcript.run(&["domain", "stop", "web"]);
    transcript.expect("attached");
}

#[test]
fn a_machine_with_commands_is_ended_and_started_for_a_revert() {
    let mut transcript = Transcript::new(Way::Commands);
    transcript.start();
    transcript.all();
    transcript.run(&["revert", "web", "b", "--paused"]);
    transcript.run(&["domain", "stop", "web"]);
    transcript.expect("commands");
}

#[test]
fn a_managed_machine_gets_the_snapshots_state() {
    let mut transcript = Transcript::new(Way::Managed);
    transcript.run(&["create", "web", "first"]);
    transcript.start();
    transcript.all();
    transcript.run(&["revert", "web", "b", "--paused"]);
    transcript.run(&["domain", "show", "web"]);
    transcript.run(&["revert", "web", "first"]);
    transcript.say(if transcript.running.pid().is_some() { "it runs" } else { "it is off, as it was then" });
    transcript.run(&["domain", "start", "web"]);
    transcript.run(&["domain", "stop", "web", "--force"]);
    transcript.expect("managed");
}

#[test]
fn how_a_machine_is_reached_can_be_changed_after_its_registration() {
    let mut transcript = Transcript::new(Way::Apart);
    transcript.run(&["create", "web", "off"]);
    transcript.start();
    transcript.run(&["create", "web", "a"]);
    let (qmp, agent) =
        (text(&transcript.running.qmp).to_owned(), format!("{}.agent", text(&transcript.running.qmp)));
    for refused in [["--start", "true"], ["--agent", &agent], ["--launch", "qemu-system-x86_64"]] {
        transcript.run(&["domain", "set", "web", refused[0], refused[1]]);
    }
    transcript.run(&["domain", "set", "web", "--qmp", &qmp, "--agent", &agent]);
    transcript.run(&["create", "web", "a"]);
    transcript.run(&["domain", "set", "web", "--start", "false", "--stop", "false"]);
    transcript.run(&["domain", "set", "web", "--start", "", "--stop", "", "--agent", ""]);
    transcript.run(&["domain", "set", "web", "--qmp", ""]);
    transcript.run(&["create", "web", "b"]);
    transcript.run(&["log", "web", "--kind", "Domain.Changed"]);
    transcript.running.kill();
    transcript.expect("reached");
}

#[test]
fn a_qemu_that_hangs_one_that_is_taken_and_one_that_is_dead_are_told_apart() {
    let mut transcript = Transcript::new(Way::Attached);
    transcript.start();
    let pid = transcript.running.pid().expect("it runs").to_string();
    let signal = |name: &str| Command::new("kill").args([name, &pid]).status().expect("kill runs");
    transcript.say("QEMU is stopped by a signal");
    signal("-STOP");
    let hung = transcript.run(&["create", "web", "a"]);
    signal("-CONT");
    assert_ne!(hung.code, Some(0), "{hung:?}");

    transcript.say("another client has the monitor");
    let mut other = UnixStream::connect(&transcript.running.qmp).expect("the monitor");
    other.read_exact(&mut [0; 1]).expect("a greeting");
    let taken = transcript.run(&["create", "web", "a"]);
    assert_ne!(taken.code, Some(0), "{taken:?}");
    drop(other);

    transcript.say("the other client is gone");
    let done = transcript.run(&["create", "web", "a"]);
    assert_eq!(done.code, Some(0), "{done:?}");

    transcript.say("the socket's name is gone");
    std::fs::rename(&transcript.running.qmp, transcript.running.qmp.with_extension("away")).expect("renamed");
    let unreached = transcript.run(&["create", "web", "b"]);
    assert_ne!(unreached.code, Some(0), "{unreached:?}");

    transcript.say("QEMU was killed, and left its socket");
    std::fs::rename(transcript.running.qmp.with_extension("away"), &transcript.running.qmp).expect("renamed");
    transcript.running.kill();
    assert!(transcript.running.qmp.exists(), "{}", text(&transcript.running.qmp));
    let off = transcript.run(&["create", "web", "b"]);
    assert_eq!(off.code, Some(0), "{off:?}");
    transcript.expect("hung");
}
