//! A4: what failed for a reason that is gone.

#![cfg(feature = "lab")]

use std::path::Path;

use snaptree_tests::images::{make_qcow2, text, tool};
use snaptree_tests::program::Program;
use snaptree_tests::small::SmallDisk;

/// A machine on a file system of its own, whose first create was killed and finds it read-only since.
fn stuck(folder: &Path, disk: &SmallDisk, point: &str) -> Program {
    let image = disk.path().join("d.qcow2");
    make_qcow2(&image);
    let program = Program::new(folder.join("state"));
    let given = format!("vda={}", text(&image));
    program.json(0, &["domain", "add", "m", "--driver", "qemu", "--disk", &given]);
    let ran = program.with_fault(&format!("{point}=kill")).run(&["create", "m", "s1"]);
    assert_eq!(ran.code, None, "{point}: {ran:?}");
    remount(disk, "ro");
    let stuck = program.run(&["recover"]);
    assert_eq!(stuck.code, Some(5), "{point}: {stuck:?}");
    let open = program.json(0, &["op", "list", "--open"]);
    assert!(open.to_string().contains("needs-attention"), "{point}: {open}");
    program
}

fn remount(disk: &SmallDisk, how: &str) {
    tool("mount", &["-o", &format!("remount,{how}"), text(disk.path())]);
}

#[test]
fn a4_recover_tries_again_what_failed_while_the_file_system_was_read_only() {
    for point in ["qemu.adopt.linked", "qemu.adopt.renamed", "qemu.switch.prepared"] {
        let folder = tempfile::tempdir().expect("a folder");
        let disk = SmallDisk::mount(&folder.path().join("vm"), "256M");
        let program = stuck(folder.path(), &disk, point);
        // As long as it is so, nothing changes.
        assert_eq!(program.run(&["recover"]).code, Some(5), "{point}");
        remount(&disk, "rw");
        let recovered = program.run(&["recover"]);
        assert_eq!(recovered.code, Some(0), "{point}: {recovered:?}");
        assert_eq!(
            program.json(0, &["op", "list", "--open"])["operations"],
            serde_json::json!([]),
            "{point}"
        );
        program.json(0, &["create", "m", "s2"]);
        tool("qemu-img", &["check", text(&disk.path().join("d.qcow2"))]);
    }
}

#[test]
fn a4_how_the_machine_is_reached_can_be_changed_while_an_operation_needs_attention() {
    let folder = tempfile::tempdir().expect("a folder");
    let disk = SmallDisk::mount(&folder.path().join("vm"), "256M");
    let program = stuck(folder.path(), &disk, "qemu.adopt.linked");
    program.json(0, &["domain", "set", "m", "--start", "true", "--stop", "true"]);
    remount(&disk, "rw");
    assert_eq!(program.run(&["recover"]).code, Some(0));
    let shown = program.json(0, &["domain", "show", "m"]);
    assert!(
        shown.to_string().contains("\"start\":\"true\"") || shown.to_string().contains("commands"),
        "{shown}"
    );
}

#[test]
fn a_while_an_operation_is_in_hand_it_cannot_and_that_is_said_with_the_way_out() {
    let folder = tempfile::tempdir().expect("a folder");
    let image = folder.path().join("d.qcow2");
    make_qcow2(&image);
    let program = Program::new(folder.path().join("state"));
    let given = format!("vda={}", text(&image));
    program.json(0, &["domain", "add", "m", "--driver", "qemu", "--disk", &given]);
    let ran = program.with_fault("qemu.adopt.linked=kill").run(&["create", "m", "s1"]);
    assert_eq!(ran.code, None, "{ran:?}");
    let refused = program.run(&["domain", "set", "m", "--start", "true", "--stop", "true"]);
    assert_eq!(refused.code, Some(4), "{refused:?}");
    assert!(
        refused.stderr.contains("is in hand") && refused.stderr.contains("snaptree recover"),
        "{refused:?}"
    );
    program.json(0, &["recover"]);
    program.json(0, &["domain", "set", "m", "--start", "true", "--stop", "true"]);
}
