//! Identifiers and validated names.
//!
//! Everything that travels through an event is named by one of these types, so a string that was not
//! checked cannot reach a path, a command line or the log.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Longest name in bytes: a snapshot's name becomes part of file names in tools around us (`NAME_MAX`).
pub const NAME_BYTES_MAX: usize = 255;

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Uuid);

        impl $name {
            /// Wraps a UUID that is already one of this kind.
            pub const fn from_uuid(uuid: Uuid) -> Self {
                Self(uuid)
            }

            /// The UUID itself.
            pub const fn as_uuid(&self) -> &Uuid {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.hyphenated().fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Uuid::try_parse(text).map(Self)
            }
        }
    };
}

uuid_id!(
    /// A domain (a virtual machine), for as long as it is registered.
    DomainId
);
uuid_id!(
    /// A snapshot; allocated when it is requested, so a request can already name it.
    SnapshotId
);
uuid_id!(
    /// One request carried through to its outcome; every event that it causes carries it.
    OperationId
);
uuid_id!(
    /// An event (UUIDv7).
    EventId
);

/// Why a name was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing there, or only blanks.
    #[error("a {what} must not be empty or blank")]
    Empty {
        /// What was being named.
        what: &'static str,
    },
    /// More than [`NAME_BYTES_MAX`] bytes.
    #[error("a {what} has at most {NAME_BYTES_MAX} bytes, this one has {bytes}")]
    TooLong {
        /// What was being named.
        what: &'static str,
        /// Its length.
        bytes: usize,
    },
    /// libvirt's rule (`qemuSnapshotCreateXMLValidateDef`): the name may become a file name.
    #[error("invalid {what} '{name}': name can't contain '/'")]
    Slash {
        /// What was being named.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// libvirt's rule for `.`; a leading `-` would read as an option.
    #[error("invalid {what} '{name}': name can't start with '{first}'")]
    Leading {
        /// What was being named.
        what: &'static str,
        /// The name.
        name: String,
        /// The character that it starts with.
        first: char,
    },
    /// Control characters break terminals, logs and line-based protocols.
    #[error("invalid {what} {name:?}: name can't contain control characters")]
    Control {
        /// What was being named.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// A name that looks like an id could not be told from one.
    #[error("invalid {what} '{name}': a name can't look like a UUID")]
    UuidLike {
        /// What was being named.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// Only the characters that the kind of name allows.
    #[error("invalid {what} '{name}': only {allowed}")]
    Alphabet {
        /// What was being named.
        what: &'static str,
        /// The name.
        name: String,
        /// What is allowed, in words.
        allowed: &'static str,
    },
}

/// A cut of the name that is fit for an error text.
fn shown(name: &str) -> String {
    name.chars().take(60).collect()
}

fn check_name(what: &'static str, name: &str) -> Result<(), NameError> {
    if name.trim().is_empty() {
        return Err(NameError::Empty { what });
    }
    if name.len() > NAME_BYTES_MAX {
        return Err(NameError::TooLong { what, bytes: name.len() });
    }
    if name.chars().any(char::is_control) {
        return Err(NameError::Control { what, name: shown(name) });
    }
    if name.contains('/') {
        return Err(NameError::Slash { what, name: shown(name) });
    }
    if let Some(first) = name.chars().next().filter(|c| matches!(c, '.' | '-')) {
        return Err(NameError::Leading { what, name: shown(name), first });
    }
    if Uuid::try_parse(name).is_ok() {
        return Err(NameError::UuidLike { what, name: shown(name) });
    }
    Ok(())
}

/// Whether a reader sees anything of `name`: not blanks, and not what Unicode has programs leave out (its property
/// `Default_Ignorable_Code_Point`: zero-width characters, controls of direction, tags) alone. The log may hold names from
/// before that was asked.
pub fn is_visible(name: &str) -> bool {
    let unseen = |c: char| {
        c.is_whitespace()
            || c.is_control()
            || matches!(c,
                '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}'..='\u{1160}' | '\u{17b4}'..='\u{17b5}'
                | '\u{180b}'..='\u{180f}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}' | '\u{2800}' | '\u{3164}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}'
                | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}' | '\u{1bca0}'..='\u{1bca3}'
                | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e0fff}')
    };
    !name.chars().all(unseen)
}

fn check_token(what: &'static str, name: &str) -> Result<(), NameError> {
    check_name(what, name)?;
    if !name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')) {
        return Err(NameError::Alphabet {
            what,
            name: shown(name),
            allowed: "ASCII letters, digits, '-', '_' and '.' are allowed",
        });
    }
    Ok(())
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal, $check:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Checks and wraps a name.
            ///
            /// # Errors
            /// [`NameError`] says which rule it breaks.
            pub fn new(name: impl Into<String>) -> Result<Self, NameError> {
                let name = name.into();
                $check($what, &name)?;
                Ok(Self(name))
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:?})"), self.0)
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::new(text)
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                Self::new(text)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }
    };
}

name!(
    /// A domain's name, unique among the registered domains.
    ///
    /// ```
    /// use snaptree_engine::DomainName;
    /// assert!(DomainName::new("web 1").is_ok());
    /// assert!(DomainName::new("a/b").is_err());
    /// ```
    DomainName, "domain name", check_name
);
name!(
    /// A snapshot's name, unique among the live snapshots of its domain.
    ///
    /// ```
    /// use snaptree_engine::SnapshotName;
    /// assert!(SnapshotName::new("before upgrade").is_ok());
    /// assert!(SnapshotName::new(".hidden").is_err());
    /// assert!(SnapshotName::new("-rf").is_err());
    /// assert!(SnapshotName::new("0190f7a4-9d4e-7cc0-8f3e-2b5f1c7a9d10").is_err());
    /// assert!(SnapshotName::new("x".repeat(300)).is_err());
    /// ```
    SnapshotName, "snapshot name", check_name
);
name!(
    /// A disk's target name in its domain, such as `vda`. It becomes part of file names.
    DiskName, "disk name", check_token
);
name!(
    /// A policy's name.
    PolicyName, "policy name", check_token
);
name!(
    /// A host's name: an ESXi or a vCenter.
    HostName, "host name", check_token
);
name!(
    /// The key of a label.
    LabelKey, "label key", check_token
);

/// One image file of a backing chain. The id is the file's stem: disk and operation id.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LayerId(String);

impl LayerId {
    /// The layer that `operation` makes (or adopts) for `disk`.
    pub fn new(disk: &DiskName, operation: OperationId) -> Self {
        Self(format!("{disk}-{operation}"))
    }

    /// The registered image of `disk`, which `operation` adopts; the same operation may put a layer upon it.
    pub fn adopted(disk: &DiskName, operation: OperationId) -> Self {
        Self(format!("{disk}-{operation}-base"))
    }

    /// The id as text, fit for a file name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The stream that an event belongs to: `domain/<uuid>`, `policy/<name>` or `system`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum StreamId {
    /// All that happens to one domain.
    Domain(DomainId),
    /// All that happens to one policy.
    Policy(PolicyName),
    /// What concerns the installation.
    System,
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Domain(id) => write!(f, "domain/{id}"),
            Self::Policy(name) => write!(f, "policy/{name}"),
            Self::System => f.write_str("system"),
        }
    }
}

/// A stream name that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no stream: expected domain/<uuid>, policy/<name> or system")]
pub struct StreamIdError(String);

impl FromStr for StreamId {
    type Err = StreamIdError;
    fn from_str(text: &str) -> Result<Self, StreamIdError> {
        let error = || StreamIdError(shown(text));
        match text.split_once('/') {
            None if text == "system" => Ok(Self::System),
            Some(("domain", id)) => id.parse().map(Self::Domain).map_err(|_| error()),
            Some(("policy", name)) => name.parse().map(Self::Policy).map_err(|_| error()),
            _ => Err(error()),
        }
    }
}

impl TryFrom<String> for StreamId {
    type Error = StreamIdError;
    fn try_from(text: String) -> Result<Self, StreamIdError> {
        text.parse()
    }
}

impl From<StreamId> for String {
    fn from(stream: StreamId) -> String {
        stream.to_string()
    }
}

/// Where new ids come from. UUIDv7 in production; a seeded one in the simulation.
pub trait IdSource: Send + Sync {
    /// The next UUID, unlike any before.
    fn next(&self) -> Uuid;
}

/// UUIDv7 from the clock and the operating system's randomness.
#[derive(Clone, Copy, Debug, Default)]
pub struct UuidV7;

impl IdSource for UuidV7 {
    fn next(&self) -> Uuid {
        Uuid::now_v7()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_libvirts_rules_and_ours() {
        for good in ["a", "before upgrade", "1795401658", "ä-ö", "a.b", "x=1"] {
            assert!(SnapshotName::new(good).is_ok(), "{good:?}");
        }
        let uuid = Uuid::now_v7();
        for bad in
            ["", "  ", "a/b", ".x", "-x", "a\nb", "a\u{7f}", &uuid.to_string(), &uuid.simple().to_string()]
        {
            assert!(SnapshotName::new(bad).is_err(), "{bad:?}");
        }
        assert!(SnapshotName::new("x".repeat(NAME_BYTES_MAX)).is_ok());
        assert!(SnapshotName::new("x".repeat(NAME_BYTES_MAX + 1)).is_err());
    }

    #[test]
    fn a_name_of_which_nothing_is_seen_is_invisible() {
        for unseen in ["\u{200b}", "\u{202e}\u{2066}", "\u{feff} \u{a0}", "\u{e0041}", "\u{ad}"] {
            assert!(!is_visible(unseen), "{unseen:?}");
        }
        for seen in ["a", "\u{200b}a", "ä", "\u{1f980}", "\u{94d}"] {
            assert!(is_visible(seen), "{seen:?}");
        }
    }

    #[test]
    fn disk_names_are_tokens() {
        assert!(DiskName::new("vda").is_ok());
        assert!(DiskName::new("v da").is_err());
    }

    #[test]
    fn stream_ids_read_back() {
        let id = DomainId::from_uuid(Uuid::now_v7());
        for stream in
            [StreamId::Domain(id), StreamId::Policy(PolicyName::new("hourly").unwrap()), StreamId::System]
        {
            assert_eq!(stream.to_string().parse::<StreamId>().unwrap(), stream);
        }
        assert!("domain/x".parse::<StreamId>().is_err());
    }
}
