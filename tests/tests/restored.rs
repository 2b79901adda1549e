//! A database that was put back from an older copy, on real images: what is kept beside the layers is taken over first.

#![cfg(feature = "lab")]
#![allow(clippy::expect_used, reason = "a test")]

use std::path::Path;

use serde_json::{Value, json};
use snaptree_tests::kept::KeptLog;
use snaptree_tests::lab::Lab;

/// What the images are: everything in the layers folder and the registered paths.
fn images(lab: &Lab) -> Vec<(std::path::PathBuf, u64, std::time::SystemTime)> {
    let folder = std::fs::read_dir(&lab.layers).into_iter().flatten();
    let mut found: Vec<_> = folder.map(|entry| entry.expect("an entry").path()).collect();
    found.extend(lab.paths.values().cloned());
    found.sort();
    let facts = |path: &Path| {
        let facts = std::fs::symlink_metadata(path).expect("facts");
        (path.to_owned(), facts.len(), facts.modified().expect("a time"))
    };
    found.iter().map(|path| facts(path)).collect()
}

fn restored(lab: &Lab) -> Vec<Value> {
    let log = lab.program.run(&["log", "web", "--kind", "System.Restored", "--json"]).stdout;
    log.lines().map(|line| serde_json::from_str(line).expect("an event")).collect()
}

/// The story of the test; after each act a copy of the database is kept.
fn acts(lab: &mut Lab, copies: &mut Vec<KeptLog>) {
    let run = |lab: &Lab, args: &[&str]| {
        lab.program.json(0, args);
    };
    copies.push(KeptLog::of(&lab.program.state));
    for (index, name) in ["one", "two", "three"].into_iter().enumerate() {
        lab.write("vda", index * 3, 4, u8::try_from(index + 1).expect("small"));
        run(lab, &["create", "web", name, "--description", name, "--label", "tier=gold"]);
        lab.model.create(name, &["vda", "vdb"]);
        copies.push(KeptLog::of(&lab.program.state));
    }
    run(lab, &["revert", "web", "one"]);
    lab.model.revert("one");
    copies.push(KeptLog::of(&lab.program.state));
    lab.write("vdb", 7, 9, 9);
    run(lab, &["create", "web", "side"]);
    lab.model.create("side", &["vda", "vdb"]);
    copies.push(KeptLog::of(&lab.program.state));
    run(lab, &["hold", "web", "side", "--reason", "kept"]);
    // Two dependants and no copying: the tombstone stays.
    run(lab, &["delete", "web", "one", "--defer"]);
    lab.model.delete("one");
    copies.push(KeptLog::of(&lab.program.state));
    run(lab, &["delete", "web", "two"]);
    lab.model.delete("two");
    lab.write("vda", 20, 4, 77);
}

#[test]
fn whatever_copy_is_put_back_the_machine_and_every_snapshot_stay_as_they_are() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut lab = Lab::new(folder.path());
    let mut copies = Vec::new();
    acts(&mut lab, &mut copies);
    let newest = KeptLog::of(&lab.program.state);
    lab.check("before");
    assert!(restored(&lab).is_empty(), "nothing was restored yet");

    for (index, older) in copies.iter().enumerate() {
        let what = format!("copy {index}");
        older.put_back();
        let before = images(&lab);
        lab.program.run(&["list", "web"]);
        lab.program.run(&["drift", "web"]);
        assert_eq!(images(&lab), before, "{what}: looking changes no image");
        let told = restored(&lab);
        assert_eq!(told.len(), 1, "{what}");
        assert_eq!(told[0]["actor"], "engine");
        lab.check(&what);
        let side = lab.program.json(0, &["show", "web", "side"]);
        assert_eq!(side["description"], Value::Null);
        let three = lab.program.json(0, &["show", "web", "three"]);
        assert_eq!((&three["description"], &three["labels"]["tier"]), (&json!("three"), &json!("gold")));
        assert_eq!(lab.program.json(0, &["audit", "verify"])["ok"], true);
        lab.program.json(0, &["drift", "web"]);
        newest.put_back();
    }

    // And life goes on upon it.
    copies[1].put_back();
    lab.program.json(0, &["create", "web", "after"]);
    lab.model.create("after", &["vda", "vdb"]);
    lab.check("a create upon a restored log");
    assert_eq!(lab.program.json(4, &["delete", "web", "side"])["error"]["code"], "held");
    lab.program.json(0, &["revert", "web", "three"]);
    lab.model.revert("three");
    lab.program.json(0, &["reconcile", "web"]);
    lab.check("a revert and merges upon a restored log");
}

#[test]
fn an_operation_that_was_open_in_the_copy_ends_and_is_not_carried_out_a_second_time() {
    for place in ["append.after", "qemu.switch.prepared", "qemu.switch.renamed"] {
        let folder = tempfile::tempdir().expect("a folder");
        let mut lab = Lab::new(folder.path());
        lab.program.json(0, &["create", "web", "one"]);
        lab.model.create("one", &["vda", "vdb"]);
        let ran = lab.program.with_fault(&format!("{place}=kill")).run(&["create", "web", "two"]);
        assert_eq!(ran.code, None, "killed: {ran:?}");
        let older = KeptLog::of(&lab.program.state);
        let open = lab.program.json(0, &["op", "list", "--open"])["operations"][0]["operation"].clone();
        lab.program.json(0, &["recover"]);
        lab.model.create("two", &["vda", "vdb"]);
        lab.program.json(0, &["create", "web", "three"]);
        lab.model.create("three", &["vda", "vdb"]);
        lab.check("before");

        older.put_back();
        lab.program.json(0, &["recover"]);
        lab.check(place);
        let shown = lab.program.json(0, &["op", "show", open.as_str().expect("an id")]);
        assert_eq!(shown["outcome"], "failed", "{shown}");
        assert_eq!(restored(&lab).len(), 1);
        lab.program.json(0, &["create", "web", "four"]);
        lab.model.create("four", &["vda", "vdb"]);
        lab.check("afterwards");
    }
}

#[test]
fn a_manifest_that_the_images_contradict_is_refused_and_nothing_is_touched() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut lab = Lab::new(folder.path());
    lab.program.json(0, &["create", "web", "one"]);
    let older = KeptLog::of(&lab.program.state);
    lab.program.json(0, &["create", "web", "two"]);
    lab.program.json(0, &["create", "web", "three"]);
    older.put_back();
    let path = lab.layers.join("active/manifest.json");
    let good = std::fs::read_to_string(&path).expect("the manifest");
    let manifest: Value = serde_json::from_str(&good).expect("JSON");
    let edited = |edit: &dyn Fn(&mut Value)| {
        let mut manifest = manifest.clone();
        edit(&mut manifest);
        manifest.to_string()
    };
    let outside = good.replace(lab.layers.to_str().expect("a path"), "/etc");
    let ids: Vec<Value> =
        manifest["snapshots"].as_array().expect("snapshots").iter().map(|s| s["id"].clone()).collect();
    for (what, text) in [
        ("a file elsewhere", outside),
        ("a form of tomorrow", edited(&|m| m["format"] = json!(99))),
        ("another generation", edited(&|m| m["layers"]["generation"] = json!("gen-x"))),
        ("a dangling current", edited(&|m| m["current"] = json!("0190f7a4-9d4e-7cc0-8f3e-2b5f1c7a9d10"))),
        (
            "a loop",
            edited(&|m| {
                m["snapshots"][0]["parent"] = ids[1].clone();
                m["snapshots"][1]["parent"] = ids[0].clone();
            }),
        ),
        (
            "a layer upon nothing",
            edited(&|m| {
                for layer in
                    m["layers"]["disks"]["vda"]["layers"].as_object_mut().expect("layers").values_mut()
                {
                    layer["parent"] = json!("vda-0190f7a4-9d4e-7cc0-8f3e-2b5f1c7a9d10");
                }
            }),
        ),
        ("half of it", good[..good.len() / 2].to_owned()),
        ("another domain's", edited(&|m| m["domain"] = json!("0190f7a4-9d4e-7cc0-8f3e-2b5f1c7a9d10"))),
        ("no text", "\u{0}".to_owned()),
    ] {
        std::fs::write(&path, &text).expect("written");
        let before = images(&lab);
        let answer = lab.program.run(&["create", "web", "four", "--json"]);
        assert_eq!(answer.code, Some(4), "{what}: {answer:?}");
        assert_eq!(answer.json()["error"]["code"], "drift", "{what}: {answer:?}");
        assert_eq!(images(&lab), before, "{what}");
    }
    std::fs::write(&path, &good).expect("written");
    for name in ["one", "two", "three"] {
        lab.model.create(name, &["vda", "vdb"]);
    }
    lab.program.json(0, &["create", "web", "four"]);
    lab.model.create("four", &["vda", "vdb"]);
    lab.check("with the manifest as it was");
}
