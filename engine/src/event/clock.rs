//! What happens to the machine's clock, as far as policies go by it. It is in the stream of the installation.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// For how long a machine has been up: a clock that nobody sets, and that begins anew with each boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uptime {
    /// The boot: the kernel's random id of it.
    pub boot: Uuid,
    /// Milliseconds since then, sleep included.
    pub ms: u64,
}

/// Payload: the clock does not go on from where it was. What policies delete is held back from here on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClockLeapt {
    /// What it should have shown, at the latest if it went forward.
    pub from: Timestamp,
    /// What it showed.
    pub to: Timestamp,
    /// For how long the machine had been up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uptime: Option<Uptime>,
}

/// Who believes the clock again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClockWitness {
    /// Somebody said that it is right.
    Person,
    /// It has gone on without a leap for long enough.
    Time,
}

/// Payload: the clock is believed again, and policies delete again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClockConfirmed {
    /// Who says so.
    pub by: ClockWitness,
    /// For how long the machine had been up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uptime: Option<Uptime>,
}
