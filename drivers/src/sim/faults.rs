//! Faults on demand: what can go wrong with a step, and who says when.

use async_trait::async_trait;
use jiff::SignedDuration;
use snaptree_engine::driver::{DriverError, ErrorClass};
use snaptree_engine::operation::{Code, Reversal};
use snaptree_engine::{DomainId, OperationId};

/// What goes wrong with a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fault {
    /// It is refused before it has any effect, and may work the next time.
    Transient,
    /// It is refused before it has any effect, since somebody else is at it.
    Busy,
    /// It is refused before it has any effect, and always will be.
    Permanent,
    /// It takes effect, and the answer never comes.
    LostReply,
    /// The first of its effects takes place, and then the connection is gone. A step with one effect has none then.
    HalfDone,
    /// The connection is gone, and the step takes effect later: when it is waited for, or before the next step.
    GoesOn,
    /// The connection is gone, and nothing ever happens.
    Hang,
}

impl Fault {
    /// Every fault.
    pub const ALL: [Self; 7] = [
        Self::Transient,
        Self::Busy,
        Self::Permanent,
        Self::LostReply,
        Self::HalfDone,
        Self::GoesOn,
        Self::Hang,
    ];

    /// The word in tables.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Transient => "transient",
            Self::Busy => "busy",
            Self::Permanent => "permanent",
            Self::LostReply => "lost-reply",
            Self::HalfDone => "half-done",
            Self::GoesOn => "goes-on",
            Self::Hang => "hang",
        }
    }

    /// What the caller is told.
    pub(super) fn error(self) -> DriverError {
        let (class, code) = match self {
            Self::Transient => (ErrorClass::Transient, Code::Io),
            Self::Busy => (ErrorClass::Busy, Code::InUse),
            Self::Permanent => (ErrorClass::Permanent, Code::Io),
            Self::LostReply | Self::HalfDone | Self::GoesOn | Self::Hang => {
                (ErrorClass::Unknown, Code::Timeout)
            }
        };
        DriverError::new(class, code, format!("{INJECTED} {}", self.as_str()))
    }
}

/// How the message of a fault on demand begins.
pub const INJECTED: &str = "a fault on demand:";

/// Whether a step is done or taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// It is done.
    Forward,
    /// It is taken back.
    Back,
}

/// A step that is about to be done or taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultPoint {
    /// Whose.
    pub domain: DomainId,
    /// In which operation.
    pub operation: OperationId,
    /// Its index in the plan.
    pub step: usize,
    /// What kind of step: `create`, `switch`, `pull`, ...
    pub word: &'static str,
    /// Whether it can be taken back.
    pub reversal: Reversal,
    /// Which way it goes.
    pub direction: Direction,
}

/// Says what goes wrong, and how long everything takes.
///
/// A step that is taken back knows only [`Fault::Transient`], [`Fault::LostReply`] and [`Fault::Hang`]; what else is
/// asked for there is a `Hang`.
#[async_trait]
pub trait Faults: Send + Sync {
    /// What goes wrong with this step, this time.
    fn fault(&self, point: &FaultPoint) -> Option<Fault>;

    /// How far the host's own clock, by which it dates snapshots, is from ours.
    fn clock_off(&self) -> SignedDuration {
        SignedDuration::ZERO
    }

    /// Returns when the step's time is up; by the clock of whoever wrote it.
    async fn latency(&self, _point: &FaultPoint) {}
}

/// Nothing goes wrong, and nothing takes time.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoFaults;

#[async_trait]
impl Faults for NoFaults {
    fn fault(&self, _point: &FaultPoint) -> Option<Fault> {
        None
    }
}
