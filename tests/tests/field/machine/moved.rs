//! M7: the folder of a machine is copied, or moved.

#![cfg(feature = "lab")]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use snaptree_tests::images::{text, tool};
use snaptree_tests::program::Program;

use crate::foreign_data::{Single, reads, write};

/// A machine in a folder of its own, beside the state.
fn in_folder() -> Single {
    let single = Single::new("");
    let vm = single.beside("vm");
    fs::create_dir(&vm).expect("a folder");
    let image = vm.join("d.qcow2");
    fs::rename(&single.image, &image).expect("moved");
    let Single { folder, program, .. } = single;
    Single { folder, program, image }
}

fn copied(from: &Path, to: &Path) {
    tool("cp", &["-a", text(from), text(to)]);
}

fn with_snapshot() -> Single {
    let single = in_folder();
    single.add();
    single.write("0 64k", 1);
    single.program.json(0, &["create", "m", "s1"]);
    single.write("64k 64k", 2);
    single
}

#[test]
fn m7_what_a_copy_of_the_folder_writes_is_written_to_the_copy() {
    let single = with_snapshot();
    let copy = single.beside("copy");
    copied(&single.beside("vm"), &copy);
    let opened = fs::canonicalize(copy.join("d.qcow2")).expect("it opens");
    assert!(opened.starts_with(fs::canonicalize(&copy).expect("a folder")), "{}", opened.display());
    write(&copy.join("d.qcow2"), "64k 64k", 9);
    reads(&single.image, "64k 64k", 2);
    reads(&copy.join("d.qcow2"), "0 64k", 1);
    // The original goes on, and the copy is told from it.
    single.program.json(0, &["create", "m", "s2"]);
    assert_eq!(single.program.run(&["drift", "m"]).code, Some(0), "{}", single.drift());
    let disk = format!("vda={}", text(&copy.join("d.qcow2")));
    let said = single.refused(&["domain", "add", "c", "--driver", "qemu", "--disk", &disk]);
    assert!(said.contains("machine 'm'") && said.contains("qemu-img convert"), "{said}");
    // In another state just as well.
    let other = Program::new(single.beside("other"));
    let ran = other.run(&["domain", "add", "c", "--driver", "qemu", "--disk", &disk]);
    assert_eq!(ran.code, Some(4), "{ran:?}");
    assert!(ran.stderr.contains("machine 'm'") && ran.stderr.contains("qemu-img convert"), "{ran:?}");
}

#[test]
fn m7_a_machine_with_absolute_links_goes_on_and_gets_relative_ones() {
    let single = with_snapshot();
    let relative = fs::read_link(&single.image).expect("a link");
    assert!(relative.is_relative(), "{}", relative.display());
    let absolute: PathBuf = single.image.parent().expect("a folder").join(&relative);
    fs::remove_file(&single.image).expect("removed");
    symlink(&absolute, &single.image).expect("a link, as it was made before");
    assert_eq!(single.program.run(&["drift", "m"]).code, Some(0), "{}", single.drift());
    single.program.json(0, &["create", "m", "s2"]);
    assert_eq!(fs::read_link(&single.image).expect("a link"), relative);
    reads(&single.image, "64k 64k", 2);
    let disk = fs::read_link(absolute).expect("a link");
    assert!(disk.is_relative(), "{}", disk.display());
}

#[test]
fn m7_a_machine_that_was_moved_is_put_right_by_relocate() {
    let single = with_snapshot();
    single.program.json(0, &["create", "m", "s2"]);
    single.write("128k 64k", 3);
    let (old, new) = (single.beside("vm"), single.beside("vm2"));
    fs::rename(&old, &new).expect("moved");
    let told = single.drift();
    assert!(told.contains("is missing") && told.contains("domain relocate m"), "{told}");
    assert!(single.refused(&["create", "m", "s3"]).contains("domain relocate m"));
    let relocate = ["domain", "relocate", "m", "--from", text(&old), "--to", text(&new), "--yes"];
    let would = single.program.run(&[&relocate[..], &["--dry-run"]].concat());
    assert_eq!(would.code, Some(0), "{would:?}");
    assert_eq!(single.program.run(&["drift", "m"]).code, Some(5), "a dry run does nothing");
    single.program.json(0, &relocate);
    after_the_move(single, &new);
}

/// Everything is as it was, in another place.
fn after_the_move(single: Single, new: &Path) {
    let image = new.join("d.qcow2");
    assert_eq!(single.program.run(&["drift", "m"]).code, Some(0), "{}", single.drift());
    for (at, pattern) in [("0 64k", 1), ("64k 64k", 2), ("128k 64k", 3)] {
        reads(&image, at, pattern);
    }
    let shown = single.program.json(0, &["domain", "show", "m"]);
    assert_eq!(shown["disks"][0]["path"], text(&image));
    assert_eq!(shown["differences"].as_array().map(Vec::len), Some(0), "{shown}");
    single.program.json(0, &["create", "m", "s3"]);
    single.program.json(0, &["revert", "m", "s1"]);
    reads(&image, "64k 64k", 0);
    single.program.json(0, &["delete", "m", "s2"]);
    single.program.json(0, &["domain", "remove", "m", "--flatten", "--yes"]);
    assert!(fs::symlink_metadata(&image).expect("it is there").is_file());
    reads(&image, "0 64k", 1);
    assert_eq!(single.program.json(0, &["audit", "verify"])["ok"], true);
}

#[test]
fn m_a_relocation_that_was_cut_off_is_done_again() {
    for place in ["mend.begun", "mend.done"] {
        let single = with_snapshot();
        single.program.json(0, &["create", "m", "s2"]);
        single.write("128k 64k", 3);
        let (old, new) = (single.beside("vm"), single.beside("vm2"));
        fs::rename(&old, &new).expect("moved");
        let relocate = ["domain", "relocate", "m", "--from", text(&old), "--to", text(&new), "--yes"];
        let killed = single.program.with_fault(&format!("{place}=kill")).run(&relocate);
        assert_eq!(killed.code, None, "{killed:?}");
        single.program.json(0, &relocate);
        after_the_move(single, &new);
    }
}

#[test]
fn m_a_copy_is_not_taken_for_the_machine_that_was_moved() {
    let single = with_snapshot();
    let (old, copy) = (single.beside("vm"), single.beside("copy"));
    copied(&old, &copy);
    let relocate = ["domain", "relocate", "m", "--from", text(&old), "--to", text(&copy), "--yes"];
    let said = single.refused(&relocate);
    assert!(said.contains("is still in") && said.contains("qemu-img convert"), "{said}");
    reads(&single.image, "64k 64k", 2);
}

#[test]
fn m_a_layer_that_was_written_on_the_way_is_not_taken_over() {
    let single = with_snapshot();
    let frozen = single.program.json(0, &["show", "m", "s1"])["disks"][0]["file"].clone();
    let (old, new) = (single.beside("vm"), single.beside("vm2"));
    fs::rename(&old, &new).expect("moved");
    let frozen = PathBuf::from(frozen.as_str().expect("a file"));
    let frozen = new.join(
        frozen
            .strip_prefix(fs::canonicalize(single.folder.path()).expect("a folder").join("vm"))
            .expect("below"),
    );
    write(&frozen, "0 64k", 8);
    let said =
        single.refused(&["domain", "relocate", "m", "--from", text(&old), "--to", text(&new), "--yes"]);
    assert!(said.contains("was written since"), "{said}");
}
