//! Images that nobody closed.

use std::os::unix::fs::FileExt;
use std::process::Command;

use snaptree_tests::images::{text, tool};

use super::{Single, reads};

/// An image with late counts whose writer was killed.
fn unclosed() -> Single {
    let single = Single::new("lazy_refcounts=on");
    let ended = Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", "write -P 5 0 1M", "-c", "sigraise 9", text(&single.image)])
        .output()
        .expect("qemu-io starts");
    assert!(!ended.status.success(), "it was killed");
    assert!(
        !Command::new("qemu-img")
            .args(["check", text(&single.image)])
            .output()
            .expect("it starts")
            .status
            .success()
    );
    single
}

#[test]
fn d4_an_image_that_was_not_closed_is_no_damaged_one() {
    let single = unclosed();
    let added = single.add();
    assert!(added["notes"].to_string().contains("was not closed"), "{added}");
    single.program.json(0, &["create", "m", "s1"]);
    single.write("2M 64k", 2);
    reads(&single.image, "0 1M", 5);
    single.program.json(0, &["delete", "m", "s1", "--yes"]);
    reads(&single.image, "0 1M", 5);
    reads(&single.image, "2M 64k", 2);
    tool("qemu-img", &["check", text(&single.image)]);
}

#[test]
fn d4_it_is_mended_at_once_where_that_is_asked_for() {
    let single = unclosed();
    let disk = format!("vda={}", text(&single.image));
    single.program.json(0, &["domain", "add", "m", "--driver", "qemu", "--disk", &disk, "--repair"]);
    tool("qemu-img", &["check", text(&single.image)]);
    reads(&single.image, "0 1M", 5);
}

#[test]
fn d_an_image_that_was_not_closed_and_is_damaged_as_well_is_refused() {
    let single = unclosed();
    // The second cluster of the disk is made the first one's, too.
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&single.image).expect("opened");
    let word = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).expect("read");
        u64::from_be_bytes(bytes) & 0x00ff_ffff_ffff_fe00
    };
    let second_table = word(word(40));
    let mut entry = [0; 8];
    file.read_exact_at(&mut entry, second_table).expect("read");
    file.write_all_at(&entry, second_table + 8).expect("written");
    // Whoever has an image open for writing uses it, and it is not looked through then.
    drop(file);
    let disk = format!("vda={}", text(&single.image));
    let said = single.refused(&["domain", "add", "m", "--driver", "qemu", "--disk", &disk]);
    assert!(said.contains("damaged"), "{said}");
}
