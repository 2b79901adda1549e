//! Media that a machine writes and that are no disks of its domain.

use serde_json::{Value, json};
use snaptree_tests::program::wait_until_stopped;

use super::rig::{DRIVE, Rig};

const EXTRA: &str = "-drive file={folder}/extra.qcow2,format=qcow2,if=virtio";

fn left_out(document: &Value) -> String {
    document["left_out"].as_array().map(|all| all.iter().map(Value::to_string).collect()).unwrap_or_default()
}

#[test]
fn m1_a_snapshot_with_memory_holds_all_that_the_machine_writes_or_is_refused_with_the_names() {
    let folder = tempfile::tempdir().expect("a folder");
    Rig::beside(folder.path(), "extra.qcow2", "qcow2", "1M");
    let rig = Rig::started(folder.path(), &format!("{DRIVE} {EXTRA}"));
    for place in [&["--memory"][..], &["--memory", "--internal"]] {
        let refused = rig.program.json(4, &[&["create", "web", "s1"][..], place].concat());
        let message = refused["error"]["message"].as_str().expect("why");
        assert!(message.contains("/extra.qcow2"), "{message}");
    }
    let planned = rig.program.json(0, &["create", "web", "s1", "--dry-run"]);
    assert!(left_out(&planned).contains("/extra.qcow2"), "{planned}");
    // One of the disks alone is taken, and says so at once and ever after.
    let created = rig.program.json(0, &["create", "web", "s1"]);
    assert!(left_out(&created).contains("/extra.qcow2"), "{created}");
    let shown = rig.program.json(0, &["show", "web", "s1"]);
    assert!(left_out(&shown).contains("/extra.qcow2"), "{shown}");
    let said = rig.program.run(&["create", "web", "s2"]);
    assert!(said.stdout.contains("left out:") && said.stdout.contains("/extra.qcow2"), "{said:?}");
    // Whoever wants it so has it refused.
    let strict =
        rig.program.with_settings(&folder.path().join("config"), "[qemu]\nleft-out-disks = \"refuse\"\n");
    let refused = strict.json(4, &["create", "web", "s3"]);
    let message = refused["error"]["message"].as_str().expect("why");
    assert!(message.contains("/extra.qcow2") && message.contains("left-out-disks"), "{message}");
}

#[test]
fn m_a_floppy_and_the_firmwares_variables_count_and_what_is_only_read_does_not() {
    let folder = tempfile::tempdir().expect("a folder");
    for (name, size) in
        [("cd.raw", "1M"), ("vars.raw", "64K"), ("floppy.raw", "1440K"), ("unused.raw", "64K")]
    {
        Rig::beside(folder.path(), name, "raw", size);
    }
    let drive = |name: &str, how: &str| format!("-drive file={{folder}}/{name}.raw,format=raw,if={how}");
    let read = drive("cd", "ide,media=cdrom,readonly=on");
    let idle = drive("unused", "none,id=unused");
    let rig = Rig::started(folder.path(), &format!("{DRIVE} {read} {idle}"));
    let created = rig.program.json(0, &["create", "web", "s1", "--memory"]);
    assert_eq!(left_out(&created), "", "a CD and a drive without a device are not written");
    drop(rig);

    let folder = tempfile::tempdir().expect("a folder");
    for (name, size) in [("vars.raw", "64K"), ("floppy.raw", "1440K")] {
        Rig::beside(folder.path(), name, "raw", size);
    }
    let rig = Rig::started(
        folder.path(),
        &format!("{DRIVE} {} {}", drive("vars", "pflash"), drive("floppy", "floppy")),
    );
    let refused = rig.program.json(4, &["create", "web", "s1", "--memory"]);
    let message = refused["error"]["message"].as_str().expect("why");
    assert!(message.contains("/vars.raw") && message.contains("/floppy.raw"), "{message}");
}

/// Plugs a disk into a machine.
fn plug(rig: &Rig) {
    let file = json!({ "driver": "file", "filename": rig.folder.join("late.qcow2") });
    rig.ask("blockdev-add", json!({ "driver": "qcow2", "node-name": "late", "file": file })).expect("a node");
    rig.ask("device_add", json!({ "driver": "virtio-blk-pci", "id": "late-disk", "drive": "late" }))
        .expect("a device");
}

#[test]
fn m_a_disk_that_is_plugged_in_between_plan_and_snapshot_is_seen() {
    for (options, code) in [(&["--memory"][..], 4), (&[][..], 0), (&["--memory", "--internal"], 4)] {
        let folder = tempfile::tempdir().expect("a folder");
        Rig::beside(folder.path(), "late.qcow2", "qcow2", "1M");
        let rig = Rig::started(folder.path(), DRIVE);
        let place = if options.len() > 1 { "qemu.save.begin=stop" } else { "qemu.switch.begin=stop" };
        let args = [&["create", "web", "s1", "--json"][..], options].concat();
        let mut command = rig.program.with_fault(place).command(&args);
        let stopped = command.stdout(std::process::Stdio::piped()).spawn().expect("the program starts");
        wait_until_stopped(stopped.id());
        plug(&rig);
        nix_continue(stopped.id());
        let ended = stopped.wait_with_output().expect("the program ends");
        let said = String::from_utf8_lossy(&ended.stdout).into_owned();
        assert!(said.contains("/late.qcow2"), "{options:?}: {said}");
        // Refused while it was carried out: nothing is left of it, and the guest runs.
        assert_eq!(ended.status.success(), code == 0, "{options:?}: {said}");
        let listed = rig.program.json(0, &["list", "web"]);
        assert_eq!(listed["snapshots"].as_array().map(Vec::len), Some(usize::from(code == 0)), "{listed}");
        let status = rig.ask("query-status", Value::Null).expect("the status");
        assert_eq!(status["status"], "running");
    }
}

fn nix_continue(pid: u32) {
    std::process::Command::new("kill").args(["-CONT", &pid.to_string()]).status().expect("kill");
}
