//! Printing a snapshot as `virsh snapshot-dumpxml` does.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::is_xml_char;
use crate::domain::Domain;
use crate::event::MemoryKind;
use crate::ids::DiskName;
use crate::tree::Snapshot;

/// Where a text is to stand.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Element,
    Attribute,
}

/// The snapshot as libvirt's `<domainsnapshot>`, in the order and the layout of libvirt's formatter
/// (`virDomainSnapshotDefFormat`), with the short form of `<domain>`.
///
/// `files` names, by disk, the layer file that the snapshot's content is in. Three things differ from libvirt:
/// - libvirt's `<source>` is the overlay that was put on top when the snapshot was taken, thus a file that does
///   *not* hold the snapshot; here it is the file that does. It stays true however often the machine is reverted.
/// - External memory has no `file`: Snaptree chooses it, and it is no part of the snapshot's identity.
/// - A character that XML 1.0 cannot carry is printed as U+FFFD, where libvirt drops it: that a text is not what was
///   written should be seen. Line breaks and tabs in attributes, and carriage returns anywhere, are printed as
///   character references, so that they read back; libvirt prints them bare, and reads them back changed.
pub fn write(
    snapshot: &Snapshot,
    parent: Option<&Snapshot>,
    domain: &Domain,
    files: &BTreeMap<DiskName, PathBuf>,
) -> String {
    let mut out = String::from("<domainsnapshot>\n");
    element(&mut out, 2, "name", snapshot.name.as_str());
    if let Some(description) = snapshot.description.as_deref().filter(|text| !text.is_empty()) {
        element(&mut out, 2, "description", description);
    }
    element(&mut out, 2, "state", snapshot.state.as_str());
    if let Some(parent) = parent {
        out.push_str("  <parent>\n");
        element(&mut out, 4, "name", parent.name.as_str());
        out.push_str("  </parent>\n");
    }
    element(&mut out, 2, "creationTime", &snapshot.created.as_second().to_string());
    let memory = match snapshot.memory {
        MemoryKind::No => "no",
        MemoryKind::Internal => "internal",
        MemoryKind::External => "external",
    };
    out.push_str(&format!("  <memory snapshot='{memory}'/>\n"));
    disks(&mut out, snapshot, domain, files);
    out.push_str("  <domain>\n");
    element(&mut out, 4, "uuid", &domain.id.to_string());
    out.push_str("  </domain>\n</domainsnapshot>\n");
    out
}

/// All disks of the domain in its order, then those that the snapshot holds and the domain no longer has.
fn disks(out: &mut String, snapshot: &Snapshot, domain: &Domain, files: &BTreeMap<DiskName, PathBuf>) {
    let gone = snapshot.disks.iter().filter(|name| domain.disks.iter().all(|disk| disk.name != **name));
    let names: Vec<&DiskName> = domain.disks.iter().map(|disk| &disk.name).chain(gone).collect();
    if names.is_empty() {
        return;
    }
    out.push_str("  <disks>\n");
    for name in names {
        if !snapshot.disks.contains(name) {
            out.push_str(&format!("    <disk name='{name}' snapshot='no'/>\n"));
        } else if is_inside(snapshot, domain, files) {
            out.push_str(&format!("    <disk name='{name}' snapshot='internal'/>\n"));
        } else {
            external(out, name, files.get(name).map(PathBuf::as_path));
        }
    }
    out.push_str("  </disks>\n");
}

/// Memory inside an image means the disks are too, as libvirt knows no mixture; and where a driver has both kinds, a
/// snapshot that no file stands for is inside the images.
fn is_inside(snapshot: &Snapshot, domain: &Domain, files: &BTreeMap<DiskName, PathBuf>) -> bool {
    let can = &domain.capabilities;
    snapshot.memory == MemoryKind::Internal || (can.internal && !can.merges_itself && files.is_empty())
}

fn external(out: &mut String, name: &DiskName, file: Option<&Path>) {
    let Some(file) = file else {
        out.push_str(&format!("    <disk name='{name}' snapshot='external'/>\n"));
        return;
    };
    out.push_str(&format!("    <disk name='{name}' snapshot='external' type='file'>\n"));
    out.push_str("      <driver type='qcow2'/>\n      <source file='");
    escape(out, &file.to_string_lossy(), Place::Attribute);
    out.push_str("'/>\n    </disk>\n");
}

fn element(out: &mut String, indent: usize, name: &str, text: &str) {
    out.push_str(&format!("{:indent$}<{name}>", ""));
    escape(out, text, Place::Element);
    out.push_str(&format!("</{name}>\n"));
}

fn escape(out: &mut String, text: &str, place: Place) {
    for c in text.chars() {
        match c {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '\'' => out.push_str("&apos;"),
            '"' => out.push_str("&quot;"),
            '\r' => out.push_str("&#xD;"),
            '\n' if place == Place::Attribute => out.push_str("&#xA;"),
            '\t' if place == Place::Attribute => out.push_str("&#x9;"),
            c if is_xml_char(c) => out.push(c),
            _ => out.push(char::REPLACEMENT_CHARACTER),
        }
    }
}
