//! A1: what an operation would refuse is what `drift` and `domain show` tell, with what helps.

#![cfg(feature = "lab")]

use std::fs;
use std::os::unix::fs::symlink;

use snaptree_tests::images::{text, tool};
use snaptree_tests::small::SmallDisk;

use crate::foreign_data::{Single, reads};

fn with_snapshot() -> Single {
    let single = Single::new("");
    single.add();
    single.write("0 64k", 1);
    single.program.json(0, &["create", "m", "s1"]);
    single.write("64k 64k", 2);
    single
}

/// All three tell it, and what helps.
fn told_everywhere(single: &Single, what: &str, help: &str) {
    let drift = single.ended(5, &["drift", "m"]);
    let shown = single.ended(0, &["domain", "show", "m"]);
    let refused = single.refused(&["create", "m", "next"]);
    let dry = single.refused(&["create", "m", "next", "--dry-run"]);
    for said in [drift, shown, refused, dry] {
        assert!(said.contains(what) && said.contains(help), "'{what}' and '{help}' in: {said}");
    }
}

/// And after the repair all is well.
fn repaired(single: &Single) {
    let would = single.ended(0, &["domain", "repair", "m", "--dry-run"]);
    assert!(would.contains("would"), "{would}");
    single.ended(5, &["drift", "m"]);
    single.program.json(0, &["domain", "repair", "m", "--yes"]);
    assert_eq!(single.program.run(&["drift", "m"]).code, Some(0), "{}", single.drift());
    reads(&single.image, "0 64k", 1);
    reads(&single.image, "64k 64k", 2);
    let log = single.program.run(&["log", "m"]).stdout;
    assert!(log.contains("a link to the machine's current disk again"), "{log}");
    single.program.json(0, &["create", "m", "next"]);
}

#[test]
fn a1_a_registered_path_that_was_removed_is_told_and_put_right() {
    let single = with_snapshot();
    fs::remove_file(&single.image).expect("removed");
    told_everywhere(&single, "nothing is there", "domain repair m");
    repaired(&single);
}

#[test]
fn a1_a_file_over_the_link_is_told_kept_and_put_aside() {
    for copies in [true, false] {
        let single = with_snapshot();
        let other = single.beside("other.qcow2");
        tool("qemu-img", &["create", "-q", "-f", "qcow2", text(&other), "16M"]);
        if copies {
            tool("cp", &["--remove-destination", text(&other), text(&single.image)]);
        } else {
            fs::rename(&other, &single.image).expect("moved");
        }
        let bytes = fs::read(&single.image).expect("the file");
        told_everywhere(&single, "a file is there", "domain repair m");
        repaired(&single);
        assert_eq!(fs::read(single.beside("d.qcow2.found")).expect("it is kept"), bytes);
    }
}

#[test]
fn a1_a_link_to_elsewhere_is_told_and_put_right() {
    let single = with_snapshot();
    fs::remove_file(&single.image).expect("removed");
    symlink("/nowhere/d.qcow2", &single.image).expect("a link");
    told_everywhere(&single, "a link to /nowhere/d.qcow2", "domain repair m");
    repaired(&single);
}

#[test]
fn a1_a_current_layer_that_was_put_upon_nothing_is_told_with_what_helps() {
    let single = with_snapshot();
    let active = single.active();
    tool("qemu-img", &["rebase", "-u", "-f", "qcow2", "-b", "", text(&active)]);
    told_everywhere(&single, "is built upon nothing", "qemu-img rebase -u -F qcow2 -b");
    let said = single.drift();
    let command = said.lines().find_map(|line| line.split_once("since: ").map(|(_, command)| command));
    let words: Vec<&str> = command.expect("a command").split_whitespace().collect();
    tool(words[0], &words[1..]);
    assert_eq!(single.program.run(&["drift", "m"]).code, Some(0), "{}", single.drift());
    single.program.json(0, &["create", "m", "next"]);
}

#[test]
fn a1_an_image_without_snapshots_that_is_gone_is_told() {
    let single = Single::new("");
    single.add();
    let elsewhere = single.beside("elsewhere");
    fs::rename(&single.image, &elsewhere).expect("moved");
    told_everywhere(&single, "nothing is", "put");
    fs::rename(&elsewhere, &single.image).expect("back");
    single.program.json(0, &["create", "m", "next"]);
    assert_eq!(single.program.run(&["drift", "m"]).code, Some(0));
}

#[test]
fn a1_a_file_system_that_went_while_an_operation_is_open_is_told() {
    let mut single = Single::new("");
    let at = single.beside("vm");
    let disk = SmallDisk::mount(&at, "8M");
    let image = at.join("d.qcow2");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", text(&image), "16M"]);
    single.image = image;
    let settings = single.beside("settings");
    single.program = single.program.with_settings(&settings, "[space]\nmargin = \"0\"\n");
    single.add();
    single.program.json(0, &["create", "m", "s1"]);
    let killed = single.program.with_fault("qemu.switch.prepared=kill").run(&["create", "m", "s2"]);
    assert_eq!(killed.code, None, "{killed:?}");
    assert_eq!(
        single.program.run(&["drift", "m"]).code,
        Some(0),
        "its own step is no drift: {}",
        single.drift()
    );
    drop(disk);
    let told = single.ended(5, &["drift", "m"]);
    assert!(told.contains("d.qcow2") && told.contains("nothing is there"), "{told}");
    assert!(single.ended(0, &["domain", "show", "m"]).contains("nothing is there"));
}

#[test]
fn a_repair_touches_nothing_where_all_is_well_or_where_somebody_has_to_look() {
    let single = with_snapshot();
    let said = single.ended(0, &["domain", "repair", "m", "--yes"]);
    assert!(said.contains("nothing to put right"), "{said}");
    fs::remove_file(&single.image).expect("removed");
    fs::create_dir(&single.image).expect("a folder");
    assert!(single.refused(&["domain", "repair", "m", "--yes"]).contains("neither a file nor a link"));
    assert!(single.image.is_dir());
    fs::remove_dir(&single.image).expect("removed");
    let killed = single.program.with_fault("mend.begun=kill").run(&["domain", "repair", "m", "--yes"]);
    assert_eq!(killed.code, None, "{killed:?}");
    repaired(&single);
}
