//! What happened: the whole vocabulary of the log.
//!
//! An event is stored as its kind (`Snapshot.CreateRequested`), the version of the kind's payload, and the
//! payload as JSON. Old payloads are upcast in [`Event::decode`]; what is stored is never rewritten.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use serde::de::Error as _;
use serde::{Deserialize, Serialize};

use crate::around::{Around, HookPhase};
use crate::domain::{Domain, DriverKind, RunState};
use crate::ids::{
    DiskName, DomainId, DomainName, EventId, HostName, OperationId, PolicyName, SnapshotId, SnapshotName,
    StreamId,
};
use crate::layer::{LayerChange, LayerGraph};
use crate::operation::{Code, Failure, Operation, Step, Verdict};
use crate::reconcile::drift::Finding;
use crate::reconcile::merge::MergePlan;
use crate::tree::{Hold, Labels, Snapshot, SnapshotState, Tree};

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

/// Whether and where a snapshot keeps the machine's memory (libvirt's `memory/@snapshot`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryKind {
    /// Not kept.
    No,
    /// Inside the image.
    Internal,
    /// In a file of its own.
    External,
}

/// Where a snapshot keeps what it holds (libvirt's `disk/@snapshot`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// Where the driver usually does.
    #[default]
    Usual,
    /// Inside the disk images.
    Internal,
}

impl Place {
    /// For what is not written down.
    pub fn is_usual(&self) -> bool {
        *self == Self::Usual
    }
}

/// What a delete takes besides, or instead of, the snapshots named.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeleteScope {
    /// The snapshots named; their changes merge into the children.
    #[default]
    Named,
    /// And all their descendants.
    Children,
    /// All their descendants, but not themselves.
    ChildrenOnly,
}

/// When the data of a deleted snapshot is to be folded away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MergeWish {
    /// As the settings say.
    #[default]
    Auto,
    /// Now, whatever has to be copied.
    Now,
    /// Later.
    Defer,
}

/// Whether a delete touches the data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeleteWhat {
    /// The snapshot and its data.
    #[default]
    Snapshot,
    /// Only what Snaptree knows of it.
    Metadata,
}

/// What becomes of the data of a domain that is unregistered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UnregisterWish {
    /// Nothing was made that would have to be put back.
    Untouched,
    /// One plain image is put back at the registered path; the snapshots end.
    Flatten,
    /// All files stay as they are.
    KeepLayers,
}

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
    /// A host is spoken to as it says from here on.
    HostAdded = "Host.Added" 1,
    /// It is not any more.
    HostRemoved = "Host.Removed" 1,
    /// A state directory was made.
    SystemOpened = "System.Opened" 1,
    /// The log was older than what is kept beside the layers, and took that over.
    SystemRestored = "System.Restored" 1,
    /// The end of a step was not known, and was made out. It is in the stream of the operation's domain.
    SystemRecovered = "System.Recovered" 1,
}

/// Payload: a domain was registered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DomainRegistered {
    /// All of it.
    pub domain: Domain,
}

/// Payload: what of a domain changed; what is left out stayed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DomainChanged {
    /// The new name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<DomainName>,
    /// All labels that it has from now on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<Labels>,
}

/// Payload: something that the hypervisor had left broken was put right.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DomainRepaired {
    /// What was broken, and what was done about it, in words.
    pub what: String,
}

/// Payload: a domain's end was asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DomainUnregisterRequested {
    /// What becomes of its data.
    pub wish: UnregisterWish,
    /// Idempotency.
    #[serde(flatten)]
    pub request: RequestTerms,
}

/// Payload: a domain is no longer registered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DomainUnregistered {
    /// What became of its data.
    pub wish: UnregisterWish,
    /// Files of Snaptree's that stay, and are nobody's from now on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left: Vec<std::path::PathBuf>,
}

/// What goes with a request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestTerms {
    /// The SHA-256 (hex) of the command that a key was given with; none without a key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command_sha256: Option<String>,
    /// The moment after which the first step must not begin; none for whenever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Timestamp>,
    /// Programs to be run before and after.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub around: Option<Around>,
}

impl RequestTerms {
    /// The same for a request that may begin whenever, with nothing around it.
    pub(crate) fn whenever(&self) -> Self {
        Self { deadline: None, around: None, ..self.clone() }
    }
}

/// Payload: a snapshot was asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotCreateRequested {
    /// The id that it will have.
    pub snapshot: SnapshotId,
    /// Its name.
    pub name: SnapshotName,
    /// What the user wrote about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Labels.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// The disks that it is to hold.
    pub disks: BTreeSet<DiskName>,
    /// Whether the machine's memory belongs to it.
    pub memory: MemoryKind,
    /// Where it is kept.
    #[serde(default, skip_serializing_if = "Place::is_usual")]
    pub place: Place,
    /// Whether the guest is asked to bring its file systems to rest first.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub quiesce: bool,
    /// Whether it keeps what a revert gives up. The memory belongs to it then only if the machine has any.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub before_revert: bool,
    /// Idempotency.
    #[serde(flatten)]
    pub request: RequestTerms,
}

impl SnapshotCreateRequested {
    /// The snapshot as it will be, as far as the request says.
    pub(crate) fn predicted(&self, operation: &Operation) -> Snapshot {
        Snapshot {
            id: self.snapshot,
            name: self.name.clone(),
            description: self.description.clone(),
            parent: None,
            created: operation.learnt.taken.unwrap_or(operation.requested),
            state: operation.learnt.state.unwrap_or(SnapshotState::Shutoff),
            memory: self.memory,
            disks: self.disks.clone(),
            labels: self.labels.clone(),
            hold: None,
            made_by: operation.actor.clone(),
            made_in: Some(operation.id),
            lost: false,
            native: operation.learnt.native.clone(),
        }
    }
}

/// Payload: a snapshot exists. It holds what became known while it was taken.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotCreated {
    /// All of it; the projector sets its parent to the snapshot that was current.
    #[serde(flatten)]
    pub snapshot: Snapshot,
}

/// Payload: a revert was asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotRevertRequested {
    /// Where to.
    pub snapshot: SnapshotId,
    /// The run state asked for; none for the one that the snapshot has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_state: Option<RunState>,
    /// The snapshot that keeps what is given up, asked for together with this: without it nothing is reverted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep: Option<SnapshotId>,
    /// Idempotency.
    #[serde(flatten)]
    pub request: RequestTerms,
}

/// Payload: the machine is at that snapshot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotReverted {
    /// Which one.
    pub snapshot: SnapshotId,
}

/// Payload: a delete was asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotDeleteRequested {
    /// Every snapshot that goes, children before their parents.
    pub snapshots: Vec<SnapshotId>,
    /// The ones that were named.
    pub named: Vec<SnapshotId>,
    /// How the named ones were meant.
    pub scope: DeleteScope,
    /// Whether the data goes too.
    pub what: DeleteWhat,
    /// When the data is to be folded away.
    pub merge: MergeWish,
    /// Why; a policy's reasons.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reasons: Vec<String>,
    /// Idempotency.
    #[serde(flatten)]
    pub request: RequestTerms,
}

/// Payload: one snapshot is gone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotDeleted {
    /// Which one.
    pub snapshot: SnapshotId,
    /// The name that it had, for whoever reads the log alone.
    pub name: SnapshotName,
    /// Whether the hypervisor may still hold its data, as it merges it later.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stays: bool,
}

/// Payload: a change of what the hypervisor keeps about a snapshot was asked for; what is left out stays.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotEditRequested {
    /// What is to be.
    #[serde(flatten)]
    pub edit: SnapshotEdited,
    /// Idempotency.
    #[serde(flatten)]
    pub request: RequestTerms,
}

/// Payload: what of a snapshot changed; what is left out stayed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotEdited {
    /// Which one.
    pub snapshot: SnapshotId,
    /// The new name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<SnapshotName>,
    /// The new description; an empty one removes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// All labels that it has from now on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<Labels>,
}

impl SnapshotEdited {
    /// Writes the change into a snapshot.
    pub(crate) fn apply(&self, snapshot: &mut Snapshot) {
        if let Some(name) = &self.name {
            snapshot.name = name.clone();
        }
        if let Some(description) = &self.description {
            snapshot.description = Some(description.clone()).filter(|text| !text.is_empty());
        }
        if let Some(labels) = &self.labels {
            snapshot.labels.clone_from(labels);
        }
    }
}

/// Payload: a snapshot is held.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotHeld {
    /// Which one.
    pub snapshot: SnapshotId,
    /// The hold; it takes the place of an earlier one.
    pub hold: Hold,
}

/// Payload: a snapshot is held no longer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotReleased {
    /// Which one.
    pub snapshot: SnapshotId,
}

/// Payload: an operation's steps are known.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperationPlanned {
    /// In the order in which they will be done.
    pub steps: Vec<Step>,
}

/// Payload: a step is about to be done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperationStepStarted {
    /// Its index in the plan.
    pub step: usize,
}

/// How a step was found to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HowFinished {
    /// The driver did it and said so.
    Executed,
    /// An observation after an interruption showed that it had been done.
    Observed,
}

/// Payload: a step is done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperationStepFinished {
    /// Its index in the plan.
    pub step: usize,
    /// How that is known.
    pub how: HowFinished,
    /// What of the layer graph changed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub changes: Vec<LayerChange>,
    /// What else the driver learnt.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub learnt: serde_json::Value,
}

/// Payload: a step is about to be undone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperationUndoStarted {
    /// Its index in the plan.
    pub step: usize,
    /// Why the operation goes back.
    pub failure: Failure,
}

/// Payload: a step is undone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperationUndoFinished {
    /// Its index in the plan.
    pub step: usize,
    /// What of the layer graph changed back.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub changes: Vec<LayerChange>,
}

/// Payload: a program before or after is about to be run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperationHookStarted {
    /// Which of the two.
    pub hook: HookPhase,
}

/// Payload: a program before or after has ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperationHookFinished {
    /// Which of the two.
    pub hook: HookPhase,
    /// What went wrong, with the end of what it wrote; none if it ended well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
}

/// Why a step is tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RetryKind {
    /// It failed, and may work the next time; the tries are counted.
    Failed,
    /// Somebody else was at it; waiting does not count.
    Busy,
}

/// Payload: a step did not come to its end this time; it is tried again at `retry_at`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperationAttemptFailed {
    /// Its index in the plan.
    pub step: usize,
    /// What went wrong.
    pub failure: Failure,
    /// Whether this try counts.
    pub kind: RetryKind,
    /// Not before this.
    pub retry_at: Timestamp,
}

/// Payload: outcome.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperationSucceeded {}

/// Payload: outcome.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperationFailed {
    /// Why.
    pub failure: Failure,
}

/// Payload: outcome.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperationCancelled {
    /// Who or what called it off.
    pub failure: Failure,
}

/// Payload: outcome.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperationExpired {
    /// The deadline, and when it was missed.
    pub failure: Failure,
}

/// Payload: neither on nor back.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperationNeedsAttention {
    /// What stands in the way.
    pub failure: Failure,
}

/// Payload: an operation that needed attention may try again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperationRetried {}

/// Payload: what someone who looked said.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperationResolved {
    /// What became of the step in hand.
    pub verdict: Verdict,
    /// Why that is known.
    pub reason: String,
    /// What of the layer graph changed with it, as far as an observation tells.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub changes: Vec<LayerChange>,
}

impl OperationResolved {
    /// What the operation ends with, if it was abandoned.
    pub fn abandoned(&self) -> Option<Failure> {
        let failure = || Failure::new(Code::NeedsAttention, format!("abandoned: {}", self.reason));
        (self.verdict == Verdict::Abandon).then(failure)
    }
}

/// Payload: the request of a merge.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MergeStarted {
    /// What is to be folded, and which way.
    pub plan: MergePlan,
}

/// Payload: tombstones that were folded away.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MergeFinished {
    /// The snapshots that they had been.
    pub snapshots: Vec<SnapshotId>,
}

/// Payload: a tombstone that stays for now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MergeDeferred {
    /// The snapshot that it had been.
    pub snapshot: SnapshotId,
    /// Why.
    pub reason: String,
}

/// Payload: a difference that no operation of ours explains.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DriftFound {
    /// Which one.
    pub finding: Finding,
}

/// Payload: a difference that is no longer there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DriftCleared {
    /// Which one.
    pub finding: Finding,
}

/// Payload: a snapshot that the hypervisor listed and the log did not know.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotAdopted {
    /// All that is known of it; its parent is the one that it has there.
    #[serde(flatten)]
    pub snapshot: Snapshot,
    /// Its name there, which need not be one that it can have here.
    pub listed_as: String,
    /// Snapshots of ours that stand upon it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub children: Vec<SnapshotId>,
}

/// Payload: what was taken over from beside the layers, because the log was restored from an older copy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SystemRestored {
    /// The last event that the lost log had when the layers were switched last.
    pub seq: u64,
    /// Its hash (hex), which this log does not have there.
    pub hash: String,
    /// The operation that switched them.
    pub switched_by: OperationId,
    /// Every live snapshot, and the current one.
    pub tree: Tree,
    /// Deleted snapshots whose data is still there, by their last names.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tombstones: BTreeMap<SnapshotId, SnapshotName>,
    /// The files.
    pub layers: LayerGraph,
    /// Snapshots that this log did not know.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adopted: Vec<SnapshotName>,
    /// Snapshots of this log that are gone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gone: Vec<SnapshotName>,
}

/// Payload: a host was registered, or is spoken to otherwise from here on. It is in the stream of the installation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostAdded {
    /// Its name.
    pub host: HostName,
    /// Who speaks to it.
    pub driver: DriverKind,
    /// Where it is and who we are there; only the driver reads it. Where a password comes from is in it, and never the
    /// password.
    pub config: serde_json::Value,
}

/// Payload: a host is no longer known. It is in the stream of the installation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostRemoved {
    /// Its name.
    pub host: HostName,
}

/// Payload: a policy was defined, or defined anew.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyDefined {
    /// The policy, checked; what it means is the business of the crate that runs policies.
    pub policy: serde_json::Value,
    /// The text that it was read from.
    pub source: String,
}

/// Payload: a policy ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyRemoved {}

/// Payload: a policy does not run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicySuspended {
    /// Why.
    pub reason: String,
}

/// Payload: a policy runs again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyResumed {}

/// What a run asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunPart {
    /// Snapshots.
    Snapshots,
    /// Deletes, after the snapshots.
    Retention,
}

/// Payload: a policy ran.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyFired {
    /// The planned instant, or the moment at which somebody asked for the run.
    pub planned: Timestamp,
    /// What it asked for.
    pub part: RunPart,
    /// Who asked for the run; none if it was due.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asked_by: Option<Actor>,
    /// Domain by domain.
    pub domains: Vec<PolicyRun>,
}

/// What a run asked of one domain.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyRun {
    /// The domain.
    pub domain: DomainId,
    /// Its name then.
    pub name: DomainName,
    /// The requests, in their order.
    pub requests: Vec<PolicyRequest>,
}

/// One request of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyRequest {
    /// The name of the snapshot that it is about.
    pub snapshot: String,
    /// The operation that it became; none if it was refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<OperationId>,
    /// Why it was refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<Failure>,
    /// Of a delete: why the snapshot goes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reasons: Vec<String>,
}

/// Payload: planned instants of one domain that do not run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicySkipped {
    /// The domain.
    pub domain: DomainId,
    /// Its name then.
    pub name: DomainName,
    /// The first.
    pub first: Timestamp,
    /// The last.
    pub last: Timestamp,
    /// How many, at least.
    pub count: u32,
    /// Whether there are more than were counted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub more: bool,
    /// Why.
    pub why: String,
}

/// Payload: a state directory was made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SystemOpened {
    /// The random id of the installation, which is the first previous hash (hex).
    pub installation: String,
    /// The program's version.
    pub program: String,
}

/// What an observation showed of a step whose end was not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StepFound {
    /// It is done.
    Done,
    /// It has had no effect.
    NotBegun,
    /// It has begun, and is not done.
    HalfDone,
}

/// What follows from what was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Course {
    /// The operation goes on.
    Forward,
    /// The operation is taken back.
    Back,
    /// Someone has to look at it.
    Ask,
}

/// Payload: the end of a step was not known, and was made out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SystemRecovered {
    /// Its index in the plan.
    pub step: usize,
    /// What was found of it.
    pub found: StepFound,
    /// What follows.
    pub course: Course,
    /// Why its end was not known; none if the process that had begun it was cut short.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
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
