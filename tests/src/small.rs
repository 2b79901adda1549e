//! A small file system in memory, to be filled.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::images::{text, tool};

/// Mounted for a test, which needs root; unmounted when dropped.
#[derive(Debug)]
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Mounts one of that size (`2M`) at a folder, which it makes.
    ///
    /// # Panics
    /// It cannot: the lab's tests run as root.
    pub fn mount(at: &Path, size: &str) -> Self {
        fs::create_dir_all(at).expect("a folder");
        tool("mount", &["-t", "tmpfs", "-o", &format!("size={size},mode=700"), "tmpfs", text(at)]);
        Self(at.to_owned())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    fn filler(&self) -> PathBuf {
        self.0.join("filler")
    }

    /// Fills it, so that `left_bytes` are left.
    ///
    /// # Panics
    /// It is fuller than that already.
    pub fn fill(&self, left_bytes: u64) {
        let mut filler = File::create(self.filler()).expect("the filler");
        let page = [0x5a; 4096];
        let mut written = 0;
        loop {
            match filler.write(&page) {
                Ok(0) => break,
                Ok(bytes) => written += bytes as u64,
                Err(error) if error.kind() == ErrorKind::StorageFull => break,
                Err(error) => panic!("the filler: {error}"),
            }
        }
        filler.set_len(written.checked_sub(left_bytes).expect("enough space")).expect("the filler");
    }

    /// Gives the space back.
    ///
    /// # Panics
    /// It was not filled.
    pub fn empty(&self) {
        fs::remove_file(self.filler()).expect("the filler");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        Command::new("umount").arg("-l").arg(&self.0).status().ok();
    }
}
