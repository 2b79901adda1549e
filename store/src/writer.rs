//! The one who commits: a thread, or whoever asks, where a program has nothing else to do.
//!
//! # Expected flow
//! 1. It waits for an append, takes whatever else waits, and begins a transaction.
//! 2. It compares its epoch with the owner's row, and claims the next epoch with its first append.
//! 3. Each append is judged on its own; where several come together, inside a savepoint.
//! 4. One COMMIT, and one fsync, for all of them; only then are they answered, and only then does the head move.
//!
//! # Guarantees
//! * Whatever fails before or in the COMMIT leaves the log, the head and the epoch as they were.
//! * A refused append does not harm the others of its group.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, params};
use snaptree_engine::claim::{Claimed, Claims};
use snaptree_engine::driver::Head;
use snaptree_engine::event::{Envelope, Hash};
use snaptree_engine::log::{Checkpoint, LogError};
use tokio::sync::{mpsc, oneshot, watch};

use crate::chain::{Field, link};
use crate::error::{Tried, Words, copy_of, failed};
use crate::read_model::{self, Place};
use crate::reader::{self, locked};
use crate::row::{Prepared, PreparedEvent, integer};
use crate::{CHECKPOINT_BYTES_MAX, schema};

/// How many requests may wait for the writer before whoever asks has to wait too.
const QUEUE_MAX: usize = 1024;

/// A group takes no more requests once it has that many events: one append must not wait for minutes.
const GROUP_EVENTS: usize = 4096;

/// What the writer is asked to do.
#[derive(Debug)]
pub(crate) enum Work {
    Append(Prepared),
    Keep(Checkpoint),
    Rebuild,
}

/// What it did.
#[derive(Debug)]
pub(crate) enum Done {
    Appended(Vec<Envelope>),
    Kept,
}

type Reply = oneshot::Sender<Result<Done, LogError>>;

/// Who this process is, for the owner's row.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) pid: u32,
    pub(crate) host: String,
    pub(crate) program: String,
}

/// Who commits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Commits {
    /// A thread, which takes what comes together as a group. Whoever asks may do something else meanwhile.
    #[default]
    Thread,
    /// Whoever asks, one at a time and while it is asked: for a program that has nothing else to do meanwhile.
    InPlace,
}

/// The way to what commits.
#[derive(Debug)]
pub(crate) struct Writer {
    way: Way,
    pub(crate) commits: Arc<AtomicU64>,
}

#[derive(Debug)]
enum Way {
    /// The thread ends when this is dropped, after what was asked for.
    Thread { queue: Option<mpsc::Sender<(Work, Reply)>>, thread: Option<JoinHandle<()>> },
    /// Never locked across an await.
    InPlace { desk: Box<Mutex<Desk>> },
}

/// What commits, and whom it tells.
#[derive(Debug)]
struct Desk {
    core: Core,
    head: watch::Sender<u64>,
    counter: Arc<AtomicU64>,
}

impl Desk {
    fn commit(&mut self, works: Vec<Work>) -> Vec<Result<Done, LogError>> {
        let results = self.core.commit(works);
        self.counter.store(self.core.commits, Ordering::Relaxed);
        let head = self.core.head.seq;
        self.head.send_if_modified(|seq| std::mem::replace(seq, head) != head);
        results
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        schema::bring_home(&self.core.connection);
    }
}

impl Writer {
    /// Sets it up.
    pub(crate) fn start(core: Core, head: watch::Sender<u64>, who: Commits) -> std::io::Result<Self> {
        let commits = Arc::new(AtomicU64::new(0));
        let mut desk = Desk { core, head, counter: Arc::clone(&commits) };
        if who == Commits::InPlace {
            return Ok(Self { way: Way::InPlace { desk: Box::new(Mutex::new(desk)) }, commits });
        }
        let (queue, mut waiting) = mpsc::channel::<(Work, Reply)>(QUEUE_MAX);
        let thread = std::thread::Builder::new().name("snaptree-writer".to_owned()).spawn(move || {
            while let Some(first) = waiting.blocking_recv() {
                let (works, replies) = group(first, &mut waiting);
                let results = desk.commit(works);
                for (reply, result) in replies.into_iter().zip(results) {
                    // Whoever asked may have gone; what was committed stays committed.
                    let _ = reply.send(result);
                }
            }
        })?;
        Ok(Self { way: Way::Thread { queue: Some(queue), thread: Some(thread) }, commits })
    }

    /// Asks, and waits for the answer.
    pub(crate) async fn ask(&self, work: Work) -> Result<Done, LogError> {
        let stopped = || LogError::Backend {
            message: "the writer stopped".to_owned(),
            source: Box::new(Words("its thread ended".to_owned())),
        };
        match &self.way {
            Way::InPlace { desk } => {
                let results = locked(desk).commit(vec![work]);
                results.into_iter().next().unwrap_or_else(|| Err(stopped()))
            }
            Way::Thread { queue, .. } => {
                let (reply, answer) = oneshot::channel();
                let queue = queue.as_ref().ok_or_else(stopped)?;
                queue.send((work, reply)).await.map_err(|_| stopped())?;
                answer.await.map_err(|_| stopped())?
            }
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let Way::Thread { queue, thread } = &mut self.way else { return };
        drop(queue.take());
        if let Some(thread) = thread.take() {
            // A panic of the thread was reported on stderr; the connection is closed either way.
            let _ = thread.join();
        }
    }
}

/// The first request, and whatever else waits.
fn group(first: (Work, Reply), waiting: &mut mpsc::Receiver<(Work, Reply)>) -> (Vec<Work>, Vec<Reply>) {
    let weight = |work: &Work| if let Work::Append(append) = work { append.events.len() } else { 1 };
    let mut events = weight(&first.0);
    let (mut works, mut replies) = (vec![first.0], vec![first.1]);
    while events < GROUP_EVENTS && works.len() < QUEUE_MAX {
        let Ok((work, reply)) = waiting.try_recv() else { break };
        events += weight(&work);
        works.push(work);
        replies.push(reply);
    }
    (works, replies)
}

/// The connection that writes, and what it knows.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) connection: Connection,
    identity: Identity,
    /// The epoch that this process owns; none before its first append.
    epoch: Option<u64>,
    /// The last event that was committed.
    pub(crate) head: Head,
    /// How many transactions were committed.
    pub(crate) commits: u64,
    /// What the connection's commits outlast; none before it was set.
    durability: Option<Durability>,
    /// Who has what, with the appends of the transaction in hand; none before it was asked for, and after an append that
    /// was taken back. Derived from the log alone, so that no table can contradict it.
    claims: Option<Claims>,
}

/// What a commit outlasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Durability {
    /// A power cut.
    Full,
    /// The end of this process.
    Normal,
}

impl Core {
    /// Over a connection to a database that is up to date.
    pub(crate) fn new(connection: Connection, identity: Identity) -> Result<Self, LogError> {
        let head = stored_head(&connection)?;
        Ok(Self { connection, identity, epoch: None, head, commits: 0, durability: None, claims: None })
    }

    /// Carries out a group; one answer each, in order.
    pub(crate) fn commit(&mut self, works: Vec<Work>) -> Vec<Result<Done, LogError>> {
        let count = works.len();
        let kept_only = works.iter().all(|work| matches!(work, Work::Keep(_)));
        let durability = if kept_only { Durability::Normal } else { Durability::Full };
        let outcome = self.synchronous(durability).and_then(|()| self.try_commit(works));
        outcome.unwrap_or_else(|error| {
            self.roll_back();
            (0..count).map(|_| Err(copy_of(&error))).collect()
        })
    }

    /// A checkpoint may be lost, so it alone is not worth an fsync. The level holds from the next transaction on.
    fn synchronous(&mut self, wanted: Durability) -> Result<(), LogError> {
        if self.durability == Some(wanted) {
            return Ok(());
        }
        let level = match wanted {
            Durability::Full => 2,
            Durability::Normal => 1,
        };
        // Should it fail, nobody knows what holds.
        self.durability = None;
        self.connection
            .pragma_update(None, "synchronous", level)
            .tried("cannot set the level of durability")?;
        self.durability = Some(wanted);
        Ok(())
    }

    fn roll_back(&mut self) {
        self.claims = None;
        if !self.connection.is_autocommit()
            && let Err(error) = self.connection.execute_batch("ROLLBACK")
        {
            tracing::error!(%error, "a failed transaction could not be rolled back");
        }
    }

    fn try_commit(&mut self, works: Vec<Work>) -> Result<Vec<Result<Done, LogError>>, LogError> {
        let what = "cannot write the log";
        self.run("BEGIN IMMEDIATE").tried(what)?;
        let appends = works.iter().any(|work| matches!(work, Work::Append(_)));
        let epoch = if appends { Some(self.own()?) } else { self.epoch };
        let stored = stored_head(&self.connection)?;
        if stored != self.head {
            return Err(LogError::Damaged(format!(
                "its last event is {}, and this process left it at {}: another program writes it",
                stored.seq, self.head.seq
            )));
        }
        read_model::ensure(&self.connection, Place::Main, stored.seq)?;
        let mut head = self.head;
        let mut results = Vec::with_capacity(works.len());
        let alone = works.len() == 1;
        for work in works {
            let epoch = epoch.unwrap_or(0);
            results.push(if alone {
                // What it wrote goes with the transaction, if it fails.
                self.carry_out(work, epoch, &mut head)
            } else {
                self.one(work, epoch, &mut head)?
            });
        }
        if results.iter().all(Result::is_err) {
            self.roll_back();
            return Ok(results);
        }
        read_model::mark(&self.connection, head.seq)?;
        self.run("COMMIT").tried(what)?;
        self.commits += 1;
        self.head = head;
        self.epoch = epoch;
        Ok(results)
    }

    fn run(&self, sql: &str) -> rusqlite::Result<()> {
        self.connection.prepare_cached(sql)?.execute([]).map(|_| ())
    }

    /// One request in its savepoint. The outer error is the whole group's.
    fn one(&mut self, work: Work, epoch: u64, head: &mut Head) -> Result<Result<Done, LogError>, LogError> {
        let what = "cannot write the log";
        self.run("SAVEPOINT one").tried(what)?;
        let before = *head;
        let result = self.carry_out(work, epoch, head);
        if let Err(error) = result {
            *head = before;
            self.claims = None;
            // A full disk ends the whole transaction, and with it every savepoint.
            if self.connection.is_autocommit() {
                return Err(error);
            }
            self.run("ROLLBACK TO one").tried(what)?;
            self.run("RELEASE one").tried(what)?;
            return Ok(Err(error));
        }
        self.run("RELEASE one").tried(what)?;
        Ok(result)
    }

    fn carry_out(&mut self, work: Work, epoch: u64, head: &mut Head) -> Result<Done, LogError> {
        match work {
            Work::Append(append) => self.append(append, epoch, head).map(Done::Appended),
            Work::Keep(checkpoint) => keep(&self.connection, &checkpoint).map(|()| Done::Kept),
            Work::Rebuild => {
                read_model::rebuild(&self.connection, Place::Main, head.seq).map(|()| Done::Kept)
            }
        }
    }

    /// The epoch of this process, which it claims if it has none; refused if another one owns the state by now.
    fn own(&self) -> Result<u64, LogError> {
        let what = "cannot read the owner";
        let current: Option<u64> = self
            .connection
            .prepare_cached("SELECT epoch FROM owner")
            .tried(what)?
            .query_row([], |row| row.get(0))
            .optional()
            .tried(what)?;
        match self.epoch {
            Some(ours) if current == Some(ours) => Ok(ours),
            Some(ours) => Err(LogError::Fenced { ours, current: current.unwrap_or(0) }),
            None => self.claim(current.unwrap_or(0)),
        }
    }

    fn claim(&self, current: u64) -> Result<u64, LogError> {
        let what = "cannot claim the ownership";
        // The log itself remembers the epochs, should the owner's row be gone.
        let written: Option<u64> = self
            .connection
            .prepare_cached("SELECT epoch FROM events ORDER BY seq DESC LIMIT 1")
            .tried(what)?
            .query_row([], |row| row.get(0))
            .optional()
            .tried(what)?;
        let epoch = current.max(written.unwrap_or(0)) + 1;
        let Identity { pid, host, program } = &self.identity;
        self.connection
            .execute(
                "INSERT OR REPLACE INTO owner (one, epoch, pid, host, since, program)
                 VALUES (1, ?1, ?2, ?3, ?4, ?5)",
                params![integer(epoch), pid, host, Timestamp::now().to_string(), program],
            )
            .tried(what)?;
        Ok(epoch)
    }

    fn append(&mut self, append: Prepared, epoch: u64, head: &mut Head) -> Result<Vec<Envelope>, LogError> {
        for (stream, expected) in &append.expect {
            let found = stored_version(&self.connection, &stream.to_string())?;
            if found != *expected {
                return Err(LogError::Conflict { stream: stream.clone(), expected: *expected, found });
            }
        }
        self.take_claims(&append, head.seq)?;
        let mut versions: HashMap<String, u64> = HashMap::new();
        let mut envelopes = Vec::with_capacity(append.events.len());
        let Prepared { at, at_us, actor, actor_text, origin, origin_text, events, .. } = append;
        for event in events {
            self.check_key(&event)?;
            let known = versions.get(&event.stream_text).copied();
            let last = match known {
                Some(version) => version,
                None => stored_version(&self.connection, &event.stream_text)?,
            };
            versions.insert(event.stream_text.clone(), last + 1);
            let place = Position { seq: head.seq + 1, version: last + 1, epoch, at_us };
            let hash = self.insert(&event, &place, &actor_text, &origin_text, &head.hash)?;
            *head = Head { seq: place.seq, hash };
            let envelope = Envelope {
                seq: place.seq,
                id: event.id,
                stream: event.stream,
                version: place.version,
                at,
                actor: actor.clone(),
                origin: origin.clone(),
                epoch,
                operation: event.operation,
                cause: event.cause,
                key: event.key,
                event: event.event,
                hash,
            };
            self.model(&envelope)?;
            envelopes.push(envelope);
        }
        Ok(envelopes)
    }

    /// Judges what the append takes, and keeps it. `head` is the last event before the append.
    fn take_claims(&mut self, append: &Prepared, head: u64) -> Result<(), LogError> {
        if !append.events.iter().any(|event| Claims::concern(&event.event)) {
            return Ok(());
        }
        let claims = match &mut self.claims {
            Some(claims) => claims,
            None => self.claims.insert(reader::claims_at(&self.connection, head)?),
        };
        for PreparedEvent { stream, event, .. } in &append.events {
            let Claimed { claim, owner } = match claims.check(stream, event) {
                Ok(()) => {
                    claims.apply(stream, event);
                    continue;
                }
                Err(claimed) => claimed,
            };
            return Err(LogError::Claimed { claim, owner });
        }
        Ok(())
    }

    fn check_key(&self, event: &PreparedEvent) -> Result<(), LogError> {
        let Some(key) = &event.key else { return Ok(()) };
        let used = self
            .connection
            .prepare_cached("SELECT 1 FROM events WHERE stream = ?1 AND key = ?2 AND key IS NOT NULL")
            .and_then(|mut statement| statement.exists((&event.stream_text, key)))
            .tried("cannot look for the key")?;
        if used {
            return Err(LogError::KeyUsed { stream: event.stream.clone(), key: key.clone() });
        }
        Ok(())
    }

    fn insert(
        &self,
        event: &PreparedEvent,
        place: &Position,
        actor: &str,
        origin: &str,
        previous: &Hash,
    ) -> Result<Hash, LogError> {
        let kind = event.event.kind();
        let schema = i64::from(event.event.schema());
        let (seq, version, epoch) = (integer(place.seq), integer(place.version), integer(place.epoch));
        let cause = event.cause.map(integer);
        let hash = link(
            previous,
            &[
                seq.into(),
                event.id_text.as_str().into(),
                event.stream_text.as_str().into(),
                version.into(),
                kind.into(),
                schema.into(),
                place.at_us.into(),
                actor.into(),
                origin.into(),
                epoch.into(),
                event.operation_text.as_deref().into(),
                cause.map_or(Field::Null, Field::Integer),
                event.key.as_deref().into(),
                event.data.as_str().into(),
            ],
        );
        self.connection
            .prepare_cached("INSERT INTO events VALUES (?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,?11,?12,?13,?14,?15)")
            .and_then(|mut statement| {
                statement.execute(params![
                    seq,
                    event.id_text,
                    event.stream_text,
                    version,
                    kind,
                    schema,
                    place.at_us,
                    actor,
                    origin,
                    epoch,
                    event.operation_text,
                    cause,
                    event.key,
                    event.data,
                    hash.0
                ])
            })
            .tried("cannot write the event")?;
        Ok(hash)
    }

    /// Feeds the read model; one that somebody dropped meanwhile is made again, for the log must not stop for it.
    fn model(&self, envelope: &Envelope) -> Result<(), LogError> {
        match read_model::apply(&self.connection, envelope) {
            Ok(()) => Ok(()),
            Err(error) if is_schema_error(&error) => {
                read_model::rebuild(&self.connection, Place::Main, envelope.seq)
            }
            Err(error) => Err(failed("cannot write the read model", &error)),
        }
    }
}

/// Where an event comes to stand.
struct Position {
    seq: u64,
    version: u64,
    epoch: u64,
    at_us: i64,
}

/// Whether a table or column is not there (SQLITE_ERROR, which SQLite raises when it prepares a statement).
pub(crate) fn is_schema_error(error: &rusqlite::Error) -> bool {
    matches!(error, rusqlite::Error::SqliteFailure(code, _) | rusqlite::Error::SqlInputError { error: code, .. }
        if code.extended_code == rusqlite::ffi::SQLITE_ERROR)
}

/// The last event in the file; the installation id for an empty log.
pub(crate) fn stored_head(connection: &Connection) -> Result<Head, LogError> {
    let what = "cannot read the head";
    let row: Option<(u64, [u8; 32])> = connection
        .prepare_cached("SELECT seq, hash FROM events ORDER BY seq DESC LIMIT 1")
        .tried(what)?
        .query_row([], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()
        .tried(what)?;
    match row {
        Some((seq, hash)) => Ok(Head { seq, hash: Hash(hash) }),
        None => Ok(Head { seq: 0, hash: schema::installation(connection)? }),
    }
}

fn stored_version(connection: &Connection, stream: &str) -> Result<u64, LogError> {
    connection
        .prepare_cached("SELECT coalesce(max(version), 0) FROM events WHERE stream = ?1")
        .and_then(|mut statement| statement.query_row([stream], |row| row.get(0)))
        .tried("cannot read the version of a stream")
}

/// The table of checkpoints, which somebody may have dropped.
pub(crate) const CHECKPOINTS: &str = "
CREATE TABLE IF NOT EXISTS checkpoints (
    stream TEXT PRIMARY KEY, projector INTEGER NOT NULL, version INTEGER NOT NULL, seq INTEGER NOT NULL,
    hash TEXT NOT NULL, state TEXT NOT NULL
) STRICT";

fn keep(connection: &Connection, checkpoint: &Checkpoint) -> Result<(), LogError> {
    let what = "cannot keep the checkpoint";
    if checkpoint.state.len() > CHECKPOINT_BYTES_MAX {
        return Err(LogError::Backend {
            message: what.to_owned(),
            source: Box::new(Words(format!("it has more than {CHECKPOINT_BYTES_MAX} bytes"))),
        });
    }
    let insert = || {
        connection
            .prepare_cached("INSERT OR REPLACE INTO checkpoints VALUES (?1, ?2, ?3, ?4, ?5, ?6)")?
            .execute(params![
                checkpoint.stream.to_string(),
                checkpoint.projector,
                integer(checkpoint.version),
                integer(checkpoint.seq),
                checkpoint.hash,
                checkpoint.state
            ])
            .map(|_| ())
    };
    match insert() {
        Err(error) if is_schema_error(&error) => {
            connection.execute_batch(CHECKPOINTS).and_then(|()| insert()).tried(what)
        }
        result => result.tried(what),
    }
}

#[cfg(test)]
mod tests;
