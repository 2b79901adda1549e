//! Snapshots on ESXi and vCenter, through the program, on a vSphere simulator; what is there is read back with
//! VMware's own client.
#![cfg(feature = "lab")]
#![allow(clippy::expect_used, reason = "a test")]

#[path = "esx/model.rs"]
mod model;

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;
use snaptree_tests::daemon::Daemon;
use snaptree_tests::program::Program;
use snaptree_tests::vsphere::{Model, Simulator};

use model::{agree, random_operations};

/// Calls and pauses that do not make the tests wait.
const SETTINGS: &str = "[esx]\ncall-timeout = \"3s\"\n[retry]\ndelay-min = \"10ms\"\ndelay-max = \"200ms\"\n";
/// Longer than a call may take.
const TOO_LONG_MS: u32 = 5_000;

fn program(folder: &Path) -> Program {
    Program::new(folder.join("state")).with_settings(&folder.join("settings"), SETTINGS)
}

/// A host `lab`, with its first machine as the domain `vm`.
fn one_machine(folder: &Path, model: Model, task_ms: u32) -> (Program, Simulator) {
    let simulator = Simulator::start(folder, model, 1, task_ms);
    let program = program(folder);
    simulator.add_to(&program, folder);
    program.json(0, &["domain", "add", "vm", "--host", "lab", "--vm", &simulator.machines[0]]);
    (program, simulator)
}

#[test]
fn random_operations_on_an_esxi_leave_what_the_model_says() {
    random_operations(Model::Esx, 11);
}

#[test]
fn random_operations_on_a_vcenter_leave_what_the_model_says() {
    random_operations(Model::Vcenter, 12);
}

/// Ways in which a call or its task goes wrong. `{m}` is the method that asks for the task.
const FAULTS: [(&str, &str); 15] = [
    ("drop before", "inject?method={m}&action=drop-before"),
    ("drop after", "inject?method={m}&action=drop-after"),
    ("truncate", "inject?method={m}&action=truncate"),
    ("delay past the timeout", "inject?method={m}&action=delay&ms={long}"),
    ("a reply past the timeout", "inject?method={m}&action=delay-after&ms={long}"),
    ("HTTP 503", "inject?method={m}&action=http&status=503"),
    ("a general error", "inject?method={m}&action=fault&fault=SystemError"),
    ("a session that expired", "expire"),
    ("a session that expires with the call", "inject?method={m}&action=fault&fault=NotAuthenticated"),
    ("another task", "inject?method={m}&action=fault&fault=TaskInProgress&count=2"),
    ("a task's fault for good", "inject?method={m}&action=task-fault&fault=GenericVmConfigFault"),
    ("a task's fault that passes", "inject?method={m}&action=task-fault&fault=HostCommunication"),
    ("a fault after the effect", "inject?method={m}&action=task-fault-late&fault=GenericVmConfigFault"),
    ("a passing fault after the effect", "inject?method={m}&action=task-fault-late&fault=SystemError"),
    ("lost polls", "inject?method=RetrievePropertiesEx&action=drop-before&skip=3&count=2"),
];

/// What is asked of the host, and by which method.
const ASKS: [(&str, &[&str], &str); 3] = [
    ("create", &["create", "vm", "new", "--disk-only"], "CreateSnapshotEx_Task"),
    ("revert", &["revert", "vm", "base"], "RevertToSnapshot_Task"),
    ("delete", &["delete", "vm", "top"], "RemoveSnapshot_Task"),
];

/// Snapshots `base` and `top` and nothing else.
fn prepare(program: &Program, simulator: &Simulator) {
    simulator.lab("reset");
    let list = program.json(0, &["list", "vm"]);
    for snapshot in list["snapshots"].as_array().expect("a list") {
        program.json(0, &["delete", "vm", snapshot["name"].as_str().expect("a name")]);
    }
    program.json(0, &["create", "vm", "base", "--disk-only"]);
    program.json(0, &["create", "vm", "top", "--disk-only"]);
}

/// One outcome, at most one snapshot of that name, nothing open, and the host agrees with the log.
fn came_to_one_end(program: &Program, simulator: &Simulator, kind: &str, what: &str) -> String {
    let operations = program.json(0, &["op", "list"]);
    // Ids grow with time.
    let of_kind = operations["operations"].as_array().expect("a list").iter().filter(|op| op["kind"] == kind);
    let last = of_kind.max_by_key(|op| op["operation"].as_str().map(str::to_owned));
    let last = last.unwrap_or_else(|| panic!("{what}: no {kind} in {operations}"));
    let outcome = last["outcome"].as_str().unwrap_or_else(|| panic!("{what}: it is open: {last}"));
    assert!(["succeeded", "failed"].contains(&outcome), "{what}: {last}");
    agree(program, simulator, "vm", what);
    let list = program.json(0, &["list", "vm"]);
    let has = |name: &str| list["snapshots"].as_array().expect("a list").iter().any(|s| s["name"] == name);
    match (kind, outcome) {
        ("create", done) => assert_eq!(has("new"), done == "succeeded", "{what}: {list}"),
        ("delete", done) => assert_eq!(has("top"), done != "succeeded", "{what}: {list}"),
        (_, "succeeded") => assert_eq!(list["current"], "base", "{what}: {list}"),
        _ => {}
    }
    outcome.to_owned()
}

#[test]
fn every_fault_comes_to_one_outcome_and_at_most_one_snapshot() {
    let folder = tempfile::tempdir().expect("a folder");
    let (program, simulator) = one_machine(folder.path(), Model::Vcenter, 40);
    for (fault, lever) in FAULTS {
        for (kind, ask, method) in ASKS {
            let what = format!("{kind}, {fault}");
            prepare(&program, &simulator);
            simulator.lab(&lever.replace("{m}", method).replace("{long}", &TOO_LONG_MS.to_string()));
            let ran = program.run(&[ask, &["--json"]].concat());
            assert!(matches!(ran.code, Some(0 | 1)), "{what}: {ran:?}");
            let outcome = came_to_one_end(&program, &simulator, kind, &what);
            // Only what the host refuses for good fails. A delete whose effect is there has been done.
            let refused =
                fault.contains("for good") || (fault == "a fault after the effect" && kind == "create");
            assert_eq!(outcome == "failed", refused, "{what}: {ran:?}");
        }
    }
}

#[test]
fn a_host_that_is_killed_in_the_middle_of_a_task_is_asked_again_when_it_is_back() {
    let folder = tempfile::tempdir().expect("a folder");
    let (program, mut simulator) = one_machine(folder.path(), Model::Esx, 400);
    for (when, ms) in [("in the middle of the task", 0), ("after the task", 700)] {
        for (kind, ask, method) in ASKS {
            let what = format!("{kind}, killed {when}");
            prepare(&program, &simulator);
            simulator.lab(&format!("inject?method={method}&action=exit-after&ms={ms}"));
            let child = program
                .command(&[ask, &["--json"]].concat())
                .stdout(Stdio::piped())
                .spawn()
                .expect("it starts");
            simulator.ends_and_returns();
            let output = child.wait_with_output().expect("it ends");
            assert!(output.status.success(), "{what}: {output:?}");
            assert_eq!(came_to_one_end(&program, &simulator, kind, &what), "succeeded", "{what}");
        }
    }
}

#[test]
fn a_task_that_outlives_the_program_is_found_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let (program, simulator) = one_machine(folder.path(), Model::Esx, 100);
    for (kind, ask, method) in ASKS {
        prepare(&program, &simulator);
        simulator.lab(&format!("inject?method={method}&action=task-hang"));
        let place = format!("esx.{}.asked=kill", if kind == "delete" { "remove" } else { kind });
        let ran = program.with_fault(&place).run(ask);
        assert_eq!(ran.code, None, "{kind}: it was not killed: {ran:?}");
        let recovery = program.command(&["recover", "--json"]).spawn().expect("it starts");
        // It must wait for the task; whether it does shows in that there is no second one.
        let before = simulator.lab("calls")["count"][method].clone();
        simulator.lab("release");
        let recovered = recovery.wait_with_output().expect("it ends");
        assert!(recovered.status.success(), "{kind}: {recovered:?}");
        assert_eq!(simulator.lab("calls")["count"][method], before, "{kind}: it was asked for twice");
        assert_eq!(came_to_one_end(&program, &simulator, kind, kind), "succeeded");
    }
}

#[test]
fn what_somebody_does_by_hand_is_taken_over_and_a_backups_helper_is_left_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let (program, simulator) = one_machine(folder.path(), Model::Vcenter, 20);
    let machine = simulator.machines[0].as_str();
    program.json(0, &["create", "vm", "ours", "--disk-only"]);
    simulator.by_hand(&["take", machine, "by hand"]);
    simulator.by_hand(&["take", machine, "VEEAM BACKUP TEMPORARY SNAPSHOT"]);
    let drift = program.json(5, &["drift", "vm"]);
    let found = &drift["domains"][0];
    assert_eq!(found["adopted"], serde_json::json!(["by hand"]), "{drift}");
    assert_eq!(found["findings"][0]["finding"], "helper-found", "{drift}");
    // One upon a helper stands upon what the helper stands upon; and it stays when ours go.
    program.json(0, &["create", "vm", "on top", "--disk-only"]);
    let list = program.json(0, &["list", "vm"]);
    let top = list["snapshots"].as_array().expect("a list").iter().find(|s| s["name"] == "on top").cloned();
    assert_eq!(top.expect("it is there")["parent"], "by hand", "{list}");
    program.json(0, &["delete", "vm", "ours", "--children", "--yes"]);
    let seen = simulator.seen();
    let names: Vec<&Value> =
        seen[machine]["snapshots"].as_array().expect("a list").iter().map(|s| &s["name"]).collect();
    assert_eq!(names, ["VEEAM BACKUP TEMPORARY SNAPSHOT"], "{seen}");
}

#[test]
fn disks_that_a_removal_leaves_behind_are_consolidated() {
    let folder = tempfile::tempdir().expect("a folder");
    let (program, simulator) = one_machine(folder.path(), Model::Esx, 20);
    program.json(0, &["create", "vm", "a", "--disk-only"]);
    simulator.lab("inject?method=RemoveSnapshot_Task&action=leave-disks");
    program.json(0, &["delete", "vm", "a"]);
    assert_eq!(simulator.lab("calls")["count"]["ConsolidateVMDisks_Task"], 1);
    assert_eq!(simulator.seen()[&simulator.machines[0]]["consolidate"], false);
}

#[test]
fn a_licence_that_forbids_changes_is_explained_in_vspheres_own_words() {
    let folder = tempfile::tempdir().expect("a folder");
    let (program, simulator) = one_machine(folder.path(), Model::Esx, 20);
    simulator.lab(
        "inject?method=CreateSnapshotEx_Task&action=fault&fault=RestrictedVersion&message=Current%20license%20prohibits",
    );
    let error = program.json(1, &["create", "vm", "a"])["error"].clone();
    assert_eq!(error["code"], "unsupported", "{error}");
    assert!(error["message"].as_str().expect("text").contains("Current license prohibits"), "{error}");
    assert!(error["hint"].as_str().expect("text").contains("licence"), "{error}");
}

#[test]
fn many_machines_are_registered_in_one_command_also_through_the_daemon() {
    let folder = tempfile::tempdir().expect("a folder");
    let simulator = Simulator::start(folder.path(), Model::Vcenter, 20, 0);
    let program = program(folder.path());
    simulator.add_to(&program, folder.path());
    let daemon = Daemon::start(&program);
    let discover = ["host", "discover", "lab", "--match", "DC0_H0_*", "--label", "tier=prod", "--add"];
    let first = program.json(0, &discover);
    assert_eq!(first["added"].as_array().expect("a list").len(), 20, "{first}");
    assert_eq!(program.json(0, &discover)["added"], serde_json::json!([]));
    let shown = program.json(0, &["host", "show", "lab"]);
    assert_eq!(shown["domains"].as_array().expect("a list").len(), 20, "{shown}");
    program.json(0, &["create", "DC0_H0_VM7", "a"]);
    daemon.end();
    agree(&program, &simulator, "DC0_H0_VM7", "through the daemon");
    let by_path = ["domain", "add", "other", "--host", "lab", "--vm", "DC0/vm/DC0_C0_RP0_VM3"];
    assert_eq!(program.json(0, &by_path)["config"]["name"], "DC0_C0_RP0_VM3");
    let again = ["domain", "add", "again", "--host", "lab", "--vm", "DC0_C0_RP0_VM3"];
    assert_eq!(program.json(4, &again)["error"]["code"], "exists");
    assert_eq!(program.json(4, &["host", "remove", "lab"])["error"]["code"], "in-use");
}

/// The figures are printed: round trips, and the time of a `drift` of all.
#[test]
fn many_machines_of_one_host_are_observed_in_few_round_trips() {
    let number = std::env::var("SNAPTREE_MACHINES").ok().and_then(|text| text.parse().ok()).unwrap_or(100);
    let folder = tempfile::tempdir().expect("a folder");
    let simulator = Simulator::start(folder.path(), Model::Esx, number, 0);
    let program = program(folder.path()).with_settings(&folder.path().join("settings"), "");
    simulator.add_to(&program, folder.path());
    let added = program.json(0, &["host", "discover", "lab", "--add"]);
    assert_eq!(added["added"].as_array().expect("a list").len(), number, "{added}");
    simulator.lab("reset");
    let begun = std::time::Instant::now();
    let drift = program.json(0, &["drift"]);
    let took = begun.elapsed();
    assert_eq!(drift["domains"].as_array().expect("a list").len(), number);
    let calls = simulator.lab("calls")["count"].as_object().expect("counts").clone();
    let count: u64 = calls.values().filter_map(Value::as_u64).sum();
    println!("{number} machines observed in {} ms, {count} round trips: {calls:?}", took.as_millis());
    // Pages of 100, each with the tasks of its machines, and what a session takes.
    assert!(count <= u64::try_from(number / 50 + 8).expect("a number"), "{calls:?}");
}

#[test]
fn a_host_is_believed_for_a_reason_or_not_at_all() {
    let folder = tempfile::tempdir().expect("a folder");
    let simulator = Simulator::start(folder.path(), Model::Esx, 1, 0);
    let program = program(folder.path());
    let file = folder.path().join("password");
    std::fs::write(&file, snaptree_tests::vsphere::PASSWORD).expect("a file");
    let add = |url: &str, more: &[&str], code: i32| {
        let file = file.to_str().expect("a path");
        let base = ["host", "add", "h", "--url", url, "--user", "root", "--password-file", file];
        program.json(code, &[&base[..], more].concat())
    };
    let unknown = add(&simulator.url, &[], 1);
    let told = unknown["error"]["hint"].as_str().expect("a hint").replace(':', "");
    assert!(told.contains(&simulator.thumbprint), "{unknown}");
    add(&simulator.url, &["--thumbprint", &"00".repeat(32)], 1);
    assert_eq!(add("http://10.1.2.3/sdk", &[], 4)["error"]["code"], "invalid");
    assert_eq!(
        add(&simulator.url, &["--thumbprint", &simulator.thumbprint, "--user", "x"], 2)["error"]["code"],
        "usage"
    );
    let wrong = folder.path().join("wrong");
    std::fs::write(&wrong, "not it").expect("a file");
    let base = [
        "host",
        "add",
        "h",
        "--url",
        &simulator.url,
        "--user",
        "root",
        "--thumbprint",
        &simulator.thumbprint,
    ];
    let refused =
        program.json(1, &[&base[..], &["--password-file", wrong.to_str().expect("a path")]].concat());
    assert_eq!(refused["error"]["code"], "permission", "{refused}");
    // The host's own certificate vouches for it.
    let port = simulator.url.trim_start_matches("https://").trim_end_matches("/sdk");
    let show = format!("openssl s_client -connect {port} -showcerts </dev/null 2>/dev/null | openssl x509");
    let pem = Command::new("sh").args(["-c", &show]).output().expect("openssl runs").stdout;
    let ca = folder.path().join("ca.pem");
    std::fs::write(&ca, pem).expect("a file");
    add(&simulator.url, &["--ca", ca.to_str().expect("a path")], 0);
    assert!(program.json(0, &["host", "list"])["hosts"][0]["trust"]["ca"].is_string());
}

#[test]
fn the_password_appears_nowhere() {
    const SECRET: &str = "zeta-Omicron-77-<&>-secret";
    let folder = tempfile::tempdir().expect("a folder");
    let simulator = Simulator::start_with(folder.path(), Model::Esx, 1, 30, SECRET);
    let program = program(folder.path());
    simulator.add_to(&program, folder.path());
    let machine = simulator.machines[0].clone();
    let mut said = String::new();
    let mut say = |args: &[&str]| {
        let ran = program.run(&[&["-vvv"], args].concat());
        said.push_str(&ran.stdout);
        said.push_str(&ran.stderr);
    };
    say(&["domain", "add", "vm", "--host", "lab", "--vm", &machine]);
    say(&["create", "vm", "a"]);
    say(&["host", "show", "lab", "--json"]);
    // Also what goes wrong, and where a host repeats what it was sent.
    let echo = format!(
        "inject?method=Login&action=fault&fault=InvalidLogin&message={}",
        "zeta-Omicron-77-%3C%26%3E-secret"
    );
    simulator.lab(&echo);
    say(&["create", "vm", "b"]);
    for action in ["truncate", "drop-after", "http"] {
        simulator.lab(&format!("inject?method=Login&action={action}"));
        say(&["create", "vm", "c", "--json"]);
    }
    say(&["log"]);
    assert!(said.contains("Login"), "the traces tell of the login, so that this can fail");
    // While it works.
    simulator.lab("inject?method=RemoveSnapshot_Task&action=task-hang");
    let mut child = program.command(&["delete", "vm", "a"]).stderr(Stdio::null()).spawn().expect("it starts");
    while simulator.lab("calls")["count"]["RemoveSnapshot_Task"] != 1 {
        std::thread::yield_now();
    }
    let cmdline = std::fs::read(format!("/proc/{}/cmdline", child.id())).expect("its arguments");
    let environment = std::fs::read(format!("/proc/{}/environ", child.id())).expect("its environment");
    simulator.lab("release");
    child.wait().expect("it ends");
    let holds =
        |bytes: &[u8], secret: &str| bytes.windows(secret.len()).any(|part| part == secret.as_bytes());
    let escaped = "zeta-Omicron-77-&lt;&amp;&gt;-secret";
    for secret in [SECRET, escaped, "zeta-Omicron"] {
        assert!(!said.contains(secret), "it is in what the program says");
        assert!(!holds(&cmdline, secret) && !holds(&environment, secret), "it is in the process list");
        let mut folders = vec![program.state.clone()];
        let mut files = 0;
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).expect("a folder") {
                let path = entry.expect("an entry").path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.is_file() {
                    files += 1;
                    assert!(
                        !holds(&std::fs::read(&path).expect("a file"), secret),
                        "it is in {}",
                        path.display()
                    );
                }
            }
        }
        assert!(files > 0, "the database is there");
    }
}
