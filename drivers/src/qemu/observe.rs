//! Reading what is there: headers and locks only, no child process.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use snaptree_engine::DiskName;
use snaptree_engine::domain::RunState;
use snaptree_engine::driver::{DriverError, FileFacts, InUse, Observation};
use snaptree_engine::layer::FileStamp;
use snaptree_engine::operation::{Code, Failure};
use snaptree_engine::project::DomainState;

use super::bitmaps::{self, Bitmap};
use super::config::{DEPTH_MAX, QemuConfig, active};
use super::files::{Doing, facts, folder_of, if_there, stamp, unfit};
use super::generation;
use super::inside::inside;
use super::internal::{listed, table};
use super::libvirt;
use super::live::{Machine, living};
use super::lock::{used_by, writers};
use super::qcow2::{Backing, FormatOptions, Header, ReadError};
use super::runs::Runs;
use crate::room::room;

/// Most entries that are looked at in a folder that is not Snaptree's own.
const FOREIGN_ENTRIES_MAX: usize = 4096;
/// Most entries that are looked at in the layers folder.
const OWN_ENTRIES_MAX: usize = 65_536;

/// What only this driver reads of an observation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Detail {
    /// Who Snaptree runs as.
    pub(super) uid: u32,
    /// What is at each registered path.
    pub(super) registered: BTreeMap<DiskName, Entry>,
    /// Every name in the layers folder.
    pub(super) folder: BTreeSet<String>,
    /// The owner of every image of ours.
    pub(super) owners: BTreeMap<PathBuf, u32>,
    /// What every image of ours says it is built upon, word for word.
    pub(super) backing: BTreeMap<PathBuf, Backing>,
    /// Files in the layers folder that are not in the log and hold data of their own.
    #[serde(default)]
    pub(super) written: BTreeSet<PathBuf>,
    /// The internal snapshots of what the machine writes.
    #[serde(default)]
    pub(super) tables: BTreeMap<PathBuf, Vec<table::Entry>>,
    /// The dirty bitmaps of images of ours.
    #[serde(default)]
    pub(super) bitmaps: BTreeMap<PathBuf, Vec<Bitmap>>,
    /// Images of ours that nobody closed, by their headers; also those that a machine has open.
    #[serde(default)]
    pub(super) unclosed: BTreeSet<PathBuf>,
    /// How images of ours are laid out.
    #[serde(default)]
    pub(super) formats: BTreeMap<PathBuf, FormatOptions>,
    /// The machine, where it can be reached while it runs.
    #[serde(default)]
    pub(super) machine: Machine,
}

/// What is at a registered path.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "entry", rename_all = "kebab-case")]
pub(super) enum Entry {
    /// A regular file.
    File {
        /// Its inode.
        inode: u64,
        /// How many names it has.
        links: u64,
    },
    /// A symlink.
    Link {
        /// Where it leads, word for word.
        target: PathBuf,
    },
    /// Nothing.
    Missing,
    /// A folder, a device.
    Other,
}

impl Detail {
    pub(super) fn of(observation: &Observation) -> Result<Self, Failure> {
        Self::deserialize(&observation.detail).map_err(|error| {
            Failure::new(Code::Invalid, format!("the observation was not made by the qemu driver: {error}"))
        })
    }

    /// An internal snapshot of an image.
    pub(super) fn entry(&self, file: &Path, tag: &str) -> Option<&table::Entry> {
        self.tables.get(file)?.iter().find(|entry| entry.tag == tag)
    }
}

/// Reads everything that planning and recovery decide by.
pub(super) fn observe(
    state: &DomainState,
    at: Timestamp,
    machine: Machine,
) -> Result<Observation, DriverError> {
    let (_, config) = QemuConfig::of(state)?;
    let mut detail = Detail { uid: nix::unistd::geteuid().as_raw(), ..Detail::default() };
    detail.folder = names(&config.layers)?;
    for (disk, paths) in &config.disks {
        detail.registered.insert(disk.clone(), entry(&paths.resolved)?);
    }
    let mut seen = Observation {
        at,
        run_state: RunState::Off,
        in_use: in_use(state, &config)?,
        files: BTreeMap::new(),
        unreadable: BTreeMap::new(),
        memory: memory(state)?,
        foreign_dependants: BTreeMap::new(),
        disks: None,
        inside: BTreeMap::new(),
        generation: None,
        room: room(&config.layers),
        snapshots: Vec::new(),
        current: None,
        detail: serde_json::Value::Null,
    };
    if seen.in_use.is_empty()
        && let (Some(pid), Some(disk)) = (machine.process(), config.disks.keys().next())
    {
        seen.in_use.push(used_by(&current_file(state, &config, disk), pid));
    }
    seen.run_state = machine.run_state(!seen.in_use.is_empty());
    detail.machine = machine;
    match generation::current(&config.layers) {
        Ok(current) => seen.generation = current,
        Err(error) if error.failure.code == Code::Drift => {
            seen.unreadable.insert(active(&config.layers), error.to_string());
        }
        Err(error) => return Err(error),
    }
    let known = known_files(state, &config);
    let in_folder = detail.folder.iter().filter(|name| name.contains(".qcow2"));
    let files: BTreeSet<PathBuf> =
        known.iter().cloned().chain(in_folder.map(|name| config.layers.join(name))).collect();
    for path in files {
        match facts(&path) {
            Ok((found, metadata, header)) => {
                if !known.contains(&path) && header.has_data(&path) {
                    detail.written.insert(path.clone());
                }
                if let Err(error) = look_inside(&mut detail, &path, &header) {
                    seen.unreadable.insert(path, error.to_string());
                    continue;
                }
                note(&mut seen, &mut detail, path, found, metadata.uid(), header.backing)
            }
            Err(ReadError::Io(error)) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                seen.unreadable.insert(path, error.to_string());
            }
        }
    }
    for base in config.disks.values().flat_map(|paths| &paths.bases) {
        if let Ok(Some(what)) = unfit(base) {
            seen.unreadable.insert(base.clone(), format!("it is {what}"));
        }
    }
    listed(state, &detail.tables, &mut seen);
    seen.inside = inside(state, &config, &detail);
    seen.foreign_dependants = foreign_dependants(&config, &known)?;
    seen.detail = serde_json::to_value(detail).map_err(|error| {
        DriverError::permanent(Code::Invalid, "a file name is no UTF-8 text, which the log cannot hold")
            .source(error)
    })?;
    Ok(seen)
}

/// The memory files of the log that are there.
fn memory(state: &DomainState) -> Result<BTreeMap<PathBuf, FileStamp>, DriverError> {
    let mut found = BTreeMap::new();
    for memory in state.layers.memory.values() {
        let path = &memory.file;
        if let Some(metadata) = if_there(fs::symlink_metadata(path)).doing("look at", path)?
            && metadata.is_file()
        {
            found.insert(path.clone(), stamp(&metadata));
        }
    }
    Ok(found)
}

/// What is kept in an image beside its disk.
fn look_inside(detail: &mut Detail, path: &Path, header: &Header) -> Result<(), ReadError> {
    if header.internal_snapshots > 0 {
        detail.tables.insert(path.to_owned(), table::read(path)?);
    }
    if header.bitmaps.is_some() {
        detail.bitmaps.insert(path.to_owned(), bitmaps::read(path)?);
    }
    if header.is_dirty {
        detail.unclosed.insert(path.to_owned());
    }
    detail.formats.insert(path.to_owned(), header.format);
    Ok(())
}

fn note(
    seen: &mut Observation,
    detail: &mut Detail,
    path: PathBuf,
    found: FileFacts,
    owner: u32,
    backing: Option<Backing>,
) {
    detail.owners.insert(path.clone(), owner);
    if let Some(backing) = backing {
        detail.backing.insert(path.clone(), backing);
    }
    seen.files.insert(path, found);
}

/// The files of the log, and the registered images that are not in it yet.
fn known_files(state: &DomainState, config: &QemuConfig) -> BTreeSet<PathBuf> {
    let graph = &state.layers.disks;
    let layers = graph.values().flat_map(|disk| disk.layers.values().map(|layer| layer.file.clone()));
    let untaken = config
        .disks
        .iter()
        .filter(|(name, _)| graph.get(*name).and_then(|disk| disk.active_layer()).is_none())
        .map(|(_, paths)| paths.resolved.clone());
    layers.chain(untaken).collect()
}

/// Who has the machine's disks: whoever writes them, and what Snaptree started and lives, whatever it has open.
pub(super) fn in_use(state: &DomainState, config: &QemuConfig) -> Result<Vec<InUse>, DriverError> {
    let disks: Vec<PathBuf> = config.disks.keys().map(|disk| current_file(state, config, disk)).collect();
    let paths: Vec<&Path> = disks.iter().map(PathBuf::as_path).collect();
    let mut found = written(&paths)?;
    // A machine that can be reached may write a layer that the log does not call active yet.
    if found.is_empty() && config.runs.qmp().is_some() {
        let names = names(&config.layers)?;
        let images = names.iter().filter(|name| name.ends_with(".qcow2"));
        let files: Vec<PathBuf> = images.map(|name| config.layers.join(name)).collect();
        found = written(&files.iter().map(PathBuf::as_path).collect::<Vec<_>>())?;
    }
    if let (true, Runs::Managed { pid_file, .. }, Some(disk)) =
        (found.is_empty(), &config.runs, disks.first())
    {
        let started = living(pid_file, state, config);
        found.extend(started.iter().map(|process| used_by(disk, Some(process.pid()))));
    }
    Ok(found)
}

fn written(files: &[&Path]) -> Result<Vec<InUse>, DriverError> {
    let of = files.first().copied().unwrap_or(Path::new("/"));
    writers(files).doing("ask for the locks of", of)
}

/// The file that the machine writes, by the log.
pub(super) fn current_file(state: &DomainState, config: &QemuConfig, disk: &DiskName) -> PathBuf {
    config.written(disk, state).unwrap_or_default()
}

fn entry(path: &Path) -> Result<Entry, DriverError> {
    let Some(metadata) = if_there(fs::symlink_metadata(path)).doing("look at", path)? else {
        return Ok(Entry::Missing);
    };
    if metadata.is_symlink() {
        return Ok(Entry::Link { target: fs::read_link(path).doing("read the link", path)? });
    }
    Ok(if metadata.is_file() {
        Entry::File { inode: metadata.ino(), links: metadata.nlink() }
    } else {
        Entry::Other
    })
}

/// Every name in the layers folder. A name that is no text is not one of ours.
pub(super) fn names(layers: &Path) -> Result<BTreeSet<String>, DriverError> {
    let Some(entries) = if_there(fs::read_dir(layers)).doing("read the folder", layers)? else {
        return Ok(BTreeSet::new());
    };
    let mut names = BTreeSet::new();
    for entry in entries.take(OWN_ENTRIES_MAX) {
        names.extend(entry.doing("read the folder", layers)?.file_name().into_string());
    }
    Ok(names)
}

/// Per file of `files`: the images in the layers folder, beside the registered images and among `more` that are built
/// directly upon it. Files are told by their inodes, so every spelling of a name counts.
pub(super) fn scan_folders(
    config: &QemuConfig,
    files: &[&Path],
    more: &[&Path],
) -> Result<BTreeMap<PathBuf, Vec<PathBuf>>, DriverError> {
    let inodes = inodes(files)?;
    let mut candidates = candidates(config)?;
    candidates.extend(more.iter().map(|path| path.to_path_buf()));
    let mut found: BTreeMap<PathBuf, Vec<PathBuf>> = BTreeMap::new();
    for candidate in candidates {
        let Some((_, inode)) = backing_of(&candidate) else { continue };
        for file in inodes.get(&inode).into_iter().flatten() {
            found.entry(file.to_path_buf()).or_default().push(candidate.clone());
        }
    }
    Ok(found)
}

/// Per file of `known`: the images outside the log that are built upon it, also through others that lie elsewhere.
fn foreign_dependants(
    config: &QemuConfig,
    known: &BTreeSet<PathBuf>,
) -> Result<BTreeMap<PathBuf, Vec<PathBuf>>, DriverError> {
    let files: Vec<&Path> = known.iter().map(PathBuf::as_path).collect();
    let inodes = inodes(&files)?;
    let mut candidates = candidates(config)?;
    let registered = config.disks.values().flat_map(|disk| [disk.given.as_path(), disk.resolved.as_path()]);
    candidates.extend(libvirt::images_beside(&registered.collect::<Vec<_>>()));
    let mut found: BTreeMap<PathBuf, Vec<PathBuf>> = BTreeMap::new();
    for candidate in candidates {
        let own = fs::metadata(&candidate).map(|file| (file.dev(), file.ino()));
        if known.contains(&candidate) || own.is_ok_and(|own| inodes.contains_key(&own)) {
            continue;
        }
        let mut at = candidate.clone();
        for _ in 0..DEPTH_MAX {
            let Some((below, inode)) = backing_of(&at) else { break };
            if let Some(files) = inodes.get(&inode) {
                for file in files {
                    found.entry(file.to_path_buf()).or_default().push(candidate.clone());
                }
                break;
            }
            at = below;
        }
    }
    Ok(found)
}

/// Files by device and inode.
fn inodes<'a>(files: &[&'a Path]) -> Result<BTreeMap<(u64, u64), Vec<&'a Path>>, DriverError> {
    let mut inodes: BTreeMap<(u64, u64), Vec<&Path>> = BTreeMap::new();
    for file in files {
        if let Some(metadata) = if_there(fs::metadata(file)).doing("look at", file)? {
            inodes.entry((metadata.dev(), metadata.ino())).or_default().push(file);
        }
    }
    Ok(inodes)
}

/// What an image is built upon directly: the file, and its device and inode. What cannot be read as an image is built
/// upon nothing.
fn backing_of(image: &Path) -> Option<(PathBuf, (u64, u64))> {
    let (facts, _, _) = facts(image).ok()?;
    let backing = facts.backing?;
    let metadata = fs::metadata(&backing).ok()?;
    Some((backing, (metadata.dev(), metadata.ino())))
}

/// The regular files in the folders of the machine: that of the layers, that around it, and those of the registered
/// images, under the names that they were given and where these lead.
fn candidates(config: &QemuConfig) -> Result<BTreeSet<PathBuf>, DriverError> {
    let beside = config.disks.values().flat_map(|disk| [folder_of(&disk.given), folder_of(&disk.resolved)]);
    let around = [config.layers.clone(), folder_of(&config.layers)];
    let folders: BTreeSet<PathBuf> = beside.chain(around).collect();
    let mut candidates = BTreeSet::new();
    for folder in folders {
        let limit = if folder == config.layers { OWN_ENTRIES_MAX } else { FOREIGN_ENTRIES_MAX };
        let Some(entries) = if_there(fs::read_dir(&folder)).doing("read the folder", &folder)? else {
            continue;
        };
        for entry in entries.take(limit).flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_file()) {
                candidates.insert(entry.path());
            }
        }
    }
    Ok(candidates)
}
