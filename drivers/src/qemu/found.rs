//! A machine of Snaptree's found where one is to be registered: its path leads into a layers folder, and the manifest
//! there says whose that is.
//!
//! Whether the state that wrote it still looks after it is the engine's to ask. If it does not, the machine comes back as
//! it is, with its snapshots: registered anew as a plain disk it would be a machine upon layers that nobody looks after.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use snaptree_engine::driver::{DriverError, Head, KeptBy, Part};
use snaptree_engine::operation::{Code, Failure};
use snaptree_engine::{DiskName, DomainId};

use super::config::{PathWish, QemuConfig, active};
use super::files::{Doing, folder_of, if_there};
use super::generation;
use super::kept::{self, hash_of};
use super::manifest::Manifest;

/// Most links that are followed from a path, as the kernel does.
const LINKS_MAX: usize = 40;
/// Most layers folders that are looked at beside an image.
const FOLDERS_MAX: usize = 4096;

/// The machine that a registration is about.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) layers: PathBuf,
    pub(super) manifest: Manifest,
    pub(super) keep_path: PathWish,
    /// Where the registered paths are: each our link, or the image where the path is kept.
    pub(super) paths: BTreeMap<DiskName, PathBuf>,
}

/// The link of ours that a path leads through: where it is, the layers folder, and the disk's name there.
fn our_link(given: &Path) -> Option<(PathBuf, PathBuf, String)> {
    let mut at = given.to_path_buf();
    for _ in 0..LINKS_MAX {
        let folder = fs::canonicalize(at.parent()?).ok()?;
        at = folder.join(at.file_name()?);
        let target = folder.join(fs::read_link(&at).ok()?);
        if let (Some(disk), Some(switch)) = (target.file_name(), target.parent())
            && switch.ends_with(active(Path::new("")))
            && let Some(layers) = switch.parent().and_then(|layers| fs::canonicalize(layers).ok())
            && matches!(generation::current(&layers), Ok(Some(_)))
        {
            return Some((at, layers, disk.to_str()?.to_owned()));
        }
        at = target;
    }
    None
}

/// The layers folder in which an image that is kept at its path is the lowest layer.
fn kept_beside(resolved: &Path, around: &Path) -> Option<PathBuf> {
    let folders = fs::read_dir(around).ok()?.take(FOLDERS_MAX).flatten().map(|entry| entry.path());
    folders.into_iter().find(|layers| {
        matches!(kept::read(layers), Ok(Some((_, manifest))) if manifest.layers.files().any(|file| file == resolved))
    })
}

/// The machine that these paths are, if they are one; `around` is where layers folders would be.
///
/// # Errors
/// It is one, and cannot be had back with these disks, or from there.
pub(super) fn find(
    disks: &[(DiskName, PathBuf)],
    around: Option<&Path>,
) -> Result<Option<Found>, DriverError> {
    let mut found: Option<Found> = None;
    let mut fresh = None;
    for (name, given) in disks {
        let given = std::path::absolute(given).doing("make absolute", given)?;
        let Some((path, layers, keep_path)) = place_of(&given, around) else {
            fresh = Some(given);
            continue;
        };
        match &mut found {
            Some(other) if other.layers == layers => {
                other.paths.insert(name.clone(), path);
            }
            Some(other) => {
                let message = format!(
                    "{} and {} are two machines' layers folders",
                    other.layers.display(),
                    layers.display()
                );
                return Err(refused(message));
            }
            None => {
                let manifest = manifest_of(&given, &layers)?;
                found = Some(Found { layers, manifest, keep_path, paths: [(name.clone(), path)].into() });
            }
        }
    }
    let Some(found) = found else { return Ok(None) };
    found.check_place()?;
    found.check_disks(fresh.as_deref())?;
    Ok(Some(found))
}

fn place_of(given: &Path, around: Option<&Path>) -> Option<(PathBuf, PathBuf, PathWish)> {
    if let Some((link, layers, _)) = our_link(given) {
        return Some((link, layers, PathWish::Follow));
    }
    let resolved = fs::canonicalize(given).ok()?;
    let beside = folder_of(&resolved).join(".snaptree");
    let layers = [Some(beside.as_path()), around].into_iter().flatten();
    let layers = layers.into_iter().find_map(|around| kept_beside(&resolved, around))?;
    // A layer itself is no machine's path.
    (folder_of(&resolved) != layers).then_some((resolved, layers, PathWish::Keep))
}

fn manifest_of(given: &Path, layers: &Path) -> Result<Manifest, DriverError> {
    match kept::read(layers) {
        Ok(Some((_, manifest))) => Ok(manifest),
        Ok(None) => Err(refused(format!(
            "{} leads into the layers folder {}, and there is no manifest that tells what it is part of",
            given.display(),
            layers.display()
        ))),
        Err(error) => Err(refused(format!(
            "{} leads into the layers folder {}, whose manifest cannot be used: {error}",
            given.display(),
            layers.display()
        ))),
    }
}

fn refused(message: String) -> DriverError {
    let failure = Failure::new(Code::Drift, message)
        .hint("qemu-img convert -O qcow2 makes one plain image of what it reads as, which can be registered");
    DriverError::from(failure.refused())
}

impl Found {
    /// The layers are where they were made: they name one another by that path.
    fn check_place(&self) -> Result<(), DriverError> {
        let kept = |file: &&PathBuf| {
            self.keep_path == PathWish::Keep && self.paths.values().any(|path| path == *file)
        };
        let elsewhere = self.manifest.layers.files().filter(|file| !kept(file));
        let mut elsewhere = elsewhere.filter(|file| file.parent() != Some(&self.layers));
        let Some(file) = elsewhere.next() else { return Ok(()) };
        let made = folder_of(file);
        let (machine, here) = (&self.manifest.name, self.layers.display());
        let failure = Failure::new(
            Code::Drift,
            format!(
                "this is machine '{machine}', copied or moved: its layers were made in {}, name one another by that \
                 path, and lie in {here}",
                made.display()
            ),
        );
        Err(DriverError::from(failure.refused().hint(format!(
            "a copy becomes a machine of its own by qemu-img convert -O qcow2, registered as a plain image; one that was \
             moved is put right where it is registered: snaptree domain relocate {machine} --from OLD --to NEW"
        ))))
    }

    fn check_disks(&self, fresh: Option<&Path>) -> Result<(), DriverError> {
        let wanted: BTreeSet<&DiskName> = self.manifest.layers.disks.keys().collect();
        let given: BTreeSet<&DiskName> = self.paths.keys().collect();
        if let (true, None) = (wanted == given, fresh) {
            return Ok(());
        }
        let named: Vec<String> = wanted.iter().map(|name| format!("--disk {name}=FILE")).collect();
        let failure = Failure::new(
            Code::Invalid,
            format!(
                "this is machine '{}' with its snapshots, and it has other disks than those that are given",
                self.manifest.name
            ),
        );
        Err(DriverError::from(failure.refused().hint(format!("register all of them: {}", named.join(" ")))))
    }

    /// Whose it is, for the engine to ask.
    pub(super) fn kept_by(&self) -> KeptBy {
        keeper_of(Part::Machine, self.layers.clone(), &self.manifest)
    }

    /// The file that a disk opens now.
    pub(super) fn active_file(&self, disk: &DiskName) -> Option<&Path> {
        let layers = self.manifest.layers.disks.get(disk)?;
        layers.active_layer().map(|(_, layer)| layer.file.as_path())
    }

    /// The id that the machine has.
    pub(super) fn domain(&self) -> DomainId {
        self.manifest.domain
    }
}

fn keeper_of(part: Part, file: PathBuf, manifest: &Manifest) -> KeptBy {
    let head = hash_of(&manifest.head.hash).map(|hash| Head { seq: manifest.head.seq, hash });
    let (domain, name, keeper) = (manifest.domain, manifest.name.clone(), manifest.keeper.clone());
    KeptBy { part, file, domain, name, keeper, head }
}

/// Who says that the images, or what they are built upon, are layers of theirs: the manifests beside them.
pub(super) fn kept_by(config: &QemuConfig) -> Result<Vec<KeptBy>, DriverError> {
    let images = config.disks.values().map(|disk| (Part::Layer, &disk.resolved));
    let bases = config.disks.values().flat_map(|disk| disk.bases.iter().map(|base| (Part::Base, base)));
    let mut kept_by = Vec::new();
    for (part, file) in images.chain(bases) {
        let folder = folder_of(file);
        if if_there(fs::symlink_metadata(active(&folder))).doing("look at", &folder)?.is_none() {
            continue;
        }
        if let Ok(Some((_, manifest))) = kept::read(&folder) {
            kept_by.push(keeper_of(part, file.clone(), &manifest));
        }
    }
    Ok(kept_by)
}
