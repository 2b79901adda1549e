//! A guest that writes all the time is quiesced by its agent for the moment of a snapshot.
//!
//! The guest knows no file systems, so its agent stands beside it: the real one, with a small file system of its own, or
//! a scripted one for what goes wrong.

#![cfg(feature = "lab")]
#![allow(clippy::expect_used, reason = "a test")]

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;
use snaptree_tests::agent::{Agent, Freeze, RealAgent};
use snaptree_tests::alive::Alive;
use snaptree_tests::images::text;
use snaptree_tests::program::wait_until_stopped;
use snaptree_tests::running::{Running, Way};

const QUIESCED: [&str; 4] = ["create", "web", "new", "--quiesce"];

/// A running machine with an agent.
struct Quiet {
    alive: Alive,
    agent: Agent,
    _folder: tempfile::TempDir,
}

impl Quiet {
    fn scripted(way: Way) -> Self {
        Self::new(way, Agent::scripted)
    }

    fn new(way: Way, agent: impl FnOnce(&Path) -> Agent) -> Self {
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder");
        let agent = agent(&folder.path().join("ga"));
        let machine = folder.path().join("machine");
        std::fs::create_dir(&machine).expect("a folder");
        let running = Running::with_options(&machine, way, &["--agent", text(&agent.socket)]);
        agent.watch(running.witness());
        let mut alive = Alive::of(running);
        alive.running.start();
        alive.running.wait_for_rounds(2);
        alive.create("before");
        Self { alive, agent, _folder: folder }
    }

    /// A quiesced create that fails, and leaves everything as it was; its error.
    fn refused(&mut self, code: i32) -> Value {
        let failed = self.alive.running.program.json(code, &QUIESCED);
        assert!(!self.agent.is_frozen(), "thawed after {failed}");
        self.expect_as_before(&failed.to_string());
        failed["error"].clone()
    }

    fn expect_as_before(&mut self, what: &str) {
        self.alive.check(what);
        self.alive.expect_alive(what);
    }

    /// What the last step of the last create learnt.
    fn learnt(&self) -> Value {
        let ran =
            self.alive.running.program.run(&["log", "web", "--kind", "Operation.StepFinished", "--json"]);
        let last = ran.stdout.lines().last().expect("an event").to_owned();
        let event: Value = serde_json::from_str(&last).expect("an event");
        event["data"]["learnt"].clone()
    }

    /// Kills the program at a place of a quiesced create, and recovers.
    fn killed_at(&mut self, place: &str, is_frozen: bool) {
        self.agent.takes(Freeze::Done);
        let killed = self.alive.running.program.with_fault(&format!("{place}=kill")).run(&QUIESCED);
        assert_eq!(killed.code, None, "{place}: {killed:?}");
        assert_eq!(self.agent.is_frozen(), is_frozen, "{place}: when it was killed");
        self.alive.running.program.json(0, &["recover"]);
        assert!(!self.agent.is_frozen(), "{place}: thawed");
        let mut after = self.alive.model.clone();
        after.create("new", &[]);
        if self.alive.tree_is(&after) {
            self.alive.created("new");
        }
        self.expect_as_before(place);
        if self.alive.model.snapshots.contains_key("new") {
            self.alive.running.program.json(0, &["delete", "web", "new"]);
            self.alive.model.delete("new");
        }
        self.alive.check(&format!("{place}, afterwards"));
    }
}

/// The guest ran whenever its agent was asked, the freeze came before the snapshot and the thaw after it.
fn expect_order(agent: &Agent, what: &str) {
    let asked = agent.asked();
    let said: Vec<(&str, bool, bool)> = asked
        .iter()
        .map(|asked| {
            (asked.command.as_str(), asked.guest_ran, asked.snapshots.iter().any(|name| name == "new"))
        })
        .collect();
    let expected = [("guest-fsfreeze-freeze", true, false), ("guest-fsfreeze-thaw", true, true)];
    assert_eq!(said, expected, "{what}");
}

#[test]
fn the_real_agent_freezes_for_the_moment_of_the_snapshot_and_thaws_after_a_kill() {
    let folder = tempfile::tempdir_in("/dev/shm").expect("a folder on a tmpfs");
    let Some(real) = RealAgent::start(folder.path()) else {
        println!("LEFT OUT: the real agent cannot be given mounts of its own here");
        return;
    };
    let mut quiet = Quiet::new(Way::Attached, |socket| Agent::passing_on(socket, &real.socket));
    let mut frozen_ms = Vec::new();
    for round in 0..6 {
        quiet.agent.takes(Freeze::Done);
        quiet.alive.running.program.json(0, &QUIESCED);
        quiet.alive.created("new");
        if round == 0 {
            expect_order(&quiet.agent, "the real agent");
            quiet.agent.unwatch();
        }
        let quiesced = quiet.learnt()["quiesced"].clone();
        assert_eq!((&quiesced["frozen"], &quiesced["thawed"]), (&1.into(), &1.into()), "{quiesced}");
        // In the first one the agent was kept waiting.
        frozen_ms.push(quiesced["frozen_ms"].as_u64().expect("a time"));
        expect_writable(&real);
        quiet.expect_as_before("a quiesced snapshot");
        quiet.alive.running.program.json(0, &["delete", "web", "new"]);
        quiet.alive.model.delete("new");
    }
    println!("frozen for {frozen_ms:?} ms");

    for place in ["qemu.live.frozen", "qemu.live.exchanged", "qemu.live.resumed"] {
        quiet.agent.takes(Freeze::Done);
        let killed = quiet.alive.running.program.with_fault(&format!("{place}=kill")).run(&QUIESCED);
        assert_eq!(killed.code, None, "{place}: {killed:?}");
        quiet.alive.running.program.json(0, &["recover"]);
        expect_writable(&real);
        let last = quiet.agent.asked().pop().expect("it was asked");
        assert_eq!(last.command, "guest-fsfreeze-thaw", "{place}");
        quiet.alive.expect_alive(place);
        if place != "qemu.live.frozen" {
            quiet.alive.created("new");
            quiet.alive.running.program.json(0, &["delete", "web", "new"]);
            quiet.alive.model.delete("new");
        }
        quiet.alive.check(place);
    }
}

/// A write to a frozen file system would not come back.
fn expect_writable(real: &RealAgent) {
    let file = real.file_system().join("written");
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(std::fs::write(file, "x")));
    let written = receiver.recv_timeout(Duration::from_secs(20)).expect("the file system is thawed");
    written.expect("it can be written");
}

#[test]
fn a_quiesced_snapshot_is_taken_between_freeze_and_thaw_whoever_runs_the_machine() {
    for way in [Way::Managed, Way::Commands, Way::Attached] {
        let mut quiet = Quiet::scripted(way);
        quiet.alive.running.program.json(0, &QUIESCED);
        expect_order(&quiet.agent, &format!("{way:?}"));
        quiet.alive.created("new");
        quiet.expect_as_before(&format!("{way:?}"));
        assert_eq!(quiet.learnt()["quiesced"]["frozen"], 1, "{}", quiet.learnt());
        // Without being asked for it nobody is frozen.
        quiet.agent.takes(Freeze::Done);
        quiet.alive.create("plain");
        assert!(quiet.agent.asked().is_empty(), "{:?}", quiet.agent.asked());
    }
}

#[test]
fn a_freeze_that_fails_hangs_or_freezes_nothing_is_thawed_and_fails_the_create() {
    let mut quiet = Quiet::scripted(Way::Managed);
    for (freeze, says) in [
        (Freeze::Fails, "the guest agent refuses guest-fsfreeze-freeze: failed to freeze /"),
        (Freeze::Nothing, "it froze no file system"),
        (Freeze::Unanswered, "the guest agent has not answered guest-fsfreeze-freeze after 5000 ms"),
        (
            Freeze::Late(Duration::from_secs(6)),
            "the guest agent has not answered guest-fsfreeze-freeze after 5000 ms",
        ),
    ] {
        quiet.agent.takes(freeze);
        let began = Instant::now();
        let error = quiet.refused(1);
        let message = error["message"].as_str().expect("a message");
        assert!(message.starts_with("the guest was not quiesced: "), "{freeze:?}: {message}");
        assert!(message.contains(says), "{freeze:?}: {message}");
        assert!(message.ends_with("its file systems are thawed"), "{freeze:?}: {message}");
        assert!(began.elapsed() < Duration::from_secs(20), "{freeze:?}: {:?}", began.elapsed());
        assert_eq!(quiet.agent.asked().last().expect("it was asked").command, "guest-fsfreeze-thaw");
    }
}

#[test]
fn an_agent_that_does_not_answer_and_one_that_somebody_else_froze_are_left_alone() {
    let mut quiet = Quiet::scripted(Way::Managed);
    quiet.agent.takes(Freeze::Done);
    quiet.agent.is_deaf(true);
    let error = quiet.refused(1);
    assert!(error["message"].as_str().expect("a message").contains("no guest agent answers"), "{error}");
    assert!(quiet.agent.asked().is_empty());

    quiet.agent.is_deaf(false);
    quiet.agent.is_frozen_by_another();
    let failed = quiet.alive.running.program.json(1, &QUIESCED);
    assert!(failed["error"]["message"].as_str().expect("a message").contains("somebody else"), "{failed}");
    assert!(quiet.agent.is_frozen() && quiet.agent.asked().is_empty(), "what is another's stays");
    quiet.expect_as_before("an agent that was frozen");
}

#[test]
fn an_agent_that_hangs_for_good_needs_attention_until_it_goes_on() {
    let mut quiet = Quiet::scripted(Way::Managed);
    quiet.agent.takes(Freeze::Hangs);
    let stuck = quiet.alive.running.program.json(5, &QUIESCED);
    assert!(
        stuck["error"]["message"].as_str().expect("a message").contains("may still be frozen"),
        "{stuck}"
    );
    quiet.alive.expect_alive("a freeze that hangs");
    quiet.agent.goes_on();
    let operation = stuck["operation"].as_str().expect("an id");
    quiet.alive.running.program.run(&["op", "retry", operation]);
    assert!(!quiet.agent.is_frozen(), "thawed");
    let listed = quiet.alive.running.program.json(0, &["op", "list", "--open"]);
    assert_eq!(listed["operations"].as_array().expect("operations").len(), 0, "{listed}");
    quiet.expect_as_before("a freeze that hung");
}

#[test]
fn a_snapshot_that_comes_too_late_after_its_freeze_is_given_up() {
    let mut quiet = Quiet::scripted(Way::Managed);
    for place in ["qemu.live.frozen", "qemu.live.stopped"] {
        quiet.agent.takes(Freeze::Done);
        let program = quiet.alive.running.program.with_fault(&format!("{place}=stop"));
        let mut args = QUIESCED.to_vec();
        args.push("--json");
        let child = program.command(&args).stdout(Stdio::piped()).spawn().expect("it starts");
        wait_until_stopped(child.id());
        // It is the time itself that is tried.
        std::thread::sleep(Duration::from_millis(8_500));
        let sent = std::process::Command::new("kill").args(["-CONT", &child.id().to_string()]).status();
        assert!(sent.expect("kill runs").success());
        let output = child.wait_with_output().expect("it ends");
        let failed: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!(output.status.code(), Some(1), "{failed}");
        assert!(!quiet.agent.is_frozen(), "{place}: thawed");
        let message = failed["error"]["message"].as_str().expect("a message");
        assert!(message.contains("ms before the snapshot could be taken"), "{place}: {message}");
        quiet.expect_as_before(place);
    }
}

#[test]
fn whoever_recovers_thaws_wherever_snaptree_was_killed() {
    let mut quiet = Quiet::scripted(Way::Managed);
    for (place, is_frozen) in [
        ("qemu.live.prepared", false),
        ("qemu.live.freezing", false),
        ("qemu.live.frozen", true),
        ("qemu.live.stopped", true),
        ("qemu.live.exchanged", true),
        ("qemu.live.named", true),
        ("qemu.live.switched", true),
        ("qemu.live.resumed", true),
        ("qemu.live.thawed", false),
    ] {
        quiet.killed_at(place, is_frozen);
    }
}

#[test]
fn a_recovery_of_a_machine_that_is_gone_asks_nobody() {
    let mut quiet = Quiet::scripted(Way::Managed);
    quiet.agent.takes(Freeze::Done);
    let killed = quiet.alive.running.program.with_fault("qemu.live.frozen=kill").run(&QUIESCED);
    assert_eq!(killed.code, None, "{killed:?}");
    quiet.alive.running.kill();
    quiet.agent.takes(Freeze::Done);
    quiet.alive.running.program.json(0, &["recover"]);
    assert!(quiet.agent.asked().is_empty(), "{:?}", quiet.agent.asked());
    quiet.alive.check("a machine that is gone");
}

#[test]
fn quiesce_is_refused_where_it_cannot_be_had() {
    let mut quiet = Quiet::scripted(Way::Attached);
    let program = quiet.alive.running.program.clone();
    pause(&quiet.alive.running.qmp);
    let refused = program.json(4, &QUIESCED);
    assert_eq!(refused["error"]["code"], "unsupported", "{refused}");
    assert!(refused["error"]["message"].as_str().expect("a message").contains("is paused"), "{refused}");
    quiet.alive.check("a paused machine");
    // A machine that is off has nothing that is in use.
    quiet.alive.running.kill();
    program.json(0, &QUIESCED);
    assert!(quiet.agent.asked().is_empty());

    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder");
    let plain = Running::new(folder.path(), Way::Attached);
    let refused = plain.program.json(4, &QUIESCED);
    assert!(refused["error"]["hint"].as_str().expect("a hint").contains("domain add --agent"), "{refused}");
    let disk = format!("vda={}", text(&folder.path().join("other.qcow2")));
    snaptree_tests::images::make_qcow2(&folder.path().join("other.qcow2"));
    let agent: PathBuf = folder.path().join("ga");
    let add = ["domain", "add", "other", "--driver", "qemu", "--disk", &disk, "--agent", text(&agent)];
    let refused = plain.program.json(4, &add);
    assert!(
        refused["error"]["message"].as_str().expect("a message").contains("--agent is of no use"),
        "{refused}"
    );
}

fn pause(qmp: &Path) {
    use std::io::{BufRead, BufReader, Write};
    let stream = std::os::unix::net::UnixStream::connect(qmp).expect("the monitor");
    let mut lines = BufReader::new(stream.try_clone().expect("a stream")).lines();
    let mut stream = &stream;
    stream
        .write_all(b"{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"stop\",\"id\":1}\n")
        .expect("it hears");
    let answered = lines.find(|line| line.as_ref().is_ok_and(|line| line.contains("\"id\": 1")));
    answered.expect("an answer").expect("a line");
}
