//! Generations: folders that say which file each disk opens, switched for all disks by one rename.
//!
//! A generation's folder takes some blocks, and switching is the way out of a full file system: what is deleted is
//! deleted by a switch. So the folder that is switched on holds a reserve, which gives way piece by piece where there is
//! no space, and is filled up again when there is.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};

use snaptree_engine::driver::DriverError;
use snaptree_engine::operation::Code;
use snaptree_engine::{DiskName, OperationId};

use super::config::active;
use super::files::{Doing, if_there, make_folder, remove, sync};
use super::manifest::Manifest;
use super::step::Turn;

/// The manifest's name in a generation folder.
pub(super) const MANIFEST: &str = "manifest.json";
/// What every generation folder's name begins with.
const PREFIX: &str = "gen-";
const DRAFT_PREFIX: &str = "active.new-";
const FROZEN_PREFIX: &str = "frozen-";
/// The reserve's name in a generation folder.
const RESERVE: &str = "reserve";
/// How many switches it is for: a guest may take whatever one of them gives back.
const RESERVE_SWITCHES: u64 = 4;
/// What a switch takes at most besides its manifest and links: a folder, and a new name in the layers folder.
const SWITCH_BYTES: u64 = 32 << 10;
/// What a link takes, where it does not fit into its inode.
const LINK_BYTES: u64 = 4 << 10;

/// The generation that a step makes.
pub(super) fn name(operation: OperationId, step: usize) -> String {
    format!("{PREFIX}{operation}-{step}")
}

/// Whether a name from outside is one that a generation may have.
pub(super) fn is_name(name: &str) -> bool {
    name.starts_with(PREFIX) && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// The generation that is switched on.
pub(super) fn current(layers: &Path) -> Result<Option<String>, DriverError> {
    let path = active(layers);
    let target = match if_there(fs::read_link(&path)) {
        Ok(None) => return Ok(None),
        Ok(Some(target)) => target,
        // A folder or a file in its place.
        Err(error) if error.kind() == ErrorKind::InvalidInput => PathBuf::from("/"),
        Err(error) => return Err(error).doing("read the link", &path),
    };
    match target.to_str() {
        Some(name) if is_name(name) => Ok(Some(name.to_owned())),
        _ => Err(DriverError::permanent(
            Code::Drift,
            format!("{} is no link to a generation folder of Snaptree's", path.display()),
        )),
    }
}

impl Turn {
    /// The new generation's folder.
    pub(super) fn folder(&self) -> PathBuf {
        self.layers.join(&self.generation)
    }

    fn draft(&self) -> PathBuf {
        self.layers.join(format!("{DRAFT_PREFIX}{}", self.generation))
    }

    /// Whether it is switched on, not yet, or something else is.
    pub(super) fn stand(&self, current: Option<&str>) -> Stand {
        if current == Some(&self.generation) {
            Stand::Switched
        } else if current == self.previous.as_deref() {
            Stand::Before
        } else {
            Stand::Elsewhere
        }
    }

    /// The same, read from the disk; somewhere else is an error.
    pub(super) fn stand_now(&self) -> Result<Stand, DriverError> {
        let current = current(&self.layers)?;
        match self.stand(current.as_deref()) {
            Stand::Elsewhere => Err(self.elsewhere(current.as_deref())),
            stand => Ok(stand),
        }
    }

    /// What to say when an unknown generation is switched on.
    pub(super) fn elsewhere(&self, current: Option<&str>) -> DriverError {
        DriverError::permanent(
            Code::Drift,
            format!(
                "{} leads to {}, and the log says {}",
                active(&self.layers).display(),
                current.unwrap_or("nothing"),
                self.previous.as_deref().unwrap_or("nothing"),
            ),
        )
    }

    /// Builds the generation's folder, anew if there is one that was not finished, and the symlink that will be renamed
    /// over `active`.
    pub(super) async fn prepare(
        &self,
        links: &BTreeMap<DiskName, PathBuf>,
        manifest: &Manifest,
    ) -> Result<(), DriverError> {
        make_folder(&self.layers).await?;
        let path = self.folder().join(MANIFEST);
        let text = serde_json::to_vec_pretty(manifest).map_err(io::Error::from).doing("write", &path)?;
        let piece_bytes = piece_bytes(&text, links.len());
        loop {
            match self.build(links, &text).await {
                Err(error) if error.failure.code == Code::NoSpace && self.give_way(piece_bytes)? => {}
                built => return built,
            }
        }
    }

    async fn build(&self, links: &BTreeMap<DiskName, PathBuf>, manifest: &[u8]) -> Result<(), DriverError> {
        remove_folder(&self.layers, &self.generation)?;
        let folder = self.folder();
        fs::create_dir(&folder).doing("make the folder", &folder)?;
        super::files::set_mode(&folder, 0o755)?;
        for (disk, file) in links {
            let link = folder.join(disk.as_str());
            symlink(file, &link).doing("make the link", &link)?;
        }
        let path = folder.join(MANIFEST);
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o644)
            .open(&path)
            .doing("make", &path)?;
        file.write_all(manifest).doing("write", &path)?;
        drop(file);
        sync(&path).await?;
        sync(&folder).await?;
        let draft = self.draft();
        remove(&draft)?;
        symlink(&self.generation, &draft).doing("make the link", &draft)?;
        sync(&self.layers).await
    }

    /// Frees a piece of the reserve; whether there was any.
    fn give_way(&self, piece_bytes: u64) -> Result<bool, DriverError> {
        let Some(previous) = &self.previous else { return Ok(false) };
        let path = self.layers.join(previous).join(RESERVE);
        let found = if_there(fs::OpenOptions::new().write(true).open(&path)).doing("open", &path)?;
        let Some(reserve) = found else { return Ok(false) };
        let size = reserve.metadata().doing("look at", &path)?.len();
        reserve.set_len(size.saturating_sub(piece_bytes)).doing("shorten", &path)?;
        Ok(size > 0)
    }

    /// The reserve goes on to the new generation, and is filled up as far as there is space.
    fn keep_reserve(&self) -> Result<(), DriverError> {
        let path = self.folder().join(RESERVE);
        if let Some(previous) = &self.previous {
            let before = self.layers.join(previous).join(RESERVE);
            if_there(fs::rename(&before, &path)).doing("rename", &before)?;
        }
        let manifest = fs::metadata(self.folder().join(MANIFEST)).map_or(0, |manifest| manifest.len());
        let links = fs::read_dir(self.folder()).map_or(0, Iterator::count);
        let wanted = RESERVE_SWITCHES * needed_bytes(manifest, links);
        let open = fs::OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
        let filled = open.and_then(|reserve| {
            let have = reserve.metadata()?.len();
            if have < wanted {
                let flags = rustix::fs::FallocateFlags::empty();
                rustix::fs::fallocate(&reserve, flags, have, wanted - have)?;
            }
            Ok(())
        });
        if let Err(error) = filled {
            tracing::debug!(%error, "the reserve is not filled up");
        }
        Ok(())
    }

    /// The switch: one rename for all disks.
    pub(super) fn switch(&self) -> Result<(), DriverError> {
        let (draft, path) = (self.draft(), active(&self.layers));
        fs::rename(&draft, &path).doing("switch", &path)
    }

    /// Removes the generation before, once the new one is on disk.
    pub(super) async fn finish(&self) -> Result<(), DriverError> {
        sync(&self.layers).await?;
        self.keep_reserve()?;
        if let Some(previous) = &self.previous {
            remove_folder(&self.layers, previous)?;
        }
        sync(&self.layers).await
    }

    /// Notes that the guest's file systems may be frozen for this step. A power cut thaws them, so nothing is synced.
    pub(super) fn mark_frozen(&self) -> Result<(), DriverError> {
        let mark = self.layers.join(self.frozen_mark());
        fs::File::create(&mark).doing("make", &mark).map(|_| ())
    }

    /// Whether they may be.
    pub(super) fn is_marked_frozen(&self) -> Result<bool, DriverError> {
        let mark = self.layers.join(self.frozen_mark());
        Ok(if_there(fs::symlink_metadata(&mark)).doing("look at", &mark)?.is_some())
    }

    /// Notes that they are not, or that the guest is gone.
    pub(super) fn unmark_frozen(&self) -> Result<(), DriverError> {
        remove(&self.layers.join(self.frozen_mark())).map(|_| ())
    }

    /// The name of that note in the layers folder.
    pub(super) fn frozen_mark(&self) -> String {
        format!("{FROZEN_PREFIX}{}", self.generation)
    }

    /// Removes what was prepared and not switched on.
    pub(super) fn discard(&self) -> Result<(), DriverError> {
        self.unmark_frozen()?;
        remove(&self.draft())?;
        remove_folder(&self.layers, &self.generation)
    }

    /// The names that it leaves in the layers folder when it is cut off.
    pub(super) fn leaves(&self, name: &str) -> bool {
        [Some(name), name.strip_prefix(DRAFT_PREFIX), name.strip_prefix(FROZEN_PREFIX)]
            .contains(&Some(&self.generation))
    }
}

/// What a switch takes at most; a manifest grows from one to the next.
fn needed_bytes(manifest_bytes: u64, links: usize) -> u64 {
    let links = u64::try_from(links).unwrap_or(u64::MAX).saturating_mul(LINK_BYTES);
    SWITCH_BYTES.saturating_add(manifest_bytes.saturating_mul(2)).saturating_add(links)
}

fn piece_bytes(manifest: &[u8], links: usize) -> u64 {
    needed_bytes(u64::try_from(manifest.len()).unwrap_or(u64::MAX), links)
}

/// Which generation is switched on, seen from a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stand {
    /// The one before.
    Before,
    /// The step's own.
    Switched,
    /// Neither.
    Elsewhere,
}

/// Removes a generation folder: links and the manifest, and nothing that somebody else put there.
pub(super) fn remove_folder(layers: &Path, name: &str) -> Result<(), DriverError> {
    if !is_name(name) {
        return Err(DriverError::permanent(Code::Invalid, format!("'{name}' is no generation's name")));
    }
    let folder = layers.join(name);
    let Some(entries) = if_there(fs::read_dir(&folder)).doing("read the folder", &folder)? else {
        return Ok(());
    };
    for entry in entries {
        let entry = entry.doing("read the folder", &folder)?;
        let kind = entry.file_type().doing("look at", &entry.path())?;
        if kind.is_symlink() || entry.file_name() == MANIFEST || entry.file_name() == RESERVE {
            remove(&entry.path())?;
        }
    }
    match if_there(fs::remove_dir(&folder)) {
        Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => {
            tracing::warn!(folder = %folder.display(), "the folder of an old generation has foreign files, and stays");
            Ok(())
        }
        removed => removed.doing("remove the folder", &folder).map(|_| ()),
    }
}
