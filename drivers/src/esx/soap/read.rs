//! Reading what a host answers, or whoever stands in for it.

use quick_xml::XmlVersion;
use quick_xml::errors::IllFormedError;
use quick_xml::escape::resolve_predefined_entity;
use quick_xml::events::{BytesRef, BytesStart, Event};
use quick_xml::name::{Namespace, ResolveResult};
use quick_xml::reader::NsReader;

use super::write::Moref;

/// Largest reply that is read, in bytes.
pub const BYTES_MAX: usize = 32 << 20;
/// Deepest nesting. A chain of 32 snapshots needs about 45.
pub const DEPTH_MAX: usize = 160;
/// Most elements of a reply: what the tree in memory may grow to.
pub const ELEMENTS_MAX: usize = 1_000_000;
/// Most attributes of one element.
const ATTRIBUTES_MAX: usize = 32;
/// How much of a name that comes from outside goes into an error, in characters.
const SHOWN_CHARS_MAX: usize = 60;

const ENVELOPE: &str = "http://schemas.xmlsoap.org/soap/envelope/";
const SCHEMA_INSTANCE: &str = "http://www.w3.org/2001/XMLSchema-instance";

/// What is wrong with a reply. It quotes nothing of the reply but names.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SoapError {
    /// It ends before it is complete.
    #[error("the reply is cut off")]
    CutOff,
    /// It is larger than the limits.
    #[error("the reply has more than {max} {unit}")]
    TooLarge {
        /// The limit.
        max: usize,
        /// What of.
        unit: &'static str,
    },
    /// It is no XML, or no SOAP.
    #[error("the reply cannot be read: {0}")]
    Malformed(String),
    /// Something that has to be in it is not.
    #[error("the reply lacks {0}")]
    Lacks(&'static str),
}

/// An element of a reply: what vim25 uses of XML.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Element {
    /// Its local name.
    pub name: String,
    /// The local part of its `xsi:type`.
    pub xsi_type: Option<String>,
    /// Its attribute `type`, in no namespace: the kind of object that a reference is to.
    pub object: Option<String>,
    /// The text in it, without that of its children.
    pub text: String,
    /// What is in it, in order.
    pub children: Vec<Self>,
}

impl Element {
    /// The first child of that name.
    pub fn child(&self, name: &str) -> Option<&Self> {
        self.children.iter().find(|child| child.name == name)
    }

    /// All children of that name.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Self> {
        self.children.iter().filter(move |child| child.name == name)
    }

    /// The text of the first child of that name; none for an empty one.
    pub fn text_of(&self, name: &str) -> Option<&str> {
        self.child(name).map(|child| child.text.as_str()).filter(|text| !text.is_empty())
    }

    /// Whether the first child of that name says `true`; none if it says neither, or is not there.
    pub fn flag_of(&self, name: &str) -> Option<bool> {
        self.child(name).and_then(Self::flag)
    }

    /// Whether its text says `true`.
    pub fn flag(&self) -> Option<bool> {
        match self.text.trim() {
            "true" | "1" => Some(true),
            "false" | "0" => Some(false),
            _ => None,
        }
    }

    /// The object that it refers to.
    pub fn moref(&self) -> Option<Moref> {
        let object = self.object.as_ref().filter(|_| !self.text.is_empty())?;
        Some(Moref { object: object.clone(), id: self.text.clone() })
    }

    /// The object that its first child of that name refers to.
    pub fn moref_of(&self, name: &str) -> Option<Moref> {
        self.child(name).and_then(Self::moref)
    }
}

/// The one element in the SOAP body of a reply: the answer, or a `Fault`.
///
/// # Errors
/// As [`read`], or there is none.
pub fn body(text: &[u8]) -> Result<Element, SoapError> {
    let envelope = read(text)?;
    let body = envelope.children.into_iter().find(|child| child.name == "Body");
    body.and_then(|body| body.children.into_iter().next()).ok_or(SoapError::Lacks("a body"))
}

/// Reads a SOAP envelope as a tree.
///
/// DTDs are refused, and with them every entity but XML's own five. Time and memory are linear in the length of the
/// text, which is bounded by [`BYTES_MAX`], [`ELEMENTS_MAX`] and [`DEPTH_MAX`].
///
/// # Errors
/// [`SoapError`]: what is cut off, larger than the limits, or no SOAP envelope.
pub fn read(text: &[u8]) -> Result<Element, SoapError> {
    if text.len() > BYTES_MAX {
        return Err(SoapError::TooLarge { max: BYTES_MAX, unit: "bytes" });
    }
    let text = std::str::from_utf8(text).map_err(|error| match error.error_len() {
        None => SoapError::CutOff,
        Some(_) => SoapError::Malformed("it is not in UTF-8".to_owned()),
    })?;
    let mut tree = Tree::default();
    let mut reader = NsReader::from_str(text.strip_prefix('\u{feff}').unwrap_or(text));
    reader.config_mut().expand_empty_elements = true;
    loop {
        let (namespace, event) = match reader.read_resolved_event() {
            Ok(read) => read,
            // Half a tag or half a comment at its very end.
            Err(quick_xml::Error::Syntax(_)) => return Err(SoapError::CutOff),
            Err(quick_xml::Error::IllFormed(IllFormedError::UnclosedReference))
                if ends_in_reference(text) =>
            {
                return Err(SoapError::CutOff);
            }
            Err(error) => return Err(malformed(&error)),
        };
        match event {
            Event::Start(start) => {
                let root = matches!(namespace, ResolveResult::Bound(Namespace(uri)) if uri == ENVELOPE);
                let element = element(&reader, &start)?;
                tree.open(element, root)?;
            }
            Event::End(_) => tree.close(),
            Event::Text(text) => tree.text(&text.xml10_content()),
            Event::CData(text) => tree.text(&text.xml10_content()),
            Event::GeneralRef(reference) => tree.reference(&reference)?,
            Event::DocType(_) => {
                return Err(SoapError::Malformed("it has a document type declaration".to_owned()));
            }
            Event::Eof => return tree.root(),
            Event::Empty(_) | Event::Comment(_) | Event::PI(_) | Event::Decl(_) => {}
        }
    }
}

/// Whether the last thing in it is the beginning of a reference such as `&lt;`.
fn ends_in_reference(text: &str) -> bool {
    text.rfind('&').is_some_and(|at| !text[at..].contains(['<', ';']))
}

/// The tree as far as it was read.
#[derive(Default)]
struct Tree {
    open: Vec<Element>,
    root: Option<Element>,
    elements: usize,
}

impl Tree {
    fn open(&mut self, element: Element, in_envelope: bool) -> Result<(), SoapError> {
        if self.open.is_empty() {
            if self.root.is_some() {
                return Err(SoapError::Malformed("something follows the envelope".to_owned()));
            }
            if !in_envelope || element.name != "Envelope" {
                return Err(SoapError::Malformed(format!("it is no SOAP but <{}>", element.name)));
            }
        }
        self.elements += 1;
        if self.elements > ELEMENTS_MAX {
            return Err(SoapError::TooLarge { max: ELEMENTS_MAX, unit: "elements" });
        }
        if self.open.len() >= DEPTH_MAX {
            return Err(SoapError::TooLarge { max: DEPTH_MAX, unit: "levels" });
        }
        self.open.push(element);
        Ok(())
    }

    fn close(&mut self) {
        let Some(mut done) = self.open.pop() else { return };
        // The blanks between elements are nobody's text.
        if !done.children.is_empty() {
            done.text = String::new();
        }
        match self.open.last_mut() {
            Some(outer) => outer.children.push(done),
            None => self.root = Some(done),
        }
    }

    fn text(&mut self, text: &str) {
        if let Some(element) = self.open.last_mut() {
            element.text.push_str(text);
        }
    }

    fn reference(&mut self, reference: &BytesRef<'_>) -> Result<(), SoapError> {
        let mut buffer = [0; 4];
        let text = match reference.resolve_char_ref() {
            Ok(Some(c)) => &*c.encode_utf8(&mut buffer),
            Ok(None) => resolve_predefined_entity(reference).ok_or_else(|| {
                SoapError::Malformed(format!("entity '{}' is not defined", shown(reference)))
            })?,
            Err(error) => return Err(malformed(&error)),
        };
        self.text(text);
        Ok(())
    }

    fn root(self) -> Result<Element, SoapError> {
        if self.open.is_empty() { self.root.ok_or(SoapError::CutOff) } else { Err(SoapError::CutOff) }
    }
}

fn element(reader: &NsReader<&[u8]>, start: &BytesStart<'_>) -> Result<Element, SoapError> {
    let mut element = Element { name: start.local_name().as_ref().to_owned(), ..Element::default() };
    for (index, attribute) in start.attributes().with_checks(false).enumerate() {
        if index >= ATTRIBUTES_MAX {
            return Err(SoapError::TooLarge { max: ATTRIBUTES_MAX, unit: "attributes of one element" });
        }
        let attribute = attribute.map_err(|error| malformed(&error))?;
        let (namespace, local) = reader.resolver().resolve_attribute(attribute.key);
        if local.as_ref() != "type" {
            continue;
        }
        let value = attribute.normalized_value(XmlVersion::Implicit1_0).map_err(|error| malformed(&error))?;
        match namespace {
            ResolveResult::Bound(Namespace(uri)) if uri == SCHEMA_INSTANCE => {
                let local = value.rsplit(':').next().unwrap_or_default();
                element.xsi_type = Some(local.to_owned());
            }
            ResolveResult::Unbound => element.object = Some(value.into_owned()),
            _ => {}
        }
    }
    Ok(element)
}

/// quick-xml's words, cut: they quote the reply.
fn malformed(error: &dyn std::fmt::Display) -> SoapError {
    SoapError::Malformed(shown(&error.to_string()))
}

fn shown(text: &str) -> String {
    let printable = |c: char| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c };
    text.chars().take(SHOWN_CHARS_MAX).map(printable).collect()
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
