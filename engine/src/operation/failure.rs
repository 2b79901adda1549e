//! Why something is not done.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What kind of trouble it is; stable words for JSON and exit codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// Somebody has the image or the machine open.
    InUse,
    /// The driver or the domain cannot do this.
    Unsupported,
    /// A hold forbids it.
    Held,
    /// What was named is not there.
    NotFound,
    /// The name is taken.
    Exists,
    /// The request contradicts the state, or itself.
    Invalid,
    /// The file system is full, or would be.
    NoSpace,
    /// The operating system does not allow it.
    Permission,
    /// What is on disk is not what the log says, and no operation explains it.
    Drift,
    /// An image is damaged, or not what it should be.
    BadImage,
    /// A tool or the operating system failed.
    Io,
    /// It took too long; what became of it is not known.
    Timeout,
    /// The request was called off.
    Cancelled,
    /// Its first step came too late.
    Expired,
    /// Another operation has to be looked at first.
    NeedsAttention,
}

impl Code {
    /// Whether the reason may be gone by itself, or by what somebody did outside of Snaptree: a file system that was
    /// read-only, full or away, a machine that had the image. What else keeps an operation needs a person's judgement.
    pub const fn may_pass(self) -> bool {
        match self {
            Self::InUse | Self::NotFound | Self::NoSpace | Self::Permission | Self::Io | Self::Timeout => {
                true
            }
            Self::Unsupported
            | Self::Held
            | Self::Exists
            | Self::Invalid
            | Self::Drift
            | Self::BadImage
            | Self::Cancelled
            | Self::Expired
            | Self::NeedsAttention => false,
        }
    }

    /// The word in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::InUse => "in-use",
            Self::Unsupported => "unsupported",
            Self::Held => "held",
            Self::NotFound => "not-found",
            Self::Exists => "exists",
            Self::Invalid => "invalid",
            Self::NoSpace => "no-space",
            Self::Permission => "permission",
            Self::Drift => "drift",
            Self::BadImage => "bad-image",
            Self::Io => "io",
            Self::Timeout => "timeout",
            Self::Cancelled => "cancelled",
            Self::Expired => "expired",
            Self::NeedsAttention => "needs-attention",
        }
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// What went wrong, in words for people and one for programs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// The kind of trouble.
    pub code: Code,
    /// What happened, and why.
    pub message: String,
    /// What can be done about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Whether it was found before anything was touched.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub refused: bool,
}

impl Failure {
    /// Something failed.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None, refused: false }
    }

    /// Adds what can be done about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Marks it as found before anything was touched.
    #[must_use]
    pub fn refused(mut self) -> Self {
        self.refused = true;
        self
    }
}
