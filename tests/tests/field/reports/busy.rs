//! A host that is busy for a moment.
#![cfg(feature = "lab")]

use snaptree_tests::program::Program;
use snaptree_tests::vsphere::{Model, Simulator};

#[test]
fn a8_a_host_that_is_busy_twice_on_any_call_of_a_create_is_asked_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let simulator = Simulator::start(folder.path(), Model::Vcenter, 1, 0);
    let settings = "[retry]\ndelay-min = \"10ms\"\ndelay-max = \"50ms\"\n";
    let program =
        Program::new(folder.path().join("state")).with_settings(&folder.path().join("settings"), settings);
    simulator.add_to(&program, folder.path());
    program.json(0, &["domain", "add", "vm", "--host", "lab", "--vm", &simulator.machines[0]]);
    let calls = ["RetrieveServiceContent", "Login", "RetrievePropertiesEx", "CreateSnapshotEx_Task"];
    let mut taken = 0;
    for method in calls {
        for status in ["503", "429"] {
            simulator.lab(&format!("inject?method={method}&action=http&status={status}&count=2"));
            taken += 1;
            let created = program.json(0, &["create", "vm", &format!("s{taken}"), "--disk-only"]);
            assert_eq!(created["outcome"], "succeeded", "{method}, HTTP {status}: {created}");
            simulator.lab("reset");
        }
    }
    // Each was taken once.
    let list = program.json(0, &["list", "vm"]);
    assert_eq!(list["snapshots"].as_array().map(Vec::len), Some(taken), "{list}");
    assert_eq!(simulator.seen()[&simulator.machines[0]]["snapshots"].as_array().map(Vec::len), Some(taken));
}
