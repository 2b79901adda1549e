//! A machine in front of an operation, as often as it is wanted.

use std::fs;
use std::path::{Path, PathBuf};

use crate::lab::{Lab, Model};
use crate::rewind::Rewind;
use crate::scenarios::Scenario;

/// A tool that cannot be run is tried again at once: the pauses between are nothing that is tried here.
const SETTINGS: &str = "[retry]\ndelay-min = \"1ms\"\ndelay-max = \"10ms\"\n";

/// How the machine comes back to where the operation begins.
#[derive(Debug)]
enum Start {
    /// All is made anew: an image that shall be adopted must have one name, so nothing can keep its inode.
    Anew,
    /// It is put back.
    Rewound(Rewind),
}

/// A scenario's machine, prepared once and put back for every try.
#[derive(Debug)]
pub struct Scene {
    /// What is tried.
    pub scenario: Scenario,
    /// The machine.
    pub lab: Lab,
    /// What it has to be before the operation.
    pub model: Model,
    /// The folder with its images and its state.
    pub machine: PathBuf,
    start: Start,
    folder: tempfile::TempDir,
}

impl Scene {
    /// Prepares it, in memory where that can be: only processes are killed here, and syncing costs most of the time.
    ///
    /// # Panics
    /// Anything fails.
    pub fn new(scenario: Scenario) -> Self {
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder");
        let machine = folder.path().join("machine");
        fs::create_dir(&machine).expect("a folder");
        let mut lab = Self::prepared(&scenario, &machine, folder.path());
        lab.check("before it all");
        let start = if lab.model.snapshots.is_empty() {
            Start::Anew
        } else {
            Start::Rewound(Rewind::of(&machine, &folder.path().join("inodes")))
        };
        Self { scenario, model: lab.model.clone(), lab, machine, start, folder }
    }

    fn prepared(scenario: &Scenario, machine: &Path, folder: &Path) -> Lab {
        let mut lab = Lab::with_disks(machine, scenario.disks);
        lab.program = lab.program.with_settings(&folder.join("settings"), SETTINGS);
        (scenario.prepare)(&mut lab);
        lab
    }

    /// A folder beside the machine's.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Puts everything back.
    ///
    /// # Panics
    /// It cannot.
    pub fn begin(&mut self) {
        match &self.start {
            Start::Anew => {
                fs::remove_dir_all(&self.machine).expect("the folder");
                fs::create_dir(&self.machine).expect("the folder");
                self.lab = Self::prepared(&self.scenario, &self.machine, self.folder.path());
            }
            Start::Rewound(rewind) => rewind.restore(),
        }
        self.lab.model = self.model.clone();
    }
}
