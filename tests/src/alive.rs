//! A machine that runs under Snaptree, with a model beside it.
//!
//! What a snapshot reads as is taken from its own files when it was made: the guest writes on, so nobody else knows.
//! That it is one instant of the guest's is seen in the content itself (see [`Running::read`]).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::images::{Facts, chain};
use crate::lab::{DISKS, Model, tree_of};
use crate::running::{Hash, Running, Way, becomes, wait_until};

/// The machine, the model, and what was read so far.
#[derive(Debug)]
pub struct Alive {
    /// The machine.
    pub running: Running,
    /// What has to be true.
    pub model: Model<Hash>,
    read: BTreeMap<[PathBuf; 2], (Vec<Facts>, Read)>,
    memory: BTreeMap<String, i64>,
}

/// What was read: the disks, and the guest's round.
type Read = ([Hash; 2], u32);

impl Alive {
    /// A machine in `folder`; it is off.
    pub fn new(folder: &Path, way: Way) -> Self {
        Self::of(Running::new(folder, way))
    }

    /// The same of a machine that was registered already, and has no snapshot.
    pub fn of(running: Running) -> Self {
        Self { running, model: Model::default(), read: BTreeMap::new(), memory: BTreeMap::new() }
    }

    /// Takes a snapshot, and notes what it reads as.
    ///
    /// # Panics
    /// It fails, or is not of one instant.
    pub fn create(&mut self, name: &str) -> Value {
        let done = self.running.program.json(0, &["create", "web", name]);
        self.created(name);
        done
    }

    /// The same with the machine's memory.
    ///
    /// # Panics
    /// It fails, or is not of one instant.
    pub fn create_with_memory(&mut self, name: &str) -> Value {
        let apart = self.running.apart();
        let done = self.running.program.json(0, &["create", "web", name, "--memory"]);
        self.created(name);
        self.has_memory(name, apart);
        done
    }

    /// Notes how far memory and disk of a snapshot are apart.
    pub fn has_memory(&mut self, name: &str, apart: i64) {
        self.memory.insert(name.to_owned(), apart);
    }

    /// The guest goes on where it was when that snapshot was taken; `printed` is what it had printed before.
    ///
    /// # Panics
    /// It goes on somewhere else, or not at all.
    pub fn expect_resumed_from(&mut self, name: &str, printed: usize) {
        let files = self.running.files();
        let (_, round) = self.read(name, &files[name]);
        let apart = self.memory[name];
        let goes_on = becomes(|| {
            let lines = self.running.lines_since(printed);
            let resumed = |(memory, disk): &(u32, u32)| {
                i64::from(*disk) - i64::from(*memory) == apart && (round..=round + 2).contains(disk)
            };
            let first = lines.iter().rposition(resumed);
            first.is_some_and(|first| lines.len() > first + 1)
        });
        let (lines, pid) = (self.running.lines_since(printed), self.running.pid());
        assert!(
            goes_on,
            "not resumed from round {round} of {name}, {apart} apart: {lines:x?} of pid {pid:?}"
        );
        assert_eq!(self.running.apart(), apart, "memory and disk are of one instant after {name}");
    }

    /// Notes what a snapshot reads as that was taken a moment ago.
    ///
    /// # Panics
    /// It is not there, or not of one instant.
    pub fn created(&mut self, name: &str) {
        let files = self.running.files();
        let files = files.get(name).unwrap_or_else(|| panic!("{name} is not in the manifest"));
        let (hashes, _) = self.read(&format!("snapshot {name}"), files);
        self.model.active = DISKS.into_iter().zip(hashes).collect();
        self.model.create(name, &DISKS);
    }

    /// Whether the program lists the model's tree.
    pub fn tree_is(&self, model: &Model<Hash>) -> bool {
        let (current, parents) = tree_of(&self.running.program.json(0, &["list", "web"]));
        current == model.current && parents == model.parents()
    }

    /// Compares the tree, every snapshot's content and the files with the model.
    ///
    /// # Panics
    /// Something differs.
    pub fn check(&mut self, what: &str) {
        let (current, parents) = tree_of(&self.running.program.json(0, &["list", "web"]));
        assert_eq!(current, self.model.current, "{what}: current");
        assert_eq!(parents, self.model.parents(), "{what}: the tree");
        let files = self.running.files();
        for (name, snapshot) in self.model.snapshots.clone() {
            let (hashes, _) = self.read(&format!("{what}: snapshot {name}"), &files[&name]);
            for (disk, hash) in DISKS.iter().zip(hashes) {
                assert_eq!(hash, snapshot.contents[disk], "{what}: {disk} of snapshot {name}");
            }
        }
        self.running.check_files(what);
    }

    /// Forgets what was read, so that everything is read anew.
    pub fn forget_read(&mut self) {
        self.read.clear();
    }

    fn read(&mut self, what: &str, files: &[PathBuf; 2]) -> Read {
        let facts: Vec<Facts> = files.iter().flat_map(|file| chain(file)).collect();
        match self.read.get(files) {
            Some((known, read)) if *known == facts => *read,
            _ => {
                let read = self.running.read(what, files);
                self.read.insert(files.clone(), (facts, read));
                read
            }
        }
    }

    /// The guest was booted from that snapshot, and goes on.
    ///
    /// # Panics
    /// It was booted from something else, or not at all.
    pub fn expect_booted_from(&mut self, name: &str) {
        let files = self.running.files();
        let (_, round) = self.read(name, &files[name]);
        let goes_on = becomes(|| {
            self.running.counters().is_some_and(|(memory, disk)| memory > 1 && disk - memory == round)
        });
        let (counters, pid) = (self.running.counters(), self.running.pid());
        assert!(goes_on, "not booted from round {round} of {name}: {counters:?} of pid {pid:?}");
    }

    /// The guest runs, and goes on from where its disk stands.
    ///
    /// # Panics
    /// It does not go on.
    pub fn expect_alive(&self, what: &str) {
        let (memory, disk) = self.running.counters().unwrap_or((0, 0));
        wait_until(&format!("the guest goes on after {what} (it was at M={memory} D={disk})"), || {
            self.running.counters().is_some_and(|(now, _)| now > memory + 1 || now < memory)
        });
    }
}
