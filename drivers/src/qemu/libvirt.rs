//! What libvirt tells of a machine that it runs as well: overlays that it put elsewhere, and its own monitor.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Component, Path, PathBuf};

use snaptree_engine::operation::{Code, Failure};

/// Where libvirt keeps a description of every snapshot that it made, with the machine as it was and the files that it
/// made for it: `<domain>/<snapshot>.xml`.
const SNAPSHOTS: &str = "/var/lib/libvirt/qemu/snapshot";
/// Most descriptions that are read, and the largest, in bytes.
const FILES_MAX: usize = 2_048;
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The images that libvirt names together with one of these in a snapshot's description. Nothing where it has none, or
/// we may not read them.
pub(super) fn images_beside(registered: &[&Path]) -> BTreeSet<PathBuf> {
    images_in(Path::new(SNAPSHOTS), registered)
}

fn images_in(folder: &Path, registered: &[&Path]) -> BTreeSet<PathBuf> {
    let entries = |folder: PathBuf| fs::read_dir(folder).into_iter().flatten().flatten();
    let domains = entries(folder.to_path_buf()).map(|entry| entry.path());
    let files = domains.flat_map(|domain| entries(domain).map(|entry| entry.path()));
    let mut found = BTreeSet::new();
    for file in files.filter(|file| file.extension().is_some_and(|end| end == "xml")).take(FILES_MAX) {
        let images = read(&file).map(|text| sources(&text)).unwrap_or_default();
        if images.iter().any(|image| registered.contains(&image.as_path())) {
            found.extend(images.into_iter().filter(|image| !registered.contains(&image.as_path())));
        }
    }
    found
}

fn read(path: &Path) -> Option<String> {
    let file = super::files::open_image(path).ok()?;
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut text = String::new();
    <File as std::io::Read>::take(file, FILE_BYTES_MAX).read_to_string(&mut text).ok()?;
    Some(text)
}

/// What every `<source file='...'>` of a document names, if it is an absolute path.
fn sources(text: &str) -> BTreeSet<PathBuf> {
    let elements = text.split("<source ").skip(1).filter_map(|rest| rest.split_once('>')).map(|(tag, _)| tag);
    let file = |tag: &str| {
        let (_, rest) = tag.split_once("file=")?;
        let quote = rest.chars().next().filter(|quote| matches!(quote, '\'' | '"'))?;
        let (name, _) = rest.get(1..)?.split_once(quote)?;
        let name = name.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", "\"");
        Some(PathBuf::from(name.replace("&apos;", "'").replace("&amp;", "&")))
            .filter(|path| path.is_absolute())
    };
    elements.filter_map(file).collect()
}

/// Refuses the monitor that libvirt itself talks to its QEMU by: it takes one client at a time, and what is done behind
/// libvirt's back there it does not learn.
pub(super) fn check_monitor(socket: &Path) -> Result<(), Failure> {
    let resolved = fs::canonicalize(socket).unwrap_or_else(|_| socket.to_path_buf());
    if !is_monitor(socket) && !is_monitor(&resolved) {
        return Ok(());
    }
    let message =
        format!("{} is libvirt's own monitor of the machine, which takes no second client", socket.display());
    Err(Failure::new(Code::Unsupported, message).refused().hint(
        "leave out --qmp and shut the machine down for snapshots (--start 'virsh start NAME' --stop 'virsh shutdown \
         NAME'), or give it a monitor of its own: virsh edit, <qemu:arg value='-qmp'/> \
         <qemu:arg value='unix:SOCKET,server=on,wait=off'/>",
    ))
}

/// `…/libvirt/…/domain-<number>-<name>/monitor.sock`, of the system's and of a user's libvirt.
fn is_monitor(socket: &Path) -> bool {
    let has = |test: &dyn Fn(&str) -> bool| {
        socket
            .components()
            .any(|part| matches!(part, Component::Normal(name) if name.to_str().is_some_and(test)))
    };
    socket.file_name().is_some_and(|name| name == "monitor.sock")
        && has(&|name| name == "libvirt")
        && has(&|name| name == "qemu" || name.starts_with("domain-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_libvirt_made_elsewhere_for_a_machine_of_ours_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let write = |domain: &str, text: &str| {
            fs::create_dir_all(folder.path().join(domain)).unwrap();
            fs::write(folder.path().join(domain).join("L1.xml"), text).unwrap();
        };
        write(
            "web",
            "<domainsnapshot><disks><disk name='vda'><source file='/other/a&amp;b.L1'/></disk></disks>\
             <domain><disk><source file=\"/vm/vda.qcow2\" index='1'/></disk></domain></domainsnapshot>",
        );
        write("db", "<disk><source file='/other/db.L1'/></disk><disk><source file='/vm/db.qcow2'/></disk>");
        let found = images_in(folder.path(), &[Path::new("/vm/vda.qcow2")]);
        assert_eq!(found, BTreeSet::from([PathBuf::from("/other/a&b.L1")]));
        assert!(images_in(Path::new("/nonexistent"), &[Path::new("/vm/vda.qcow2")]).is_empty());
    }

    #[test]
    fn libvirts_monitor_is_known_by_its_place() {
        for (socket, expected) in [
            ("/var/lib/libvirt/qemu/domain-1-web/monitor.sock", true),
            ("/run/user/1000/libvirt/qemu/run/domain-3-x/monitor.sock", true),
            ("/home/u/.config/libvirt/qemu/lib/domain-3-x/monitor.sock", true),
            ("/var/lib/libvirt/qemu/domain-1-web/second.sock", false),
            ("/run/web/monitor.sock", false),
        ] {
            assert_eq!(is_monitor(Path::new(socket)), expected, "{socket}");
        }
    }
}
