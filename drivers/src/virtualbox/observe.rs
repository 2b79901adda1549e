//! What is there: the settings file, and who runs the machine.

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use snaptree_engine::SnapshotId;
use snaptree_engine::domain::RunState;
use snaptree_engine::driver::{DriverError, ErrorClass, Observation, Room, SeenSnapshot};
use snaptree_engine::operation::{Code, Failure};
use snaptree_engine::project::DomainState;
use snaptree_engine::reconcile::space::MARGIN_BYTES_DEFAULT;
use snaptree_engine::tree::SnapshotState;
use uuid::Uuid;

use super::manage::{Manage, QUICK};
use super::mark::Marked;
use super::settings::{self, FILE_BYTES_MAX, Medium, Settings, Snap};
use crate::room::room;

/// How often a file is read again that is being replaced just now, and how long is waited in between.
const READS_MAX: u32 = 40;
const BETWEEN_READS: Duration = Duration::from_millis(25);

/// Of which `st_blocks` is the number (stat(2)).
const BYTES_OF_A_BLOCK: u64 = 512;

/// Which file tells the truth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Found {
    /// The settings file.
    InPlace,
    /// It is missing: VirtualBox was killed between its two renames, and the new one was not put in its place.
    BeforeRename,
}

/// What this driver adds to an [`Observation`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Detail {
    pub file: PathBuf,
    pub found: Found,
    pub settings: Settings,
    /// Images that a snapshot or the machine as it is reads from, and that are not there.
    pub missing: Vec<Uuid>,
    /// Bytes that images occupy.
    #[serde(default)]
    pub sizes: BTreeMap<Uuid, u64>,
    /// What was put right for the operation in hand, and is not in the log yet.
    #[serde(default)]
    pub repairs: Vec<String>,
}

impl Detail {
    pub(super) fn of(seen: &Observation) -> Result<Self, Failure> {
        Self::deserialize(&seen.detail).map_err(|error| {
            Failure::new(Code::Invalid, format!("the observation is none of this driver's: {error}"))
        })
    }
}

/// The file that VirtualBox writes before it replaces the settings.
pub(super) fn beside(file: &Path, ending: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(ending);
    PathBuf::from(name)
}

/// Reads the settings; where the file is missing for long, the one that was to replace it.
pub(super) async fn read(file: &Path) -> Result<Detail, DriverError> {
    let folder = file.parent().unwrap_or(Path::new("/"));
    let mut problem = None;
    for attempt in 0..READS_MAX {
        if attempt > 0 {
            tokio::time::sleep(BETWEEN_READS).await;
        }
        match read_text(file) {
            Ok(Some(text)) => match settings::read(&text, folder) {
                Ok(settings) => return Ok(detail(file, Found::InPlace, settings)),
                Err(error) => problem = Some(error),
            },
            Ok(None) => problem = None,
            Err(error) => return Err(unreadable(file, &error)),
        }
    }
    if let Some(error) = problem {
        let message = format!("the settings file {} cannot be read: {error}", file.display());
        return Err(DriverError::new(ErrorClass::Transient, Code::BadImage, message));
    }
    let draft = beside(file, "-tmp");
    let text = read_text(&draft).map_err(|error| unreadable(&draft, &error))?;
    let found = text.and_then(|text| settings::read(&text, folder).ok());
    found.map(|settings| detail(file, Found::BeforeRename, settings)).ok_or_else(|| {
        let message = format!("the settings file {} is missing", file.display());
        DriverError::new(ErrorClass::Transient, Code::Drift, message)
            .hint("was the machine moved or removed? `VBoxManage list vms` shows what VirtualBox knows")
    })
}

fn unreadable(file: &Path, error: &std::io::Error) -> DriverError {
    let code = if error.kind() == ErrorKind::PermissionDenied { Code::Permission } else { Code::Io };
    DriverError::permanent(code, format!("cannot read {}: {error}", file.display()))
}

/// A file of VirtualBox's, within limits; none if it is not there.
pub(super) fn read_text(file: &Path) -> std::io::Result<Option<String>> {
    let opened = match fs::File::open(file) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    let mut text = String::new();
    opened.take(FILE_BYTES_MAX + 1).read_to_string(&mut text)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(std::io::Error::other(format!("it is larger than {FILE_BYTES_MAX} bytes")));
    }
    Ok(Some(text))
}

fn detail(file: &Path, found: Found, settings: Settings) -> Detail {
    let found_file = |medium: &Medium| fs::metadata(&medium.file).ok();
    let sizes: BTreeMap<Uuid, u64> = settings
        .media
        .iter()
        .filter_map(|(uuid, medium)| Some((*uuid, found_file(medium)?.blocks() * BYTES_OF_A_BLOCK)))
        .collect();
    // What nothing reads from may be gone: a restore that was cut off leaves its name behind.
    let used = settings.in_use();
    let gone = settings.media.keys().filter(|uuid| used.contains(uuid) && !sizes.contains_key(uuid));
    let missing = gone.copied().collect();
    Detail { file: file.to_owned(), found, settings, missing, sizes, repairs: Vec::new() }
}

/// Whether VirtualBox runs the machine. It also waits for whatever `VBoxSVC` is at.
pub(super) async fn run_state(manage: &Manage, machine: Uuid) -> Result<RunState, DriverError> {
    let running = manage.ask(&["list", "runningvms"], QUICK).await?;
    let ours = format!("{{{machine}}}");
    if !running.lines().any(|line| line.trim_end().ends_with(&ours)) {
        return Ok(RunState::Off);
    }
    let info = manage.ask(&["showvminfo", &machine.to_string(), "--machinereadable"], QUICK).await?;
    Ok(match value(&info, "VMState").as_deref() {
        Some("paused") => RunState::Paused,
        _ => RunState::Running,
    })
}

/// The first value of a key in `--machinereadable` output. Nothing there is escaped, so only what comes before anything
/// that a user wrote can be trusted.
pub(super) fn value(info: &str, key: &str) -> Option<String> {
    let found = info.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix("=\""))?;
    Some(found.strip_suffix('"')?.to_owned())
}

/// What is seen, as the engine takes it.
pub(super) fn observation(
    state: &DomainState,
    run_state: RunState,
    detail: &Detail,
) -> Result<Observation, Failure> {
    let settings = &detail.settings;
    let known = known(state);
    let room = room(&settings.folder);
    let seen = |snap: &Snap| {
        let full = room.as_ref().and_then(|room| shortage(merge_bytes(snap, detail), room));
        seen(snap, &known, settings, full)
    };
    let snapshots = settings.snapshots.iter().map(seen).collect();
    Ok(Observation {
        at: Timestamp::now(),
        run_state,
        in_use: Vec::new(),
        files: BTreeMap::new(),
        unreadable: BTreeMap::new(),
        memory: BTreeMap::new(),
        foreign_dependants: BTreeMap::new(),
        disks: None,
        inside: BTreeMap::new(),
        generation: None,
        room: room.clone(),
        snapshots,
        current: settings.current.map(|uuid| uuid.to_string()),
        detail: serde_json::to_value(detail)
            .map_err(|error| Failure::new(Code::Invalid, error.to_string()))?,
    })
}

/// Our ids by VirtualBox's, as far as the log has them.
fn known(state: &DomainState) -> BTreeMap<Uuid, SnapshotId> {
    let live = state.tree.iter().map(|snapshot| (snapshot.id, snapshot.native.as_ref()));
    let dead = state.tombstones.iter().map(|(id, tombstone)| (*id, tombstone.native.as_ref()));
    live.chain(dead).filter_map(|(id, native)| Some((native?.parse().ok()?, id))).collect()
}

fn seen(
    snap: &Snap,
    known: &BTreeMap<Uuid, SnapshotId>,
    settings: &Settings,
    full: Option<String>,
) -> SeenSnapshot {
    let marked = Marked::parse(&snap.description);
    // A mark that was copied by hand is not believed where the log knows better.
    let by_mark = marked.mark.map(|(id, _)| id).filter(|id| !known.values().any(|other| other == id));
    SeenSnapshot {
        helper: None,
        id: known.get(&snap.uuid).copied().or(by_mark),
        native: snap.uuid.to_string(),
        parent: snap.parent.map(|uuid| uuid.to_string()),
        name: snap.name.clone(),
        description: Some(marked.text).filter(|text| !text.is_empty()),
        taken: snap.taken,
        state: Some(if snap.online { SnapshotState::Running } else { SnapshotState::Shutoff }),
        stays: stays(settings.children(snap.uuid), settings.images_upon(snap)).or(full),
    }
}

/// Why VirtualBox cannot merge a snapshot, if it cannot.
pub(super) fn stays(children: usize, images: usize) -> Option<String> {
    match (children, images) {
        (2.., _) => Some(format!(
            "it has {children} children, and VirtualBox merges a snapshot with one at most: it is merged once one is left"
        )),
        (_, 2..) => Some(format!(
            "{images} images are built upon one of its own (the machine's current state counts, and so do linked \
             clones), and VirtualBox merges an image with one at most"
        )),
        _ => None,
    }
}

/// Bytes that the merge of a snapshot may need at most: of two images the smaller goes into the other, but the last one
/// always takes the one upon it.
pub(super) fn merge_bytes(snap: &Snap, detail: &Detail) -> u64 {
    let media = &detail.settings.media;
    let size = |image: &Uuid| detail.sizes.get(image).copied().unwrap_or(0);
    let of = |image: &Uuid| {
        let upon = media.iter().filter(|(_, medium)| medium.parent == Some(*image));
        let upon = upon.map(|(above, _)| size(above)).max().unwrap_or(0);
        let is_base = media.get(image).is_none_or(|medium| medium.parent.is_none());
        if is_base { upon } else { upon.min(size(image)) }
    };
    snap.images.values().map(of).sum()
}

/// Why a merge that may need so many bytes has to wait, if it has.
pub(super) fn shortage(needed: u64, room: &Room) -> Option<String> {
    let fits = needed == 0 || needed <= room.free_bytes.saturating_sub(MARGIN_BYTES_DEFAULT);
    (!fits).then(|| {
        format!(
            "its merge may need {} MiB, and {} MiB are free in {}",
            needed >> 20,
            room.free_bytes >> 20,
            room.folder.display()
        )
    })
}
