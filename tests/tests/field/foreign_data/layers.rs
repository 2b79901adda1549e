//! D3: a machine that was let go of with its layers, and is registered again.

use std::fs;

use snaptree_tests::images::{chain, text};

use super::{Single, reads};

/// With one snapshot, let go of with everything as it is.
fn let_go() -> Single {
    let single = Single::new("");
    single.add();
    single.write("0 64k", 1);
    single.program.json(0, &["create", "m", "s1"]);
    single.write("64k 64k", 2);
    single.program.json(0, &["domain", "remove", "m", "--keep-layers"]);
    single
}

#[test]
fn d3_registered_again_and_flattened_it_is_one_plain_image() {
    let single = let_go();
    single.add();
    single.program.json(0, &["create", "m", "s2"]);
    single.write("128k 64k", 3);
    single.program.json(0, &["domain", "remove", "m", "--flatten", "--yes"]);
    assert!(fs::symlink_metadata(&single.image).expect("it is there").is_file(), "it is no link");
    assert_eq!(chain(&single.image).len(), 1, "it stands on nothing");
    assert!(!single.beside(".snaptree").exists(), "nothing is left");
    for (at, pattern) in [("0 64k", 1), ("64k 64k", 2), ("128k 64k", 3), ("192k 64k", 0)] {
        reads(&single.image, at, pattern);
    }
}

#[test]
fn d_a_layer_alone_is_no_machine() {
    let single = let_go();
    let disk = format!("vda={}", text(&single.active()));
    let said = single.refused(&["domain", "add", "m", "--driver", "qemu", "--disk", &disk]);
    assert!(said.contains("layer of machine 'm'") && said.contains("qemu-img convert"), "{said}");
}
