//! Whether the write-ahead log is whole.
//!
//! SQLite ends at the first frame whose sum is wrong, without a word: it cannot tell damage from a transaction that a
//! power cut kept from being written. What stands behind that frame tells a little more.
//!
//! The format is SQLite's (<https://www.sqlite.org/fileformat2.html#the_write_ahead_log>): a header of 32 bytes, then
//! frames of 24 bytes and a page, each with the two salts of the header and a sum over everything so far.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

const HEADER_BYTES: usize = 32;
const FRAME_BYTES: usize = 24;
/// The last bit says in which order the bytes of a word are summed.
const MAGIC: u32 = 0x377f_0682;
const PAGE_BYTES_MAX: u32 = 65_536;
/// How often a log that starts over while it is read is read again.
const TRIES: usize = 3;

/// How the write-ahead log ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tail {
    /// With its last commit, or with what was being written.
    Whole,
    /// Commits stand behind a frame that SQLite does not read beyond.
    BrokenOff {
        /// The number of that frame, from 1.
        frame: u64,
        /// How many commits are behind its beginning.
        commits: u64,
    },
}

/// Reads the log. One that cannot be read, or is none, has no tail to tell of.
pub(crate) fn tail(wal: &Path) -> Tail {
    for _ in 0..TRIES {
        let Ok(mut file) = snaptree_files::open(wal, File::options().read(true)) else { return Tail::Whole };
        let read = read(&file);
        let again = header(&mut file);
        match (read, again) {
            (Some((header, tail)), Some(again)) if header == again => return tail,
            (None, _) => return Tail::Whole,
            // It started over meanwhile.
            _ => {}
        }
    }
    Tail::Whole
}

fn header(file: &mut File) -> Option<[u8; HEADER_BYTES]> {
    let mut header = [0; HEADER_BYTES];
    file.seek(SeekFrom::Start(0)).ok()?;
    file.read_exact(&mut header).ok()?;
    Some(header)
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// The two running sums of SQLite.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Sum {
    big_endian: bool,
    sums: (u32, u32),
}

impl Sum {
    fn add(&mut self, bytes: &[u8]) {
        for pair in bytes.chunks_exact(8) {
            let value = |half: &[u8]| {
                let half: [u8; 4] = half.try_into().unwrap_or_default();
                if self.big_endian { u32::from_be_bytes(half) } else { u32::from_le_bytes(half) }
            };
            let (first, second) = pair.split_at(4);
            self.sums.0 = self.sums.0.wrapping_add(value(first)).wrapping_add(self.sums.1);
            self.sums.1 = self.sums.1.wrapping_add(value(second)).wrapping_add(self.sums.0);
        }
    }
}

fn read(file: &File) -> Option<([u8; HEADER_BYTES], Tail)> {
    let mut file = BufReader::new(file);
    let mut header = [0; HEADER_BYTES];
    file.read_exact(&mut header).ok()?;
    let (magic, page_bytes) = (word(&header, 0)?, word(&header, 8)?);
    if magic & !1 != MAGIC || page_bytes > PAGE_BYTES_MAX {
        return None;
    }
    let mut sum = Sum { big_endian: magic & 1 == 1, sums: (0, 0) };
    sum.add(&header[..24]);
    let mut bad = ((word(&header, 24)?, word(&header, 28)?) != sum.sums).then_some(1);
    let salts = header.get(16..24)?;
    let mut frame = vec![0; FRAME_BYTES + usize::try_from(page_bytes).ok()?];
    let (mut number, mut commits) = (0_u64, 0_u64);
    while file.read_exact(&mut frame).is_ok() {
        number += 1;
        // Of an earlier round, which this one has not come to yet.
        if frame.get(8..16)? != salts {
            if bad.is_none() {
                break;
            }
            continue;
        }
        if bad.is_none() {
            sum.add(frame.get(..8)?);
            sum.add(frame.get(FRAME_BYTES..)?);
            if (word(&frame, 16)?, word(&frame, 20)?) != sum.sums {
                bad = Some(number);
            }
        }
        if bad.is_some() && word(&frame, 4)? != 0 {
            commits += 1;
        }
    }
    let tail = match bad {
        Some(frame) if commits > 0 => Tail::BrokenOff { frame, commits },
        _ => Tail::Whole,
    };
    Some((header, tail))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test")]

    use rusqlite::Connection;

    use super::*;

    #[test]
    fn a_log_that_breaks_off_is_told_from_a_whole_one() {
        let dir = tempfile::tempdir().unwrap();
        let connection = Connection::open(dir.path().join("x.db")).unwrap();
        connection.pragma_update(None, "journal_mode", "WAL").unwrap();
        connection.execute_batch("CREATE TABLE t (x)").unwrap();
        let wal = dir.path().join("x.db-wal");
        let write = |count: u8| {
            (0..count).for_each(|_| connection.execute_batch("INSERT INTO t VALUES (1)").unwrap())
        };
        write(5);
        assert_eq!(tail(&wal), Tail::Whole);
        let whole = std::fs::read(&wal).unwrap();
        let frame = FRAME_BYTES + 4096;
        // A bit of the third frame from the end: it and what follows are lost.
        let mut damaged = whole.clone();
        let at = damaged.len() - 3 * frame + 100;
        damaged[at] ^= 1;
        std::fs::write(&wal, &damaged).unwrap();
        let number = ((at - HEADER_BYTES) / frame + 1) as u64;
        assert_eq!(tail(&wal), Tail::BrokenOff { frame: number, commits: 3 });
        // One that ends within a frame was being written.
        std::fs::write(&wal, &whole[..whole.len() - 100]).unwrap();
        assert_eq!(tail(&wal), Tail::Whole);
        // One that started over has frames of the round before behind its end.
        std::fs::write(&wal, &whole).unwrap();
        connection.query_row("PRAGMA wal_checkpoint(RESTART)", [], |_| Ok(())).unwrap();
        write(1);
        assert_eq!(std::fs::metadata(&wal).unwrap().len(), whole.len() as u64);
        assert_eq!(tail(&wal), Tail::Whole);
    }
}
