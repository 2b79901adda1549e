//! Values of a policy file that are more than text.

use std::fmt;
use std::str::FromStr;

use globset::{GlobBuilder, GlobMatcher};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};
use snaptree_engine::{DomainName, NameError, PolicyName, SnapshotName};

use snaptree_engine::near::nearest;

/// The longest glob, in bytes.
const GLOB_BYTES_MAX: usize = 256;

/// The longest address of a webhook, in bytes.
const WEBHOOK_BYTES_MAX: usize = 2_048;

/// A value that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ValueError(String);

macro_rules! text_value {
    ($name:ident) => {
        impl PartialEq for $name {
            fn eq(&self, other: &Self) -> bool {
                self.text == other.text
            }
        }

        impl Eq for $name {}

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.text)
            }
        }

        impl TryFrom<String> for $name {
            type Error = ValueError;
            fn try_from(text: String) -> Result<Self, ValueError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(value: $name) -> String {
                value.text
            }
        }
    };
}

/// A glob on domain names: `*`, `?`, `[a-z]`, `{a,b}`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DomainGlob {
    text: String,
    matcher: GlobMatcher,
}
text_value!(DomainGlob);

impl DomainGlob {
    /// Whether it matches the whole name.
    pub fn matches(&self, name: &DomainName) -> bool {
        self.matcher.is_match(name.as_str())
    }
}

impl FromStr for DomainGlob {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        if text.is_empty() || text.len() > GLOB_BYTES_MAX {
            return Err(ValueError(format!("a glob has from 1 to {GLOB_BYTES_MAX} bytes")));
        }
        let glob = GlobBuilder::new(text).backslash_escape(true).build();
        let glob = glob.map_err(|error| ValueError(format!("'{text}' is no glob: {}", error.kind())))?;
        Ok(Self { text: text.to_owned(), matcher: glob.compile_matcher() })
    }
}

/// A time zone by its IANA name.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TimeZoneName {
    text: String,
    zone: TimeZone,
}
text_value!(TimeZoneName);

impl TimeZoneName {
    /// The time zone.
    pub fn zone(&self) -> &TimeZone {
        &self.zone
    }
}

impl Default for TimeZoneName {
    fn default() -> Self {
        Self { text: "UTC".to_owned(), zone: TimeZone::UTC }
    }
}

impl FromStr for TimeZoneName {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let text: String = text.chars().take(100).collect();
        let zone = TimeZone::get(&text).map_err(|_| {
            ValueError(format!("there is no time zone '{text}'; write one such as Europe/Vienna or UTC"))
        })?;
        Ok(Self { text, zone })
    }
}

/// The address that a notification is sent to by POST.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Webhook {
    text: String,
}
text_value!(Webhook);

impl FromStr for Webhook {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
        let host = rest.and_then(|rest| rest.split('/').next()).unwrap_or_default();
        let plain = text.len() <= WEBHOOK_BYTES_MAX && text.bytes().all(|byte| byte.is_ascii_graphic());
        if host.is_empty() || !plain {
            return Err(ValueError(
                "a webhook is an address that begins with https:// or http://".to_owned(),
            ));
        }
        if host.contains('@') {
            return Err(ValueError(
                "a webhook's address has no user and password: the policy is logged".to_owned(),
            ));
        }
        Ok(Self { text: text.to_owned() })
    }
}

const PLACEHOLDERS: [&str; 3] = ["policy", "domain", "time"];

#[derive(Clone, Debug)]
enum Piece {
    Text(String),
    Policy,
    Domain,
    Time,
}

/// How a policy names its snapshots.
///
/// ```
/// use snaptree_policies::file::NameTemplate;
/// let template: NameTemplate = "{policy}-{time}".parse().unwrap();
/// let name = template
///     .name(&"hourly".parse().unwrap(), &"web".parse().unwrap(), "2026-11-23T02:15:00Z".parse().unwrap())
///     .unwrap();
/// assert_eq!(name.as_str(), "hourly-20261123T021500Z");
/// assert!("{policy}".parse::<NameTemplate>().is_err(), "the second run would find the name taken");
/// ```
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NameTemplate {
    text: String,
    pieces: Vec<Piece>,
}
text_value!(NameTemplate);

impl NameTemplate {
    /// The name of the snapshot that `policy` takes of `domain` for the planned instant `at`; the time is in UTC.
    ///
    /// # Errors
    /// It is no name for a snapshot: too long, with a long domain name.
    pub fn name(
        &self,
        policy: &PolicyName,
        domain: &DomainName,
        at: Timestamp,
    ) -> Result<SnapshotName, NameError> {
        let mut name = String::new();
        for piece in &self.pieces {
            match piece {
                Piece::Text(text) => name.push_str(text),
                Piece::Policy => name.push_str(policy.as_str()),
                Piece::Domain => name.push_str(domain.as_str()),
                Piece::Time => name.push_str(&at.strftime("%Y%m%dT%H%M%SZ").to_string()),
            }
        }
        SnapshotName::new(name)
    }
}

impl Default for NameTemplate {
    fn default() -> Self {
        let pieces = vec![Piece::Policy, Piece::Text("-".to_owned()), Piece::Time];
        Self { text: "{policy}-{time}".to_owned(), pieces }
    }
}

impl FromStr for NameTemplate {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let mut pieces = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('{') {
            let (name, tail) =
                after.split_once('}').ok_or_else(|| ValueError("a '{' has no '}'".to_owned()))?;
            pieces.push(Piece::Text(before.to_owned()));
            pieces.push(match name {
                "policy" => Piece::Policy,
                "domain" => Piece::Domain,
                "time" => Piece::Time,
                other => return Err(ValueError(no_placeholder(other))),
            });
            rest = tail;
        }
        pieces.push(Piece::Text(rest.to_owned()));
        if pieces.iter().any(|piece| matches!(piece, Piece::Text(text) if text.contains('}'))) {
            return Err(ValueError("a '}' has no '{'".to_owned()));
        }
        if !pieces.iter().any(|piece| matches!(piece, Piece::Time)) {
            return Err(ValueError(
                "{time} must be in it: without it every run would give the same name".to_owned(),
            ));
        }
        let template = Self { text: text.to_owned(), pieces };
        let sample = |name: &str| -> Result<SnapshotName, NameError> {
            template.name(&PolicyName::new(name)?, &DomainName::new(name)?, Timestamp::UNIX_EPOCH)
        };
        sample("x").map_err(|error| ValueError(error.to_string()))?;
        Ok(template)
    }
}

fn no_placeholder(given: &str) -> String {
    let given: String = given.chars().take(60).collect();
    match nearest(&given, PLACEHOLDERS) {
        Some(near) => format!("there is no {{{given}}}; did you mean {{{near}}}?"),
        None => format!("there is no {{{given}}}; there are {{policy}}, {{domain}} and {{time}}"),
    }
}
