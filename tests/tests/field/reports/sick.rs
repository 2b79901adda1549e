//! One domain that cannot be looked at, among others that can.

use std::fs;

use serde_json::{Value, json};
use snaptree_tests::daemon::Daemon;
use snaptree_tests::program::Program;

/// Three simulated machines `a`, `b`, `c` with a snapshot each.
fn three() -> (tempfile::TempDir, Program) {
    let folder = tempfile::tempdir().expect("a folder");
    let program = Program::new(folder.path());
    for name in ["a", "b", "c"] {
        program.json(0, &["domain", "add", name, "--driver", "sim", "--label", "kind=toy"]);
        program.json(0, &["create", name, "one"]);
    }
    (folder, program)
}

fn id(program: &Program, name: &str) -> String {
    program.json(0, &["domain", "show", name])["id"].as_str().expect("an id").to_owned()
}

/// Damages what the simulated hypervisor keeps of a machine.
fn damage(program: &Program, name: &str) {
    let file = program.state.join("sim").join(format!("{}.json", id(program, name)));
    fs::write(file, "{broken").expect("written");
}

/// Makes a domain's second event one that cannot be read.
fn forge(program: &Program, name: &str) {
    let stream = format!("domain/{}", id(program, name));
    let store = rusqlite::Connection::open(program.state.join("snaptree.db")).expect("a log");
    let forged = store.execute_batch("DROP TRIGGER events_no_update").and_then(|()| {
        store.execute("UPDATE events SET data = '{' WHERE stream = ?1 AND version = 2", [&stream])
    });
    assert_eq!(forged, Ok(1));
    store.execute_batch("DELETE FROM checkpoints").expect("emptied");
}

fn names(document: &Value) -> Vec<&str> {
    document
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|one| one.get("domain").or(one.get("name"))?.as_str())
        .collect()
}

#[test]
fn a2_a_damaged_machine_is_told_of_by_drift_beside_the_others() {
    let (_folder, program) = three();
    damage(&program, "b");
    let drift = program.json(1, &["drift"]);
    assert_eq!(names(&drift["domains"]), ["a", "c"], "{drift}");
    assert_eq!(names(&drift["left_out"]), ["b"]);
    assert_eq!(drift["left_out"][0]["error"]["code"], "bad-image");
    let told = program.run(&["drift"]);
    assert!(told.stdout.contains("a: the hypervisor and the log agree"), "{told:?}");
    assert!(told.stdout.contains("b: could not be looked at") && told.stdout.contains("hint: "), "{told:?}");
    // The one that is asked about alone is the answer.
    assert_eq!(program.json(1, &["drift", "b"])["error"]["code"], "bad-image");

    // A daemon tells the same.
    let daemon = Daemon::start(&program);
    let by_daemon = program.json(1, &["drift"]);
    assert_eq!(by_daemon["left_out"], drift["left_out"]);
    assert_eq!(names(&by_daemon["domains"]), ["a", "c"]);
    daemon.end();
}

#[test]
fn a2_what_was_cut_short_is_recovered_beside_a_domain_whose_log_cannot_be_read() {
    let (_folder, program) = three();
    for name in ["b", "c"] {
        let cut = program.with_fault("sim.create.before=kill").run(&["create", name, "two"]);
        assert_eq!(cut.code, None, "{cut:?}");
    }
    forge(&program, "b");
    let recovered = program.json(5, &["recover"]);
    assert_eq!(recovered["operations"][0]["domain"], "c", "{recovered}");
    assert_eq!(recovered["operations"][0]["outcome"], "succeeded");
    assert_eq!(names(&recovered["left_out"]), ["b"]);
    assert_eq!(recovered["left_out"][0]["error"]["code"], "damaged");
}

#[test]
fn a2_a_daemon_recovers_the_others_too() {
    let (_folder, program) = three();
    for name in ["b", "c"] {
        let cut = program.with_fault("sim.create.before=kill").run(&["create", name, "two"]);
        assert_eq!(cut.code, None, "{cut:?}");
    }
    forge(&program, "b");
    let daemon = Daemon::start(&program);
    let recovered = program.json(5, &["recover"]);
    assert_eq!(names(&recovered["left_out"]), ["b"], "{recovered}");
    assert_eq!(program.json(0, &["list", "c"])["current"], "two");
    daemon.end();
}

#[test]
fn a_domain_whose_log_cannot_be_read_hides_no_other_in_lists_reconciliation_and_policies() {
    let (folder, program) = three();
    forge(&program, "b");
    let list = program.json(1, &["domain", "list"]);
    assert_eq!((names(&list["domains"]), names(&list["left_out"])), (vec!["a", "c"], vec!["b"]));
    let reconciled = program.json(1, &["reconcile"]);
    assert_eq!((names(&reconciled["domains"]), names(&reconciled["left_out"])), (vec!["a", "c"], vec!["b"]));

    let policy = folder.path().join("p.toml");
    fs::write(&policy, "name = \"p\"\ndomains = [\"*\"]\nschedule = \"daily\"\n[keep]\nlast = 1\n")
        .expect("written");
    let policy = policy.to_str().expect("a path");
    let set = program.json(0, &["policy", "set", policy]);
    assert_eq!(names(&set["plan"]["left_out"]), ["b"], "{set}");
    let run = program.json(4, &["policy", "run", "p"]);
    let outcomes: Vec<_> = run["runs"].as_array().expect("runs").iter().map(|ran| &ran["outcome"]).collect();
    assert_eq!(outcomes, [&json!("succeeded"), &json!("refused"), &json!("succeeded")], "{run}");

    // Others can still be registered; the file of the one that cannot be read stays its own.
    program.json(0, &["domain", "add", "d", "--driver", "sim"]);
}
