//! Operations that do not simply succeed: called off, too late, stuck and settled by someone, retried by key.

#![allow(clippy::expect_used, reason = "a test")]

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use snaptree_drivers::sim::SimDriver;
use snaptree_engine::command::{Command, Create};
use snaptree_engine::domain::DriverKind;
use snaptree_engine::driver::{Driver, NoWatch, Registration};
use snaptree_engine::engine::{Clock, Engine, Requester, Submitted};
use snaptree_engine::event::{Actor, Origin};
use snaptree_engine::operation::Outcome;
use snaptree_engine::{DomainId, DomainName};
use snaptree_store::{LockWait, Store};
use snaptree_tests::program::Program;

/// A registered machine on the simulated hypervisor, and one snapshot of it.
fn lab(folder: &Path) -> Program {
    let program = Program::new(folder);
    program.json(0, &["domain", "add", "web", "--driver", "sim"]);
    program.json(0, &["create", "web", "one"]);
    program
}

/// Kills a create at a fault point; says which operation is open then.
fn cut(program: &Program, name: &str, place: &str) -> String {
    let ran = program.with_fault(&format!("{place}=kill")).run(&["create", "web", name]);
    assert_eq!(ran.code, None, "killed by a signal: {ran:?}");
    let open = program.json(0, &["op", "list", "--open"]);
    open["operations"][0]["operation"].as_str().expect("an open operation").to_owned()
}

fn outcome(program: &Program, operation: &str) -> Value {
    program.json(0, &["op", "show", operation])["outcome"].clone()
}

#[test]
fn an_operation_that_had_no_effect_yet_is_called_off() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = lab(folder.path());
    for place in ["append.after", "sim.create.before"] {
        let operation = cut(&program, "two", place);
        let answer = program.json(0, &["op", "cancel", &operation]);
        assert_eq!(answer["outcome"], "cancelled", "{place}: {answer}");
        assert_eq!(outcome(&program, &operation), "cancelled");
        assert_eq!(program.json(0, &["list", "web"])["current"], "one");
    }
    assert_eq!(program.json(3, &["op", "cancel", "ffffffff"])["error"]["code"], "not-found");
    program.json(0, &["create", "web", "two"]);
}

#[test]
fn a_revert_past_its_point_of_no_return_is_carried_through_and_the_cancel_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = lab(folder.path());
    program.json(0, &["create", "web", "two"]);
    let ran = program.with_fault("sim.revert.after=kill").run(&["revert", "web", "one"]);
    assert_eq!(ran.code, None, "{ran:?}");
    let open = program.json(0, &["op", "list", "--open"]);
    let operation = open["operations"][0]["operation"].as_str().expect("an open operation");
    let answer = program.json(4, &["op", "cancel", operation]);
    assert_eq!(answer["outcome"], "succeeded", "{answer}");
    assert_eq!(program.json(0, &["list", "web"])["current"], "one");
}

#[test]
fn a_stuck_operation_blocks_its_domain_alone_until_someone_settles_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = lab(folder.path());
    program.json(0, &["domain", "add", "other", "--driver", "sim"]);
    let operation = cut(&program, "two", "sim.create.before");
    // The hypervisor forgets the machine: nobody can tell what became of the step.
    let id = program.json(0, &["domain", "show", "web"])["id"].as_str().expect("an id").to_owned();
    let machine = folder.path().join("sim").join(format!("{id}.json"));
    std::fs::rename(&machine, folder.path().join("kept")).expect("the machine's file");

    let recovered = program.json(5, &["recover"]);
    assert_eq!(recovered["operations"][0]["outcome"], "needs-attention", "{recovered}");
    assert_eq!(outcome(&program, &operation), "needs-attention");
    let refused = program.json(4, &["create", "web", "three"]);
    assert_eq!(refused["error"]["code"], "needs-attention", "{refused}");
    program.json(0, &["hold", "web", "one", "--reason", "kept while somebody looks"]);
    program.json(0, &["create", "other", "free"]);

    // It is found again, and the step may be tried again.
    std::fs::rename(folder.path().join("kept"), &machine).expect("the machine's file");
    program.json(0, &["op", "retry", &operation]);
    assert_eq!(outcome(&program, &operation), "succeeded");
    assert_eq!(program.json(0, &["list", "web"])["current"], "two");
}

#[test]
fn a_stuck_operation_can_be_abandoned_with_a_reason_that_the_log_keeps() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = lab(folder.path());
    let operation = cut(&program, "two", "sim.create.before");
    let id = program.json(0, &["domain", "show", "web"])["id"].as_str().expect("an id").to_owned();
    let machine = folder.path().join("sim").join(format!("{id}.json"));
    std::fs::rename(&machine, folder.path().join("kept")).expect("the machine's file");
    program.json(5, &["recover"]);
    std::fs::rename(folder.path().join("kept"), &machine).expect("the machine's file");

    let refused = program.run(&["op", "resolve", &operation, "--abandon", "--reason", " ", "--json"]);
    assert_eq!(refused.code, Some(4), "{refused:?}");
    let ended =
        program.run(&["op", "resolve", &operation, "--abandon", "--reason", "gone for good", "--json"]);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert_eq!(outcome(&program, &operation), "failed");
    let log = program.run(&["log", "--operation", &operation, "--kind", "Operation.Resolved", "--json"]);
    assert!(log.stdout.contains("gone for good"), "{log:?}");
    program.json(0, &["create", "web", "three"]);
    assert_eq!(program.json(0, &["list", "web"])["current"], "three");
}

#[test]
fn a_key_makes_a_request_once_however_often_it_is_given() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = lab(folder.path());
    let first = program.json(0, &["create", "web", "--key", "2026-11-23"]);
    let again = program.json(0, &["create", "web", "--key", "2026-11-23"]);
    assert_eq!(first["operation"], again["operation"]);
    assert_eq!(program.json(0, &["list", "web"])["snapshots"].as_array().expect("snapshots").len(), 2);
    let other = program.json(4, &["create", "web", "other", "--key", "2026-11-23"]);
    assert_eq!(other["error"]["code"], "exists", "{other}");
}

#[test]
fn drift_is_found_written_down_once_and_cleared_when_it_is_gone() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = lab(folder.path());
    assert_eq!(program.json(0, &["drift"])["domains"][0]["findings"], serde_json::json!([]));
    let id = program.json(0, &["domain", "show", "web"])["id"].as_str().expect("an id").to_owned();
    let machine = folder.path().join("sim").join(format!("{id}.json"));
    let older = std::fs::read(&machine).expect("the machine's file");
    program.json(0, &["create", "web", "two"]);
    let newer = std::fs::read(&machine).expect("the machine's file");

    // The hypervisor is put back to an older state behind our back.
    std::fs::write(&machine, older).expect("written");
    for _ in 0..2 {
        let found = program.json(5, &["drift", "web"]);
        let findings = found["domains"][0]["findings"].as_array().expect("findings");
        let words: Vec<&str> = findings.iter().filter_map(|finding| finding["finding"].as_str()).collect();
        assert_eq!(words, ["snapshot-lost"], "{found}");
        assert_eq!(program.json(0, &["list", "web"])["current"], "one", "the pointer followed");
    }
    assert_eq!(program.json(0, &["show", "web", "two"])["phase"], "lost");
    assert_eq!(program.json(4, &["revert", "web", "two"])["error"]["code"], "drift");
    std::fs::write(&machine, newer).expect("written");
    program.json(0, &["drift", "web"]);
    assert_eq!(program.json(0, &["show", "web", "two"])["phase"], "ready");
    let kinds = program.run(&["log", "web", "--kind", "Drift.", "--json"]).stdout;
    assert_eq!(kinds.lines().count(), 2, "found once, cleared once: {kinds}");
    assert_eq!(program.json(0, &["list", "web"])["current"], "two");
}

/// A clock that stands until it is set.
struct Standing(Mutex<Timestamp>);

#[async_trait]
impl Clock for Standing {
    fn now(&self) -> Timestamp {
        *self.0.lock().expect("no test panics with it")
    }

    async fn sleep_until(&self, until: Timestamp) {
        *self.0.lock().expect("no test panics with it") = until;
    }
}

#[tokio::test]
async fn a_request_that_could_not_begin_in_time_expires_with_nothing_touched() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = Store::open_writer(folder.path(), LockWait { timeout: Duration::ZERO }).expect("a state");
    let clock = Arc::new(Standing(Mutex::new(Timestamp::now())));
    let driver: Arc<dyn Driver> = Arc::new(SimDriver::new(folder.path().to_owned()));
    let engine = Engine::new(Arc::new(store)).with_driver(DriverKind::Sim, driver).with_clock(clock.clone());
    let origin = Origin { uid: 0, host: "h".to_owned(), pid: 1, via: "test".to_owned(), sudo_user: None };
    let requester = Requester { actor: Actor::User("ada".to_owned()), origin };
    let registration = Registration {
        id: DomainId::from_uuid(uuid::Uuid::now_v7()),
        name: DomainName::new("web").expect("a name"),
        driver: DriverKind::Sim,
        disks: vec![],
        options: Value::Null,
        taken: Default::default(),
    };
    let (domain, _) =
        engine.register(&requester, registration, Default::default()).await.expect("registered");

    for (wait, expected) in [
        (SignedDuration::from_mins(59), Outcome::Succeeded),
        (SignedDuration::from_mins(61), Outcome::Expired),
    ] {
        let command = Command::Create(Create::default());
        let submitted = engine.submit(&requester, domain.id, &command, None).await.expect("accepted");
        let Submitted::Operation(operation) = submitted else { panic!("{submitted:?}") };
        let later = clock.now().checked_add(wait).expect("a time");
        clock.sleep_until(later).await;
        let driven = engine.drive(&requester, domain.id, &NoWatch).await.expect("driven");
        let carried = driven.carried.iter().find(|carried| carried.operation.id == operation);
        assert_eq!(carried.expect("carried").outcome, Some(expected), "after {wait:?}");
        assert_eq!(driven.state.tree.len(), 1);
        assert_eq!(engine.observe(&driven.state).await.expect("observed").snapshots.len(), 1);
    }
}
