//! Reading a `<domainsnapshot>` that anybody may have written.
//!
//! The elements are found as libvirt's XPath expressions find them: of several the first counts, an element's text
//! is all the text in it and below it, an empty text is none, and elements in a namespace are not libvirt's.

use std::borrow::Cow;

use quick_xml::XmlVersion;
use quick_xml::errors::Error;
use quick_xml::escape::{EscapeError, resolve_predefined_entity};
use quick_xml::events::attributes::AttrError;
use quick_xml::events::{BytesRef, BytesStart, Event};
use quick_xml::reader::Reader;

use super::values::{Attributes, Field, Found, Role, value};
use super::{ATTRIBUTES_MAX, DEPTH_MAX, Position, SnapshotXml, TEXT_BYTES_MAX, XmlError, is_xml_char, shown};

/// Reads a `<domainsnapshot>`.
///
/// The text is UTF-8 whatever its declaration says. DTDs are refused, and with them every entity but XML's own five.
///
/// # Errors
/// [`XmlError`]: text that is not well-formed (with the place), another root, more than the limits of this module,
/// and values that libvirt's `virDomainSnapshotDefParse` refuses, in its words.
pub fn read(text: &str) -> Result<SnapshotXml, XmlError> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if text.len() > TEXT_BYTES_MAX {
        return Err(XmlError::TooLarge { what: "document", max: TEXT_BYTES_MAX, unit: "bytes" });
    }
    if let Some((byte, c)) = text.char_indices().find(|(_, c)| !is_xml_char(*c)) {
        return Err(malformed(text, byte, not_allowed(c)));
    }
    let mut parser = Parser::new(text);
    while parser.step()? == Step::Taken {}
    parser.found.finish()
}

fn not_allowed(c: char) -> String {
    format!("character U+{:04X} is not allowed in XML", u32::from(c))
}

fn malformed(text: &str, byte: usize, problem: impl Into<String>) -> XmlError {
    XmlError::Malformed { at: position(text, byte), problem: problem.into() }
}

fn position(text: &str, byte: usize) -> Position {
    let byte = byte.min(text.len());
    let before = text.get(..byte).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    Position {
        byte,
        line: before.matches('\n').count() + 1,
        column: before.get(line_start..).map_or(0, |line| line.chars().count()) + 1,
    }
}

/// Whether there may be more to read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Taken,
    End,
}

/// What an open element is to us.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Root,
    Parent,
    Disks,
    Domain,
    /// An element whose attributes are wanted.
    Attributes(Role),
    /// An element whose text is wanted.
    Text(Field),
    /// Below such an element: its text belongs to that text.
    InText,
    /// Skipped.
    Other,
}

impl Place {
    fn child(self, name: &str) -> Self {
        match (self, name) {
            (Self::Root, "name") => Self::Text(Field::Name),
            (Self::Root, "description") => Self::Text(Field::Description),
            (Self::Root, "creationTime") => Self::Text(Field::CreationTime),
            (Self::Root, "creationdate" | "creationDate") => Self::Text(Field::CreationDate),
            (Self::Root, "state") => Self::Text(Field::State),
            (Self::Root, "parent") => Self::Parent,
            (Self::Parent, "name") => Self::Text(Field::ParentName),
            (Self::Root, "memory") => Self::Attributes(Role::Memory),
            (Self::Root, "disks") => Self::Disks,
            (Self::Disks, "disk") => Self::Attributes(Role::Disk),
            (Self::Attributes(Role::Disk), "source") => Self::Attributes(Role::Source),
            (Self::Attributes(Role::Disk), "driver") => Self::Attributes(Role::Driver),
            (Self::Root, "domain") => Self::Domain,
            (Self::Domain, "uuid") => Self::Text(Field::Uuid),
            (Self::Text(_) | Self::InText, _) => Self::InText,
            _ => Self::Other,
        }
    }
}

/// How far the document is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Before the root element.
    Before,
    /// In it.
    Inside,
    /// Behind it.
    After,
}

struct Parser<'a> {
    text: &'a str,
    reader: Reader<&'a [u8]>,
    stage: Stage,
    /// The open elements and where each begins.
    open: Vec<(Place, usize)>,
    /// The text collected for the [`Place::Text`] that is open.
    collected: String,
    found: Found,
}

impl<'a> Parser<'a> {
    fn new(text: &'a str) -> Self {
        let mut reader = Reader::from_str(text);
        let config = reader.config_mut();
        config.check_comments = true;
        config.expand_empty_elements = true;
        Self {
            text,
            reader,
            stage: Stage::Before,
            open: Vec::new(),
            collected: String::new(),
            found: Found::default(),
        }
    }

    fn malformed(&self, byte: usize, problem: impl Into<String>) -> XmlError {
        malformed(self.text, byte, problem)
    }

    fn step(&mut self) -> Result<Step, XmlError> {
        let at = offset(self.reader.buffer_position());
        let event = match self.reader.read_event() {
            Ok(event) => event,
            Err(error) => {
                return Err(self.malformed(offset(self.reader.error_position()), problem(&error)));
            }
        };
        match event {
            Event::Start(start) => self.start(&start, at)?,
            Event::End(_) => self.end(),
            // Emitted for nothing, since empty elements are expanded.
            Event::Empty(_) => {}
            Event::Text(text) => {
                let text = text.xml10_content();
                if text.contains("]]>") {
                    return Err(self.malformed(at, "']]>' must not stand in text"));
                }
                if !text.trim_matches([' ', '\t', '\r', '\n']).is_empty() {
                    self.inside_root(at)?;
                }
                self.collect(&text);
            }
            Event::CData(text) => {
                self.inside_root(at)?;
                self.collect(&text.xml10_content());
            }
            Event::GeneralRef(reference) => self.reference(&reference, at)?,
            Event::Comment(_) => {}
            Event::PI(instruction) if is_xml_name(instruction.target()) => {}
            Event::PI(_) => return Err(self.malformed(at, "a processing instruction must have a name")),
            Event::Decl(declaration) => {
                if at != 0 {
                    return Err(self.malformed(at, "an XML declaration must stand at the start"));
                }
                declaration.xml_version().map_err(|error| self.malformed(at, problem(&error)))?;
            }
            Event::DocType(_) => {
                return Err(self.malformed(at, "a document type declaration is not accepted"));
            }
            Event::Eof => return self.eof(at),
        }
        Ok(Step::Taken)
    }

    fn eof(&self, at: usize) -> Result<Step, XmlError> {
        match (self.open.last(), self.stage) {
            (Some((_, start)), _) => Err(self.malformed(*start, "this element is never closed")),
            (None, Stage::Before) => Err(self.malformed(at, "the document is empty")),
            (None, _) => Ok(Step::End),
        }
    }

    fn inside_root(&self, at: usize) -> Result<(), XmlError> {
        match self.stage {
            Stage::Inside => Ok(()),
            Stage::Before => Err(self.malformed(at, "text before the document's element")),
            Stage::After => Err(self.malformed(at, "extra content after the end of the document")),
        }
    }

    fn collect(&mut self, text: &str) {
        if let Some((Place::Text(_) | Place::InText, _)) = self.open.last() {
            self.collected.push_str(text);
        }
    }

    fn reference(&mut self, reference: &BytesRef<'_>, at: usize) -> Result<(), XmlError> {
        self.inside_root(at)?;
        let mut buffer = [0; 4];
        let text = match reference.resolve_char_ref() {
            Ok(Some(c)) if is_xml_char(c) => &*c.encode_utf8(&mut buffer),
            Ok(Some(c)) => return Err(self.malformed(at, not_allowed(c))),
            Ok(None) => {
                let refused = || self.malformed(at, undefined(reference));
                resolve_predefined_entity(reference).ok_or_else(refused)?
            }
            Err(error) => return Err(self.malformed(at, problem(&error))),
        };
        self.collect(text);
        Ok(())
    }

    fn start(&mut self, start: &BytesStart<'_>, at: usize) -> Result<(), XmlError> {
        let qname = start.name();
        let name = qname.as_ref();
        if !is_xml_name(name) {
            return Err(self.malformed(at, format!("'{}' is no name of an element", shown(name))));
        }
        let attributes = self.attributes(start, at)?;
        let foreign = name.contains(':') || value(&attributes, "xmlns").is_some_and(|uri| !uri.is_empty());
        let place = match (self.open.last(), self.stage) {
            (Some((outer, _)), _) => match outer.child(name) {
                Place::InText => Place::InText,
                _ if foreign => Place::Other,
                place => place,
            },
            (None, Stage::Before) if name == "domainsnapshot" && !foreign => Place::Root,
            (None, Stage::Before) => {
                let namespace = if foreign { " in a namespace" } else { "" };
                let found = format!("'{}'{namespace}", shown(name));
                return Err(XmlError::Root { at: position(self.text, at), found });
            }
            (None, _) => return Err(self.malformed(at, "extra content after the end of the document")),
        };
        if self.open.len() >= DEPTH_MAX {
            return Err(self.malformed(at, format!("elements are nested deeper than {DEPTH_MAX}")));
        }
        self.stage = Stage::Inside;
        self.open.push((place, at));
        match place {
            Place::Attributes(role) => self.found.attributes(role, attributes),
            _ => Ok(()),
        }
    }

    fn end(&mut self) {
        if let Some((Place::Text(field), _)) = self.open.pop() {
            self.found.text(field, std::mem::take(&mut self.collected));
        }
        if self.open.is_empty() {
            self.stage = Stage::After;
        }
    }

    /// All attributes of an element, checked and unescaped; also of elements that are skipped, since what is not
    /// XML is refused wherever it stands.
    fn attributes(&self, start: &BytesStart<'_>, at: usize) -> Result<Attributes, XmlError> {
        if !are_spaced(start.attributes_raw()) {
            return Err(self.malformed(at, "attributes must be separated by blanks"));
        }
        let mut attributes = Vec::new();
        for attribute in start.attributes() {
            let attribute = attribute.map_err(|error| {
                // Counted from behind the '<'.
                self.malformed(at + 1 + attribute_offset(&error), attribute_problem(&error))
            })?;
            let name = attribute.key.as_ref();
            if !is_xml_name(name) {
                return Err(self.malformed(at, format!("'{}' is no name of an attribute", shown(name))));
            }
            if attribute.value.contains('<') {
                return Err(self.malformed(at, format!("'<' in the value of attribute '{}'", shown(name))));
            }
            let value: Cow<'_, str> =
                attribute.normalized_value(XmlVersion::Implicit1_0).map_err(|error| {
                    self.malformed(at, format!("attribute '{}': {}", shown(name), problem(&error)))
                })?;
            if let Some(c) = value.chars().find(|c| !is_xml_char(*c)) {
                return Err(self.malformed(at, format!("attribute '{}': {}", shown(name), not_allowed(c))));
            }
            if attributes.len() >= ATTRIBUTES_MAX {
                return Err(self.malformed(at, format!("more than {ATTRIBUTES_MAX} attributes")));
            }
            attributes.push((name.to_owned(), value.into_owned()));
        }
        Ok(attributes)
    }
}

/// Whether a blank follows every value; quick-xml does not ask for it.
fn are_spaced(attributes: &str) -> bool {
    let mut quote = None;
    let mut closed = false;
    for c in attributes.chars() {
        if quote == Some(c) {
            quote = None;
            closed = true;
        } else if quote.is_none() {
            if closed && !c.is_ascii_whitespace() {
                return false;
            }
            closed = false;
            quote = matches!(c, '\'' | '"').then_some(c);
        }
    }
    true
}

/// The document is at most [`TEXT_BYTES_MAX`] long, so every place in it fits.
fn offset(position: u64) -> usize {
    usize::try_from(position).unwrap_or(usize::MAX)
}

/// XML defines five; those that a DTD would define are not to be had.
fn undefined(entity: &str) -> String {
    format!("entity '{}' is not defined", shown(entity))
}

/// quick-xml's words, cut: they quote the document.
fn problem(error: &Error) -> String {
    let text = match error {
        Error::Syntax(error) => error.to_string(),
        Error::IllFormed(error) => error.to_string(),
        Error::Escape(EscapeError::UnrecognizedEntity(_, name)) => undefined(name),
        Error::Escape(error) => error.to_string(),
        other => other.to_string(),
    };
    text.chars().take(200).map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

const fn attribute_offset(error: &AttrError) -> usize {
    match error {
        AttrError::ExpectedEq(at)
        | AttrError::ExpectedValue(at)
        | AttrError::UnquotedValue(at)
        | AttrError::ExpectedQuote(at, _)
        | AttrError::Duplicated(at, _) => *at,
    }
}

const fn attribute_problem(error: &AttrError) -> &'static str {
    match error {
        AttrError::ExpectedEq(_) => "an attribute's name must be followed by '='",
        AttrError::ExpectedValue(_) => "'=' must be followed by an attribute's value",
        AttrError::UnquotedValue(_) => "an attribute's value must stand in quotes",
        AttrError::ExpectedQuote(..) => "an attribute's value lacks its closing quote",
        AttrError::Duplicated(..) => "an attribute is given twice",
    }
}

/// XML's production `Name`, a little wider: characters beyond ASCII are all taken.
fn is_xml_name(name: &str) -> bool {
    let first = |c: char| c.is_ascii_alphabetic() || matches!(c, '_' | ':') || !c.is_ascii();
    name.starts_with(first) && name.chars().all(|c| first(c) || c.is_ascii_digit() || matches!(c, '-' | '.'))
}
