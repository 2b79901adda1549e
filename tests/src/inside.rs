//! A machine whose snapshots are inside its images, on a real QEMU, with a model beside it.
//!
//! The guest counts in its memory and on its disk, and prints both: the difference of the two stays what it was as long as
//! memory and disk are of one instant. What a snapshot's disks read as is taken out of the images by qemu-img.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::images::{text, tool};
use crate::lab::{DISKS, Model, tree_of};
use crate::running::{Hash, Running, Way, becomes, wait_until};

/// The guest makes fewer rounds in a second.
const ROUNDS_A_SECOND: u64 = 25;

/// Where a guest stood that was snapshotted with its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The rounds in its memory, at least and at most.
    pub rounds: (u32, u32),
    /// How far its disk is ahead of them.
    pub ahead: u32,
}

/// The machine and the model.
#[derive(Debug)]
pub struct Inside {
    /// The machine.
    pub running: Running,
    /// What has to be true.
    pub model: Model<Hash>,
    /// The snapshots with memory.
    pub marks: BTreeMap<String, Mark>,
    folder: std::path::PathBuf,
}

impl Inside {
    /// A machine in `folder`; it is off.
    pub fn new(folder: &Path, way: Way) -> Self {
        let running = Running::new(folder, way);
        Self { running, model: Model::default(), marks: BTreeMap::new(), folder: folder.to_owned() }
    }

    /// Takes a snapshot, and notes where the guest stood and what the disks read as.
    ///
    /// # Panics
    /// It fails.
    pub fn create(&mut self, name: &str) {
        let before = self.counters();
        let done = self.running.program.json(0, &["create", "web", name, "--internal"]);
        assert_eq!(done["outcome"], "succeeded", "{done}");
        self.created(name, before);
    }

    /// Notes a snapshot that was taken since the guest stood at `before`.
    ///
    /// # Panics
    /// It is not there.
    pub fn created(&mut self, name: &str, before: Option<(u32, u32)>) {
        let shown = self.running.program.json(0, &["show", "web", name]);
        self.model.active = DISKS.into_iter().zip(self.contents(name)).collect();
        self.model.create(name, &DISKS);
        if shown["memory"] == "internal" {
            let (before, disk) = before.expect("it ran");
            // A guest that was killed since had printed what it came to.
            let (after, _) = self.running.counters().expect("it ran");
            // What it had printed when its monitor was busy comes a moment later.
            self.marks.insert(name.to_owned(), Mark { rounds: (before, after + 2), ahead: disk - before });
        }
    }

    /// The last line of a guest that runs.
    pub fn counters(&self) -> Option<(u32, u32)> {
        self.running.pid()?;
        self.running.counters()
    }

    /// The tag of a snapshot in the images.
    ///
    /// # Panics
    /// It is not there.
    pub fn tag(&self, name: &str) -> String {
        let shown = self.running.program.json(0, &["show", "web", name]);
        format!("st-{}", shown["id"].as_str().expect("an id"))
    }

    /// What a snapshot's disks read as.
    ///
    /// # Panics
    /// An image does not have it.
    pub fn contents(&self, name: &str) -> [Hash; 2] {
        let tag = format!("snapshot.name={}", self.tag(name));
        let raw = self.folder.join("raw");
        [0, 1].map(|disk: usize| {
            let image = text(&self.running.paths[disk]);
            tool("qemu-img", &["convert", "-U", "-l", &tag, "-f", "qcow2", "-O", "raw", image, text(&raw)]);
            Sha256::digest(std::fs::read(&raw).expect("the raw copy")).into()
        })
    }

    /// What the disks of a machine that is off read as.
    ///
    /// # Panics
    /// They cannot be read.
    pub fn disks(&self) -> [Hash; 2] {
        let raw = self.folder.join("raw");
        [0, 1].map(|disk: usize| {
            let image = text(&self.running.paths[disk]);
            tool("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", image, text(&raw)]);
            Sha256::digest(std::fs::read(&raw).expect("the raw copy")).into()
        })
    }

    /// Compares the tree, every snapshot's content and the tags with the model.
    ///
    /// # Panics
    /// Something differs.
    pub fn check(&self, what: &str) {
        self.check_tree(what);
        for (name, snapshot) in &self.model.snapshots {
            for (disk, hash) in DISKS.iter().zip(self.contents(name)) {
                assert_eq!(hash, snapshot.contents[disk], "{what}: {disk} of snapshot {name}");
            }
        }
        for path in &self.running.paths {
            let info = tool("qemu-img", &["info", "-U", "--output=json", text(path)]);
            let info: Value = serde_json::from_slice(&info.stdout).expect("JSON");
            let tags = info["snapshots"].as_array().map_or(0, Vec::len);
            assert_eq!(
                tags,
                self.model.snapshots.len(),
                "{what}: {} has other snapshots: {info}",
                path.display()
            );
            assert!(
                std::fs::symlink_metadata(path).expect("the image").is_file(),
                "{what}: it is a plain image"
            );
        }
    }

    /// Compares the tree with the model.
    ///
    /// # Panics
    /// It differs.
    pub fn check_tree(&self, what: &str) {
        assert!(self.tree_is(&self.model), "{what}: {:?} and {:?}", self.model.current, self.model.parents());
    }

    /// Whether the program lists the model's tree.
    pub fn tree_is(&self, model: &Model<Hash>) -> bool {
        let (current, parents) = tree_of(&self.running.program.json(0, &["list", "web"]));
        current == model.current && parents == model.parents()
    }

    /// The guest went on from where it was snapshotted, at `since`, and its disk with it.
    ///
    /// # Panics
    /// It did not.
    pub fn expect_at(&self, name: &str, since: Instant) {
        let mark = self.marks[name];
        let is_at = |(rounds, disk): (u32, u32)| {
            let passed = u32::try_from(since.elapsed().as_secs() * ROUNDS_A_SECOND).expect("a small number");
            disk.wrapping_sub(rounds) == mark.ahead
                && rounds > mark.rounds.0
                && rounds <= mark.rounds.1 + passed + 25
        };
        let is_so = becomes(|| self.running.counters().is_some_and(is_at));
        assert!(is_so, "{name} is at {mark:?}, and the guest at {:?}", self.running.counters());
        self.expect_alive(name);
        let (rounds, disk) = self.running.counters().expect("it printed");
        assert_eq!(disk.wrapping_sub(rounds), mark.ahead, "{name}: memory and disk are of two instants");
    }

    /// The guest goes on.
    ///
    /// # Panics
    /// It does not.
    pub fn expect_alive(&self, what: &str) {
        let before = self.running.counters();
        wait_until(&format!("the guest goes on after {what}, from {before:?}"), || {
            self.running.counters() != before
        });
    }

    /// Says something to QEMU, beside the program.
    ///
    /// # Panics
    /// It is refused.
    pub fn qmp(&self, command: &str, arguments: &Value) -> Value {
        self.running.qmp(command, arguments)
    }
}
