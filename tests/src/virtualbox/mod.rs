//! The real VirtualBox, apart from any other on this machine: machines with disks, what their images hold, and `VBoxSVC`
//! to be killed. Nothing here uses the driver: settings and images are read by other means.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use uuid::Uuid;

use crate::program::{Program, Ran};
use vdi::{Vdi, sha256};

pub mod kill;
pub mod model;
mod vdi;

/// VirtualBox in a folder of its own.
#[derive(Debug)]
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

    /// The same as users have it.
    pub fn snaptree_release(&self) -> Program {
        let mut program = Program::release(self.path().join("state"));
        program.environment.extend(self.environment());
        program
    }

    /// Bare VBoxManage, ready to be run.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(programs().join("VBoxManage"));
        command.args(args).envs(self.environment()).stdin(Stdio::null());
        command
    }

    /// Runs bare VBoxManage to its end, and again where `VBoxSVC` was just coming or going: nothing was asked of it then.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn manage(&self, args: &[&str]) -> Ran {
        let mut tries = 0;
        loop {
            let output = self.command(args).output().expect("VBoxManage starts");
            let ran = Ran {
                code: output.status.code(),
                stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
                stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            };
            tries += 1;
            if tries == 10 || !ran.stderr.contains("Failed to create the VirtualBox object") {
                return ran;
            }
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
        images.filter_map(|file| Some((Vdi::read(&file)?.own(), file))).collect()
    }

    /// What a guest would do: writes blocks of a disk of the machine as it is.
    ///
    /// # Panics
    /// The image cannot be written.
    pub fn write(&self, name: &str, disk: usize, blocks: Range<usize>, seed: u64) {
        let states = self.states(name);
        let image = &states.last().expect("the current one").images[disk];
        let file = &self.images(name)[image];
        let mut vdi = Vdi::open(file);
        blocks.for_each(|block| vdi.write(file, block, seed));
    }

    /// What the machine as it is reads as, disk by disk.
    ///
    /// # Panics
    /// An image is missing or damaged.
    pub fn now(&self, name: &str) -> Vec<String> {
        let (images, states) = (self.images(name), self.states(name));
        states.last().expect("the current one").images.iter().map(|image| sha256(&images, image)).collect()
    }

    /// Images that lie beside a machine's and that none of its states is built upon.
    ///
    /// # Panics
    /// An image is damaged.
    pub fn orphans(&self, name: &str) -> usize {
        let images = self.images(name);
        let mut used = BTreeSet::new();
        for mut image in self.states(name).into_iter().flat_map(|state| state.images) {
            while let Some(file) = images.get(&image) {
                used.insert(image);
                image = Vdi::open(file).parent();
            }
        }
        images.len() - used.len()
    }

    /// Where `VBoxSVC` notes its process.
    fn lock(&self) -> PathBuf {
        format!("/tmp/.vbox-{}-ipc/lock", self.id).into()
    }

    /// The process of its `VBoxSVC`, once a call was made.
    ///
    /// # Panics
    /// None comes up.
    pub fn service(&self) -> u32 {
        self.must(&["list", "vms"]);
        let text = fs::read_to_string(self.lock()).expect("VBoxSVC notes its process");
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
