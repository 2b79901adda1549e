//! What a killed `VBoxSVC` leaves that VirtualBox itself does not put right.
//!
//! * **VirtualBox's list of machines is missing** (`VirtualBox.xml`): it was renamed away, and the new one not yet into its
//!   place. `VBoxSVC` then begins with an empty one, and all machines of this user are forgotten. It is put there first.
//! * **A restore left images behind**: the settings still name those that it gave up, and what these are built upon could
//!   never be merged any more. They are closed.
//! * **A restore left the machine without disks**, when VBoxManage was killed in it: it counts as not done, and is done
//!   again. What the first try made is closed.
//! * **Images that nothing names**: made for a take or a restore, and not written into the settings in time. They hold
//!   nothing, and are removed.
//! * **The settings file is missing**: it was renamed away, and the new one (`.vbox-tmp`, complete) not yet into its
//!   place. It is put there.
//! * **An image is gone that the settings still name**: its data was merged and the file removed, and the settings were
//!   not yet written. An empty image with the missing id is put in its place, built upon the same parent, so that it
//!   reads as what it had been merged into; then the delete can be finished. An image below which the chain was changed
//!   already is told of its parent again. Only images of a deleted snapshot, and those right upon them, are made up.
//!
//! `VBoxSVC` keeps what it has read, so it must not be there meanwhile; it ends by itself 5 s after its last client.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use snaptree_engine::driver::{DriverError, ErrorClass};
use snaptree_engine::operation::Code;
use uuid::Uuid;

use super::notes::Notes;
use super::observe::{self, Detail, beside};
use super::settings::{Medium, Settings};

/// How long `VBoxSVC` may take to end.
const SERVICE_END: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(50);

// Where things are in a VDI header of version 1.1 (VirtualBox, VDICore.h).
const SIGNATURE: (usize, u32) = (0x40, 0xbeda_107f);
const TYPE: usize = 0x4c;
const TYPE_DIFF: u32 = 4;
const BLOCKS_AT: usize = 0x154;
const DATA_AT: usize = 0x158;
const BLOCK_COUNT: usize = 0x180;
const ALLOCATED: usize = 0x184;
const ID: usize = 0x188;
const MODIFIED: usize = 0x198;
const PARENT: usize = 0x1a8;
const PARENT_MODIFIED: usize = 0x1b8;
/// Largest header with its table that is copied: of a disk of 16 TiB.
const HEAD_BYTES_MAX: u64 = 128 << 20;

/// Waits until no `VBoxSVC` of ours is there, or there is nothing to repair any more; whether there is.
async fn alone(broken: impl Fn() -> bool) -> Result<bool, DriverError> {
    let until = Instant::now() + SERVICE_END;
    while let (Some(pid), true) = (service(), broken()) {
        if Instant::now() >= until {
            let message = format!("the machine has to be repaired, and VBoxSVC (process {pid}) holds it");
            return Err(DriverError::new(ErrorClass::Busy, Code::InUse, message)
                .hint("close the VirtualBox Manager and whatever else uses VirtualBox"));
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(broken())
}

/// Waits until no `VBoxSVC` of ours is there, which may have in mind what no settings say.
pub(super) async fn service_gone() -> Result<(), DriverError> {
    alone(|| true).await.map(|_| ())
}

/// Where VirtualBox keeps what is this user's, by its own rules.
fn home() -> Option<PathBuf> {
    let set = |key: &str| std::env::var_os(key).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(home) = set("VBOX_USER_HOME") {
        return Some(home);
    }
    // It does not believe HOME of root, which sudo may have left as it was.
    let user = match nix::unistd::geteuid() {
        root if root.is_root() => nix::unistd::User::from_uid(root).ok().flatten().map(|user| user.dir),
        _ => set("HOME"),
    }?;
    let old = user.join(".VirtualBox");
    if old.is_dir() {
        return Some(old);
    }
    Some(set("XDG_CONFIG_HOME").unwrap_or_else(|| user.join(".config")).join("VirtualBox"))
}

/// Puts VirtualBox's list of machines in its place, if it is missing. Has to come before any call, since an empty one would
/// take its place.
pub(super) async fn machines(notes: Option<&Notes>) -> Result<(), DriverError> {
    let Some(list) = home().map(|home| home.join("VirtualBox.xml")) else { return Ok(()) };
    let draft = beside(&list, "-tmp");
    if list.exists() || !draft.exists() || !alone(|| !list.exists()).await? {
        return Ok(());
    }
    let whole = observe::read_text(&draft).map_err(|error| failed(&draft, &error))?;
    if !whole.is_some_and(|text| text.trim_end().ends_with("</VirtualBox>")) {
        return Ok(());
    }
    let what = format!("VirtualBox's list of machines was missing: put {} in its place", draft.display());
    tracing::warn!("{what}");
    if let Some(notes) = notes {
        notes.add(&what)?;
    }
    fs::rename(&draft, &list).and_then(|()| sync_folder(&list)).map_err(|error| failed(&list, &error))
}

/// Whether VirtualBox has a machine in its list; none if the list cannot be read.
pub(super) fn is_listed(machine: Uuid) -> Option<bool> {
    let list = observe::read_text(&home()?.join("VirtualBox.xml")).ok()??;
    let ours = format!("\"{{{machine}}}\"");
    // An entry is written on a line of its own.
    Some(list.lines().any(|line| line.trim_start().starts_with("<MachineEntry") && line.contains(&ours)))
}

/// Removes images beside the machine's that nothing names and that hold nothing, if they are older than `since`: a call that
/// began then, and has succeeded, had the machine to itself.
pub(super) fn orphans(settings: &Settings, since: SystemTime, notes: &Notes) -> Result<(), DriverError> {
    let listed = home().and_then(|home| observe::read_text(&home.join("VirtualBox.xml")).ok().flatten());
    let listed = listed.unwrap_or_default();
    for entry in fs::read_dir(&settings.folder).into_iter().flatten().flatten() {
        let file = entry.path();
        let name = entry.file_name();
        let id = name.to_str().and_then(|name| name.strip_suffix(".vdi")?.parse::<Uuid>().ok());
        if id.is_none_or(|id| settings.media.contains_key(&id) || listed.contains(&id.to_string())) {
            continue;
        }
        let old = entry.metadata().and_then(|found| found.modified()).is_ok_and(|at| at < since);
        if old && holds_nothing(&file).unwrap_or(false) {
            notes.add(&format!("the empty image {} was left behind: removed it", file.display()))?;
            fs::remove_file(&file).map_err(|error| failed(&file, &error))?;
        }
    }
    Ok(())
}

/// Those images that hold nothing and are older than `since`.
pub(super) fn empty(settings: &Settings, images: Vec<Uuid>, since: SystemTime) -> Vec<Uuid> {
    let is_empty = |image: &Uuid| {
        settings.media.get(image).is_some_and(|medium| {
            let modified = fs::metadata(&medium.file).and_then(|found| found.modified());
            modified.is_ok_and(|at| at < since) && holds_nothing(&medium.file).unwrap_or(false)
        })
    };
    images.into_iter().filter(is_empty).collect()
}

/// Whether an image has no block: it ends where its first would begin, or it was not even given a header.
fn holds_nothing(file: &Path) -> io::Result<bool> {
    let opened = File::open(file)?;
    let length = opened.metadata()?.len();
    let mut first = Vec::new();
    opened.take(512).read_to_end(&mut first)?;
    first.resize(512, 0);
    let head = Head(first);
    let has_header = head.get(SIGNATURE.0) == SIGNATURE.1 && head.get(DATA_AT) != 0;
    Ok(if has_header {
        head.get(TYPE) == TYPE_DIFF && length <= u64::from(head.get(DATA_AT))
    } else {
        // The name of the format at most, and the length that was set.
        head.0[SIGNATURE.0 + 8..].iter().all(|byte| *byte == 0) && length <= HEAD_BYTES_MAX
    })
}

/// The `VBoxSVC` that our calls would reach. It notes its process in the folder of its socket.
pub(super) fn service() -> Option<u32> {
    let set = |key: &str| std::env::var(key).ok().filter(|value| !value.is_empty());
    let id = set("VBOX_IPC_SOCKETID").or_else(|| set("LOGNAME")).or_else(|| set("USER"))?;
    let lock = PathBuf::from(format!("/tmp/.vbox-{id}-ipc/lock"));
    let pid: u32 = fs::read_to_string(lock).ok()?.trim().trim_end_matches('\0').parse().ok()?;
    let comm = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    comm.starts_with("VBoxSVC").then_some(pid)
}

/// Puts the settings file in its place.
pub(super) async fn settings(detail: &Detail, notes: &Notes) -> Result<(), DriverError> {
    if !alone(|| !detail.file.exists()).await? {
        return Ok(());
    }
    let draft = beside(&detail.file, "-tmp");
    notes.add(&format!("its settings file was missing: put {} in its place", draft.display()))?;
    let placed = fs::rename(&draft, &detail.file).and_then(|()| sync_folder(&detail.file));
    placed.map_err(|error| failed(&detail.file, &error))
}

/// Puts an empty image where one of the snapshot's, or one right upon those, is gone.
pub(super) async fn media(detail: &Detail, snapshot: Uuid, notes: &Notes) -> Result<(), DriverError> {
    alone(|| true).await?;
    let media = &detail.settings.media;
    let own: BTreeSet<Uuid> =
        detail.settings.snapshot(snapshot).iter().flat_map(|snap| snap.images.values().copied()).collect();
    for missing in &detail.missing {
        let Some(medium) = media.get(missing) else { continue };
        let near = own.contains(missing) || medium.parent.is_some_and(|parent| own.contains(&parent));
        let parent = medium.parent.and_then(|parent| media.get(&parent));
        let (Some(parent), true) = (parent.filter(|_| near), medium.format.eq_ignore_ascii_case("vdi"))
        else {
            let message = format!(
                "the image {} is gone, and it is none that the delete can have removed, or no VDI",
                medium.file.display()
            );
            return Err(DriverError::permanent(Code::BadImage, message).hint("put it back from a backup"));
        };
        let upon: Vec<&Medium> =
            media.values().filter(|other| other.parent == Some(*missing) && other.file.exists()).collect();
        notes.add(&format!(
            "the image {} was gone, and its settings name it: put an empty one in its place",
            medium.file.display()
        ))?;
        let modified = put(*missing, medium, parent, &upon).map_err(|error| failed(&medium.file, &error))?;
        for child in &upon {
            relink(&child.file, *missing, modified).map_err(|error| failed(&child.file, &error))?;
        }
    }
    Ok(())
}

fn failed(file: &Path, error: &io::Error) -> DriverError {
    let message = format!("the machine cannot be repaired: {}: {error}", file.display());
    DriverError::new(ErrorClass::Transient, Code::Io, message)
}

fn sync_folder(file: &Path) -> io::Result<()> {
    File::open(file.parent().unwrap_or(Path::new("/")))?.sync_all()
}

/// Writes an empty image upon `parent`; returns what those upon it have to know as its last change.
fn put(uuid: Uuid, medium: &Medium, parent: &Medium, upon: &[&Medium]) -> io::Result<Uuid> {
    let below = head(&parent.file)?;
    // Where the one upon it still knows it, it goes on doing so.
    let known = upon.first().map(|child| head(&child.file)).transpose()?;
    let known = known.filter(|head| head.id(PARENT) == uuid).map(|head| head.id(PARENT_MODIFIED));
    let modified = known.unwrap_or_else(Uuid::new_v4);
    let parent_id = below.id(ID);
    let mut empty = below.clone();
    empty.set(TYPE, TYPE_DIFF);
    empty.set(ALLOCATED, 0);
    empty.forget_blocks();
    empty.set_id(ID, uuid);
    empty.set_id(MODIFIED, modified);
    empty.set_id(PARENT, parent_id);
    empty.set_id(PARENT_MODIFIED, below.id(MODIFIED));
    // Under another name first: a repair that is cut short leaves nothing that looks like an image.
    let draft = beside(&medium.file, ".snaptree");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
    file.write_all(&empty.0)?;
    file.sync_all()?;
    fs::rename(&draft, &medium.file)?;
    sync_folder(&medium.file)?;
    Ok(modified)
}

/// Tells an image of the one that it is built upon, where it was told otherwise already.
fn relink(file: &Path, parent: Uuid, modified: Uuid) -> io::Result<()> {
    let mut head = head(file)?;
    if head.id(PARENT) == parent && head.id(PARENT_MODIFIED) == modified {
        return Ok(());
    }
    head.set_id(PARENT, parent);
    head.set_id(PARENT_MODIFIED, modified);
    let opened = OpenOptions::new().write(true).open(file)?;
    opened.write_all_at(&head.0[PARENT..PARENT_MODIFIED + 16], PARENT as u64)?;
    opened.sync_all()
}

/// A VDI's header and its table of blocks.
#[derive(Clone)]
struct Head(Vec<u8>);

fn head(file: &Path) -> io::Result<Head> {
    let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("it is no VDI: {what}"));
    let mut opened = File::open(file)?;
    let mut first = vec![0; 512];
    opened.read_exact(&mut first)?;
    let mut head = Head(first);
    if head.get(SIGNATURE.0) != SIGNATURE.1 {
        return Err(bad("its signature"));
    }
    let (table, data, blocks) = (head.get(BLOCKS_AT), head.get(DATA_AT), head.get(BLOCK_COUNT));
    let end = u64::from(table) + 4 * u64::from(blocks);
    if u64::from(table) < 512 || end > u64::from(data) || u64::from(data) > HEAD_BYTES_MAX {
        return Err(bad("its table of blocks"));
    }
    head.0.resize(data as usize, 0);
    opened.read_exact(&mut head.0[512..])?;
    Ok(head)
}

impl Head {
    fn get(&self, at: usize) -> u32 {
        self.0.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes)
    }

    fn set(&mut self, at: usize, value: u32) {
        self.0[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn id(&self, at: usize) -> Uuid {
        let bytes = self.0.get(at..at + 16).and_then(|bytes| bytes.try_into().ok());
        Uuid::from_bytes_le(bytes.unwrap_or_default())
    }

    fn set_id(&mut self, at: usize, id: Uuid) {
        self.0[at..at + 16].copy_from_slice(&id.to_bytes_le());
    }

    /// All blocks read as what is below.
    fn forget_blocks(&mut self) {
        let (table, count) = (self.get(BLOCKS_AT) as usize, self.get(BLOCK_COUNT) as usize);
        self.0[table..table + 4 * count].fill(0xff);
    }
}
