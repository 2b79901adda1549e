//! Random operations on real qcow2 images, against a model kept beside them.
//!
//! `SNAPTREE_SEED=N` repeats a run, `SNAPTREE_OPERATIONS=N` makes it longer.

#![cfg(feature = "lab")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::Value;
use snaptree_tests::images::{Content, Reader, make_qcow2, text};
use snaptree_tests::program::Program;
use snaptree_tests::random::Random;

const DISKS: [&str; 2] = ["vda", "vdb"];

/// A snapshot of the model.
struct Snapshot {
    parent: Option<String>,
    contents: BTreeMap<&'static str, Content>,
    held: bool,
}

struct Lab {
    program: Program,
    paths: BTreeMap<&'static str, PathBuf>,
    layers: PathBuf,
    random: Random,
    reader: Reader,
    snapshots: BTreeMap<String, Snapshot>,
    current: Option<String>,
    active: BTreeMap<&'static str, Content>,
    named: usize,
    merged: usize,
    deferred: usize,
    deletes: usize,
    reverts: usize,
    roots_max: usize,
}

impl Lab {
    fn new(folder: &Path, seed: u64) -> Self {
        let paths: BTreeMap<_, _> =
            DISKS.iter().map(|disk| (*disk, folder.join(format!("{disk}.qcow2")))).collect();
        paths.values().for_each(|path| make_qcow2(path));
        let program = Program::new(folder.join("state"));
        let disks: Vec<String> = paths.iter().map(|(disk, path)| format!("{disk}={}", text(path))).collect();
        let added = program
            .json(0, &["domain", "add", "web", "--driver", "qemu", "--disk", &disks[0], "--disk", &disks[1]]);
        let id = added["domain"]["id"].as_str().or(added["id"].as_str()).expect("the domain's id").to_owned();
        Self {
            program,
            layers: folder.join(".snaptree").join(id),
            paths,
            random: Random::new(seed),
            reader: Reader::default(),
            snapshots: BTreeMap::new(),
            current: None,
            active: DISKS.iter().map(|disk| (*disk, Content::default())).collect(),
            named: 0,
            merged: 0,
            deferred: 0,
            deletes: 0,
            reverts: 0,
            roots_max: 0,
        }
    }

    fn any_snapshot(&mut self) -> Option<String> {
        let names: Vec<String> = self.snapshots.keys().cloned().collect();
        (!names.is_empty()).then(|| self.random.pick(&names).clone())
    }

    /// One random operation; says what it was.
    fn act(&mut self) -> String {
        let roll = self.random.below(100);
        let full = self.snapshots.len() > 14;
        match roll {
            0..=24 => self.write(),
            25..=49 if !full => self.create(),
            50..=66 => self.revert(),
            67..=92 => self.delete(),
            93..=95 => self.rename(),
            96..=97 => self.hold_or_release(),
            _ if full => self.delete(),
            _ => self.reconcile(),
        }
    }

    fn write(&mut self) -> String {
        let disk = *self.random.pick(&DISKS);
        let (first, count) = (self.random.below(Content::BLOCKS), 1 + self.random.below(24));
        let pattern = u8::try_from(1 + self.random.below(255)).expect("a byte");
        let path = &self.paths[disk];
        self.active.get_mut(disk).expect("a disk").write(path, first, count, pattern);
        format!("write {disk}")
    }

    fn create(&mut self) -> String {
        self.named += 1;
        let name = format!("s{}", self.named);
        let mut held = DISKS.to_vec();
        if self.random.chance(15) {
            let left_out = *self.random.pick(&DISKS);
            held.retain(|disk| *disk != left_out);
            let xml = format!(
                "<domainsnapshot><name>{name}</name><disks><disk name='{left_out}' snapshot='no'/></disks></domainsnapshot>"
            );
            self.program.json_with_stdin(&["create", "web", "--xml", "-"], &xml);
        } else {
            self.program.json(0, &["create", "web", &name]);
        }
        let contents = held.iter().map(|disk| (*disk, self.active[disk].clone())).collect();
        let snapshot = Snapshot { parent: self.current.replace(name.clone()), contents, held: false };
        self.snapshots.insert(name.clone(), snapshot);
        format!("create {name} of {held:?}")
    }

    fn revert(&mut self) -> String {
        let Some(name) = self.any_snapshot() else { return self.create() };
        self.program.json(0, &["revert", "web", &name]);
        for (disk, content) in &self.snapshots[&name].contents {
            self.active.insert(disk, content.clone());
        }
        self.current = Some(name.clone());
        self.reverts += 1;
        format!("revert {name}")
    }

    fn descendants(&self, name: &str) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        let mut open = vec![name.to_owned()];
        while let Some(parent) = open.pop() {
            let children = self.snapshots.iter().filter(|(_, s)| s.parent.as_ref() == Some(&parent));
            for (child, _) in children {
                found.insert(child.clone());
                open.push(child.clone());
            }
        }
        found
    }

    fn delete(&mut self) -> String {
        let Some(name) = self.any_snapshot() else { return self.create() };
        let mut args = vec!["delete".to_owned(), "web".to_owned(), name.clone()];
        let mut going = BTreeSet::from([name.clone()]);
        match self.random.below(10) {
            0 => {
                args.push("--children".to_owned());
                going.extend(self.descendants(&name));
            }
            1 => {
                args.push("--children-only".to_owned());
                going = self.descendants(&name);
            }
            2 | 3 => {
                let other = self.any_snapshot().expect("there is one");
                going.insert(other.clone());
                args.push(other);
            }
            _ => {}
        }
        match self.random.below(10) {
            0 => args.push("--now".to_owned()),
            1 => args.push("--defer".to_owned()),
            _ => {}
        }
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        if going.iter().any(|name| self.snapshots[name].held) {
            let refused = self.program.json(4, &args);
            assert_eq!(refused["error"]["code"], "held", "{refused}");
            return format!("{args:?}, refused as held");
        }
        let done = self.program.json(0, &args);
        assert_eq!(done["outcome"], "succeeded", "{done}");
        for merge in done["merges"].as_array().expect("merges") {
            match merge["outcome"].as_str() {
                Some("succeeded") => self.merged += 1,
                Some("deferred") => self.deferred += 1,
                other => panic!("{other:?}: {done}"),
            }
        }
        self.deletes += 1;
        for name in &going {
            self.forget(name);
        }
        format!("{args:?}")
    }

    fn forget(&mut self, name: &str) {
        let gone = self.snapshots.remove(name).expect("it lived");
        for snapshot in self.snapshots.values_mut() {
            if snapshot.parent.as_deref() == Some(name) {
                snapshot.parent.clone_from(&gone.parent);
            }
        }
        if self.current.as_deref() == Some(name) {
            self.current = gone.parent;
        }
    }

    fn rename(&mut self) -> String {
        let Some(old) = self.any_snapshot() else { return self.create() };
        self.named += 1;
        let new = format!("renamed {}", self.named);
        self.program.json(0, &["edit", "web", &old, "--name", &new]);
        let snapshot = self.snapshots.remove(&old).expect("it lived");
        self.snapshots.insert(new.clone(), snapshot);
        let parents = self.snapshots.values_mut().map(|snapshot| &mut snapshot.parent);
        for reference in parents.chain([&mut self.current]) {
            if reference.as_ref() == Some(&old) {
                *reference = Some(new.clone());
            }
        }
        format!("rename {old} to {new}")
    }

    fn hold_or_release(&mut self) -> String {
        let Some(name) = self.any_snapshot() else { return self.create() };
        let held = self.snapshots[&name].held;
        if held {
            self.program.json(0, &["release", "web", &name]);
        } else {
            self.program.json(0, &["hold", "web", &name, "--reason", "the test"]);
        }
        self.snapshots.get_mut(&name).expect("it lives").held = !held;
        format!("hold or release {name}")
    }

    fn reconcile(&mut self) -> String {
        self.program.json(0, &["reconcile", "web"]);
        "reconcile".to_owned()
    }

    /// Compares everything that can be seen with the model.
    fn check(&mut self, what: &str) {
        self.check_tree(what);
        let manifest = std::fs::read(self.layers.join("active/manifest.json")).ok();
        let manifest: Value =
            manifest.map_or(Value::Null, |bytes| serde_json::from_slice(&bytes).expect("a manifest"));
        for (name, snapshot) in &self.snapshots {
            for (disk, content) in &snapshot.contents {
                let image = self.file_of(&manifest, name, disk);
                self.reader.expect(&format!("{what}: snapshot {name}, {disk}"), &image, content);
            }
        }
        for (disk, content) in &self.active {
            let image = std::fs::canonicalize(&self.paths[disk]).expect("the registered path opens");
            self.reader.expect(&format!("{what}: the machine's {disk}"), &image, content);
        }
        self.check_files(what);
    }

    /// The name in the manifest may be an older one: what was edited since is only in the log.
    fn file_of(&self, manifest: &Value, name: &str, disk: &str) -> PathBuf {
        let shown = self.program.json(0, &["show", "web", name]);
        let id = shown["id"].as_str().expect("an id");
        let entry = manifest["snapshots"].as_array().expect("snapshots").iter().find(|s| s["id"] == id);
        let entry = entry.unwrap_or_else(|| panic!("{name} ({id}) is not in the manifest"));
        assert_eq!(entry["tombstone"], false, "{entry}");
        PathBuf::from(entry["files"][disk].as_str().unwrap_or_else(|| panic!("{disk} of {entry}")))
    }

    fn check_tree(&mut self, what: &str) {
        let listed = self.program.json(0, &["list", "web"]);
        assert_eq!(listed["current"].as_str(), self.current.as_deref(), "{what}: current");
        let found: BTreeMap<String, Option<String>> = listed["snapshots"]
            .as_array()
            .expect("snapshots")
            .iter()
            .map(|s| {
                (s["name"].as_str().expect("a name").to_owned(), s["parent"].as_str().map(str::to_owned))
            })
            .collect();
        let wanted: BTreeMap<String, Option<String>> =
            self.snapshots.iter().map(|(name, s)| (name.clone(), s.parent.clone())).collect();
        assert_eq!(found, wanted, "{what}: the tree");
        let roots = wanted.values().filter(|parent| parent.is_none()).count();
        self.roots_max = self.roots_max.max(roots);
    }

    /// Every file in the layers folder is known to the log, and clean.
    fn check_files(&mut self, what: &str) {
        let Ok(entries) = std::fs::read_dir(&self.layers) else {
            assert!(self.snapshots.is_empty(), "{what}: the layers folder is gone");
            return;
        };
        let shown = self.program.json(0, &["domain", "show", "web"]);
        let known: BTreeSet<PathBuf> = shown["layers"]
            .as_array()
            .unwrap_or_else(|| panic!("layers in {shown}"))
            .iter()
            .map(|layer| PathBuf::from(layer["file"].as_str().expect("a file")))
            .collect();
        let mut generations = 0;
        for entry in entries {
            let path = entry.expect("an entry").path();
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            if name.starts_with("gen-") {
                generations += 1;
            } else if name != "active" {
                assert!(known.contains(&path), "{what}: the log does not know {}", path.display());
            }
        }
        assert_eq!(generations, 1, "{what}: generations");
        for file in &known {
            self.reader.expect_clean(file);
        }
    }
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().map_or(default, |text| text.parse().expect("a number"))
}

#[test]
fn random_operations_agree_with_the_model() {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
    let seed = number("SNAPTREE_SEED", u64::from(clock.subsec_nanos()));
    let operations = number("SNAPTREE_OPERATIONS", 200);
    println!("repeat with: SNAPTREE_SEED={seed} SNAPTREE_OPERATIONS={operations}");
    let folder = tempfile::tempdir().expect("a folder");
    let mut lab = Lab::new(folder.path(), seed);
    for number in 0..operations {
        let what = format!("seed {seed}, operation {number}: {}", lab.act());
        if number % 50 == 49 {
            lab.reader.forget();
        }
        lab.check(&what);
    }
    lab.program.json(0, &["reconcile", "web"]);
    lab.reader.forget();
    lab.check("the end");
    assert_eq!(lab.program.json(0, &["audit", "verify"])["ok"], true);
    println!(
        "{operations} operations: {} deletes, {} reverts, {} merges done, {} deferred, up to {} roots, {} snapshots left",
        lab.deletes,
        lab.reverts,
        lab.merged,
        lab.deferred,
        lab.roots_max,
        lab.snapshots.len()
    );
    assert!(lab.merged > 0 && lab.reverts > 0, "the run exercised too little");
}
