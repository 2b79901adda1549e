//! Disks of machines whose hypervisor lists them: attached and detached later, and those that snapshots leave out.
#![cfg(feature = "lab")]

use serde_json::{Value, json};
use snaptree_tests::program::Program;
use snaptree_tests::virtualbox::{Vbox, is_left_out};
use snaptree_tests::vsphere::{Model, Simulator};

fn disks(program: &Program, domain: &str) -> Vec<String> {
    let shown = program.json(0, &["domain", "show", domain]);
    let name = |disk: &Value| disk["name"].as_str().expect("a name").to_owned();
    shown["disks"].as_array().expect("disks").iter().map(name).collect()
}

fn attach(vbox: &Vbox, port: &str, kind: &str) {
    let file = vbox.path().join(format!("{kind}-{port}.vdi")).display().to_string();
    let variant = if kind == "shareable" { "Fixed" } else { "Standard" };
    vbox.must(&["createmedium", "disk", "--filename", &file, "--size", "4", "--variant", variant]);
    let place = ["--storagectl", "sata", "--port", port, "--device", "0", "--type", "hdd"];
    vbox.must(&[&["storageattach", "web", "--medium", &file, "--mtype", kind], &place[..]].concat());
}

fn words<'a>(answer: &'a Value, key: &str) -> Vec<&'a str> {
    answer[key].as_array().map_or(Vec::new(), |notes| notes.iter().filter_map(Value::as_str).collect())
}

#[test]
fn m4_a_disk_that_is_attached_to_a_virtualbox_machine_later_is_shown_and_its_loss_is_told() {
    if is_left_out() {
        return;
    }
    let vbox = Vbox::new();
    vbox.machine("web", 2, 4);
    let program = vbox.snaptree();
    program.json(0, &["domain", "add", "web", "--driver", "virtualbox", "--vm", "web"]);
    program.json(0, &["create", "web", "one"]);

    attach(&vbox, "2", "normal");
    assert_eq!(disks(&program, "web"), ["sda", "sdb", "sdc"]);
    let drift = program.json(0, &["drift", "web"]);
    assert_eq!(drift["domains"][0]["disks"], json!(["disk 'sdc' was attached to the machine"]), "{drift}");
    let lost = program.json(0, &["revert", "web", "one", "--dry-run"])["lost"].clone();
    let told = lost[0].as_str().expect("something is lost");
    assert!(told.starts_with("disk 'sdc'") && told.contains("it is detached"), "{lost}");
    // It is part of what is taken now.
    program.json(0, &["create", "web", "two"]);
    assert_eq!(
        program.json(0, &["revert", "web", "two", "--dry-run"])["lost"].as_array().map(Vec::len),
        Some(1)
    );
    program.json(0, &["revert", "web", "one"]);
    assert_eq!(disks(&program, "web"), ["sda", "sdb"]);

    // Another one in its place keeps no other disk's name from it.
    let place = ["--storagectl", "sata", "--port", "0", "--device", "0", "--medium", "none"];
    vbox.must(&[&["storageattach", "web"], &place[..]].concat());
    assert_eq!(disks(&program, "web"), ["sdb"]);
    let drift = program.json(0, &["drift", "web"]);
    let changes = drift["domains"][0]["disks"].as_array().expect("changes");
    assert!(changes.contains(&json!("disk 'sda' was detached from the machine")), "{drift}");
}

#[test]
fn m5_a_disk_that_virtualbox_leaves_out_of_snapshots_is_told_of() {
    if is_left_out() {
        return;
    }
    let vbox = Vbox::new();
    vbox.machine("web", 1, 4);
    for (port, kind) in [("1", "writethrough"), ("2", "shareable"), ("3", "immutable")] {
        attach(&vbox, port, kind);
    }
    let program = vbox.snaptree();
    let added = program.json(0, &["domain", "add", "web", "--driver", "virtualbox", "--vm", "web"]);
    assert_eq!(words(&added, "notes").len(), 3, "{added}");
    let created = program.json(0, &["create", "web", "one"]);
    let told = words(&created, "left_out");
    assert!(told[0].contains("'sdb'") && told[0].contains("write-through"), "{created}");
    assert!(told[1].contains("'sdc'") && told[1].contains("shareable"), "{created}");
    assert!(told[2].contains("'sdd'") && told[2].contains("dropped when the machine starts"), "{created}");
    let shown = program.run(&["domain", "show", "web"]).stdout;
    assert_eq!(shown.matches("no part of snapshots").count(), 3, "{shown}");
    let kept = program.json(0, &["show", "web", "one"])["disks"].clone();
    assert_eq!((kept.as_array().map(Vec::len), &kept[0]["name"]), (Some(1), &json!("sda")), "{kept}");
    assert_eq!(words(&program.json(0, &["revert", "web", "one"]), "left_out"), told);
    let printed = program.run(&["create", "web", "two"]);
    assert_eq!(printed.stdout.matches("left out:").count(), 3, "{printed:?}");
}

#[test]
fn m_disks_of_an_esx_machine_are_followed_and_independent_ones_told_of() {
    let folder = tempfile::tempdir().expect("a folder");
    let simulator = Simulator::start(folder.path(), Model::Vcenter, 1, 0);
    let program = Program::new(folder.path().join("state"));
    simulator.add_to(&program, folder.path());
    let vm = simulator.machines[0].clone();
    program.json(0, &["domain", "add", "vm", "--host", "lab", "--vm", &vm]);
    let before = disks(&program, "vm").len();
    program.json(0, &["create", "vm", "one", "--disk-only"]);

    simulator.by_hand(&["attach", &vm, "persistent"]);
    simulator.by_hand(&["attach", &vm, "independent_persistent"]);
    let drift = program.json(0, &["drift", "vm"]);
    assert_eq!(drift["domains"][0]["disks"].as_array().map(Vec::len), Some(3), "{drift}");
    assert_eq!(disks(&program, "vm").len(), before + 2);
    let planned = program.json(0, &["revert", "vm", "one", "--dry-run"]);
    assert!(planned["lost"][0].as_str().expect("a loss").contains("detached"), "{planned}");
    let created = program.json(0, &["create", "vm", "two", "--disk-only"]);
    assert!(words(&created, "left_out")[0].contains("independent"), "{created}");
    let kept = program.json(0, &["show", "vm", "two"])["disks"].as_array().map(Vec::len);
    assert_eq!(kept, Some(before + 1));
}
