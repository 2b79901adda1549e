//! Names that somebody gave at the hypervisor: what they are here, and that they stay so.

use serde_json::{Value, json};
use snaptree_drivers::sim::{ByHand, SimDriver};
use snaptree_engine::engine::Engine;
use snaptree_engine::project::DomainState;
use snaptree_engine::{SnapshotId, SnapshotName};
use snaptree_store::Store;
use snaptree_tests::program::Program;
#[cfg(feature = "lab")]
use snaptree_tests::virtualbox::{Vbox, is_left_out};
#[cfg(feature = "lab")]
use snaptree_tests::vsphere::{Model, Simulator};

/// A simulated machine `web` without snapshots, and the hand that works at its hypervisor.
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
        let hand = SimDriver::new(folder.path().to_owned());
        Self { folder, program, hand }
    }

    async fn state(&self) -> DomainState {
        let store = Store::open_reader(self.folder.path()).expect("a state");
        let engine = Engine::new(std::sync::Arc::new(store));
        engine.load(engine.find_domain("web").await.expect("registered")).await.expect("a sound log")
    }

    async fn by_hand(&self, act: ByHand) {
        self.hand.by_hand(&self.state().await, &act).expect("the hypervisor can be used");
    }

    async fn take(&self, names: &[&str]) {
        for name in names {
            self.by_hand(ByHand::Take((*name).to_owned())).await;
        }
        self.program.run(&["drift", "web"]);
    }

    async fn id(&self, name: &str) -> SnapshotId {
        let name = SnapshotName::new(name).expect("a name");
        self.state().await.tree.by_name(&name).expect("it is there").id
    }

    fn names(&self) -> Vec<(String, String)> {
        names(&self.program, "web")
    }
}

/// The names of the snapshots here, with their names at the hypervisor, in the order of the latter.
fn names(program: &Program, domain: &str) -> Vec<(String, String)> {
    let list = program.json(0, &["list", domain]);
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let pair = |one: &Value| {
        let name = text(&one["name"]).expect("a name");
        (text(&one["real_name"]).unwrap_or_else(|| name.clone()), name)
    };
    let mut pairs: Vec<_> = list["snapshots"].as_array().expect("snapshots").iter().map(pair).collect();
    pairs.sort();
    pairs.into_iter().map(|(real, name)| (name, real)).collect()
}

/// What stands for `a/b`, which must be nothing that could be mistaken.
fn stands_for_a_b(names: &[(String, String)]) -> String {
    let (name, _) = names.iter().find(|(_, real)| real == "a/b").expect("it is listed");
    assert!(name.starts_with("a_b [") && name.ends_with(']'), "{names:?}");
    name.clone()
}

#[tokio::test]
async fn n2_a_name_that_cannot_be_one_here_takes_no_other_ones_and_is_accepted_as_it_is() {
    let lab = Lab::new();
    lab.take(&["a/b", "ab"]).await;
    let name = stands_for_a_b(&lab.names());
    assert_eq!(lab.names()[1], ("ab".to_owned(), "ab".to_owned()));
    // Each name means the snapshot that has it.
    lab.program.json(0, &["revert", "web", "ab", "--yes"]);
    assert_eq!(lab.program.json(0, &["list", "web"])["current"], "ab");
    lab.program.json(0, &["revert", "web", "a/b", "--yes"]);
    assert_eq!(lab.program.json(0, &["list", "web"])["current"], json!(name));
    let shown = lab.program.json(0, &["show", "web", "a/b"]);
    assert_eq!((&shown["name"], &shown["real_name"]), (&json!(name), &json!("a/b")));
    for view in ["list", "tree"] {
        assert!(lab.program.run(&[view, "web"]).stdout.contains("'a/b' at the hypervisor"));
    }
    lab.program.json(0, &["delete", "web", "a/b", "--yes"]);
    assert_eq!(lab.program.json(3, &["delete", "web", "a/b", "--yes"])["error"]["code"], "not-found");
    assert_eq!(lab.names(), [("ab".to_owned(), "ab".to_owned())]);
}

#[tokio::test]
async fn n3_a_name_once_told_stays_when_the_other_one_of_that_name_is_deleted() {
    let lab = Lab::new();
    lab.take(&["nightly", "nightly"]).await;
    let told =
        [("nightly".to_owned(), "nightly".to_owned()), ("nightly (2)".to_owned(), "nightly".to_owned())];
    assert_eq!(lab.names(), told);
    lab.program.json(0, &["delete", "web", "nightly", "--yes"]);
    lab.program.json(0, &["drift", "web"]);
    assert_eq!(lab.names(), told[1..]);
    let refused = lab.program.json(3, &["delete", "web", "nightly", "--yes"]);
    assert!(refused["error"]["hint"].as_str().expect("a hint").contains("'nightly (2)'"), "{refused}");
    // Also when the log is read from its beginning.
    rusqlite::Connection::open(lab.folder.path().join("snaptree.db"))
        .expect("a log")
        .execute_batch("DELETE FROM checkpoints")
        .expect("emptied");
    lab.program.json(0, &["drift", "web"]);
    assert_eq!(lab.names(), told[1..]);

    // A name that is changed by hand is followed all the same.
    let id = lab.id("nightly (2)").await;
    lab.by_hand(ByHand::Rename(id, "weekly".to_owned())).await;
    lab.program.json(0, &["drift", "web"]);
    assert_eq!(lab.names(), [("weekly".to_owned(), "weekly".to_owned())]);
}

#[tokio::test]
async fn n_what_is_really_called_as_another_one_is_told_is_not_taken_for_it() {
    let lab = Lab::new();
    lab.take(&["nightly", "nightly"]).await;
    lab.take(&["nightly (2)"]).await;
    let refused = lab.program.json(4, &["delete", "web", "nightly (2)", "--yes"]);
    assert_eq!(refused["error"]["code"], "invalid", "{refused}");
    assert_eq!(lab.names().len(), 3);
    // Its own name here is nobody else's.
    lab.program.json(0, &["delete", "web", "nightly (2) (2)", "--yes"]);
    lab.program.json(0, &["delete", "web", "nightly (2)", "--yes"]);
    assert_eq!(lab.names(), [("nightly".to_owned(), "nightly".to_owned())]);
    // A name of blanks, dots or slashes alone is one at a hypervisor.
    lab.take(&["../..", "///"]).await;
    lab.program.json(0, &["delete", "web", "///", "../..", "--yes"]);
    assert_eq!(lab.names().len(), 1);
}

#[cfg(feature = "lab")]
#[test]
fn n2_names_with_slashes_of_virtualbox_and_vsphere_are_told_and_accepted() {
    let folder = tempfile::tempdir().expect("a folder");
    let simulator = Simulator::start(folder.path(), Model::Esx, 1, 0);
    let program = Program::new(folder.path().join("state"));
    simulator.add_to(&program, folder.path());
    let vm = simulator.machines[0].clone();
    // vSphere's own clients name a snapshot by its time, with slashes.
    for name in ["VM Snapshot 11%2f28", "a%2fb", "ab"] {
        simulator.by_hand(&["take", &vm, name]);
    }
    program.json(0, &["domain", "add", "vm", "--host", "lab", "--vm", &vm]);
    stands_for_a_b(&names(&program, "vm"));
    program.json(0, &["revert", "vm", "ab", "--yes"]);
    assert_eq!(program.json(0, &["list", "vm"])["current"], "ab");
    program.json(0, &["delete", "vm", "a/b", "--yes"]);
    assert_eq!(simulator.seen()[&vm]["snapshots"].as_array().map(Vec::len), Some(2));

    if is_left_out() {
        return;
    }
    let vbox = Vbox::new();
    vbox.machine("web", 1, 4);
    for name in ["a/b", "ab", "nightly", "nightly"] {
        vbox.must(&["snapshot", "web", "take", name]);
    }
    let program = vbox.snaptree();
    program.json(0, &["domain", "add", "web", "--driver", "virtualbox", "--vm", "web"]);
    stands_for_a_b(&names(&program, "web"));
    program.json(0, &["revert", "web", "ab", "--yes"]);
    assert_eq!(program.json(0, &["list", "web"])["current"], "ab");
    program.json(0, &["delete", "web", "nightly", "--yes"]);
    program.json(3, &["delete", "web", "nightly", "--yes"]);
    program.json(0, &["delete", "web", "a/b", "--yes"]);
    let left: Vec<String> = vbox.states("web").into_iter().map(|state| state.name).collect();
    assert_eq!(left, ["ab", "nightly", ""]);
}
