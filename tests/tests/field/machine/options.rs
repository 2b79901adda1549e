//! How disks are written, before and after what is done under them.

use serde_json::{Value, json};

use super::rig::{DRIVE, Rig};

/// A drive whose cache the firmware leaves alone.
const IDE: &str = "-drive file={vda},format={vda.format},if=ide";

/// Ways to have a disk, each with options that a layer which takes its place has to have, too. The first are tried by
/// every run, all of them with `SNAPTREE_OPTIONS=all`.
const WAYS: [(&str, &str); 18] = [
    ("all at once", "{drive},discard=unmap,cache=none,detect-zeroes=unmap,aio=native"),
    (
        "as libvirt has it",
        "-blockdev driver=file,node-name=f,filename={vda},discard=unmap,cache.direct=on,aio=native \
         -blockdev driver={vda.format},node-name=d,file=f,discard=unmap,detect-zeroes=unmap,cache.direct=on \
         -device virtio-blk-pci,drive=d",
    ),
    (
        "throttled by a filter",
        "-object throttle-group,id=g,x-bps-total=100000000 -blockdev driver=throttle,node-name=t,throttle-group=g,\
         file.driver={vda.format},file.node-name=d,file.discard=unmap,file.file.driver=file,file.file.filename={vda} \
         -device virtio-blk-pci,drive=t",
    ),
    ("nothing said", "{drive}"),
    ("discard=unmap", "{drive},discard=unmap"),
    ("discard=ignore", "{drive},discard=ignore"),
    ("detect-zeroes=on", "{drive},detect-zeroes=on"),
    ("detect-zeroes=unmap", "{drive},detect-zeroes=unmap,discard=unmap"),
    ("cache=none", "{drive},cache=none"),
    ("cache=directsync", "{drive},cache=directsync"),
    ("cache=unsafe", "{drive},cache=unsafe"),
    ("cache=writethrough", "{drive},cache=writethrough"),
    ("aio=native", "{drive},aio=native,cache.direct=on"),
    ("aio=io_uring", "{drive},aio=io_uring"),
    ("throttling", "{drive},throttling.bps-total=50000000,throttling.iops-read=5000,throttling.group=g"),
    ("errors", "{drive},werror=stop,rerror=report"),
    (
        "a copy-on-read filter",
        "-blockdev driver=copy-on-read,node-name=c,file.driver={vda.format},file.node-name=d,\
         file.detect-zeroes=on,file.file.driver=file,file.file.filename={vda} -device virtio-blk-pci,drive=c",
    ),
    (
        "a thread of its own",
        "-object iothread,id=i -drive file={vda},format={vda.format},if=none,id=x,discard=unmap,cache=none \
         -device virtio-blk-pci,drive=x,iothread=i",
    ),
];

fn same(way: &str, when: &str, rig: &Rig, before: &[Value]) {
    let (before, after) = (json!(before), json!(rig.written_how()));
    assert_eq!(before, after, "{way}, {when}");
}

/// Create, merge into the child, merge of what is written into the layer below, revert, restart, and a merge into a layer
/// that QEMU opened by itself.
fn stays_as_it_was(way: &str, drives: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    let rig = Rig::started(folder.path(), &drives.replace("{drive}", IDE));
    let before = rig.written_how();
    assert_eq!(before.len(), 1, "{before:?}");
    let run = |args: &[&str]| rig.program.json(0, args);
    run(&["create", "web", "s1"]);
    same(way, "after a create", &rig, &before);
    run(&["create", "web", "s2"]);
    run(&["create", "web", "s3"]);
    same(way, "after three", &rig, &before);
    let merged = run(&["delete", "web", "s2", "--now"]);
    assert_eq!(merged["merges"][0]["outcome"], "succeeded", "{merged}");
    same(way, "after a merge", &rig, &before);
    let merged = run(&["delete", "web", "s3", "--now"]);
    assert_eq!(merged["merges"][0]["outcome"], "succeeded", "{merged}");
    same(way, "after a merge of what is written", &rig, &before);
    run(&["revert", "web", "s1", "--running"]);
    same(way, "after a revert", &rig, &before);
    run(&["create", "web", "s4"]);
    run(&["domain", "stop", "web", "--force"]);
    run(&["domain", "start", "web"]);
    same(way, "after a restart", &rig, &before);
    let merged = run(&["delete", "web", "s4", "--now"]);
    assert_eq!(merged["merges"][0]["outcome"], "succeeded", "{merged}");
    same(way, "after a merge into what QEMU opened", &rig, &before);
}

#[test]
fn m2_drive_options_survive_create_merge_revert_and_restart() {
    let ways: usize =
        if std::env::var("SNAPTREE_OPTIONS").is_ok_and(|all| all == "all") { WAYS.len() } else { 3 };
    let begun = std::time::Instant::now();
    for (way, drives) in &WAYS[..ways] {
        stays_as_it_was(way, drives);
    }
    println!("{ways} ways to have a disk, six looks at each: {:.1} s", begun.elapsed().as_secs_f64());
}

#[test]
fn m2_a_discard_of_the_guest_frees_space_after_a_create() {
    let folder = tempfile::tempdir().expect("a folder");
    let rig = Rig::started(folder.path(), &format!("{DRIVE},discard=unmap,id=x"));
    rig.program.json(0, &["create", "web", "s1"]);
    let active = std::fs::canonicalize(&rig.image).expect("the active layer");
    let occupied = || {
        use std::os::unix::fs::MetadataExt as _;
        std::fs::metadata(&active).expect("the layer").blocks() * 512
    };
    let hmp = |words: &str| {
        let line = format!("qemu-io x \"{words}\"");
        rig.ask("human-monitor-command", json!({ "command-line": line })).expect("HMP");
    };
    hmp("write -P 7 0 8M");
    hmp("flush");
    let full = occupied();
    hmp("discard 0 8M");
    hmp("flush");
    assert!(occupied() + (7 << 20) < full, "{} of {full}", occupied());
}

#[test]
fn m6_a_filter_above_a_disk_hinders_nothing() {
    for (way, drives) in WAYS.iter().filter(|(_, drives)| drives.contains("throttle-group,id")) {
        let folder = tempfile::tempdir().expect("a folder");
        let rig = Rig::started(folder.path(), drives);
        for name in ["s1", "s2"] {
            rig.program.json(0, &["create", "web", name]);
        }
        rig.program.json(0, &["create", "web", "m", "--memory"]);
        rig.program.json(0, &["delete", "web", "s2", "--now"]);
        rig.program.json(0, &["revert", "web", "m"]);
        rig.program.json(0, &["revert", "web", "s1"]);
        let drift = rig.program.json(0, &["drift", "web"]);
        assert_eq!(drift["domains"][0]["findings"], json!([]), "{way}: {drift}");
    }
}

#[test]
fn m6_somebody_elses_job_on_a_disk_is_named_and_hinders_only_while_it_is_there() {
    let folder = tempfile::tempdir().expect("a folder");
    Rig::beside(folder.path(), "backup.qcow2", "qcow2", "16M");
    let rig = Rig::started(
        folder.path(),
        &DRIVE.replace("if=virtio", "if=none,id=x,node-name=d -device virtio-blk-pci,drive=d"),
    );
    let file = json!({ "driver": "file", "filename": folder.path().join("backup.qcow2") });
    rig.ask("blockdev-add", json!({ "driver": "qcow2", "node-name": "b", "file": file })).expect("a node");
    for (job, arguments) in [
        ("blockdev-backup", json!({ "job-id": "nightly", "device": "d", "target": "b", "sync": "none" })),
        (
            "blockdev-mirror",
            json!({ "job-id": "move", "device": "d", "target": "b", "sync": "full", "speed": 1 }),
        ),
    ] {
        rig.ask(job, arguments.clone()).expect("the job begins");
        let id = arguments["job-id"].as_str().expect("its id");
        let refused = rig.program.json(4, &["create", "web", id]);
        let error = refused["error"].to_string();
        assert!(error.contains(&format!("'{id}'")) && error.contains("block-job-cancel"), "{error}");
        rig.ask("block-job-cancel", json!({ "device": id, "force": true })).expect("it is told to end");
        while rig.ask("query-jobs", Value::Null).expect("jobs") != json!([]) {
            std::thread::yield_now();
        }
    }
    rig.program.json(0, &["create", "web", "after"]);
}
