//! Who asks, and where from.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::ids::PolicyName;

/// Who asked: `user:<name>`, `policy:<name>` or `engine`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Actor {
    /// A person, by the name of the account.
    User(String),
    /// A policy's run.
    Policy(PolicyName),
    /// Snaptree itself.
    Engine,
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User(name) => write!(f, "user:{name}"),
            Self::Policy(name) => write!(f, "policy:{name}"),
            Self::Engine => f.write_str("engine"),
        }
    }
}

/// An actor's name that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no actor: expected user:<name>, policy:<name> or engine")]
pub struct ActorError(String);

impl FromStr for Actor {
    type Err = ActorError;
    fn from_str(text: &str) -> Result<Self, ActorError> {
        match text.split_once(':') {
            None if text == "engine" => Ok(Self::Engine),
            Some(("user", name)) if !name.is_empty() && !name.chars().any(char::is_control) => {
                Ok(Self::User(name.to_owned()))
            }
            Some(("policy", name)) => {
                name.parse().map(Self::Policy).map_err(|_| ActorError(text.chars().take(60).collect()))
            }
            _ => Err(ActorError(text.chars().take(60).collect())),
        }
    }
}

impl TryFrom<String> for Actor {
    type Error = ActorError;
    fn try_from(text: String) -> Result<Self, ActorError> {
        text.parse()
    }
}

impl From<Actor> for String {
    fn from(actor: Actor) -> String {
        actor.to_string()
    }
}

/// Where a request came from, as the kernel vouches for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The login uid, or the uid of the socket's peer.
    pub uid: u32,
    /// The host's name.
    pub host: String,
    /// The process.
    pub pid: u32,
    /// The way in: `cli`, `socket`, `http`, `engine`.
    pub via: String,
    /// What `SUDO_USER` claims; only a claim.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sudo_user: Option<String>,
}
