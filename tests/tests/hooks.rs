//! Programs before and after the snapshots of a policy, by the built program on the simulated hypervisor.

#![allow(clippy::expect_used, reason = "these are tests")]

use std::fs;
use std::io::{BufRead, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Stdio};

use serde_json::{Value, json};
use snaptree_tests::daemon::Daemon;
use snaptree_tests::images::tool;
use snaptree_tests::program::Program;

/// Writes a line when it begins and one when it ends.
const TELLS: &str = "echo \"begin $SNAPTREE_PHASE\" >> \"$LOG\"; echo \"end $SNAPTREE_PHASE\" >> \"$LOG\"";

/// A state with a machine, and a place where hooks write what they saw.
struct Lab {
    folder: tempfile::TempDir,
    program: Program,
}

impl Lab {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let program = Program::new(folder.path().join("state"));
        program.json(0, &["domain", "add", "web", "--driver", "sim"]);
        Self { folder, program }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().expect("a path of the tests").to_owned()
    }

    /// A hook that runs a script, as a section of a policy file.
    fn hook(&self, phase: &str, script: &str, more: &str) -> String {
        let program = json!(["/bin/sh", "-c", script]);
        let environment = format!("{{ LOG = {}, DIR = {} }}", json!(self.text("log")), json!(self.text("")));
        format!("[hooks.{phase}]\nprogram = {program}\nenvironment = {environment}\n{more}\n")
    }

    /// A policy that runs when it is told to.
    fn set(&self, sections: &str) -> String {
        self.set_with("schedule = \"2190-01-01\"\n", sections)
    }

    /// What it said on standard error is given back.
    fn set_with(&self, keys: &str, sections: &str) -> String {
        let file = self.path("policy.toml");
        fs::write(&file, format!("name = \"p\"\ndomains = [\"*\"]\n{keys}{sections}")).expect("written");
        let ran = self.program.run(&["policy", "set", &self.text("policy.toml")]);
        assert_eq!(ran.code, Some(0), "{ran:?}");
        ran.stderr
    }

    fn log(&self) -> Vec<String> {
        let text = fs::read_to_string(self.path("log")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// A pipe that holds up whoever opens it until the other end is opened.
    fn pipe(&self, name: &str) -> PathBuf {
        tool("mkfifo", &[&self.text(name)]);
        self.path(name)
    }

    fn snapshots(&self) -> usize {
        self.program.json(0, &["list", "web"])["snapshots"].as_array().expect("snapshots").len()
    }

    /// The only run there was.
    fn run(&self) -> Value {
        let runs = self.program.json(0, &["policy", "runs"]);
        assert_eq!(runs["runs"].as_array().map(Vec::len), Some(1), "{runs:#}");
        runs["runs"][0].clone()
    }
}

/// `hook` and `outcome` of each.
fn hooks(run: &Value) -> Vec<(String, Option<String>)> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let hooks = run["hooks"].as_array().expect("hooks").iter();
    hooks.map(|hook| (text(&hook["hook"]).expect("a word"), text(&hook["outcome"]))).collect()
}

fn both(before: &str, after: &str) -> Vec<(String, Option<String>)> {
    vec![("before".to_owned(), Some(before.to_owned())), ("after".to_owned(), Some(after.to_owned()))]
}

fn signal(child: &Child, signal: &str) {
    tool("kill", &[&format!("-{signal}"), &child.id().to_string()]);
}

#[test]
fn hooks_run_around_the_snapshot_and_are_told_what_it_is_about() {
    let lab = Lab::new();
    let script = "env | grep -E '^(SNAPTREE_|MINE|SECRET)' | sort >> \"$LOG\"; \
                  ls \"$DIR\"state >/dev/null && cat && echo \"last words\"";
    let hook = |phase: &str| lab.hook(phase, script, "");
    lab.set(&format!("{}{}", hook("before"), hook("after").replace("{ LOG", "{ MINE = \"x y\", LOG")));
    let program = lab.program.with_env("SECRET", "hunter2");
    let ran = program.json(0, &["policy", "run", "p"]);
    let run = &ran["runs"][0];
    assert_eq!(hooks(run), both("done", "done"), "{ran:#}");
    let word = |key: &str| run[key].as_str().expect("a word").to_owned();
    let told = |phase: &str, outcome: &str| {
        let common = [
            "SNAPTREE_DOMAIN=web".to_owned(),
            format!("SNAPTREE_OPERATION={}", word("operation")),
            format!("SNAPTREE_OUTCOME={outcome}"),
            format!("SNAPTREE_PHASE={phase}"),
            "SNAPTREE_POLICY=p".to_owned(),
            format!("SNAPTREE_SNAPSHOT={}", word("snapshot")),
        ];
        common.to_vec()
    };
    let expected = [told("before", ""), vec!["MINE=x y".to_owned()], told("after", "succeeded")].concat();
    assert_eq!(lab.log(), expected);
    let log = lab.program.run(&["log", "--json", "--operation", &word("operation")]).stdout;
    let kinds: Vec<String> = log
        .lines()
        .map(|line| {
            serde_json::from_str::<Value>(line).expect("JSON")["kind"].as_str().expect("a kind").into()
        })
        .collect();
    let place = |kind: &str| kinds.iter().position(|other| other == kind).expect("it is in the log");
    assert!(place("Operation.HookFinished") < place("Operation.Planned"), "{kinds:?}");
    let last = kinds.iter().rposition(|kind| kind == "Operation.HookFinished").expect("two of them");
    assert!(last > place("Operation.StepFinished") && last < place("Snapshot.Created"), "{kinds:?}");
    let left = fs::read_dir(lab.path("state/run")).map(Iterator::count).unwrap_or(0);
    assert_eq!(left, 0, "locks of hooks stay behind");
}

#[test]
fn a_hook_before_that_fails_aborts_the_run_and_the_one_after_still_runs() {
    let lab = Lab::new();
    let before = lab.hook("before", "echo 'the database would not stop' >&2; exit 3", "");
    let after = lab.hook("after", "echo \"$SNAPTREE_OUTCOME\" >> \"$LOG\"", "");
    lab.set(&format!("{before}{after}"));
    let ran = lab.program.json(1, &["policy", "run", "p"]);
    let run = &ran["runs"][0];
    assert_eq!((run["outcome"].as_str(), hooks(run)), (Some("failed"), both("failed", "done")), "{ran:#}");
    let message = run["error"]["message"].as_str().expect("a message");
    assert!(message.contains("the hook before failed: /bin/sh ended with exit code 3"), "{message}");
    assert!(message.contains("the database would not stop"), "{message}");
    assert_eq!((lab.log(), lab.snapshots()), (vec!["failed".to_owned()], 0));
}

#[test]
fn a_hook_that_may_fail_changes_nothing_but_the_account() {
    let lab = Lab::new();
    let before = lab.hook("before", "exit 1", "on-failure = \"go-on\"");
    let after = lab.hook("after", "kill -9 $$", "");
    lab.set(&format!("{before}{after}"));
    let ran = lab.program.json(0, &["policy", "run", "p"]);
    let run = &ran["runs"][0];
    assert_eq!(hooks(run), both("failed", "failed"), "{ran:#}");
    assert_eq!((run["outcome"].as_str(), lab.snapshots()), (Some("succeeded"), 1), "{ran:#}");
    let text = lab.program.run(&["policy", "runs"]).stdout;
    assert!(text.contains("hook before failed") && text.contains("hook after failed"), "{text}");
}

#[test]
fn a_hook_that_cannot_be_started_is_told_of_with_its_path() {
    let lab = Lab::new();
    lab.set("[hooks.before]\nprogram = [\"/no/such/program\"]\n");
    let ran = lab.program.json(1, &["policy", "run", "p"]);
    let message = ran["runs"][0]["error"]["message"].as_str().expect("a message");
    assert!(message.contains("cannot start /no/such/program"), "{message}");
}

#[test]
fn the_hook_after_runs_also_when_the_snapshot_fails() {
    let lab = Lab::new();
    // What the hypervisor says cannot be read when it is asked.
    let before = lab.hook("before", "for file in \"$DIR\"state/sim/*; do echo broken > \"$file\"; done", "");
    let after = lab.hook("after", "echo \"$SNAPTREE_OUTCOME\" >> \"$LOG\"", "");
    lab.set(&format!("{before}{after}"));
    let ran = lab.program.run(&["policy", "run", "p", "--json"]).json();
    assert_eq!(ran["runs"][0]["outcome"], "failed", "{ran:#}");
    assert_eq!(lab.log(), ["failed"]);
}

#[test]
fn past_its_time_a_hook_is_ended_with_all_that_it_began() {
    let lab = Lab::new();
    let pipe = lab.pipe("pipe");
    // The pipe's other end is open until the last of them has ended.
    let script =
        format!("exec 3> '{}'; (trap '' TERM; while :; do sleep 1; done) & sleep 1000", pipe.display());
    lab.set(&lab.hook("before", &script, "timeout = \"1s\""));
    let reader = std::thread::spawn(move || fs::read(pipe).expect("the pipe").len());
    let ran = lab.program.json(1, &["policy", "run", "p"]);
    let message = ran["runs"][0]["error"]["message"].as_str().expect("a message");
    assert!(message.contains("took longer than 1 s and was ended"), "{message}");
    assert_eq!(ran["runs"][0]["error"]["code"], "timeout");
    assert_eq!(reader.join().expect("it read to the end"), 0);
}

#[test]
fn what_a_hook_leaves_in_the_background_is_left_and_not_waited_for() {
    let lab = Lab::new();
    let begin = "sleep 1000 & echo $! > \"$DIR\"pid";
    let end = "kill $(cat \"$DIR\"pid) && echo ended >> \"$LOG\"";
    lab.set(&format!("{}{}", lab.hook("before", begin, ""), lab.hook("after", end, "")));
    lab.program.json(0, &["policy", "run", "p"]);
    assert_eq!(lab.log(), ["ended"]);
}

#[test]
fn killed_anywhere_around_its_hooks_a_run_ends_with_one_snapshot_and_the_hook_after() {
    let places = [
        "hook.started.before",
        "hook.done.before",
        "append.after@3",
        "append.after@4",
        "append.after@5",
        "sim.create.after",
        "hook.started.after",
        "hook.done.after",
        "append.after@6",
        "append.after@7",
    ];
    for place in places {
        let lab = Lab::new();
        lab.set(&format!("{}{}", lab.hook("before", TELLS, ""), lab.hook("after", TELLS, "")));
        let killed = lab.program.with_fault(&format!("{place}=kill")).run(&["policy", "run", "p"]);
        assert_eq!(killed.code, None, "{place}: killed by a signal: {killed:?}");
        lab.program.json(0, &["recover"]);
        let run = lab.run();
        assert_eq!(run["outcome"], "succeeded", "{place}: {run:#}");
        assert_eq!(hooks(&run), both("done", "done"), "{place}");
        assert_eq!(lab.snapshots(), 1, "{place}");
        let log = lab.log();
        let ends = |phase: &str| log.iter().filter(|line| **line == format!("end {phase}")).count();
        assert!((1..=2).contains(&ends("before")), "{place}: {log:?}");
        assert!((1..=2).contains(&ends("after")), "{place}: {log:?}");
        assert_eq!(log.last().map(String::as_str), Some("end after"), "{place}: {log:?}");
        lab.program.json(0, &["audit", "verify"]);
    }
}

#[test]
fn a_hook_that_outlives_a_killed_snaptree_is_waited_for_before_it_runs_again() {
    let lab = Lab::new();
    let (begun, go) = (lab.pipe("begun"), lab.pipe("go"));
    let script = "echo begin >> \"$LOG\"; if [ ! -e \"$DIR\"once ]; then touch \"$DIR\"once; echo x > \"$DIR\"begun; \
                  read line < \"$DIR\"go; fi; echo end >> \"$LOG\"";
    lab.set(&lab.hook("before", script, ""));
    let mut first =
        lab.program.command(&["policy", "run", "p"]).stdout(Stdio::null()).spawn().expect("it starts");
    fs::read(&begun).expect("the hook is at work");
    signal(&first, "KILL");
    first.wait().expect("it ends");
    let mut recovering = lab.program.command(&["recover"]).stdout(Stdio::null()).spawn().expect("it starts");
    // It has written that it begins the hook again; the one that is at work holds it up.
    let is_begun = || {
        let log = lab.program.run(&["log", "--kind", "Operation.HookStarted", "--json"]).stdout;
        log.lines().count() == 2
    };
    while !is_begun() {
        assert_eq!(recovering.try_wait().expect("it can be asked"), None);
    }
    assert_eq!(lab.log(), ["begin"]);
    fs::write(&go, "x\n").expect("the hook reads");
    assert!(recovering.wait().expect("it ends").success());
    assert_eq!(lab.log(), ["begin", "end", "begin", "end"]);
    assert_eq!(lab.run()["outcome"], "succeeded");
}

#[test]
fn a_daemon_that_is_told_to_end_between_the_hooks_runs_the_one_after_first() {
    let lab = Lab::new();
    let (begun, go) = (lab.pipe("begun"), lab.pipe("go"));
    let before =
        lab.hook("before", "echo x > \"$DIR\"begun; read line < \"$DIR\"go; echo before >> \"$LOG\"", "");
    let after = lab.hook("after", "echo after >> \"$LOG\"", "");
    lab.set(&format!("{before}{after}"));
    let daemon = Daemon::start(&lab.program);
    let mut run = lab
        .program
        .command(&["policy", "run", "p"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("it starts");
    fs::read(&begun).expect("the hook is at work");
    daemon.tell_to_end();
    fs::write(&go, "x\n").expect("the hook reads");
    daemon.ends();
    run.wait().expect("it ends");
    assert_eq!(lab.log(), ["before", "after"]);
    assert_eq!(lab.run()["outcome"], "succeeded");
}

#[test]
fn what_was_called_off_between_the_hooks_ends_with_the_hook_after() {
    let lab = Lab::new();
    let (begun, go) = (lab.pipe("begun"), lab.pipe("go"));
    let before =
        lab.hook("before", "echo x > \"$DIR\"begun; read line < \"$DIR\"go; echo before >> \"$LOG\"", "");
    let after = lab.hook("after", "echo \"$SNAPTREE_OUTCOME\" >> \"$LOG\"", "");
    lab.set(&format!("{before}{after}"));
    let mut run = lab
        .program
        .command(&["policy", "run", "p"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    fs::read(&begun).expect("the hook is at work");
    signal(&run, "INT");
    let mut said = BufReader::new(run.stderr.take().expect("a pipe")).lines().map_while(Result::ok);
    assert!(said.any(|line| line.contains("ending after this step")), "it heard of it");
    fs::write(&go, "x\n").expect("the hook reads");
    // What it says has to be read until it ends.
    said.for_each(drop);
    run.wait().expect("it ends");
    assert_eq!(lab.log(), ["before", "cancelled"]);
    assert_eq!((lab.run()["outcome"].as_str(), lab.snapshots()), (Some("cancelled"), 0));
}

/// Reads one request, gives this answer, and says what the first line and the body were.
fn serve_one(listener: &TcpListener, answer: &str) -> (String, Value) {
    let (stream, _) = listener.accept().expect("a client");
    let mut reader = BufReader::new(&stream);
    let (mut first, mut length) = (String::new(), 0);
    reader.read_line(&mut first).expect("a line");
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).expect("a header");
        if line.trim().is_empty() {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().expect("a number");
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).expect("the body");
    let head = format!("HTTP/1.1 {answer}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    (&stream).write_all(head.as_bytes()).expect("it reads");
    (first.trim().to_owned(), serde_json::from_slice(&body).expect("JSON"))
}

/// Nothing may go, and the disk may stand upon one snapshot alone: from the second run on, each fails.
const FAILING: &str = "schedule = \"every 1s\"\nmax-depth = 1\nsuspend-after = 1\n";

#[test]
fn a_webhook_is_told_again_after_an_error_that_may_pass() {
    let lab = Lab::new();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    lab.set_with(
        FAILING,
        &format!("[notify]\nwebhook = \"http://127.0.0.1:{port}/told\"\non = [\"failure\"]\n"),
    );
    let daemon = Daemon::start(&lab.program);
    let all: Vec<(String, Value)> = ["503 Busy", "500 Oh", "204 Fine", "204 Fine"]
        .iter()
        .map(|answer| serve_one(&listener, answer))
        .collect();
    for (first, told) in &all {
        assert_eq!(first, "POST /told HTTP/1.1");
        assert_eq!((&told["policy"], &told["occasion"]), (&"p".into(), &"failure".into()), "{told}");
        assert!(told["at"].as_str().expect("a time").ends_with('Z'), "{told}");
    }
    // The run that failed, and that the policy is suspended; one of them was told three times in all.
    let messages: Vec<&str> = all.iter().map(|(_, told)| told["message"].as_str().expect("words")).collect();
    let failed = messages.iter().filter(|message| message.contains("max-depth is 1")).count();
    let suspended = all.iter().filter(|(_, told)| told["suspended"] == true).count();
    assert_eq!(failed + suspended, 4, "{messages:?}");
    assert!(failed >= 1 && suspended >= 1, "{messages:?}");
    daemon.kill();
}

#[test]
fn the_address_in_a_file_is_a_secret_and_a_final_answer_is_not_asked_for_again() {
    let lab = Lab::new();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    fs::write(lab.path("url"), format!("http://127.0.0.1:{port}/hunter2\n")).expect("written");
    lab.set_with(
        FAILING,
        &format!("[notify]\nwebhook-file = {}\non = [\"failure\"]\n", json!(lab.text("url"))),
    );
    let said = lab.path("said");
    let mut daemon = lab
        .program
        .command(&["serve"])
        .stdout(Stdio::null())
        .stderr(fs::File::create(&said).expect("a file"))
        .spawn()
        .expect("it starts");
    // One answer each: of a failed run and of the suspension that follows from it.
    let told = [serve_one(&listener, "404 Gone"), serve_one(&listener, "404 Gone")];
    assert!(told.iter().all(|(first, _)| first == "POST /hunter2 HTTP/1.1"), "{told:?}");
    let complaints = || {
        let said = fs::read_to_string(&said).expect("its log");
        said.matches("the webhook was not told: it answered 404").count()
    };
    while complaints() < 2 {
        assert_eq!(daemon.try_wait().expect("it can be asked"), None);
    }
    daemon.kill().expect("it lives");
    daemon.wait().expect("it ends");
    listener.set_nonblocking(true).expect("a listener");
    assert!(listener.accept().is_err(), "it was asked again");
    let written = fs::read_to_string(&said).expect("its log") + &lab.program.run(&["log", "--json"]).stdout;
    assert!(!written.contains("hunter2"), "{written}");
}

#[test]
fn a_policy_whose_domain_cannot_be_quiesced_is_told_so_by_the_run() {
    let lab = Lab::new();
    lab.program.json(0, &["domain", "add", "plain", "--driver", "sim", "--profile", "virtualbox"]);
    let said = lab.set("[snapshot]\nquiesce = true\n");
    assert!(said.contains("domain 'plain' cannot be quiesced") && !said.contains("'web'"), "{said}");
    let ran = lab.program.json(4, &["policy", "run", "p"]);
    let of = |domain: &str| {
        let runs = ran["runs"].as_array().expect("runs");
        runs.iter().find(|run| run["domain"] == domain).expect("a run").clone()
    };
    assert_eq!(of("web")["outcome"], "succeeded", "{ran:#}");
    let refused = of("plain");
    assert_eq!((&refused["outcome"], &refused["error"]["code"]), (&"refused".into(), &"unsupported".into()));
    assert!(refused["error"]["message"].as_str().expect("words").contains("'plain' cannot be quiesced"));
    let log = lab.program.run(&["log", "web", "--kind", "Snapshot.CreateRequested", "--json"]).stdout;
    assert_eq!(serde_json::from_str::<Value>(&log).expect("one event")["data"]["quiesce"], true);
}

#[test]
fn quiesce_is_asked_for_with_the_disks_alone() {
    let lab = Lab::new();
    lab.program.json(0, &["create", "web", "a", "--quiesce", "--disk-only"]);
    let refused = lab.program.json(4, &["create", "web", "b", "--quiesce"]);
    assert!(refused["error"]["message"].as_str().expect("words").contains("quiesce requires disk-only"));
    assert_eq!(lab.program.run(&["create", "web", "c", "--quiesce", "--memory"]).code, Some(2));
}
