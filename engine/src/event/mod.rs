//! What happened: the whole vocabulary of the log.
//!
//! An event is stored as its kind (`Snapshot.CreateRequested`), the version of the kind's payload, and the
//! payload as JSON. Old payloads are upcast in [`Event::decode`]; what is stored is never rewritten.

mod actor;
mod clock;
mod domain;
mod merge;
mod operation;
mod policy;
mod snapshot;
mod system;
mod wish;

use std::fmt;

use jiff::Timestamp;
use serde::de::Error as _;

use crate::ids::{EventId, OperationId, StreamId};

pub use actor::*;
pub use clock::*;
pub use domain::*;
pub use merge::*;
pub use operation::*;
pub use policy::*;
pub use snapshot::*;
pub use system::*;
pub use wish::*;

/// Defines [`Event`] and its coding from one table: variant, kind, version of the payload.
macro_rules! events {
    ($($(#[$doc:meta])* $variant:ident = $kind:literal $schema:literal,)*) => {
        /// One thing that happened.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Event {
            $($(#[$doc])* $variant($variant),)*
        }

        $(impl From<$variant> for Event {
            fn from(payload: $variant) -> Self {
                Self::$variant(payload)
            }
        })*

        impl Event {
            /// Every kind, in the order of the vocabulary.
            pub const KINDS: &'static [&'static str] = &[$($kind),*];

            /// The name under which it is stored.
            pub const fn kind(&self) -> &'static str {
                match self {
                    $(Self::$variant(_) => $kind,)*
                }
            }

            /// The version of the kind's payload that [`Event::encode`] writes.
            pub const fn schema(&self) -> u32 {
                match self {
                    $(Self::$variant(_) => $schema,)*
                }
            }

            /// The payload as JSON text.
            ///
            /// # Errors
            /// None of our payloads fails to serialize; the error is serde_json's.
            pub fn encode(&self) -> Result<String, serde_json::Error> {
                match self {
                    $(Self::$variant(payload) => serde_json::to_string(payload),)*
                }
            }

            /// Reads a stored payload, upcasting it if it is an old one.
            ///
            /// # Errors
            /// An unknown kind, a newer schema than this program's, or a payload that is not of the kind's shape.
            pub fn decode(kind: &str, schema: u32, data: &str) -> Result<Self, serde_json::Error> {
                match kind {
                    $($kind if schema == $schema => serde_json::from_str(data).map(Self::$variant),)*
                    _ => Err(serde_json::Error::custom(format!(
                        "unknown event kind '{kind}' with schema {schema}: was the log written by a newer snaptree?"
                    ))),
                }
            }
        }
    };
}

events! {
    /// A domain is Snaptree's to look after.
    DomainRegistered = "Domain.Registered" 1,
    /// Name, labels or configuration changed.
    DomainChanged = "Domain.Changed" 1,
    /// Something that the hypervisor had left broken was put right.
    DomainRepaired = "Domain.Repaired" 1,
    /// Its end was asked for.
    DomainUnregisterRequested = "Domain.UnregisterRequested" 1,
    /// Snaptree has let go of it.
    DomainUnregistered = "Domain.Unregistered" 1,
    /// A snapshot was asked for.
    SnapshotCreateRequested = "Snapshot.CreateRequested" 1,
    /// It exists.
    SnapshotCreated = "Snapshot.Created" 1,
    /// A revert was asked for.
    SnapshotRevertRequested = "Snapshot.RevertRequested" 1,
    /// The machine is at that snapshot.
    SnapshotReverted = "Snapshot.Reverted" 1,
    /// A delete was asked for.
    SnapshotDeleteRequested = "Snapshot.DeleteRequested" 1,
    /// One snapshot is gone; its data is poisoned from here on.
    SnapshotDeleted = "Snapshot.Deleted" 1,
    /// A change of what the hypervisor keeps about a snapshot was asked for.
    SnapshotEditRequested = "Snapshot.EditRequested" 1,
    /// Name, description or labels changed.
    SnapshotEdited = "Snapshot.Edited" 1,
    /// Its deletion is forbidden.
    SnapshotHeld = "Snapshot.Held" 1,
    /// Its deletion is allowed again.
    SnapshotReleased = "Snapshot.Released" 1,
    /// A snapshot that somebody else made is looked after from now on.
    SnapshotAdopted = "Snapshot.Adopted" 1,
    /// The steps are known; nothing was touched yet.
    OperationPlanned = "Operation.Planned" 1,
    /// The driver is about to be asked for a step.
    OperationStepStarted = "Operation.StepStarted" 1,
    /// A step is done, and on disk.
    OperationStepFinished = "Operation.StepFinished" 1,
    /// A step is about to be undone.
    OperationUndoStarted = "Operation.UndoStarted" 1,
    /// It is undone.
    OperationUndoFinished = "Operation.UndoFinished" 1,
    /// A program before or after is about to be run.
    OperationHookStarted = "Operation.HookStarted" 1,
    /// It has ended.
    OperationHookFinished = "Operation.HookFinished" 1,
    /// A step did not come to its end this time.
    OperationAttemptFailed = "Operation.AttemptFailed" 1,
    /// Outcome: done.
    OperationSucceeded = "Operation.Succeeded" 1,
    /// Outcome: not done, and the domain is as it was.
    OperationFailed = "Operation.Failed" 1,
    /// Outcome: called off, and the domain is as it was.
    OperationCancelled = "Operation.Cancelled" 1,
    /// Outcome: too late, and the domain is as it was.
    OperationExpired = "Operation.Expired" 1,
    /// It can go neither on nor back by itself.
    OperationNeedsAttention = "Operation.NeedsAttention" 1,
    /// Someone let it try again.
    OperationRetried = "Operation.Retried" 1,
    /// Someone said what became of the step that could not be made out.
    OperationResolved = "Operation.Resolved" 1,
    /// The request of a merge: Snaptree's own.
    MergeStarted = "Merge.Started" 1,
    /// The tombstones are folded away.
    MergeFinished = "Merge.Finished" 1,
    /// Tombstones stay for now, and why.
    MergeDeferred = "Merge.Deferred" 1,
    /// The hypervisor and the log disagree.
    DriftFound = "Drift.Found" 1,
    /// They agree again.
    DriftCleared = "Drift.Cleared" 1,
    /// A policy is as it says from here on.
    PolicyDefined = "Policy.Defined" 1,
    /// It ends.
    PolicyRemoved = "Policy.Removed" 1,
    /// It does not run until it is resumed.
    PolicySuspended = "Policy.Suspended" 1,
    /// It runs again.
    PolicyResumed = "Policy.Resumed" 1,
    /// It ran: the requests that it made are in the same append.
    PolicyFired = "Policy.Fired" 1,
    /// Planned instants were passed over.
    PolicySkipped = "Policy.Skipped" 1,
    /// The clock leapt: policies delete nothing that they need not.
    ClockLeapt = "Clock.Leapt" 1,
    /// It is believed again.
    ClockConfirmed = "Clock.Confirmed" 1,
    /// A host is spoken to as it says from here on.
    HostAdded = "Host.Added" 1,
    /// It is not any more.
    HostRemoved = "Host.Removed" 1,
    /// A state directory was made.
    SystemOpened = "System.Opened" 1,
    /// The log was older than what is kept beside the layers, and took that over.
    SystemRestored = "System.Restored" 1,
    /// A stored projection of the stream is as this says.
    CheckpointKept = "Checkpoint.Kept" 1,
    /// The end of a step was not known, and was made out. It is in the stream of the operation's domain.
    SystemRecovered = "System.Recovered" 1,
}

/// An event that has its place in the log.
#[derive(Clone, Debug, PartialEq)]
pub struct Envelope {
    /// Its place in the whole log, from 1, without gaps.
    pub seq: u64,
    /// Its id.
    pub id: EventId,
    /// Whose history it is part of.
    pub stream: StreamId,
    /// Its place in the stream, from 1, without gaps.
    pub version: u64,
    /// When it was appended (UTC, whole microseconds).
    pub at: Timestamp,
    /// Who caused it.
    pub actor: Actor,
    /// Where the request came from.
    pub origin: Origin,
    /// Which owner of the state directory wrote it.
    pub epoch: u64,
    /// The operation that it belongs to.
    pub operation: Option<OperationId>,
    /// The event that caused it.
    pub cause: Option<u64>,
    /// The key that makes the request idempotent.
    pub key: Option<String>,
    /// What happened.
    pub event: Event,
    /// The hash over all of it and everything before.
    pub hash: Hash,
}

/// A SHA-256 of the chain.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Hash(pub [u8; 32]);

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hash({self})")
    }
}
