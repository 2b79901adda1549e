//! The links that lead from a registered path to the file that its disk opens now.
//!
//! ```text
//!  /vm/web.qcow2 -> .snaptree/<domain>/active/vda      active -> gen-<..>      gen-<..>/vda -> ../vda-<op>.qcow2
//! ```
//! Each is told from its own folder, so that a copy of the machine's folder opens the copy's layers and never the
//! original's. A link that was made by its absolute path is as good, and is made anew at the next switch.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use snaptree_engine::DiskName;
use snaptree_engine::driver::DriverError;

use super::config::active;
use super::files::{Doing, beside, folder_of, remove, sync};

/// What the link at a registered path says. Where the layers folder is not below, only an absolute path leads there.
pub(super) fn registered(path: &Path, layers: &Path, disk: &DiskName) -> PathBuf {
    let target = active(layers).join(disk.as_str());
    match target.strip_prefix(folder_of(path)) {
        Ok(below) => below.to_owned(),
        Err(_) => target,
    }
}

/// What a disk's link in a generation folder says.
pub(super) fn in_generation(layers: &Path, file: &Path) -> PathBuf {
    match file.strip_prefix(layers) {
        Ok(name) => Path::new("..").join(name),
        Err(_) => file.to_owned(),
    }
}

/// Whether a link at a registered path that says `text` is the one of its disk.
pub(super) fn is_ours(path: &Path, text: &Path, layers: &Path, disk: &DiskName) -> bool {
    folder_of(path).join(text) == active(layers).join(disk.as_str())
}

/// Puts the link at a registered path, in place of whatever link or file is there.
pub(super) async fn put(path: &Path, layers: &Path, disk: &DiskName, draft: &str) -> Result<(), DriverError> {
    let draft = beside(path, draft);
    remove(&draft)?;
    symlink(registered(path, layers, disk), &draft).doing("make the link", &draft)?;
    fs::rename(&draft, path).doing("put a link at", path)?;
    sync(&folder_of(path)).await
}
