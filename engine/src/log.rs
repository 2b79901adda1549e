//! The port to the store.
//!
//! # Guarantees asked of a store
//! * An append is all or nothing, over several streams too, and on disk when it returns.
//! * `seq` and each stream's `version` have no gaps.
//! * An append whose expectation does not hold writes nothing, and says what it found.
//! * Names, images, layers folders and machines have one owner, see [`claim`](crate::claim): an append that would take
//!   what another domain has writes nothing, and says who has it.
//! * A process that lost the ownership of the store cannot append.

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::claim::Claim;
use crate::driver::Head;
use crate::event::{Actor, Envelope, Event, Origin};
use crate::ids::{DomainId, DomainName, OperationId, PolicyName, StreamId};
use crate::operation::Outcome;

/// Most events that one append may bring.
pub const APPEND_EVENTS_MAX: usize = 100_000;

/// The greatest `seq_max`: the whole log, and no read model of it.
pub const OF_THE_LOG: u64 = u64::MAX - 1;

/// A failure of the store.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// Expected in normal work: somebody else appended first. Read again and decide again.
    #[error("stream {stream} is at version {found}, not at {expected}")]
    Conflict {
        /// The stream.
        stream: StreamId,
        /// What the append expected.
        expected: u64,
        /// What is there.
        found: u64,
    },
    /// The key was used on that stream before; `operation` is the operation that it asked for.
    #[error("the key '{key}' was used before on stream {stream}")]
    KeyUsed {
        /// The stream.
        stream: StreamId,
        /// The key.
        key: String,
    },
    /// Somebody else has what an event would take.
    #[error("{claim} belongs to domain {owner}")]
    Claimed {
        /// What.
        claim: Claim,
        /// Who has it.
        owner: DomainId,
    },
    /// Another process owns the state directory now; nothing was written.
    #[error("this process owned the state at epoch {ours}, and epoch {current} owns it now")]
    Fenced {
        /// Our epoch.
        ours: u64,
        /// The owner's.
        current: u64,
    },
    /// The file system that holds the state is full; nothing of this append was written.
    #[error("the file system that holds the state is full")]
    Full,
    /// The state cannot be written: read-only, or not ours.
    #[error("the state cannot be written: {0}")]
    ReadOnly(String),
    /// What is stored is not what was stored: damage, or a newer program's work.
    #[error("the log is damaged: {0}")]
    Damaged(String),
    /// The database failed.
    #[error("the store failed: {message}")]
    Backend {
        /// What it was about.
        message: String,
        /// What lies below.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// An event to be appended.
#[derive(Clone, Debug, PartialEq)]
pub struct NewEvent {
    /// Whose history it becomes part of.
    pub stream: StreamId,
    /// What happened.
    pub event: Event,
    /// The operation that it belongs to.
    pub operation: Option<OperationId>,
    /// What caused it.
    pub cause: Option<u64>,
    /// The key of the request.
    pub key: Option<String>,
}

impl NewEvent {
    /// An event that belongs to no operation and was caused by none.
    pub(crate) fn of_itself(stream: StreamId, event: Event) -> Self {
        Self { stream, event, operation: None, cause: None, key: None }
    }
}

/// What is appended in one piece.
#[derive(Clone, Debug, PartialEq)]
pub struct Append {
    /// Per stream, the version that it must be at. Facts leave it empty.
    pub expect: Vec<(StreamId, u64)>,
    /// Who caused them.
    pub actor: Actor,
    /// Where the request came from.
    pub origin: Origin,
    /// When, by the engine's clock; the store truncates it to microseconds.
    pub at: Timestamp,
    /// In order.
    pub events: Vec<NewEvent>,
}

/// A stored projection of a stream, which saves reading the stream from its start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// The stream.
    pub stream: StreamId,
    /// The version of the last event in it.
    pub version: u64,
    /// That event's place in the log.
    pub seq: u64,
    /// That event's hash, as hex; a mismatch with the log drops the checkpoint.
    pub hash: String,
    /// The version of the projector that made it; another version drops it.
    pub projector: u32,
    /// The projection, as the projector wrote it.
    pub state: String,
}

/// A row of the list of domains.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainRow {
    /// Its id.
    pub id: DomainId,
    /// Its name.
    pub name: DomainName,
}

/// A row of the list of operations.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationRow {
    /// Its id.
    pub id: OperationId,
    /// Its domain.
    pub domain: DomainId,
    /// The domain's name when it was asked.
    pub domain_name: DomainName,
    /// `create`, `revert`, ...
    pub kind: String,
    /// The name of the first snapshot that it is about.
    pub snapshot: Option<String>,
    /// How it ended; none while it is open.
    pub outcome: Option<Outcome>,
    /// Whether it needs attention.
    pub needs_attention: bool,
    /// The place of its request in the log.
    #[serde(default)]
    pub seq: u64,
    /// When it was asked.
    pub requested: Timestamp,
    /// When it ended.
    pub finished: Option<Timestamp>,
}

/// Which operations to list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationFilter {
    /// Of this domain alone.
    pub domain: Option<DomainId>,
    /// Only those without an outcome.
    pub open: Option<OpenOnly>,
    /// This one alone.
    pub operation: Option<OperationId>,
    /// Those that were requested after this event; the oldest of them, where not all are wanted.
    #[serde(default)]
    pub after: Option<u64>,
}

/// Says that only operations without an outcome are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenOnly;

/// Which events to read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventFilter {
    /// Of this stream alone.
    pub stream: Option<StreamId>,
    /// Of this operation alone.
    pub operation: Option<OperationId>,
    /// By this actor alone, as stored.
    pub actor: Option<String>,
    /// Of this kind; a prefix such as `Snapshot.` also counts.
    pub kind: Option<String>,
    /// Not before.
    pub since: Option<Timestamp>,
    /// Not after.
    pub until: Option<Timestamp>,
}

/// The log.
#[async_trait]
pub trait EventLog: Send + Sync {
    /// Appends, or says why not. On disk when it returns.
    ///
    /// # Errors
    /// [`LogError`]; in every case nothing was written.
    async fn append(&self, append: Append) -> Result<Vec<Envelope>, LogError>;

    /// The events of a stream after `version`, at most up to `seq_max`, at most `count` of them.
    ///
    /// # Errors
    /// The store failed, or is damaged.
    async fn read_stream(
        &self,
        stream: &StreamId,
        version: u64,
        seq_max: u64,
        count: usize,
    ) -> Result<Vec<Envelope>, LogError>;

    /// The events after `seq` that the filter lets through, at most `count` of them.
    ///
    /// # Errors
    /// The store failed, or is damaged.
    async fn read(&self, seq: u64, filter: &EventFilter, count: usize) -> Result<Vec<Envelope>, LogError>;

    /// The last event.
    ///
    /// # Errors
    /// The store failed.
    async fn head(&self) -> Result<Head, LogError>;

    /// The request event that was stored with this key.
    ///
    /// # Errors
    /// The store failed.
    async fn by_key(&self, stream: &StreamId, key: &str) -> Result<Option<Envelope>, LogError>;

    /// The newest usable checkpoint of a stream at or before `seq_max`.
    ///
    /// # Errors
    /// The store failed.
    async fn checkpoint(
        &self,
        stream: &StreamId,
        projector: u32,
        seq_max: u64,
    ) -> Result<Option<Checkpoint>, LogError>;

    /// Keeps a checkpoint, in place of the stream's older one.
    ///
    /// # Errors
    /// The store failed. Nothing depends on a checkpoint.
    async fn save_checkpoint(&self, checkpoint: Checkpoint) -> Result<(), LogError>;

    /// The registered domains, by name. As of `seq_max`; [`u64::MAX`] may be answered by a read model, and anything less,
    /// such as [`OF_THE_LOG`], by the events alone.
    ///
    /// # Errors
    /// The store failed.
    async fn domains(&self, seq_max: u64) -> Result<Vec<DomainRow>, LogError>;

    /// The registered domain of that name.
    ///
    /// # Errors
    /// The store failed.
    async fn domain_by_name(&self, name: &DomainName) -> Result<Option<DomainRow>, LogError>;

    /// The policies that the log has ever told of, by name. The cost is that of their number, not of their events'.
    ///
    /// # Errors
    /// The store failed.
    async fn policies(&self) -> Result<Vec<PolicyName>, LogError>;

    /// Operations, in the order of their requests, at most `count`: the newest of them, or the first after
    /// [`OperationFilter::after`].
    ///
    /// # Errors
    /// The store failed.
    async fn operations(&self, filter: &OperationFilter, count: usize)
    -> Result<Vec<OperationRow>, LogError>;

    /// The seq of the last event with `at` not later than `at`, and whether the clock was monotone up to there
    /// and a little beyond (no later event has an earlier time).
    ///
    /// # Errors
    /// The store failed.
    async fn seq_at(&self, at: Timestamp) -> Result<SeqAt, LogError>;
}

/// Which prefix of the log a time stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeqAt {
    /// The greatest seq with `at` not later than the time asked about; 0 for none.
    pub seq: u64,
    /// Whether some event at or before that seq has a later time.
    pub clock: ClockOrder,
}

/// Whether the clock went back within a prefix of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClockOrder {
    /// No event before it has a later time.
    Monotone,
    /// One has: the clock was set back.
    WentBack,
}
