//! H4: a file system that is wholly full.

use std::path::{Path, PathBuf};

use serde_json::Value;
use snaptree_tests::images::{text, tool};
use snaptree_tests::program::Program;
use snaptree_tests::small::SmallDisk;

/// A machine whose images are on a small file system. Its log is elsewhere.
struct Machine {
    program: Program,
    image: PathBuf,
    small: SmallDisk,
    _folder: tempfile::TempDir,
}

impl Machine {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let small = SmallDisk::mount(&folder.path().join("images"), "24M");
        let image = small.path().join("d.qcow2");
        tool("qemu-img", &["create", "-q", "-f", "qcow2", text(&image), "64M"]);
        let program = Program::new(folder.path().join("s"));
        let program = program.with_settings(&folder.path().join("settings"), "[space]\nmargin = \"0\"\n");
        let disk = format!("vda={}", text(&image));
        program.json(0, &["domain", "add", "m", "--driver", "qemu", "--disk", &disk]);
        Self { program, image, small, _folder: folder }
    }

    /// As a guest would that fills its disk: until there is no space.
    fn write_until_full(&self) {
        for start in (0..64).map(|mib| format!("{mib}M")) {
            let write = format!("write -P 9 {start} 1M");
            let wrote = std::process::Command::new("qemu-io")
                .args(["-f", "qcow2", "-c", &write, text(&self.image)])
                .output()
                .expect("it runs");
            if !wrote.status.success() {
                break;
            }
        }
        self.small.fill(0);
    }

    fn snapshots(&self) -> usize {
        let listed: Value = self.program.json(0, &["list", "m"]);
        listed["snapshots"].as_array().expect("snapshots").len()
    }
}

fn free_bytes(folder: &Path) -> u64 {
    let output = tool("stat", &["-f", "-c", "%a %S", text(folder)]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let numbers: Vec<u64> = said.split_whitespace().map(|n| n.parse().expect("a number")).collect();
    numbers[0] * numbers[1]
}

#[test]
fn h4_a_leaf_is_deleted_on_a_file_system_without_a_free_block() {
    let machine = Machine::new();
    machine.program.json(0, &["create", "m", "a"]);
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 3M", text(&machine.image)]);
    machine.program.json(0, &["create", "m", "b"]);
    machine.program.json(0, &["revert", "m", "a"]);
    machine.small.fill(0);
    assert_eq!(free_bytes(machine.small.path()), 0);
    let refused = machine.program.run(&["create", "m", "c"]);
    assert!(refused.stderr.contains("snapshot 'b' frees at least"), "{refused:?}");
    machine.program.json(0, &["delete", "m", "b", "--now"]);
    assert_eq!(machine.snapshots(), 1);
    assert!(free_bytes(machine.small.path()) >= 3 << 20, "its space is given back");
}

#[test]
fn h4_what_a_guest_filled_under_its_own_snapshot_is_a_way_out() {
    let machine = Machine::new();
    machine.program.json(0, &["create", "m", "a"]);
    machine.write_until_full();
    let refused = machine.program.run(&["create", "m", "b"]);
    assert_ne!(refused.code, Some(0));
    assert!(refused.stderr.contains("make the file system larger"), "{refused:?}");
    machine.program.json(0, &["delete", "m", "a"]);
    assert_eq!(machine.snapshots(), 0);
}

#[test]
fn h_several_snapshots_are_deleted_one_after_the_other_though_nothing_is_given_back() {
    let machine = Machine::new();
    for name in ["a", "b", "c"] {
        machine.program.json(0, &["create", "m", name]);
    }
    machine.write_until_full();
    for name in ["a", "b", "c"] {
        machine.program.json(0, &["delete", "m", name, "--defer"]);
        // What the switch gave back is taken at once.
        std::fs::remove_file(machine.small.path().join("filler")).expect("the filler");
        machine.small.fill(0);
    }
    assert_eq!(machine.snapshots(), 0);
}
