//! A copy of the database at one moment, to be put back later: what a restore from a backup does to a running log.

use std::fs;
use std::path::{Path, PathBuf};

/// The database and its write-ahead log as they were; nobody may have them open then.
#[derive(Clone, Debug)]
pub struct KeptLog {
    files: Vec<(PathBuf, Option<Vec<u8>>)>,
}

impl KeptLog {
    /// Copies what is in the state directory.
    ///
    /// # Panics
    /// It cannot be read.
    pub fn of(state: &Path) -> Self {
        let files = ["snaptree.db", "snaptree.db-wal"].map(|name| {
            let path = state.join(name);
            let bytes = path.exists().then(|| fs::read(&path).expect("the database"));
            (path, bytes)
        });
        Self { files: files.into() }
    }

    /// Puts it back. The index of the write-ahead log, which is of another log then, goes.
    ///
    /// # Panics
    /// It cannot be written.
    pub fn put_back(&self) {
        for (path, bytes) in &self.files {
            match bytes {
                Some(bytes) => fs::write(path, bytes).expect("the database"),
                None if path.exists() => fs::remove_file(path).expect("the write-ahead log"),
                None => {}
            }
        }
        let index = self.files[0].0.with_extension("db-shm");
        if index.exists() {
            fs::remove_file(index).expect("the index");
        }
    }

    /// How many bytes the database and its write-ahead log have.
    pub fn sizes(&self) -> Vec<usize> {
        self.files.iter().map(|(_, bytes)| bytes.as_ref().map_or(0, Vec::len)).collect()
    }

    /// The same with some bytes exchanged: `file` is 0 for the database, 1 for the write-ahead log.
    #[must_use]
    pub fn damaged(&self, file: usize, at: usize, with: &[u8]) -> Self {
        let mut damaged = self.clone();
        if let Some(bytes) = &mut damaged.files[file].1 {
            bytes[at..at + with.len()].copy_from_slice(with);
        }
        damaged
    }

    /// What stands there.
    ///
    /// # Panics
    /// There is no such file, or it is shorter.
    pub fn bytes(&self, file: usize, at: usize, count: usize) -> &[u8] {
        &self.files[file].1.as_ref().expect("the file")[at..at + count]
    }
}
