//! A qemu-img that is first in the path, and does something else than the real one, or more.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::images::text;
use crate::program::Program;

/// A folder with a script in the place of qemu-img.
#[derive(Debug)]
pub struct Wrapped {
    folder: PathBuf,
}

impl Wrapped {
    /// Puts it into `folder`, which it makes. In the script, `qemu-img` is the real one, `$FOLDER` a folder for what
    /// it wants to remember, and `$1` the first of its runs that it is given as an argument: `create`, `rebase`, ...
    ///
    /// # Panics
    /// It cannot be written.
    pub fn new(folder: &Path, script: &str) -> Self {
        let bin = folder.join("bin");
        fs::create_dir_all(&bin).expect("a folder");
        let file = bin.join("qemu-img");
        let text = format!("#!/bin/sh\nPATH=${{PATH#*:}}\nFOLDER={}\n{script}\n", text(folder));
        fs::write(&file, text).expect("the script");
        fs::set_permissions(&file, Permissions::from_mode(0o755)).expect("the script");
        Self { folder: folder.to_owned() }
    }

    /// The program with it.
    pub fn on(&self, program: &Program) -> Program {
        let path = std::env::var("PATH").unwrap_or_default();
        program.with_env("PATH", &format!("{}:{path}", text(&self.folder.join("bin"))))
    }

    /// The number that the script wrote into a file of its folder; 0 if it did not.
    pub fn number(&self, name: &str) -> usize {
        let text = fs::read_to_string(self.folder.join(name)).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    }
}
