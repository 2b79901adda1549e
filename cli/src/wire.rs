//! What travels between a daemon and those who ask it: HTTP/1.1 over its socket, JSON both ways.
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/status` | [`Status`] |
//! | `POST /v1/domains` with [`Registering`] | [`Registered`] |
//! | `POST /v1/domains/ID/commands` with [`Ask`] | [`Asked`]: the request is in the log, and is being carried out |
//! | `POST /v1/domains/ID/reconcile` | lines, the last one `driven` |
//! | `POST /v1/domains/ID/drift` | [`Drifted`] |
//! | `POST /v1/domains/ID/power` with [`Powering`] | nothing, once it is so |
//! | `GET /v1/operations/ID/follow` | lines, the last one `driven` |
//! | `POST /v1/operations/ID/cancel` | the same; it goes back between two steps, if it still can |
//! | `POST /v1/recover` | [`Accounts`] |
//! | `POST /v1/log` with [`Question`] | what the log says, as the question has it |
//! | `POST /v1/hosts` with [`HostAsk`] | [`HostAnswer`] |
//! | `POST /v1/policies` with [`PolicyAsk`] | [`PolicyAnswer`] |
//!
//! Lines are [`Line`]s, one a line. A domain is named by its id or its name, an operation by its id. What fails is
//! answered with [`Failed`], as `--json` prints it, and a fitting status.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use snaptree_drivers::esx::{Found, HostConfig, Introduced};
use snaptree_drivers::qemu::RunsWish;
use snaptree_engine::command::Command;
use snaptree_engine::decide::ACCESS_BYTES_MAX;
use snaptree_engine::domain::{Domain, DriverKind};
use snaptree_engine::driver::{Head, PowerWish, StepProgress};
use snaptree_engine::event::{Actor, Envelope, Event, Hash, Origin, PolicyRun};
use snaptree_engine::hosts::Known;
use snaptree_engine::log::{EventFilter, OperationFilter};
use snaptree_engine::reconcile::connection::ConnectionState;
use snaptree_engine::reconcile::drift::Drift;
use snaptree_engine::reconcile::worker::Driven;
use snaptree_engine::tree::Labels;
use snaptree_engine::{DiskName, DomainId, DomainName, EventId, HostName, OperationId, PolicyName, StreamId};
use snaptree_policies::leap::{Doubt, Leap};

use crate::exit::{ErrorView, Exit, Told, Trouble, told, whole};

/// The header in which a client says who called `sudo`: only a claim.
pub const SUDO_USER_HEADER: &str = "snaptree-sudo-user";

/// A request on a domain.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ask {
    /// What is asked.
    pub command: Command,
    /// The key that makes it idempotent.
    #[serde(default)]
    pub key: Option<String>,
}

/// The answer: it is in the log.
#[derive(Debug, Serialize, Deserialize)]
pub struct Asked {
    /// The operation; none for a request that was carried out by being written.
    pub operation: Option<OperationId>,
    /// Whether the operation is the answer to an earlier request with the same key.
    pub repeated: bool,
}

/// A machine that is to be registered, with absolute paths.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registering {
    /// Its name.
    pub name: DomainName,
    /// The hypervisor.
    pub driver: DriverKind,
    /// Its disks and their images; an empty path where there is none.
    #[serde(default)]
    pub disks: Vec<(DiskName, PathBuf)>,
    /// Its labels.
    #[serde(default)]
    pub labels: Labels,
    /// `qemu`: where the layers go.
    #[serde(default)]
    pub layers: Option<PathBuf>,
    /// `qemu`: leave the registered path as it is.
    #[serde(default)]
    pub keep_path: bool,
    /// `qemu`: convert a raw image.
    #[serde(default)]
    pub convert: bool,
    /// `qemu`: mend an image that was not closed.
    #[serde(default)]
    pub repair: bool,
    /// `qemu`: who runs it.
    #[serde(default)]
    pub runs: RunsWish,
    /// `qemu`: the guest agent's socket.
    #[serde(default)]
    pub agent: Option<PathBuf>,
    /// `sim`: whose limits it has.
    #[serde(default)]
    pub profile: Option<String>,
    /// `esx`: the host that it is on.
    #[serde(default)]
    pub host: Option<HostName>,
    /// `esx` and `virtualbox`: which machine it is there.
    #[serde(default)]
    pub vm: Option<String>,
}

/// Longest path of a file, in bytes (`PATH_MAX`).
const PATH_BYTES_MAX: usize = 4_096;
/// Most disks of one machine.
const DISKS_MAX: usize = 1_024;

impl Registering {
    /// Whether everything in it can be kept.
    ///
    /// # Errors
    /// Something is too long, or too many.
    pub fn fits(&self) -> Result<(), Trouble> {
        let refused = |message: String| Err(Trouble::new(Exit::Refused, "invalid", message));
        if self.disks.len() > DISKS_MAX {
            return refused(format!("a machine has at most {DISKS_MAX} disks"));
        }
        let paths = self.disks.iter().map(|(_, path)| path).chain(&self.layers).chain(&self.agent);
        if paths.chain(&self.runs.qmp).any(|path| path.as_os_str().len() > PATH_BYTES_MAX) {
            return refused(format!("a path has at most {PATH_BYTES_MAX} bytes"));
        }
        let commands = [&self.runs.start, &self.runs.stop, &self.runs.launch];
        let access: usize = commands.into_iter().flatten().map(String::len).sum();
        if access > ACCESS_BYTES_MAX {
            return refused(format!("how a machine is started has at most {ACCESS_BYTES_MAX} bytes in all"));
        }
        let words = [&self.profile, &self.vm];
        if words.into_iter().flatten().any(|word| word.len() > PATH_BYTES_MAX) {
            return refused(format!("the name of a machine has at most {PATH_BYTES_MAX} bytes"));
        }
        Ok(())
    }

    /// A machine of which only that is said.
    pub fn new(name: DomainName, driver: DriverKind) -> Self {
        Self {
            name,
            driver,
            disks: Vec::new(),
            labels: Labels::new(),
            layers: None,
            keep_path: false,
            convert: false,
            repair: false,
            runs: RunsWish::default(),
            agent: None,
            profile: None,
            host: None,
            vm: None,
        }
    }
}

/// A request about a host.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case", deny_unknown_fields)]
pub enum HostAsk {
    /// Log in to it once, and keep what is said of it.
    Add {
        /// Its name.
        host: HostName,
        /// What is said of it, with absolute paths. The password is none of it.
        config: HostConfig,
        /// Whether it may be registered already.
        known: Known,
    },
    /// Forget it.
    Remove {
        /// Its name.
        host: HostName,
    },
    /// List its machines.
    Discover {
        /// Its name.
        host: HostName,
    },
}

/// What a request about a host came to.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct HostAnswer {
    /// What it is, for `Add`.
    #[serde(default)]
    pub introduced: Option<Introduced>,
    /// Its machines, for `Discover`.
    #[serde(default)]
    pub machines: Vec<Found>,
}

/// A machine that was registered.
#[derive(Debug, Serialize, Deserialize)]
pub struct Registered {
    /// What was found of it.
    pub domain: Domain,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// Where a hypervisor and the log disagree.
#[derive(Debug, Serialize, Deserialize)]
pub struct Drifted {
    /// All that is known.
    pub findings: Drift,
}

/// What shall become of a machine.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Powering {
    /// The wish.
    pub wish: PowerWish,
}

/// What recovery found of an operation, and did.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Account {
    /// The operation.
    pub operation: OperationId,
    /// `create`, `revert`, ...
    pub kind: String,
    /// Its domain's name.
    pub domain: String,
    /// Where it stood, in words.
    pub found: String,
    /// What was done about it, in words.
    pub did: String,
    /// How it ended, or `needs-attention`; none while it is open.
    pub outcome: Option<String>,
}

/// The document of `recover`.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Accounts {
    /// Operation by operation.
    pub operations: Vec<Account>,
    /// Domains that could not be looked at.
    #[serde(default)]
    pub left_out: Vec<LeftOut>,
}

/// A domain that could not be looked at, beside others that could.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LeftOut {
    /// Its name.
    pub domain: String,
    /// Why.
    pub error: ErrorView,
}

impl LeftOut {
    /// The domain of that name, and what looking at it failed with.
    pub fn new(domain: impl ToString, error: impl Into<anyhow::Error>) -> Self {
        Self { domain: domain.to_string(), error: whole(&told(&error.into())) }
    }
}

/// A request about a policy.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case", deny_unknown_fields)]
pub enum PolicyAsk {
    /// Define it, or change it.
    Set {
        /// The text of the policy file.
        source: String,
    },
    /// End it.
    Remove {
        /// Its name.
        name: String,
    },
    /// Keep it from running.
    Suspend {
        /// Its name.
        name: String,
        /// Why.
        reason: String,
    },
    /// Let it run again.
    Resume {
        /// Its name.
        name: String,
    },
    /// Run it now.
    Run {
        /// Its name.
        name: String,
        /// The name or id of one of its domains; none for all.
        #[serde(default)]
        domain: Option<String>,
    },
    /// Delete what it does not keep, after a run of a domain that took its snapshot.
    Retain {
        /// Its name.
        name: String,
        /// The run.
        planned: Timestamp,
        /// The domain.
        domain: DomainId,
    },
    /// Believe the machine's clock, which leapt.
    ConfirmClock,
    /// Suspend it if its last runs took no snapshot. A daemon does that by itself.
    Review {
        /// Its name.
        name: String,
    },
}

/// What a request about a policy came to.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct PolicyAnswer {
    /// The run's instant, for `Run`.
    #[serde(default)]
    pub planned: Option<Timestamp>,
    /// What was asked of each domain.
    #[serde(default)]
    pub runs: Vec<PolicyRun>,
    /// Why it is suspended now, for `Review`.
    #[serde(default)]
    pub suspended: Option<String>,
}

/// How a daemon stands.
#[derive(Debug, Serialize, Deserialize)]
pub struct Status {
    /// Its process.
    pub pid: u32,
    /// Its program's version.
    pub version: String,
    /// Its state directory.
    pub state: PathBuf,
    /// For how long it has been up, in seconds.
    pub up_s: u64,
    /// The domains in work.
    pub queue: QueueView,
    /// The connections that were used.
    pub connections: Vec<ConnectionState>,
    /// The operations without an outcome.
    pub open: Vec<OpenView>,
    /// The policies that do not run since this program cannot read them, and why.
    #[serde(default)]
    pub sick_policies: BTreeMap<PolicyName, String>,
    /// Why what policies delete is held back, if it is.
    #[serde(default)]
    pub clock: Option<ClockView>,
}

/// A clock that leapt and is not believed again.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ClockView {
    /// What it should have shown, at the latest if it went forward.
    pub from: Timestamp,
    /// What it showed.
    pub to: Timestamp,
    /// Until when policies hold back their deletes, if it goes on.
    pub until: Timestamp,
    /// The same in words, and what to do.
    pub message: String,
}

impl From<Doubt> for ClockView {
    fn from(doubt: Doubt) -> Self {
        let Leap { from, to } = doubt.leap;
        Self { from, to, until: doubt.until(), message: doubt.to_string() }
    }
}

/// How many domains are in work.
#[derive(Debug, Serialize, Deserialize)]
pub struct QueueView {
    /// Being worked on.
    pub running: usize,
    /// To be tried again after a failure.
    pub waiting: usize,
}

/// An operation without an outcome.
#[derive(Debug, Serialize, Deserialize)]
pub struct OpenView {
    /// Its id.
    pub operation: OperationId,
    /// `create`, `revert`, ...
    pub kind: String,
    /// Its domain's name.
    pub domain: String,
    /// The first snapshot that it is about.
    pub snapshot: Option<String>,
    /// Whether someone has to look at it.
    pub needs_attention: bool,
    /// When it was asked for.
    pub requested: Timestamp,
}

/// The document that takes the place of an answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Failed {
    /// What failed.
    pub error: WireError,
}

/// A failure, as `--json` prints it, with the exit code that it stands for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WireError {
    /// The word for programs.
    pub code: String,
    /// What happened, and why.
    pub message: String,
    /// What can be done about it.
    pub hint: Option<String>,
    /// How the program ends with it.
    pub exit: u8,
}

impl From<&Told> for WireError {
    fn from(told: &Told) -> Self {
        let ErrorView { code, message, hint } = whole(told);
        Self { code, message, hint, exit: told.exit.code() }
    }
}

/// A question to the log: the methods of [`snaptree_engine::log::EventLog`] that read.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Question {
    /// `[EventLine]`
    Stream {
        /// Whose events.
        stream: StreamId,
        /// After this version.
        version: u64,
        /// Up to this event.
        seq_max: u64,
        /// At most so many.
        count: usize,
    },
    /// `[EventLine]`
    Events {
        /// After this one.
        seq: u64,
        /// At most so many.
        count: usize,
        /// Which ones.
        filter: EventFilter,
    },
    /// [`HeadView`]
    Head,
    /// `EventLine` or null
    ByKey {
        /// Whose request.
        stream: StreamId,
        /// Its key.
        key: String,
    },
    /// `Checkpoint` or null
    Checkpoint {
        /// Whose.
        stream: StreamId,
        /// The projector's version.
        projector: u32,
        /// Up to this event.
        seq_max: u64,
    },
    /// `[DomainRow]`
    Domains {
        /// Up to this event.
        seq_max: u64,
    },
    /// `DomainRow` or null
    DomainByName {
        /// Its name.
        name: DomainName,
    },
    /// `[PolicyName]`
    Policies,
    /// `[OperationRow]`
    Operations {
        /// Which ones.
        filter: OperationFilter,
        /// At most so many.
        count: usize,
    },
    /// `SeqAt`
    SeqAt {
        /// Which moment.
        at: Timestamp,
    },
}

/// The last event's place and hash.
#[derive(Debug, Serialize, Deserialize)]
pub struct HeadView {
    seq: u64,
    hash: String,
}

impl From<Head> for HeadView {
    fn from(head: Head) -> Self {
        Self { seq: head.seq, hash: head.hash.to_string() }
    }
}

impl HeadView {
    /// The head itself.
    ///
    /// # Errors
    /// It has no hash.
    pub fn head(&self) -> Result<Head> {
        let hash = hash(&self.hash).context("a hash has 64 hexadecimal digits")?;
        Ok(Head { seq: self.seq, hash })
    }
}

/// One line of an answer that comes in pieces.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Line {
    /// An event was appended.
    Event(Box<EventLine>),
    /// The step in hand has come so far.
    Progress(StepProgress),
    /// So many lines were left out, since they were not read in time.
    Lagged(u64),
    /// What stands in the way for now; it is gone on when that is gone.
    Waits(String),
    /// The last line: what it came to.
    Driven(Box<Driven>),
    /// The last line: it failed.
    Error(WireError),
}

/// An event, in the order of the log's columns; a line of `log --json`.
#[derive(Debug, Serialize, Deserialize)]
pub struct EventLine {
    seq: u64,
    id: EventId,
    stream: String,
    version: u64,
    kind: String,
    schema: u32,
    at: Timestamp,
    actor: Actor,
    origin: Origin,
    epoch: u64,
    operation: Option<OperationId>,
    cause: Option<u64>,
    key: Option<String>,
    data: Box<serde_json::value::RawValue>,
    hash: String,
}

impl EventLine {
    /// The line of an event.
    ///
    /// # Errors
    /// Its payload cannot be written as JSON.
    pub fn of(envelope: &Envelope) -> Result<Self> {
        Ok(Self {
            seq: envelope.seq,
            id: envelope.id,
            stream: envelope.stream.to_string(),
            version: envelope.version,
            kind: envelope.event.kind().to_owned(),
            schema: envelope.event.schema(),
            at: envelope.at,
            actor: envelope.actor.clone(),
            origin: envelope.origin.clone(),
            epoch: envelope.epoch,
            operation: envelope.operation,
            cause: envelope.cause,
            key: envelope.key.clone(),
            data: serde_json::value::RawValue::from_string(envelope.event.encode()?)?,
            hash: envelope.hash.to_string(),
        })
    }

    /// The event of a line.
    ///
    /// # Errors
    /// The line is not one of this program's.
    pub fn envelope(self) -> Result<Envelope> {
        Ok(Envelope {
            seq: self.seq,
            id: self.id,
            stream: self.stream.parse().context("a stream")?,
            version: self.version,
            at: self.at,
            actor: self.actor,
            origin: self.origin,
            epoch: self.epoch,
            operation: self.operation,
            cause: self.cause,
            key: self.key,
            event: Event::decode(&self.kind, self.schema, self.data.get())?,
            hash: hash(&self.hash).context("a hash has 64 hexadecimal digits")?,
        })
    }
}

fn hash(text: &str) -> Option<Hash> {
    let mut bytes = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * index..2 * index + 2)?, 16).ok()?;
    }
    Some(Hash(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_line_is_read_as_it_was_written() {
        let text = r#"{"event":{"seq":2,"id":"01924b6e-7b1a-7000-8000-000000000001","stream":"system","version":2,"kind":"Operation.StepStarted","schema":1,"at":"2026-11-23T06:00:00Z","actor":"engine","origin":{"uid":0,"host":"h","pid":1,"via":"engine"},"epoch":1,"operation":null,"cause":null,"key":null,"data":{"step":3},"hash":"0101010101010101010101010101010101010101010101010101010101010101"}}"#;
        let Ok(Line::Event(line)) = serde_json::from_str::<Line>(text) else { panic!("no event") };
        let envelope = line.envelope().unwrap();
        assert_eq!(envelope.hash, Hash([1; 32]));
        let again = Line::Event(Box::new(EventLine::of(&envelope).unwrap()));
        assert_eq!(serde_json::to_string(&again).unwrap(), text);
        assert_eq!(hash("01"), None);
    }
}
