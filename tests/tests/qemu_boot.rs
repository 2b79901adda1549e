//! A real machine on the registered path, whoever starts it.

#![cfg(feature = "lab")]
#![allow(clippy::expect_used, reason = "a test")]

use std::path::{Path, PathBuf};
use std::process::Stdio;

use snaptree_tests::guest::{Guest, make_image};
use snaptree_tests::images::{text, tool};
use snaptree_tests::program::{Program, wait_until_stopped};

/// A registered machine whose disk counter has a known value in each of ten snapshots.
fn lab(folder: &Path) -> (Program, PathBuf) {
    let image = folder.join("vda.qcow2");
    make_image(&image);
    let program = Program::new(folder.join("state"));
    let disk = format!("vda={}", text(&image));
    program.json(0, &["domain", "add", "web", "--driver", "qemu", "--disk", &disk]);
    for n in 1..=10 {
        tool("qemu-io", &["-f", "qcow2", "-c", &format!("write -P {n} 512 512"), text(&image)]);
        program.json(0, &["create", "web", &format!("s{n}")]);
    }
    (program, image)
}

#[test]
fn after_ten_snapshots_and_a_revert_the_machine_sees_the_current_disk() {
    let folder = tempfile::tempdir().expect("a folder");
    let (program, image) = lab(folder.path());
    program.json(0, &["revert", "web", "s4"]);
    let mut guest = Guest::start(&image);
    assert_eq!(guest.next_disk_counter(), 0x0404_0405);
    assert_eq!(guest.next_disk_counter(), 0x0404_0406);

    // While it runs, nothing may be done to it, and the sentence names the file and the process.
    let refused = program.json(4, &["create", "web", "too-early"]);
    assert_eq!(refused["error"]["code"], "in-use", "{refused}");
    let message = refused["error"]["message"].as_str().expect("a message");
    assert!(message.contains(&guest.pid().to_string()), "{message}");
    assert!(message.contains(".qcow2"), "{message}");
    drop(guest);
    program.json(0, &["create", "web", "in-time"]);
}

#[test]
fn a_machine_that_is_started_in_the_middle_of_a_create_is_refused_by_the_lock() {
    let folder = tempfile::tempdir().expect("a folder");
    let (program, image) = lab(folder.path());
    let stopped = program.with_fault("qemu.switch.locked=stop");
    let mut child = stopped
        .command(&["create", "web", "s11", "--json"])
        .stdout(Stdio::null())
        .spawn()
        .expect("it starts");
    let pid = child.id();
    wait_until_stopped(pid);

    let said = Guest::refused(&image);
    assert!(said.contains("Failed to get \"write\" lock"), "{said}");

    tool("kill", &["-CONT", &pid.to_string()]);
    assert!(child.wait().expect("it ends").success());
    let listed = program.json(0, &["list", "web"]);
    assert_eq!(listed["current"], "s11");
    assert_eq!(Guest::start(&image).next_disk_counter(), 0x0a0a_0a0b);
}
