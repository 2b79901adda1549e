//! Snapshots with memory, and the way back to them, beside QEMU's own and libvirt's, in one run: how long the guest stands
//! still, by QEMU's account and by its own, and when it speaks again after a revert.
//!
//! All machines have the same guest, which prints 500 lines a second; only the one that is measured runs. `TMPDIR` says on
//! which file system, `SNAPTREE_ROUNDS` how often, `SNAPTREE_TEST_ACCEL=kvm` has the guests run on KVM. Behind `--` a part
//! can be named: `pause`, or the reverts of a `tiny` or a `big` machine.

#![allow(missing_docs, clippy::expect_used, reason = "a bench binary")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use serde_json::{Value, json};
use snaptree_tests::guest::{boot_sector_with, image_of};
use snaptree_tests::images::text;
use snaptree_tests::measure::{Times, quiet};
use snaptree_tests::program::Program;
use snaptree_tests::running::{accelerator, wait_until};
use snaptree_tests::watched::{Line, Watched};

/// Memory and how far of it is in use, in MiB; the guest begins at 16.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Size {
    memory_mib: u64,
    used_to_mib: u64,
}

const BIG: Size = Size { memory_mib: 1024, used_to_mib: 816 };
const TINY: Size = Size { memory_mib: 32, used_to_mib: 17 };
/// So many lines are waited for before and after what is measured.
const LINES: usize = 50;

/// Who takes the snapshots of a machine.
enum By {
    /// Snaptree; how it keeps them.
    Snaptree(Program, &'static [&'static str]),
    /// Nobody: a QEMU of the bench's own.
    Qemu(Child),
    /// libvirt.
    Libvirt(Virsh, String),
}

struct Machine {
    folder: PathBuf,
    watched: Watched,
    by: By,
}

#[derive(Clone)]
struct Virsh {
    program: String,
    uri: String,
}

impl Virsh {
    fn run(&self, args: &[&str]) {
        let output = Command::new(&self.program).args(["-q", "-c", &self.uri]).args(args).output();
        let output = output.expect("virsh runs");
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// libvirtd of the lab.
struct Libvirtd {
    child: Child,
    virsh: Virsh,
}

impl Libvirtd {
    /// None if it cannot be had here; the script says why.
    fn start(folder: &Path) -> Option<Self> {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/lab/libvirt");
        let got = Command::new(script).arg("--get").stderr(Stdio::inherit()).output().expect("the script");
        if !got.status.success() {
            return None;
        }
        let log = std::fs::File::create(folder.join("libvirtd.log")).expect("a log");
        let child =
            Command::new(script).arg(folder).stdin(Stdio::null()).stderr(log).spawn().expect("it starts");
        let socket = folder.join("run/libvirt/libvirt-sock");
        let program = String::from_utf8_lossy(&got.stdout).trim().to_owned();
        let uri = format!("qemu+unix:///system?socket={}", text(&socket));
        wait_until("libvirtd answers", || {
            let mut asked = Command::new(&program);
            asked.args(["-q", "-c", &uri, "list"]).stdout(Stdio::null()).stderr(Stdio::null());
            asked.status().is_ok_and(|status| status.success())
        });
        Some(Self { child, virsh: Virsh { program, uri } })
    }
}

impl Drop for Libvirtd {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn image(folder: &Path, size: Size) -> PathBuf {
    let image = folder.join("vda.qcow2");
    image_of(boot_sector_with("filler.S", &[("LAST", size.used_to_mib << 20)]), &image);
    image
}

fn arguments(watched: &Watched, size: Size, disk: &str) -> Vec<String> {
    let mut words: Vec<String> = accelerator().iter().map(|word| (*word).to_owned()).collect();
    words.extend(
        ["-machine", "pc,i8042=off", "-nodefaults", "-no-user-config", "-display", "none"].map(str::to_owned),
    );
    words.extend(["-m".to_owned(), size.memory_mib.to_string()]);
    let serial = format!("socket,id=serial,path={}", text(watched.serial()));
    words.extend(["-chardev", &serial, "-serial", "chardev:serial"].map(str::to_owned));
    words.extend(["-qmp".to_owned(), watched.monitor(), "-blockdev".to_owned(), disk.to_owned()]);
    words.extend(["-device".to_owned(), "virtio-blk-pci,drive=vda".to_owned()]);
    words
}

impl Machine {
    fn new(folder: &Path, start: impl FnOnce(&Path, &Watched) -> By) -> Self {
        std::fs::create_dir(folder).expect("a folder");
        let watched = Watched::new(folder);
        let by = start(folder, &watched);
        let machine = Self { folder: folder.to_owned(), watched, by };
        machine.watched.more_lines(2 * LINES);
        machine.watched.ask("stop", json!({}));
        machine
    }

    fn snaptree(folder: &Path, size: Size, keeps: &'static [&'static str]) -> Self {
        Self::new(folder, |folder, watched| {
            let disk = format!("vda={}", text(&image(folder, size)));
            let file = "driver={vda.format},node-name=vda,file.driver=file,file.filename={vda}";
            let launch = format!(
                "qemu-system-x86_64 {} -qmp unix:{{qmp}},server=on,wait=off -pidfile {{pidfile}} {{incoming}}",
                arguments(watched, size, file).join(" ")
            );
            let program = Program::release(folder.join("state"));
            program
                .json(0, &["domain", "add", "web", "--driver", "qemu", "--disk", &disk, "--launch", &launch]);
            program.json(0, &["domain", "start", "web"]);
            By::Snaptree(program, keeps)
        })
    }

    fn bare(folder: &Path, size: Size) -> Self {
        Self::new(folder, |folder, watched| {
            let image = image(folder, size);
            let disk = format!("driver=qcow2,node-name=vda,file.driver=file,file.filename={}", text(&image));
            let mut qemu = Command::new("qemu-system-x86_64");
            qemu.args(arguments(watched, size, &disk)).stdin(Stdio::null());
            By::Qemu(qemu.spawn().expect("QEMU starts"))
        })
    }

    fn libvirt(folder: &Path, size: Size, virsh: &Virsh) -> Self {
        Self::new(folder, |folder, watched| {
            let name = folder.file_name().expect("a name").to_string_lossy().into_owned();
            let kvm = accelerator().contains(&"kvm");
            let cpu = accelerator().iter().skip_while(|word| **word != "-cpu");
            let monitor = watched.monitor();
            let arguments = ["-qmp", &monitor].into_iter().chain(cpu.copied());
            let arguments: String = arguments.map(|word| format!("<qemu:arg value='{word}'/>")).collect();
            let definition = format!(
                "<domain type='{}' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>{name}</name>
                <memory unit='MiB'>{}</memory><vcpu>1</vcpu>
                <os><type arch='x86_64' machine='pc'>hvm</type><boot dev='hd'/></os>
                <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
                <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/>
                <target dev='vda' bus='virtio'/></disk>
                <serial type='unix'><source mode='connect' path='{}'/><target port='0'/></serial>
                <memballoon model='none'/></devices><qemu:commandline>{arguments}</qemu:commandline></domain>",
                if kvm { "kvm" } else { "qemu" },
                size.memory_mib,
                text(&image(folder, size)),
                text(watched.serial()),
            );
            let file = folder.join("domain.xml");
            std::fs::write(&file, definition).expect("a file");
            virsh.run(&["define", text(&file)]);
            virsh.run(&["start", &name]);
            By::Libvirt(virsh.clone(), name)
        })
    }

    /// Lets the guest run, as nobody else's does; what it printed last.
    fn go_on(&self) -> Line {
        quiet();
        self.watched.ask("cont", json!({}));
        self.watched.more_lines(LINES)
    }

    fn rest(&self) {
        self.watched.ask("stop", json!({}));
    }

    /// Takes a snapshot of all of the machine, in the way that its owner's snapshots are kept.
    fn create(&self, name: &str) {
        match &self.by {
            By::Snaptree(program, keeps) => {
                program.json(0, &[&["create", "web", name], *keeps].concat());
            }
            By::Qemu(_) => self.job("snapshot-save", json!({ "tag": name, "vmstate": "vda" })),
            By::Libvirt(virsh, domain) => virsh.run(&["snapshot-create-as", domain, name]),
        }
    }

    fn revert(&self, name: &str) {
        match &self.by {
            By::Snaptree(program, _) => {
                program.json(0, &["revert", "web", name]);
            }
            By::Qemu(_) => self.job("snapshot-load", json!({ "tag": name, "vmstate": "vda" })),
            By::Libvirt(virsh, domain) => virsh.run(&["snapshot-revert", domain, name]),
        }
    }

    fn delete(&self, name: &str) {
        match &self.by {
            By::Snaptree(program, _) => {
                program.json(0, &["delete", "web", name]);
            }
            By::Qemu(_) => self.job("snapshot-delete", json!({ "tag": name })),
            By::Libvirt(virsh, domain) => virsh.run(&["snapshot-delete", domain, name]),
        }
    }

    /// A job on internal snapshots, to its end.
    fn job(&self, command: &str, mut arguments: Value) {
        arguments["job-id"] = json!("bench");
        arguments["devices"] = json!(["vda"]);
        self.watched.ask(command, arguments);
        let job = || self.watched.ask("query-jobs", json!({}))[0].clone();
        wait_until("the job is over", || job()["status"] == "concluded");
        assert!(job().get("error").is_none(), "{command}: {}", job());
        self.watched.ask("job-dismiss", json!({ "id": "bench" }));
    }

    /// The same by virsh with the memory in a file, which is thrown away.
    fn create_beside(&self, name: &str, live: &[&str]) {
        let By::Libvirt(virsh, domain) = &self.by else { unreachable!("only libvirt's are asked for it") };
        let [memory, disk] = ["memory", name].map(|name| self.folder.join(name));
        let memory_file = format!("file={},snapshot=external", text(&memory));
        let disk = format!("vda,snapshot=external,file={}", text(&disk));
        let args = [
            "snapshot-create-as",
            domain,
            name,
            "--no-metadata",
            "--memspec",
            &memory_file,
            "--diskspec",
            &disk,
        ];
        virsh.run(&[&args, live].concat());
        std::fs::remove_file(memory).expect("the memory goes");
    }

    /// QEMU's memory in the background, by itself, without its disks: what is left to be had.
    fn bare_background(&self) {
        let memory = self.folder.join("memory");
        let set =
            |on: bool| json!({ "capabilities": [{ "capability": "background-snapshot", "state": on }] });
        self.watched.ask("migrate-set-capabilities", set(true));
        self.watched.ask("migrate-set-parameters", json!({ "max-bandwidth": 1_u64 << 40 }));
        self.watched.ask("migrate", json!({ "uri": format!("exec:cat >{}", text(&memory)) }));
        let status = || self.watched.ask("query-migrate", json!({}))["status"].clone();
        wait_until("the memory is written", || status() == "completed");
        self.watched.ask("migrate-set-capabilities", set(false));
        std::fs::remove_file(memory).expect("the memory goes");
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        match &mut self.by {
            By::Snaptree(program, _) => {
                program.run(&["domain", "stop", "web", "--force"]);
            }
            By::Qemu(child) => {
                child.kill().ok();
                child.wait().ok();
            }
            By::Libvirt(virsh, domain) => virsh.run(&["destroy", domain]),
        }
    }
}

/// How long the guest stood still, by QEMU's account and by its own, and how long the whole took.
#[derive(Default)]
struct Pause {
    stopped: Times,
    gap: Times,
    took: Times,
}

impl Pause {
    fn measure(&mut self, machine: &Machine, act: impl FnOnce(&Machine)) {
        machine.go_on();
        let began = Instant::now();
        act(machine);
        self.took.push(began.elapsed());
        machine.watched.more_lines(LINES);
        self.gap.push(machine.watched.longest_gap_since(began));
        self.stopped.push(machine.watched.stopped_since(began));
        machine.rest();
    }

    fn print(&self, what: &str, ours: &Self) {
        self.stopped.print(&format!("{what}: STOP to RESUME"), Some(&ours.stopped));
        self.gap.print("    the guest's longest silence", Some(&ours.gap));
        self.took.print("    the whole command", Some(&ours.took));
    }
}

fn pauses(folder: &Path, virsh: Option<&Virsh>, rounds: usize, load: &mut Load) {
    let ours = Machine::snaptree(&folder.join("ours"), BIG, &["--memory"]);
    let bare = Machine::bare(&folder.join("bare"), BIG);
    let peer = virsh.map(|virsh| Machine::libvirt(&folder.join("peer"), BIG, virsh));
    let [mut none, mut external, mut first, mut limit, mut save, mut internal, mut memspec, mut live] =
        std::array::from_fn(|_| Pause::default());
    for round in 0..rounds {
        // Whoever comes later finds other memory and another disk, so they take turns.
        for turn in 0..8 {
            load.note();
            match ((turn + round) % 8, &peer) {
                (0, _) => none.measure(&ours, |machine| {
                    machine.watched.more_lines(2 * LINES);
                }),
                (1, _) => {
                    let name = format!("s{round}");
                    external.measure(&ours, |machine| machine.create(&name));
                    ours.delete(&name);
                }
                // A snapshot leaves the memory in small pages, which QEMU goes through more slowly the next time; the
                // kernel makes large ones of them again within minutes.
                (7, _) => {
                    let folder = folder.join("fresh");
                    let fresh = Machine::snaptree(&folder, BIG, &["--memory"]);
                    first.measure(&fresh, |machine| machine.create("first"));
                    drop(fresh);
                    std::fs::remove_dir_all(folder).expect("its files go");
                }
                (2, _) => limit.measure(&bare, Machine::bare_background),
                (3, _) => {
                    save.measure(&bare, |machine| machine.create("save"));
                    bare.delete("save");
                }
                (4, Some(peer)) => {
                    internal.measure(peer, |machine| machine.create("internal"));
                    peer.delete("internal");
                }
                (5, Some(peer)) => {
                    memspec.measure(peer, |machine| machine.create_beside(&format!("m{round}"), &[]));
                }
                (_, Some(peer)) => {
                    live.measure(peer, |machine| machine.create_beside(&format!("l{round}"), &["--live"]));
                }
                _ => {}
            }
        }
    }
    println!(
        "A full snapshot of a machine with {} MiB, {} of them in use:",
        BIG.memory_mib,
        BIG.used_to_mib - 16
    );
    none.gap.print("(nothing is done: the guest's longest silence)", None);
    external.print("snaptree create --memory, one behind the other", &external);
    first.print("snaptree create --memory, the first of a QEMU", &external);
    limit.print("QEMU's own background snapshot, without the disks", &external);
    save.print("QEMU's snapshot-save", &external);
    if peer.is_some() {
        internal.print("virsh snapshot-create-as", &external);
        memspec.print("virsh snapshot-create-as --memspec --diskspec", &external);
        live.print("the same with --live", &external);
    }
}

/// How long it takes from the command to the guest's first line, and to the command's end.
#[derive(Default)]
struct Revert {
    first_line: Times,
    took: Times,
}

impl Revert {
    fn measure(&mut self, machine: &Machine) {
        // The guest is always some lines behind the snapshot by now.
        let last = machine.go_on();
        let began = Instant::now();
        machine.revert("back");
        self.took.push(began.elapsed());
        self.first_line.push(machine.watched.line_before(began, last.memory).at - began);
        machine.rest();
    }

    fn print(&self, what: &str, ours: &Self) {
        self.first_line.print(&format!("{what}: the guest's first line"), Some(&ours.first_line));
        self.took.print("    the whole command", Some(&ours.took));
    }
}

fn reverts(folder: &Path, size: Size, virsh: Option<&Virsh>, rounds: usize, load: &mut Load) {
    std::fs::create_dir(folder).expect("a folder");
    let name = |what: &str| folder.join(format!("{what}-{}", size.memory_mib));
    let mut machines = vec![
        ("snaptree revert, memory in a file", Machine::snaptree(&name("external"), size, &["--memory"])),
        (
            "snaptree revert, memory inside the image",
            Machine::snaptree(&name("internal"), size, &["--internal"]),
        ),
        ("QEMU's snapshot-load", Machine::bare(&name("bare"), size)),
    ];
    machines
        .extend(virsh.map(|virsh| ("virsh snapshot-revert", Machine::libvirt(&name("peer"), size, virsh))));
    for (_, machine) in &machines {
        machine.go_on();
        machine.create("back");
        machine.rest();
    }
    let mut times: Vec<Revert> = machines.iter().map(|_| Revert::default()).collect();
    for round in 0..rounds {
        for turn in 0..machines.len() {
            load.note();
            let which = (turn + round) % machines.len();
            times[which].measure(&machines[which].1);
        }
    }
    println!("A revert of a running machine with {} MiB:", size.memory_mib);
    for ((what, _), time) in machines.iter().zip(&times) {
        time.print(what, &times[0]);
    }
}

/// How loaded the machine was.
#[derive(Default)]
struct Load(Vec<f64>);

impl Load {
    fn note(&mut self) {
        let load = std::fs::read_to_string("/proc/loadavg").expect("Linux");
        self.0.push(load.split(' ').next().and_then(|load| load.parse().ok()).expect("a number"));
    }
}

fn main() {
    let rounds = std::env::var("SNAPTREE_ROUNDS").map_or(10, |text| text.parse().expect("a number"));
    let folder = tempfile::tempdir().expect("a folder");
    let libvirtd = Libvirtd::start(folder.path());
    if libvirtd.is_none() {
        println!("WITHOUT libvirt (see above)");
    }
    let virsh = libvirtd.as_ref().map(|libvirtd| &libvirtd.virsh);
    let mut load = Load::default();
    // Cargo's own words begin with dashes.
    let wanted: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let is_wanted = |part: &str| wanted.is_empty() || wanted.iter().any(|wanted| wanted == part);
    if is_wanted("pause") {
        pauses(folder.path(), virsh, rounds, &mut load);
    }
    for (part, size) in [("tiny", TINY), ("big", BIG)] {
        if is_wanted(part) {
            reverts(&folder.path().join(part), size, virsh, rounds, &mut load);
        }
    }
    let (low, high) =
        load.0.iter().fold((f64::MAX, 0.0), |(low, high), load| (load.min(low), load.max(high)));
    println!("load (a minute's average) {low} to {high}");
}
