//! The real VirtualBox, apart from any other on this machine: machines with disks, what their images hold, and `VBoxSVC`
//! to be killed. Nothing here uses the driver: settings and images are read by other means.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::program::{Program, Ran};

/// Bytes of a VDI's block.
pub const BLOCK_BYTES: usize = 1 << 20;
/// Nothing of a block was ever written.
const UNUSED: u32 = 0xffff_fffe;

/// VirtualBox in a folder of its own.
pub struct Vbox {
    folder: tempfile::TempDir,
    id: String,
}

/// What the settings file says of a state of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// The snapshot; none for the machine as it is.
    pub uuid: Option<String>,
    /// Its name.
    pub name: String,
    /// Its images, in the order of the disks.
    pub images: Vec<String>,
}

/// Whether `tests/run` found that VirtualBox cannot be had here, and said so.
pub fn is_left_out() -> bool {
    std::env::var_os("SNAPTREE_WITHOUT_VIRTUALBOX").is_some()
}

fn programs() -> &'static Path {
    static INSTALLED: OnceLock<PathBuf> = OnceLock::new();
    INSTALLED.get_or_init(|| {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/lab/virtualbox");
        let output = Command::new(script).stderr(Stdio::inherit()).output().expect("a script of the tests");
        assert!(output.status.success(), "VirtualBox cannot be had; see above");
        PathBuf::from(String::from_utf8_lossy(&output.stdout).trim())
    })
}

impl Default for Vbox {
    fn default() -> Self {
        Self::new()
    }
}

impl Vbox {
    /// VirtualBox without a machine.
    ///
    /// # Panics
    /// It cannot be had.
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let id = format!("st{}", &Uuid::new_v4().simple().to_string()[..12]);
        fs::create_dir(folder.path().join("home")).expect("a folder");
        programs();
        Self { folder, id }
    }

    /// Where its machines are.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    fn environment(&self) -> [(&'static str, String); 3] {
        [
            ("VBOX_USER_HOME", self.path().join("home").display().to_string()),
            ("VBOX_IPC_SOCKETID", self.id.clone()),
            ("VBOXMANAGE", programs().join("VBoxManage").display().to_string()),
        ]
    }

    /// Snaptree, with a state beside the machines.
    pub fn snaptree(&self) -> Program {
        let mut program = Program::new(self.path().join("state"));
        program.environment.extend(self.environment());
        program
    }

    /// Bare VBoxManage, ready to be run.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(programs().join("VBoxManage"));
        command.args(args).envs(self.environment()).stdin(Stdio::null());
        command
    }

    /// Runs bare VBoxManage to its end.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn manage(&self, args: &[&str]) -> Ran {
        let output = self.command(args).output().expect("VBoxManage starts");
        Ran {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// The same, and it has to succeed.
    ///
    /// # Panics
    /// It fails.
    pub fn must(&self, args: &[&str]) -> Ran {
        let ran = self.manage(args);
        assert_eq!(ran.code, Some(0), "{args:?}: {ran:?}");
        ran
    }

    /// Makes a machine with so many empty disks of so many blocks.
    ///
    /// # Panics
    /// It cannot be made.
    pub fn machine(&self, name: &str, disks: usize, blocks: usize) {
        let base = self.path().display().to_string();
        self.must(&["createvm", "--name", name, "--basefolder", &base, "--register"]);
        self.must(&["storagectl", name, "--name", "sata", "--add", "sata", "--portcount", "4"]);
        for disk in 0..disks {
            let file = self.path().join(name).join(format!("d{disk}.vdi")).display().to_string();
            self.must(&["createmedium", "disk", "--filename", &file, "--size", &blocks.to_string()]);
            let port = disk.to_string();
            let place = ["--storagectl", "sata", "--port", &port, "--device", "0", "--type", "hdd"];
            self.must(&[&["storageattach", name, "--medium", &file], &place[..]].concat());
        }
    }

    /// The settings file of a machine.
    pub fn settings(&self, name: &str) -> PathBuf {
        self.path().join(name).join(format!("{name}.vbox"))
    }

    /// The states of a machine, the current one last.
    ///
    /// # Panics
    /// The settings cannot be read.
    pub fn states(&self, name: &str) -> Vec<State> {
        let text = fs::read_to_string(self.settings(name)).expect("settings");
        let mut states: Vec<State> = Vec::new();
        let mut current = State { uuid: None, name: String::new(), images: Vec::new() };
        let mut open: Vec<usize> = Vec::new();
        let value = |line: &str, key: &str| {
            let rest = line.split_once(&format!(" {key}=\""))?.1;
            Some(rest.split_once('"')?.0.trim_matches(['{', '}']).to_owned())
        };
        for line in text.lines().map(str::trim) {
            if line.starts_with("<Snapshot ") {
                open.push(states.len());
                let uuid = value(line, "uuid");
                states.push(State { uuid, name: value(line, "name").expect("a name"), images: Vec::new() });
            } else if line == "</Snapshot>" {
                open.pop();
            } else if line.starts_with("<Image uuid") {
                let state = open.last().map_or(&mut current, |index| &mut states[*index]);
                state.images.extend(value(line, "uuid"));
            }
        }
        states.push(current);
        states
    }

    /// What every state of a machine reads as, disk by disk, by the snapshot's name; the machine as it is under "".
    ///
    /// # Panics
    /// An image is missing or damaged.
    pub fn contents(&self, name: &str) -> BTreeMap<String, Vec<String>> {
        let images = self.images(name);
        let of = |state: &State| state.images.iter().map(|image| sha256(&images, image)).collect();
        self.states(name).iter().map(|state| (state.name.clone(), of(state))).collect()
    }

    /// The files of a machine's images, by the id in their headers.
    fn images(&self, name: &str) -> BTreeMap<String, PathBuf> {
        let folder = self.path().join(name);
        let folders = [folder.join("Snapshots"), folder];
        let files = folders.iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten();
        let files = files.map(|file| file.expect("readable").path());
        let images = files.filter(|file| file.extension().is_some_and(|ending| ending == "vdi"));
        images.map(|file| (Vdi::open(&file).id(0x188), file)).collect()
    }

    /// What a guest would do: writes a block of a disk of the machine as it is.
    ///
    /// # Panics
    /// The image cannot be written.
    pub fn write(&self, name: &str, disk: usize, block: usize, seed: u64) {
        let states = self.states(name);
        let image = &states.last().expect("the current one").images[disk];
        let file = &self.images(name)[image];
        Vdi::open(file).write(file, block, seed);
    }

    /// The process of its `VBoxSVC`, once a call was made.
    ///
    /// # Panics
    /// None comes up.
    pub fn service(&self) -> u32 {
        self.must(&["list", "vms"]);
        let lock = format!("/tmp/.vbox-{}-ipc/lock", self.id);
        let text = fs::read_to_string(lock).expect("VBoxSVC notes its process");
        text.trim().trim_end_matches('\0').parse().expect("a number")
    }

    /// The processes of its VBoxManage that are under way.
    pub fn clients(&self) -> Vec<u32> {
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = processes.filter_map(|process| process.file_name().to_str()?.parse::<u32>().ok());
        let ours = |pid: &u32| {
            let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            let environ = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            comm.trim() == "VBoxManage" && String::from_utf8_lossy(&environ).contains(&self.id)
        };
        pids.filter(ours).collect()
    }

    /// Has `VBoxSVC` killed when one of its threads is about to make that system call for the n-th time.
    ///
    /// # Panics
    /// strace cannot be started, or does not get hold of it.
    pub fn kill_at(&self, call: &str, nth: u32) -> Child {
        let pid = self.service().to_string();
        let inject = format!("inject={call}:signal=KILL:when={nth}");
        let out = self.path().join("strace");
        let _ = fs::remove_file(&out);
        let mut strace = Command::new("strace");
        strace.args(["-f", "-q", "-p", &pid, "-e", &format!("trace={call}"), "-e", &inject, "-o"]).arg(&out);
        let child = strace.stdin(Stdio::null()).stderr(Stdio::null()).spawn().expect("strace starts");
        let traced = || {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            !status.contains("TracerPid:\t0\n")
        };
        let until = Instant::now() + Duration::from_secs(30);
        while !traced() {
            assert!(Instant::now() < until, "strace does not get hold of VBoxSVC");
            std::thread::yield_now();
        }
        child
    }
}

impl Drop for Vbox {
    fn drop(&mut self) {
        let socket = PathBuf::from(format!("/tmp/.vbox-{}-ipc", self.id));
        let pid = fs::read_to_string(socket.join("lock")).ok();
        let pid = pid.and_then(|text| text.trim().trim_end_matches('\0').parse::<u32>().ok());
        let is_it = |pid: &u32| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.starts_with("VBoxSVC"))
        };
        if let Some(pid) = pid.filter(is_it) {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
        let _ = fs::remove_dir_all(socket);
    }
}

/// A VDI's header and table of blocks (VirtualBox, VDICore.h, version 1.1).
struct Vdi {
    head: Vec<u8>,
    table: Vec<u32>,
}

impl Vdi {
    fn open(file: &Path) -> Self {
        let opened = File::open(file).expect("an image");
        let mut head = vec![0; 512];
        opened.read_exact_at(&mut head, 0).expect("a header");
        let mut vdi = Self { head, table: Vec::new() };
        assert_eq!(vdi.get(0x40), 0xbeda_107f, "{} is a VDI", file.display());
        assert_eq!(vdi.get(0x178) as usize, BLOCK_BYTES);
        let mut table = vec![0; 4 * vdi.get(0x180) as usize];
        opened.read_exact_at(&mut table, u64::from(vdi.get(0x154))).expect("a table");
        vdi.table =
            table.chunks(4).map(|entry| u32::from_le_bytes(entry.try_into().expect("four"))).collect();
        vdi
    }

    fn get(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.head[at..at + 4].try_into().expect("four bytes"))
    }

    fn id(&self, at: usize) -> String {
        Uuid::from_bytes_le(self.head[at..at + 16].try_into().expect("sixteen bytes")).to_string()
    }

    fn write(mut self, file: &Path, block: usize, seed: u64) {
        let opened = OpenOptions::new().write(true).open(file).expect("an image");
        let mut allocated = self.get(0x184);
        if self.table[block] >= UNUSED {
            self.table[block] = allocated;
            allocated += 1;
        }
        let at = u64::from(self.get(0x158)) + u64::from(self.table[block]) * BLOCK_BYTES as u64;
        let data: Vec<u8> = (0..BLOCK_BYTES / 8)
            .flat_map(|word| (seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ word as u64).to_le_bytes())
            .collect();
        opened.write_all_at(&data, at).expect("written");
        let table: Vec<u8> = self.table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        opened.write_all_at(&table, u64::from(self.get(0x154))).expect("written");
        opened.write_all_at(&allocated.to_le_bytes(), 0x184).expect("written");
        opened.sync_all().expect("synced");
    }
}

/// What an image reads as, down its chain. Blocks of zeros count as those that were never written.
fn sha256(images: &BTreeMap<String, PathBuf>, image: &str) -> String {
    let mut chain = Vec::new();
    let mut next = image.to_owned();
    while let Some(file) = images.get(&next) {
        let vdi = Vdi::open(file);
        next = vdi.id(0x1a8);
        chain.push((File::open(file).expect("an image"), vdi));
        assert!(chain.len() < 1_000, "a loop");
    }
    assert!(next == Uuid::nil().to_string(), "image {next} below {image} is missing");
    let mut hasher = Sha256::new();
    let mut data = vec![0; BLOCK_BYTES];
    for block in 0..chain.first().expect("an image").1.table.len() {
        let held = chain.iter().find(|(_, vdi)| vdi.table.get(block).is_some_and(|entry| *entry != u32::MAX));
        let Some((file, vdi)) = held.filter(|(_, vdi)| vdi.table[block] < UNUSED) else { continue };
        let at = u64::from(vdi.get(0x158)) + u64::from(vdi.table[block]) * BLOCK_BYTES as u64;
        file.read_exact_at(&mut data, at).expect("a block");
        if data.iter().any(|byte| *byte != 0) {
            hasher.update((block as u64).to_le_bytes());
            hasher.update(&data);
        }
    }
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
