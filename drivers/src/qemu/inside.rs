//! What somebody else keeps inside the images: snapshots of libvirt's or qemu-img's, and dirty bitmaps. Pure.
//!
//! Nothing of it is dropped or put out of reach that was not named and asked for (`--give-up NAME`).

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use snaptree_engine::DiskName;
use snaptree_engine::driver::Inside;
use snaptree_engine::operation::{Code, Failure};
use snaptree_engine::project::DomainState;

use super::config::QemuConfig;
use super::internal::{snapshot_of, table};
use super::observe::Detail;
use super::plan::Planner;

/// The tags that are not ours.
pub(super) fn foreign_names(entries: &[table::Entry]) -> BTreeSet<String> {
    let foreign = entries.iter().filter(|entry| snapshot_of(&entry.tag).is_none());
    foreign.map(|entry| entry.tag.clone()).collect()
}

/// What is inside every image of ours, without the snapshots that the user was told of at registration.
pub(super) fn inside(state: &DomainState, config: &QemuConfig, detail: &Detail) -> BTreeMap<PathBuf, Inside> {
    let mut found: BTreeMap<PathBuf, Inside> = BTreeMap::new();
    for (file, entries) in &detail.tables {
        let mut snapshots = foreign_names(entries);
        match told(state, config, file) {
            Told::Of(names) => snapshots.retain(|name| !names.contains(name)),
            Told::Unknown => snapshots.clear(),
        }
        if !snapshots.is_empty() {
            found.entry(file.clone()).or_default().snapshots = snapshots;
        }
    }
    for (file, bitmaps) in &detail.bitmaps {
        let names = bitmaps.iter().map(|bitmap| bitmap.name.clone()).collect();
        found.entry(file.clone()).or_default().bitmaps = names;
    }
    found
}

/// Which snapshots inside an image the user was told of.
enum Told<'a> {
    Of(&'a BTreeSet<String>),
    /// It was registered by a version that did not write them down.
    Unknown,
}

fn told<'a>(state: &DomainState, config: &'a QemuConfig, file: &Path) -> Told<'a> {
    const NONE: &BTreeSet<String> = &BTreeSet::new();
    let is_registered = |disk: &DiskName, resolved: &Path| {
        let layers = state.layers.disks.get(disk).into_iter().flat_map(|layers| layers.layers.values());
        file == resolved || layers.into_iter().any(|layer| layer.registered && layer.file == file)
    };
    match config.disks.iter().find(|(disk, paths)| is_registered(disk, &paths.resolved)) {
        Some((_, paths)) => paths.inside.as_ref().map_or(Told::Unknown, Told::Of),
        None => Told::Of(NONE),
    }
}

impl Planner<'_> {
    /// Refuses to freeze a layer with snapshots inside that came since the domain was registered: nobody could go back
    /// to them any more.
    pub(super) fn check_inside(&self, file: &Path, give_up: &BTreeSet<String>) -> Result<(), Failure> {
        let found = self.seen.inside.get(file).map(|inside| &inside.snapshots);
        match found.and_then(|names| names.difference(give_up).next()) {
            None => Ok(()),
            Some(name) => Err(Failure::new(
                Code::Drift,
                format!(
                    "image {} has a snapshot '{name}' inside that Snaptree did not make, and who made it could not go back \
                     to it once the image is frozen",
                    file.display()
                ),
            )
            .hint(format!(
                "delete it where it was made (virsh snapshot-delete, qemu-img snapshot -d), or give it up: --give-up '{name}'"
            ))),
        }
    }
    /// What goes by the dirty bitmaps of a layer that the machine leaves.
    pub(super) fn tell_bitmaps(&mut self, disk: &DiskName, file: &Path) {
        for name in self.seen.inside.get(file).into_iter().flat_map(|inside| &inside.bitmaps) {
            self.costs.lost.push(format!(
                "dirty bitmap '{name}' of {disk} does not see what is written from now on: a backup that goes by it is to be \
                 made in full"
            ));
        }
    }
}
