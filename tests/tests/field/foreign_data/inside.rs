//! Snapshots, dirty bitmaps and the layout of an image.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use snaptree_tests::images::{text, tool};

use super::{Single, info, overlay, reads, write};

fn names(image: &Path, list: &str) -> Vec<String> {
    let told = info(image);
    let found = match list {
        "snapshots" => &told["snapshots"],
        _ => &told["format-specific"]["data"]["bitmaps"],
    };
    let name = |entry: &serde_json::Value| entry["name"].as_str().expect("a name").to_owned();
    found.as_array().map(|list| list.iter().map(name).collect()).unwrap_or_default()
}

/// The blocks of 64 KiB that a dirty bitmap has marked, as a backup would read it.
fn marked(image: &Path, bitmap: &str) -> Vec<u64> {
    let folder = tempfile::tempdir().expect("a folder");
    let copy = folder.path().join("copy.qcow2");
    std::fs::copy(image, &copy).expect("a copy");
    let (socket, pid) = (folder.path().join("nbd"), folder.path().join("pid"));
    let args = ["-r", "-t", "--fork", "-f", "qcow2", "-B", bitmap, "-k", text(&socket)];
    tool("qemu-nbd", &[&args[..], &["--pid-file", text(&pid), text(&copy)]].concat());
    let options = format!(
        "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}",
        text(&socket)
    );
    let map = tool("qemu-img", &["map", "--output=json", "--image-opts", &options]);
    let server = std::fs::read_to_string(&pid).expect("its number");
    tool("kill", &[server.trim()]);
    let extents: Vec<serde_json::Value> = serde_json::from_slice(&map.stdout).expect("JSON");
    let dirty = extents.iter().filter(|extent| extent["data"] == false);
    let blocks = dirty.flat_map(|extent| {
        let start = extent["start"].as_u64().expect("a start") / 65_536;
        start..start + extent["length"].as_u64().expect("a length").div_ceil(65_536)
    });
    blocks.collect()
}

#[test]
fn d1_what_an_image_holds_is_there_again_when_the_domain_is_removed() {
    let single = Single::new("cluster_size=4k,lazy_refcounts=on");
    single.write("0 1M", 1);
    tool("qemu-img", &["snapshot", "-c", "golden", text(&single.image)]);
    tool("qemu-img", &["bitmap", "--add", "-g", "65536", text(&single.image), "b0"]);
    let inode = std::fs::metadata(&single.image).expect("there").ino();
    single.add();
    single.program.json(0, &["create", "m", "s1"]);
    single.write("2M 64k", 2);
    single.program.json(0, &["create", "m", "s2"]);
    single.program.json(0, &["revert", "m", "s1", "--yes"]);
    single.write("4M 64k", 3);
    single.program.json(0, &["domain", "remove", "m", "--flatten", "--yes"]);
    assert_eq!(std::fs::symlink_metadata(&single.image).expect("there").ino(), inode, "the same file");
    assert_eq!(names(&single.image, "snapshots"), ["golden"]);
    assert_eq!(names(&single.image, "bitmaps"), ["b0"]);
    assert_eq!(marked(&single.image, "b0"), [64], "what was written since is marked");
    reads(&single.image, "0 1M", 1);
    reads(&single.image, "2M 64k", 0);
    reads(&single.image, "4M 64k", 3);
    tool("qemu-img", &["check", text(&single.image)]);
    // QEMU goes back to no snapshot while there are bitmaps.
    tool("qemu-img", &["bitmap", "--remove", text(&single.image), "b0"]);
    tool("qemu-img", &["snapshot", "-a", "golden", text(&single.image)]);
    reads(&single.image, "4M 64k", 0);
    assert!(!single.beside(".snaptree").exists());
}

#[test]
fn d1_a_copy_is_laid_out_as_the_image_was() {
    let options = "cluster_size=16k,lazy_refcounts=on,extended_l2=on,refcount_bits=32,compression_type=zstd";
    for options in [options, "compat=0.10,cluster_size=512k"] {
        let single = Single::new(options);
        let before = info(&single.image);
        single.add();
        single.program.json(0, &["create", "m", "s1"]);
        single.write("2M 64k", 2);
        single.program.json(0, &["domain", "remove", "m", "--flatten", "--yes"]);
        let after = info(&single.image);
        assert_eq!(after["cluster-size"], before["cluster-size"], "{options}");
        assert_eq!(after["format-specific"], before["format-specific"], "{options}");
        reads(&single.image, "2M 64k", 2);
    }
}

#[test]
fn d_an_image_that_was_allocated_as_a_whole_keeps_its_room_and_one_on_a_relative_base_its_name() {
    let single = Single::new("preallocation=falloc");
    let allocated = std::fs::metadata(&single.image).expect("there").blocks();
    single.add();
    single.program.json(0, &["create", "m", "s1"]);
    single.write("2M 64k", 2);
    single.program.json(0, &["domain", "remove", "m", "--flatten", "--yes"]);
    assert!(std::fs::metadata(&single.image).expect("there").blocks() >= allocated);
    reads(&single.image, "2M 64k", 2);
    // A base that is named by a relative name, of an image that is copied and of one that stays.
    for inside in [false, true] {
        let single = Single::new("");
        std::fs::rename(&single.image, single.beside("golden.qcow2")).expect("moved");
        overlay(Path::new("golden.qcow2"), &single.image);
        if inside {
            tool("qemu-img", &["snapshot", "-c", "own", text(&single.image)]);
        }
        single.add();
        single.program.json(0, &["create", "m", "s1"]);
        single.write("2M 64k", 2);
        single.program.json(0, &["domain", "remove", "m", "--flatten", "--yes"]);
        assert_eq!(info(&single.image)["backing-filename"], "golden.qcow2");
        reads(&single.image, "2M 64k", 2);
    }
}

#[test]
fn d_what_others_keep_in_a_layer_is_given_up_by_name_or_nothing_is_removed() {
    let single = Single::new("");
    single.add();
    single.program.json(0, &["create", "m", "s1"]);
    tool("qemu-img", &["bitmap", "--add", text(&single.image), "b1"]);
    let layer = single.active();
    let said = single.refused(&["domain", "remove", "m", "--flatten", "--yes"]);
    assert!(said.contains("'b1'") && said.contains("--give-up"), "{said}");
    assert_eq!(names(&layer, "bitmaps"), ["b1"]);
    single.program.json(0, &["domain", "remove", "m", "--flatten", "--yes", "--give-up", "b1"]);
    assert!(names(&single.image, "bitmaps").is_empty());
}

#[test]
fn d_a_fold_that_was_cut_off_is_finished_at_each_of_its_moments() {
    for point in ["qemu.fold.begin", "qemu.fold.copied", "qemu.fold.done", "qemu.place.renamed"] {
        let single = Single::new("");
        single.write("0 1M", 1);
        tool("qemu-img", &["snapshot", "-c", "golden", text(&single.image)]);
        single.add();
        single.program.json(0, &["create", "m", "s1"]);
        single.write("2M 64k", 2);
        let killed = single.program.with_fault(&format!("{point}=kill"));
        let ran = killed.run(&["domain", "remove", "m", "--flatten", "--yes"]);
        assert_eq!(ran.code, None, "{point}: {ran:?}");
        reads(&single.image, "2M 64k", 2);
        single.program.json(0, &["recover"]);
        assert!(std::fs::symlink_metadata(&single.image).expect("there").is_file(), "{point}");
        assert_eq!(names(&single.image, "snapshots"), ["golden"], "{point}");
        reads(&single.image, "2M 64k", 2);
    }
}

#[test]
fn d2_a_merge_keeps_the_bitmaps_of_the_layers_and_marks_what_it_moves() {
    let single = Single::new("");
    single.add();
    single.program.json(0, &["create", "m", "s1"]);
    tool("qemu-img", &["bitmap", "--add", text(&single.image), "b0"]);
    single.write("1M 64k", 1);
    let told = single.ended(0, &["create", "m", "s2", "--dry-run"]);
    assert!(told.contains("'b0'"), "a create says what becomes of it: {told}");
    single.program.json(0, &["create", "m", "s2"]);
    tool("qemu-img", &["bitmap", "--add", "--disable", text(&single.image), "b1"]);
    single.write("2M 64k", 2);
    single.program.json(0, &["delete", "m", "s2", "--yes"]);
    assert_eq!(names(&single.active(), "bitmaps"), ["b0", "b1"]);
    assert_eq!(marked(&single.active(), "b0"), [16, 32], "also what was written to the layer above");
    reads(&single.image, "1M 64k", 1);
    reads(&single.image, "2M 64k", 2);
}

#[test]
fn d_a_bitmap_that_no_merge_can_keep_puts_it_off_until_it_is_given_up() {
    let single = Single::new("");
    single.add();
    single.program.json(0, &["create", "m", "s1"]);
    tool("qemu-img", &["bitmap", "--add", text(&single.image), "b0"]);
    single.write("1M 64k", 1);
    single.program.json(0, &["create", "m", "s2"]);
    single.write("2M 64k", 2);
    single.program.json(0, &["create", "m", "a"]);
    single.program.json(0, &["revert", "m", "s2", "--yes"]);
    write(&single.image, "3M 64k", 3);
    // Two layers stand on the one with the bitmap, so its data can only be copied up.
    let plan = single.ended(0, &["delete", "m", "s2", "--yes", "--dry-run"]);
    assert!(plan.contains("'b0'") && plan.contains("--give-up"), "{plan}");
    single.program.json(0, &["delete", "m", "s2", "--yes", "--give-up", "b0"]);
    let layers: Vec<_> = std::fs::read_dir(single.active().parent().expect("a folder"))
        .expect("a folder")
        .flatten()
        .filter(|entry| entry.path().extension().is_some_and(|end| end == "qcow2"))
        .collect();
    assert_eq!(layers.len(), 3, "it was merged: {layers:?}");
    reads(&single.image, "1M 64k", 1);
    reads(&single.image, "3M 64k", 3);
}
