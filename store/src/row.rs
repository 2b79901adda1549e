//! An event as its columns, both ways.

use std::fmt::Display;
use std::str::FromStr;

use jiff::Timestamp;
use rusqlite::types::ValueRef;
use snaptree_engine::event::{Actor, Envelope, Event, Hash, Origin};
use snaptree_engine::ids::{EventId, OperationId, StreamId};
use snaptree_engine::log::{APPEND_EVENTS_MAX, Append, LogError};

use crate::DATA_BYTES_MAX;
use crate::chain::{COLUMNS, Field};
use crate::error::Words;

/// The columns in the order in which [`decode`] reads them and the chain hashes them; `hash` is the last.
pub(crate) const SELECT: &str = "seq, id, stream, version, kind, schema, at, actor, origin, epoch, operation, \
                                 cause, key, data, hash";

/// An append, encoded where it was asked for, so that the writer only stores it.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) expect: Vec<(StreamId, u64)>,
    pub(crate) at: Timestamp,
    pub(crate) at_us: i64,
    pub(crate) actor: Actor,
    pub(crate) actor_text: String,
    pub(crate) origin: Origin,
    pub(crate) origin_text: String,
    pub(crate) events: Vec<PreparedEvent>,
}

/// One event of it.
#[derive(Debug)]
pub(crate) struct PreparedEvent {
    pub(crate) id: EventId,
    pub(crate) id_text: String,
    pub(crate) stream: StreamId,
    pub(crate) stream_text: String,
    pub(crate) operation: Option<OperationId>,
    pub(crate) operation_text: Option<String>,
    pub(crate) cause: Option<u64>,
    pub(crate) key: Option<String>,
    pub(crate) event: Event,
    pub(crate) data: String,
}

/// What cannot be stored, whatever the state of the log.
fn refused(message: String) -> LogError {
    LogError::Backend { message: "the append was refused".to_owned(), source: Box::new(Words(message)) }
}

/// Encodes an append.
pub(crate) fn prepare(append: Append) -> Result<Prepared, LogError> {
    if append.events.len() > APPEND_EVENTS_MAX {
        return Err(refused(format!(
            "{} events; at most {APPEND_EVENTS_MAX} are allowed",
            append.events.len()
        )));
    }
    let at_us = append.at.as_microsecond();
    let mut events = Vec::with_capacity(append.events.len());
    for new in append.events {
        let kind = new.event.kind();
        let data = new.event.encode().map_err(|error| refused(format!("{kind}: {error}")))?;
        if data.len() > DATA_BYTES_MAX {
            let bytes = data.len();
            return Err(refused(format!("{kind} has {bytes} bytes; at most {DATA_BYTES_MAX} are allowed")));
        }
        let id = EventId::from_uuid(uuid::Uuid::now_v7());
        events.push(PreparedEvent {
            id,
            id_text: id.to_string(),
            stream_text: new.stream.to_string(),
            stream: new.stream,
            operation: new.operation,
            operation_text: new.operation.map(|id| id.to_string()),
            cause: new.cause,
            key: new.key,
            event: new.event,
            data,
        });
    }
    Ok(Prepared {
        expect: append.expect,
        at: from_microseconds(at_us).ok_or_else(|| refused("its time is out of range".to_owned()))?,
        at_us,
        actor_text: append.actor.to_string(),
        actor: append.actor,
        origin_text: serde_json::to_string(&append.origin)
            .map_err(|error| refused(format!("its origin: {error}")))?,
        origin: append.origin,
        events,
    })
}

/// A number as SQLite stores it. Ours come from SQLite or count what fits into a file.
pub(crate) fn integer(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// A limit as SQLite understands it.
pub(crate) fn limit(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// A time as it is stored.
pub(crate) fn from_microseconds(at: i64) -> Option<Timestamp> {
    Timestamp::from_microsecond(at).ok()
}

/// Reads a row that was selected by [`SELECT`].
pub(crate) fn decode(row: &rusqlite::Row<'_>) -> Result<Envelope, LogError> {
    let seq = row.get::<_, u64>(0).map_err(|_| LogError::Damaged("an event has no proper seq".to_owned()))?;
    let columns = Columns { row, seq };
    let data = columns.text(13)?;
    if data.len() > DATA_BYTES_MAX {
        return Err(columns.damaged("data", "it is larger than anything that Snaptree writes"));
    }
    let schema = u32::try_from(columns.number(5)?).map_err(|error| columns.damaged("schema", error))?;
    let hash = row.get_ref(14).ok().and_then(|value| value.as_blob().ok()).and_then(|b| b.try_into().ok());
    Ok(Envelope {
        seq,
        id: columns.parsed(1)?,
        stream: columns.parsed(2)?,
        version: columns.number(3)?,
        at: row
            .get(6)
            .ok()
            .and_then(from_microseconds)
            .ok_or_else(|| columns.damaged("at", "it is no time"))?,
        actor: columns.parsed(7)?,
        origin: serde_json::from_str(columns.text(8)?).map_err(|error| columns.damaged("origin", error))?,
        epoch: columns.number(9)?,
        operation: columns.optional(10)?.map(|text| columns.parse(10, text)).transpose()?,
        cause: row.get(11).map_err(|error| columns.damaged("cause", error))?,
        key: columns.optional(12)?.map(str::to_owned),
        event: Event::decode(columns.text(4)?, schema, data)
            .map_err(|error| columns.damaged("data", error))?,
        hash: Hash(hash.ok_or_else(|| columns.damaged("hash", "it does not have 32 bytes"))?),
    })
}

/// A row whose seq is known, so that every complaint names it.
struct Columns<'a> {
    row: &'a rusqlite::Row<'a>,
    seq: u64,
}

impl<'a> Columns<'a> {
    fn damaged(&self, column: &str, why: impl Display) -> LogError {
        LogError::Damaged(format!("event {}: {column}: {why}", self.seq))
    }

    fn name(&self, column: usize) -> &'a str {
        self.row.as_ref().column_name(column).unwrap_or("a column")
    }

    fn optional(&self, column: usize) -> Result<Option<&'a str>, LogError> {
        self.row
            .get_ref(column)
            .map_err(|error| self.damaged(self.name(column), error))?
            .as_str_or_null()
            .map_err(|error| self.damaged(self.name(column), error))
    }

    fn text(&self, column: usize) -> Result<&'a str, LogError> {
        self.optional(column)?.ok_or_else(|| self.damaged(self.name(column), "it is missing"))
    }

    fn number(&self, column: usize) -> Result<u64, LogError> {
        self.row.get(column).map_err(|error| self.damaged(self.name(column), error))
    }

    fn parse<T: FromStr>(&self, column: usize, text: &str) -> Result<T, LogError>
    where
        T::Err: Display,
    {
        text.parse().map_err(|error: T::Err| self.damaged(self.name(column), error))
    }

    fn parsed<T: FromStr>(&self, column: usize) -> Result<T, LogError>
    where
        T::Err: Display,
    {
        self.parse(column, self.text(column)?)
    }
}

/// The columns of a stored row as the chain hashes them, and the stored hash; none if a column has a type that
/// Snaptree never writes.
pub(crate) fn raw<'a>(row: &'a rusqlite::Row<'_>) -> Option<([Field<'a>; COLUMNS], Hash)> {
    let mut fields = [Field::Null; COLUMNS];
    for (column, field) in fields.iter_mut().enumerate() {
        *field = match row.get_ref(column).ok()? {
            ValueRef::Null => Field::Null,
            ValueRef::Integer(value) => Field::Integer(value),
            ValueRef::Text(bytes) => Field::Text(bytes),
            ValueRef::Real(_) | ValueRef::Blob(_) => return None,
        };
    }
    let hash = row.get_ref(COLUMNS).ok()?.as_blob().ok()?.try_into().ok()?;
    Some((fields, Hash(hash)))
}
