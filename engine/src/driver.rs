//! The port to hypervisors.
//!
//! # Expected flow
//! 1. `probe` once, when a domain is registered; its answer goes into the log.
//! 2. Per operation: `observe`, then `plan` (pure), then each step: journaled start, `execute`, journaled end.
//! 3. After an interruption: `settle` (nobody is still at work), `observe`, `resolve` (pure), and then on, or `undo`.
//!
//! # Guarantees of the engine
//! * A step is executed only after its `StepStarted` is on disk.
//! * A step whose end is not known is executed again only after `resolve` said [`Resolution::NotDone`] or
//!   [`Resolution::HalfDone`].
//! * One operation at a time per domain.
//!
//! # Assumptions about a driver
//! * `execute` returns `Ok` only when what it made, moved or switched is synced, file and folder.
//! * A [`Reversal::PointOfNoReturn`](crate::operation::Reversal) step that has taken effect never fails with
//!   `Permanent`: what is left of it is tried again.
//! * `execute` after `HalfDone` finishes what was begun; `undo` takes a step back that was never, half or wholly done.
//! * `plan` and `resolve` are pure: what they need to know of the world is in the [`Observation`].

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::claim::Claim;
use crate::domain::{Access, Capabilities, Disk, Domain, DriverKind, RunState};
use crate::event::{Envelope, Hash};
use crate::ids::{DomainId, DomainName, OperationId, SnapshotId, SnapshotName};
use crate::layer::{FileStamp, LayerChange, LayerGraph};
use crate::operation::{Code, Failure, Request, Step};
use crate::project::DomainState;
use crate::reconcile::connection::ConnectionId;
use crate::settings::Stop;
use crate::tree::{SnapshotState, Tree};

/// What kind of failure it is; it decides what the engine does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorClass {
    /// May work the next time.
    Transient,
    /// Somebody else is at it; waiting does not count as a failure.
    Busy,
    /// Will not work; the step had no effect, or can be undone.
    Permanent,
    /// Nobody knows whether the step took place: resolve it first. Timeouts belong here.
    Unknown,
}

/// A driver's failure.
#[derive(Debug, thiserror::Error)]
#[error("{failure}")]
pub struct DriverError {
    /// What the engine does about it.
    pub class: ErrorClass,
    /// What goes into the log and to the user.
    pub failure: Failure,
    /// What lies below.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl DriverError {
    /// A failure of that class.
    pub fn new(class: ErrorClass, code: Code, message: impl Into<String>) -> Self {
        Self { class, failure: Failure::new(code, message), source: None }
    }

    /// Will not work.
    pub fn permanent(code: Code, message: impl Into<String>) -> Self {
        Self::new(ErrorClass::Permanent, code, message)
    }

    /// Nobody knows.
    pub fn unknown(code: Code, message: impl Into<String>) -> Self {
        Self::new(ErrorClass::Unknown, code, message)
    }

    /// Adds what can be done about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.failure = self.failure.hint(hint);
        self
    }

    /// Adds what lies below.
    #[must_use]
    pub fn source(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }
}

impl From<Failure> for DriverError {
    fn from(failure: Failure) -> Self {
        Self { class: ErrorClass::Permanent, failure, source: None }
    }
}

/// What a user says of a domain to be registered.
#[derive(Clone, Debug, PartialEq)]
pub struct Registration {
    /// The id that it will have.
    pub id: DomainId,
    /// Its name.
    pub name: DomainName,
    /// Who runs it.
    pub driver: DriverKind,
    /// Its disks by target name, with their paths as given; the driver makes them absolute.
    pub disks: Vec<(crate::ids::DiskName, PathBuf)>,
    /// What only the driver understands; see the driver's registration type.
    pub options: serde_json::Value,
    /// What the other registered domains have: every file of theirs, with the owner's name.
    pub taken: BTreeMap<PathBuf, DomainName>,
}

/// What a driver found of a domain to be registered.
#[derive(Clone, Debug, PartialEq)]
pub struct Probe {
    /// Its disks, paths absolute.
    pub disks: Vec<Disk>,
    /// What the driver wants to remember.
    pub config: serde_json::Value,
    /// What can be done with it.
    pub capabilities: Capabilities,
    /// What it would have for itself; the paths of its disks as registered need not be among them.
    pub claims: Vec<Claim>,
    /// What the user should know: a raw image that was converted, snapshots that the image already has.
    pub notes: Vec<String>,
}

/// What an image file looks like.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileFacts {
    /// Inode, length, time of the last write.
    pub stamp: FileStamp,
    /// Permission bits.
    pub mode: u32,
    /// Bytes that the file occupies.
    pub allocated_bytes: u64,
    /// What it says it is built upon: absolute, unresolved; none for nothing.
    pub backing: Option<PathBuf>,
    /// What the guest sees as the disk's size.
    pub virtual_size_bytes: u64,
    /// Snapshots inside the image.
    pub internal_snapshots: u32,
}

/// What somebody else keeps inside an image file, by the names that it has there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inside {
    /// Snapshots that came after the domain was registered; what was there before was told then.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub snapshots: BTreeSet<String>,
    /// Dirty bitmaps, which backups go by.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub bitmaps: BTreeSet<String>,
}

/// A snapshot that the hypervisor itself lists.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeenSnapshot {
    /// Ours, by the mark that it carries; none for a foreign one.
    pub id: Option<SnapshotId>,
    /// The hypervisor's own id.
    pub native: String,
    /// The hypervisor's id of its parent.
    pub parent: Option<String>,
    /// Its name there.
    pub name: String,
    /// What is written about it there.
    #[serde(default)]
    pub description: Option<String>,
    /// When it was taken, where the hypervisor says so.
    #[serde(default)]
    pub taken: Option<Timestamp>,
    /// The state of the machine that it was taken of, where the hypervisor says so.
    #[serde(default)]
    pub state: Option<SnapshotState>,
    /// Whose it is, in words, where it is there only for a while and its maker removes it: a backup's. It is left alone,
    /// and not adopted.
    #[serde(default)]
    pub helper: Option<String>,
    /// Why the hypervisor cannot merge its data now, if it is to be deleted; none if it can.
    #[serde(default)]
    pub stays: Option<String>,
}

/// What is kept beside the layers: enough to go on where the log was restored from an older copy.
#[derive(Clone, Debug, PartialEq)]
pub struct Kept {
    /// The last event of the log when the layers were switched last.
    pub head: Head,
    /// The operation that switched them.
    pub switched_by: OperationId,
    /// Every live snapshot, and the current one.
    pub tree: Tree,
    /// Deleted snapshots whose data is still there, by their last names.
    pub tombstones: BTreeMap<SnapshotId, SnapshotName>,
    /// The files, compared with what is there.
    pub layers: LayerGraph,
}

/// Who has a file of the domain open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InUse {
    /// The file.
    pub file: PathBuf,
    /// The process, where it can be found.
    pub pid: Option<u32>,
    /// Its command's name.
    pub command: Option<String>,
}

/// How much room a file system has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Room {
    /// A folder on it.
    pub folder: PathBuf,
    /// Bytes that may still be written there.
    pub free_bytes: u64,
}

/// What the hypervisor says is there, read afresh.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Observation {
    /// When it was read.
    pub at: Timestamp,
    /// Whether the machine runs.
    pub run_state: RunState,
    /// Files of the domain that somebody writes.
    pub in_use: Vec<InUse>,
    /// The image files that are there, by path: those of the log, and whatever else lies in the layers folder.
    pub files: BTreeMap<PathBuf, FileFacts>,
    /// Files that are there and cannot be read as images, with the reason.
    pub unreadable: BTreeMap<PathBuf, String>,
    /// The files of the log in which a machine's memory is kept, as far as they are there.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub memory: BTreeMap<PathBuf, FileStamp>,
    /// Per file of ours: files that are built upon it and are not in the log.
    pub foreign_dependants: BTreeMap<PathBuf, Vec<PathBuf>>,
    /// What somebody else keeps inside the images of the log and the registered ones, by file.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub inside: BTreeMap<PathBuf, Inside>,
    /// The generation that is switched on.
    pub generation: Option<String>,
    /// How much room there is for the domain's files; none where that cannot be told.
    #[serde(default)]
    pub room: Option<Room>,
    /// The snapshots that the hypervisor lists; empty where it keeps none.
    pub snapshots: Vec<SeenSnapshot>,
    /// The hypervisor's current snapshot, by its own id.
    pub current: Option<String>,
    /// The machine's disks as they are now, where the hypervisor lists them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<Disk>>,
    /// What only the driver reads.
    #[serde(default)]
    pub detail: serde_json::Value,
}

/// A plan: what will be done, and what it costs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// In order.
    pub steps: Vec<Step>,
    /// Bytes that have to be copied.
    pub bytes_moved: u64,
    /// Bytes that are free again afterwards.
    pub bytes_freed: u64,
    /// Bytes needed at the worst moment, above what is used now.
    pub peak_space_bytes: u64,
    /// What is lost for good, in words.
    pub lost: Vec<String>,
    /// What the machine writes and a snapshot would not hold, since it is no disk of its domain, in words.
    pub left_out: Vec<String>,
}

/// What a done step brought.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepReport {
    /// What of the layer graph changed.
    pub changes: Vec<LayerChange>,
    /// What else was learnt; only the driver reads it, with the exception of [`Learnt`]'s fields.
    pub learnt: serde_json::Value,
}

/// What the engine reads of a step's `learnt`: the facts of a snapshot that was taken in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Learnt {
    /// When the snapshot was taken; none if the step took none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taken: Option<Timestamp>,
    /// The state of the machine that it was taken of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<SnapshotState>,
    /// The hypervisor's own id of the snapshot that was taken, where it keeps a list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub native: Option<String>,
    /// Files that are nobody's after the step.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub left: BTreeSet<PathBuf>,
    /// Why what was asked for has not come to be, though the step took effect and cannot be taken back: memory that
    /// could not be kept after the disks were switched, or not be loaded. The operation fails with it at its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<Failure>,
    /// What had to be put right at the hypervisor first, in words; each becomes an event.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub repairs: Vec<String>,
    /// What the machine wrote besides when the snapshot was taken, in words: [`Snapshot::left_out`](crate::tree::Snapshot).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<String>,
}

impl Learnt {
    /// Adds what a later step learnt.
    pub fn add(&mut self, later: Self) {
        self.taken = later.taken.or(self.taken);
        self.state = later.state.or(self.state);
        self.native = later.native.or(self.native.take());
        self.left.extend(later.left);
        self.failed = self.failed.take().or(later.failed);
        self.repairs.extend(later.repairs);
        self.left_out.extend(later.left_out);
    }
}

/// What became of a step whose end is not known.
#[derive(Clone, Debug, PartialEq)]
pub enum Resolution {
    /// It is done, and this is what it brought.
    Done(StepReport),
    /// It left no trace.
    NotDone,
    /// It was begun, and what it says is to be done about it.
    HalfDone(Remedy),
}

/// What to do about a step that was begun.
#[derive(Clone, Debug, PartialEq)]
pub enum Remedy {
    /// `execute` finishes it; whether `undo` could take it back is not known, or it could not.
    Finish,
    /// `execute` finishes it and `undo` takes it back: it has not taken effect yet.
    EitherWay,
    /// `undo` takes it back, and the operation goes back with it, for this reason.
    TakeBack(Failure),
    /// Neither is safe: someone has to look.
    AskSomeone(Failure),
}

/// Named places at which a test (or the demo) may stop, kill or fail the program.
///
/// Architecture Invariant: production code passes [`NoHooks`]; nothing else depends on what a hook does.
pub trait Hooks: Send + Sync {
    /// Called at the place `name`, for instance `qemu.switch.prepared`.
    fn reached(&self, name: &str);
}

/// Does nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoHooks;

impl Hooks for NoHooks {
    fn reached(&self, _name: &str) {}
}

/// How far the step in hand has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StepProgress {
    /// `done` of `total` bytes.
    Bytes {
        /// How many are done.
        done: u64,
        /// Of how many.
        total: u64,
    },
    /// So many of a hundred, where the hypervisor or tool says no more.
    Percent(u8),
}

/// Told about progress inside a step, for whoever watches; not for the log.
pub trait Progress: Send + Sync {
    /// The step in hand has come so far.
    fn step_progress(&self, progress: StepProgress);
}

/// Told about what happens, for whoever watches.
pub trait Watch: Progress {
    /// An event was appended.
    fn happened(&self, envelope: &Envelope);
}

/// Watches nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoWatch;

impl Progress for NoWatch {
    fn step_progress(&self, _progress: StepProgress) {}
}

impl Watch for NoWatch {
    fn happened(&self, _envelope: &Envelope) {}
}

/// What shall become of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PowerWish {
    /// It runs.
    Start,
    /// Its guest is asked to shut down.
    Shutdown,
    /// It ends at once; what the guest has in its memory is lost.
    End,
}

/// The files that a step works on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    /// It writes, makes, renames or unlinks them.
    pub writes: BTreeSet<PathBuf>,
    /// It builds upon them. What a file stands upon need not be named.
    pub reads: BTreeSet<PathBuf>,
}

impl Touched {
    /// Adds what another step works on.
    pub fn add(&mut self, other: Self) {
        self.writes.extend(other.writes);
        self.reads.extend(other.reads);
    }
}

/// Where in an operation a step stands.
pub struct StepContext<'a> {
    /// The domain, as the log tells it.
    pub state: &'a DomainState,
    /// The operation.
    pub operation: OperationId,
    /// What it was asked to do.
    pub request: &'a Request,
    /// The step's index in the plan.
    pub index: usize,
    /// The last event of the log, for the manifest.
    pub head: Head,
    /// When the step began, by the engine's clock.
    pub now: Timestamp,
    /// Places for tests.
    pub hooks: &'a dyn Hooks,
    /// Who watches.
    pub progress: &'a dyn Progress,
    /// Whether somebody wants it gone meanwhile.
    pub call_off: CallOff<'a>,
}

/// Tells a step that takes long that it was called off, and may stop for that.
///
/// A driver that stops fails with [`ErrorClass::Permanent`] and [`Code::Cancelled`]; the engine then takes the step back.
/// The default is never called off.
#[derive(Clone, Copy, Debug, Default)]
pub struct CallOff<'a>(Option<(&'a Stop, OperationId)>);

impl<'a> CallOff<'a> {
    /// Of an operation that can go back.
    pub(crate) fn of(stop: &'a Stop, operation: OperationId) -> Self {
        Self(Some((stop, operation)))
    }

    /// Whether it is.
    pub fn is_asked(&self) -> bool {
        self.0.is_some_and(|(stop, operation)| stop.called_off(operation).is_some() || stop.takes_back())
    }
}

/// The last event of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Its place; 0 for an empty log.
    pub seq: u64,
    /// Its hash; the installation id for an empty log.
    pub hash: Hash,
}

/// A hypervisor.
#[async_trait]
pub trait Driver: Send + Sync {
    /// What this domain shares with others on the way to its hypervisor. It bounds how many of them are served at
    /// once, and is suspended as a whole when it does not answer.
    fn connection(&self, domain: &Domain) -> ConnectionId {
        ConnectionId::new(domain.driver.as_str())
    }

    /// Looks at a domain that is to be registered. It changes nothing, unless the options ask for it
    /// (converting a raw image).
    ///
    /// # Errors
    /// What makes the domain unfit: an image that is missing, damaged, raw, or another domain's.
    async fn probe(&self, registration: &Registration) -> Result<Probe, DriverError>;

    /// How a registered machine is reached from now on; what the wish leaves out stays. It changes nothing.
    ///
    /// # Errors
    /// The driver's machines are reached in one way only, or the wish contradicts itself.
    async fn access(&self, state: &DomainState, _wish: &serde_json::Value) -> Result<Access, DriverError> {
        let name = state.domain.as_ref().map_or("", |domain| domain.name.as_str());
        let message = format!("there is one way only in which the machine of domain '{name}' is reached");
        Err(DriverError::from(Failure::new(Code::Unsupported, message).refused()))
    }

    /// Reads what is there.
    ///
    /// # Errors
    /// The hypervisor or the file system cannot be asked. A missing file is no error but an observation.
    async fn observe(&self, state: &DomainState) -> Result<Observation, DriverError>;

    /// Reads what is there of several domains of one connection, in as few questions as the hypervisor allows. The
    /// answers are in the order of `states`.
    ///
    /// # Errors
    /// The hypervisor cannot be asked at all. What is wrong with one domain is that one's answer.
    async fn observe_all(
        &self,
        states: &[&DomainState],
    ) -> Result<Vec<Result<Observation, DriverError>>, DriverError> {
        let mut seen = Vec::with_capacity(states.len());
        for state in states {
            seen.push(self.observe(state).await);
        }
        Ok(seen)
    }

    /// Plans a request. Pure.
    ///
    /// # Errors
    /// A precondition is broken; nothing was touched, and the operation fails with it.
    fn plan(
        &self,
        operation: OperationId,
        request: &Request,
        state: &DomainState,
        observation: &Observation,
    ) -> Result<Plan, Failure>;

    /// Does a step, and syncs what it did.
    ///
    /// # Errors
    /// [`DriverError`]; its class says whether the step may be repeated, must be resolved, or is undone.
    async fn execute(&self, context: &StepContext<'_>, step: &Step) -> Result<StepReport, DriverError>;

    /// Tells from an observation alone what became of a step. Pure.
    fn resolve(&self, context: &StepContext<'_>, step: &Step, observation: &Observation) -> Resolution;

    /// The files that a step works on. None where that cannot be told, and it may be anything of the domain. Pure.
    fn touches(&self, _step: &Step) -> Option<Touched> {
        None
    }

    /// Takes a step back, whether it was not, half or wholly done.
    ///
    /// # Errors
    /// What stands in the way; the operation then needs attention.
    async fn undo(&self, context: &StepContext<'_>, step: &Step) -> Result<StepReport, DriverError>;

    /// Removes what it keeps in the state directory for a domain that was unregistered a moment ago. What cannot be
    /// removed does no harm, so nothing is said of it.
    fn forget(&self, _state: &DomainState) {}

    /// The last event of the log when the layers were switched last; none where nothing of it is kept beside them.
    ///
    /// # Errors
    /// It is kept there and cannot be read.
    async fn kept_head(&self, _state: &DomainState) -> Result<Option<Head>, DriverError> {
        Ok(None)
    }

    /// All that is kept beside the layers. Asked for when [`kept_head`](Driver::kept_head) is none of the log's.
    ///
    /// # Errors
    /// It cannot be read, or contradicts the files that are there.
    async fn kept(&self, _state: &DomainState) -> Result<Option<Kept>, DriverError> {
        Ok(None)
    }

    /// Starts or ends the machine; one that is as wished is left alone.
    ///
    /// # Errors
    /// It is not Snaptree that starts and ends it, or it could not be done.
    async fn power(&self, state: &DomainState, _wish: PowerWish) -> Result<(), DriverError> {
        let name = state.domain.as_ref().map_or("", |domain| domain.name.as_str());
        Err(DriverError::permanent(
            Code::Unsupported,
            format!("domain '{name}' is not started and ended by Snaptree"),
        ))
    }

    /// Returns when nobody is still at work for `operation`: orphaned tools are waited for, then ended.
    ///
    /// # Errors
    /// Somebody is, and cannot be ended.
    async fn settle(&self, state: &DomainState, operation: OperationId) -> Result<(), DriverError>;
}
