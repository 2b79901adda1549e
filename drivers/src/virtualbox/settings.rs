//! The machine's settings file (`.vbox`), which is what VirtualBox itself goes by. Read only, never written.
//!
//! An element in an element for each snapshot: 250 snapshots in a row are 500 elements deep, so nothing here recurses.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use quick_xml::XmlVersion;
use quick_xml::escape::resolve_predefined_entity;
use quick_xml::events::{BytesStart, Event};
use quick_xml::reader::Reader;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Largest settings file that is read; 250 snapshots with descriptions of 64 KiB are below.
pub(super) const FILE_BYTES_MAX: u64 = 64 << 20;
/// Deepest nesting that is read. VirtualBox allows 250 snapshots in a row, two elements each.
const DEPTH_MAX: usize = 1_024;

/// What of the file is of use.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Settings {
    /// The machine's id.
    pub uuid: Uuid,
    /// Its name.
    pub name: String,
    /// The folder of what is made for snapshots.
    pub folder: PathBuf,
    /// The current snapshot.
    pub current: Option<Uuid>,
    /// Whether its memory is saved in a file.
    pub saved: bool,
    /// The snapshots, parents before their children.
    pub snapshots: Vec<Snap>,
    /// The images of the current state, by place: controller, port and device.
    pub images: BTreeMap<String, Uuid>,
    /// All images that the machine's registry names.
    pub media: BTreeMap<Uuid, Medium>,
}

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Snap {
    pub uuid: Uuid,
    pub parent: Option<Uuid>,
    pub name: String,
    pub description: String,
    /// When it was taken; whole seconds.
    pub taken: Option<Timestamp>,
    /// Whether it holds the machine's memory.
    pub online: bool,
    /// Its images, by place.
    pub images: BTreeMap<String, Uuid>,
}

/// An image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Medium {
    pub file: PathBuf,
    pub format: String,
    /// The image that it is built upon.
    pub parent: Option<Uuid>,
    /// What VirtualBox does with what is written to it.
    #[serde(default)]
    pub kind: Kind,
}

/// What VirtualBox does with what is written to an image, as the settings say it of the lowest one of a chain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Kind {
    /// It is part of snapshots. So is one that several machines build upon.
    #[default]
    Normal,
    Writethrough,
    Shareable,
    Readonly,
    Immutable,
}

impl Kind {
    fn of(word: Option<&String>) -> Self {
        match word.map(String::as_str) {
            Some("Writethrough") => Self::Writethrough,
            Some("Shareable") => Self::Shareable,
            Some("Readonly") => Self::Readonly,
            Some("Immutable") => Self::Immutable,
            _ => Self::Normal,
        }
    }
}

/// Why a settings file cannot be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum SettingsError {
    /// It is no XML, or not all of it.
    #[error("it is not well-formed at byte {at}: {problem}")]
    Malformed { at: u64, problem: String },
    /// It is nested too deeply.
    #[error("elements are nested deeper than {DEPTH_MAX}")]
    Deep,
    /// It is XML, and not of a machine.
    #[error("it lacks {0}")]
    Lacks(&'static str),
}

/// What an open element is to us.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Root,
    Machine,
    Registry,
    HardDisk,
    Snapshots,
    Snapshot,
    Description,
    Hardware,
    Controllers,
    Controller,
    /// A hard disk's attachment.
    Attached,
    Other,
}

impl Place {
    fn child(self, name: &str) -> Self {
        match (self, name) {
            (Self::Root, "Machine") => Self::Machine,
            (Self::Machine, "MediaRegistry") | (Self::Registry, "HardDisks") => Self::Registry,
            (Self::Registry | Self::HardDisk, "HardDisk") => Self::HardDisk,
            (Self::Machine | Self::Snapshots, "Snapshot") => Self::Snapshot,
            (Self::Snapshot, "Snapshots") => Self::Snapshots,
            (Self::Snapshot, "Description") => Self::Description,
            // Settings before version 1.19 have the controllers beside the hardware.
            (Self::Machine | Self::Snapshot, "Hardware") => Self::Hardware,
            (Self::Hardware | Self::Machine | Self::Snapshot, "StorageControllers") => Self::Controllers,
            (Self::Controllers, "StorageController") => Self::Controller,
            (Self::Controller, "AttachedDevice") => Self::Attached,
            _ => Self::Other,
        }
    }
}

struct Parser<'a> {
    folder: &'a Path,
    open: Vec<Place>,
    /// The open snapshots, as places in the list.
    snapshots: Vec<usize>,
    /// The open images.
    media: Vec<Uuid>,
    controller: String,
    slot: String,
    found: Settings,
    machine: bool,
}

/// Reads a settings file that lies in `folder`.
pub(super) fn read(text: &str, folder: &Path) -> Result<Settings, SettingsError> {
    let mut reader = Reader::from_str(text);
    reader.config_mut().expand_empty_elements = true;
    let mut parser = Parser {
        folder,
        open: Vec::new(),
        snapshots: Vec::new(),
        media: Vec::new(),
        controller: String::new(),
        slot: String::new(),
        found: Settings::default(),
        machine: false,
    };
    loop {
        let at = reader.buffer_position();
        let malformed = |problem: String| SettingsError::Malformed { at, problem };
        match reader.read_event().map_err(|error| malformed(error.to_string()))? {
            Event::Start(start) => parser.start(&start).map_err(malformed_or(at))?,
            Event::End(_) => parser.end(),
            Event::Text(text) => parser.text(&text.xml10_content()),
            Event::CData(text) => parser.text(&text.xml10_content()),
            Event::GeneralRef(reference) => {
                let mut buffer = [0; 4];
                let text = match reference.resolve_char_ref().map_err(|error| malformed(error.to_string()))? {
                    Some(c) => &*c.encode_utf8(&mut buffer),
                    None => resolve_predefined_entity(&reference)
                        .ok_or_else(|| malformed("an entity is not defined".to_owned()))?,
                };
                parser.text(text);
            }
            Event::DocType(_) => return Err(malformed("a document type is declared".to_owned())),
            Event::Eof if !parser.open.is_empty() => return Err(malformed("it ends too early".to_owned())),
            Event::Eof if !parser.machine => return Err(SettingsError::Lacks("a machine")),
            Event::Eof => return Ok(parser.found),
            Event::Empty(_) | Event::Comment(_) | Event::PI(_) | Event::Decl(_) => {}
        }
    }
}

/// What is wrong in an element.
enum Wrong {
    Problem(String),
    Deep,
}

fn malformed_or(at: u64) -> impl Fn(Wrong) -> SettingsError {
    move |wrong| match wrong {
        Wrong::Problem(problem) => SettingsError::Malformed { at, problem },
        Wrong::Deep => SettingsError::Deep,
    }
}

type Attributes = BTreeMap<String, String>;

impl Parser<'_> {
    fn start(&mut self, start: &BytesStart<'_>) -> Result<(), Wrong> {
        if self.open.len() >= DEPTH_MAX {
            return Err(Wrong::Deep);
        }
        let name = start.name();
        let place = match self.open.last() {
            None if name.as_ref() == "VirtualBox" => Place::Root,
            None => return Err(Wrong::Problem("it is none of VirtualBox's".to_owned())),
            Some(outer) => outer.child(name.as_ref()),
        };
        let outer = self.open.last().copied();
        self.open.push(place);
        match place {
            Place::Machine => self.machine(&attributes(start)?),
            Place::HardDisk => self.hard_disk(&attributes(start)?),
            Place::Snapshot => self.snapshot(attributes(start)?),
            Place::Controller => {
                self.controller = attributes(start)?.remove("name").unwrap_or_default();
                Ok(())
            }
            Place::Attached => {
                let attached = attributes(start)?;
                let of = |key: &str| attached.get(key).map_or("0", String::as_str);
                self.slot = match attached.get("type").map(String::as_str) {
                    Some("HardDisk") => format!("{}-{}-{}", self.controller, of("port"), of("device")),
                    _ => String::new(),
                };
                Ok(())
            }
            Place::Other if outer == Some(Place::Attached) && name.as_ref() == "Image" => {
                self.image(&attributes(start)?)
            }
            _ => Ok(()),
        }
    }

    fn end(&mut self) {
        match self.open.pop() {
            Some(Place::Snapshot) => drop(self.snapshots.pop()),
            Some(Place::HardDisk) => drop(self.media.pop()),
            _ => {}
        }
    }

    fn text(&mut self, text: &str) {
        if let (Some(Place::Description), Some(index)) = (self.open.last(), self.snapshots.last()) {
            self.found.snapshots[*index].description.push_str(text);
        }
    }

    fn machine(&mut self, of: &Attributes) -> Result<(), Wrong> {
        self.machine = true;
        self.found.uuid = required(of, "uuid")?;
        self.found.name = of.get("name").cloned().unwrap_or_default();
        self.found.current = of.get("currentSnapshot").map(|text| id(text)).transpose()?;
        self.found.saved = of.contains_key("stateFile");
        self.found.folder = self.folder.join(of.get("snapshotFolder").map_or("Snapshots", String::as_str));
        Ok(())
    }

    fn hard_disk(&mut self, of: &Attributes) -> Result<(), Wrong> {
        let uuid = required(of, "uuid")?;
        let medium = Medium {
            file: self.folder.join(of.get("location").map_or("", String::as_str)),
            format: of.get("format").cloned().unwrap_or_default(),
            parent: self.media.last().copied(),
            kind: Kind::of(of.get("type")),
        };
        self.media.push(uuid);
        self.found.media.insert(uuid, medium);
        Ok(())
    }

    fn snapshot(&mut self, mut of: Attributes) -> Result<(), Wrong> {
        let parent = self.snapshots.last().map(|index| self.found.snapshots[*index].uuid);
        self.snapshots.push(self.found.snapshots.len());
        self.found.snapshots.push(Snap {
            uuid: required(&of, "uuid")?,
            parent,
            name: of.remove("name").unwrap_or_default(),
            description: String::new(),
            taken: of.get("timeStamp").and_then(|text| text.parse().ok()),
            online: of.contains_key("stateFile"),
            images: BTreeMap::new(),
        });
        Ok(())
    }

    fn image(&mut self, of: &Attributes) -> Result<(), Wrong> {
        if self.slot.is_empty() {
            return Ok(());
        }
        let (slot, uuid) = (self.slot.clone(), required(of, "uuid")?);
        let images = match self.snapshots.last() {
            Some(index) => &mut self.found.snapshots[*index].images,
            None => &mut self.found.images,
        };
        images.insert(slot, uuid);
        Ok(())
    }
}

fn attributes(start: &BytesStart<'_>) -> Result<Attributes, Wrong> {
    let mut all = Attributes::new();
    for attribute in start.attributes() {
        let attribute = attribute.map_err(|error| Wrong::Problem(error.to_string()))?;
        let value = attribute
            .normalized_value(XmlVersion::Implicit1_0)
            .map_err(|error| Wrong::Problem(error.to_string()))?;
        all.insert(attribute.key.as_ref().to_owned(), value.into_owned());
    }
    Ok(all)
}

fn required(of: &Attributes, key: &'static str) -> Result<Uuid, Wrong> {
    id(of.get(key).ok_or_else(|| Wrong::Problem(format!("an element lacks its {key}")))?)
}

/// VirtualBox writes ids in braces.
fn id(text: &str) -> Result<Uuid, Wrong> {
    Uuid::try_parse(text.trim_matches(['{', '}'])).map_err(|error| Wrong::Problem(error.to_string()))
}

impl Settings {
    pub(super) fn snapshot(&self, uuid: Uuid) -> Option<&Snap> {
        self.snapshots.iter().find(|snap| snap.uuid == uuid)
    }

    pub(super) fn children(&self, uuid: Uuid) -> usize {
        self.snapshots.iter().filter(|snap| snap.parent == Some(uuid)).count()
    }

    /// Most images that are built upon one of a snapshot's.
    pub(super) fn images_upon(&self, snap: &Snap) -> usize {
        let upon = |image: &Uuid| self.media.values().filter(|medium| medium.parent == Some(*image)).count();
        snap.images.values().map(upon).max().unwrap_or(0)
    }

    /// The images that a snapshot or the machine as it is reads from.
    pub(super) fn in_use(&self) -> BTreeSet<Uuid> {
        let mut used = BTreeSet::new();
        let snapshots = self.snapshots.iter().flat_map(|snap| snap.images.values());
        for top in snapshots.chain(self.images.values()) {
            let mut next = Some(*top);
            while let Some(image) = next.filter(|image| used.insert(*image)) {
                next = self.media.get(&image).and_then(|medium| medium.parent);
            }
        }
        used
    }

    /// Those of `given_up` that the registry still names and nothing reads from, the uppermost first: a restore that was
    /// killed between its writes of the settings leaves them, and what they are built upon can then never be merged.
    pub(super) fn left(&self, given_up: &[Uuid]) -> Vec<Uuid> {
        let used = self.in_use();
        let left = |image: &&Uuid| self.media.contains_key(image) && !used.contains(image);
        given_up.iter().filter(left).copied().collect()
    }

    /// Images beside the machine's own that the registry names, nothing reads from, and that are named as VirtualBox names
    /// those that it makes for a snapshot.
    pub(super) fn unused(&self) -> Vec<Uuid> {
        let used = self.in_use();
        let made = |image: &Uuid, medium: &Medium| {
            medium.parent.is_some() && medium.file == self.folder.join(format!("{{{image}}}.vdi"))
        };
        let unused = self.media.iter().filter(|(image, medium)| !used.contains(image) && made(image, medium));
        unused.map(|(image, _)| *image).collect()
    }

    /// How many snapshots stand between the machine and nothing.
    pub(super) fn depth(&self) -> usize {
        let current = self.current.and_then(|uuid| self.snapshot(uuid));
        std::iter::successors(current, |snap| self.snapshot(snap.parent?)).take(self.snapshots.len()).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(count: usize) -> String {
        let uuid = |n: usize| format!("{{{}}}", Uuid::from_u128(n as u128 + 1));
        let mut text = format!(
            "<VirtualBox><Machine uuid=\"{}\" name=\"a&quot;&#10;b\" currentSnapshot=\"{}\">",
            uuid(9_999),
            uuid(count - 1)
        );
        for n in 0..count {
            let stamp = "2026-11-23T02:08:55Z";
            text.push_str(&format!("<Snapshot uuid=\"{}\" name=\"s{n}\" timeStamp=\"{stamp}\">", uuid(n)));
            text.push_str("<Description>a &lt;b&gt;\n&#x41;<![CDATA[<c>]]></Description><Snapshots>");
        }
        text.push_str(&"</Snapshots></Snapshot>".repeat(count));
        text + "</Machine></VirtualBox>"
    }

    #[test]
    fn the_deepest_tree_that_virtualbox_allows_is_read_and_a_deeper_document_refused() {
        let found = read(&chain(250), Path::new("/vm")).unwrap();
        assert_eq!((found.snapshots.len(), found.depth()), (250, 250));
        assert_eq!(found.name, "a\"\nb");
        assert_eq!(found.snapshots[249].parent, Some(found.snapshots[248].uuid));
        assert_eq!(found.snapshots[0].description, "a <b>\nA<c>");
        assert!(matches!(read(&chain(600), Path::new("/vm")), Err(SettingsError::Deep)));
    }

    #[test]
    fn half_a_file_is_told_from_a_whole_one() {
        let whole = chain(3);
        for end in 0..whole.len() {
            assert!(read(&whole[..end], Path::new("/vm")).is_err(), "{end}");
        }
        assert!(read("<VirtualBox><Global/></VirtualBox>", Path::new("/vm")).is_err());
    }
}
