//! What the elements of a `<domainsnapshot>` say, and whether they may.

use jiff::Timestamp;

use super::{
    DESCRIPTION_BYTES_MAX, DISKS_MAX, DiskMode, DiskXml, MemoryXml, PATH_BYTES_MAX, SnapshotXml, SourceKind,
    StateXml, XmlError, shown,
};
use crate::ids::{NAME_BYTES_MAX, SnapshotName};

/// Image formats that libvirt knows by name (`virStorageFileFormat`).
const FORMATS: [&str; 16] = [
    "raw", "dir", "bochs", "cloop", "dmg", "iso", "vpc", "vdi", "fat", "vhd", "ploop", "cow", "qcow",
    "qcow2", "qed", "vmdk",
];

/// An element's attributes, in its order.
pub(super) type Attributes = Vec<(String, String)>;

/// The elements whose attributes are wanted.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Memory,
    Disk,
    Source,
    Driver,
}

/// The elements whose text is wanted.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Field {
    Name,
    Description,
    CreationTime,
    CreationDate,
    State,
    ParentName,
    Uuid,
}

/// The value of an attribute.
pub(super) fn value<'a>(attributes: &'a [(String, String)], name: &str) -> Option<&'a str> {
    attributes.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
}

/// What was found, in the document's words. `None` is not seen yet; the first one seen stays.
#[derive(Default)]
pub(super) struct Found {
    name: Option<String>,
    description: Option<String>,
    creation_time: Option<String>,
    creation_date: Option<String>,
    state: Option<String>,
    parent: Option<String>,
    uuid: Option<String>,
    /// `snapshot` and `file`.
    memory: Option<(Option<String>, Option<String>)>,
    disks: Vec<FoundDisk>,
}

#[derive(Default)]
struct FoundDisk {
    name: Option<String>,
    snapshot: Option<String>,
    kind: Option<String>,
    /// All attributes of `<source>`: which one counts hangs on the kind.
    source: Option<Attributes>,
    driver: Option<String>,
}

impl Found {
    /// Takes the attributes of an element.
    pub(super) fn attributes(&mut self, role: Role, attributes: Attributes) -> Result<(), XmlError> {
        let owned = |name| value(&attributes, name).map(str::to_owned);
        match role {
            Role::Memory => {
                self.memory.get_or_insert_with(|| (owned("snapshot"), owned("file")));
            }
            Role::Disk if self.disks.len() >= DISKS_MAX => {
                return Err(XmlError::TooLarge { what: "list of disks", max: DISKS_MAX, unit: "disks" });
            }
            Role::Disk => {
                let (name, snapshot, kind) = (owned("name"), owned("snapshot"), owned("type"));
                self.disks.push(FoundDisk { name, snapshot, kind, ..FoundDisk::default() });
            }
            Role::Source => {
                if let Some(disk) = self.disks.last_mut() {
                    disk.source.get_or_insert(attributes);
                }
            }
            Role::Driver => {
                if let Some(disk) = self.disks.last_mut() {
                    disk.driver = disk.driver.take().or_else(|| owned("type"));
                }
            }
        }
        Ok(())
    }

    /// Takes the whole text of an element.
    pub(super) fn text(&mut self, field: Field, text: String) {
        let slot = match field {
            Field::Name => &mut self.name,
            Field::Description => &mut self.description,
            Field::CreationTime => &mut self.creation_time,
            Field::CreationDate => &mut self.creation_date,
            Field::State => &mut self.state,
            Field::ParentName => &mut self.parent,
            Field::Uuid => &mut self.uuid,
        };
        slot.get_or_insert(text);
    }

    /// Checks it all.
    pub(super) fn finish(self) -> Result<SnapshotXml, XmlError> {
        let given = |text: Option<String>| text.filter(|text| !text.is_empty());
        let description = given(self.description);
        limit("description", description.as_deref(), DESCRIPTION_BYTES_MAX)?;
        let parent = given(self.parent);
        limit("parent's name", parent.as_deref(), NAME_BYTES_MAX)?;
        Ok(SnapshotXml {
            name: given(self.name).map(SnapshotName::new).transpose().map_err(XmlError::Name)?,
            description,
            creation_time: given(self.creation_time)
                .or(given(self.creation_date))
                .map(|text| creation_time(&text))
                .transpose()?,
            state: given(self.state).map(|text| state(&text)).transpose()?,
            parent,
            domain_uuid: given(self.uuid)
                .map(|text| text.trim().parse().map_err(|_| XmlError::Uuid(shown(&text))))
                .transpose()?,
            memory: self.memory.map_or(Ok(None), |(mode, file)| memory(mode.as_deref(), file))?,
            disks: self.disks.into_iter().map(FoundDisk::finish).collect::<Result<_, _>>()?,
        })
    }
}

fn limit(what: &'static str, text: Option<&str>, max: usize) -> Result<(), XmlError> {
    match text {
        Some(text) if text.len() > max => Err(XmlError::TooLarge { what, max, unit: "bytes" }),
        _ => Ok(()),
    }
}

/// Seconds since the epoch, with blanks before them but not behind, as C's `strtoll` takes them.
fn creation_time(text: &str) -> Result<Timestamp, XmlError> {
    let seconds: Option<i64> = text.trim_start().parse().ok();
    let time = seconds.and_then(|seconds| Timestamp::from_second(seconds).ok());
    time.ok_or_else(|| XmlError::CreationTime(shown(text)))
}

fn state(text: &str) -> Result<StateXml, XmlError> {
    match text {
        "running" => Ok(StateXml::Running),
        "blocked" => Ok(StateXml::Blocked),
        "paused" => Ok(StateXml::Paused),
        "shutdown" => Ok(StateXml::Shutdown),
        "shutoff" => Ok(StateXml::Shutoff),
        "crashed" => Ok(StateXml::Crashed),
        "disk-snapshot" => Ok(StateXml::DiskSnapshot),
        other => Err(XmlError::State(shown(other))),
    }
}

fn mode(element: &'static str, text: &str) -> Result<DiskMode, XmlError> {
    match text {
        "no" => Ok(DiskMode::No),
        "internal" => Ok(DiskMode::Internal),
        "external" => Ok(DiskMode::External),
        "manual" => Ok(DiskMode::Manual),
        other => Err(XmlError::Attribute { element, attribute: "snapshot", value: shown(other) }),
    }
}

fn memory(snapshot: Option<&str>, file: Option<String>) -> Result<Option<MemoryXml>, XmlError> {
    limit("memory file's path", file.as_deref(), PATH_BYTES_MAX)?;
    let mode = snapshot.map(|text| mode("memory", text)).transpose()?;
    match (mode, file) {
        (Some(DiskMode::Manual), _) => Err(XmlError::ManualMemory),
        (Some(DiskMode::No | DiskMode::Internal), Some(file)) => Err(XmlError::MemoryFileMode(shown(&file))),
        (Some(DiskMode::External) | None, Some(file)) if !file.starts_with('/') => {
            Err(XmlError::MemoryFileRelative(shown(&file)))
        }
        (Some(DiskMode::No), None) => Ok(Some(MemoryXml::No)),
        (Some(DiskMode::Internal), None) => Ok(Some(MemoryXml::Internal)),
        (Some(DiskMode::External), file) | (None, file @ Some(_)) => Ok(Some(MemoryXml::External { file })),
        (None, None) => Ok(None),
    }
}

impl FoundDisk {
    fn finish(self) -> Result<DiskXml, XmlError> {
        let name = self.name.ok_or(XmlError::DiskName)?;
        limit("disk's name", Some(&name), PATH_BYTES_MAX)?;
        let given = self.snapshot.as_deref().map(|text| mode("disk", text)).transpose()?;
        let (kind, attribute) = match self.kind.as_deref() {
            None | Some("file") => (SourceKind::File, "file"),
            Some("block") => (SourceKind::Block, "dev"),
            Some("network") => (SourceKind::Network, "name"),
            Some(other) => return Err(XmlError::DiskType(shown(other))),
        };
        let source = self.source.and_then(|all| value(&all, attribute).map(str::to_owned));
        limit("source's path", source.as_deref(), PATH_BYTES_MAX)?;
        if let Some(driver) = self.driver.as_deref().filter(|driver| !FORMATS.contains(driver)) {
            return Err(XmlError::DiskDriver(shown(driver)));
        }
        if let Some(path) = source.as_deref().filter(|path| !path.starts_with('/'))
            && kind != SourceKind::Network
        {
            return Err(XmlError::DiskFileRelative(shown(path)));
        }
        let implied = (source.is_some() || self.driver.is_some()).then_some(DiskMode::External);
        Ok(DiskXml { name, snapshot: given.or(implied), kind, source, driver: self.driver })
    }
}
