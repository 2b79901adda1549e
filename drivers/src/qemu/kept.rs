//! Reading the manifest back: for a log that was restored from an older copy.
//!
//! The manifest is a file like any other, so it is believed only as far as the images agree with it.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::Path;

use snaptree_engine::driver::{DriverError, Head, Kept};
use snaptree_engine::event::{Actor, Hash, MemoryKind};
use snaptree_engine::layer::LayerGraph;
use snaptree_engine::operation::{Code, Failure};
use snaptree_engine::project::DomainState;
use snaptree_engine::tree::{Snapshot, SnapshotState, Tree};
use snaptree_engine::{SnapshotId, SnapshotName};

use super::config::QemuConfig;
use super::files::{Doing, facts, if_there, stamp_of};
use super::generation::{self, MANIFEST};
use super::manifest::{BYTES_MAX, FORMAT, Manifest, ManifestSnapshot};
use super::qcow2::ReadError;

/// The last event of the log when the layers were switched last. A manifest that cannot be read tells nothing.
pub(super) fn head(state: &DomainState) -> Result<Option<Head>, DriverError> {
    let (domain, config) = QemuConfig::of(state)?;
    let manifest = match read(&config.layers) {
        Ok(Some((_, manifest))) if manifest.domain == domain.id => manifest,
        Ok(_) => return Ok(None),
        Err(error) => {
            tracing::warn!(domain = %domain.name, %error, "the manifest beside the layers tells nothing");
            return Ok(None);
        }
    };
    Ok(hash_of(&manifest.head.hash).map(|hash| Head { seq: manifest.head.seq, hash }))
}

/// All of the manifest, compared with the images.
pub(super) fn kept(state: &DomainState) -> Result<Option<Kept>, DriverError> {
    let (domain, config) = QemuConfig::of(state)?;
    let Some((generation, manifest)) = read(&config.layers)? else { return Ok(None) };
    if manifest.domain != domain.id {
        return Err(unfit(format!("it is domain {}'s", manifest.domain)).into());
    }
    if manifest.layers.generation.as_ref() != Some(&generation) {
        return Err(unfit(format!("it is not the manifest of {generation}")).into());
    }
    let hash = hash_of(&manifest.head.hash).ok_or_else(|| unfit("its head is no hash".to_owned()))?;
    let head = Head { seq: manifest.head.seq, hash };
    let layers = compared(manifest.layers, &config)?;
    let (dead, live): (Vec<_>, Vec<_>) =
        manifest.snapshots.into_iter().partition(|snapshot| snapshot.tombstone);
    let tombstones: BTreeMap<SnapshotId, SnapshotName> =
        dead.into_iter().map(|snapshot| (snapshot.id, snapshot.name)).collect();
    let tree = Tree::of(live.into_iter().map(|kept| snapshot(kept, &layers)), manifest.current)
        .map_err(|error| unfit(error.to_string()))?;
    Ok(Some(Kept { head, switched_by: manifest.operation, tree, tombstones, layers }))
}

/// The manifest of the generation that is switched on, and that one's name.
fn read(layers: &Path) -> Result<Option<(String, Manifest)>, DriverError> {
    let generation = match generation::current(layers) {
        Ok(Some(generation)) => generation,
        Ok(None) => return Ok(None),
        // Something else stands in the link's place: that is drift, which planning refuses.
        Err(error) if error.failure.code == Code::Drift => return Ok(None),
        Err(error) => return Err(error),
    };
    let path = layers.join(&generation).join(MANIFEST);
    let Some(file) = if_there(fs::File::open(&path)).doing("open", &path)? else { return Ok(None) };
    let mut text = String::new();
    file.take(BYTES_MAX + 1).read_to_string(&mut text).doing("read", &path)?;
    if text.len() as u64 > BYTES_MAX {
        return Err(unfit(format!("it has more than {BYTES_MAX} bytes")).into());
    }
    let manifest: Manifest =
        serde_json::from_str(&text).map_err(|error| unfit(format!("it cannot be read ({error})")))?;
    if manifest.format != FORMAT {
        return Err(
            unfit(format!("it has the form {}, and this program knows {FORMAT}", manifest.format)).into()
        );
    }
    Ok(Some((generation, manifest)))
}

fn unfit(why: String) -> Failure {
    Failure::new(
        Code::Drift,
        format!("the log is an older copy, and the manifest beside the layers is no help: {why}"),
    )
    .hint("put the newest copy of snaptree.db back; nothing was touched")
}

fn hash_of(hex: &str) -> Option<Hash> {
    let mut hash = [0; 32];
    if hex.len() != 64 || !hex.is_ascii() {
        return None;
    }
    for (byte, digits) in hash.iter_mut().zip(0..) {
        *byte = u8::from_str_radix(hex.get(2 * digits..2 * digits + 2)?, 16).ok()?;
    }
    Some(Hash(hash))
}

/// The files, each where a file of this domain can be, standing upon what its header says, with its stamp as it is.
fn compared(mut graph: LayerGraph, config: &QemuConfig) -> Result<LayerGraph, Failure> {
    for (disk, layers) in &mut graph.disks {
        let paths =
            config.disks.get(disk).ok_or_else(|| unfit(format!("the domain has no disk '{disk}'")))?;
        let files: BTreeMap<_, _> =
            layers.layers.iter().map(|(id, layer)| (id.clone(), layer.file.clone())).collect();
        for (id, layer) in &mut layers.layers {
            let file = &layer.file;
            if file.parent() != Some(&config.layers) && *file != paths.resolved {
                return Err(unfit(format!("{} is no file of this domain's", file.display())));
            }
            let found = match facts(file) {
                Ok((found, _, _)) => found,
                // A lost layer is told of as drift.
                Err(ReadError::Io(error)) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(unfit(format!("{}: {error}", file.display()))),
            };
            let parent = match &layer.parent {
                None => None,
                Some(parent) => match files.get(parent) {
                    Some(parent) => Some(parent),
                    None => return Err(unfit(format!("layer {id} is built upon one that it does not list"))),
                },
            };
            if parent.is_some() && parent != found.backing.as_ref() {
                return Err(unfit(format!(
                    "{} is not built upon what it says; a merge may have been cut off there",
                    file.display()
                )));
            }
            layer.stamp = (layers.active.as_ref() != Some(id)).then_some(found.stamp);
        }
        if layers.active.as_ref().is_some_and(|active| !files.contains_key(active)) {
            return Err(unfit(format!("the active layer of disk '{disk}' is not listed")));
        }
    }
    for memory in graph.memory.values_mut() {
        let file = &memory.file;
        if file.parent() != Some(&config.layers) {
            return Err(unfit(format!("{} is no file of this domain's", file.display())));
        }
        // One that is lost is told of as drift.
        if let Ok(found) = stamp_of(file) {
            memory.stamp = found;
        }
    }
    Ok(graph)
}

fn snapshot(kept: ManifestSnapshot, layers: &LayerGraph) -> Snapshot {
    let memory = if layers.memory.contains_key(&kept.id) { MemoryKind::External } else { MemoryKind::No };
    let (made_by, made_in) = kept.made.unwrap_or((Actor::Engine, None));
    Snapshot {
        id: kept.id,
        name: kept.name,
        description: kept.description,
        parent: kept.parent,
        created: kept.created.unwrap_or_default(),
        state: kept.state.unwrap_or(SnapshotState::Shutoff),
        memory,
        disks: kept.files.into_keys().collect(),
        labels: kept.labels,
        hold: kept.hold,
        made_by,
        made_in,
        lost: false,
        real_name: None,
        native: None,
        left_out: Vec::new(),
    }
}
