//! qemu-img killed inside its work, orphans that go on, and machines that are started at the worst moment.
#![cfg(feature = "lab")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on shall panic")]

mod qemu_lab;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use qemu_lab::{CrashAt, Ended, Lab, Wish};
use snaptree_drivers::qemu::QemuDriver;
use snaptree_engine::OperationId;
use snaptree_engine::driver::{Driver, Hooks, Observation, Remedy, Resolution};
use snaptree_engine::event::{Event, MergeStarted, OperationPlanned, OperationStepStarted};
use snaptree_engine::operation::{Request, Step};

/// A program in qemu-img's place that runs `wrapper` on it for the subcommand `on`.
fn wrapped(dir: &Path, on: &str, wrapper: &str) -> PathBuf {
    let path = dir.join(format!("qemu-img-{on}"));
    let script = format!(
        "#!/bin/sh\nif [ \"$1\" = {on} ]; then exec {wrapper} qemu-img \"$@\"; fi\nexec qemu-img \"$@\"\n"
    );
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// A lab with a merge to be done; `push` or `pull`.
async fn with_merge(kind: &str) -> (Lab, Event) {
    let mut lab = Lab::new(&["vda"]).await;
    lab.create("s1").await;
    lab.write(if kind == "pull" { "write -P 2 1M 2M" } else { "write -P 2 1M 3M" });
    lab.create("s2").await;
    lab.write(if kind == "pull" { "write -P 3 2M 3M" } else { "write -P 3 2M 128k" });
    if kind == "push" {
        lab.write("write -P 7 5M 1M");
    }
    lab.delete(&["s2"]).await;
    let plan = lab.next_merge().await.unwrap();
    (lab, MergeStarted { plan }.into())
}

/// Kills qemu-img at every write and every sync of a pull and of a push: the machine's disk and the snapshots read the
/// same at every such moment, before any recovery.
#[tokio::test]
async fn a_kill_inside_qemu_img_changes_nothing_that_anyone_reads() {
    for (kind, on) in [("pull", "rebase"), ("push", "commit")] {
        let mut kills = 0;
        for call in ["pwrite64", "pwritev", "fdatasync", "ftruncate", "fallocate"] {
            // strace counts per thread, so a later number may hit where an earlier one did not.
            for nth in 1..=6 {
                let (mut lab, request) = with_merge(kind).await;
                let before = lab.now();
                let inject = format!("strace -f -o /dev/null -e inject={call}:signal=SIGKILL:when={nth}");
                let program = wrapped(lab.dir.path(), on, &inject);
                let driver = lab.driver.clone().qemu_img(program);
                let Some((operation, request, index, step)) = cut_off(&mut lab, &driver, request).await
                else {
                    continue;
                };
                kills += 1;
                // Anyone may look now, and start the machine.
                assert_eq!(lab.now(), before, "{kind}: {call} {nth}");
                lab.check_snapshots();
                resume(&mut lab, operation, &request, index, &step).await;
                assert_eq!(lab.now(), before, "{kind}: {call} {nth}, after recovery");
                lab.check_snapshots();
            }
        }
        println!("{kind}: {kills} kills");
        assert!(kills > 0, "{kind}: strace killed nothing");
    }
}

/// Runs an operation with `driver` until a step ends in an unknown way; `None` if it went through.
async fn cut_off(
    lab: &mut Lab,
    driver: &QemuDriver,
    event: Event,
) -> Option<(OperationId, Request, usize, Step)> {
    let operation = OperationId::from_uuid(uuid::Uuid::now_v7());
    let request = Request::of(&event).unwrap();
    lab.apply(Some(operation), event);
    let seen = lab.observe().await;
    let plan = driver.plan(operation, &request, &lab.state, &seen).unwrap();
    lab.apply(Some(operation), OperationPlanned { steps: plan.steps.clone() }.into());
    for (index, step) in plan.steps.iter().enumerate() {
        lab.apply(Some(operation), OperationStepStarted { step: index }.into());
        let hooks = CrashAt::default();
        let done = driver.execute(&lab.context(operation, &request, index, &hooks), step).await;
        match done {
            Ok(report) => lab.finish_step(operation, index, step, report),
            Err(_) => return Some((operation, request, index, step.clone())),
        }
    }
    None
}

async fn resume(lab: &mut Lab, operation: OperationId, request: &Request, index: usize, step: &Step) {
    lab.driver.settle(&lab.state, operation).await.unwrap();
    let seen: Observation = lab.observe().await;
    let hooks = CrashAt::default();
    let context = lab.context(operation, request, index, &hooks);
    match lab.driver.resolve(&context, step, &seen) {
        Resolution::NotDone | Resolution::HalfDone(Remedy::Finish | Remedy::EitherWay) => {
            lab.driver.execute(&context, step).await.unwrap();
        }
        other => panic!("{other:?}"),
    }
}

/// The future is dropped while qemu-img works: it lives on, holds the operation's lock, and is waited for or ended.
#[tokio::test]
async fn an_orphan_is_settled_before_anything_is_resolved() {
    for (grace, delay) in [(Duration::from_secs(20), "1.5"), (Duration::from_millis(200), "60")] {
        let (mut lab, event) = with_merge("pull").await;
        let before = lab.now();
        let program = wrapped(lab.dir.path(), "rebase", &format!("sh -c 'sleep {delay}; exec \"$@\"' slow"));
        let slow = QemuDriver::new(lab.dir.path().join("run")).qemu_img(program).settle_grace(grace);
        let operation = OperationId::from_uuid(uuid::Uuid::now_v7());
        let request = Request::of(&event).unwrap();
        lab.apply(Some(operation), event);
        let seen = lab.observe().await;
        let plan = slow.plan(operation, &request, &lab.state, &seen).unwrap();
        let hooks = CrashAt::default();
        let context = lab.context(operation, &request, 0, &hooks);
        let cut =
            tokio::time::timeout(Duration::from_millis(500), slow.execute(&context, &plan.steps[0])).await;
        assert!(cut.is_err(), "it was not slow");
        assert!(slow.execute(&context, &plan.steps[0]).await.is_err(), "two at once");
        let begun = Instant::now();
        slow.settle(&lab.state, operation).await.unwrap();
        assert!(begun.elapsed() < Duration::from_secs(15));
        let seen = lab.observe().await;
        let resolution = lab.driver.resolve(&context, &plan.steps[0], &seen);
        println!("grace {grace:?}: settled after {:?}, {resolution:?}", begun.elapsed());
        lab.driver.execute(&context, &plan.steps[0]).await.unwrap();
        assert_eq!(lab.now(), before);
        lab.check_snapshots();
    }
}

/// Tries to start a machine on a path while the driver stands at a hook.
struct StartAt {
    place: &'static str,
    path: PathBuf,
    said: Mutex<Vec<String>>,
}

impl Hooks for StartAt {
    fn reached(&self, name: &str) {
        if name == self.place {
            let output = Command::new("timeout")
                .args([
                    "2",
                    "qemu-system-x86_64",
                    "-machine",
                    "accel=tcg",
                    "-display",
                    "none",
                    "-nodefaults",
                    "-S",
                ])
                .args(["-drive", &format!("file={},format=qcow2,if=virtio", self.path.display())])
                .output()
                .unwrap();
            self.said.lock().unwrap().push(String::from_utf8_lossy(&output.stderr).into_owned());
        }
    }
}

#[tokio::test]
async fn no_machine_starts_while_it_is_switched() {
    for (place, first) in
        [("qemu.adopt.locked", true), ("qemu.adopt.switched", true), ("qemu.switch.locked", false)]
    {
        let mut lab = Lab::new(&["vda"]).await;
        if !first {
            lab.create("s1").await;
        }
        let hooks = StartAt { place, path: lab.disks[0].1.clone(), said: Mutex::default() };
        let event: Event = lab.create_request("s2").into();
        let operation = OperationId::from_uuid(uuid::Uuid::now_v7());
        let request = Request::of(&event).unwrap();
        lab.apply(Some(operation), event);
        let seen = lab.observe().await;
        let plan = lab.driver.plan(operation, &request, &lab.state, &seen).unwrap();
        let quiet = CrashAt::default();
        let mut context = lab.context(operation, &request, 0, &quiet);
        context.hooks = &hooks;
        lab.driver.execute(&context, &plan.steps[0]).await.unwrap();
        let said = hooks.said.into_inner().unwrap();
        assert_eq!(said.len(), 1, "{place}");
        assert!(said[0].contains("Failed to get \"write\" lock"), "{place}: {}", said[0]);
    }
}

/// A machine that runs between the push and the switch: what it wrote is not lost.
struct WriteAt {
    path: PathBuf,
    times: Mutex<u32>,
}

impl Hooks for WriteAt {
    fn reached(&self, name: &str) {
        let mut times = self.times.lock().unwrap();
        if name == "qemu.push.done" && *times == 0 {
            *times += 1;
            qemu_lab::io(&self.path, "write -P 99 7M 64k");
        }
    }
}

#[tokio::test]
async fn what_is_written_between_push_and_switch_is_pushed_too() {
    let mut lab = Lab::new(&["vda"]).await;
    lab.create("s1").await;
    lab.write("write -P 2 1M 64k");
    lab.delete(&["s1"]).await;
    let event: Event = MergeStarted { plan: lab.next_merge().await.unwrap() }.into();
    let operation = OperationId::from_uuid(uuid::Uuid::now_v7());
    let request = Request::of(&event).unwrap();
    lab.apply(Some(operation), event);
    let seen = lab.observe().await;
    let plan = lab.driver.plan(operation, &request, &lab.state, &seen).unwrap();
    let hooks = WriteAt { path: lab.disks[0].1.clone(), times: Mutex::default() };
    let quiet = CrashAt::default();
    let mut context = lab.context(operation, &request, 0, &quiet);
    context.hooks = &hooks;
    lab.driver.execute(&context, &plan.steps[0]).await.unwrap();
    let path = lab.disks[0].1.to_str().unwrap();
    let text = qemu_lab::run("qemu-io", &["-r", "-f", "qcow2", "-c", "read -P 99 7M 64k", path]);
    assert!(!text.contains("failed"), "{text}");
}

/// A small file system of its own; unmounted at the end.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    /// `None` where mounting is not allowed.
    fn mount() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=24m", "tmpfs"])
            .arg(dir.path())
            .status()
            .is_ok_and(|status| status.success());
        mounted.then_some(Self(dir))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        Command::new("umount").arg("-l").arg(self.0.path()).status().unwrap();
    }
}

#[tokio::test]
async fn a_full_disk_fails_the_operation_and_nothing_else() {
    let Some(small) = SmallDisk::mount() else { return };
    for kind in ["create", "pull", "push"] {
        let dir = tempfile::tempdir_in(small.0.path()).unwrap();
        let disk = snaptree_engine::DiskName::new("vda").unwrap();
        let path = dir.path().join("vda.qcow2");
        qemu_lab::make(&path, qemu_lab::SIZE);
        qemu_lab::io(&path, "write -P 1 0 1M");
        let mut lab = Lab::register(dir, vec![(disk, path)], snaptree_drivers::qemu::PathWish::Follow).await;
        let event: Event = if kind == "create" {
            lab.create_request("s1").into()
        } else {
            lab.create("s1").await;
            lab.write(if kind == "pull" { "write -P 2 1M 3M" } else { "write -P 2 1M 4M" });
            lab.create("s2").await;
            lab.write(if kind == "pull" { "write -P 3 4M 4M" } else { "write -P 3 5M 2M" });
            lab.delete(&["s2"]).await;
            MergeStarted { plan: lab.next_merge().await.unwrap() }.into()
        };
        let before = lab.now();
        let filler = small.0.path().join("filler");
        let _ = Command::new("dd")
            .args(["if=/dev/zero", "bs=4k", &format!("of={}", filler.display())])
            .output()
            .unwrap();
        let Ended::Failed(failure) = lab.operate(event.clone(), None, Wish::Forward).await else {
            panic!("{kind}: there was room");
        };
        println!("{kind}: {failure}");
        assert_eq!(failure.code, snaptree_engine::operation::Code::NoSpace, "{kind}: {failure}");
        assert_eq!(lab.now(), before, "{kind}");
        lab.check().await;
        fs::remove_file(&filler).unwrap();
        assert_eq!(lab.operate(event, None, Wish::Forward).await, Ended::Done);
        assert_eq!(lab.now(), before, "{kind}");
        lab.check().await;
    }
}
