//! Images of the format VDI, read and written without VirtualBox.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use uuid::Uuid;

/// Bytes of a VDI's block.
const BLOCK_BYTES: usize = 1 << 20;
const PAGE_BYTES: usize = 4 << 10;
/// Nothing of a block was ever written.
const UNUSED: u32 = 0xffff_fffe;

/// A VDI's header and table of blocks (VirtualBox, VDICore.h, version 1.1).
pub(super) struct Vdi {
    head: Vec<u8>,
    table: Vec<u32>,
}

impl Vdi {
    pub(super) fn open(file: &Path) -> Self {
        Self::read(file).unwrap_or_else(|| panic!("{} is no VDI", file.display()))
    }

    /// None if it is no whole VDI: one that was being made when VirtualBox was killed.
    pub(super) fn read(file: &Path) -> Option<Self> {
        let opened = File::open(file).ok()?;
        let mut head = vec![0; 512];
        opened.read_exact_at(&mut head, 0).ok()?;
        let mut vdi = Self { head, table: Vec::new() };
        if vdi.get(0x40) != 0xbeda_107f || vdi.get(0x178) as usize != BLOCK_BYTES {
            return None;
        }
        let mut table = vec![0; 4 * vdi.get(0x180) as usize];
        opened.read_exact_at(&mut table, u64::from(vdi.get(0x154))).ok()?;
        vdi.table =
            table.chunks(4).map(|entry| u32::from_le_bytes(entry.try_into().expect("four"))).collect();
        Some(vdi)
    }

    fn get(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.head[at..at + 4].try_into().expect("four bytes"))
    }

    /// Its own id.
    pub(super) fn own(&self) -> String {
        self.id(0x188)
    }

    /// The id of the image that it is built upon.
    pub(super) fn parent(&self) -> String {
        self.id(0x1a8)
    }

    fn id(&self, at: usize) -> String {
        Uuid::from_bytes_le(self.head[at..at + 16].try_into().expect("sixteen bytes")).to_string()
    }

    /// Writes a block, so that it reads as nothing else but the same seed makes it.
    pub(super) fn write(&mut self, file: &Path, block: usize, seed: u64) {
        let opened = OpenOptions::new().write(true).open(file).expect("an image");
        let mut allocated = self.get(0x184);
        if self.table[block] >= UNUSED {
            self.table[block] = allocated;
            allocated += 1;
        }
        let at = u64::from(self.get(0x158)) + u64::from(self.table[block]) * BLOCK_BYTES as u64;
        // Pages alike but for their first bytes: this is written a thousand times.
        let word = |word: usize| (seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ word as u64).to_le_bytes();
        let page: Vec<u8> = (0..PAGE_BYTES / 8).flat_map(word).collect();
        let mut data = page.repeat(BLOCK_BYTES / PAGE_BYTES);
        data.chunks_mut(PAGE_BYTES)
            .enumerate()
            .for_each(|(index, page)| page[..8].copy_from_slice(&word(!index)));
        opened.write_all_at(&data, at).expect("written");
        let table: Vec<u8> = self.table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        opened.write_all_at(&table, u64::from(self.get(0x154))).expect("written");
        opened.write_all_at(&allocated.to_le_bytes(), 0x184).expect("written");
        self.head[0x184..0x188].copy_from_slice(&allocated.to_le_bytes());
    }
}

/// What an image reads as, down its chain. Blocks of zeros count as those that were never written.
pub(super) fn sha256(images: &BTreeMap<String, PathBuf>, image: &str) -> String {
    let mut chain = Vec::new();
    let mut next = image.to_owned();
    while let Some(file) = images.get(&next) {
        let vdi = Vdi::open(file);
        next = vdi.parent();
        chain.push((File::open(file).expect("an image"), vdi));
        assert!(chain.len() < 1_000, "a loop");
    }
    assert!(next == Uuid::nil().to_string(), "image {next} below {image} is missing");
    let mut hasher = Sha256::new();
    let mut data = vec![0; BLOCK_BYTES];
    for block in 0..chain.first().expect("an image").1.table.len() {
        let held = chain.iter().find(|(_, vdi)| vdi.table.get(block).is_some_and(|entry| *entry != u32::MAX));
        let Some((file, vdi)) = held.filter(|(_, vdi)| vdi.table[block] < UNUSED) else { continue };
        let at = u64::from(vdi.get(0x158)) + u64::from(vdi.table[block]) * BLOCK_BYTES as u64;
        file.read_exact_at(&mut data, at).expect("a block");
        if data.iter().any(|byte| *byte != 0) {
            hasher.update((block as u64).to_le_bytes());
            hasher.update(&data);
        }
    }
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
