//! Bad input and bad days on real images: each gets a clear error with the right exit code, and changes nothing.

#![cfg(feature = "lab")]
#![allow(clippy::expect_used, reason = "a test")]

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::SystemTime;

use serde_json::Value;
use snaptree_tests::images::{make_qcow2, text, tool};
use snaptree_tests::program::Program;
use snaptree_tests::small::SmallDisk;

/// Every file below a folder, with what tells that it was touched.
fn everything(folder: &Path) -> BTreeMap<PathBuf, (u64, u64, Option<SystemTime>)> {
    let mut found = BTreeMap::new();
    let mut open = vec![folder.to_owned()];
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            let facts = std::fs::symlink_metadata(&path).expect("facts");
            if facts.is_dir() {
                open.push(path);
            } else {
                found.insert(path, (facts.ino(), facts.len(), facts.modified().ok()));
            }
        }
    }
    found
}

fn message(answer: &Value) -> String {
    answer["error"]["message"].as_str().unwrap_or_else(|| panic!("no message in {answer}")).to_owned()
}

fn add(program: &Program, code: i32, name: &str, image: &Path) -> Value {
    let disk = format!("vda={}", text(image));
    program.json(code, &["domain", "add", name, "--driver", "qemu", "--disk", &disk])
}

/// An empty folder for images, and the program.
fn lab() -> (tempfile::TempDir, PathBuf, Program) {
    let folder = tempfile::tempdir().expect("a folder");
    let images = folder.path().join("images");
    std::fs::create_dir(&images).expect("a folder");
    let program = Program::new(folder.path().join("state"));
    (folder, images, program)
}

#[test]
fn images_that_cannot_be_registered_are_refused_and_nothing_changes() {
    let (_folder, images, program) = lab();
    let image = |name: &str| images.join(name);
    make_qcow2(&image("good"));

    std::fs::write(image("garbage"), vec![0x5a; 1 << 20]).expect("a file");
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 3 0 2M", text(&image("good"))]);
    let bytes = std::fs::read(image("good")).expect("the image");
    std::fs::write(image("truncated"), &bytes[..bytes.len() / 2]).expect("a file");
    std::fs::write(image("header-only"), &bytes[..80]).expect("a file");
    let overlay = |name: &str, backing: &str| {
        let backing = image(backing);
        tool(
            "qemu-img",
            &[
                "create",
                "-q",
                "-u",
                "-f",
                "qcow2",
                "-b",
                text(&backing),
                "-F",
                "qcow2",
                text(&image(name)),
                "4M",
            ],
        );
    };
    overlay("orphan", "gone");
    overlay("loop-a", "loop-b");
    overlay("loop-b", "loop-a");
    symlink(image("dangling-target"), image("dangling")).expect("a link");
    make_qcow2(&image("linked"));
    std::fs::hard_link(image("linked"), image("linked-too")).expect("a link");

    // The state directory is made by the first writer; then nothing may change any more.
    make_qcow2(&image("owned"));
    add(&program, 0, "owner", &image("owned"));
    overlay("upon-owned", "owned");
    let before = everything(&images);
    let events = program.json(0, &["audit", "head"]);
    for (name, code, word) in [
        ("missing", 3, "missing"),
        ("garbage", 4, "qcow2"),
        ("truncated", 4, "truncated"),
        ("header-only", 4, "header-only"),
        ("orphan", 4, "gone"),
        ("loop-a", 4, "loop"),
        ("dangling", 3, "dangling"),
        ("linked", 4, "link"),
        ("owned", 4, "owner"),
        ("upon-owned", 4, "owner"),
        (".", 4, "file"),
    ] {
        let refused = add(&program, code, "new", &image(name));
        let message = message(&refused);
        assert!(message.to_lowercase().contains(word), "{name}: {message}");
        println!("{name}: {message}");
    }
    assert_eq!(everything(&images), before);
    assert_eq!(program.json(0, &["audit", "head"]), events);
}

#[test]
fn names_that_break_the_rules_are_refused_and_nothing_changes() {
    let (_folder, images, program) = lab();
    make_qcow2(&images.join("vda"));
    add(&program, 0, "web", &images.join("vda"));
    program.json(0, &["create", "web", "taken"]);
    let before = everything(&images);
    let events = program.json(0, &["audit", "head"]);

    let long = "x".repeat(300);
    let uuid = "0190f7a4-9d4e-7cc0-8f3e-2b5f1c7a9d10";
    for name in ["a/b", ".x", "-x", "", " ", "a\nb", "a\u{1b}[2Jb", long.as_str(), uuid] {
        let ran = program.run(&["create", "web", name, "--json"]);
        assert_eq!(ran.code, Some(2), "{name:?}: {ran:?}");
        assert!(ran.json()["error"]["message"].is_string(), "{name:?}: {ran:?}");
        assert!(!ran.stderr.contains('\u{1b}'), "{name:?}: {ran:?}");
    }
    assert_eq!(program.json(4, &["create", "web", "taken"])["error"]["code"], "exists");
    assert_eq!(program.json(3, &["create", "nowhere", "s"])["error"]["code"], "not-found");
    assert_eq!(program.json(3, &["revert", "web", "nothing"])["error"]["code"], "not-found");
    assert_eq!(program.json(3, &["delete", "web", "taken", "nothing"])["error"]["code"], "not-found");
    assert_eq!(program.json(3, &["show", "web", "nothing"])["error"]["code"], "not-found");
    assert_eq!(everything(&images), before);
    assert_eq!(program.json(0, &["audit", "head"]), events);
}

#[test]
fn a_raw_image_is_refused_unless_it_is_converted() {
    let (_folder, images, program) = lab();
    let image = images.join("vda.raw");
    // Data, a written stretch of zeros, and a hole at the end.
    let data = (0..1_u32 << 20).map(|n| u8::try_from(n / 4096 % 251).expect("a byte"));
    let mut bytes: Vec<u8> = data.chain(std::iter::repeat_n(0, 1 << 20)).collect();
    std::fs::write(&image, &bytes).expect("a raw image");
    bytes.resize(4 << 20, 0);
    let file = std::fs::OpenOptions::new().write(true).open(&image).expect("the image");
    file.set_len(4 << 20).expect("a hole");
    // Whoever has an image open for writing uses it.
    drop(file);
    let refused = add(&program, 4, "web", &image);
    assert!(refused["error"]["hint"].as_str().expect("a hint").contains("--convert"), "{refused}");
    assert_eq!(std::fs::read(&image).expect("the image"), bytes);

    let disk = format!("vda={}", text(&image));
    program.json(0, &["domain", "add", "web", "--driver", "qemu", "--disk", &disk, "--convert"]);
    program.json(0, &["create", "web", "s"]);
    let raw = images.join("read");
    tool("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(&image), text(&raw)]);
    assert_eq!(std::fs::read(&raw).expect("the copy"), bytes);
}

#[test]
fn a_layers_folder_on_another_file_system_is_refused() {
    let (_folder, images, program) = lab();
    let image = images.join("vda");
    make_qcow2(&image);
    let elsewhere = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
    let disk = format!("vda={}", text(&image));
    let args = ["domain", "add", "web", "--driver", "qemu", "--disk", &disk, "--layers"];
    let refused = program.json(4, &[&args[..], &[text(elsewhere.path())]].concat());
    assert!(message(&refused).contains("file system"), "{refused}");
}

#[test]
fn a_layer_that_somebody_wrote_is_drift_and_blocks() {
    let (_folder, images, program) = lab();
    let image = images.join("vda");
    make_qcow2(&image);
    add(&program, 0, "web", &image);
    program.json(0, &["create", "web", "one"]);
    let shown = program.json(0, &["show", "web", "one"]);
    let frozen = shown["disks"][0]["file"].as_str().expect("a file").to_owned();
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 9 0 64k", &frozen]);
    let refused = program.json(4, &["create", "web", "two"]);
    assert_eq!(refused["error"]["code"], "drift", "{refused}");
    assert!(message(&refused).contains(&frozen), "{refused}");
    let layers = Path::new(&frozen).parent().expect("the layers folder");
    std::fs::write(layers.join("foreign.qcow2"), "not ours").expect("a foreign file");
    let found = program.json(5, &["drift", "web"]);
    let findings = found["domains"][0]["findings"].as_array().expect("findings");
    let words: Vec<&str> = findings.iter().filter_map(|finding| finding["finding"].as_str()).collect();
    assert_eq!(words, ["layer-written", "file-found"], "{found}");
    assert!(layers.join("foreign.qcow2").exists(), "nothing foreign is ever deleted");
    assert_eq!(program.json(0, &["list", "web"])["current"], "one");
}

#[test]
fn a_full_disk_fails_the_create_and_leaves_everything_as_it_was() {
    let (folder, _, program) = lab();
    let program = program.with_settings(&folder.path().join("settings"), "[space]\nmargin = 0\n");
    let small = SmallDisk::mount(&folder.path().join("small"), "2M");
    let image = small.path().join("vda");
    make_qcow2(&image);
    add(&program, 0, "web", &image);
    program.json(0, &["create", "web", "one"]);
    small.fill(0);
    let before = everything(small.path());

    let answer = program.run(&["create", "web", "two", "--json"]);
    assert!(matches!(answer.code, Some(1 | 4)), "{answer:?}");
    assert_eq!(answer.json()["error"]["code"], "no-space", "{answer:?}");
    let after = everything(small.path());
    assert_eq!(after.keys().collect::<Vec<_>>(), before.keys().collect::<Vec<_>>());
    assert_eq!(program.json(0, &["list", "web"])["current"], "one");

    small.empty();
    program.json(0, &["create", "web", "two"]);
}

#[test]
fn a_read_only_state_can_be_read_and_is_not_written() {
    let folder = tempfile::tempdir().expect("a folder");
    let small = SmallDisk::mount(&folder.path().join("state"), "8M");
    let program = Program::new(small.path());
    program.json(0, &["domain", "add", "web", "--driver", "sim"]);
    program.json(0, &["create", "web", "one"]);
    tool("mount", &["-o", "remount,ro", text(small.path())]);
    assert_eq!(program.json(0, &["list", "web"])["current"], "one");
    let refused = program.run(&["create", "web", "two", "--json"]);
    assert!(matches!(refused.code, Some(1 | 4)), "{refused:?}");
    assert!(message(&refused.json()).contains("read-only"), "{refused:?}");
}

#[test]
fn a_state_of_a_newer_version_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = Program::new(folder.path());
    program.json(0, &["domain", "add", "web", "--driver", "sim"]);
    tool("sqlite3", &[text(&folder.path().join("snaptree.db")), "PRAGMA user_version = 99"]);
    for args in [["list", "web"], ["create", "web"]] {
        let ran = program.run(&[&args[..], &["--json"]].concat());
        assert!(matches!(ran.code, Some(1 | 4)), "{ran:?}");
        assert!(message(&ran.json()).contains("newer"), "{ran:?}");
    }
}

#[test]
fn a_second_process_waits_is_told_who_has_the_state_and_reads_meanwhile() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = Program::new(folder.path());
    program.json(0, &["domain", "add", "web", "--driver", "sim"]);
    let mut first = program
        .with_fault("sim.create.before=stop")
        .command(&["create", "web", "one"])
        .stdout(Stdio::null())
        .spawn()
        .expect("it starts");
    snaptree_tests::program::wait_until_stopped(first.id());

    assert_eq!(program.json(0, &["list", "web"])["current"], Value::Null);
    let refused = program.json(4, &["create", "web", "two", "--lock-timeout", "1"]);
    assert!(message(&refused).contains(&first.id().to_string()), "{refused}");
    tool("kill", &["-CONT", &first.id().to_string()]);
    assert!(first.wait().expect("it ends").success());
    program.json(0, &["create", "web", "two"]);
    assert_eq!(program.json(0, &["list", "web"])["snapshots"].as_array().expect("snapshots").len(), 2);
}

#[test]
fn the_log_cannot_be_changed_by_the_shell_and_read_models_can_be_dropped() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = Program::new(folder.path());
    let database = folder.path().join("snaptree.db");
    program.json(0, &["domain", "add", "web", "--driver", "sim"]);
    for name in ["one", "two", "three"] {
        program.json(0, &["create", "web", name]);
    }
    program.json(0, &["revert", "web", "one"]);
    program.json(0, &["delete", "web", "two"]);
    for statement in [
        "UPDATE events SET actor = 'user:mallory'",
        "DELETE FROM events",
        "DELETE FROM events WHERE seq = (SELECT max(seq) FROM events)",
        "INSERT OR REPLACE INTO events SELECT * FROM events WHERE seq = 2",
    ] {
        let output =
            Command::new("sqlite3").arg(&database).arg(statement).output().expect("the shell starts");
        assert!(!output.status.success(), "{statement} was accepted");
    }
    assert_eq!(program.json(0, &["audit", "verify"])["ok"], true);

    let answers = || -> Vec<String> {
        let questions: [&[&str]; 7] = [
            &["list", "web"],
            &["show", "web", "three"],
            &["domain", "list"],
            &["domain", "show", "web"],
            &["op", "list"],
            &["log"],
            &["list", "web", "--at", "seq:12"],
        ];
        questions.iter().map(|args| program.run(&[args, &["--json"][..]].concat()).stdout).collect()
    };
    let before = answers();
    let tables = "SELECT name FROM sqlite_master WHERE type = 'table' \
                  AND name IN ('checkpoints','read_model','domains','snapshots','operations')";
    let names = tool("sqlite3", &[text(&database), tables]).stdout;
    let names = String::from_utf8(names).expect("names");
    assert_eq!(names.lines().count(), 5, "{names}");
    for name in names.lines() {
        tool("sqlite3", &[text(&database), &format!("DROP TABLE {name}")]);
        assert_eq!(answers(), before, "after {name} was dropped");
    }
    // A writer makes them again.
    program.json(0, &["create", "web", "four"]);
    assert_eq!(program.json(0, &["list", "web"])["current"], "four");
    let rows = tool("sqlite3", &[text(&database), "SELECT count(*) FROM snapshots WHERE deleted_at IS NULL"]);
    assert_eq!(String::from_utf8(rows.stdout).expect("a number").trim(), "3");
}
