//! The disks of a machine whose hypervisor lists them. Pure.

use std::collections::BTreeSet;

use snaptree_engine::DiskName;
use snaptree_engine::domain::Disk;

/// A disk, as a hypervisor lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedDisk {
    /// Where the machine has it; no two are in one place.
    pub place: String,
    /// What the guest sees as its size; none where that cannot be told.
    pub size_bytes: Option<u64>,
    /// Why it is no part of snapshots.
    pub left_out: Option<String>,
}

/// The disks with names: one that was known in its place keeps its name, another one gets the next that is free.
///
/// Disks that were registered before places were kept are taken to be in the order in which they are listed.
pub(crate) fn named(known: &[Disk], listed: Vec<ListedDisk>) -> Vec<Disk> {
    let by_order = known.iter().all(|disk| disk.place.is_none()) && known.len() == listed.len();
    let mut taken: BTreeSet<DiskName> = BTreeSet::new();
    let mut known_of = Vec::with_capacity(listed.len());
    for (index, one) in listed.iter().enumerate() {
        let known = known
            .iter()
            .enumerate()
            .find(|(order, disk)| disk.place.as_ref() == Some(&one.place) || (by_order && *order == index));
        let known = known.map(|(_, disk)| disk);
        taken.extend(known.map(|disk| disk.name.clone()));
        known_of.push(known);
    }
    let mut free = (0..).filter_map(|index| DiskName::new(disk_name(index)).ok());
    let mut disks = Vec::with_capacity(listed.len());
    for (one, known) in listed.into_iter().zip(known_of) {
        let name = known.map(|disk| disk.name.clone()).or_else(|| free.find(|name| !taken.contains(name)));
        let size = one.size_bytes.or(known.map(|disk| disk.virtual_size_bytes)).unwrap_or(0);
        disks.extend(name.map(|name| Disk {
            place: Some(one.place),
            left_out: one.left_out,
            ..Disk::new(name, None, size)
        }));
    }
    disks
}

/// What whoever registers a machine should know of its disks.
pub(crate) fn left_out_notes(disks: &[Disk]) -> Vec<String> {
    let note = |disk: &Disk| {
        Some(format!("disk '{}' is no part of snapshots ({})", disk.name, disk.left_out.as_ref()?))
    };
    disks.iter().filter_map(note).collect()
}

/// `sda` to `sdz`, `sdaa` and on, as libvirt names the disks of ESX machines.
fn disk_name(index: usize) -> String {
    let letters = b"abcdefghijklmnopqrstuvwxyz";
    let mut name = Vec::new();
    let mut left = index + 1;
    while left > 0 {
        name.push(char::from(letters[(left - 1) % letters.len()]));
        left = (left - 1) / letters.len();
    }
    name.push('d');
    name.push('s');
    name.iter().rev().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_named_as_libvirt_names_them() {
        let names: Vec<String> = [0, 1, 25, 26, 27, 701, 702].map(disk_name).into();
        assert_eq!(names, ["sda", "sdb", "sdz", "sdaa", "sdab", "sdzz", "sdaaa"]);
    }

    #[test]
    fn a_disk_keeps_its_name_while_it_keeps_its_place() {
        let listed = |places: &[&str]| -> Vec<ListedDisk> {
            let one =
                |place: &&str| ListedDisk { place: (*place).to_owned(), size_bytes: Some(1), left_out: None };
            places.iter().map(one).collect()
        };
        let names =
            |disks: &[Disk]| -> Vec<String> { disks.iter().map(|disk| disk.name.to_string()).collect() };
        let first = named(&[], listed(&["p0", "p2"]));
        assert_eq!(names(&first), ["sda", "sdb"]);
        let more = named(&first, listed(&["p0", "p1", "p2"]));
        assert_eq!(names(&more), ["sda", "sdc", "sdb"]);
        assert_eq!(names(&named(&more, listed(&["p1", "p2"]))), ["sdc", "sdb"]);
        // Registered before places were kept.
        let old: Vec<Disk> = first.iter().map(|disk| Disk { place: None, ..disk.clone() }).collect();
        assert_eq!(named(&old, listed(&["p0", "p2"])), first);
    }
}
