//! Reading a qcow2 header.
//!
//! Only what Snaptree decides by is read: what the image is built upon, how large the disk is, and whether the
//! image is one of those that are left alone. It is done without a child process, so that looking at a domain
//! costs next to nothing. What comes from the file is outside input: every length is checked before it is used.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

const MAGIC: [u8; 4] = *b"QFI\xfb";
/// The part of a file that holds the header of every image that QEMU makes.
const FIRST_READ_BYTES: usize = 4096;
/// The header, its extensions and the backing name stand in the first cluster, which has 2 MiB at most.
const CLUSTER_BITS_MAX: u32 = 21;
const CLUSTER_BITS_MIN: u32 = 9;
/// QEMU's own limit.
const BACKING_NAME_BYTES_MAX: u32 = 1023;
const V2_HEADER_BYTES: usize = 72;
const V3_HEADER_BYTES_MIN: usize = 104;
const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xE279_2ACA;
const EXTENSION_BITMAPS: u32 = 0x2385_2875;
const EXTENSIONS_MAX: usize = 64;
const FORMAT_NAME_BYTES_MAX: usize = 32;

const COMPATIBLE_LAZY_REFCOUNTS: u64 = 1 << 0;
/// Version 2 has counts of 16 bits.
const REFCOUNT_ORDER_V2: u32 = 4;
const REFCOUNT_ORDER_MAX: u32 = 6;
const INCOMPATIBLE_DIRTY: u64 = 1 << 0;
const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_EXTERNAL_DATA: u64 = 1 << 2;
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;
const INCOMPATIBLE_KNOWN: u64 = (1 << 5) - 1;

/// What is wrong with a header.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum HeaderError {
    /// No qcow2 at all.
    #[error("it is not a qcow2 image")]
    NotQcow2,
    /// Ends before the header does.
    #[error("it is cut off inside its header")]
    Short,
    /// A field has a value that no sound image has.
    #[error("its header is damaged: {0}")]
    Damaged(&'static str),
    /// Sound, and not supported.
    #[error("it {0}")]
    Unsupported(&'static str),
    /// The tables reach behind the end of the file.
    #[error("it is truncated: its tables end at byte {needed}, and the file has {actual}")]
    Truncated {
        /// Where the tables end.
        needed: u64,
        /// The file's length.
        actual: u64,
    },
}

/// What a header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// What the guest sees as the disk's size.
    pub(super) virtual_size_bytes: u64,
    /// Snapshots inside the image.
    pub(super) internal_snapshots: u32,
    /// What it is built upon.
    pub(super) backing: Option<Backing>,
    /// Where its snapshot table is, if it has any snapshots.
    pub(super) snapshots_at: u64,
    /// Its first table.
    pub(super) first_table: FirstTable,
    /// Where the list of the dirty bitmaps is that are kept in the image, if there are any.
    pub(super) bitmaps: Option<BitmapDirectory>,
    /// How the image is laid out.
    pub(super) format: FormatOptions,
    /// Whether whoever wrote it last did not close it: its reference counts are mended when it is next opened.
    pub(super) is_dirty: bool,
    /// How many bytes of the disk one entry of the first table stands for, as a power of two.
    entry_bits: u32,
}

/// Where a first table (L1) is, and how many entries it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FirstTable {
    /// Its first byte.
    pub(super) at: u64,
    /// Its entries, of 8 bytes.
    pub(super) entries: u32,
}

impl FirstTable {
    /// QEMU's limit: 32 MiB.
    pub(super) const ENTRIES_MAX: u32 = 4 << 20;
}

/// Where the list of an image's dirty bitmaps is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BitmapDirectory {
    /// How many there are.
    pub(super) count: u32,
    /// Its first byte.
    pub(super) at: u64,
}

/// What a user chose when the image was made: `qemu-img create -o`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FormatOptions {
    /// 2 or 3; `compat` is 0.10 or 1.1.
    pub(super) version: u32,
    /// The size of a cluster, as a power of two.
    pub(super) cluster_bits: u32,
    /// The width of a reference count in bits, as a power of two.
    pub(super) refcount_order: u32,
    /// `lazy_refcounts`.
    pub(super) lazy_refcounts: bool,
    /// `extended_l2`.
    pub(super) extended_l2: bool,
    /// `compression_type`: 0 is zlib, 1 zstd.
    pub(super) compression: u8,
}

impl FormatOptions {
    fn parse(bytes: &[u8], version: u32, header_bytes: usize) -> Result<Self, HeaderError> {
        let cluster_bits = be32(bytes, 20)?;
        if version == 2 {
            let (lazy_refcounts, extended_l2) = (false, false);
            return Ok(Self {
                version,
                cluster_bits,
                refcount_order: REFCOUNT_ORDER_V2,
                lazy_refcounts,
                extended_l2,
                compression: 0,
            });
        }
        let refcount_order = be32(bytes, 96)?;
        if refcount_order > REFCOUNT_ORDER_MAX {
            return Err(HeaderError::Damaged("the width of its reference counts is out of range"));
        }
        let compression = if header_bytes > V3_HEADER_BYTES_MIN {
            *bytes.get(V3_HEADER_BYTES_MIN).ok_or(HeaderError::Short)?
        } else {
            0
        };
        Ok(Self {
            version,
            cluster_bits,
            refcount_order,
            lazy_refcounts: be64(bytes, 80)? & COMPATIBLE_LAZY_REFCOUNTS != 0,
            extended_l2: be64(bytes, 72)? & INCOMPATIBLE_EXTENDED_L2 != 0,
            compression,
        })
    }

    /// As `qemu-img create -o` takes them.
    pub(super) fn as_options(&self) -> String {
        let word = |on| if on { "on" } else { "off" };
        let mut options = format!(
            "compat={},cluster_size={},refcount_bits={}",
            if self.version == 2 { "0.10" } else { "1.1" },
            1_u64 << self.cluster_bits,
            1_u64 << self.refcount_order,
        );
        if self.version > 2 {
            options += &format!(
                ",lazy_refcounts={},extended_l2={},compression_type={}",
                word(self.lazy_refcounts),
                word(self.extended_l2),
                if self.compression == 1 { "zstd" } else { "zlib" },
            );
        }
        options
    }
}

/// What an image says it is built upon, word for word.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Backing {
    /// The name as it stands in the header.
    pub(super) name: PathBuf,
    /// The format, where the header names one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) format: Option<String>,
}

impl Backing {
    /// The file meant: a relative name counts from the folder of the file that names it.
    pub(super) fn file(&self, named_in: &Path) -> PathBuf {
        named_in.parent().unwrap_or(Path::new("/")).join(&self.name)
    }

    /// Whether the name is no plain path: `nbd://...`, `json:{...}`, `fat:...`.
    pub(super) fn is_protocol(&self) -> bool {
        let name = self.name.as_os_str().as_bytes();
        let colon = name.iter().position(|&byte| byte == b':');
        let slash = name.iter().position(|&byte| byte == b'/');
        // QEMU's rule (path_has_protocol): a colon before the first slash.
        colon.is_some_and(|colon| slash.is_none_or(|slash| colon < slash))
    }
}

/// Why a file could not be read as an image.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    /// The operating system refused.
    #[error("it cannot be read: {0}")]
    Io(io::Error),
    /// It is no sound image.
    #[error(transparent)]
    Header(#[from] HeaderError),
}

impl Header {
    /// Reads the header of an open file.
    pub(super) fn read(file: &File) -> Result<Self, ReadError> {
        let length = file.metadata().map_err(ReadError::Io)?.len();
        let first = read_up_to(file, FIRST_READ_BYTES).map_err(ReadError::Io)?;
        match Self::parse(&first, length) {
            Err(HeaderError::Short) if first.len() == FIRST_READ_BYTES => {
                let cluster = read_up_to(file, 1 << CLUSTER_BITS_MAX).map_err(ReadError::Io)?;
                Ok(Self::parse(&cluster, length)?)
            }
            parsed => Ok(parsed?),
        }
    }

    /// Reads a header from the first bytes of a file that is `length` bytes long.
    pub(super) fn parse(bytes: &[u8], length: u64) -> Result<Self, HeaderError> {
        if bytes.get(..4) != Some(&MAGIC) {
            return Err(HeaderError::NotQcow2);
        }
        let version = be32(bytes, 4)?;
        let header_bytes = match version {
            2 => V2_HEADER_BYTES,
            3 => usize::try_from(be32(bytes, 100)?).unwrap_or(usize::MAX),
            _ => return Err(HeaderError::Unsupported("has a qcow2 version that is neither 2 nor 3")),
        };
        let cluster_bits = be32(bytes, 20)?;
        if !(CLUSTER_BITS_MIN..=CLUSTER_BITS_MAX).contains(&cluster_bits) {
            return Err(HeaderError::Damaged("its cluster size is out of range"));
        }
        let cluster_bytes = 1_usize << cluster_bits;
        if header_bytes > cluster_bytes || (version == 3 && header_bytes < V3_HEADER_BYTES_MIN) {
            return Err(HeaderError::Damaged("its header length is out of range"));
        }
        if be32(bytes, 32)? != 0 {
            return Err(HeaderError::Unsupported("is encrypted, which Snaptree does not support"));
        }
        if version == 3 {
            check_features(be64(bytes, 72)?)?;
        }
        check_tables(bytes, length)?;
        let backing_offset = be64(bytes, 8)?;
        let backing = if backing_offset == 0 {
            None
        } else {
            Some(Backing {
                name: backing_name(bytes, backing_offset, cluster_bytes)?,
                format: backing_format(bytes, header_bytes, cluster_bytes, backing_offset)?,
            })
        };
        Ok(Self {
            virtual_size_bytes: be64(bytes, 24)?,
            internal_snapshots: be32(bytes, 60)?,
            backing,
            snapshots_at: be64(bytes, 64)?,
            first_table: FirstTable { at: be64(bytes, 40)?, entries: be32(bytes, 36)? },
            bitmaps: if version == 3 { bitmap_directory(bytes, header_bytes)? } else { None },
            format: FormatOptions::parse(bytes, version, header_bytes)?,
            is_dirty: version == 3 && be64(bytes, 72)? & INCOMPATIBLE_DIRTY != 0,
            entry_bits: entry_bits(bytes, version, cluster_bits)?,
        })
    }

    /// How many entries of a first table are about the disk. QEMU keeps a machine's memory behind them.
    pub(super) fn first_table_disk_entries(&self) -> u64 {
        self.virtual_size_bytes.div_ceil(1 << self.entry_bits)
    }

    /// Whether anything was ever written to the image at `path`, whose header this is. One that cannot be read may.
    pub(super) fn has_data(&self, path: &Path) -> bool {
        let FirstTable { at, entries } = self.first_table;
        let read = || -> io::Result<bool> {
            let file = super::files::open_image(path)?;
            let mut table = vec![0; usize::try_from(entries).map_err(io::Error::other)? * 8];
            file.read_exact_at(&mut table, at)?;
            Ok(table.iter().any(|byte| *byte != 0))
        };
        read().unwrap_or(true)
    }
}

fn check_features(incompatible: u64) -> Result<(), HeaderError> {
    if incompatible & INCOMPATIBLE_CORRUPT != 0 {
        return Err(HeaderError::Damaged("QEMU marked the image as corrupt"));
    }
    if incompatible & INCOMPATIBLE_EXTERNAL_DATA != 0 {
        return Err(HeaderError::Unsupported(
            "keeps its data in another file (data_file), which Snaptree does not support",
        ));
    }
    // A dirty image (lazy refcounts) is sound: QEMU repairs the counts when it next opens it for writing.
    if incompatible & !(INCOMPATIBLE_KNOWN | INCOMPATIBLE_DIRTY) != 0 {
        return Err(HeaderError::Unsupported("uses a qcow2 feature that Snaptree does not know"));
    }
    Ok(())
}

fn check_tables(bytes: &[u8], length: u64) -> Result<(), HeaderError> {
    let entries = be32(bytes, 36)?;
    if entries > FirstTable::ENTRIES_MAX {
        return Err(HeaderError::Damaged("its first table is out of range"));
    }
    let l1_end = be64(bytes, 40)?.checked_add(u64::from(entries) * 8);
    let needed = l1_end.ok_or(HeaderError::Damaged("its first table is out of range"))?;
    let refcounts = be64(bytes, 48)?;
    let needed = needed.max(refcounts.saturating_add(8));
    if needed > length {
        return Err(HeaderError::Truncated { needed, actual: length });
    }
    Ok(())
}

fn backing_name(bytes: &[u8], offset: u64, cluster_bytes: usize) -> Result<PathBuf, HeaderError> {
    let out_of_range = HeaderError::Damaged("the name of its backing file is out of range");
    let size = be32(bytes, 16)?;
    let start = usize::try_from(offset).map_err(|_| out_of_range.clone())?;
    let length = usize::try_from(size).map_err(|_| out_of_range.clone())?;
    let Some(end) = start.checked_add(length) else { return Err(out_of_range) };
    if size == 0 || size > BACKING_NAME_BYTES_MAX || end > cluster_bytes || start < V2_HEADER_BYTES {
        return Err(out_of_range);
    }
    let name = bytes.get(start..end).ok_or(HeaderError::Short)?;
    if name.contains(&0) {
        return Err(out_of_range);
    }
    Ok(PathBuf::from(std::ffi::OsStr::from_bytes(name)))
}

/// The backing format stands in a header extension.
fn backing_format(
    bytes: &[u8],
    header_bytes: usize,
    cluster_bytes: usize,
    backing_offset: u64,
) -> Result<Option<String>, HeaderError> {
    let end = usize::try_from(backing_offset).unwrap_or(usize::MAX).min(cluster_bytes);
    let mut at = header_bytes;
    for _ in 0..EXTENSIONS_MAX {
        if at.saturating_add(8) > end {
            return Ok(None);
        }
        let kind = be32(bytes, at)?;
        let length = usize::try_from(be32(bytes, at + 4)?).unwrap_or(usize::MAX);
        let data = at + 8;
        if kind == EXTENSION_END {
            return Ok(None);
        }
        let Some(data_end) = data.checked_add(length).filter(|&data_end| data_end <= end) else {
            return Err(HeaderError::Damaged("a header extension is out of range"));
        };
        if kind == EXTENSION_BACKING_FORMAT {
            let name = bytes.get(data..data_end).ok_or(HeaderError::Short)?;
            let sound = name.len() <= FORMAT_NAME_BYTES_MAX
                && name.iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
            return match std::str::from_utf8(name) {
                Ok(name) if sound => Ok(Some(name.to_owned())),
                _ => Err(HeaderError::Damaged("the format of its backing file is no format's name")),
            };
        }
        // Extensions are padded to eight bytes.
        at = data_end.next_multiple_of(8);
    }
    Err(HeaderError::Damaged("it has too many header extensions"))
}

/// A cluster of the second table (L2) has entries of 8 bytes, or of 16 where clusters have parts.
fn entry_bits(bytes: &[u8], version: u32, cluster_bits: u32) -> Result<u32, HeaderError> {
    let is_extended = version == 3 && be64(bytes, 72)? & INCOMPATIBLE_EXTENDED_L2 != 0;
    Ok(2 * cluster_bits - if is_extended { 4 } else { 3 })
}

/// The list of dirty bitmaps that the header names, if it is not empty.
fn bitmap_directory(bytes: &[u8], header_bytes: usize) -> Result<Option<BitmapDirectory>, HeaderError> {
    let mut at = header_bytes;
    for _ in 0..EXTENSIONS_MAX {
        // Behind the extensions stands the backing name, and then nothing.
        let (Ok(kind), Ok(length)) = (be32(bytes, at), be32(bytes, at + 4)) else { return Ok(None) };
        match kind {
            EXTENSION_END => return Ok(None),
            EXTENSION_BITMAPS => {
                let directory = BitmapDirectory { count: be32(bytes, at + 8)?, at: be64(bytes, at + 24)? };
                return Ok(Some(directory).filter(|directory| directory.count > 0));
            }
            _ => {}
        }
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let Some(next) = at.checked_add(8).and_then(|data| data.checked_add(length)) else {
            return Ok(None);
        };
        at = next.next_multiple_of(8);
    }
    Ok(None)
}

fn be32(bytes: &[u8], at: usize) -> Result<u32, HeaderError> {
    let field = at.checked_add(4).and_then(|end| bytes.get(at..end)).ok_or(HeaderError::Short)?;
    field.try_into().map(u32::from_be_bytes).map_err(|_| HeaderError::Short)
}

fn be64(bytes: &[u8], at: usize) -> Result<u64, HeaderError> {
    let field = at.checked_add(8).and_then(|end| bytes.get(at..end)).ok_or(HeaderError::Short)?;
    field.try_into().map(u64::from_be_bytes).map_err(|_| HeaderError::Short)
}

fn read_up_to(file: &File, bytes: usize) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; bytes];
    let mut filled = 0;
    while filled < bytes {
        match file.read_at(&mut buffer[filled..], filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    buffer.truncate(filled);
    Ok(buffer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn image(backing: &str, format: Option<&str>) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[7] = 3;
        bytes[20..24].copy_from_slice(&16_u32.to_be_bytes());
        bytes[24..32].copy_from_slice(&(8_u64 << 20).to_be_bytes());
        bytes[36..40].copy_from_slice(&1_u32.to_be_bytes());
        bytes[40..48].copy_from_slice(&1024_u64.to_be_bytes());
        bytes[48..56].copy_from_slice(&2048_u64.to_be_bytes());
        bytes[100..104].copy_from_slice(&104_u32.to_be_bytes());
        let mut at = 104;
        if let Some(format) = format {
            bytes[at..at + 4].copy_from_slice(&EXTENSION_BACKING_FORMAT.to_be_bytes());
            bytes[at + 4..at + 8].copy_from_slice(&u32::try_from(format.len()).unwrap().to_be_bytes());
            bytes[at + 8..at + 8 + format.len()].copy_from_slice(format.as_bytes());
            at = (at + 8 + format.len()).next_multiple_of(8);
        }
        if !backing.is_empty() {
            let name = at + 8;
            bytes[8..16].copy_from_slice(&(name as u64).to_be_bytes());
            bytes[16..20].copy_from_slice(&u32::try_from(backing.len()).unwrap().to_be_bytes());
            bytes[name..name + backing.len()].copy_from_slice(backing.as_bytes());
        }
        bytes
    }

    fn set(mut bytes: Vec<u8>, at: usize, value: &[u8]) -> Vec<u8> {
        bytes[at..at + value.len()].copy_from_slice(value);
        bytes
    }

    #[test]
    fn a_sound_header_is_read() {
        let header = Header::parse(&image("base.qcow2", Some("qcow2")), 4096).unwrap();
        assert_eq!(header.virtual_size_bytes, 8 << 20);
        let backing = header.backing.unwrap();
        assert_eq!(backing.format.as_deref(), Some("qcow2"));
        assert_eq!(backing.file(Path::new("/a/b.qcow2")), Path::new("/a/base.qcow2"));
        assert_eq!(Header::parse(&image("", None), 4096).unwrap().backing, None);
        assert_eq!(Header::parse(&image("/x", None), 4096).unwrap().backing.unwrap().format, None);
    }

    #[test]
    fn unsound_headers_are_refused() {
        let good = || image("/base", Some("qcow2"));
        for (what, bytes, length) in [
            ("empty", vec![], 0),
            ("raw", vec![0; 4096], 4096),
            ("cut", good()[..90].to_vec(), 90),
            ("version", set(good(), 7, &[9]), 4096),
            ("cluster bits", set(good(), 20, &99_u32.to_be_bytes()), 4096),
            ("encrypted", set(good(), 32, &1_u32.to_be_bytes()), 4096),
            ("corrupt", set(good(), 79, &[2]), 4096),
            ("data file", set(good(), 79, &[4]), 4096),
            ("unknown feature", set(good(), 72, &[1]), 4096),
            ("truncated", good(), 1000),
            ("header length", set(good(), 100, &u32::MAX.to_be_bytes()), 4096),
            ("name offset", set(good(), 8, &u64::MAX.to_be_bytes()), 4096),
            ("name size", set(good(), 16, &u32::MAX.to_be_bytes()), 4096),
            ("table", set(good(), 36, &u32::MAX.to_be_bytes()), 4096),
            ("extension", set(good(), 108, &u32::MAX.to_be_bytes()), 4096),
        ] {
            assert!(Header::parse(&bytes, length).is_err(), "{what}");
        }
    }

    #[test]
    fn protocols_are_told_from_paths() {
        for (name, protocol) in
            [("nbd://x", true), ("json:{}", true), ("/a:b", false), ("a/b:c", false), ("a", false)]
        {
            assert_eq!(Backing { name: name.into(), format: None }.is_protocol(), protocol, "{name}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..600), length in any::<u64>()) {
            let _ = Header::parse(&bytes, length);
        }

        #[test]
        fn no_damage_makes_it_panic(
            damage in prop::collection::vec((0_usize..200, any::<u8>()), 0..12),
            keep in 0_usize..4096,
        ) {
            let mut bytes = image("/some/base.qcow2", Some("qcow2"));
            for (at, value) in damage {
                bytes[at] = value;
            }
            bytes.truncate(keep);
            let _ = Header::parse(&bytes, 4096);
        }
    }
}
