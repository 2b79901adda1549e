//! Disks that come to a registered machine, and go from it.

use serde_json::{Value, json};
use snaptree_tests::images::text;

use super::rig::{DRIVE, Rig};

const SECOND: &str = "-drive file={folder}/second.qcow2,format=qcow2,if=none,id=second \
                      -device virtio-blk-pci,id=second-disk,drive=second";

fn disks(domain: &Value) -> Vec<&str> {
    domain["disks"].as_array().expect("disks").iter().filter_map(|disk| disk["name"].as_str()).collect()
}

#[test]
fn m4_a_disk_that_came_to_a_machine_is_registered_and_snapshots_from_then_on_hold_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let rig = Rig::new(folder.path(), DRIVE);
    Rig::beside(folder.path(), "second.qcow2", "qcow2", "1M");
    rig.program.json(0, &["create", "web", "before"]);
    let disk = format!("vdb={}", text(&folder.path().join("second.qcow2")));
    // The launch line has to have it.
    let refused = rig.program.json(4, &["domain", "disk", "add", "web", &disk]);
    assert!(refused["error"]["message"].as_str().expect("why").contains("{vdb}"), "{refused}");
    let launch = rig.launch(&format!("{DRIVE} -drive file={{vdb}},format={{vdb.format}},if=virtio"));
    let added = rig.program.json(0, &["domain", "disk", "add", "web", &disk, "--launch", &launch]);
    assert_eq!(disks(&added), ["vda", "vdb"], "{added}");
    // Nobody registers it twice.
    for again in [
        &["domain", "disk", "add", "web", &disk][..],
        &["domain", "add", "other", "--driver", "qemu", "--disk", &disk],
    ] {
        rig.program.json(4, again);
    }
    rig.program.json(0, &["create", "web", "after"]);
    rig.program.json(0, &["domain", "start", "web"]);
    rig.program.json(0, &["create", "web", "live", "--memory"]);
    let shown = rig.program.json(0, &["show", "web", "after"]);
    assert_eq!(disks(&shown), ["vda", "vdb"], "{shown}");
    // What was taken before does not hold it, and a revert leaves it alone and says so.
    let active = |disk: &str| {
        let shown = rig.program.json(0, &["domain", "show", "web"]);
        shown["layers"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|layer| layer["disk"] == disk && layer["role"] == "active")
            .map(|layer| layer["file"].clone())
    };
    let second = active("vdb");
    for dry in [&["--dry-run"][..], &[]] {
        let reverted = rig.program.json(0, &[&["revert", "web", "before"][..], dry].concat());
        assert!(reverted["left_out"][0].as_str().is_some_and(|what| what.contains("'vdb'")), "{reverted}");
    }
    assert_eq!(second, active("vdb"));
}

#[test]
fn m4_a_disk_that_was_taken_from_a_machine_is_named_with_what_helps() {
    let folder = tempfile::tempdir().expect("a folder");
    Rig::beside(folder.path(), "second.qcow2", "qcow2", "1M");
    let rig = Rig::started(folder.path(), &format!("{DRIVE} {SECOND}"));
    let path = folder.path().join("second.qcow2");
    let disk = format!("vdb={}", text(&path));
    let launch = rig.launch(&format!(
        "{DRIVE} {}",
        SECOND.replace("{folder}/second.qcow2,format=qcow2", "{vdb},format={vdb.format}")
    ));
    rig.program.json(0, &["domain", "disk", "add", "web", &disk, "--launch", &launch]);
    rig.program.json(0, &["create", "web", "both"]);
    rig.ask("device_del", json!({ "id": "second-disk" })).expect("it is asked for");
    // A guest that runs no system does not let go of it: QEMU is started without it instead.
    rig.program.json(0, &["domain", "stop", "web", "--force"]);
    rig.start_by_hand(DRIVE);
    let refused = rig.program.json(4, &["create", "web", "s"]);
    let hint = refused["error"]["hint"].as_str().expect("a hint");
    assert!(hint.contains("snaptree domain disk remove web vdb"), "{refused}");
    let refused =
        rig.program.json(4, &["domain", "disk", "remove", "web", "vdb", "--launch", &rig.launch(DRIVE)]);
    assert!(refused["error"]["hint"].as_str().expect("a hint").contains("--keep-layers"), "{refused}");
    let removed = rig.program.json(
        0,
        &["domain", "disk", "remove", "web", "vdb", "--keep-layers", "--launch", &rig.launch(DRIVE)],
    );
    assert_eq!(disks(&removed), ["vda"], "{removed}");
    rig.program.json(0, &["create", "web", "one"]);
    rig.program.json(0, &["create", "web", "two"]);
    rig.program.json(0, &["delete", "web", "one", "--now"]);
    // Its path goes on leading to what it was.
    assert!(std::fs::metadata(&path).is_ok(), "the registered path leads somewhere");
    let reverted = rig.program.json(0, &["revert", "web", "both"]);
    assert!(reverted["left_out"][0].as_str().is_some_and(|what| what.contains("'vdb'")), "{reverted}");
    rig.program.json(0, &["domain", "stop", "web", "--force"]);
    let refused = rig.program.json(4, &["domain", "remove", "web", "--flatten", "--yes"]);
    assert!(refused["error"]["message"].as_str().expect("why").contains("'vdb'"), "{refused}");
    // And it can be put back, as it was.
    let back = rig.program.json(0, &["domain", "disk", "add", "web", &disk, "--launch", &launch]);
    assert_eq!(disks(&back), ["vda", "vdb"], "{back}");
    rig.program.json(0, &["revert", "web", "both"]);
    let log = rig.program.run(&["log", "web"]);
    assert!(log.stdout.contains("changed the domain's disks: vda, vdb"), "{}", log.stdout);
}

#[test]
fn m_a_disk_without_layers_goes_and_the_last_one_stays() {
    let folder = tempfile::tempdir().expect("a folder");
    let rig = Rig::new(folder.path(), DRIVE);
    // Nor does one come that is somebody else's.
    Rig::beside(folder.path(), "other.qcow2", "qcow2", "1M");
    let other = folder.path().join("other.qcow2");
    let add = ["domain", "add", "other", "--driver", "qemu", "--disk", &format!("vda={}", text(&other))];
    rig.program.json(0, &add);
    let refused = rig.program.json(4, &["domain", "disk", "add", "web", &format!("vdb={}", text(&other))]);
    assert!(
        refused["error"]["message"].as_str().expect("why").contains("belongs to domain 'other'"),
        "{refused}"
    );
    let refused = rig.program.json(4, &["domain", "disk", "remove", "web", "vda"]);
    assert!(refused["error"]["hint"].as_str().expect("a hint").contains("domain remove"), "{refused}");
    let refused = rig.program.json(3, &["domain", "disk", "remove", "web", "vdz"]);
    assert!(refused["error"]["message"].as_str().expect("why").contains("no disk 'vdz'"), "{refused}");
}
