//! R: whether a machine runs.

#![cfg(feature = "lab")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use snaptree_tests::guest::make_image;
use snaptree_tests::images::{text, tool};
use snaptree_tests::left::{Left, left_in};
use snaptree_tests::program::{Program, Ran};
use snaptree_tests::running::{Running, Way, wait_until};

/// QEMU's arguments but for its disks, socket and pid file.
const BARE: &str = "-accel tcg -machine pc,i8042=off -nodefaults -no-user-config -display none";

/// A machine whose QEMU the test starts, or Snaptree by the command that the test says.
struct Machine {
    program: Program,
    image: PathBuf,
    by_hand: Vec<Child>,
    _left: Left,
    folder: tempfile::TempDir,
}

impl Machine {
    fn new() -> Self {
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder");
        let image = folder.path().join("d.qcow2");
        make_image(&image);
        let program = Program::new(folder.path().join("s"));
        Self { program, image, by_hand: Vec::new(), _left: Left::in_folder(folder.path()), folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn add(&self, more: &[&str]) -> Ran {
        let disk = format!("vda={}", text(&self.image));
        self.program.run(&[&["domain", "add", "m", "--driver", "qemu", "--disk", &disk], more].concat())
    }

    /// Starts a QEMU that takes no locks.
    fn start_without_locks(&mut self) {
        let drive = format!(
            "driver=qcow2,node-name=vda,file.driver=file,file.locking=off,file.filename={}",
            text(&self.image)
        );
        let qmp = self.path("qmp");
        let child = Command::new("qemu-system-x86_64")
            .args(BARE.split(' '))
            .args(["-m", "16", "-serial", &format!("file:{}", text(&self.path("serial")))])
            .args(["-blockdev", &drive, "-device", "virtio-blk-pci,drive=vda,write-cache=off"])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", text(&qmp))])
            .stdin(Stdio::null())
            .spawn()
            .expect("QEMU starts");
        self.by_hand.push(child);
        wait_until("the monitor is there", || qmp.exists());
        self.wait_for_rounds();
    }

    fn printed(&self) -> u64 {
        fs::metadata(self.path("serial")).map_or(0, |file| file.len())
    }

    fn wait_for_rounds(&self) {
        let before = self.printed();
        wait_until("the guest goes on", || self.printed() > before + 40);
    }

    fn now(&self) -> String {
        let shown = self.program.json(0, &["domain", "show", "m"]);
        shown["machine"]["now"].as_str().expect("what it does").to_owned()
    }

    /// The processes that have something in the machine's folder open.
    fn processes(&self) -> usize {
        left_in(self.folder.path()).len()
    }

    fn launch(&self, qemu: &str, drive: &str, more: &str) -> String {
        format!(
            "{qemu} {BARE} {more} -drive if=virtio,{drive} -qmp unix:{{qmp}},server=on,wait=off -pidfile {{pidfile}}"
        )
    }

    /// A program that is QEMU with more arguments, which the launch command does not show.
    fn wrapper(&self, more: &str) -> PathBuf {
        let path = self.path("qemu");
        fs::write(&path, format!("#!/bin/sh\nexec qemu-system-x86_64 \"$@\" {more}\n")).expect("a program");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("its mode");
        path
    }

    fn run_files(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path("s/run")).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for child in &mut self.by_hand {
            child.kill().ok();
            child.wait().ok();
        }
        self.program.run(&["domain", "stop", "m", "--force"]);
    }
}

fn said(ran: &Ran) -> String {
    format!("{}{}", ran.stdout, ran.stderr)
}

fn hash(file: &Path) -> String {
    let output = tool("sha256sum", &[text(file)]);
    String::from_utf8_lossy(&output.stdout).split(' ').next().expect("a sum").to_owned()
}

#[test]
fn r1_a_machine_whose_qmp_answers_is_at_work_though_it_holds_no_locks() {
    let mut machine = Machine::new();
    let qmp = machine.path("qmp");
    assert_eq!(machine.add(&["--qmp", text(&qmp)]).code, Some(0));
    assert_eq!(machine.now(), "off");
    machine.start_without_locks();
    assert_eq!(machine.now(), "running");
    let created = machine.program.json(0, &["create", "m", "one"]);
    let base = fs::canonicalize(&machine.image).expect("the current layer");
    let shown = machine.program.json(0, &["domain", "show", "m"]);
    let layers = shown["layers"].as_array().expect("layers");
    let frozen = layers.iter().find(|layer| layer["role"] == "frozen").expect("a frozen layer");
    let frozen = PathBuf::from(frozen["file"].as_str().expect("a file"));
    assert_ne!(base, frozen, "{created}");
    let before = hash(&frozen);
    machine.wait_for_rounds();
    assert_eq!(hash(&frozen), before, "the guest writes into the new layer");
}

#[test]
fn r2_a_machine_without_qmp_and_without_locks_is_seen_by_what_it_has_open() {
    let mut machine = Machine::new();
    assert_eq!(machine.add(&[]).code, Some(0));
    machine.start_without_locks();
    assert_eq!(machine.now(), "running");
    let refused = machine.program.run(&["create", "m", "one"]);
    assert_ne!(refused.code, Some(0));
    let pid = machine.by_hand[0].id();
    assert!(said(&refused).contains(&format!("(pid {pid})")), "{refused:?}");
    assert!(fs::symlink_metadata(&machine.image).expect("the image").is_file(), "nothing was adopted");
}

#[test]
fn r_a_stopped_qemu_without_locks_that_does_not_answer_is_at_work_too() {
    let mut machine = Machine::new();
    let qmp = machine.path("qmp");
    assert_eq!(machine.add(&["--qmp", text(&qmp)]).code, Some(0));
    machine.start_without_locks();
    let pid = machine.by_hand[0].id().to_string();
    tool("kill", &["-STOP", &pid]);
    assert_eq!(machine.now(), "running");
    let refused = machine.program.run(&["create", "m", "one"]);
    assert_ne!(refused.code, Some(0));
    assert!(fs::symlink_metadata(&machine.image).expect("the image").is_file(), "nothing was adopted");
}

#[test]
fn r3_a_launch_command_that_keeps_nothing_is_refused_where_it_can_be_seen() {
    let machine = Machine::new();
    for (drive, more, word) in [
        ("file={vda},format={vda.format}", "-snapshot", "-snapshot"),
        ("file={vda},format={vda.format},snapshot=on", "", "snapshot=on"),
        ("file={vda},format={vda.format},readonly=on", "", "readonly=on"),
    ] {
        let refused = machine.add(&["--launch", &machine.launch("qemu-system-x86_64", drive, more)]);
        assert_eq!(refused.code, Some(4), "{refused:?}");
        assert!(said(&refused).contains(word), "{refused:?}");
    }
}

#[test]
fn r3_a_machine_that_does_not_write_its_disks_is_ended_again_and_it_is_said_why() {
    let machine = Machine::new();
    let qemu = machine.wrapper("-snapshot");
    let launch = machine.launch(text(&qemu), "file={vda},format={vda.format}", "-m 16");
    assert_eq!(machine.add(&["--launch", &launch]).code, Some(0));
    let begun = Instant::now();
    let failed = machine.program.run(&["domain", "start", "m"]);
    assert_ne!(failed.code, Some(0));
    assert!(said(&failed).contains("-snapshot"), "{failed:?}");
    assert!(begun.elapsed() < Duration::from_secs(20), "it is not waited for");
    assert_eq!((machine.now(), machine.processes()), ("off".to_owned(), 0));
    let left = machine.run_files();
    assert!(left.iter().all(|name| name.ends_with(".log")), "{left:?}");
}

#[test]
fn r3_a_machine_whose_monitor_never_opens_is_ended_again() {
    let mut machine = Machine::new();
    let settings = machine.path("settings");
    machine.program = machine.program.with_settings(&settings, "[qemu]\nstart-timeout = \"1s\"\n");
    // It holds the image open, as a QEMU would that hangs at its start.
    let launch = "sh -c 'sleep 600 <>$0 & exec sleep 601' {vda} {qmp} {pidfile}";
    assert_eq!(machine.add(&["--launch", launch]).code, Some(0));
    let failed = machine.program.run(&["domain", "start", "m"]);
    assert_ne!(failed.code, Some(0));
    assert!(said(&failed).contains("not there after 1 s"), "{failed:?}");
    assert_eq!((machine.now(), machine.processes()), ("off".to_owned(), 0));
}

#[test]
fn r_a_process_of_ours_that_has_opened_nothing_is_in_the_way_of_another_one_and_can_be_ended() {
    let mut machine = Machine::new();
    let settings = machine.path("settings");
    machine.program = machine.program.with_settings(&settings, "[qemu]\nstart-timeout = \"1s\"\n");
    let launch = "sh -c 'exec sleep 600' {vda} {qmp} {pidfile}";
    assert_eq!(machine.add(&["--launch", launch]).code, Some(0));
    let id = machine.program.json(0, &["domain", "show", "m"])["id"].as_str().expect("an id").to_owned();
    // As one that was left by a start that was killed.
    let mut child = Command::new("sleep").arg("600").spawn().expect("a process");
    let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).expect("its numbers");
    let started = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(19)).expect("its start");
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("the boot");
    fs::create_dir_all(machine.path("s/run")).expect("a folder");
    let note = format!("{} {} {started}\n", boot.trim(), child.id());
    fs::write(machine.path("s/run").join(format!("{id}.process")), note).expect("the note");
    assert_eq!(machine.now(), "running");
    let failed = machine.program.run(&["domain", "start", "m"]);
    assert!(said(&failed).contains("domain stop --force"), "{failed:?}");
    assert_eq!(machine.program.run(&["domain", "stop", "m", "--force"]).code, Some(0));
    assert!(!child.wait().expect("it ended").success());
    assert_eq!(machine.now(), "off");
}

#[test]
fn r4_memory_that_the_machine_cannot_take_is_found_before_anything_is_given_up() {
    for is_running in [true, false] {
        let machine = Machine::new();
        let serial = format!("-serial file:{}", text(&machine.path("serial")));
        let with = |mib: u32| {
            let more = format!("-m {mib} {serial}");
            machine.launch("qemu-system-x86_64", "file={vda},format={vda.format}", &more)
        };
        assert_eq!(machine.add(&["--launch", &with(16)]).code, Some(0));
        machine.program.json(0, &["domain", "start", "m"]);
        machine.wait_for_rounds();
        machine.program.json(0, &["create", "m", "mem1", "--memory"]);
        machine.program.json(0, &["domain", "stop", "m", "--force"]);
        machine.program.json(0, &["domain", "set", "m", "--launch", &with(32)]);
        machine.program.json(0, &["domain", "start", "m"]);
        fs::remove_file(machine.path("serial")).ok();
        if !is_running {
            machine.program.json(0, &["domain", "stop", "m", "--force"]);
        }
        let layer = fs::canonicalize(&machine.image).expect("the current layer");
        let before = hash(&layer);
        let failed = machine.program.run(&["revert", "m", "mem1"]);
        assert_ne!(failed.code, Some(0));
        assert!(said(&failed).contains("cannot be loaded"), "{failed:?}");
        assert_eq!(fs::canonicalize(&machine.image).expect("the current layer"), layer);
        let now = if is_running { "running" } else { "off" };
        assert_eq!((machine.now().as_str(), machine.processes()), (now, usize::from(is_running)));
        if !is_running {
            assert_eq!(hash(&layer), before, "what it wrote is still there");
        }
        machine.program.json(0, &["domain", "stop", "m", "--force"]);
        machine.program.json(0, &["domain", "set", "m", "--launch", &with(16)]);
        machine.program.json(0, &["revert", "m", "mem1"]);
        assert_eq!(machine.now(), "running");
    }
}

#[test]
fn r5_a_guest_that_does_not_shut_down_is_waited_for_without_work() {
    let machine = Machine::new();
    let launch = machine.launch("qemu-system-x86_64", "file={vda},format={vda.format}", "-m 16");
    assert_eq!(machine.add(&["--launch", &launch]).code, Some(0));
    machine.program.json(0, &["domain", "start", "m"]);
    let mut stop = machine.program.command(&["domain", "stop", "m"]).spawn().expect("it starts");
    let ticks = |pid: u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("it waits");
        let rest = stat.rsplit_once(") ").expect("its numbers").1.to_owned();
        let fields: Vec<u64> =
            rest.split(' ').skip(11).take(2).map(|n| n.parse().expect("a number")).collect();
        fields[0] + fields[1]
    };
    // What it needs to begin with is over when nothing more is used; before, it looked fifty times a second.
    let mut quiet = 0;
    let mut before = ticks(stop.id());
    let until = Instant::now() + Duration::from_secs(20);
    while quiet < 10 && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(200));
        let now = ticks(stop.id());
        quiet = if now == before { quiet + 1 } else { 0 };
        before = now;
    }
    stop.kill().expect("it can be ended");
    stop.wait().expect("it ended");
    assert!(quiet >= 10, "it works while it waits");
}

#[test]
fn r6_what_qemu_said_last_is_told_however_much_it_said_before() {
    let machine = Machine::new();
    let qemu = machine.path("qemu");
    fs::write(&qemu, "#!/bin/sh\nseq 1 2000\necho 'the reason'\nexit 1\n").expect("a program");
    fs::set_permissions(&qemu, fs::Permissions::from_mode(0o755)).expect("its mode");
    let launch = machine.launch(text(&qemu), "file={vda},format={vda.format}", "-m 16");
    assert_eq!(machine.add(&["--launch", &launch]).code, Some(0));
    let failed = machine.program.run(&["domain", "start", "m"]);
    assert!(said(&failed).contains("the reason"), "{failed:?}");
}

#[test]
fn r6_a_path_with_a_comma_is_started_from() {
    let mut machine = Machine::new();
    let folder = machine.path("a,b");
    fs::create_dir(&folder).expect("a folder");
    let image = folder.join("d,1.qcow2");
    fs::rename(&machine.image, &image).expect("the image");
    machine.image = image;
    let launch = machine.launch("qemu-system-x86_64", "file={vda},format={vda.format}", "-m 16");
    assert_eq!(machine.add(&["--launch", &launch]).code, Some(0));
    machine.program.json(0, &["create", "m", "one"]);
    machine.program.json(0, &["domain", "start", "m"]);
    assert_eq!(machine.now(), "running");
    machine.program.json(0, &["domain", "stop", "m", "--force"]);
    assert_eq!(machine.now(), "off");
}

#[test]
fn r6_what_a_machine_left_beside_its_socket_goes_with_its_domain() {
    let machine = Machine::new();
    let launch = machine.launch("qemu-system-x86_64", "file={vda},format={vda.format}", "-m 16");
    assert_eq!(machine.add(&["--launch", &launch]).code, Some(0));
    machine.program.json(0, &["domain", "start", "m"]);
    machine.program.json(0, &["domain", "stop", "m", "--force"]);
    machine.program.json(0, &["domain", "remove", "m", "--flatten", "--yes"]);
    assert_eq!(machine.run_files(), Vec::<String>::new());
}

/// Each on the QEMU of the path and on a newer one, where there is one.
fn on_each_qemu(test: impl Fn(&mut Running)) {
    let newer = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/lab/newer-qemu")).output();
    let newer = newer.ok().filter(|output| output.status.success());
    let newer = newer.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    for folder_of_qemu in std::iter::once(None).chain(newer.map(Some)) {
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder");
        let mut running = Running::new(folder.path(), Way::Managed);
        if let Some(newer) = folder_of_qemu {
            let path = format!("{newer}:{}", std::env::var("PATH").unwrap_or_default());
            running.program = running.program.with_env("PATH", &path);
        }
        test(&mut running);
    }
}

fn now(running: &Running) -> String {
    let shown = running.program.json(0, &["domain", "show", "web"]);
    shown["machine"]["now"].as_str().expect("what it does").to_owned()
}

#[test]
fn r7_a_machine_that_waits_behind_its_memory_is_paused_and_no_other_one_is_started_beside_it() {
    on_each_qemu(|running| {
        let folder = running.paths[0].parent().expect("a folder").to_owned();
        running.start();
        running.wait_for_rounds(2);
        running.program.json(0, &["create", "web", "s1", "--memory"]);
        running.program.json(0, &["create", "web", "s2", "--memory"]);
        running.program.json(0, &["revert", "web", "s2", "--paused"]);
        assert_eq!(now(running), "paused");
        running.program.json(0, &["revert", "web", "s1"]);
        assert_eq!((now(running), left_in(&folder).len()), ("running".to_owned(), 1));
        running.program.json(0, &["revert", "web", "s2", "--paused"]);
        assert_eq!((now(running), left_in(&folder).len()), ("paused".to_owned(), 1));
        // What may be done to a machine that is paused is done under it.
        running.program.json(0, &["create", "web", "s3"]);
        running.program.json(0, &["domain", "start", "web"]);
        assert_eq!((now(running), left_in(&folder).len()), ("running".to_owned(), 1));
        running.wait_for_rounds(2);
        running.program.json(0, &["revert", "web", "s2", "--paused"]);
        running.program.json(0, &["domain", "stop", "web", "--force"]);
        assert_eq!((now(running), left_in(&folder).len()), ("off".to_owned(), 0));
    });
}
