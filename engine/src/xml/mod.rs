//! libvirt's `<domainsnapshot>`, in and out.
//!
//! [`read`] takes the XML that `virsh snapshot-create` takes and `virsh snapshot-dumpxml` gives;
//! [`SnapshotXml::to_create`] makes a request of it; [`write()`] prints a snapshot as libvirt prints it. The rules and
//! the texts of refusals are those of libvirt's `snapshot_conf.c`, read and tried; each place where this module
//! differs says so and why.

mod read;
#[cfg(test)]
mod tests;
mod values;
mod write;

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;

use jiff::Timestamp;

use crate::command::{Content, Create};
use crate::domain::Disk;
use crate::event::Place;
use crate::ids::{DiskName, DomainId, NameError, SnapshotName};
use crate::tree::Labels;

pub use read::read;
pub use write::write;

/// Longest document in bytes: what libvirt accepts of a stored snapshot (`qemuDomainSnapshotLoad`).
pub const TEXT_BYTES_MAX: usize = 1 << 20;
/// Deepest nesting of elements; a full `<domain>` stays far below.
pub const DEPTH_MAX: usize = 64;
/// Most `<disk>` elements.
pub const DISKS_MAX: usize = 1024;
/// Most attributes of one element.
pub const ATTRIBUTES_MAX: usize = 256;
/// Longest description in bytes.
pub const DESCRIPTION_BYTES_MAX: usize = 64 << 10;
/// Longest path in bytes: Linux's `PATH_MAX`. `disk/@name` may be one.
pub const PATH_BYTES_MAX: usize = 4096;

/// A place in a document. A byte order mark is not counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// Bytes before it.
    pub byte: usize,
    /// Its line, from 1.
    pub line: usize,
    /// Its column in characters, from 1.
    pub column: usize,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}, column {} (byte {})", self.line, self.column, self.byte)
    }
}

/// Why a `<domainsnapshot>` was refused. Where libvirt has a text for it, it is libvirt's, without the
/// `XML error: ` that virsh puts before it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum XmlError {
    /// It is not well-formed XML, or has what is refused unread: a DTD, an entity that XML does not define.
    #[error("{at}: {problem}")]
    Malformed {
        /// Where.
        at: Position,
        /// What is wrong there.
        problem: String,
    },
    /// Another kind of document. A root in a namespace is one too: libvirt takes it and then finds none of its
    /// elements, so that the name and the disks that were asked for would be lost without a word.
    #[error("{at}: expecting root element of 'domainsnapshot', not {found}")]
    Root {
        /// Where.
        at: Position,
        /// What is there.
        found: String,
    },
    /// More than we accept.
    #[error("the {what} is too large: at most {max} {unit} are accepted")]
    TooLarge {
        /// What.
        what: &'static str,
        /// How much would do.
        max: usize,
        /// Of what.
        unit: &'static str,
    },
    /// The snapshot's name breaks a rule for names.
    #[error("{0}")]
    Name(#[source] NameError),
    /// An attribute has a value that it cannot have.
    #[error("Invalid value for attribute '{attribute}' in element '{element}': '{value}'")]
    Attribute {
        /// The element.
        element: &'static str,
        /// The attribute.
        attribute: &'static str,
        /// The value.
        value: String,
    },
    /// No state of a snapshot.
    #[error("Invalid state '{0}' in domain snapshot XML")]
    State(String),
    /// No number of seconds since the epoch, or one beyond the year 9999.
    #[error("Invalid creationTime '{0}' in domain snapshot XML")]
    CreationTime(String),
    /// `domain/uuid` is no UUID.
    #[error("malformed uuid element '{0}'")]
    Uuid(String),
    /// libvirt knows `manual` for disks alone.
    #[error("'manual' memory snapshot mode not supported")]
    ManualMemory,
    /// A memory file, and a mode that has none.
    #[error("memory filename '{0}' requires external snapshot")]
    MemoryFileMode(String),
    /// The memory file's path is relative.
    #[error("memory snapshot file path ({0}) must be absolute")]
    MemoryFileRelative(String),
    /// A `<disk>` without `name`.
    #[error("missing name from disk snapshot element")]
    DiskName,
    /// A kind of source that snapshots cannot have.
    #[error("unsupported disk snapshot type '{0}'")]
    DiskType(String),
    /// No image format.
    #[error("unknown disk snapshot driver '{0}'")]
    DiskDriver(String),
    /// A disk's file has a relative path.
    #[error("disk snapshot image path '{0}' must be absolute")]
    DiskFileRelative(String),
    /// More `<disk>` elements than the domain has disks.
    #[error("too many disk snapshot requests for domain")]
    TooManyDisks,
    /// The domain has no such disk.
    #[error("no disk named '{0}'")]
    NoDisk(String),
    /// Two `<disk>` elements are about the same disk.
    #[error("disk '{0}' specified twice")]
    DiskTwice(DiskName),
    /// A file was named for a disk that gets none.
    #[error("file '{file}' for disk '{disk}' requires use of external snapshot mode")]
    DiskFileMode {
        /// The file.
        file: String,
        /// The disk.
        disk: DiskName,
    },
    /// Every disk was excluded.
    #[error("nothing selected for snapshot")]
    NothingSelected,
    /// libvirt knows it; Snaptree's create does not offer it.
    #[error("unsupported configuration: {0}")]
    Unsupported(String),
}

/// libvirt's states of a snapshot, as its schema (`domainsnapshot.rng`) has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StateXml {
    /// `running`
    Running,
    /// `blocked`
    Blocked,
    /// `paused`
    Paused,
    /// `shutdown`: shutting down.
    Shutdown,
    /// `shutoff`
    Shutoff,
    /// `crashed`
    Crashed,
    /// `disk-snapshot`
    DiskSnapshot,
}

/// `<memory>`: whether and where the memory is kept.
///
/// libvirt demands a file of an external one; here it may be left out, as Snaptree chooses the file itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemoryXml {
    /// `snapshot='no'`
    No,
    /// `snapshot='internal'`
    Internal,
    /// `snapshot='external'`, or a file alone.
    External {
        /// `file`: an absolute path.
        file: Option<String>,
    },
}

/// `disk/@snapshot`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DiskMode {
    /// The disk is left out.
    No,
    /// Inside the image.
    Internal,
    /// The image is frozen, and another put on top.
    External,
    /// Someone else takes care of the disk.
    Manual,
}

/// `disk/@type`: what a disk's `<source>` names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum SourceKind {
    /// A file, in `source/@file`.
    #[default]
    File,
    /// A block device, in `source/@dev`.
    Block,
    /// A network disk, in `source/@name`.
    Network,
}

/// One `<disk>` in `<disks>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskXml {
    /// The disk's target name or its source path.
    pub name: String,
    /// What is to become of it. A source or a format without a mode means external, as in libvirt.
    pub snapshot: Option<DiskMode>,
    /// What `source` is.
    pub kind: SourceKind,
    /// What `<source>` names.
    pub source: Option<String>,
    /// `driver/@type`: the image format.
    pub driver: Option<String>,
}

/// What a `<domainsnapshot>` says. `<domain>` but for its UUID, `<inactiveDomain>`, `<cookie>`, `<revertDisks>`
/// and whatever else stands there was checked to be XML, and skipped.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotXml {
    /// `name`
    pub name: Option<SnapshotName>,
    /// `description`
    pub description: Option<String>,
    /// `creationTime`, or `creationdate`, as it was called at first.
    pub creation_time: Option<Timestamp>,
    /// `state`
    pub state: Option<StateXml>,
    /// `parent/name`, unchecked: it is only compared with names.
    pub parent: Option<String>,
    /// `domain/uuid`
    pub domain_uuid: Option<DomainId>,
    /// `memory`
    pub memory: Option<MemoryXml>,
    /// `disks/disk`
    pub disks: Vec<DiskXml>,
}

impl SnapshotXml {
    /// The request for a snapshot that this document makes of a domain with those disks.
    ///
    /// State, parent, creation time and domain are ignored, as libvirt does on a plain create. Disks that are not
    /// listed are included (`virDomainSnapshotAlignDisks`, whose order of checks this keeps).
    ///
    /// # Errors
    /// A disk that the domain does not have or that is listed twice, more entries than disks, no disk left, a file
    /// for a disk that gets none; and [`XmlError::Unsupported`] for what libvirt can and Snaptree cannot: manual disk
    /// snapshots, and file names, formats and devices other than Snaptree's choice.
    pub fn to_create(&self, disks_of_domain: &[Disk]) -> Result<Create, XmlError> {
        Ok(Create {
            name: self.name.clone(),
            description: self.description.clone(),
            labels: Labels::new(),
            content: self.content()?,
            place: self.place()?,
            disks: self.selection(disks_of_domain)?,
            quiesce: false,
        })
    }

    /// Inside the images, if the document says so of any disk.
    fn place(&self) -> Result<Place, XmlError> {
        let asked = |mode| self.disks.iter().any(|disk| disk.snapshot == Some(mode));
        match (asked(DiskMode::Internal), asked(DiskMode::External)) {
            (true, true) => Err(XmlError::Unsupported(
                "mixing internal and external targets for a snapshot is not yet supported".to_owned(),
            )),
            (true, false) if matches!(self.memory, Some(MemoryXml::External { .. })) => Err(
                XmlError::Unsupported("mixing internal and external snapshots is not supported".to_owned()),
            ),
            (true, false) => Ok(Place::Internal),
            (false, _) => Ok(Place::Usual),
        }
    }

    fn content(&self) -> Result<Content, XmlError> {
        match &self.memory {
            None => Ok(Content::Auto),
            Some(MemoryXml::No) => Ok(Content::DisksOnly),
            Some(MemoryXml::Internal | MemoryXml::External { file: None }) => Ok(Content::WithMemory),
            Some(MemoryXml::External { file: Some(file) }) => Err(XmlError::Unsupported(format!(
                "memory file '{}' cannot be chosen: leave out the file attribute, and Snaptree names the file",
                shown(file)
            ))),
        }
    }

    /// The disks to include; none for all of them, so that nothing is selected where nothing was excluded.
    fn selection(&self, disks: &[Disk]) -> Result<Option<BTreeSet<DiskName>>, XmlError> {
        if self.disks.len() > disks.len() {
            return Err(XmlError::TooManyDisks);
        }
        let mut seen = BTreeSet::new();
        let mut chosen: BTreeSet<DiskName> = disks.iter().map(|disk| disk.name.clone()).collect();
        for entry in &self.disks {
            let name = &entry.find(disks).ok_or_else(|| XmlError::NoDisk(shown(&entry.name)))?.name;
            if !seen.insert(name) {
                return Err(XmlError::DiskTwice(name.clone()));
            }
            if entry.selects(name)? == Selected::Excluded {
                chosen.remove(name);
            }
        }
        match chosen.len() {
            all if all == disks.len() => Ok(None),
            0 => Err(XmlError::NothingSelected),
            _ => Ok(Some(chosen)),
        }
    }
}

/// Whether a disk belongs to the snapshot.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Selected {
    Included,
    Excluded,
}

impl DiskXml {
    /// The disk that is meant: libvirt looks for the target name first, then for the path.
    fn find<'a>(&self, disks: &'a [Disk]) -> Option<&'a Disk> {
        let by_path = || {
            let path = Path::new(&self.name);
            disks.iter().find(|disk| path.is_absolute() && disk.path.as_deref() == Some(path))
        };
        disks.iter().find(|disk| disk.name.as_str() == self.name).or_else(by_path)
    }

    fn selects(&self, disk: &DiskName) -> Result<Selected, XmlError> {
        let unsupported = |what: String| Err(XmlError::Unsupported(what));
        if let (Some(DiskMode::No | DiskMode::Internal | DiskMode::Manual), Some(file)) =
            (self.snapshot, &self.source)
        {
            return Err(XmlError::DiskFileMode { file: shown(file), disk: disk.clone() });
        }
        match self.snapshot {
            Some(DiskMode::No) => return Ok(Selected::Excluded),
            Some(DiskMode::Internal) => return Ok(Selected::Included),
            Some(DiskMode::Manual) => {
                return unsupported(format!("snapshot mode 'manual' for disk '{disk}' is not offered"));
            }
            Some(DiskMode::External) | None => {}
        }
        if let Some(source) = &self.source {
            return unsupported(format!(
                "file '{}' for disk '{disk}' cannot be chosen: leave out <source>, and Snaptree names the file",
                shown(source)
            ));
        }
        if self.kind != SourceKind::File {
            return unsupported(format!("disk '{disk}': only snapshots into files are offered"));
        }
        match self.driver.as_deref() {
            None | Some("qcow2") => Ok(Selected::Included),
            Some(driver) => unsupported(format!(
                "format '{driver}' for disk '{disk}': only qcow2 is offered for the new image"
            )),
        }
    }
}

/// A cut of outside text that is fit for an error text.
fn shown(text: &str) -> String {
    text.chars().take(60).map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// What XML 1.0 lets a document contain (production `Char`).
const fn is_xml_char(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\r' | '\u{20}'..='\u{d7ff}' | '\u{e000}'..='\u{fffd}' | '\u{10000}'..)
}
