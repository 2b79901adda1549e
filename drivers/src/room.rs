//! How much room a file system has.

use std::path::Path;

use snaptree_engine::driver::Room;

/// How much may be written on the file system of a folder, or of where that will be made; none where it does not say.
pub(crate) fn room(folder: &Path) -> Option<Room> {
    let folder = folder.ancestors().find(|folder| folder.is_dir())?;
    let found = rustix::fs::statvfs(folder).ok()?;
    // Some file systems do not say how large they are. What only root may use is not for a hypervisor.
    let known = found.f_blocks > 0;
    known.then(|| Room {
        folder: folder.to_owned(),
        free_bytes: found.f_bavail.saturating_mul(found.f_frsize),
    })
}
