//! What somebody else did at the hypervisor: taken over, or only told of, as the settings say.

#![allow(clippy::expect_used, reason = "a test")]

use std::path::Path;

use serde_json::{Value, json};
use snaptree_drivers::sim::{ByHand, SimDriver};
use snaptree_engine::engine::Engine;
use snaptree_engine::project::DomainState;
use snaptree_engine::{SnapshotId, SnapshotName};
use snaptree_store::Store;
use snaptree_tests::program::Program;

/// A registered machine with a snapshot `one`, and the hand that works at its hypervisor.
struct Lab {
    folder: tempfile::TempDir,
    program: Program,
    hand: SimDriver,
}

impl Lab {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let program = Program::new(folder.path());
        program.json(0, &["domain", "add", "web", "--driver", "sim"]);
        program.json(0, &["create", "web", "one"]);
        let hand = SimDriver::new(folder.path().to_owned());
        Self { folder, program, hand }
    }

    async fn state(&self) -> DomainState {
        let store = Store::open_reader(self.folder.path()).expect("a state");
        let engine = Engine::new(std::sync::Arc::new(store));
        let domain = engine.find_domain("web").await.expect("registered");
        engine.load(domain).await.expect("a sound log")
    }

    async fn by_hand(&self, act: ByHand) {
        self.hand.by_hand(&self.state().await, &act).expect("the hypervisor can be used");
    }

    async fn id(&self, name: &str) -> SnapshotId {
        let name = SnapshotName::new(name).expect("a name");
        self.state().await.tree.by_name(&name).expect("it is there").id
    }

    /// Per snapshot its name and its parent's, and the current one last.
    fn tree(&self) -> Value {
        let list = self.program.json(0, &["list", "web"]);
        let snapshots = list["snapshots"].as_array().expect("snapshots");
        let mut tree: Vec<Value> = snapshots.iter().map(|s| json!([s["name"], s["parent"]])).collect();
        tree.sort_by_key(Value::to_string);
        tree.push(list["current"].clone());
        Value::Array(tree)
    }

    fn kinds(&self, prefix: &str) -> Vec<String> {
        let log = self.program.run(&["log", "web", "--kind", prefix, "--json"]).stdout;
        let events = log.lines().map(|line| serde_json::from_str::<Value>(line).expect("an event"));
        events.map(|event| format!("{} by {}", event["kind"], event["actor"])).collect()
    }
}

fn report_only(folder: &Path, program: &Program, args: &[&str]) -> (Option<i32>, Value) {
    let settings = folder.join("settings/snaptree");
    std::fs::create_dir_all(&settings).expect("a folder");
    std::fs::write(settings.join("config.toml"), "[drift]\nforeign = \"report\"\n").expect("written");
    let output = program
        .command(&[args, &["--json"]].concat())
        .env("XDG_CONFIG_HOME", folder.join("settings"))
        .output()
        .expect("the program starts");
    (output.status.code(), serde_json::from_slice(&output.stdout).expect("JSON"))
}

#[tokio::test]
async fn a_snapshot_made_by_hand_is_adopted_with_its_place_in_the_tree_and_can_be_used() {
    let lab = Lab::new();
    // Between two of ours, under a name that is taken, and one that cannot be a name here.
    lab.by_hand(ByHand::Take("one".to_owned())).await;
    lab.by_hand(ByHand::Take("../etc/passwd".to_owned())).await;
    let drift = lab.program.json(0, &["drift", "web"]);
    assert_eq!(drift["domains"][0]["adopted"][0], "one (2)", "{drift}");
    // What stands for a name that cannot be one here has a tag of its own.
    let tagged = drift["domains"][0]["adopted"][1].as_str().expect("a name").to_owned();
    assert!(tagged.starts_with("_etc_passwd [") && tagged.ends_with(']'), "{drift}");
    let expected = json!([[tagged, "one (2)"], ["one (2)", "one"], ["one", null], tagged]);
    assert_eq!(lab.tree(), expected);
    assert_eq!(lab.program.json(0, &["drift", "web"])["domains"][0]["adopted"], json!([]));

    // The rest of the program treats them as its own.
    lab.program.json(0, &["create", "web", "two"]);
    lab.program.json(0, &["revert", "web", "one (2)"]);
    lab.program.json(0, &["delete", "web", "../etc/passwd"]);
    assert_eq!(lab.tree(), json!([["one (2)", "one"], ["one", null], ["two", "one (2)"], "one (2)"]));
    assert_eq!(lab.program.json(0, &["drift", "web"])["domains"][0]["findings"], json!([]));
    assert_eq!(lab.kinds("Snapshot.Adopted"), ["\"Snapshot.Adopted\" by \"engine\""; 2]);
    assert_eq!(lab.program.json(0, &["audit", "verify"])["ok"], true);
}

#[tokio::test]
async fn what_was_done_by_hand_is_taken_over_before_an_operation_is_planned_upon_it() {
    let lab = Lab::new();
    lab.program.json(0, &["create", "web", "two"]);
    lab.by_hand(ByHand::Take("by hand".to_owned())).await;
    lab.program.json(0, &["create", "web", "three"]);
    let expected = json!([["by hand", "two"], ["one", null], ["three", "by hand"], ["two", "one"], "three"]);
    assert_eq!(lab.tree(), expected);

    // A revert made there moves the pointer, and the next snapshot stands where the machine stood.
    lab.by_hand(ByHand::Revert(lab.id("by hand").await)).await;
    lab.program.json(0, &["create", "web", "four"]);
    assert_eq!(lab.program.json(0, &["show", "web", "four"])["parent"], "by hand");

    // One that was deleted there is lost, and stays so until it is forgotten.
    lab.by_hand(ByHand::Remove(lab.id("by hand").await)).await;
    let drift = lab.program.json(5, &["drift", "web"]);
    assert_eq!(drift["domains"][0]["findings"][0]["name"], "by hand", "{drift}");
    assert_eq!(lab.program.json(4, &["revert", "web", "by hand"])["error"]["code"], "drift");
    lab.program.json(0, &["delete", "web", "by hand", "--metadata"]);
    lab.program.json(0, &["drift", "web"]);
    let expected = json!([["four", "two"], ["one", null], ["three", "two"], ["two", "one"], "four"]);
    assert_eq!(lab.tree(), expected);
}

#[tokio::test]
async fn a_forgotten_snapshot_is_not_adopted_again() {
    let lab = Lab::new();
    lab.by_hand(ByHand::Take("by hand".to_owned())).await;
    lab.program.json(0, &["drift", "web"]);
    lab.program.json(0, &["delete", "web", "one", "by hand", "--metadata"]);
    for _ in 0..2 {
        lab.program.json(0, &["drift", "web"]);
        assert_eq!(lab.tree(), json!([null]));
    }
    lab.program.json(0, &["create", "web", "two"]);
    assert_eq!(lab.tree(), json!([["two", null], "two"]));
}

#[tokio::test]
async fn where_the_settings_say_so_it_is_only_reported() {
    let lab = Lab::new();
    lab.by_hand(ByHand::Take("by hand".to_owned())).await;
    for _ in 0..2 {
        let (code, drift) = report_only(lab.folder.path(), &lab.program, &["drift", "web"]);
        assert_eq!(code, Some(5), "{drift}");
        let findings = drift["domains"][0]["findings"].as_array().expect("findings");
        assert_eq!(findings.len(), 1, "the machine stands on what it calls 'by hand', upon 'one': {drift}");
        assert_eq!(findings[0]["finding"], "snapshot-found");
        assert_eq!(drift["domains"][0]["adopted"], json!([]));
    }
    assert_eq!(lab.tree(), json!([["one", null], "one"]));
    assert_eq!(lab.kinds("Drift.Found").len(), 1, "it is written down once");
}

#[tokio::test]
async fn a_new_name_given_by_hand_is_followed_and_one_given_here_reaches_the_hypervisor() {
    let lab = Lab::new();
    lab.by_hand(ByHand::Rename(lab.id("one").await, "first".to_owned())).await;
    assert_eq!(report_only(lab.folder.path(), &lab.program, &["drift", "web"]).0, Some(5));
    assert_eq!(lab.tree(), json!([["one", null], "one"]));
    lab.program.json(0, &["create", "web", "two"]);
    assert_eq!(lab.tree(), json!([["first", null], ["two", "first"], "two"]), "before it was planned");
    assert_eq!(lab.kinds("Snapshot.Edited"), ["\"Snapshot.Edited\" by \"engine\""]);

    let edited = ["edit", "web", "two", "--name", "second", "--description", "of two"];
    assert_eq!(lab.program.json(0, &edited)["name"], "second");
    let mut files = std::fs::read_dir(lab.folder.path().join("sim")).expect("machines");
    // Beside the machine lies the file that locks it.
    let of_machine =
        |path: &std::path::PathBuf| path.extension().is_some_and(|extension| extension == "json");
    let file = files.find_map(|file| Some(file.ok()?.path()).filter(of_machine)).expect("one");
    let machine = std::fs::read_to_string(file).expect("a machine");
    assert!(machine.contains("second") && machine.contains("of two"), "{machine}");
    assert_eq!(lab.program.json(0, &["drift", "web"])["domains"][0]["findings"], json!([]));
    assert_eq!(lab.kinds("Snapshot.EditRequested").len(), 1);
    // What only Snaptree keeps needs no hypervisor.
    lab.program.json(0, &["edit", "web", "second", "--label", "a=b"]);
    assert_eq!(lab.kinds("Snapshot.EditRequested").len(), 1);
}

#[tokio::test]
async fn what_cannot_be_merged_yet_is_deleted_at_once_and_merged_when_one_child_is_left() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = Program::new(folder.path());
    program.json(0, &["domain", "add", "box", "--driver", "sim", "--profile", "virtualbox"]);
    program.json(0, &["create", "box", "p"]);
    for child in ["a", "b", "c"] {
        program.json(0, &["revert", "box", "p", "--yes"]);
        program.json(0, &["create", "box", child]);
    }
    let deleted = program.json(0, &["delete", "box", "p"]);
    assert_eq!(deleted["merges"][0]["outcome"], "deferred", "{deleted}");
    let names = || {
        let list = program.json(0, &["list", "box"]);
        let all = list["snapshots"].as_array().expect("snapshots").iter();
        all.map(|s| format!("{}<{}", s["name"], s["parent"])).collect::<Vec<_>>()
    };
    assert_eq!(names(), [r#""a"<null"#, r#""b"<null"#, r#""c"<null"#]);
    assert_eq!(program.json(0, &["drift", "box"])["domains"][0]["findings"], json!([]));
    // Its name is free again, and it is merged with the delete that leaves it one child.
    program.json(0, &["create", "box", "p"]);
    let first = program.json(0, &["delete", "box", "a"]);
    assert_eq!(first["merges"], json!([]), "{first}");
    program.json(0, &["delete", "box", "b"]);
    let listed = program.json(0, &["op", "list"]);
    let merges = listed["operations"].as_array().expect("operations").iter();
    let merges: Vec<_> = merges.filter(|o| o["kind"] == "merge").map(|o| &o["outcome"]).collect();
    assert_eq!(merges, ["succeeded"], "{listed}");
    assert_eq!(names(), [r#""c"<null"#, r#""p"<"c""#]);
    assert_eq!(program.json(0, &["drift", "box"])["domains"][0]["findings"], json!([]));
    program.json(0, &["revert", "box", "c", "--yes"]);
}
