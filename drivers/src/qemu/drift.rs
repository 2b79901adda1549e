//! Whether what is on disk is what the log says. Pure.
//!
//! Architecture Invariant: what planning refuses and what `drift` tells is one list, [`differences`].

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use snaptree_engine::driver::Observation;
use snaptree_engine::layer::{DiskLayers, FileStamp, Layer};
use snaptree_engine::operation::{Code, Failure};
use snaptree_engine::project::DomainState;
use snaptree_engine::reconcile::drift::Finding;
use snaptree_engine::{DiskName, LayerId};

use super::config::{DiskPaths, PathWish, QemuConfig, active};
use super::link;
use super::observe::{Detail, Entry};
use super::step::QemuStep;

/// What steps of open operations explain.
#[derive(Default)]
struct InHand {
    /// Files that one writes, makes or unlinks: nobody knows how far it came.
    files: BTreeSet<PathBuf>,
    /// Generations that one switches to.
    generations: BTreeSet<String>,
    /// Whether one takes an image into the layers folder, so that its path is the image or our link.
    adopts: bool,
    /// Whether one ends what Snaptree made for the domain.
    ends: bool,
}

impl InHand {
    fn of(state: &DomainState) -> Self {
        let mut hand = Self::default();
        for step in state.open.iter().flat_map(|open| &open.steps) {
            let Ok(step) = QemuStep::of(step) else { continue };
            hand.files.extend(step.touches().map(|touched| touched.writes).unwrap_or_default());
            match &step {
                QemuStep::Adopt(adopt) => {
                    hand.adopts = true;
                    hand.generations.insert(adopt.turn.generation.clone());
                }
                QemuStep::Switch(switch) => hand.generations.extend([switch.turn.generation.clone()]),
                QemuStep::Keep(keep) => hand.generations.extend([keep.turn.generation.clone()]),
                QemuStep::Place(_) | QemuStep::Clean(_) => hand.ends = true,
                _ => {}
            }
        }
        hand
    }
}

/// The first difference between the log and what is on disk.
pub(super) fn check(
    state: &DomainState,
    seen: &Observation,
    config: &QemuConfig,
    detail: &Detail,
) -> Result<(), Failure> {
    let moved = generation_moved(state, seen);
    for (disk, paths) in config.disks.iter().filter(|_| moved.is_none()) {
        let active = state.layers.disks.get(disk).and_then(|layers| layers.active_layer());
        check_top(active.map_or(&paths.resolved, |(_, layer)| &layer.file), seen)?;
    }
    // Upon a switch whose end is not known nothing is planned, though its step explains it.
    let first = moved.into_iter().chain(differences(state, seen, config, detail)).next();
    let Some(finding) = first else { return Ok(()) };
    let name = state.domain.as_ref().map_or("", |domain| domain.name.as_str());
    let help = finding.help(name).map_or_else(String::new, |help| format!("; {help}"));
    let hint = format!("nothing was touched{help}; `snaptree drift {name}` tells of all differences");
    Err(Failure::new(Code::Drift, finding.to_string()).hint(hint))
}

/// All differences between the log and what is on disk that no step in hand explains.
pub(super) fn differences(
    state: &DomainState,
    seen: &Observation,
    config: &QemuConfig,
    detail: &Detail,
) -> Vec<Finding> {
    let hand = InHand::of(state);
    let mut found = Vec::new();
    let switch = active(&config.layers);
    if let Some(reason) = seen.unreadable.get(&switch) {
        found.push(Finding::FileUnreadable { file: switch, reason: reason.clone() });
    } else if !hand.ends && !seen.generation.as_ref().is_some_and(|now| hand.generations.contains(now)) {
        found.extend(generation_moved(state, seen));
    }
    for (disk, paths) in &config.disks {
        let unfit = |base: &PathBuf| {
            let reason = format!("{}, and disk '{disk}' is built upon it", seen.unreadable.get(base)?);
            Some(Finding::FileUnreadable { file: base.clone(), reason })
        };
        found.extend(paths.bases.iter().filter_map(unfit));
        let layers = state.layers.disks.get(disk);
        let adopted = layers.is_some_and(|layers| layers.active_layer().is_some());
        found.extend(match (adopted, config.keep_path) {
            (true, PathWish::Follow) => path_wrong(disk, paths, config, detail, &hand),
            (true, PathWish::Keep) => None,
            (false, _) => image_wrong(disk, paths, config, (seen, detail), &hand),
        });
        for (id, layer) in layers.into_iter().flat_map(|layers| &layers.layers) {
            if hand.ends || hand.files.contains(&layer.file) {
                continue;
            }
            let frozen = layers.is_some_and(|layers| layers.active.as_ref() != Some(id));
            let stamp = if frozen { layer.stamp } else { None };
            found.extend(layer_wrong(disk, (id, layer), layers, seen, stamp));
        }
    }
    found
}

fn generation_moved(state: &DomainState, seen: &Observation) -> Option<Finding> {
    let (expected, found) = (state.layers.generation.clone(), seen.generation.clone());
    (expected != found).then_some(Finding::GenerationMoved { expected, found })
}

/// Nothing that the log does not know stands upon what the machine writes by the log: that would be what it writes.
fn check_top(file: &Path, seen: &Observation) -> Result<(), Failure> {
    let Some(above) = seen.foreign_dependants.get(file).and_then(|found| found.first()) else {
        return Ok(());
    };
    let message = format!(
        "{}, which Snaptree does not know, is built upon {}: if the machine runs on it, nothing that it wrote since is \
         in a layer of the log",
        above.display(),
        file.display()
    );
    Err(Failure::new(Code::Drift, message).hint(format!(
        "nothing was touched; with the machine off, bring its data back (virsh snapshot-delete or blockcommit, or \
         qemu-img commit {above}) and start it from the registered path again; if it is of no use, move it away",
        above = above.display()
    )))
}

/// What is at a registered path, in words.
fn entry_words(entry: Option<&Entry>) -> String {
    match entry {
        Some(Entry::Link { target }) => format!("a link to {}", target.display()),
        Some(Entry::File { .. }) => "a file".to_owned(),
        Some(Entry::Other) => "something that is no file".to_owned(),
        Some(Entry::Missing) | None => "nothing".to_owned(),
    }
}

/// The registered path leads to what the machine shall open.
fn path_wrong(
    disk: &DiskName,
    paths: &DiskPaths,
    config: &QemuConfig,
    detail: &Detail,
    hand: &InHand,
) -> Option<Finding> {
    let entry = detail.registered.get(disk);
    match entry {
        Some(Entry::Link { target }) if link::is_ours(&paths.resolved, target, &config.layers, disk) => None,
        Some(Entry::File { .. }) if hand.adopts || hand.ends => None,
        _ => Some(Finding::PathWrong {
            disk: disk.clone(),
            path: paths.resolved.clone(),
            found: entry_words(entry),
            wanted: active(&config.layers).join(disk.as_str()),
        }),
    }
}

/// A registered image without snapshots is at its path, and can be read.
fn image_wrong(
    disk: &DiskName,
    paths: &DiskPaths,
    config: &QemuConfig,
    (seen, detail): (&Observation, &Detail),
    hand: &InHand,
) -> Option<Finding> {
    let entry = detail.registered.get(disk);
    match entry {
        Some(Entry::File { .. }) => {
            let reason = seen.unreadable.get(&paths.resolved)?.clone();
            Some(Finding::FileUnreadable { file: paths.resolved.clone(), reason })
        }
        Some(Entry::Link { target })
            if hand.adopts && link::is_ours(&paths.resolved, target, &config.layers, disk) =>
        {
            None
        }
        _ => Some(Finding::ImageWrong {
            disk: disk.clone(),
            path: paths.resolved.clone(),
            found: entry_words(entry),
        }),
    }
}

fn layer_wrong(
    disk: &DiskName,
    (id, layer): (&LayerId, &Layer),
    layers: Option<&DiskLayers>,
    seen: &Observation,
    frozen: Option<FileStamp>,
) -> Option<Finding> {
    let file = layer.file.clone();
    if let Some(reason) = seen.unreadable.get(&file) {
        return Some(Finding::FileUnreadable { file, reason: reason.clone() });
    }
    let (disk, layer_id) = (disk.clone(), id.clone());
    let Some(found) = seen.files.get(&file) else {
        return Some(Finding::LayerMissing { disk, layer: layer_id, file });
    };
    // What its header says explains why it was written, and comes first.
    let parent = layer.parent.as_ref().and_then(|id| layers?.layers.get(id)).map(|parent| &parent.file);
    match parent {
        Some(parent) if found.backing.as_ref() != Some(parent) => {
            Some(Finding::LayerRebased { file, found: found.backing.clone(), expected: parent.clone() })
        }
        _ if frozen.is_some_and(|stamp| stamp != found.stamp) => {
            Some(Finding::LayerWritten { disk, layer: layer_id, file })
        }
        _ => None,
    }
}
