//! Walks the whole log, before anything is decoded, and says whether it is what was written.

use std::collections::HashMap;
use std::fmt;

use rusqlite::Connection;
use snaptree_engine::driver::Head;
use snaptree_engine::log::LogError;

use crate::chain::{Field, link};
use crate::error::Tried;
use crate::row::{SELECT, integer, raw};
use crate::schema;
use crate::writer::stored_head;

/// Events read at once: a long walk must not keep the WAL from being reset.
const PAGE: i64 = 1000;

/// What a walk over the log found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verification {
    /// Every hash, seq and version follows from the one before.
    Sound(Verified),
    /// Something was changed, removed or inserted.
    Broken(Problem),
}

/// A log that is what was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    /// How many events it has.
    pub events: u64,
    /// The last of them. Kept elsewhere, it shows later that nothing was cut off.
    pub head: Head,
}

/// The first thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The event; where one is missing, the seq that it should have.
    pub seq: u64,
    /// What is wrong with it.
    pub what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "event {}: {}", self.seq, self.what)
    }
}

/// Walks the log up to the head of now, and compares with a head that was kept elsewhere.
pub(crate) fn verify(connection: &Connection, expected: Option<Head>) -> Result<Verification, LogError> {
    let end = stored_head(connection)?;
    let mut walk = Walk {
        head: Head { seq: 0, hash: schema::installation(connection)? },
        versions: HashMap::new(),
        expected,
    };
    while walk.head.seq < end.seq {
        match walk.page(connection)? {
            Page::Broken(problem) => return Ok(Verification::Broken(problem)),
            Page::Walked(0) => break,
            Page::Walked(_) => {}
        }
    }
    if let Some(expected) = expected
        && walk.head.seq < expected.seq
    {
        return Ok(Verification::Broken(Problem {
            seq: walk.head.seq + 1,
            what: format!("the log ends before it, and should go on to event {}", expected.seq),
        }));
    }
    Ok(Verification::Sound(Verified { events: walk.head.seq, head: walk.head }))
}

enum Page {
    /// That many rows were sound.
    Walked(u64),
    Broken(Problem),
}

struct Walk {
    /// The last event that was sound.
    head: Head,
    /// Per stream, the last version.
    versions: HashMap<Vec<u8>, i64>,
    expected: Option<Head>,
}

impl Walk {
    fn page(&mut self, connection: &Connection) -> Result<Page, LogError> {
        let what = "cannot read the events";
        let mut statement = connection
            .prepare_cached(&format!("SELECT {SELECT} FROM events WHERE seq > ?1 ORDER BY seq LIMIT {PAGE}"))
            .tried(what)?;
        let mut rows = statement.query([integer(self.head.seq)]).tried(what)?;
        let mut walked = 0;
        while let Some(row) = rows.next().tried(what)? {
            let seq = self.head.seq + 1;
            if let Err(what) = self.step(row, seq) {
                return Ok(Page::Broken(Problem { seq, what }));
            }
            walked += 1;
        }
        Ok(Page::Walked(walked))
    }

    fn step(&mut self, row: &rusqlite::Row<'_>, seq: u64) -> Result<(), String> {
        let (fields, stored) = raw(row).ok_or("a column has a type that Snaptree never writes".to_owned())?;
        if let Field::Integer(found) = fields[0]
            && found != integer(seq)
        {
            return Err(format!("it is missing; the next one there is event {found}"));
        }
        let hash = link(&self.head.hash, &fields);
        if hash != stored {
            return Err(
                "it is not what was written: its hash does not follow from it and the one before".to_owned()
            );
        }
        self.version(&fields)?;
        if let Some(expected) = self.expected
            && expected.seq == seq
            && expected.hash != hash
        {
            return Err(format!("its hash is {hash}, and {} was expected", expected.hash));
        }
        self.head = Head { seq, hash };
        Ok(())
    }

    /// A chain that was made anew by somebody careless still betrays an event that is missing in its stream.
    fn version(&mut self, fields: &[Field<'_>]) -> Result<(), String> {
        let (Field::Text(stream), Field::Integer(version)) = (fields[2], fields[3]) else {
            return Err("its stream or version has a type that Snaptree never writes".to_owned());
        };
        let last = self.versions.entry(stream.to_vec()).or_insert(0);
        if version != *last + 1 {
            let stream = String::from_utf8_lossy(stream).into_owned();
            return Err(format!("it has version {version} of the stream {stream}, after version {last}"));
        }
        *last = version;
        Ok(())
    }
}
