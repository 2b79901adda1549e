//! Writing requests. The order of parameters is the WSDL's, `_this` first.

use std::fmt::{self, Write as _};

use quick_xml::escape::escape;
use serde::{Deserialize, Serialize};

/// A reference to an object of the host. The id is opaque: it may hold any character.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Moref {
    /// What kind of object it is, such as `VirtualMachine`.
    pub object: String,
    /// Its id there.
    pub id: String,
}

impl Moref {
    /// The object of that kind and id.
    pub fn new(object: impl Into<String>, id: impl Into<String>) -> Self {
        Self { object: object.into(), id: id.into() }
    }
}

impl fmt::Display for Moref {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.id)
    }
}

/// A call of a method, without its envelope.
///
/// Its `Debug` does not tell what the parameters are: one of them may be the password.
pub struct Request {
    method: &'static str,
    body: String,
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request").field("method", &self.method).finish_non_exhaustive()
    }
}

impl Request {
    /// A call of `method` of `this`.
    pub fn new(method: &'static str, this: &Moref) -> Self {
        let body = format!("<{method} xmlns=\"urn:vim25\">");
        Self { method, body }.reference("_this", this)
    }

    /// The method.
    pub const fn method(&self) -> &'static str {
        self.method
    }

    /// Adds a parameter that is text.
    #[must_use]
    pub fn text(mut self, name: &str, value: &str) -> Self {
        self.body.push_str(&format!("<{name}>{}</{name}>", escape(value)));
        self
    }

    /// Adds a parameter that is a truth value.
    #[must_use]
    pub fn flag(self, name: &str, value: bool) -> Self {
        self.text(name, if value { "true" } else { "false" })
    }

    /// Adds a parameter that is an object.
    #[must_use]
    pub fn reference(mut self, name: &str, value: &Moref) -> Self {
        let (object, id) = (escape(value.object.as_str()), escape(value.id.as_str()));
        // Writing into a String does not fail.
        let _ = write!(self.body, "<{name} type=\"{object}\">{id}</{name}>");
        self
    }

    /// Adds what is XML already.
    #[must_use]
    pub fn raw(mut self, xml: &str) -> Self {
        self.body.push_str(xml);
        self
    }

    /// The whole document.
    pub fn envelope(&self) -> String {
        format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\
             <soapenv:Envelope xmlns:soapenv=\"http://schemas.xmlsoap.org/soap/envelope/\" \
             xmlns:xsi=\"http://www.w3.org/2001/XMLSchema-instance\" \
             xmlns:xsd=\"http://www.w3.org/2001/XMLSchema\"><soapenv:Body>{}</{}></soapenv:Body></soapenv:Envelope>",
            self.body, self.method
        )
    }
}
