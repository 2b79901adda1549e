//! A machine that runs and writes all the time, on a real QEMU, under Snaptree.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::guest::boot_sector;
use crate::images::{text, tool};
use crate::left::Left;
use crate::program::Program;

/// The disks: the guest boots from the first.
pub const DISKS: [&str; 2] = ["vda", "vdb"];
/// What the guest sees as a disk's size.
const DISK_BYTES: usize = 16 << 20;
const SECTOR_BYTES: usize = 512;
/// As `lab/qemu/writer.S` has it.
const SLOTS: u32 = 224;
const SLOT_SECTORS: usize = 128;
const SLOT_SECTORS_WRITTEN: usize = 127;
const FIRST_SLOT_SECTOR: usize = 64;
/// How long anything may take that the tests wait for.
const PATIENCE: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(5);

/// What a disk reads as.
pub type Hash = [u8; 32];

/// The machine, registered as `web`.
#[derive(Debug)]
pub struct Running {
    /// The program.
    pub program: Program,
    /// The registered paths.
    pub paths: [PathBuf; 2],
    /// The layers folder.
    pub layers: PathBuf,
    /// Where its QMP socket is.
    pub qmp: PathBuf,
    folder: PathBuf,
    pid_file: PathBuf,
    by_hand: Option<Child>,
    way: Way,
    // Behind all that ends what it is about.
    _left: Left,
}

/// Who starts the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Snaptree, by a launch command.
    Managed,
    /// The test, on the registered paths; Snaptree knows nothing of it.
    Apart,
    /// The test, on the registered paths; Snaptree has the QMP socket.
    Attached,
    /// Snaptree, by a start and a stop command that work on the registered paths.
    Commands,
}

/// QEMU's arguments, with these for disks, socket and pid file.
fn arguments(serial: &Path, disks: [&str; 2], format: &str, qmp: &str, pid_file: &str) -> Vec<String> {
    // The next QEMU of a revert is started while the one before still prints.
    let serial = format!("file,id=serial,path={},append=on", text(serial));
    let mut words: Vec<String> = accelerator()
        .iter()
        .copied()
        .chain(["-machine", "pc,i8042=off", "-m", "16", "-nodefaults", "-no-user-config", "-display", "none"])
        .chain(["-chardev", &serial, "-serial", "chardev:serial"])
        .map(str::to_owned)
        .collect();
    words.extend(["-qmp".to_owned(), format!("unix:{qmp},server=on,wait=off")]);
    words.extend(["-pidfile".to_owned(), pid_file.to_owned()]);
    for (name, file) in DISKS.iter().zip(disks) {
        words.extend([
            "-blockdev".to_owned(),
            format!("driver={format},node-name={name},file.driver=file,file.filename={file}"),
            "-device".to_owned(),
            // Each write of the guest is on disk before it is answered, so that a killed QEMU loses none.
            format!("virtio-blk-pci,drive={name},write-cache=off"),
        ]);
    }
    words
}

/// The program that is QEMU: another one by `SNAPTREE_TEST_QEMU`.
fn qemu() -> String {
    std::env::var("SNAPTREE_TEST_QEMU").unwrap_or_else(|_| "qemu-system-x86_64".to_owned())
}

/// How the guest is carried out: by KVM with `SNAPTREE_TEST_ACCEL=kvm`.
pub fn accelerator() -> &'static [&'static str] {
    match std::env::var("SNAPTREE_TEST_ACCEL").as_deref() {
        // Where KVM itself runs in a machine, this one feature cannot be set.
        Ok("kvm") => &["-accel", "kvm", "-cpu", "host,-arch-capabilities"],
        _ => &["-accel", "tcg"],
    }
}

impl Running {
    /// Makes the images in `folder` and registers the machine; it is off.
    ///
    /// # Panics
    /// Anything fails.
    pub fn new(folder: &Path, way: Way) -> Self {
        Self::with_options(folder, way, &[])
    }

    /// The same with more options of `domain add`.
    ///
    /// # Panics
    /// Anything fails.
    pub fn with_options(folder: &Path, way: Way, options: &[&str]) -> Self {
        let paths = DISKS.map(|disk| folder.join(format!("{disk}.qcow2")));
        let mut raw = boot_sector("writer.S");
        raw.resize(DISK_BYTES, 0);
        let plain = folder.join("plain");
        std::fs::write(&plain, &raw).expect("a raw image");
        tool("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", text(&plain), text(&paths[0])]);
        tool("qemu-img", &["create", "-q", "-f", "qcow2", text(&paths[1]), &DISK_BYTES.to_string()]);
        std::fs::remove_file(plain).expect("the raw image goes");

        let program = Program::new(folder.join("state"));
        let mut running = Self {
            program,
            layers: PathBuf::new(),
            qmp: folder.join("qmp"),
            pid_file: folder.join("pid"),
            folder: folder.to_owned(),
            by_hand: None,
            way,
            paths,
            _left: Left::in_folder(folder),
        };
        let given: Vec<String> =
            DISKS.iter().zip(&running.paths).map(|(disk, path)| format!("{disk}={}", text(path))).collect();
        let ways = match way {
            Way::Apart => Vec::new(),
            Way::Managed => vec!["--launch".to_owned(), running.launch()],
            Way::Attached => vec!["--qmp".to_owned(), text(&running.qmp).to_owned()],
            Way::Commands => {
                let line = format!("exec {} {} -daemonize", qemu(), running.words().join(" "));
                let stop = format!("kill $(cat {})", text(&running.pid_file));
                let socket = text(&running.qmp).to_owned();
                ["--start".to_owned(), line, "--stop".to_owned(), stop, "--qmp".to_owned(), socket].to_vec()
            }
        };
        let mut add = vec!["domain", "add", "web", "--driver", "qemu"];
        add.extend(given.iter().flat_map(|disk| ["--disk", disk.as_str()]));
        add.extend(ways.iter().map(String::as_str).chain(options.iter().copied()));
        let added = running.program.json(0, &add);
        let id = added["id"].as_str().expect("the domain's id").to_owned();
        running.layers = folder.join(".snaptree").join(&id);
        if way == Way::Managed {
            running.qmp = folder.join("state/run").join(format!("{id}.qmp"));
            running.pid_file = folder.join("state/run").join(format!("{id}.pid"));
        }
        running
    }

    fn launch(&self) -> String {
        let words = arguments(&self.serial(), ["{vda}", "{vdb}"], "{vda.format}", "{qmp}", "{pidfile}");
        format!("{} {} {{incoming}}", qemu(), words.join(" "))
    }

    /// What starts QEMU on the registered paths.
    fn words(&self) -> Vec<String> {
        let disks = [text(&self.paths[0]), text(&self.paths[1])];
        arguments(&self.serial(), disks, "qcow2", text(&self.qmp), text(&self.pid_file))
    }

    fn serial(&self) -> PathBuf {
        self.folder.join("serial")
    }

    /// Starts the machine, by Snaptree where that is its work.
    ///
    /// # Panics
    /// It does not come up.
    pub fn start(&mut self) {
        match self.way {
            Way::Apart | Way::Attached => self.start_by_hand(),
            Way::Managed | Way::Commands => {
                self.program.json(0, &["domain", "start", "web"]);
            }
        }
    }

    /// Starts QEMU as an administrator would, on the registered paths.
    ///
    /// # Panics
    /// It does not come up.
    pub fn start_by_hand(&mut self) {
        self.start_by_hand_with(&[]);
    }

    /// The same with more arguments, which take the place of earlier ones.
    ///
    /// # Panics
    /// It does not come up.
    pub fn start_by_hand_with(&mut self, more: &[&str]) {
        std::fs::remove_file(&self.qmp).ok();
        let mut command = Command::new(qemu());
        command.args(self.words()).args(more).stdin(Stdio::null());
        let child = command.spawn().expect("QEMU starts");
        self.by_hand = Some(child);
        wait_until("the monitor is there", || self.qmp.exists());
    }

    /// Says something to QEMU, beside the program.
    ///
    /// # Panics
    /// It is refused.
    pub fn qmp(&self, command: &str, arguments: &Value) -> Value {
        let stream = UnixStream::connect(&self.qmp).expect("the monitor");
        let mut lines = BufReader::new(stream.try_clone().expect("a socket")).lines();
        // What the client before did not wait for comes first.
        while !lines.next().expect("a greeting").expect("a line").contains("\"QMP\"") {}
        let mut ask = |message: Value| {
            (&stream).write_all(format!("{message}\n").as_bytes()).expect("it listens");
            let answers = lines.by_ref().map(|line| serde_json::from_str::<Value>(&line.expect("a line")));
            let mut answers = answers.map(|answer| answer.expect("JSON"));
            answers.find(|answer| answer.get("event").is_none()).expect("an answer")
        };
        ask(json!({ "execute": "qmp_capabilities" }));
        let answer = ask(json!({ "execute": command, "arguments": arguments }));
        assert!(answer.get("return").is_some(), "{command}: {answer}");
        answer["return"].clone()
    }

    /// The process id of QEMU, if it runs.
    pub fn pid(&self) -> Option<u32> {
        let pid = std::fs::read_to_string(&self.pid_file).ok()?.trim().parse().ok()?;
        // A child that has ended and was not waited for is gone for our purposes.
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // As long as other threads of it are there, it has its files open, and their locks.
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
        (!stat.contains(") Z ") || threads > 1).then_some(pid)
    }

    /// Ends QEMU as a power cut of the machine alone would.
    ///
    /// # Panics
    /// It does not end.
    pub fn kill(&mut self) {
        if let Some(pid) = self.pid() {
            Command::new("kill").args(["-KILL", &pid.to_string()]).status().expect("kill runs");
            wait_until("QEMU is gone", || self.pid().is_none());
        }
        if let Some(mut child) = self.by_hand.take() {
            child.wait().expect("QEMU ended");
        }
    }

    /// Someone who looks at the machine from another thread.
    pub fn witness(&self) -> Witness {
        Witness { serial: self.serial(), layers: self.layers.clone() }
    }

    /// See [`Witness::counters`].
    pub fn counters(&self) -> Option<(u32, u32)> {
        self.witness().counters()
    }

    /// How much longer ago than the boot the guest's disk began: the same as long as memory and disk are of one instant.
    ///
    /// # Panics
    /// It has printed nothing.
    pub fn apart(&self) -> i64 {
        let (memory, disk) = self.counters().expect("it printed");
        i64::from(disk) - i64::from(memory)
    }

    /// How much the guest has printed.
    pub fn printed(&self) -> usize {
        std::fs::read(self.serial()).map_or(0, |said| said.len())
    }

    /// The counters of every whole line behind that much.
    pub fn lines_since(&self, printed: usize) -> Vec<(u32, u32)> {
        let said = std::fs::read(self.serial()).unwrap_or_default();
        let said = String::from_utf8_lossy(said.get(printed..).unwrap_or_default()).into_owned();
        said.lines().filter_map(counters_in).collect()
    }

    /// Waits until the guest has gone on by some rounds.
    ///
    /// # Panics
    /// It does not.
    pub fn wait_for_rounds(&self, rounds: u32) {
        let before = self.counters().map_or(0, |(memory, _)| memory);
        wait_until("the guest goes on", || {
            self.counters().is_some_and(|(memory, _)| memory < before || memory >= before + rounds)
        });
    }

    /// See [`Witness::files`].
    ///
    /// # Panics
    /// The manifest cannot be read.
    pub fn files(&self) -> BTreeMap<String, [PathBuf; 2]> {
        self.witness().files()
    }

    /// What the disks of one instant read as, and the guest's round; that they are of one instant is checked on the way.
    ///
    /// # Panics
    /// They are not.
    pub fn read(&self, what: &str, files: &[PathBuf; 2]) -> ([Hash; 2], u32) {
        let read = |file: &PathBuf| {
            let raw = self.folder.join("read");
            tool("qemu-img", &["convert", "-U", "-f", "qcow2", "-O", "raw", text(file), text(&raw)]);
            std::fs::read(&raw).expect("the raw copy")
        };
        let [first, second] = [read(&files[0]), read(&files[1])];
        let round = word(&first, SECTOR_BYTES);
        check_rounds(what, &first, round);
        let beside = word(&second, SECTOR_BYTES);
        assert!(beside == round || beside + 1 == round, "{what}: vda is of round {round}, vdb of {beside}");
        ([first, second].map(|disk| Sha256::digest(disk).into()), round)
    }

    /// The layers that QEMU has open, as the kernel names them.
    fn open_files(&self) -> Vec<String> {
        let Some(pid) = self.pid() else { return Vec::new() };
        let open = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        let open = open.filter_map(|entry| std::fs::read_link(entry.path()).ok());
        let open = open.map(|file| file.to_string_lossy().into_owned());
        open.filter(|file| file.starts_with(text(&self.layers))).collect()
    }

    /// No image has more than leaked clusters, QEMU has nothing open that was removed, and nothing lies in the layers folder that the log does not know.
    ///
    /// # Panics
    /// There is something.
    pub fn check_files(&self, what: &str) {
        let shown = self.program.json(0, &["domain", "show", "web"]);
        let layers = shown["layers"].as_array().expect("layers");
        let file_of = |kept: &'_ Value| PathBuf::from(kept["file"].as_str().expect("a file"));
        let known: Vec<PathBuf> = layers.iter().map(file_of).collect();
        let memory: Vec<PathBuf> = shown["memory"].as_array().into_iter().flatten().map(file_of).collect();
        // Before the first snapshot there is no such folder.
        for entry in std::fs::read_dir(&self.layers).into_iter().flatten() {
            let path = entry.expect("an entry").path();
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            if name != "active" && !name.starts_with("gen-") {
                assert!(
                    known.contains(&path) || memory.contains(&path),
                    "{what}: the log does not know {}",
                    path.display()
                );
            }
        }
        for file in &memory {
            assert!(file.exists(), "{what}: {} is missing", file.display());
        }
        for open in self.open_files() {
            assert!(!open.ends_with(" (deleted)"), "{what}: QEMU keeps {open} open");
        }
        // What the machine writes cannot be checked under it.
        let written: Vec<PathBuf> = match self.pid() {
            Some(_) => self.paths.iter().map(|path| path.canonicalize().expect("it opens")).collect(),
            None => Vec::new(),
        };
        for file in known.into_iter().filter(|file| !written.iter().any(|written| written == file)) {
            let checked =
                Command::new("qemu-img").args(["check", "-q", "-U", text(&file)]).status().expect("it runs");
            assert!(matches!(checked.code(), Some(0 | 3)), "{what}: {} is damaged", file.display());
        }
    }
}

/// What can be seen of the machine without the program.
#[derive(Clone, Debug)]
pub struct Witness {
    serial: PathBuf,
    layers: PathBuf,
}

impl Witness {
    /// Rounds since the boot, and rounds of the disk, of the last line that the guest printed.
    pub fn counters(&self) -> Option<(u32, u32)> {
        let said = std::fs::read(&self.serial).ok()?;
        let said = String::from_utf8_lossy(&said);
        said.rsplit('\n').find_map(counters_in)
    }

    /// Per live snapshot and disk, the file that it reads as; by the manifest beside the layers.
    ///
    /// # Panics
    /// The manifest cannot be read.
    pub fn files(&self) -> BTreeMap<String, [PathBuf; 2]> {
        let Ok(bytes) = std::fs::read(self.layers.join("active/manifest.json")) else {
            return BTreeMap::new();
        };
        let manifest: Value = serde_json::from_slice(&bytes).expect("a manifest");
        let snapshots = manifest["snapshots"].as_array().expect("snapshots").iter();
        let live = snapshots.filter(|snapshot| snapshot["tombstone"] == false);
        live.map(|snapshot| {
            let file = |disk: &str| PathBuf::from(snapshot["files"][disk].as_str().expect("a path"));
            (snapshot["name"].as_str().expect("a name").to_owned(), DISKS.map(file))
        })
        .collect()
    }

    /// Whether the guest goes on.
    pub fn goes_on(&self) -> bool {
        let before = self.counters();
        becomes(|| self.counters() != before)
    }
}

/// The counters in memory and on disk of a line that a guest printed.
pub(crate) fn counters_in(line: &str) -> Option<(u32, u32)> {
    let (memory, disk) = line.strip_prefix("M=")?.split_once(" D=")?;
    let number = |word: &str| (word.len() == 8).then(|| u32::from_str_radix(word, 16).ok()).flatten();
    Some((number(memory)?, number(disk)?))
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

fn word(disk: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(disk[at..at + 4].try_into().expect("four bytes"))
}

/// After round `round` each slot is of the last round that was its turn; the one whose turn is next may be half written.
fn check_rounds(what: &str, disk: &[u8], round: u32) {
    for slot in 0..SLOTS {
        let behind = (round + SLOTS - slot) % SLOTS;
        let expected = round.saturating_sub(behind);
        let next = (round + 1) % SLOTS == slot;
        for sector in 0..SLOT_SECTORS_WRITTEN {
            let at = (FIRST_SLOT_SECTOR + SLOT_SECTORS * slot as usize + sector) * SECTOR_BYTES;
            let found = word(disk, at);
            assert!(
                found == expected || (next && found == round + 1),
                "{what}: of round {round}, and slot {slot} is of round {found} instead of {expected}"
            );
        }
    }
}

/// Waits until something is so.
///
/// # Panics
/// It does not become so.
pub fn wait_until(what: &str, is_so: impl FnMut() -> bool) {
    assert!(becomes(is_so), "after {PATIENCE:?} it is still not so that {what}");
}

/// Whether something becomes so.
pub fn becomes(mut is_so: impl FnMut() -> bool) -> bool {
    let until = Instant::now() + PATIENCE;
    while !is_so() {
        if Instant::now() >= until {
            return false;
        }
        std::thread::sleep(LOOK);
    }
    true
}
