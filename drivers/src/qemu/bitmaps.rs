//! Reading the dirty bitmaps of a qcow2 image (`docs/interop/qcow2.txt`, "Bitmaps"), without a child process.
//!
//! What comes from the file is outside input: every length is checked before it is used.

use std::fs::File;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::files::open_image;
use super::internal::table::{be16, be32, bytes};
use super::qcow2::{BitmapDirectory, Header, HeaderError, ReadError};

/// QEMU's own limit.
const BITMAPS_MAX: u32 = 65_535;
/// An entry without what follows it.
const ENTRY_BYTES: usize = 24;
/// More than QEMU writes behind an entry; it knows none.
const EXTRA_BYTES_MAX: usize = 1024;
/// QEMU's own limits on the granularity, as powers of two.
const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// Somebody had it open for writing and did not close it: QEMU uses it no more.
const IN_USE: u32 = 1 << 0;
/// It records what is written.
const AUTO: u32 = 1 << 1;

/// A dirty bitmap, as one image has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Bitmap {
    /// Its name.
    pub(super) name: String,
    /// How many bytes of the disk one bit stands for.
    pub(super) granularity_bytes: u64,
    /// Whether it records what is written.
    pub(super) records: bool,
    /// Whether somebody has the image open with it, or had and was killed.
    pub(super) in_use: bool,
}

/// All dirty bitmaps of an image.
pub(super) fn read(path: &Path) -> Result<Vec<Bitmap>, ReadError> {
    let file = open_image(path).map_err(ReadError::Io)?;
    let header = Header::read(&file)?;
    match header.bitmaps {
        Some(directory) => read_of(&file, directory),
        None => Ok(Vec::new()),
    }
}

fn read_of(file: &File, directory: BitmapDirectory) -> Result<Vec<Bitmap>, ReadError> {
    let damaged = |what| ReadError::Header(HeaderError::Damaged(what));
    if directory.count > BITMAPS_MAX {
        return Err(damaged("it has more dirty bitmaps than QEMU allows"));
    }
    let mut found = Vec::new();
    let mut at = directory.at;
    for _ in 0..directory.count {
        let fixed = bytes(file, at, ENTRY_BYTES)?;
        let (flags, granularity_bits) = (be32(&fixed, 12), fixed[17]);
        let name_bytes = usize::from(be16(&fixed, 18));
        let extra_bytes = usize::try_from(be32(&fixed, 20)).unwrap_or(usize::MAX);
        if extra_bytes > EXTRA_BYTES_MAX || !GRANULARITY_BITS.contains(&granularity_bits) {
            return Err(damaged("an entry of its list of dirty bitmaps is out of range"));
        }
        let rest = bytes(file, at.saturating_add(ENTRY_BYTES as u64), extra_bytes + name_bytes)?;
        found.push(Bitmap {
            name: String::from_utf8_lossy(&rest[extra_bytes..]).into_owned(),
            granularity_bytes: 1 << granularity_bits,
            records: flags & AUTO != 0,
            in_use: flags & IN_USE != 0,
        });
        at = at.saturating_add((ENTRY_BYTES + extra_bytes + name_bytes).next_multiple_of(8) as u64);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn directory(entries: &[(&str, u32)]) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        for (name, flags) in entries {
            let mut entry = vec![0_u8; 24];
            entry[12..16].copy_from_slice(&flags.to_be_bytes());
            entry[16] = 1;
            entry[17] = 16;
            entry[18..20].copy_from_slice(&u16::try_from(name.len()).unwrap().to_be_bytes());
            entry.extend_from_slice(name.as_bytes());
            entry.resize(entry.len().next_multiple_of(8), 0);
            bytes.extend_from_slice(&entry);
        }
        bytes
    }

    fn read_bytes(bytes: &[u8], count: u32) -> Result<Vec<Bitmap>, ReadError> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        read_of(file.as_file(), BitmapDirectory { count, at: 4096 })
    }

    #[test]
    fn the_names_and_marks_of_all_bitmaps_are_read() {
        let found = read_bytes(&directory(&[("b0", 2), ("longer-name", 1)]), 2).unwrap();
        let seen: Vec<_> = found.iter().map(|map| (map.name.as_str(), map.records, map.in_use)).collect();
        assert_eq!(seen, [("b0", true, false), ("longer-name", false, true)]);
        assert_eq!(found[0].granularity_bytes, 65_536);
    }

    #[test]
    fn a_directory_out_of_range_is_refused() {
        let good = directory(&[("b0", 2)]);
        assert!(read_bytes(&good, 2).is_err(), "cut off");
        assert!(read_bytes(&good, u32::MAX).is_err(), "too many");
        for (at, value) in [(4096 + 17, 99), (4096 + 18, 255), (4096 + 20, 255)] {
            let mut bytes = good.clone();
            bytes[at] = value;
            assert!(read_bytes(&bytes, 1).is_err(), "{at}");
        }
    }
}
