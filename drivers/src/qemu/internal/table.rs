//! Reading the snapshot table of a qcow2 image (`docs/interop/qcow2.txt`, "Snapshots"), without a child process.
//!
//! What comes from the file is outside input: every length is checked before it is used.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::qemu::files::open_image;
use crate::qemu::qcow2::{FirstTable, Header, HeaderError, ReadError};

/// QEMU's own limit.
const SNAPSHOTS_MAX: u32 = 65_536;
/// An entry without what follows it.
const ENTRY_BYTES: usize = 40;
/// More than QEMU writes behind an entry.
const EXTRA_BYTES_MAX: usize = 1024;
/// The mark that a table's cluster has one user; it comes and goes with snapshots.
const COPIED: u64 = 1 << 63;

/// An internal snapshot, as one image has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::qemu) struct Entry {
    /// Its name there.
    pub(in crate::qemu) tag: String,
    /// How many bytes of a machine's memory and devices it has; 0 for none.
    pub(in crate::qemu) memory_bytes: u64,
    /// When it was taken.
    pub(in crate::qemu) taken: Option<Timestamp>,
    /// Whether the disk reads as the snapshot at this moment: both have the same first table. Whatever is written after
    /// a snapshot was taken or applied goes into clusters of its own, and the first table tells.
    pub(in crate::qemu) is_active: bool,
}

/// All internal snapshots of an image.
pub(in crate::qemu) fn read(path: &Path) -> Result<Vec<Entry>, ReadError> {
    let file = open_image(path).map_err(ReadError::Io)?;
    let header = Header::read(&file)?;
    read_of(&file, &header)
}

/// The same, of an open image whose header is known.
fn read_of(file: &File, header: &Header) -> Result<Vec<Entry>, ReadError> {
    let mut found = Vec::new();
    if header.internal_snapshots == 0 {
        return Ok(found);
    }
    if header.internal_snapshots > SNAPSHOTS_MAX {
        return Err(damaged("it has more snapshots than QEMU allows"));
    }
    let active = first_table(file, header, header.first_table)?;
    let mut at = header.snapshots_at;
    for _ in 0..header.internal_snapshots {
        let fixed = bytes(file, at, ENTRY_BYTES)?;
        let extra_bytes = usize::try_from(be32(&fixed, 36)).unwrap_or(usize::MAX);
        let (id_bytes, name_bytes) = (usize::from(be16(&fixed, 12)), usize::from(be16(&fixed, 14)));
        if extra_bytes > EXTRA_BYTES_MAX {
            return Err(damaged("an entry of its snapshot table is out of range"));
        }
        let rest = bytes(file, at.saturating_add(40), extra_bytes + id_bytes + name_bytes)?;
        let memory_bytes = if extra_bytes >= 8 { be64(&rest, 0) } else { u64::from(be32(&fixed, 32)) };
        let table = FirstTable { at: be64(&fixed, 0), entries: be32(&fixed, 8) };
        let nanoseconds = i32::try_from(be32(&fixed, 20)).unwrap_or(0);
        found.push(Entry {
            tag: String::from_utf8_lossy(&rest[extra_bytes + id_bytes..]).into_owned(),
            memory_bytes,
            taken: Timestamp::new(i64::from(be32(&fixed, 16)), nanoseconds).ok(),
            is_active: first_table(file, header, table)? == active,
        });
        let length = (ENTRY_BYTES + extra_bytes + id_bytes + name_bytes).next_multiple_of(8);
        at = at.saturating_add(length as u64);
    }
    Ok(found)
}

/// The part of a first table that is about the disk; what comes after it is memory.
fn first_table(file: &File, header: &Header, table: FirstTable) -> Result<Vec<u64>, ReadError> {
    if table.entries > FirstTable::ENTRIES_MAX {
        return Err(damaged("the table of a snapshot is out of range"));
    }
    let entries = u64::from(table.entries).min(header.first_table_disk_entries());
    let length = usize::try_from(entries).unwrap_or(usize::MAX).saturating_mul(8);
    let raw = bytes(file, table.at, length)?;
    let mut entries: Vec<u64> = raw.chunks_exact(8).map(|entry| be64(entry, 0) & !COPIED).collect();
    // A disk that was made larger since has a longer one.
    while entries.last() == Some(&0) {
        entries.pop();
    }
    Ok(entries)
}

fn damaged(what: &'static str) -> ReadError {
    ReadError::Header(HeaderError::Damaged(what))
}

/// A part of a file that is there.
pub(in crate::qemu) fn bytes(file: &File, at: u64, length: usize) -> Result<Vec<u8>, ReadError> {
    let whole = file.metadata().map_err(ReadError::Io)?.len();
    if at.checked_add(length as u64).is_none_or(|end| end > whole) {
        return Err(damaged("one of its tables is out of range"));
    }
    let mut buffer = vec![0; length];
    match file.read_exact_at(&mut buffer, at) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Err(damaged("one of its tables is cut off"))
        }
        Err(error) => Err(ReadError::Io(error)),
        Ok(()) => Ok(buffer),
    }
}

/// Fields of slices whose length was checked when they were read.
pub(in crate::qemu) fn be16(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|field| field.try_into().ok()).map_or(0, u16::from_be_bytes)
}

pub(in crate::qemu) fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|field| field.try_into().ok()).map_or(0, u32::from_be_bytes)
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|field| field.try_into().ok()).map_or(0, u64::from_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    /// Two snapshots behind a header; the second one is what the disk reads as.
    fn image() -> Vec<u8> {
        let mut bytes = vec![0; 8192];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, b"QFI\xfb");
        put(7, &[3]);
        put(20, &16_u32.to_be_bytes());
        put(24, &(8_u64 << 20).to_be_bytes());
        put(36, &2_u32.to_be_bytes());
        put(40, &4096_u64.to_be_bytes());
        put(48, &2048_u64.to_be_bytes());
        put(60, &2_u32.to_be_bytes());
        put(64, &5120_u64.to_be_bytes());
        put(100, &104_u32.to_be_bytes());
        put(4096, &(0x10000 | COPIED).to_be_bytes());
        put(4104, &0x99_0000_u64.to_be_bytes());
        put(4112, &0x20000_u64.to_be_bytes());
        put(4120, &0x10000_u64.to_be_bytes());
        let mut at = 5120;
        for (table, tag, memory) in [(4112_u64, "st-a", 0_u64), (4120, "st-bb", 77)] {
            put(at, &table.to_be_bytes());
            put(at + 8, &1_u32.to_be_bytes());
            put(at + 12, &1_u16.to_be_bytes());
            put(at + 14, &u16::try_from(tag.len()).unwrap().to_be_bytes());
            put(at + 16, &1_700_000_000_u32.to_be_bytes());
            put(at + 36, &16_u32.to_be_bytes());
            put(at + 40, &memory.to_be_bytes());
            put(at + 56, b"1");
            put(at + 57, tag.as_bytes());
            at += (57 + tag.len()).next_multiple_of(8);
        }
        bytes
    }

    fn read_bytes(bytes: &[u8]) -> Result<Vec<Entry>, ReadError> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        read(file.path())
    }

    #[test]
    fn a_table_is_read_and_the_snapshot_that_the_disk_is_at_is_known() {
        let found = read_bytes(&image()).unwrap();
        let seen: Vec<(&str, u64, bool)> =
            found.iter().map(|entry| (entry.tag.as_str(), entry.memory_bytes, entry.is_active)).collect();
        assert_eq!(seen, [("st-a", 0, false), ("st-bb", 77, true)]);
        assert_eq!(found[0].taken.unwrap().as_second(), 1_700_000_000);
    }

    #[test]
    fn a_table_out_of_range_is_refused() {
        for (at, value) in
            [(60, u32::MAX), (64, u32::MAX), (5120, u32::MAX), (5128, u32::MAX), (5156, u32::MAX)]
        {
            let mut bytes = image();
            bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
            assert!(read_bytes(&bytes).is_err(), "{at}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_in_the_table_nothing_breaks(at in 5120_usize..5300, value: [u8; 8]) {
            let mut bytes = image();
            bytes[at..at + 8].copy_from_slice(&value);
            let _ = read_bytes(&bytes);
        }
    }
}
