//! An interrupted revert on real images, killed before and after its point of no return: how it ends, and how the log
//! tells it: who, what, when, where it was cut, what recovery found and did.
//!
//! Cut before that point nothing has changed, and it can go either way: recovery carries it through, a cancel takes it
//! back, and so does a machine that ran meanwhile, whose writes are kept. Cut after it, it only goes forward.

#![cfg(feature = "lab")]
#![allow(clippy::expect_used, reason = "a test")]

use std::path::Path;

use serde_json::Value;
use snaptree_tests::lab::Lab;
use snaptree_tests::scenarios::{branched, snapshot};

const BEFORE: &str = "qemu.switch.locked";
const AFTER: &str = "qemu.switch.renamed";

/// A machine whose revert to `a` was killed at a place, and the operation.
fn cut(folder: &Path, place: &str) -> (Lab, String) {
    let mut lab = Lab::new(folder);
    branched(&mut lab);
    let ran = lab.program.with_fault(&format!("{place}=kill")).run(&["revert", "web", "a"]);
    assert_eq!(ran.code, None, "killed by a signal: {ran:?}");
    let open = lab.program.json(0, &["op", "list", "--open"]);
    let operation = open["operations"][0]["operation"].as_str().expect("an open operation").to_owned();
    (lab, operation)
}

/// What differs in every run, and what stands in its place.
const REDACTED: [(&str, &str); 9] = [
    (r"(?m)^ +\d+  ", "  [seq]  "),
    (r"/\S+\.qcow2", "[layer]"),
    (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d+)?", "[time]"),
    (r"process \d+", "process [pid]"),
    (r"(after|up) [0-9.]+ (ms|s|min \d+ s)", "$1 [span]"),
    (r"operation [0-9a-f-]{36}", "operation [id]"),
    (r"\[[0-9a-f]{8}\]", "[id]"),
    (r"user:\S+ *", "user:[name] "),
    (r"(?m) +$", ""),
];

/// What `op show` and `log --operation` tell, as people read it.
fn story(lab: &Lab, operation: &str) -> String {
    let shown = lab.program.run(&["op", "show", operation]);
    let logged = lab.program.run(&["log", "--operation", operation]);
    assert_eq!((shown.code, logged.code), (Some(0), Some(0)), "{shown:?} {logged:?}");
    format!("$ snaptree op show\n{}\n$ snaptree log --operation\n{}", shown.stdout, logged.stdout)
}

/// Compares the story with the one that is kept under a name.
fn expect_story(name: &str, lab: &Lab, operation: &str) {
    let mut settings = insta::Settings::clone_current();
    for (pattern, replacement) in REDACTED {
        settings.add_filter(pattern, replacement);
    }
    settings.bind(|| insta::assert_snapshot!(name, story(lab, operation)));
}

/// The operation's events.
fn events(lab: &Lab, operation: &str) -> Vec<Value> {
    let log = lab.program.run(&["log", "--operation", operation, "--json"]);
    log.stdout.lines().map(|line| serde_json::from_str(line).expect("an event a line")).collect()
}

/// Expects from the JSON answers: the process that was killed, the one that recovered, and what it found and did.
fn expect_told(lab: &Lab, operation: &str, found: &str, course: &str, outcome: &str) {
    let events = events(lab, operation);
    let of_kind = |kind: &str| events.iter().find(|event| event["kind"] == kind);
    let request = of_kind("Snapshot.RevertRequested").expect("who asked for what, and when");
    assert!(request["actor"].as_str().is_some_and(|actor| actor.starts_with("user:")), "{request}");
    assert!(request["at"].is_string() && request["origin"]["uid"].is_u64(), "{request}");
    let recovered = of_kind("System.Recovered").expect("what recovery found");
    assert_eq!(recovered["data"]["found"], found, "{recovered}");
    assert_eq!(recovered["data"]["course"], course, "{recovered}");
    assert_eq!(recovered["data"]["failure"], Value::Null, "{recovered}");
    assert_ne!(recovered["origin"]["pid"], request["origin"]["pid"]);
    assert_ne!(recovered["epoch"], request["epoch"]);
    let last = events.last().expect("an event");
    assert_eq!(last["kind"], outcome, "{last}");

    let shown = lab.program.json(0, &["op", "show", operation]);
    let cuts = shown["cuts"].as_array().expect("cuts");
    assert_eq!(cuts.len(), 1, "{shown}");
    assert_eq!(cuts[0]["pid"], request["origin"]["pid"], "{shown}");
    assert_eq!(cuts[0]["recovered_by"], recovered["origin"]["pid"], "{shown}");
    assert_eq!(cuts[0]["seq"], recovered["seq"], "{shown}");
    assert_eq!(cuts[0]["step"], "switch", "{shown}");
    assert_eq!(
        (&cuts[0]["found"], &cuts[0]["course"]),
        (&Value::from(found), &Value::from(course)),
        "{shown}"
    );
}

/// What `recover` says of the operation.
fn recover(lab: &Lab, operation: &str) -> Value {
    let recovered = lab.program.json(0, &["recover"]);
    let account = recovered["operations"][0].clone();
    assert_eq!(account["operation"], operation, "{recovered}");
    account
}

#[test]
fn cut_before_its_point_of_no_return_and_called_off_it_ends_as_it_began() {
    let folder = tempfile::tempdir().expect("a folder");
    let (mut lab, operation) = cut(folder.path(), BEFORE);
    lab.check_machine("cut");
    let answer = lab.program.json(0, &["op", "cancel", &operation]);
    assert_eq!(answer["outcome"], "cancelled", "{answer}");
    lab.check("called off");
    expect_told(&lab, &operation, "half-done", "back", "Operation.Cancelled");
    expect_story("called_off", &lab, &operation);
    snapshot(&mut lab, "afterwards", 50);
    lab.check("afterwards");
}

#[test]
fn cut_before_its_point_of_no_return_a_machine_that_ran_meanwhile_keeps_its_writes() {
    let folder = tempfile::tempdir().expect("a folder");
    let (mut lab, operation) = cut(folder.path(), BEFORE);
    // Somebody starts the machine on what it had, and works.
    lab.write("vda", 30, 5, 77);
    let account = recover(&lab, &operation);
    assert_eq!(account["outcome"], "failed", "{account}");
    assert_eq!(account["found"], "step 1 'switch' was half done and had to be taken back", "{account}");
    assert!(
        account["did"].as_str().is_some_and(|did| did.contains("the machine ran meanwhile")),
        "{account}"
    );
    lab.check("taken back, with what was written");
    expect_told(&lab, &operation, "half-done", "back", "Operation.Failed");
    expect_story("ran_meanwhile", &lab, &operation);
    lab.program.json(0, &["revert", "web", "a"]);
    lab.model.revert("a");
    lab.check("asked for again");
}

#[test]
fn cut_before_its_point_of_no_return_and_left_alone_it_is_carried_through() {
    let folder = tempfile::tempdir().expect("a folder");
    let (mut lab, operation) = cut(folder.path(), BEFORE);
    lab.check_machine("cut");
    let account = recover(&lab, &operation);
    assert_eq!(account["outcome"], "succeeded", "{account}");
    assert_eq!(account["found"], "step 1 'switch' was half done and could be finished", "{account}");
    lab.model.revert("a");
    lab.check("reverted");
    expect_told(&lab, &operation, "half-done", "forward", "Operation.Succeeded");
    expect_story("carried_through", &lab, &operation);
}

#[test]
fn cut_after_its_point_of_no_return_it_is_reverted() {
    let folder = tempfile::tempdir().expect("a folder");
    let (mut lab, operation) = cut(folder.path(), AFTER);
    // It has taken effect: the machine reads as the snapshot, whoever starts it.
    let mut reverted = lab.model.clone();
    reverted.revert("a");
    assert!(lab.machine_reads_as(&reverted));
    let account = recover(&lab, &operation);
    assert_eq!(account["outcome"], "succeeded", "{account}");
    assert_eq!(account["did"], "carried it through", "{account}");
    lab.model = reverted;
    lab.check("reverted");
    expect_told(&lab, &operation, "half-done", "forward", "Operation.Succeeded");
    expect_story("reverted", &lab, &operation);
}

#[test]
fn cut_after_its_point_of_no_return_it_cannot_be_called_off() {
    let folder = tempfile::tempdir().expect("a folder");
    let (mut lab, operation) = cut(folder.path(), AFTER);
    let answer = lab.program.json(4, &["op", "cancel", &operation]);
    assert_eq!(answer["outcome"], "succeeded", "{answer}");
    lab.model.revert("a");
    lab.check("reverted all the same");
}
