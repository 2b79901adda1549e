//! A real machine's images under Snaptree, with a model beside them that says what everything has to read as.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::images::{Content, Leaks, Reader, make_qcow2, text};
use crate::program::Program;

/// The disks of the machine.
pub const DISKS: [&str; 2] = ["vda", "vdb"];

/// A snapshot of the model; `C` is what a disk reads as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot<C = Content> {
    /// Its parent's name.
    pub parent: Option<String>,
    /// What each disk that it holds reads as.
    pub contents: BTreeMap<&'static str, C>,
    /// Whether it is held.
    pub held: bool,
}

/// What has to be true: libvirt's rules, and nothing of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model<C = Content> {
    /// By name.
    pub snapshots: BTreeMap<String, Snapshot<C>>,
    /// The current one's name.
    pub current: Option<String>,
    /// What each disk of the machine reads as.
    pub active: BTreeMap<&'static str, C>,
}

impl<C: Default> Default for Model<C> {
    fn default() -> Self {
        let active = DISKS.iter().map(|disk| (*disk, C::default())).collect();
        Self { snapshots: BTreeMap::new(), current: None, active }
    }
}

impl<C: Clone> Model<C> {
    /// A snapshot of these disks is taken.
    pub fn create(&mut self, name: &str, disks: &[&'static str]) {
        let contents = disks.iter().map(|disk| (*disk, self.active[disk].clone())).collect();
        let parent = self.current.replace(name.to_owned());
        self.snapshots.insert(name.to_owned(), Snapshot { parent, contents, held: false });
    }

    /// The machine goes back to a snapshot.
    pub fn revert(&mut self, name: &str) {
        for (disk, content) in &self.snapshots[name].contents {
            self.active.insert(disk, content.clone());
        }
        self.current = Some(name.to_owned());
    }

    /// A snapshot is deleted.
    ///
    /// # Panics
    /// There is none of that name.
    pub fn delete(&mut self, name: &str) {
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

    /// A snapshot gets another name.
    ///
    /// # Panics
    /// There is none of that name.
    pub fn rename(&mut self, old: &str, new: &str) {
        let snapshot = self.snapshots.remove(old).expect("it lived");
        self.snapshots.insert(new.to_owned(), snapshot);
        let parents = self.snapshots.values_mut().map(|snapshot| &mut snapshot.parent);
        for reference in parents.chain([&mut self.current]) {
            if reference.as_deref() == Some(old) {
                *reference = Some(new.to_owned());
            }
        }
    }

    /// All snapshots below one.
    pub fn descendants(&self, name: &str) -> BTreeSet<String> {
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

    /// Each snapshot's parent.
    pub fn parents(&self) -> BTreeMap<String, Option<String>> {
        self.snapshots.iter().map(|(name, s)| (name.clone(), s.parent.clone())).collect()
    }
}

/// A registered machine with two disks.
#[derive(Debug)]
pub struct Lab {
    /// The program.
    pub program: Program,
    /// The registered paths.
    pub paths: BTreeMap<&'static str, PathBuf>,
    /// The layers folder.
    pub layers: PathBuf,
    /// What has to be true.
    pub model: Model,
    reader: Reader,
}

impl Lab {
    /// Makes the images in `folder` and registers the machine as `web`.
    ///
    /// # Panics
    /// Anything fails.
    pub fn new(folder: &Path) -> Self {
        Self::with_disks(folder, &DISKS)
    }

    /// The same, with these disks.
    ///
    /// # Panics
    /// Anything fails.
    pub fn with_disks(folder: &Path, disks: &[&'static str]) -> Self {
        Self::with_state(folder, &folder.join("state"), disks)
    }

    /// The same with the state in another folder than the images.
    ///
    /// # Panics
    /// Anything fails.
    pub fn with_state(folder: &Path, state: &Path, disks: &[&'static str]) -> Self {
        let paths: BTreeMap<_, _> =
            disks.iter().map(|disk| (*disk, folder.join(format!("{disk}.qcow2")))).collect();
        paths.values().for_each(|path| make_qcow2(path));
        let program = Program::new(state);
        let given: Vec<String> = paths.iter().map(|(disk, path)| format!("{disk}={}", text(path))).collect();
        let mut add = vec!["domain", "add", "web", "--driver", "qemu"];
        add.extend(given.iter().flat_map(|disk| ["--disk", disk]));
        program.json(0, &add);
        let shown = program.json(0, &["domain", "show", "web"]);
        let id = shown["id"].as_str().expect("the domain's id").to_owned();
        let layers = folder.join(".snaptree").join(id);
        let active = disks.iter().map(|disk| (*disk, Content::default())).collect();
        let model = Model { active, ..Model::default() };
        Self { program, paths, layers, model, reader: Reader::default() }
    }

    /// Writes through the registered path.
    ///
    /// # Panics
    /// There is no such disk.
    pub fn write(&mut self, disk: &'static str, first: usize, count: usize, pattern: u8) {
        let content = self.model.active.get_mut(disk).expect("a disk");
        content.write(&self.paths[disk], first, count, pattern);
    }

    /// From here on clusters that an image holds and does not use are no fault, or are one again; none were seen yet.
    pub fn tolerate_leaks(&mut self, leaks: Leaks) {
        self.reader.tolerate(leaks);
    }

    /// How many images were seen with them since.
    pub fn leaking(&self) -> usize {
        self.reader.leaking()
    }

    /// Forgets what was read, so that everything is read anew.
    pub fn forget_read(&mut self) {
        self.reader.forget();
    }

    /// Whether the program lists the model's tree.
    pub fn tree_is(&self, model: &Model) -> bool {
        let (current, parents) = tree_of(&self.listed());
        current == model.current && parents == model.parents()
    }

    fn listed(&self) -> Value {
        self.program.json(0, &["list", "web"])
    }

    /// Compares everything that can be seen with the model.
    ///
    /// # Panics
    /// Something differs.
    pub fn check(&mut self, what: &str) {
        let listed = self.listed();
        let (current, parents) = tree_of(&listed);
        assert_eq!(current, self.model.current, "{what}: current");
        assert_eq!(parents, self.model.parents(), "{what}: the tree");
        let files = self.files_of_snapshots(&listed);
        for (name, snapshot) in &self.model.snapshots {
            for (disk, content) in &snapshot.contents {
                let image = &files[name][*disk];
                self.reader.expect(&format!("{what}: snapshot {name}, {disk}"), image, content);
            }
        }
        self.check_machine(what);
        self.check_files(what);
    }

    /// Compares the images alone with these models, by the manifest that lies beside them: for a log that cannot be
    /// asked. Says which of them they are.
    ///
    /// # Panics
    /// They are none of them.
    pub fn check_images(&mut self, what: &str, models: &[&Model]) -> usize {
        let snapshots = self.manifest();
        let mut differences = Vec::new();
        for (index, model) in models.iter().enumerate() {
            match self.images_differ(&snapshots, model) {
                None => return index,
                Some(difference) => differences.push(difference),
            }
        }
        panic!("{what}: {}", differences.join("; "));
    }

    fn images_differ(&mut self, snapshots: &[ManifestEntry], model: &Model) -> Option<String> {
        let names: BTreeSet<&str> = snapshots.iter().map(|snapshot| snapshot.name.as_str()).collect();
        if !names.iter().copied().eq(model.snapshots.keys().map(String::as_str)) {
            return Some(format!("there are {names:?}"));
        }
        for snapshot in snapshots {
            for (disk, content) in &model.snapshots[&snapshot.name].contents {
                if let Some(difference) = self.reader.difference(&snapshot.files[*disk], content) {
                    return Some(format!("{} of {}: {difference}", disk, snapshot.name));
                }
            }
        }
        for (disk, content) in &model.active {
            let image = std::fs::canonicalize(&self.paths[disk]).expect("the registered path opens");
            if let Some(difference) = self.reader.difference(&image, content) {
                return Some(format!("the machine's {disk}: {difference}"));
            }
        }
        None
    }

    /// Compares what the registered paths open with the model.
    ///
    /// # Panics
    /// Something differs.
    pub fn check_machine(&mut self, what: &str) {
        for (disk, content) in &self.model.active {
            let image = std::fs::canonicalize(&self.paths[disk]).expect("the registered path opens");
            self.reader.expect(&format!("{what}: the machine's {disk}"), &image, content);
        }
    }

    /// Whether the registered paths open what this model says.
    ///
    /// # Panics
    /// One of them opens nothing.
    pub fn machine_reads_as(&mut self, model: &Model) -> bool {
        model.active.iter().all(|(disk, content)| {
            let image = std::fs::canonicalize(&self.paths[disk]).expect("the registered path opens");
            self.reader.difference(&image, content).is_none()
        })
    }

    /// The files of each live snapshot, as the manifest beside the layers says.
    fn files_of_snapshots(&self, listed: &Value) -> BTreeMap<String, BTreeMap<String, PathBuf>> {
        // A name in the manifest may be an older one: what was edited since is only in the log.
        let names: BTreeMap<&str, &str> = listed["snapshots"]
            .as_array()
            .expect("snapshots")
            .iter()
            .map(|s| (s["id"].as_str().expect("an id"), s["name"].as_str().expect("a name")))
            .collect();
        let live = self.manifest().into_iter().map(|ManifestEntry { id, files, .. }| {
            let name = names.get(id.as_str());
            let name = name.unwrap_or_else(|| panic!("{id} is in the manifest and not listed"));
            ((*name).to_owned(), files)
        });
        live.collect()
    }

    /// What the manifest says of each live snapshot; nothing if there is none.
    fn manifest(&self) -> Vec<ManifestEntry> {
        let Ok(bytes) = std::fs::read(self.layers.join("active/manifest.json")) else { return Vec::new() };
        let manifest: Value = serde_json::from_slice(&bytes).expect("a manifest");
        let snapshots = manifest["snapshots"].as_array().expect("snapshots").iter();
        let live = snapshots.filter(|snapshot| snapshot["tombstone"] == false);
        live.map(|snapshot| {
            let word = |key: &str| snapshot[key].as_str().expect("a word").to_owned();
            let files = snapshot["files"].as_object().expect("files").iter();
            let path = |file: &Value| PathBuf::from(file.as_str().expect("a path"));
            let files = files.map(|(disk, file)| (disk.clone(), path(file))).collect();
            ManifestEntry { id: word("id"), name: word("name"), files }
        })
        .collect()
    }

    /// Every file in the layers folder is known to the log, and clean.
    fn check_files(&mut self, what: &str) {
        let Ok(entries) = std::fs::read_dir(&self.layers) else {
            assert!(self.model.snapshots.is_empty(), "{what}: the layers folder is gone");
            return;
        };
        let shown = self.program.json(0, &["domain", "show", "web"]);
        let layers = shown["layers"].as_array().unwrap_or_else(|| panic!("layers in {shown}")).iter();
        let known: BTreeSet<PathBuf> =
            layers.map(|layer| PathBuf::from(layer["file"].as_str().expect("a file"))).collect();
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
        assert!(generations <= 1, "{what}: {generations} generations");
        for file in &known {
            self.reader.expect_clean(file);
        }
    }
}

/// A live snapshot in a manifest.
struct ManifestEntry {
    id: String,
    name: String,
    files: BTreeMap<String, PathBuf>,
}

/// The current snapshot and each one's parent, as `list` tells them.
pub(crate) fn tree_of(listed: &Value) -> (Option<String>, BTreeMap<String, Option<String>>) {
    let name = |value: &Value| value.as_str().map(str::to_owned);
    let snapshots = listed["snapshots"].as_array().expect("snapshots").iter();
    let parents = snapshots.map(|s| (name(&s["name"]).expect("a name"), name(&s["parent"]))).collect();
    (name(&listed["current"]), parents)
}
