//! A machine's disks, by its settings: which there are, and which of them snapshots leave out.
//!
//! What VirtualBox does with an image is said of the lowest one of its chain. Seen of VirtualBox 7.2: a snapshot makes no
//! image upon a write-through or shareable one, so it holds nothing of it and a restore leaves it as it is; upon an
//! immutable one it does, and the start of the machine empties what lies upon it.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use snaptree_engine::domain::Disk;
use uuid::Uuid;

use super::settings::{Kind, Settings, Snap};
use crate::disks::{ListedDisk, named};

/// Where a VDI of version 1.1 says how large its disk is (VirtualBox, VDICore.h), and what its header begins with behind
/// the text.
const SIGNATURE: (u64, u32) = (0x40, 0xbeda_107f);
const DISK_SIZE: u64 = 0x170;

/// The disks of the machine as it is; `known` are those that it had.
pub(super) fn disks(known: &[Disk], settings: &Settings) -> Vec<Disk> {
    let listed = settings.images.iter().map(|(place, image)| ListedDisk {
        place: place.clone(),
        size_bytes: settings.media.get(image).and_then(|medium| size_bytes(&medium.file)),
        left_out: left_out(settings, *image),
    });
    named(known, listed.collect())
}

/// What a restore of `snap` detaches, in words.
pub(super) fn detached(disks: &[Disk], settings: &Settings, snap: &Snap) -> Vec<String> {
    let gone = settings.images.iter().filter(|(place, _)| !snap.images.contains_key(*place));
    let words = |(place, image): (&String, &Uuid)| {
        let name = disks.iter().find(|disk| disk.place.as_ref() == Some(place)).map(|disk| &disk.name);
        let name = name.map_or_else(|| place.clone(), ToString::to_string);
        let medium = base(settings, *image).and_then(|base| settings.media.get(&base));
        let file = medium.map(|medium| medium.file.display().to_string());
        let file = file.map(|file| format!(" ({file})")).unwrap_or_default();
        format!("disk '{name}'{file}, which the snapshot does not have: it is detached from the machine")
    };
    gone.map(words).collect()
}

/// The lowest image of a chain, if all of it is known.
fn base(settings: &Settings, image: Uuid) -> Option<Uuid> {
    let mut below = settings.media.get(&image).map(|medium| (image, medium))?;
    // Ends at a loop.
    for _ in 0..settings.media.len() {
        let Some(parent) = below.1.parent else { return Some(below.0) };
        below = (parent, settings.media.get(&parent)?);
    }
    None
}

fn left_out(settings: &Settings, image: Uuid) -> Option<String> {
    let base = base(settings, image)?;
    let word = match settings.media.get(&base)?.kind {
        Kind::Normal => return None,
        Kind::Writethrough => "write-through",
        Kind::Shareable => "shareable",
        Kind::Readonly => "read-only",
        Kind::Immutable => "immutable, so what was written to it is dropped when the machine starts",
    };
    Some(word.to_owned())
}

/// The size of an image's disk; none for what is no VDI.
fn size_bytes(file: &Path) -> Option<u64> {
    let opened = File::open(file).ok()?;
    let (mut signature, mut size) = ([0; 4], [0; 8]);
    opened.read_exact_at(&mut signature, SIGNATURE.0).ok()?;
    opened.read_exact_at(&mut size, DISK_SIZE).ok()?;
    (u32::from_le_bytes(signature) == SIGNATURE.1).then(|| u64::from_le_bytes(size))
}
