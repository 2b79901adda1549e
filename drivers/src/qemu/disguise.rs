//! A folder in which a layer stands upon its future parent, and nowhere else does.
//!
//! ```text
//!   layers/high ── header: ./middle ──▶ layers/middle     for everybody
//!   op.d/high   ── header: ./middle ──▶ op.d/middle       for the qemu-img that is called there
//!     └▶ layers/high                      └▶ layers/low
//! ```
//!
//! qemu-img writes the name of the new parent before the tables that make it true (seen; the
//! order is kept with direct writes, at half the speed). Called in this folder, it takes `low` for the new parent and writes a name that still
//! means `middle` to everybody else: killed at any moment, the layer reads as before. The true name is written once
//! what was copied is on disk.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use snaptree_engine::driver::DriverError;
use snaptree_engine::operation::Code;

use super::files::{Doing, if_there};
use crate::operation_lock::OperationLock;

/// The name by which a layer's header means `parent` from within the folder that both are in.
pub(super) fn name_beside(file: &Path, parent: &Path) -> Option<PathBuf> {
    let name = parent.file_name()?;
    // What begins with `./` is never taken for a protocol, whatever characters follow (QEMU, path_has_protocol).
    (file.parent() == parent.parent()).then(|| Path::new(".").join(name))
}

/// The folder, with its two links.
#[derive(Debug)]
pub(super) struct Disguise {
    /// The layer, by a path in the folder.
    pub(super) file: PathBuf,
    /// The name for its header.
    pub(super) parent: PathBuf,
}

impl Disguise {
    /// Makes it, anew if there is one.
    ///
    /// # Errors
    /// The folder cannot be made; `file` and its parent `from` are in two folders, where no layers are that can be
    /// merged away: only the registered image may be elsewhere, and that one stays.
    pub(super) fn new(
        lock: &OperationLock,
        file: &Path,
        from: &Path,
        onto: &Path,
    ) -> Result<Self, DriverError> {
        let parent = name_beside(file, from).ok_or_else(|| {
            DriverError::permanent(
                Code::Unsupported,
                format!("{} and {} are in two folders", file.display(), from.display()),
            )
        })?;
        let folder = lock.folder();
        if_there(fs::remove_dir_all(&folder)).doing("remove", &folder)?;
        fs::create_dir(&folder).doing("make the folder", &folder)?;
        let link = |name: Option<&OsStr>, to: &Path| {
            let path = folder.join(name.unwrap_or_default());
            symlink(to, &path).doing("make the link", &path).map(|()| path)
        };
        link(from.file_name(), onto)?;
        Ok(Self { file: link(file.file_name(), file)?, parent })
    }
}
