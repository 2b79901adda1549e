//! Real disk images: made, written and read by QEMU's own tools.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::SystemTime;

/// Size of the disks of the tests.
pub const DISK_BYTES: usize = 4 << 20;
/// Writes are of this size, so that they do not fill whole clusters.
pub const BLOCK_BYTES: usize = 16 << 10;

/// Deeper chains no test makes.
const CHAIN_FILES_MAX: usize = 400;

/// What `qemu-img check` exits with when leaked clusters are all that it found.
const CHECK_FOUND_LEAKS: i32 = 3;

/// Runs a tool and expects success.
///
/// # Panics
/// It fails.
pub fn tool(program: &str, args: &[&str]) -> Output {
    let output = Command::new(program).args(args).env("LC_ALL", "C").output().expect("the tool starts");
    assert!(
        output.status.success(),
        "{program} {args:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// A path as text; the tests' paths are UTF-8.
///
/// # Panics
/// It is not.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("a path of the tests")
}

/// Makes an empty qcow2 image of [`DISK_BYTES`].
pub fn make_qcow2(path: &Path) {
    tool("qemu-img", &["create", "-q", "-f", "qcow2", text(path), &DISK_BYTES.to_string()]);
}

/// What a disk reads as: one byte pattern a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content(Vec<u8>);

impl Default for Content {
    fn default() -> Self {
        Self(vec![0; DISK_BYTES / BLOCK_BYTES])
    }
}

impl Content {
    /// How many blocks a disk has.
    pub const BLOCKS: usize = DISK_BYTES / BLOCK_BYTES;

    /// Writes `count` blocks from `first` through `path`, in the image and here.
    pub fn write(&mut self, path: &Path, first: usize, count: usize, pattern: u8) {
        let count = count.min(Self::BLOCKS - first);
        self.0[first..first + count].fill(pattern);
        let command = format!("write -P {pattern} {} {}", first * BLOCK_BYTES, count * BLOCK_BYTES);
        tool("qemu-io", &["-f", "qcow2", "-c", &command, text(path)]);
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; DISK_BYTES];
        for (block, pattern) in bytes.chunks_exact_mut(BLOCK_BYTES).zip(&self.0) {
            block.fill(*pattern);
        }
        bytes
    }
}

/// What is said of clusters that an image holds and does not use: a killed qemu-img leaves some.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Leaks {
    /// They are a fault.
    #[default]
    Refused,
    /// They cost space, and are counted.
    Tolerated,
}

/// Reads images back, and remembers what it read while no file of the chain has changed.
#[derive(Debug, Default)]
pub struct Reader {
    leaks: Leaks,
    leaking: BTreeSet<PathBuf>,
    known: BTreeMap<PathBuf, (Vec<Facts>, Content)>,
    checked: BTreeMap<PathBuf, Facts>,
}

/// A file, its length and when it was written: while these stay, so does what it reads as.
pub type Facts = (PathBuf, u64, SystemTime);

impl Reader {
    /// Expects `image` to read as `content`, byte by byte.
    ///
    /// # Panics
    /// It does not.
    pub fn expect(&mut self, what: &str, image: &Path, content: &Content) {
        if let Some(difference) = self.difference(image, content) {
            panic!("{what}: {difference}");
        }
    }

    /// How `image` reads otherwise than `content`, if it does.
    pub fn difference(&mut self, image: &Path, content: &Content) -> Option<String> {
        let chain = chain(image);
        if self.known.get(image).is_some_and(|(known, read)| *known == chain && read == content) {
            return None;
        }
        let raw = image.with_extension("read");
        tool("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(image), text(&raw)]);
        let read = std::fs::read(&raw).expect("the raw copy");
        std::fs::remove_file(&raw).expect("the raw copy");
        let wanted = content.bytes();
        if read.len() != wanted.len() {
            return Some(format!("{} has {} bytes, not {}", image.display(), read.len(), wanted.len()));
        }
        if read != wanted {
            let at = read.iter().zip(&wanted).take_while(|(read, wanted)| read == wanted).count();
            return Some(format!("{} reads {} at byte {at}, not {}", image.display(), read[at], wanted[at]));
        }
        self.known.insert(image.to_owned(), (chain, content.clone()));
        None
    }

    /// Expects `qemu-img check` to find nothing at all, or leaks where they are tolerated.
    ///
    /// # Panics
    /// It finds something.
    pub fn expect_clean(&mut self, image: &Path) {
        let facts = facts(image);
        if self.checked.get(image) == Some(&facts) {
            return;
        }
        let args = ["check", "-q", "-f", "qcow2", text(image)];
        let output = Command::new("qemu-img").args(args).output().expect("qemu-img starts");
        if output.status.code() == Some(CHECK_FOUND_LEAKS) && self.leaks == Leaks::Tolerated {
            self.leaking.insert(image.to_owned());
        } else {
            assert!(output.status.success(), "{}: {output:?}", image.display());
        }
        self.checked.insert(image.to_owned(), facts);
    }

    /// What is said of leaks from here on, and none were seen yet.
    pub fn tolerate(&mut self, leaks: Leaks) {
        self.leaks = leaks;
        self.leaking.clear();
    }

    /// How many images were seen with leaks.
    pub fn leaking(&self) -> usize {
        self.leaking.len()
    }

    /// Forgets what it read, so that everything is read anew.
    pub fn forget(&mut self) {
        *self = Self { leaks: self.leaks, ..Self::default() };
    }
}

fn facts(file: &Path) -> Facts {
    let metadata = std::fs::metadata(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    (file.to_owned(), metadata.len(), metadata.modified().expect("a file system with times"))
}

/// The files of a backing chain, by the names in their headers: layers name one another by absolute path.
///
/// # Panics
/// One cannot be read, or there is no end.
pub fn chain(image: &Path) -> Vec<Facts> {
    let mut files = vec![facts(image)];
    let mut next = backing(image);
    while let Some(file) = next {
        assert!(files.len() < CHAIN_FILES_MAX, "{}: a chain without an end", image.display());
        next = backing(&file);
        files.push(facts(&file));
    }
    files
}

/// What a qcow2 header says that the image is built upon.
fn backing(image: &Path) -> Option<PathBuf> {
    let file = File::open(image).unwrap_or_else(|error| panic!("{}: {error}", image.display()));
    let mut header = [0; 20];
    file.read_exact_at(&mut header, 0).expect("a header");
    let [at, length] = [&header[8..16], &header[16..20]]
        .map(|field| field.iter().fold(0, |number, byte| (number << 8) | u64::from(*byte)));
    if at == 0 {
        return None;
    }
    let mut name = vec![0; usize::try_from(length).expect("a length")];
    file.read_exact_at(&mut name, at).expect("a name");
    Some(PathBuf::from(String::from_utf8(name).expect("a path of the tests")))
}
