//! Connections that only read, and the queries that run on them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension, Row, params, params_from_iter};
use snaptree_engine::claim::Claims;
use snaptree_engine::event::{Envelope, Event};
use snaptree_engine::ids::{DomainId, DomainName, PolicyName, StreamId};
use snaptree_engine::log::{
    Checkpoint, ClockOrder, DomainRow, EventFilter, LogError, OperationFilter, OperationRow, SeqAt,
};

use crate::error::Tried;
use crate::read_model::{self, Place};
use crate::row::{SELECT, decode, integer, limit};
use crate::schema::{ReadAccess, open_reader};
use crate::writer::stored_head;
use crate::{CHECKPOINT_BYTES_MAX, DATABASE_FILE};

/// Connections that are kept open while nobody reads: opening one reads the whole schema, which costs more than most
/// queries.
const IDLE_MAX: usize = 16;

/// Idle connections; more are opened when all are in use.
#[derive(Debug)]
pub(crate) struct Pool {
    dir: PathBuf,
    access: ReadAccess,
    idle: Mutex<Vec<Connection>>,
}

/// A lock whose holder panicked guards a list of connections all the same.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    pub(crate) fn new(dir: PathBuf, access: ReadAccess, first: Option<Connection>) -> Self {
        Self { dir, access, idle: Mutex::new(first.into_iter().collect()) }
    }

    /// A connection of its own.
    pub(crate) fn connect(&self) -> Result<Connection, LogError> {
        open_reader(&self.dir.join(DATABASE_FILE), self.access).tried("cannot open the database")
    }

    /// Runs a query on some connection. One on which it failed is not used again.
    pub(crate) fn with<T>(
        &self,
        query: impl FnOnce(&Connection) -> Result<T, LogError>,
    ) -> Result<T, LogError> {
        let idle = locked(&self.idle).pop();
        let connection = match idle {
            Some(connection) => connection,
            None => self.connect()?,
        };
        let result = query(&connection);
        if result.is_ok() {
            let mut idle = locked(&self.idle);
            if idle.len() < IDLE_MAX {
                idle.push(connection);
            }
        }
        result
    }

    /// Runs a query that needs the read model, in one view of the file with it.
    pub(crate) fn with_model<T>(
        &self,
        query: impl FnOnce(&Connection, u64) -> Result<T, LogError>,
    ) -> Result<T, LogError> {
        self.with(|connection| {
            let view = connection.unchecked_transaction().tried("cannot begin to read")?;
            let head = stored_head(&view)?.seq;
            if read_model::is_whole(&view)? || read_model::is_temp(&view) {
                read_model::ensure(&view, Place::Temp, head)?;
            } else {
                read_model::rebuild(&view, Place::Temp, head)?;
            }
            let answer = query(&view, head)?;
            view.commit().tried("cannot end reading")?;
            Ok(answer)
        })
    }
}

fn collect<T>(
    connection: &Connection,
    sql: &str,
    params: impl rusqlite::Params,
    mut each: impl FnMut(&Row<'_>) -> Result<T, LogError>,
) -> Result<Vec<T>, LogError> {
    let what = "cannot read the log";
    let mut statement = connection.prepare_cached(sql).tried(what)?;
    let mut rows = statement.query(params).tried(what)?;
    let mut found = Vec::new();
    while let Some(row) = rows.next().tried(what)? {
        found.push(each(row)?);
    }
    Ok(found)
}

/// The greatest version of a stream whose event is not after `seq`. Version and seq grow together, so it is found by
/// halving.
fn version_at(connection: &Connection, stream: &str, seq: u64) -> Result<u64, LogError> {
    let what = "cannot read the versions of a stream";
    let mut high: u64 = connection
        .prepare_cached("SELECT coalesce(max(version), 0) FROM events WHERE stream = ?1")
        .and_then(|mut statement| statement.query_row([stream], |row| row.get(0)))
        .tried(what)?;
    let mut statement =
        connection.prepare_cached("SELECT seq FROM events WHERE stream = ?1 AND version = ?2").tried(what)?;
    let mut seq_of = |version: u64| -> Result<Option<u64>, LogError> {
        statement.query_row((stream, integer(version)), |row| row.get(0)).optional().tried(what)
    };
    let mut low = 0;
    // In a sound log `low` is never after `seq`, and everything above `high` is.
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        match seq_of(middle)? {
            Some(found) if found <= seq => low = middle,
            _ => high = middle - 1,
        }
    }
    Ok(low)
}

pub(crate) fn stream(
    connection: &Connection,
    stream: &StreamId,
    version: u64,
    seq_max: u64,
    count: usize,
) -> Result<Vec<Envelope>, LogError> {
    let stream = stream.to_string();
    let last = if seq_max == u64::MAX { u64::MAX } else { version_at(connection, &stream, seq_max)? };
    collect(
        connection,
        &format!(
            "SELECT {SELECT} FROM events WHERE stream = ?1 AND version > ?2 AND version <= ?3
             ORDER BY version LIMIT ?4"
        ),
        params![stream, integer(version), integer(last), limit(count)],
        decode,
    )
}

/// What the kinds begin with that have an index of their own.
const POLICY_KINDS: &str = "Policy.";

/// The events after `seq` that `filter` lets through. A kind is a prefix if it ends with a dot, and else exact.
pub(crate) fn filtered(
    connection: &Connection,
    seq: u64,
    filter: &EventFilter,
    count: usize,
) -> Result<Vec<Envelope>, LogError> {
    let mut sql = format!("SELECT {SELECT} FROM events ");
    let mut params: Vec<Value> = Vec::new();
    let mut order = "seq";
    if let Some(stream) = &filter.stream {
        let stream = stream.to_string();
        let version = version_at(connection, &stream, seq)?;
        sql.push_str("WHERE stream = ? AND version > ?");
        params.extend([Value::from(stream), Value::from(integer(version))]);
        order = "version";
    } else {
        sql.push_str(match &filter.kind {
            Some(kind) if kind.starts_with(POLICY_KINDS) => {
                "INDEXED BY events_policies WHERE kind >= 'Policy.' AND kind < 'Policy/' AND seq > ?"
            }
            _ => "WHERE seq > ?",
        });
        params.push(integer(seq.max(before(connection, filter.since)?)).into());
    }
    let mut and = |clause: &str, value: Value| {
        // Writing to a String does not fail.
        let _ = write!(sql, " AND {clause}");
        params.push(value);
    };
    if let Some(operation) = filter.operation {
        and("operation = ?", operation.to_string().into());
    }
    if let Some(actor) = &filter.actor {
        and("actor = ?", actor.clone().into());
    }
    match &filter.kind {
        Some(prefix) if prefix.ends_with('.') => {
            and("substr(kind, 1, ?) = ", limit(prefix.chars().count()).into());
            sql.push('?');
            params.push(prefix.clone().into());
        }
        Some(kind) => and("kind = ?", kind.clone().into()),
        None => {}
    }
    let mut and = |clause: &str, at: Timestamp| {
        let _ = write!(sql, " AND {clause}");
        params.push(at.as_microsecond().into());
    };
    // The plus keeps SQLite from the index on `at`: rows are wanted in the order of `seq`.
    if let Some(since) = filter.since {
        and("+at >= ?", ceiling(since));
    }
    if let Some(until) = filter.until {
        and("+at <= ?", until);
    }
    let _ = write!(sql, " ORDER BY {order} LIMIT ?");
    params.push(limit(count).into());
    collect(connection, &sql, params_from_iter(params), decode)
}

/// `since` in whole microseconds, rounded up: what happened within the microsecond before is earlier.
fn ceiling(since: Timestamp) -> Timestamp {
    let cut = Timestamp::from_microsecond(since.as_microsecond()).unwrap_or(since);
    if cut < since { cut.checked_add(jiff::SignedDuration::from_micros(1)).unwrap_or(since) } else { cut }
}

/// A seq before which nothing happened since then, so that a scan need not begin at the log's start.
fn before(connection: &Connection, since: Option<Timestamp>) -> Result<u64, LogError> {
    let Some(since) = since else { return Ok(0) };
    let first: Option<u64> = connection
        .prepare_cached("SELECT min(seq) FROM events WHERE at >= ?1")
        .and_then(|mut statement| statement.query_row([ceiling(since).as_microsecond()], |row| row.get(0)))
        .tried("cannot read the times")?;
    Ok(first.map_or(u64::MAX, |first| first.saturating_sub(1)))
}

pub(crate) fn by_key(
    connection: &Connection,
    stream: &StreamId,
    key: &str,
) -> Result<Option<Envelope>, LogError> {
    collect(
        connection,
        &format!("SELECT {SELECT} FROM events WHERE stream = ?1 AND key = ?2 AND key IS NOT NULL"),
        (stream.to_string(), key),
        decode,
    )
    .map(|found| found.into_iter().next())
}

/// The checkpoint of a stream, if the event that it says it ends with is in the log as it says.
pub(crate) fn checkpoint(
    connection: &Connection,
    stream: &StreamId,
    projector: u32,
    seq_max: u64,
) -> Result<Option<Checkpoint>, LogError> {
    let prepared = connection.prepare_cached(
        "SELECT c.version, c.seq, c.hash, c.state FROM checkpoints c
         JOIN events e ON e.stream = c.stream AND e.version = c.version
         WHERE c.stream = ?1 AND c.projector = ?2 AND c.seq <= ?3 AND e.seq = c.seq AND lower(hex(e.hash)) = c.hash
           AND octet_length(c.state) <= ?4",
    );
    // Somebody dropped the table, or made another one of that name: nothing depends on it.
    let Ok(mut statement) = prepared else { return Ok(None) };
    let found = statement.query_row(
        params![stream.to_string(), projector, integer(seq_max), limit(CHECKPOINT_BYTES_MAX)],
        |row| {
            Ok(Checkpoint {
                stream: stream.clone(),
                version: row.get(0)?,
                seq: row.get(1)?,
                hash: row.get(2)?,
                projector,
                state: row.get(3)?,
            })
        },
    );
    Ok(found.optional().unwrap_or_else(|error| {
        tracing::warn!(%error, %stream, "a checkpoint cannot be read and is not used");
        None
    }))
}

fn domain_row(row: &Row<'_>) -> Result<DomainRow, LogError> {
    Ok(DomainRow { id: parsed(row, "id")?, name: parsed(row, "name")? })
}

fn damaged(column: &str) -> LogError {
    LogError::Damaged(format!(
        "the read model has an improper {column}; `DELETE FROM read_model` makes it again"
    ))
}

fn parsed<T: std::str::FromStr>(row: &Row<'_>, column: &str) -> Result<T, LogError> {
    let text = row.get_ref(column).ok().and_then(|value| value.as_str().ok());
    text.and_then(|text| text.parse().ok()).ok_or_else(|| damaged(column))
}

fn get<T: rusqlite::types::FromSql>(row: &Row<'_>, column: &str) -> Result<T, LogError> {
    row.get(column).map_err(|_| damaged(column))
}

/// The registered domains of now, by name. Needs the read model.
pub(crate) fn domains_now(connection: &Connection) -> Result<Vec<DomainRow>, LogError> {
    collect(
        connection,
        "SELECT id, name FROM domains WHERE unregistered_at IS NULL ORDER BY name, id",
        [],
        domain_row,
    )
}

/// Goes through what happened to domains as such up to `seq_max`, one after the other: there are more events than domains.
fn each_domain_event(
    connection: &Connection,
    seq_max: u64,
    mut learn: impl FnMut(Envelope),
) -> Result<(), LogError> {
    collect(
        connection,
        &format!(
            "SELECT {SELECT} FROM events INDEXED BY events_domains
             WHERE kind >= 'Domain.' AND kind < 'Domain/' AND seq <= ?1 ORDER BY seq"
        ),
        [integer(seq_max)],
        |row| decode(row).map(&mut learn),
    )
    .map(|_| ())
}

/// Who has what as of `seq_max`, from the events themselves.
pub(crate) fn claims_at(connection: &Connection, seq_max: u64) -> Result<Claims, LogError> {
    let mut claims = Claims::default();
    each_domain_event(connection, seq_max, |envelope| claims.apply(&envelope.stream, &envelope.event))?;
    Ok(claims)
}

/// The registered domains as of `seq_max`, from the events themselves.
pub(crate) fn domains_at(connection: &Connection, seq_max: u64) -> Result<Vec<DomainRow>, LogError> {
    let mut known: BTreeMap<DomainId, (DomainName, bool)> = BTreeMap::new();
    each_domain_event(connection, seq_max, |envelope| {
        let StreamId::Domain(id) = envelope.stream else { return };
        match envelope.event {
            Event::DomainRegistered(e) => {
                known.insert(id, (e.domain.name, true));
            }
            Event::DomainChanged(e) => {
                if let (Some((name, _)), Some(new)) = (known.get_mut(&id), e.name) {
                    *name = new;
                }
            }
            Event::DomainUnregistered(_) => {
                if let Some((_, registered)) = known.get_mut(&id) {
                    *registered = false;
                }
            }
            _ => {}
        }
    })?;
    let mut rows: Vec<DomainRow> = known
        .into_iter()
        .filter(|(_, (_, registered))| *registered)
        .map(|(id, (name, _))| DomainRow { id, name })
        .collect();
    rows.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(rows)
}

/// Needs the read model.
pub(crate) fn domain_by_name(
    connection: &Connection,
    name: &DomainName,
) -> Result<Option<DomainRow>, LogError> {
    collect(
        connection,
        "SELECT id, name FROM domains WHERE name = ?1 AND unregistered_at IS NULL ORDER BY id LIMIT 1",
        [name.as_str()],
        domain_row,
    )
    .map(|found| found.into_iter().next())
}

/// The policies that the log has ever told of: from one stream to the next in the index on streams, so that it costs as
/// much as there are.
pub(crate) fn policies(connection: &Connection) -> Result<Vec<PolicyName>, LogError> {
    let found: Vec<String> = collect(
        connection,
        "WITH RECURSIVE streams (stream) AS (
             SELECT min(stream) FROM events WHERE stream > 'policy/' AND stream < 'policy0'
             UNION ALL
             SELECT (SELECT min(stream) FROM events WHERE stream > streams.stream AND stream < 'policy0')
             FROM streams WHERE streams.stream IS NOT NULL
         )
         SELECT stream FROM streams WHERE stream IS NOT NULL",
        [],
        |row| row.get(0).tried("cannot read the names of the streams"),
    )?;
    let mut names: Vec<PolicyName> = found
        .iter()
        .filter_map(|stream| match stream.parse() {
            Ok(StreamId::Policy(name)) => Some(name),
            _ => {
                tracing::warn!(stream, "a stream that no policy can have is left alone");
                None
            }
        })
        .collect();
    names.sort_unstable();
    Ok(names)
}

/// Needs the read model.
pub(crate) fn operations(
    connection: &Connection,
    filter: &OperationFilter,
    count: usize,
) -> Result<Vec<OperationRow>, LogError> {
    // Few are open, whatever the number of all.
    let index = if filter.open.is_some() { " INDEXED BY operations_open" } else { "" };
    let mut sql = format!("SELECT * FROM operations{index} WHERE 1");
    let mut params: Vec<Value> = Vec::new();
    if let Some(domain) = filter.domain {
        sql.push_str(" AND domain = ?");
        params.push(domain.to_string().into());
    }
    if let Some(operation) = filter.operation {
        sql.push_str(" AND id = ?");
        params.push(operation.to_string().into());
    }
    if filter.open.is_some() {
        sql.push_str(" AND outcome IS NULL");
    }
    if let Some(after) = filter.after {
        sql.push_str(" AND seq > ?");
        params.push(integer(after).into());
    }
    sql.push_str(if filter.after.is_some() { " ORDER BY seq LIMIT ?" } else { " ORDER BY seq DESC LIMIT ?" });
    params.push(limit(count).into());
    let mut rows = collect(connection, &sql, params_from_iter(params), operation_row)?;
    if filter.after.is_none() {
        rows.reverse();
    }
    Ok(rows)
}

fn operation_row(row: &Row<'_>) -> Result<OperationRow, LogError> {
    let outcome: Option<String> = get(row, "outcome")?;
    let outcome = outcome.map(|word| serde_json::from_value(word.into()).map_err(|_| damaged("outcome")));
    let finished: Option<String> = get(row, "finished")?;
    Ok(OperationRow {
        id: parsed(row, "id")?,
        domain: parsed(row, "domain")?,
        domain_name: parsed(row, "domain_name")?,
        kind: get(row, "kind")?,
        snapshot: get(row, "snapshot")?,
        outcome: outcome.transpose()?,
        needs_attention: get(row, "needs_attention")?,
        seq: get(row, "seq")?,
        requested: parsed(row, "requested")?,
        finished: finished.map(|text| text.parse().map_err(|_| damaged("finished"))).transpose()?,
    })
}

/// See [`snaptree_engine::log::EventLog::seq_at`].
///
/// With p events not later than `at`, the greatest seq among them is p exactly when the clock was monotone there. So
/// counting in the index on `at`, from its nearer end, answers nearly always; the place of the last one is looked for
/// only when the clock went back.
pub(crate) fn seq_at(connection: &Connection, at: Timestamp) -> Result<SeqAt, LogError> {
    let what = "cannot read the times";
    let at = at.as_microsecond();
    let head = stored_head(connection)?.seq;
    let near: Option<u64> = connection
        .prepare_cached("SELECT seq FROM events WHERE at <= ?1 ORDER BY at DESC, seq DESC LIMIT 1")
        .tried(what)?
        .query_row([at], |row| row.get(0))
        .optional()
        .tried(what)?;
    let Some(near) = near else { return Ok(SeqAt { seq: 0, clock: ClockOrder::Monotone }) };
    if near > head / 2 {
        let (later, first): (u64, Option<u64>) = connection
            .prepare_cached("SELECT count(*), min(seq) FROM events WHERE at > ?1")
            .and_then(|mut statement| statement.query_row([at], |row| Ok((row.get(0)?, row.get(1)?))))
            .tried(what)?;
        let earlier = head.saturating_sub(later);
        if first.is_none_or(|first| first == earlier + 1) {
            return Ok(SeqAt { seq: earlier, clock: ClockOrder::Monotone });
        }
    }
    let (earlier, seq): (u64, u64) = connection
        .prepare_cached("SELECT count(*), coalesce(max(seq), 0) FROM events WHERE at <= ?1")
        .and_then(|mut statement| statement.query_row([at], |row| Ok((row.get(0)?, row.get(1)?))))
        .tried(what)?;
    let clock = if seq == earlier { ClockOrder::Monotone } else { ClockOrder::WentBack };
    Ok(SeqAt { seq, clock })
}
