//! H1, H2, H5: two states, and one machine.

#![cfg(feature = "lab")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};

use snaptree_tests::images::{text, tool};
use snaptree_tests::program::{Program, Ran};

use crate::foreign_data::{Single, overlay, reads};

fn copy_of(single: &Single, name: &str) -> Program {
    let copy = single.beside(name);
    tool("cp", &["-r", text(&single.program.state), text(&copy)]);
    Program::new(copy)
}

fn names(program: &Program) -> BTreeSet<String> {
    let listed = program.json(0, &["list", "m"]);
    let snapshots = listed["snapshots"].as_array().expect("snapshots").iter();
    snapshots.map(|snapshot| snapshot["name"].as_str().expect("a name").to_owned()).collect()
}

fn begun(program: &Program, args: &[&str]) -> Child {
    program.command(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts")
}

fn succeeded(mut child: Child) -> bool {
    child.wait().expect("it ends").success()
}

fn refused(program: &Program, args: &[&str]) -> String {
    let ran = program.run(args);
    assert_eq!(ran.code, Some(4), "{args:?}: {ran:?}");
    ran.stderr
}

#[test]
fn h1_a_copied_state_is_refused_and_told_who_has_the_machine() {
    let single = Single::new("");
    single.add();
    single.program.json(0, &["create", "m", "base"]);
    let copy = copy_of(&single, "B");
    let mut acknowledged = BTreeSet::from(["base".to_owned()]);
    for turn in 0..3 {
        let (ours, theirs) = (format!("a{turn}"), format!("b{turn}"));
        let both = [begun(&single.program, &["create", "m", &ours]), begun(&copy, &["create", "m", &theirs])];
        let [here, there] = both.map(succeeded);
        assert!(here && !there, "turn {turn}: {here} and {there}");
        acknowledged.insert(ours);
    }
    let state = text(&single.program.state);
    for args in [
        &["create", "m", "b"][..],
        &["create", "m", "b", "--dry-run"],
        &["delete", "m", "base"],
        &["revert", "m", "base", "--yes"],
        &["domain", "remove", "m", "--flatten", "--yes"],
        &["drift", "m"],
    ] {
        let said = refused(&copy, args);
        assert!(said.contains(state) && said.contains("copy"), "{args:?}: {said}");
    }
    assert_eq!(names(&single.program), acknowledged);
    assert_eq!(single.program.run(&["drift", "m"]).code, Some(0));
    // The way out that was told: from then on the machine is the copy's, with all its snapshots.
    single.program.json(0, &["domain", "remove", "m", "--metadata"]);
    copy.json(0, &["create", "m", "after"]);
    acknowledged.insert("after".to_owned());
    assert_eq!(names(&copy), acknowledged);
}

#[test]
fn h1_of_two_first_snapshots_at_once_none_that_was_acknowledged_is_lost() {
    for turn in 0..3 {
        let single = Single::new("");
        single.add();
        single.write("0 64k", 5);
        let copy = copy_of(&single, "B");
        let both = [&single.program, &copy];
        let made = [begun(both[0], &["create", "m", "mine"]), begun(both[1], &["create", "m", "mine"])];
        let made = made.map(succeeded);
        assert_eq!(made.iter().filter(|made| **made).count(), 1, "turn {turn}: {made:?}");
        for (program, made) in both.into_iter().zip(made) {
            assert_eq!(names(program).contains("mine"), made, "turn {turn}");
            let open = program.json(0, &["op", "list", "--open"]);
            assert_eq!(open["operations"].as_array().map(Vec::len), Some(0), "turn {turn}: {open}");
        }
        reads(&single.image, "0 64k", 5);
    }
}

#[test]
fn h_a_state_that_was_moved_goes_on() {
    let single = Single::new("");
    single.add();
    single.program.json(0, &["create", "m", "one"]);
    let moved = single.beside("elsewhere");
    fs::rename(&single.program.state, &moved).expect("moved");
    let program = Program::new(&moved);
    program.json(0, &["create", "m", "two"]);
    assert_eq!(names(&program), BTreeSet::from(["one".to_owned(), "two".to_owned()]));
}

#[test]
fn h_a_restored_copy_goes_on_where_the_state_that_was_ahead_is_gone() {
    let single = Single::new("");
    single.add();
    single.program.json(0, &["create", "m", "one"]);
    let copy = copy_of(&single, "B");
    single.program.json(0, &["create", "m", "two"]);
    fs::remove_dir_all(&single.program.state).expect("removed");
    copy.json(0, &["create", "m", "three"]);
    assert_eq!(names(&copy), ["one", "two", "three"].map(str::to_owned).into());
}

/// Registers `image` as `m`.
fn added(program: &Program, image: &Path) -> Ran {
    let disk = format!("vda={}", text(image));
    program.run(&["domain", "add", "m", "--driver", "qemu", "--disk", &disk, "--json"])
}

#[test]
fn h2_an_image_of_another_states_machine_is_refused_with_who_has_it() {
    let single = Single::new("");
    single.add();
    single.write("0 64k", 3);
    single.program.json(0, &["create", "m", "base"]);
    let active = single.active();
    let other = Program::new(single.beside("other"));
    let above = single.beside("above.qcow2");
    overlay(&active, &above);
    for image in [&single.image, &active, &above] {
        let ran = added(&other, image);
        assert_eq!(ran.code, Some(4), "{ran:?}");
        let said = ran.stdout;
        assert!(said.contains(text(&single.program.state)) && said.contains("'m'"), "{said}");
    }
    fs::remove_file(&above).expect("removed");
    assert_eq!(single.active(), active);
    single.program.json(0, &["create", "m", "next"]);
    // Once it was let go of there it comes here, with its snapshots.
    single.program.json(0, &["domain", "remove", "m", "--metadata"]);
    let added = added(&other, &single.image).json();
    assert!(added["notes"].to_string().contains("'base'"), "{added}");
    other.json(0, &["create", "m", "here"]);
    assert_eq!(names(&other), ["base", "next", "here"].map(str::to_owned).into());
    reads(&single.image, "0 64k", 3);
}

#[test]
fn h5_a_machine_that_the_log_does_not_know_comes_back_with_its_snapshots() {
    let single = Single::new("");
    single.add();
    for (number, name) in ["one", "two", "three"].into_iter().enumerate() {
        single.write("0 64k", u8::try_from(number + 1).expect("few"));
        single.program.json(0, &["create", "m", name, "--label", "tier=gold"]);
    }
    single.program.json(0, &["delete", "m", "two", "--defer"]);
    single.write("0 64k", 9);
    fs::remove_dir_all(&single.program.state).expect("removed");
    let added = single.add();
    assert!(added["notes"].to_string().contains("2 snapshots: 'one', 'three'"), "{added}");
    assert_eq!(names(&single.program), ["one", "three"].map(str::to_owned).into());
    let three = single.program.json(0, &["show", "m", "three"]);
    assert_eq!(three["labels"]["tier"], "gold");
    assert_eq!(single.program.run(&["drift", "m"]).code, Some(0), "{}", single.drift());
    let log = single.program.run(&["log", "m"]).stdout;
    assert!(log.contains("took over what is kept beside the layers of the machine"), "{log}");
    reads(&single.image, "0 64k", 9);
    single.program.json(0, &["revert", "m", "one"]);
    reads(&single.image, "0 64k", 1);
    single.program.json(0, &["reconcile", "m"]);
    assert_eq!(single.program.json(0, &["audit", "verify"])["ok"], true);
}

#[test]
fn h_a_machine_whose_path_was_kept_comes_back_too() {
    let single = Single::new("");
    let disk = format!("vda={}", text(&single.image));
    let args = ["domain", "add", "m", "--driver", "qemu", "--disk", &disk, "--keep-path"];
    single.program.json(0, &args);
    single.program.json(0, &["create", "m", "one"]);
    fs::remove_dir_all(&single.program.state).expect("removed");
    single.add();
    assert_eq!(names(&single.program), ["one"].map(str::to_owned).into());
    single.program.json(0, &["create", "m", "two"]);
    single.program.json(0, &["delete", "m", "one"]);
    assert_eq!(single.program.run(&["drift", "m"]).code, Some(0), "{}", single.drift());
}

#[test]
fn h_a_machine_comes_back_with_all_its_disks_or_not_at_all() {
    let single = Single::new("");
    let second = single.beside("e.qcow2");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", text(&second), "16M"]);
    let disks = [format!("vda={}", text(&single.image)), format!("vdb={}", text(&second))];
    let both = ["domain", "add", "m", "--driver", "qemu", "--disk", &disks[0], "--disk", &disks[1]];
    single.program.json(0, &both);
    single.program.json(0, &["create", "m", "one"]);
    fs::remove_dir_all(&single.program.state).expect("removed");
    let said = single.refused(&["domain", "add", "m", "--driver", "qemu", "--disk", &disks[0]]);
    assert!(said.contains("--disk vda=FILE --disk vdb=FILE"), "{said}");
    single.program.json(0, &both);
    assert_eq!(names(&single.program), ["one"].map(str::to_owned).into());
}
