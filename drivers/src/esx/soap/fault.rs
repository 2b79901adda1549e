//! What a host says when it does not do what it was asked.

use std::fmt;

use super::read::Element;

/// Longest message of a host that is kept, in characters.
const MESSAGE_CHARS_MAX: usize = 500;

/// A fault: of a call, of a task, or of a property that could not be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The vim25 type of the fault, such as `TaskInProgress`; empty where the host names none.
    pub kind: String,
    /// The host's own words.
    pub message: String,
    /// The fields of the fault.
    pub detail: Element,
}

impl Fault {
    /// Of a `<soapenv:Fault>`: its detail has one child, whose `xsi:type` is the fault's type.
    pub fn of_call(fault: &Element) -> Self {
        let message = fault.text_of("faultstring").unwrap_or_default();
        let detail = fault.child("detail").and_then(|detail| detail.children.first()).cloned();
        let detail = detail.unwrap_or_default();
        // Where the type is missing, the element is named after it.
        let named = || detail.name.strip_suffix("Fault").unwrap_or(&detail.name).to_owned();
        let kind = detail.xsi_type.clone().unwrap_or_else(named);
        Self { kind, message: told(message), detail }
    }

    /// Of a `LocalizedMethodFault`: the error of a task, or the reason why a property is missing.
    pub fn of_method(fault: &Element) -> Self {
        let message = fault.text_of("localizedMessage").unwrap_or_default();
        let detail = fault.child("fault").cloned().unwrap_or_default();
        let kind = detail.xsi_type.clone().unwrap_or_default();
        Self { kind, message: told(message), detail }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.kind.as_str(), self.message.as_str()) {
            ("", "") => f.write_str("a fault without a name"),
            ("", message) => f.write_str(message),
            (kind, "") => f.write_str(kind),
            (kind, message) => write!(f, "{message} ({kind})"),
        }
    }
}

fn told(message: &str) -> String {
    let printable = |c: char| if c.is_control() { ' ' } else { c };
    message.trim().chars().take(MESSAGE_CHARS_MAX).map(printable).collect()
}
