//! What is told of policies: how much they keep, what they deleted, and whom they are for.

use serde_json::Value;
use snaptree_tests::program::Program;

fn scene(folder: &tempfile::TempDir, domain: &[&str], policy: &str) -> (Program, Value) {
    let program = Program::new(folder.path().join("s"));
    let add = [&["domain", "add"], domain, &["--driver", "sim"]].concat();
    program.json(0, &add);
    let set = set(folder, &program, policy);
    (program, set)
}

fn set(folder: &tempfile::TempDir, program: &Program, policy: &str) -> Value {
    let file = folder.path().join("p.toml");
    std::fs::write(&file, format!("name = \"p\"\nschedule = \"hourly\"\n{policy}\n")).expect("written");
    program.json(0, &["policy", "set", file.to_str().expect("UTF-8"), "--yes"])
}

fn notes(told: &Value) -> String {
    told["notes"].to_string()
}

#[test]
fn a5_a_policy_that_keeps_more_than_the_host_takes_is_told_and_kept_within_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let policy = "domains = [\"web\"]\n[keep]\nlast = 40";
    let (program, set) = scene(&folder, &["web", "--profile", "esx"], policy);
    assert!(notes(&set["plan"]).contains("takes 32 snapshots in a row"), "{set}");
    let mut last = Value::Null;
    for _ in 0..34 {
        last = program.json(0, &["policy", "run", "p"]);
    }
    let reasons = last["runs"][0]["deletes"][0]["reasons"].to_string();
    assert!(reasons.contains("the hypervisor has room for 31"), "{last}");
    let there = program.json(0, &["list", "web"]);
    assert_eq!(there["snapshots"].as_array().map(Vec::len), Some(31), "room is left for the next one");
    assert_eq!(program.json(0, &["policy", "list"])["policies"][0]["suspended"], Value::Null);
}

#[test]
fn a5_a_policy_that_is_for_no_domain_says_so() {
    let folder = tempfile::tempdir().expect("a folder");
    let (program, set) = scene(&folder, &["web"], "domains = [\"wbe-*\"]\n[keep]\nlast = 2");
    assert!(notes(&set["plan"]).contains("for no registered domain"), "{set}");
    for args in [["policy", "plan", "p"], ["policy", "runs", "p"]] {
        let told = program.json(0, &args);
        assert!(notes(&told).contains("for no registered domain"), "{told}");
    }
}

#[test]
fn a5_a_rename_out_of_a_policys_glob_is_told() {
    let folder = tempfile::tempdir().expect("a folder");
    let (program, _) = scene(&folder, &["web-1"], "domains = [\"web-*\"]\n[keep]\nlast = 2");
    program.json(0, &["policy", "run", "p"]);
    program.json(0, &["domain", "set", "web-1", "--name", "shop"]);
    let told = program.json(0, &["policy", "runs", "p"]);
    assert!(notes(&told).contains("for no registered domain"), "{told}");
}

#[test]
fn a5_a_policy_that_was_removed_and_set_again_deletes_what_it_had_taken_before() {
    let folder = tempfile::tempdir().expect("a folder");
    let policy = "domains = [\"web\"]\n[keep]\nlast = 2";
    let (program, _) = scene(&folder, &["web"], policy);
    for _ in 0..2 {
        program.json(0, &["policy", "run", "p"]);
    }
    program.json(0, &["policy", "remove", "p", "--yes"]);
    set(&folder, &program, policy);
    let ran = program.json(0, &["policy", "run", "p"]);
    assert_eq!(ran["runs"][0]["deletes"].as_array().map(Vec::len), Some(1), "{ran}");
}
