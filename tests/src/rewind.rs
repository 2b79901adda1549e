//! Puts a folder back as it was, with the very inodes of its images and memory files, many times over.
//!
//! Snaptree knows an image by its inode, so a copy of it would be another image. A hard link kept elsewhere lets an
//! inode outlive whatever is done to its names.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

#[derive(Debug)]
enum Entry {
    Folder(PathBuf),
    Link(PathBuf, PathBuf),
    File(File),
}

#[derive(Debug)]
struct File {
    path: PathBuf,
    /// The name that keeps the inode; a file that is not an image has none.
    kept: Option<PathBuf>,
    bytes: Vec<u8>,
    mode: u32,
    modified: SystemTime,
}

/// What a folder held at one moment.
#[derive(Debug)]
pub struct Rewind {
    folder: PathBuf,
    entries: Vec<Entry>,
}

impl Rewind {
    /// Remembers all that is in `folder`; `keep`, on the same file system, gets the links.
    ///
    /// # Panics
    /// Something cannot be read.
    pub fn of(folder: &Path, keep: &Path) -> Self {
        fs::create_dir_all(keep).expect("a folder");
        let mut rewind = Self { folder: folder.to_owned(), entries: Vec::new() };
        rewind.remember(folder, keep);
        rewind
    }

    fn remember(&mut self, folder: &Path, keep: &Path) {
        for entry in fs::read_dir(folder).expect("the folder") {
            let path = entry.expect("an entry").path();
            let metadata = fs::symlink_metadata(&path).expect("an entry");
            if metadata.is_dir() {
                self.entries.push(Entry::Folder(path.clone()));
                self.remember(&path, keep);
            } else if metadata.is_symlink() {
                let target = fs::read_link(&path).expect("a link");
                self.entries.push(Entry::Link(path, target));
            } else if metadata.is_file() {
                // What is none is the socket of a process that is gone.
                let is_kept = |extension| extension == "qcow2" || extension == "vmstate";
                let kept = path.extension().is_some_and(is_kept).then(|| {
                    let kept = keep.join(self.entries.len().to_string());
                    fs::hard_link(&path, &kept).expect("a link on the same file system");
                    kept
                });
                self.entries.push(Entry::File(File {
                    kept,
                    bytes: fs::read(&path).expect("a file"),
                    mode: metadata.permissions().mode(),
                    modified: metadata.modified().expect("a file system with times"),
                    path,
                }));
            }
        }
    }

    /// Makes the folder what it was.
    ///
    /// # Panics
    /// Something cannot be written.
    pub fn restore(&self) {
        for entry in fs::read_dir(&self.folder).expect("the folder") {
            let path = entry.expect("an entry").path();
            let is_folder = fs::symlink_metadata(&path).expect("an entry").is_dir();
            if is_folder { fs::remove_dir_all(&path) } else { fs::remove_file(&path) }.expect("removed");
        }
        for entry in &self.entries {
            match entry {
                Entry::Folder(path) => fs::create_dir(path).expect("a folder"),
                Entry::Link(path, target) => symlink(target, path).expect("a link"),
                Entry::File(file) => file.restore(),
            }
        }
    }
}

impl File {
    fn restore(&self) {
        if let Some(kept) = &self.kept {
            fs::set_permissions(kept, Permissions::from_mode(0o600)).expect("a mode");
            fs::hard_link(kept, &self.path).expect("a link");
        }
        fs::write(&self.path, &self.bytes).expect("a file");
        fs::set_permissions(&self.path, Permissions::from_mode(self.mode)).expect("a mode");
        let file = fs::File::open(&self.path).expect("a file");
        file.set_modified(self.modified).expect("a time");
    }
}
