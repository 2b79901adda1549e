//! Whether what is on disk is what the log says. Pure.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use snaptree_engine::DiskName;
use snaptree_engine::driver::Observation;
use snaptree_engine::layer::{DiskLayers, FileStamp, Layer};
use snaptree_engine::operation::{Code, Failure, Phase};
use snaptree_engine::project::DomainState;

use super::config::{DiskPaths, PathWish, QemuConfig, active};
use super::observe::{Detail, Entry};
use super::step::QemuStep;

const HINT: &str = "nothing was touched; snaptree drift shows all differences";

fn drift(message: String) -> Failure {
    Failure::new(Code::Drift, message).hint(HINT)
}

/// The first difference between the log and what is on disk.
pub(super) fn check(
    state: &DomainState,
    seen: &Observation,
    config: &QemuConfig,
    detail: &Detail,
) -> Result<(), Failure> {
    let switch = active(&config.layers);
    if let Some(reason) = seen.unreadable.get(&switch) {
        return Err(drift(reason.clone()));
    }
    let expected = state.layers.generation.clone();
    if seen.generation != expected {
        return Err(drift(format!(
            "{} leads to {}, and the log says {}",
            switch.display(),
            seen.generation.as_deref().unwrap_or("nothing"),
            expected.as_deref().unwrap_or("nothing"),
        )));
    }
    let exempt = exempt(state);
    for (disk, paths) in &config.disks {
        let unfit = |base: &&PathBuf| seen.unreadable.contains_key(*base);
        if let Some(base) = paths.bases.iter().find(unfit) {
            let reason = &seen.unreadable[base];
            return Err(drift(format!("disk '{disk}' is built upon {}: {reason}", base.display())));
        }
        let layers = state.layers.disks.get(disk);
        let active = layers.and_then(|layers| layers.active_layer());
        check_top(active.map_or(&paths.resolved, |(_, layer)| &layer.file), seen)?;
        let adopted = active.is_some();
        if adopted && config.keep_path == PathWish::Follow {
            check_path(disk, paths, config, detail)?;
        }
        for (id, layer) in layers.into_iter().flat_map(|layers| &layers.layers) {
            if exempt.contains(&layer.file) {
                continue;
            }
            let frozen = layers.is_some_and(|layers| layers.active.as_ref() != Some(id));
            check_layer(layer, layers, seen, if frozen { layer.stamp } else { None })?;
        }
    }
    Ok(())
}

/// What steps of stuck operations name: nobody knows how far they came, and nothing that touches it is carried out.
fn exempt(state: &DomainState) -> BTreeSet<PathBuf> {
    let stuck = state.open.iter().filter(|open| matches!(open.phase, Phase::NeedsAttention { .. }));
    let steps = stuck.flat_map(|open| &open.steps).filter_map(|step| QemuStep::of(step).ok());
    steps.filter_map(|step| step.touches()).flat_map(|touched| touched.writes).collect()
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

/// The registered path leads to what the machine shall open.
fn check_path(
    disk: &DiskName,
    paths: &DiskPaths,
    config: &QemuConfig,
    detail: &Detail,
) -> Result<(), Failure> {
    let target = active(&config.layers).join(disk.as_str());
    let path = paths.resolved.display();
    let found = match detail.registered.get(disk) {
        Some(Entry::Link { target: found }) if *found == target => return Ok(()),
        Some(Entry::Link { target: found }) => format!("a link to {}", found.display()),
        Some(Entry::File { .. }) => "a file".to_owned(),
        Some(Entry::Other) => "something that is no file".to_owned(),
        Some(Entry::Missing) | None => "nothing".to_owned(),
    };
    Err(drift(format!("{path} should be a link to {}, and {found} is there", target.display())))
}

fn check_layer(
    layer: &Layer,
    layers: Option<&DiskLayers>,
    seen: &Observation,
    frozen: Option<FileStamp>,
) -> Result<(), Failure> {
    let file = layer.file.display();
    if let Some(reason) = seen.unreadable.get(&layer.file) {
        return Err(drift(format!("layer {file} cannot be used: {reason}")));
    }
    let Some(found) = seen.files.get(&layer.file) else {
        return Err(drift(format!("layer {file} is missing")));
    };
    if let Some(expected) = frozen
        && let Some(difference) = difference(expected, found.stamp)
    {
        return Err(drift(format!("frozen layer {file} was changed: {difference}")));
    }
    let parent =
        layer.parent.as_ref().and_then(|id| layers?.layers.get(id)).map(|parent| parent.file.as_path());
    let backing = found.backing.as_deref();
    if parent.is_some() && parent != backing {
        let name = |path: Option<&Path>| {
            path.map_or_else(|| "nothing".to_owned(), |path| path.display().to_string())
        };
        return Err(drift(format!(
            "layer {file} is built upon {}, and the log says {}",
            name(backing),
            name(parent)
        )));
    }
    Ok(())
}

/// What differs, in words.
fn difference(expected: FileStamp, found: FileStamp) -> Option<String> {
    if expected.inode != found.inode {
        return Some(format!("its inode is {}, and was {}", found.inode, expected.inode));
    }
    if expected.size_bytes != found.size_bytes {
        return Some(format!("it has {} bytes, and had {}", found.size_bytes, expected.size_bytes));
    }
    (expected.mtime_ns != found.mtime_ns).then(|| "it was written since".to_owned())
}
