//! The daemon, by the built program: requests through its socket, and what becomes of them when it ends.

#![allow(clippy::expect_used, reason = "these are tests")]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use snaptree_tests::images::tool;
use snaptree_tests::program::{Program, Ran};

/// A daemon, killed when it is dropped.
struct Daemon {
    child: Child,
    err: BufReader<std::process::ChildStderr>,
    socket: PathBuf,
}

impl Daemon {
    /// Starts one, and returns when it listens.
    fn start(program: &Program) -> Self {
        Self::with(program, &[], &[])
    }

    fn with(program: &Program, args: &[&str], environment: &[(&str, &str)]) -> Self {
        let mut child = program
            .command(&[&["serve"], args].concat())
            .envs(environment.iter().copied())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it starts");
        let mut err = BufReader::new(child.stderr.take().expect("a pipe"));
        let mut line = String::new();
        while !line.contains("listening") {
            line.clear();
            assert_ne!(err.read_line(&mut line).expect("its log"), 0, "it ended before it listened");
        }
        let socket = line.split_once("socket=").expect("where").1;
        let socket = PathBuf::from(socket.split(' ').next().expect("a path"));
        Self { child, err, socket }
    }

    fn signal(&self, name: &str) {
        tool("kill", &[&format!("-{name}"), &self.child.id().to_string()]);
    }

    /// Waits until it has ended, and says how, what it printed, and what it logged.
    fn ended(mut self) -> Ran {
        let (mut stdout, mut stderr) = (String::new(), String::new());
        let mut out = self.child.stdout.take().expect("a pipe");
        out.read_to_string(&mut stdout).expect("its output");
        self.err.read_to_string(&mut stderr).expect("its log");
        let code = self.child.wait().expect("it ends").code();
        Ran { code, stdout, stderr }
    }

    /// Sends bytes as they are, and returns what is answered until the connection is closed.
    fn raw(&self, request: &[u8]) -> String {
        let mut stream = UnixStream::connect(&self.socket).expect("it listens");
        // A server that has seen enough closes without reading the rest.
        let _ = stream.write_all(request);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    fn get(&self, path: &str) -> Value {
        let answer =
            self.raw(format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes());
        let (head, body) = answer.split_once("\r\n\r\n").expect("an answer");
        assert!(head.starts_with("HTTP/1.1 200"), "{answer}");
        serde_json::from_str(body).expect("JSON")
    }

    fn post(&self, path: &str, body: &str) -> (u16, Value) {
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        let answer = self.raw(&[head.as_bytes(), body.as_bytes()].concat());
        let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
        let body = answer.split_once("\r\n\r\n").expect("an answer").1;
        (status, serde_json::from_str(body).unwrap_or(Value::Null))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// The log from its beginning, line by line, as it grows.
struct Log {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Log {
    fn follow(program: &Program) -> Self {
        let mut child = program
            .command(&["log", "--follow", "--json"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        let lines = BufReader::new(child.stdout.take().expect("a pipe"));
        Self { child, lines }
    }

    /// Returns with the next event of that kind.
    fn wait_for(&mut self, kind: &str) -> Value {
        loop {
            let mut line = String::new();
            assert_ne!(self.lines.read_line(&mut line).expect("a line"), 0, "the log ended before {kind}");
            let event: Value = serde_json::from_str(&line).expect("JSON");
            if event["kind"] == kind {
                return event;
            }
        }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn lab(folder: &Path, domains: &[&str]) -> Program {
    let program = Program::new(folder.join("state"));
    for domain in domains {
        program.json(0, &["domain", "add", domain, "--driver", "sim"]);
    }
    program
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

fn outcome(program: &Program, operation: &str) -> Value {
    program.json(0, &["op", "show", operation])["outcome"].clone()
}

/// A document without what differs from run to run.
fn without_ids_and_times(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let id = rest.get(..36).filter(|text| uuid::Uuid::try_parse(text).is_ok());
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && !"-:.".contains(c)).unwrap_or(rest.len());
        let time = rest.get(..end).filter(|text| text.parse::<jiff::Timestamp>().is_ok());
        let left_out = id.or(time).map_or(0, str::len);
        out.push(if left_out > 0 { '*' } else { first });
        rest = &rest[left_out.max(first.len_utf8())..];
    }
    out
}

#[test]
fn a_command_prints_the_same_through_the_daemon_and_without_it() {
    let (one, two) = (folder(), folder());
    let (here, there) = (lab(one.path(), &[]), lab(two.path(), &["first"]));
    here.json(0, &["domain", "add", "first", "--driver", "sim"]);
    let daemon = Daemon::start(&there);
    let commands: &[&[&str]] = &[
        &["domain", "add", "web", "--driver", "sim", "--profile", "qemu", "--label", "tier=prod"],
        &["domain", "add", "web", "--driver", "sim"],
        &["domain", "add", "odd", "--driver", "sim", "--profile", "odd"],
        &["create", "web", "one", "--description", "before", "--label", "a=b"],
        &["create", "web", "two", "--key", "k"],
        &["create", "web", "two", "--key", "k"],
        &["create", "web", "other", "--key", "k"],
        &["create", "web", "one"],
        &["create", "nowhere", "one"],
        &["list", "web"],
        &["revert", "web", "one"],
        &["revert", "web", "nothing"],
        &["create", "web", "three"],
        &["edit", "web", "three", "--name", "four"],
        &["hold", "web", "four", "--reason", "kept"],
        &["delete", "web", "four"],
        &["release", "web", "four"],
        &["delete", "web", "one", "--defer"],
        &["reconcile", "web"],
        &["delete", "web", "two", "four"],
        &["list", "web", "--all"],
        &["drift"],
        &["recover"],
        &["op", "cancel", "ffffffff"],
        &["op", "list"],
        &["domain", "set", "web", "--name", "www"],
        &["domain", "remove", "www", "--metadata"],
        &["domain", "list"],
    ];
    for command in commands {
        let command = &[*command, &["--json"]].concat();
        let (a, b) = (here.run(command), there.run(command));
        assert_eq!(a.code, b.code, "{command:?}: {a:?} {b:?}");
        assert_eq!(without_ids_and_times(&a.stdout), without_ids_and_times(&b.stdout), "{command:?}");
    }
    let words: &[&[&str]] = &[
        &["create", "first", "one"],
        &["create", "first", "two"],
        &["revert", "first", "one"],
        &["delete", "first", "one", "two"],
        &["recover"],
    ];
    for command in words {
        let (a, b) = (here.run(command), there.run(command));
        assert_eq!((a.code, a.stdout), (b.code, b.stdout), "{command:?}");
    }
    // Nobody but the daemon wrote: one owner of the state, and the requests came in by its socket.
    let log = there.run(&["log", "--kind", "Snapshot.CreateRequested", "--json"]).stdout;
    let uid = nix_uid(one.path());
    for line in log.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON")) {
        let origin = &line["origin"];
        assert_eq!((&origin["via"], &origin["uid"]), (&"socket".into(), &uid.into()), "{line}");
        assert_ne!(origin["pid"], daemon.child.id(), "{line}");
    }
    assert_eq!(log.lines().count(), 5, "{log}");
}

/// Who we are, by a file of ours.
fn nix_uid(folder: &Path) -> u32 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(folder).expect("our folder").uid()
}

#[test]
fn who_asks_is_who_the_kernel_says_and_sudo_is_only_a_claim() {
    let folder = folder();
    let program = lab(folder.path(), &["web"]);
    let _daemon = Daemon::start(&program);
    let claim = program
        .command(&["create", "web", "one", "--json"])
        .env("SUDO_USER", "mallory")
        .env("USER", "mallory")
        .output()
        .expect("it runs");
    assert!(claim.status.success(), "{claim:?}");
    let event: Value =
        serde_json::from_str(&program.run(&["log", "--kind", "Snapshot.CreateRequested", "--json"]).stdout)
            .expect("one event");
    assert_eq!(event["origin"]["uid"], nix_uid(folder.path()), "{event}");
    assert_eq!(event["origin"]["sudo_user"], "mallory", "{event}");
    assert_ne!(event["actor"], "user:mallory", "{event}");
}

#[test]
fn many_requests_at_once_are_all_carried_out() {
    let folder = folder();
    let names: Vec<String> = (0..20).map(|number| format!("vm{number}")).collect();
    let program = lab(folder.path(), &names.iter().map(String::as_str).collect::<Vec<_>>());
    let _daemon = Daemon::start(&program);
    std::thread::scope(|scope| {
        for (number, name) in names.iter().enumerate() {
            let program = &program;
            scope.spawn(move || program.json(0, &["create", name, "one"]));
            // And these all on one domain.
            scope.spawn(move || program.json(0, &["create", "vm0", &format!("many{number}")]));
        }
    });
    for name in &names {
        let count = program.json(0, &["list", name])["snapshots"].as_array().expect("snapshots").len();
        assert_eq!(count, if name == "vm0" { 21 } else { 1 }, "{name}");
    }
    assert_eq!(program.json(0, &["recover"])["operations"], serde_json::json!([]));
    assert_eq!(program.json(0, &["audit", "verify"])["ok"], true);
}

#[test]
fn a_detached_request_goes_on_when_its_client_has_gone() {
    let folder = folder();
    let program = lab(folder.path(), &["web"]);
    let refused = program.json(4, &["create", "web", "one", "--detach"]);
    assert_eq!(refused["error"]["code"], "no-daemon", "{refused}");
    assert!(refused["error"]["hint"].as_str().expect("a hint").contains("snaptree serve"));

    let _daemon = Daemon::with(&program, &[], &[("SNAPTREE_SIM_STEP_MS", "300")]);
    let mut log = Log::follow(&program);
    let detached = program.json(0, &["create", "web", "one", "--detach"]);
    assert_eq!(detached["outcome"], Value::Null, "{detached}");
    assert_eq!(detached["snapshots"], serde_json::json!(["one"]));
    let operation = detached["operation"].as_str().expect("an id");
    assert_eq!(outcome(&program, operation), Value::Null);
    log.wait_for("Operation.Succeeded");
    assert_eq!(outcome(&program, operation), "succeeded");
    assert_eq!(program.json(0, &["revert", "web", "one", "--detach"])["outcome"], Value::Null);
    log.wait_for("Snapshot.Reverted");
    assert_eq!(program.json(0, &["delete", "web", "one", "--detach"])["outcome"], Value::Null);
    log.wait_for("Snapshot.Deleted");
}

#[test]
fn an_operation_that_the_daemon_is_at_is_called_off() {
    let folder = folder();
    let program = lab(folder.path(), &["web"]);
    let _daemon = Daemon::with(&program, &[], &[("SNAPTREE_SIM_STEP_MS", "1000")]);
    let mut log = Log::follow(&program);
    let mut waiting = program
        .command(&["create", "web", "one", "--json"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("it starts");
    let operation = log.wait_for("Operation.StepStarted")["operation"].as_str().expect("an id").to_owned();
    let queued = program.json(0, &["create", "web", "two", "--detach"]);
    let queued = queued["operation"].as_str().expect("an id");

    let cancelled = program.json(0, &["op", "cancel", &operation]);
    assert_eq!(cancelled["outcome"], "cancelled", "{cancelled}");
    let message = cancelled["error"]["message"].as_str().expect("why");
    assert!(message.contains("called off") && message.contains("by user:"), "{message}");
    // Whoever waited for it is told the same.
    let mut text = String::new();
    waiting.stdout.take().expect("a pipe").read_to_string(&mut text).expect("its output");
    assert_eq!(waiting.wait().expect("it ends").code(), Some(1), "{text}");
    assert_eq!(serde_json::from_str::<Value>(&text).expect("JSON")["outcome"], "cancelled");
    // The one behind it was not touched by that.
    log.wait_for("Operation.Cancelled");
    assert_eq!(log.wait_for("Operation.Succeeded")["operation"], queued);
    let list = program.json(0, &["list", "web"]);
    assert_eq!(list["snapshots"].as_array().expect("snapshots").len(), 1, "{list}");
}

#[test]
fn an_operation_that_waits_for_its_turn_is_called_off_before_it_begins() {
    let folder = folder();
    let program = lab(folder.path(), &["web"]);
    let _daemon = Daemon::with(&program, &[], &[("SNAPTREE_SIM_STEP_MS", "500")]);
    let ids: Vec<String> = (0..3)
        .map(|number| program.json(0, &["create", "web", &format!("s{number}"), "--detach"]))
        .map(|answer| answer["operation"].as_str().expect("an id").to_owned())
        .collect();
    assert_eq!(program.json(0, &["op", "cancel", &ids[2]])["outcome"], "cancelled");
    let events = program.run(&["log", "--operation", &ids[2], "--json"]).stdout;
    assert!(!events.contains("StepStarted"), "{events}");
}

#[test]
fn the_first_ctrl_c_takes_back_what_was_asked_of_the_daemon() {
    let folder = folder();
    let program = lab(folder.path(), &["web"]);
    let _daemon = Daemon::with(&program, &[], &[("SNAPTREE_SIM_STEP_MS", "1000")]);
    let mut log = Log::follow(&program);
    let waiting = program
        .command(&["create", "web", "one", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    log.wait_for("Operation.StepStarted");
    tool("kill", &["-INT", &waiting.id().to_string()]);
    let output = waiting.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let answer: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(answer["outcome"], "cancelled", "{answer}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("calling it off"), "{output:?}");
}

#[test]
fn sigterm_finishes_the_step_in_hand_and_the_next_daemon_the_rest() {
    let folder = folder();
    let program = lab(folder.path(), &["web"]);
    program.json(0, &["domain", "add", "layers", "--driver", "sim", "--profile", "qemu"]);
    let daemon = Daemon::with(&program, &[], &[("SNAPTREE_SIM_STEP_MS", "700")]);
    let mut log = Log::follow(&program);
    // Two steps and more: the first one is finished, no other begins.
    let first = program.json(0, &["create", "layers", "one", "--detach"]);
    log.wait_for("Operation.StepStarted");
    let second = program.json(0, &["create", "layers", "two", "--detach"]);
    let waiting = program
        .command(&["create", "layers", "three", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    log.wait_for("Snapshot.CreateRequested");
    log.wait_for("Snapshot.CreateRequested");
    let begun = Instant::now();
    daemon.signal("TERM");
    let ended = daemon.ended();
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    assert_eq!(ended.code, Some(0), "{ended:?}");
    for id in [&first["operation"], &second["operation"]] {
        let id = id.as_str().expect("an id");
        assert!(ended.stderr.lines().last().expect("last words").contains(id), "{ended:?}");
        assert!(ended.stdout.contains(&id[id.len() - 8..]), "{ended:?}");
        assert_eq!(outcome(&program, id), Value::Null);
    }
    // Who waited is told that it is open.
    let output = waiting.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(5), "{output:?}");
    let answer: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(
        (&answer["outcome"], &answer["error"]["code"]),
        (&Value::Null, &"stopping".into()),
        "{answer}"
    );
    assert!(!program.state.join("snaptree.sock").exists(), "its socket is gone");

    let _next = Daemon::start(&program);
    for _ in 0..3 {
        log.wait_for("Operation.Succeeded");
    }
    assert_eq!(program.json(0, &["list", "layers"])["current"], "three");
    assert_eq!(program.json(0, &["recover"])["operations"], serde_json::json!([]));
}

#[test]
fn a_step_that_hangs_is_left_to_the_next_daemon_after_eight_seconds() {
    let folder = folder();
    let program = lab(folder.path(), &["web"]);
    let daemon = Daemon::with(&program, &[], &[("SNAPTREE_SIM_STEP_MS", "3600000")]);
    let mut log = Log::follow(&program);
    let detached = program.json(0, &["create", "web", "one", "--detach"]);
    log.wait_for("Operation.StepStarted");
    let begun = Instant::now();
    daemon.signal("TERM");
    // While it ends it takes nothing new, and says so.
    let refused = loop {
        let (status, body) = daemon.post("/v1/domains/web/commands", r#"{"command":{"command":"create"}}"#);
        if status != 200 {
            break (status, body);
        }
    };
    assert_eq!((refused.0, &refused.1["error"]["code"]), (503, &"stopping".into()), "{refused:?}");
    let ended = daemon.ended();
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let operation = detached["operation"].as_str().expect("an id");
    assert!(ended.stderr.lines().last().expect("last words").contains(operation), "{ended:?}");

    let _next = Daemon::start(&program);
    assert_eq!(log.wait_for("Operation.Succeeded")["operation"], operation);
}

#[test]
fn a_daemon_that_was_killed_in_a_step_is_succeeded_by_one_that_recovers() {
    for place in ["sim.create.before", "sim.create.after", "append.after"] {
        let folder = folder();
        let program = lab(folder.path(), &["web"]);
        let killed = Daemon::start(&program.with_fault(&format!("{place}=kill")));
        let ran = program.run(&["create", "web", "one", "--json"]);
        assert_eq!(ran.code, Some(5), "{place}: {ran:?}");
        assert_eq!(ran.json()["error"]["code"], "cut", "{ran:?}");
        let ran = killed.ended();
        assert_eq!(ran.code, None, "killed by a signal: {ran:?}");
        let socket = std::fs::symlink_metadata(program.state.join("snaptree.sock")).expect("left behind");
        assert!(socket.file_type().is_socket());

        let mut log = Log::follow(&program);
        let _next = Daemon::start(&program);
        log.wait_for("Operation.Succeeded");
        let list = program.json(0, &["list", "web"]);
        assert_eq!(list["snapshots"].as_array().expect("snapshots").len(), 1, "{place}: {list}");
        assert_eq!(list["current"], "one");
    }
}

#[test]
fn without_a_daemon_a_stale_socket_is_in_nobodys_way() {
    let folder = folder();
    let program = lab(folder.path(), &["web"]);
    let socket = program.state.join("snaptree.sock");
    // Its listener is gone at once, as after a SIGKILL.
    drop(UnixListener::bind(&socket).expect("a socket"));
    program.json(0, &["create", "web", "one"]);
    let daemon = Daemon::start(&program);
    let mode = std::fs::metadata(&socket).expect("a socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    program.json(0, &["create", "web", "two"]);
    daemon.signal("INT");
    assert_eq!(daemon.ended().code, Some(0));
    program.json(0, &["create", "web", "three"]);

    std::fs::write(&socket, "not a socket").expect("a file");
    let refused = program.json(4, &["serve"]);
    assert!(refused["error"]["message"].as_str().expect("why").contains("is no socket"), "{refused}");
    assert_eq!(std::fs::read_to_string(&socket).expect("it is left alone"), "not a socket");
}

#[test]
fn a_second_daemon_is_refused_with_the_process_and_the_way_to_it() {
    let folder = folder();
    let program = lab(folder.path(), &["web"]);
    let daemon = Daemon::start(&program);
    let refused = program.json(4, &["serve"]);
    let message = refused["error"]["message"].as_str().expect("why");
    assert!(message.contains(&daemon.child.id().to_string()), "{message}");
    assert!(message.contains(daemon.socket.to_str().expect("text")), "{message}");
    // Also where the first one does not answer.
    daemon.signal("STOP");
    snaptree_tests::program::wait_until_stopped(daemon.child.id());
    std::fs::remove_file(&daemon.socket).expect("its socket");
    let refused = program.json(4, &["serve", "--lock-timeout", "1s"]);
    let message = refused["error"]["message"].as_str().expect("why");
    assert!(message.contains(&daemon.child.id().to_string()), "{message}");
}

#[test]
fn a_socket_elsewhere_is_found_by_the_state_directory() {
    let folder = folder();
    let program = lab(folder.path(), &["web"]);
    let elsewhere = folder.path().join("elsewhere.sock");
    let daemon = Daemon::with(&program, &["--socket", elsewhere.to_str().expect("text")], &[]);
    assert_eq!(daemon.socket, elsewhere);
    program.json(0, &["create", "web", "one", "--detach"]);
    daemon.signal("TERM");
    assert_eq!(daemon.ended().code, Some(0));
    assert!(std::fs::symlink_metadata(program.state.join("snaptree.sock")).is_err(), "the link is gone");

    let long = folder.path().join("x".repeat(120));
    let refused = program.json(1, &["serve", "--socket", long.to_str().expect("text")]);
    let message = refused["error"]["message"].as_str().expect("why");
    assert!(message.contains("at most 107"), "{message}");
}

#[test]
fn requests_that_are_none_are_refused_and_the_daemon_goes_on() {
    let folder = folder();
    let program = lab(folder.path(), &["web"]);
    let daemon = Daemon::start(&program);
    let big = "x".repeat(1 << 20);
    for (request, status) in [
        ("GARBAGE\r\n\r\n".to_owned(), "400"),
        ("GET / HTTP/9.9\r\n\r\n".to_owned(), "400"),
        (format!("GET /v1/status HTTP/1.1\r\nhost: x\r\nbig: {big}\r\n\r\n"), "431"),
        (format!("GET /v1/status HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(1000)), "431"),
        ("GET /v1/nothing HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".to_owned(), "404"),
        ("GET /v1/recover HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".to_owned(), "405"),
    ] {
        let answer = daemon.raw(request.as_bytes());
        let head: String = request.chars().take(40).collect();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{head:?}: {answer}");
    }
    let commands = "/v1/domains/web/commands";
    for (path, body, status) in [
        (commands, "", 400),
        (commands, "{", 400),
        (commands, "\0\u{ff}", 400),
        (commands, r#"{"command":{"command":"explode"}}"#, 400),
        (commands, r#"{"command":{"command":"create","name":"a/b"}}"#, 400),
        (commands, r#"{"command":{"command":"create","nmae":"x"}}"#, 400),
        (commands, r#"{"command":{"command":"create"},"uid":0}"#, 400),
        (commands, &format!("[{}", "[".repeat(100_000)), 400),
        (commands, &format!(r#"{{"key":"{big}"}}"#), 413),
        (commands, r#"{"command":{"command":"revert","snapshot":{"name":"nothing"}}}"#, 404),
        ("/v1/domains/nowhere/commands", r#"{"command":{"command":"create"}}"#, 404),
        ("/v1/domains/%ff/commands", r#"{"command":{"command":"create"}}"#, 400),
        ("/v1/domains", r#"{"name":"x","driver":"qemu","disks":[["vda","relative.qcow2"]]}"#, 400),
        ("/v1/operations/none/cancel", "", 404),
    ] {
        let (got, answer) = daemon.post(path, body);
        let shown: String = body.chars().take(60).collect();
        assert_eq!(got, status, "{path} {shown}: {answer}");
        if path != "/v1/domains/%ff/commands" {
            assert!(answer["error"]["message"].is_string(), "{path} {shown}: {answer}");
        }
    }
    // One that never comes to its end keeps nobody from the daemon.
    let mut slow = UnixStream::connect(&daemon.socket).expect("it listens");
    slow.write_all(b"POST /v1/recover HTTP/1.1\r\n").expect("written");
    program.json(0, &["create", "web", "one"]);
    assert_eq!(daemon.get("/v1/status")["pid"], daemon.child.id());
    assert_eq!(program.json(0, &["list", "web"])["snapshots"].as_array().expect("snapshots").len(), 1);
}

#[test]
fn status_tells_what_is_open_and_how_the_connections_stand() {
    let folder = folder();
    let program = lab(folder.path(), &["web", "other"]);
    let daemon = Daemon::with(&program, &[], &[("SNAPTREE_SIM_STEP_MS", "3600000")]);
    let mut log = Log::follow(&program);
    program.json(0, &["create", "web", "one", "--detach"]);
    program.json(0, &["create", "other", "one", "--detach"]);
    log.wait_for("Operation.StepStarted");
    log.wait_for("Operation.StepStarted");
    let status = daemon.get("/v1/status");
    assert_eq!(status["queue"]["running"], 2, "{status}");
    assert_eq!(status["open"].as_array().expect("open").len(), 2, "{status}");
    assert_eq!(status["state"], program.state.to_str().expect("text"));
    let connection = &status["connections"][0];
    assert_eq!((&connection["connection"], &connection["breaker"]), (&"sim".into(), &"closed".into()));
}
