//! M3: disks that were made larger or smaller between two snapshots.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use snaptree_tests::images::{text, tool};
use snaptree_tests::program::Program;
use snaptree_tests::running::{Running, Way};

const MIB: u64 = 1 << 20;

struct Machine {
    program: Program,
    image: PathBuf,
    folder: tempfile::TempDir,
}

impl Machine {
    /// A disk of 8 MiB that reads as ones.
    fn new() -> Self {
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder");
        let image = folder.path().join("d.qcow2");
        tool("qemu-img", &["create", "-q", "-f", "qcow2", text(&image), "8M"]);
        let machine = Self { program: Program::new(folder.path().join("s")), image, folder };
        machine.write(1, "0 8M");
        let disk = format!("vda={}", text(&machine.image));
        machine.program.json(0, &["domain", "add", "m", "--driver", "qemu", "--disk", &disk]);
        machine
    }

    fn write(&self, pattern: u8, range: &str) {
        tool("qemu-io", &["-f", "qcow2", "-c", &format!("write -P {pattern} {range}"), text(&self.image)]);
    }

    fn reads(&self, file: &Path, what: &[(u8, &str)]) {
        for (pattern, range) in what {
            let read = format!("read -P {pattern} {range}");
            let output = tool("qemu-io", &["-r", "-U", "-f", "qcow2", "-c", &read, text(file)]);
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(!said.contains("verification failed"), "{}: {read}: {said}", file.display());
        }
    }

    fn layers(&self) -> usize {
        let shown = self.program.json(0, &["domain", "show", "m"]);
        shown["layers"].as_array().expect("layers").len()
    }
}

fn size_of(file: &Path) -> u64 {
    let output = tool("qemu-img", &["info", "-U", "--output=json", text(file)]);
    let facts: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    facts["virtual-size"].as_u64().expect("a size")
}

#[test]
fn m3_a_disk_that_was_grown_is_merged_into_the_registered_image() {
    let machine = Machine::new();
    machine.program.json(0, &["create", "m", "s0"]);
    tool("qemu-img", &["resize", "-q", text(&machine.image), "16M"]);
    machine.write(2, "10M 1M");
    machine.program.json(0, &["delete", "m", "s0", "--now"]);
    assert_eq!((machine.layers(), size_of(&machine.image)), (1, 16 * MIB));
    machine.reads(&machine.image, &[(1, "0 8M"), (0, "8M 2M"), (2, "10M 1M"), (0, "11M 5M")]);
    for round in 0..3 {
        machine.program.json(0, &["create", "m", &format!("n{round}")]);
        machine.program.json(0, &["delete", "m", &format!("n{round}"), "--now"]);
    }
    assert_eq!(machine.layers(), 1);
}

#[test]
fn m3_a_snapshot_of_the_older_size_reads_as_it_did() {
    let machine = Machine::new();
    for name in ["a", "b", "c"] {
        machine.program.json(0, &["create", "m", name]);
        let size = size_of(&machine.image) + 8 * MIB;
        tool("qemu-img", &["resize", "-q", text(&machine.image), &size.to_string()]);
    }
    machine.write(3, "30M 1M");
    // a is of 8 MiB, b of 16, c of 24, and the disk of 32.
    machine.program.json(0, &["delete", "m", "a", "--now"]);
    machine.program.json(0, &["revert", "m", "b"]);
    assert_eq!(size_of(&machine.image), 16 * MIB);
    machine.reads(&machine.image, &[(1, "0 8M"), (0, "8M 8M")]);
    machine.program.json(0, &["delete", "m", "c", "--now"]);
    machine.program.json(0, &["delete", "m", "b", "--now"]);
    assert_eq!((machine.layers(), size_of(&machine.image)), (1, 16 * MIB));
    machine.reads(&machine.image, &[(1, "0 8M"), (0, "8M 8M")]);
}

#[test]
fn m3_a_disk_that_was_made_smaller_stays_and_the_dry_run_says_so() {
    let machine = Machine::new();
    machine.program.json(0, &["create", "m", "s0"]);
    tool("qemu-img", &["resize", "-q", "--shrink", text(&machine.image), "4M"]);
    let dry = machine.program.run(&["delete", "m", "s0", "--dry-run"]);
    assert!(format!("{}{}", dry.stdout, dry.stderr).contains("made smaller"), "{dry:?}");
    machine.program.json(0, &["delete", "m", "s0"]);
    assert_eq!(size_of(&machine.image), 4 * MIB);
    machine.reads(&machine.image, &[(1, "0 4M")]);
}

#[test]
fn m_a_push_into_a_smaller_layer_that_is_cut_off_is_carried_through() {
    let machine = Machine::new();
    machine.program.json(0, &["create", "m", "s0"]);
    tool("qemu-img", &["resize", "-q", text(&machine.image), "16M"]);
    machine.write(2, "10M 1M");
    let killed = machine.program.with_fault("qemu.push.pushed=kill").run(&["delete", "m", "s0", "--now"]);
    assert_eq!(killed.code, None, "{killed:?}");
    machine.reads(&machine.image, &[(1, "0 8M"), (0, "8M 2M"), (2, "10M 1M"), (0, "11M 5M")]);
    machine.program.json(0, &["recover"]);
    machine.program.run(&["reconcile", "m"]);
    assert_eq!((machine.layers(), size_of(&machine.image)), (1, 16 * MIB));
    machine.reads(&machine.image, &[(1, "0 8M"), (0, "8M 2M"), (2, "10M 1M"), (0, "11M 5M")]);
    assert!(machine.folder.path().exists());
}

#[test]
fn m3_a_disk_that_was_grown_under_the_guest_is_merged_under_it() {
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder");
    let mut running = Running::new(folder.path(), Way::Managed);
    running.start();
    running.wait_for_rounds(2);
    running.program.json(0, &["create", "web", "s0"]);
    let nodes = running.qmp("query-named-block-nodes", &json!({ "flat": true }));
    let active = std::fs::canonicalize(&running.paths[0]).expect("the current layer");
    let is_active = |node: &&Value| node["drv"] == "qcow2" && node["file"] == text(&active);
    let node = nodes.as_array().expect("nodes").iter().find(is_active).expect("what the machine writes");
    running.qmp("block_resize", &json!({ "node-name": node["node-name"], "size": 32 * MIB }));
    let shown = running.program.json(0, &["domain", "show", "web"]);
    let before = shown["layers"].as_array().expect("layers").len();
    running.program.json(0, &["delete", "web", "s0", "--now"]);
    running.wait_for_rounds(2);
    let shown = running.program.json(0, &["domain", "show", "web"]);
    assert_eq!(shown["layers"].as_array().expect("layers").len(), before - 2, "{shown}");
    running.program.json(0, &["domain", "stop", "web", "--force"]);
}
