//! H3: libvirt, or somebody by hand, works on the images of a machine that Snaptree has.

#![cfg(feature = "lab")]

use std::os::unix::net::UnixListener;

use snaptree_tests::images::{text, tool};

use crate::foreign_data::{Single, overlay, reads, write};

/// A machine with a snapshot, whose owner then made an overlay `d.L1` beside it and lets it run on that.
fn with_overlay() -> Single {
    let single = Single::new("");
    single.add();
    single.write("0 64k", 1);
    single.program.json(0, &["create", "m", "s1"]);
    overlay(&single.image, &single.beside("d.L1"));
    write(&single.beside("d.L1"), "1M 64k", 7);
    single
}

#[test]
fn h3_what_stands_on_the_machines_disk_is_told_and_nothing_is_done_beneath_it() {
    let single = with_overlay();
    assert!(single.drift().contains("d.L1"), "{}", single.drift());
    for args in [
        &["create", "m", "s2"][..],
        &["create", "m", "s2", "--dry-run"],
        &["revert", "m", "s1", "--yes"],
        &["delete", "m", "s1", "--yes"],
        &["domain", "remove", "m", "--flatten", "--yes"],
    ] {
        let said = single.refused(args);
        assert!(said.contains("d.L1") && said.contains("qemu-img commit"), "{args:?}: {said}");
    }
    // What helps is what was said: then the snapshot has what the overlay had.
    tool("qemu-img", &["commit", "-q", text(&single.beside("d.L1"))]);
    std::fs::remove_file(single.beside("d.L1")).expect("removed");
    assert_eq!(single.program.run(&["drift", "m"]).code, Some(0));
    let frozen = single.active();
    single.program.json(0, &["create", "m", "s2"]);
    reads(&frozen, "1M 64k", 7);
}

#[test]
fn h_an_overlay_on_an_overlay_that_lies_elsewhere_is_found_by_its_chain() {
    let single = with_overlay();
    let elsewhere = tempfile::tempdir().expect("a folder");
    let below = elsewhere.path().join("d.L1");
    std::fs::rename(single.beside("d.L1"), &below).expect("moved");
    overlay(&below, &single.beside("d.L2"));
    assert!(single.refused(&["create", "m", "s2"]).contains("d.L2"));
    assert!(single.drift().contains("d.L2"));
}

#[test]
fn h_an_overlay_on_an_image_without_snapshots_is_found_too() {
    let single = Single::new("");
    single.add();
    overlay(&single.image, &single.beside("d.L1"));
    assert!(single.drift().contains("d.L1"), "{}", single.drift());
    for args in [&["create", "m", "s1"][..], &["create", "m", "s1", "--internal"]] {
        assert!(single.refused(args).contains("d.L1"), "{args:?}");
    }
}

#[test]
fn h3_a_snapshot_that_somebody_else_made_inside_is_not_frozen_away_unasked() {
    let single = Single::new("");
    single.add();
    single.program.json(0, &["create", "m", "s1"]);
    tool("qemu-img", &["snapshot", "-c", "I1", text(&single.image)]);
    assert!(single.drift().contains("'I1'"), "{}", single.drift());
    for args in [&["create", "m", "s2"][..], &["create", "m", "s2", "--dry-run"]] {
        let said = single.refused(args);
        assert!(said.contains("'I1'") && said.contains("--give-up"), "{args:?}: {said}");
    }
    let other = single.refused(&["create", "m", "s2", "--give-up", "I2"]);
    assert!(other.contains("'I1'"), "only what is named is given up: {other}");
    single.program.json(0, &["create", "m", "s2", "--give-up", "I1"]);
    assert_eq!(single.program.run(&["drift", "m"]).code, Some(0), "it is no surprise any more");
}

#[test]
fn h_a_snapshot_inside_from_before_the_registration_was_told_then_and_one_from_since_is_not_missed() {
    let single = Single::new("");
    tool("qemu-img", &["snapshot", "-c", "golden", text(&single.image)]);
    let added = single.add();
    assert!(added["notes"].to_string().contains("snapshots of its own"), "{added}");
    tool("qemu-img", &["snapshot", "-c", "later", text(&single.image)]);
    let said = single.refused(&["create", "m", "s1"]);
    assert!(said.contains("'later'") && !said.contains("golden"), "{said}");
    tool("qemu-img", &["snapshot", "-d", "later", text(&single.image)]);
    single.program.json(0, &["create", "m", "s1"]);
}

#[test]
fn h3_libvirts_own_monitor_is_refused_with_what_to_do() {
    let single = Single::new("");
    single.add();
    let folder = single.beside("libvirt/qemu/domain-1-m");
    std::fs::create_dir_all(&folder).expect("a folder");
    let socket = folder.join("monitor.sock");
    let said = single.refused(&["domain", "set", "m", "--qmp", text(&socket)]);
    assert!(said.contains("libvirt") && said.contains("virsh edit"), "{said}");
    // The same by another name.
    let link = single.beside("qmp");
    let _listens = UnixListener::bind(&socket).expect("a socket");
    std::os::unix::fs::symlink(&socket, &link).expect("a link");
    assert!(single.refused(&["domain", "set", "m", "--qmp", text(&link)]).contains("libvirt"));
}

#[test]
fn h_a_socket_behind_which_nobody_greets_is_refused_at_once() {
    let single = Single::new("");
    single.add();
    let socket = single.beside("qmp.sock");
    let _silent = UnixListener::bind(&socket).expect("a socket");
    let said = single.refused(&["domain", "set", "m", "--qmp", text(&socket)]);
    assert!(said.contains("does not greet"), "{said}");
    let disk = format!("vda={}", text(&single.beside("e.qcow2")));
    tool("qemu-img", &["create", "-q", "-f", "qcow2", text(&single.beside("e.qcow2")), "1M"]);
    let args = ["domain", "add", "e", "--driver", "qemu", "--disk", &disk, "--qmp", text(&socket)];
    assert!(single.refused(&args).contains("does not greet"));
}
