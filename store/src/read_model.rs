//! Tables that answer lists, for us and for whoever asks with the sqlite3 shell.
//!
//! They are fed in the transaction of each append, by a few small statements per kind of event, and say in
//! `read_model` up to which event. Dropping any of them changes no answer: a writer makes them again when it opens
//! the database or finds one missing, and a reader makes them in its own connection, as TEMP tables of the same names,
//! which take the place of the stored ones there.
//!
//! Architecture Invariant: nothing is decided by these tables. They hold what the engine's projection of the same
//! events holds, and a property test compares the two.

use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, params};
use snaptree_engine::event::{Envelope, Event, SnapshotAdopted, SystemRestored};
use snaptree_engine::ids::{DomainId, OperationId, SnapshotId, StreamId};
use snaptree_engine::log::LogError;
use snaptree_engine::operation::{Failure, Outcome, Request, Verdict};
use snaptree_engine::reconcile::drift::Finding;
use snaptree_engine::tree::Snapshot;

use crate::error::{Tried, failed};
use crate::row::{SELECT, decode, integer};

/// The version of these tables and of the statements that feed them. Another version is made again.
const VERSION: i64 = 2;

/// Events read at once when the tables are made again.
const PAGE: usize = 1000;

/// Where the tables are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the file.
    Main,
    /// In the connection alone.
    Temp,
}

const TABLES: [&str; 4] = ["domains", "snapshots", "operations", "read_model"];

const DDL: &str = "
CREATE TABLE @.domains (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, driver TEXT NOT NULL, current TEXT, labels TEXT NOT NULL,
    registered_at TEXT NOT NULL, unregistered_at TEXT, seq INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX @.domains_name ON domains (name);
CREATE TABLE @.snapshots (
    id TEXT PRIMARY KEY, domain TEXT NOT NULL, name TEXT NOT NULL, description TEXT, parent TEXT,
    current INTEGER NOT NULL, state TEXT NOT NULL, created TEXT NOT NULL, labels TEXT NOT NULL,
    held TEXT, held_until TEXT, made_by TEXT NOT NULL, made_in TEXT, lost INTEGER NOT NULL,
    deleted_at TEXT, deleted_by TEXT, seq INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX @.snapshots_live ON snapshots (domain, parent) WHERE deleted_at IS NULL;
CREATE INDEX @.snapshots_current ON snapshots (domain) WHERE current = 1;
CREATE TABLE @.operations (
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, domain TEXT NOT NULL, domain_name TEXT NOT NULL,
    kind TEXT NOT NULL, snapshot TEXT, snapshot_id TEXT, actor TEXT NOT NULL, outcome TEXT,
    needs_attention INTEGER NOT NULL, requested TEXT NOT NULL, finished TEXT, error TEXT
) STRICT;
CREATE INDEX @.operations_domain ON operations (domain, seq);
CREATE INDEX @.operations_open ON operations (domain, seq) WHERE outcome IS NULL;
CREATE INDEX @.operations_create ON operations (snapshot_id) WHERE kind = 'create';
CREATE TABLE @.read_model (
    one INTEGER PRIMARY KEY CHECK (one = 1), version INTEGER NOT NULL, seq INTEGER NOT NULL
) STRICT;
";

/// Only in the file: for people, and for nothing that we read.
const AUDIT: &str = "
DROP VIEW IF EXISTS main.audit;
CREATE VIEW main.audit AS
SELECT e.seq,
       strftime('%Y-%m-%dT%H:%M:%S', e.at / 1000000, 'unixepoch') || printf('.%06dZ', e.at % 1000000) AS time,
       e.actor,
       json_extract(e.origin, '$.uid') AS uid,
       json_extract(e.origin, '$.via') AS via,
       json_extract(e.origin, '$.host') AS host,
       e.kind,
       d.name AS domain,
       coalesce(CASE WHEN e.kind LIKE 'Snapshot.%' THEN json_extract(e.data, '$.name') END, s.name, o.snapshot)
           AS snapshot,
       e.operation,
       coalesce(json_extract(e.data, '$.reasons'), json_extract(e.data, '$.reason'),
                json_extract(e.data, '$.hold.reason'), json_extract(e.data, '$.failure.message')) AS reasons
FROM main.events e
LEFT JOIN main.domains d ON e.stream LIKE 'domain/%' AND d.id = substr(e.stream, 8)
LEFT JOIN main.operations o ON o.id = e.operation
LEFT JOIN main.snapshots s ON s.id = coalesce(json_extract(e.data, '$.snapshot'),
    json_extract(e.data, '$.snapshots[0]'), json_extract(e.data, '$.plan.snapshots[0]'), o.snapshot_id);
";

/// Kinds that change none of the tables, and may be large.
const IRRELEVANT: &str = "('Operation.Planned', 'Operation.StepStarted', 'Operation.StepFinished', \
                          'Operation.UndoStarted', 'Operation.UndoFinished', 'Operation.AttemptFailed', \
                          'Operation.HookStarted', 'Operation.HookFinished', 'Checkpoint.Kept', \
                          'System.Recovered')";

/// Makes sure that the tables which this connection sees hold everything up to `head`.
pub(crate) fn ensure(connection: &Connection, place: Place, head: u64) -> Result<(), LogError> {
    match marked(connection) {
        Some((VERSION, seq)) if seq == head => Ok(()),
        // Our own TEMP tables, which nobody else feeds, or tables of a writer that an append just went past.
        Some((VERSION, seq)) if seq < head && (place == Place::Main || is_temp(connection)) => {
            feed(connection, seq, head)
        }
        _ => rebuild(connection, place, head),
    }
}

/// Whether every table is in the file; one that somebody dropped is not.
pub(crate) fn is_whole(connection: &Connection) -> Result<bool, LogError> {
    let found: i64 = connection
        .prepare_cached(
            "SELECT count(*) FROM main.sqlite_schema WHERE (type = 'table' AND name IN
                 ('domains', 'snapshots', 'operations', 'read_model')) OR (type = 'view' AND name = 'audit')",
        )
        .and_then(|mut statement| statement.query_row([], |row| row.get(0)))
        .tried("cannot read the schema")?;
    Ok(usize::try_from(found).is_ok_and(|found| found == TABLES.len() + 1))
}

/// Whether the tables hold everything up to `head`.
pub(crate) fn is_at(connection: &Connection, head: u64) -> bool {
    marked(connection) == Some((VERSION, head))
}

/// Which version the tables have, and up to which event; none if that cannot be told.
fn marked(connection: &Connection) -> Option<(i64, u64)> {
    let mut statement = connection.prepare_cached("SELECT version, seq FROM read_model").ok()?;
    statement.query_row([], |row| Ok((row.get(0)?, row.get(1)?))).optional().ok().flatten()
}

pub(crate) fn is_temp(connection: &Connection) -> bool {
    connection
        .prepare_cached("SELECT 1 FROM sqlite_temp_schema WHERE name = 'read_model'")
        .and_then(|mut statement| statement.exists([]))
        .unwrap_or(false)
}

/// Drops the tables and makes them again from the events up to `head`.
pub(crate) fn rebuild(connection: &Connection, place: Place, head: u64) -> Result<(), LogError> {
    let schema = match place {
        Place::Main => "main",
        Place::Temp => "temp",
    };
    let drops: String =
        TABLES.iter().map(|table| format!("DROP TABLE IF EXISTS {schema}.{table};")).collect();
    let what = "cannot make the read model";
    if place == Place::Main {
        connection.execute_batch("DROP VIEW IF EXISTS main.audit").tried(what)?;
    }
    connection.execute_batch(&drops).tried(what)?;
    connection.execute_batch(&DDL.replace('@', schema)).tried(what)?;
    if place == Place::Main {
        connection.execute_batch(AUDIT).tried(what)?;
    }
    connection.execute("INSERT INTO read_model VALUES (1, ?1, 0)", [VERSION]).tried(what)?;
    feed(connection, 0, head)
}

/// Applies the events after `seq` up to `head`.
fn feed(connection: &Connection, seq: u64, head: u64) -> Result<(), LogError> {
    let mut seq = seq;
    loop {
        let page = page(connection, seq, head)?;
        for envelope in &page {
            apply(connection, envelope).map_err(|error| failed("cannot make the read model", &error))?;
        }
        match page.last() {
            Some(last) => seq = last.seq,
            None => return mark(connection, head),
        }
    }
}

fn page(connection: &Connection, seq: u64, head: u64) -> Result<Vec<Envelope>, LogError> {
    let what = "cannot read the events";
    let mut statement = connection
        .prepare_cached(&format!(
            "SELECT {SELECT} FROM main.events WHERE seq > ?1 AND seq <= ?2 AND kind NOT IN {IRRELEVANT}
             ORDER BY seq LIMIT {PAGE}"
        ))
        .tried(what)?;
    let mut rows = statement.query((integer(seq), integer(head))).tried(what)?;
    let mut page = Vec::new();
    while let Some(row) = rows.next().tried(what)? {
        page.push(decode(row)?);
    }
    Ok(page)
}

/// Says that the tables hold everything up to `seq`.
pub(crate) fn mark(connection: &Connection, seq: u64) -> Result<(), LogError> {
    run(connection, "UPDATE read_model SET seq = ?1", [integer(seq)]).tried("cannot mark the read model")
}

fn run(connection: &Connection, sql: &str, params: impl rusqlite::Params) -> rusqlite::Result<()> {
    connection.prepare_cached(sql)?.execute(params).map(|_| ())
}

/// A time as text that sorts as the times do: always six digits of a second.
fn text(at: Timestamp) -> String {
    format!("{at:.6}")
}

fn json<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string(value).unwrap_or_else(|_| "{}".to_owned())
}

/// Applies one event.
pub(crate) fn apply(connection: &Connection, envelope: &Envelope) -> rusqlite::Result<()> {
    let StreamId::Domain(domain) = envelope.stream else { return Ok(()) };
    if let Some(request) = Request::of(&envelope.event) {
        return match envelope.operation {
            Some(operation) => requested(connection, envelope, domain, operation, &request),
            None => Ok(()),
        };
    }
    let id = domain.to_string();
    match &envelope.event {
        Event::DomainRegistered(e) => run(
            connection,
            "INSERT INTO domains (id, name, driver, labels, registered_at, seq, current)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, (SELECT id FROM snapshots WHERE domain = ?1 AND current = 1))
             ON CONFLICT (id) DO UPDATE SET name = excluded.name, driver = excluded.driver,
                 labels = excluded.labels, registered_at = excluded.registered_at, unregistered_at = NULL",
            params![
                id,
                e.domain.name.as_str(),
                e.domain.driver.as_str(),
                json(&e.domain.labels),
                text(envelope.at),
                integer(envelope.seq)
            ],
        ),
        Event::DomainChanged(e) => run(
            connection,
            "UPDATE domains SET name = coalesce(?2, name), labels = coalesce(?3, labels) WHERE id = ?1",
            params![id, e.name.as_ref().map(|name| name.as_str()), e.labels.as_ref().map(json)],
        ),
        Event::DomainUnregistered(_) => run(
            connection,
            "UPDATE domains SET unregistered_at = ?2 WHERE id = ?1 AND unregistered_at IS NULL",
            params![id, text(envelope.at)],
        ),
        Event::SnapshotCreated(e) => created(connection, envelope, &id, &e.snapshot),
        Event::SnapshotReverted(e) => reverted(connection, &id, e.snapshot),
        Event::SnapshotAdopted(e) => adopted(connection, envelope, &id, e),
        Event::SystemRestored(e) => restored(connection, envelope, &id, e),
        Event::SnapshotDeleted(e) => deleted(connection, envelope, &id, e.snapshot),
        event @ (Event::SnapshotEdited(_) | Event::SnapshotHeld(_) | Event::SnapshotReleased(_)) => {
            written(connection, &id, event)
        }
        Event::DriftFound(e) => lost(connection, &id, &e.finding, 1),
        Event::DriftCleared(e) => lost(connection, &id, &e.finding, 0),
        event => match envelope.operation {
            Some(operation) => advanced(connection, envelope, operation, event),
            None => Ok(()),
        },
    }
}

/// A snapshot's data went, or is there again.
fn lost(connection: &Connection, domain: &str, finding: &Finding, lost: i64) -> rusqlite::Result<()> {
    let Finding::SnapshotLost { snapshot, .. } = finding else { return Ok(()) };
    run(
        connection,
        "UPDATE snapshots SET lost = ?3 WHERE domain = ?1 AND id = ?2 AND deleted_at IS NULL",
        (domain, snapshot.to_string(), lost),
    )
}

fn requested(
    connection: &Connection,
    envelope: &Envelope,
    domain: DomainId,
    operation: OperationId,
    request: &Request,
) -> rusqlite::Result<()> {
    let snapshot = request.snapshots().first().map(SnapshotId::to_string);
    let name = match request {
        Request::Create(create) => Some(create.name.as_str()),
        _ => None,
    };
    // A request may be about a snapshot whose create is still open: then only that request has its name.
    run(
        connection,
        "INSERT INTO operations (seq, id, domain, domain_name, kind, snapshot, snapshot_id, actor,
                                 needs_attention, requested)
         VALUES (?1, ?2, ?3, coalesce((SELECT name FROM domains WHERE id = ?3), 'unknown'), ?4,
                 coalesce(?5, (SELECT name FROM snapshots WHERE id = ?6),
                          (SELECT snapshot FROM operations WHERE snapshot_id = ?6 AND kind = 'create')),
                 ?6, ?7, 0, ?8)
         ON CONFLICT (id) DO NOTHING",
        params![
            integer(envelope.seq),
            operation.to_string(),
            domain.to_string(),
            request.kind(),
            name,
            snapshot,
            envelope.actor.to_string(),
            text(envelope.at)
        ],
    )
}

fn advanced(
    connection: &Connection,
    envelope: &Envelope,
    operation: OperationId,
    event: &Event,
) -> rusqlite::Result<()> {
    let id = operation.to_string();
    match event {
        Event::OperationSucceeded(_) => ended(connection, envelope, &id, Outcome::Succeeded, None),
        Event::OperationFailed(e) => ended(connection, envelope, &id, Outcome::Failed, Some(&e.failure)),
        Event::OperationExpired(e) => ended(connection, envelope, &id, Outcome::Expired, Some(&e.failure)),
        Event::OperationResolved(e) if e.verdict == Verdict::Abandon => {
            ended(connection, envelope, &id, Outcome::Failed, e.abandoned().as_ref())
        }
        Event::OperationCancelled(e) => {
            ended(connection, envelope, &id, Outcome::Cancelled, Some(&e.failure))
        }
        Event::OperationNeedsAttention(e) => run(
            connection,
            "UPDATE operations SET needs_attention = 1, error = ?2 WHERE id = ?1 AND outcome IS NULL",
            (&id, &e.failure.message),
        ),
        Event::OperationRetried(_) | Event::OperationResolved(_) => run(
            connection,
            "UPDATE operations SET needs_attention = 0, error = NULL WHERE id = ?1 AND outcome IS NULL",
            [&id],
        ),
        _ => Ok(()),
    }
}

fn ended(
    connection: &Connection,
    envelope: &Envelope,
    id: &str,
    outcome: Outcome,
    failure: Option<&Failure>,
) -> rusqlite::Result<()> {
    run(
        connection,
        "UPDATE operations SET outcome = ?2, finished = ?3, error = ?4, needs_attention = 0
         WHERE id = ?1 AND outcome IS NULL",
        params![id, outcome.as_str(), text(envelope.at), failure.map(|failure| &failure.message)],
    )
}

/// Its parent is the snapshot that was current, whatever the payload says; see the table in DESIGN, section 3.
fn created(
    connection: &Connection,
    envelope: &Envelope,
    domain: &str,
    snapshot: &Snapshot,
) -> rusqlite::Result<()> {
    let parent: Option<String> = connection
        .prepare_cached("SELECT id FROM snapshots WHERE domain = ?1 AND current = 1")?
        .query_row([domain], |row| row.get(0))
        .optional()?;
    run(connection, "UPDATE snapshots SET current = 0 WHERE domain = ?1 AND current = 1", [domain])?;
    inserted(connection, envelope, domain, snapshot, (parent, Stand::Current))?;
    note_current(connection, domain)
}

/// Whether the machine stands on a snapshot.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stand {
    Current,
    Elsewhere,
}

fn inserted(
    connection: &Connection,
    envelope: &Envelope,
    domain: &str,
    snapshot: &Snapshot,
    (parent, stand): (Option<String>, Stand),
) -> rusqlite::Result<()> {
    run(
        connection,
        "INSERT OR REPLACE INTO snapshots (id, domain, name, description, parent, current, state, created, labels,
                                           held, held_until, made_by, made_in, lost, seq)
         VALUES (?1, ?2, ?3, ?4, ?5, ?15, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14)",
        params![
            snapshot.id.to_string(),
            domain,
            snapshot.name.as_str(),
            snapshot.description,
            parent,
            snapshot.state.as_str(),
            text(snapshot.created),
            json(&snapshot.labels),
            snapshot.hold.as_ref().map(|hold| &hold.reason),
            snapshot.hold.as_ref().and_then(|hold| hold.until).map(text),
            snapshot.made_by.to_string(),
            snapshot.made_in.map(|operation| operation.to_string()),
            snapshot.lost,
            integer(envelope.seq),
            stand == Stand::Current
        ],
    )
}

/// It stands where the hypervisor has it; its children move upon it.
fn adopted(
    connection: &Connection,
    envelope: &Envelope,
    domain: &str,
    adopted: &SnapshotAdopted,
) -> rusqlite::Result<()> {
    let id = adopted.snapshot.id.to_string();
    let parent: Option<String> = match adopted.snapshot.parent {
        Some(parent) => connection
            .prepare_cached("SELECT id FROM snapshots WHERE domain = ?1 AND id = ?2 AND deleted_at IS NULL")?
            .query_row((domain, parent.to_string()), |row| row.get(0))
            .optional()?,
        None => None,
    };
    inserted(connection, envelope, domain, &adopted.snapshot, (parent, Stand::Elsewhere))?;
    for child in &adopted.children {
        // None that it stands upon itself may become its child.
        run(
            connection,
            "UPDATE snapshots SET parent = ?3 WHERE domain = ?1 AND id = ?2 AND deleted_at IS NULL AND id NOT IN (
                 WITH RECURSIVE above (id) AS (SELECT ?3 UNION SELECT s.parent FROM snapshots s JOIN above a
                     ON s.id = a.id WHERE s.parent IS NOT NULL) SELECT id FROM above)",
            (domain, child.to_string(), &id),
        )?;
    }
    Ok(())
}

/// All live snapshots are those of the event; others that lived are gone.
fn restored(
    connection: &Connection,
    envelope: &Envelope,
    domain: &str,
    restored: &SystemRestored,
) -> rusqlite::Result<()> {
    run(
        connection,
        "UPDATE snapshots SET deleted_at = ?2, deleted_by = ?3, current = 0
         WHERE domain = ?1 AND deleted_at IS NULL",
        (domain, text(envelope.at), envelope.actor.to_string()),
    )?;
    let current = restored.tree.current().map(|current| current.id);
    for snapshot in restored.tree.iter() {
        let stand = if current == Some(snapshot.id) { Stand::Current } else { Stand::Elsewhere };
        let parent = snapshot.parent.map(|parent| parent.to_string());
        inserted(connection, envelope, domain, snapshot, (parent, stand))?;
    }
    note_current(connection, domain)
}

fn note_current(connection: &Connection, domain: &str) -> rusqlite::Result<()> {
    run(
        connection,
        "UPDATE domains SET current = (SELECT id FROM snapshots WHERE domain = ?1 AND current = 1) WHERE id = ?1",
        [domain],
    )
}

fn reverted(connection: &Connection, domain: &str, snapshot: SnapshotId) -> rusqlite::Result<()> {
    run(
        connection,
        "UPDATE snapshots SET current = (id = ?2)
         WHERE domain = ?1 AND (current = 1 OR id = ?2) AND deleted_at IS NULL
           AND EXISTS (SELECT 1 FROM snapshots WHERE id = ?2 AND domain = ?1 AND deleted_at IS NULL)",
        (domain, snapshot.to_string()),
    )?;
    note_current(connection, domain)
}

/// Its children move to its parent; if it was current, its parent is. The row stays, for its name.
fn deleted(
    connection: &Connection,
    envelope: &Envelope,
    domain: &str,
    snapshot: SnapshotId,
) -> rusqlite::Result<()> {
    let id = snapshot.to_string();
    let row: Option<(Option<String>, bool)> = connection
        .prepare_cached(
            "SELECT parent, current FROM snapshots WHERE id = ?1 AND domain = ?2 AND deleted_at IS NULL",
        )?
        .query_row((&id, domain), |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    let Some((parent, current)) = row else { return Ok(()) };
    run(
        connection,
        "UPDATE snapshots SET deleted_at = ?2, deleted_by = ?3, current = 0 WHERE id = ?1",
        (&id, text(envelope.at), envelope.actor.to_string()),
    )?;
    run(
        connection,
        "UPDATE snapshots SET parent = ?3 WHERE domain = ?1 AND parent = ?2 AND deleted_at IS NULL",
        (domain, &id, &parent),
    )?;
    if current {
        run(connection, "UPDATE snapshots SET current = 1 WHERE id = ?1 AND deleted_at IS NULL", [&parent])?;
    }
    note_current(connection, domain)
}

fn written(connection: &Connection, domain: &str, event: &Event) -> rusqlite::Result<()> {
    match event {
        Event::SnapshotEdited(e) => run(
            connection,
            "UPDATE snapshots SET name = coalesce(?3, name), labels = coalesce(?5, labels),
                 description = CASE WHEN ?4 IS NULL THEN description ELSE nullif(?4, '') END
             WHERE domain = ?1 AND id = ?2 AND deleted_at IS NULL",
            params![
                domain,
                e.snapshot.to_string(),
                e.name.as_ref().map(|name| name.as_str()),
                e.description,
                e.labels.as_ref().map(json)
            ],
        ),
        Event::SnapshotHeld(e) => run(
            connection,
            "UPDATE snapshots SET held = ?3, held_until = ?4
             WHERE domain = ?1 AND id = ?2 AND deleted_at IS NULL",
            params![domain, e.snapshot.to_string(), e.hold.reason, e.hold.until.map(text)],
        ),
        Event::SnapshotReleased(e) => run(
            connection,
            "UPDATE snapshots SET held = NULL, held_until = NULL
             WHERE domain = ?1 AND id = ?2 AND deleted_at IS NULL",
            (domain, e.snapshot.to_string()),
        ),
        _ => Ok(()),
    }
}
