//! Whether what is stored beside the log is what the log says: read models, checkpoints, and the write-ahead log.
//!
//! Anybody who can write the file can write these tables, and no chain covers them. So they are compared with what
//! follows from the events.

use rusqlite::{Connection, OptionalExtension};
use snaptree_engine::log::LogError;

use crate::error::Tried;
use crate::read_model::{self, Place};
use crate::wal::{self, Tail};
use crate::writer::stored_head;

/// Most rows of a table that are named.
const NAMED_MAX: usize = 3;

/// What contradicts the log, in sentences. Tables that are missing or behind are made again before they are used, and
/// contradict nothing. The connection is not used for anything else afterwards.
pub(crate) fn differences(connection: &Connection) -> Result<Vec<String>, LogError> {
    let mut found = Vec::new();
    if let Some(file) = connection.path()
        && let Tail::BrokenOff { frame, commits } = wal::tail(format!("{file}-wal").as_ref())
    {
        found.push(format!(
            "the write-ahead log breaks off at frame {frame}, and {commits} commits from there on are lost: after a \
             power cut that is one that nobody was told of, else the file was damaged"
        ));
    }
    let what = "cannot compare the read model with the log";
    let view = connection.unchecked_transaction().tried(what)?;
    found.extend(models(&view)?);
    found.extend(checkpoints(&view)?);
    view.rollback().tried(what)?;
    Ok(found)
}

fn models(view: &Connection) -> Result<Vec<String>, LogError> {
    let what = "cannot compare the read model with the log";
    let head = stored_head(view)?.seq;
    if !read_model::is_whole(view)? || !read_model::is_at(view, head) {
        return Ok(Vec::new());
    }
    read_model::rebuild(view, Place::Temp, head)?;
    let mut found = Vec::new();
    for table in ["domains", "snapshots", "operations"] {
        for (here, there, words) in [
            ("main", "temp", "is not what the log says"),
            ("temp", "main", "is in the log and is missing or changed"),
        ] {
            let sql = format!(
                "SELECT id FROM (SELECT * FROM {here}.{table} EXCEPT SELECT * FROM {there}.{table}) ORDER BY id"
            );
            let mut statement = view.prepare(&sql).tried(what)?;
            let ids = statement.query_map([], |row| row.get::<_, String>(0)).tried(what)?;
            let ids: Vec<String> = ids.collect::<Result<_, _>>().tried(what)?;
            let more = ids.len().saturating_sub(NAMED_MAX);
            found.extend(ids.iter().take(NAMED_MAX).map(|id| format!("read model {table}: {id} {words}")));
            if more > 0 {
                found.push(format!("read model {table}: {more} more rows like that"));
            }
        }
    }
    Ok(found)
}

/// Those that name an event which is not in the log. What they say of it is the engine's to judge.
fn checkpoints(view: &Connection) -> Result<Vec<String>, LogError> {
    let what = "cannot compare the checkpoints with the log";
    let there = view
        .query_row(
            "SELECT 1 FROM main.sqlite_schema WHERE type = 'table' AND name = 'checkpoints'",
            [],
            |_| Ok(()),
        )
        .optional()
        .tried(what)?;
    if there.is_none() {
        return Ok(Vec::new());
    }
    let mut statement = view
        .prepare(
            "SELECT c.stream FROM checkpoints c WHERE NOT EXISTS (SELECT 1 FROM events e WHERE e.stream = c.stream
                 AND e.version = c.version AND e.seq = c.seq AND lower(hex(e.hash)) = c.hash) ORDER BY c.stream",
        )
        .tried(what)?;
    let streams = statement.query_map([], |row| row.get::<_, String>(0)).tried(what)?;
    let streams: Vec<String> = streams.collect::<Result<_, _>>().tried(what)?;
    Ok(streams
        .into_iter()
        .map(|stream| format!("the checkpoint of {stream} is of an event that the log does not have"))
        .collect())
}
