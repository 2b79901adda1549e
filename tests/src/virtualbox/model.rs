//! A machine that Snaptree looks after, and a model of it.

use std::collections::BTreeMap;
use std::ops::Range;

use serde_json::{Value, json};

use super::Vbox;
use crate::program::Program;

/// Blocks of a disk, where nothing is said of it; few, so that writes meet.
pub const BLOCKS: usize = 12;

/// A machine that Snaptree looks after, and what all of it must read as.
pub struct Modelled {
    /// Where it is.
    pub vbox: Vbox,
    /// Snaptree.
    pub program: Program,
    /// Its disks.
    pub disks: usize,
    writes: u64,
    /// Per snapshot its parent and what its disks read as.
    pub snapshots: BTreeMap<String, (Option<String>, Vec<String>)>,
    /// The current snapshot.
    pub current: Option<String>,
    /// What the machine as it is reads as.
    pub now: Vec<String>,
    /// The last revert that succeeded.
    reverted_by: Value,
    /// How many repairs were told of when it was last asked.
    told: usize,
}

impl Modelled {
    /// One with so many empty disks of so many blocks.
    ///
    /// # Panics
    /// It cannot be made.
    pub fn new(disks: usize, blocks: usize) -> Self {
        let vbox = Vbox::new();
        vbox.machine("web", disks, blocks);
        let program = vbox.snaptree();
        program.json(0, &["domain", "add", "web", "--driver", "virtualbox", "--vm", "web"]);
        let now = vbox.now("web");
        Self {
            vbox,
            program,
            disks,
            writes: 0,
            snapshots: BTreeMap::new(),
            current: None,
            now,
            reverted_by: Value::Null,
            told: 0,
        }
    }

    /// Writes blocks of a disk.
    ///
    /// # Panics
    /// They cannot be written.
    pub fn write(&mut self, disk: usize, blocks: Range<usize>) {
        self.writes += 1;
        self.vbox.write("web", disk, blocks, self.writes);
        self.now = self.vbox.now("web");
    }

    /// Takes a snapshot.
    ///
    /// # Panics
    /// It fails.
    pub fn create(&mut self, name: &str) {
        self.program.json(0, &["create", "web", name]);
        self.created(name);
    }

    /// One was taken.
    pub fn created(&mut self, name: &str) {
        let parent = self.current.replace(name.to_owned());
        self.snapshots.insert(name.to_owned(), (parent, self.now.clone()));
    }

    /// Reverts.
    ///
    /// # Panics
    /// It fails.
    pub fn revert(&mut self, name: &str) {
        self.reverted_by = self.program.json(0, &["revert", "web", name, "--yes"])["operation"].clone();
        self.reverted(name);
    }

    /// The machine was reverted.
    ///
    /// # Panics
    /// There is no such snapshot.
    pub fn reverted(&mut self, name: &str) {
        self.current = Some(name.to_owned());
        self.now = self.snapshots[name].1.clone();
    }

    /// Deletes a snapshot.
    ///
    /// # Panics
    /// It fails.
    pub fn delete(&mut self, name: &str) -> Value {
        let deleted = self.program.json(0, &["delete", "web", name, "--yes"]);
        self.deleted(name);
        deleted
    }

    /// A snapshot was deleted.
    ///
    /// # Panics
    /// There is no such snapshot.
    pub fn deleted(&mut self, name: &str) {
        let (parent, _) = self.snapshots.remove(name).expect("it is there");
        for (above, _) in self.snapshots.values_mut().filter(|(above, _)| above.as_deref() == Some(name)) {
            above.clone_from(&parent);
        }
        if self.current.as_deref() == Some(name) {
            self.current = parent;
        }
    }

    /// Tree and current are the model's, and so is what every snapshot and the machine read as.
    ///
    /// # Panics
    /// They are not.
    pub fn check(&self) {
        let list = self.program.json(0, &["list", "web"]);
        let listed = list["snapshots"].as_array().expect("snapshots").iter();
        let found: BTreeMap<&str, &Value> =
            listed.map(|s| (s["name"].as_str().expect("a name"), &s["parent"])).collect();
        let parents: BTreeMap<&str, Value> =
            self.snapshots.iter().map(|(name, (parent, _))| (name.as_str(), json!(parent))).collect();
        assert_eq!(found, parents.iter().map(|(name, parent)| (*name, parent)).collect(), "{list}");
        assert_eq!(list["current"], json!(self.current));
        let contents = self.vbox.contents("web");
        assert_eq!(contents[""], self.now, "the machine as it is");
        for (name, (_, content)) in &self.snapshots {
            // The tests' own reader of the settings leaves names escaped.
            let name = name
                .replace('&', "&amp;")
                .replace('<', "&lt;")
                .replace('>', "&gt;")
                .replace('"', "&quot;")
                .replace('ä', "&#xE4;");
            assert_eq!(contents.get(&name), Some(content), "snapshot {name}");
        }
        let drift = self.program.json(0, &["drift", "web"]);
        assert_eq!(drift["domains"][0]["findings"], json!([]), "{drift}");
        assert_eq!(drift["domains"][0]["adopted"], json!([]), "{drift}");
    }

    /// After a recovery nothing is open, and the request was carried through or left no trace.
    ///
    /// # Panics
    /// It was not so.
    pub fn settled(&mut self, verb: &str, name: &str, what: &str) {
        let open = self.program.json(0, &["op", "list", "--open"]);
        assert_eq!(open["operations"], json!([]), "{what}");
        let operations = self.program.json(0, &["op", "list"]);
        let mut reverts = operations["operations"].as_array().expect("operations").iter();
        let newest = reverts.rfind(|o| o["kind"] == "revert" && o["outcome"] == "succeeded");
        let newest = newest.map(|revert| revert["operation"].clone());
        let list = self.program.json(0, &["list", "web"])["snapshots"].to_string();
        let is_there = list.contains(&format!("\"{name}\""));
        match verb {
            "create" if is_there => self.created(name),
            // Once it has begun it only goes forward.
            "delete" if !is_there => self.deleted(name),
            // One that was killed before its request was written is none.
            "revert" => {
                if let Some(revert) = newest.filter(|revert| *revert != self.reverted_by) {
                    self.reverted_by = revert;
                    self.reverted(name);
                }
            }
            _ => {}
        }
        self.check();
    }

    /// How many deleted snapshots VirtualBox still has.
    pub fn hidden(&self) -> usize {
        self.vbox.states("web").iter().filter(|state| state.name.starts_with("~deleted~")).count()
    }

    /// What was told of repairs so far.
    pub fn repairs(&self) -> Vec<String> {
        let log = self.program.run(&["log", "web", "--kind", "Domain.Repaired"]).stdout;
        log.lines().filter(|line| line.contains("repaired")).map(str::to_owned).collect()
    }

    /// Whether something was repaired since that was asked last.
    pub fn is_newly_repaired(&mut self) -> bool {
        let now = self.repairs().len();
        now > std::mem::replace(&mut self.told, now)
    }

    /// Keeps the tree small: what is beyond a few snapshots is deleted, the root never.
    ///
    /// # Panics
    /// A delete fails.
    pub fn prune(&mut self, most: usize) {
        while self.snapshots.len() > most {
            let oldest = self.snapshots.keys().find(|name| *name != "root").expect("another").clone();
            self.delete(&oldest);
        }
    }
}
