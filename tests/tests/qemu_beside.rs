//! A merge that needs attention, on real images: what touches other layers goes on beside it.

#![cfg(feature = "lab")]
#![allow(clippy::expect_used, reason = "a test")]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde_json::Value;
use snaptree_tests::lab::Lab;

/// A folder whose `qemu-img` fails whenever it is to rebase, and is the real one otherwise.
fn no_rebase(folder: &Path) -> PathBuf {
    let real = String::from_utf8(snaptree_tests::images::tool("sh", &["-c", "command -v qemu-img"]).stdout);
    let bin = folder.join("bin");
    std::fs::create_dir_all(&bin).expect("a folder");
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = rebase ] && {{ echo 'qemu-img: not today' >&2; exit 1; }}\nexec {} \"$@\"\n",
        real.expect("a path").trim()
    );
    let file = bin.join("qemu-img");
    std::fs::write(&file, script).expect("written");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).expect("made executable");
    bin
}

fn run_with(lab: &Lab, bin: &Path, args: &[&str]) -> (Option<i32>, Value) {
    let path = std::env::var("PATH").expect("a path");
    let output = lab
        .program
        .command(&[args, &["--json"]].concat())
        .env("PATH", format!("{}:{path}", bin.display()))
        .output()
        .expect("the program starts");
    (output.status.code(), serde_json::from_slice(&output.stdout).expect("JSON"))
}

#[test]
fn what_touches_other_layers_goes_on_beside_a_merge_that_needs_attention() {
    let folder = tempfile::tempdir().expect("a folder");
    let bin = no_rebase(folder.path());
    let mut lab = Lab::with_disks(folder.path(), &["vda"]);
    let disks = ["vda"];
    let story: [(&str, Option<&str>); 5] =
        [("base", None), ("one", None), ("two", None), ("side", Some("one")), ("free", Some("base"))];
    for (index, (name, from)) in story.into_iter().enumerate() {
        if let Some(from) = from {
            lab.program.json(0, &["revert", "web", from]);
            lab.model.revert(from);
        }
        lab.write("vda", index * 4, 6, u8::try_from(index + 1).expect("small"));
        lab.program.json(0, &["create", "web", name]);
        lab.model.create(name, &disks);
    }
    // `one` goes into `two` and `side`; the machine stands on `free`, beside both.
    let ran = lab.program.with_fault("qemu.pull.pulled=kill").run(&["delete", "web", "one"]);
    assert_eq!(ran.code, None, "killed in the first pull: {ran:?}");
    lab.model.delete("one");
    let (code, recovered) = run_with(&lab, &bin, &["recover"]);
    assert_eq!(code, Some(5), "{recovered}");
    let stuck = recovered["operations"][0]["operation"].as_str().expect("an id").to_owned();
    assert_eq!(recovered["operations"][0]["outcome"], "needs-attention", "{recovered}");

    lab.write("vda", 40, 4, 99);
    lab.program.json(0, &["create", "web", "beside"]);
    lab.model.create("beside", &disks);
    lab.program.json(0, &["revert", "web", "free"]);
    lab.model.revert("free");
    lab.program.json(0, &["delete", "web", "beside"]);
    lab.model.delete("beside");
    let pulled = lab.program.json(0, &["op", "show", &stuck])["steps"][0]["name"].to_string();
    let hit: Vec<&str> = ["two", "side"]
        .into_iter()
        .filter(|name| {
            let refused = lab.program.run(&["revert", "web", name, "--json"]);
            if refused.code == Some(0) {
                lab.model.revert(name);
                return false;
            }
            assert_eq!(refused.code, Some(4), "{refused:?}");
            assert_eq!(refused.json()["error"]["code"], "needs-attention", "{refused:?}");
            true
        })
        .collect();
    assert_eq!(hit.len(), 1, "only the layer that is being pulled into is kept: {hit:?}, {pulled}");

    // With the real tool it can be settled; its plan is of before the others' switches, so it goes back, and the merge
    // is planned anew.
    lab.program.run(&["op", "retry", &stuck, "--json"]);
    lab.program.json(0, &["reconcile", "web"]);
    let open = lab.program.json(0, &["op", "list", "--open"]);
    assert_eq!(open["operations"], serde_json::json!([]));
    lab.check("after the retry");
    for name in hit {
        lab.program.json(0, &["revert", "web", name]);
        lab.model.revert(name);
    }
    lab.check("at last");
    let shown = lab.program.json(0, &["list", "web", "--all"]);
    assert!(!shown.to_string().contains("tombstone\":true"), "nothing is left to merge: {shown}");
}

#[test]
fn what_an_abandoned_pull_left_half_unlinked_is_known_and_the_rest_is_removed_later() {
    abandoned_in_the_middle_of_unlinking([6, 6, 6]);
}

#[test]
fn what_an_abandoned_push_left_half_unlinked_is_known_and_the_rest_is_removed_later() {
    // What is deleted is large and what stands upon it small, so that one goes down.
    abandoned_in_the_middle_of_unlinking([6, 100, 1]);
}

/// Each snapshot has written so many blocks of both disks before it.
fn abandoned_in_the_middle_of_unlinking(blocks: [usize; 3]) {
    let folder = tempfile::tempdir().expect("a folder");
    let mut lab = Lab::new(folder.path());
    for (index, name) in ["base", "one", "two"].into_iter().enumerate() {
        lab.write("vda", index * 4, blocks[index], u8::try_from(index + 1).expect("small"));
        lab.write("vdb", index * 4, blocks[index], u8::try_from(index + 1).expect("small"));
        lab.program.json(0, &["create", "web", name]);
        lab.model.create(name, &["vda", "vdb"]);
    }
    let images = |lab: &Lab| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(&lab.layers).expect("the layers folder");
        let paths = entries.map(|entry| entry.expect("an entry").path());
        paths.filter(|path| path.extension().is_some_and(|end| end == "qcow2")).collect()
    };
    let ran = lab.program.with_fault("qemu.drop.checked=kill").run(&["delete", "web", "one"]);
    assert_eq!(ran.code, None, "killed before the first is unlinked: {ran:?}");
    lab.model.delete("one");
    let open = lab.program.json(0, &["op", "list", "--open"])["operations"][0]["operation"].clone();
    let merge = open.as_str().expect("an open merge").to_owned();
    // The two that are to go are the ones that no header and no link names any more.
    let mut named: Vec<PathBuf> =
        lab.paths.values().map(|path| std::fs::canonicalize(path).expect("a disk")).collect();
    for image in images(&lab) {
        let facts = snaptree_tests::images::tool(
            "qemu-img",
            &["info", "--output=json", image.to_str().expect("a path")],
        );
        let facts: Value = serde_json::from_slice(&facts.stdout).expect("JSON");
        named.extend(facts["full-backing-filename"].as_str().map(PathBuf::from));
    }
    let going: Vec<PathBuf> = images(&lab).into_iter().filter(|image| !named.contains(image)).collect();
    assert_eq!(going.len(), 2, "{going:?}");
    // One is gone, and another file stands in the place of the other.
    std::fs::remove_file(&going[0]).expect("removed");
    let aside = folder.path().join("aside");
    std::fs::rename(&going[1], &aside).expect("moved");
    std::fs::copy(&aside, &going[1]).expect("a copy");
    assert_eq!(lab.program.json(5, &["recover"])["operations"][0]["outcome"], "needs-attention");

    let ended = lab.program.run(&["op", "resolve", &merge, "--abandon", "--reason", "seen to", "--json"]);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    std::fs::rename(&aside, &going[1]).expect("moved back");
    lab.program.json(0, &["reconcile", "web"]);
    lab.check("after the rest was removed");
    assert!(!going[1].exists(), "nothing is left behind");
    lab.program.json(0, &["create", "web", "three"]);
    lab.model.create("three", &["vda", "vdb"]);
    lab.check("and life goes on");
}
