//! The tables of the log, and how a database is made, recognised and brought up to date.

use std::path::Path;

use rusqlite::config::DbConfig;
use rusqlite::limits::Limit;
use rusqlite::{Connection, OpenFlags};
use snaptree_engine::event::Hash;
use snaptree_engine::log::LogError;

use crate::error::{StoreError, Tried};

/// "SNPT" in ASCII: what `file` and SQLite know the database by.
pub(crate) const APPLICATION_ID: i64 = 0x534E_5054;

/// How long a statement waits for another program's lock on the file.
const BUSY_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);

/// Largest row that SQLite gives us; above [`crate::CHECKPOINT_BYTES_MAX`].
const ROW_BYTES_MAX: i32 = 64 << 20;

/// Statements kept prepared per connection.
const STATEMENTS_MAX: usize = 64;

/// A WAL file longer than this is emptied when a writer comes: the first connection after the last one was
/// closed reads it whole (measured: half a millisecond per MiB).
pub(crate) const WAL_BYTES_MAX: u64 = 1 << 20;

/// A WAL file that grew while somebody read for long is cut back to this when it starts over.
pub(crate) const WAL_BYTES_KEPT: u64 = 16 << 20;

/// The triggers that make `events` append-only. `INSERT OR REPLACE` fires no DELETE trigger, so whatever it could
/// replace is looked for before the insert.
pub(crate) const TRIGGERS: [(&str, &str); 5] = [
    (
        "events_no_update",
        "CREATE TRIGGER events_no_update BEFORE UPDATE ON events
         BEGIN SELECT RAISE(ABORT, 'events is append-only: an event is never changed'); END",
    ),
    (
        "events_no_delete",
        "CREATE TRIGGER events_no_delete BEFORE DELETE ON events
         BEGIN SELECT RAISE(ABORT, 'events is append-only: an event is never deleted'); END",
    ),
    (
        "events_in_order",
        "CREATE TRIGGER events_in_order BEFORE INSERT ON events
         WHEN NEW.seq IS NOT (SELECT coalesce(max(seq), 0) + 1 FROM events)
           OR NEW.version IS NOT (SELECT coalesce(max(version), 0) + 1 FROM events WHERE stream = NEW.stream)
           OR EXISTS (SELECT 1 FROM events WHERE id = NEW.id)
           OR (NEW.key IS NOT NULL AND EXISTS
               (SELECT 1 FROM events WHERE stream = NEW.stream AND key = NEW.key AND key IS NOT NULL))
         BEGIN SELECT RAISE(ABORT, 'events is append-only: seq and version go up by one, id and key are new'); END",
    ),
    (
        "meta_no_update",
        "CREATE TRIGGER meta_no_update BEFORE UPDATE ON meta
         BEGIN SELECT RAISE(ABORT, 'the installation id never changes'); END",
    ),
    (
        "meta_no_delete",
        "CREATE TRIGGER meta_no_delete BEFORE DELETE ON meta
         BEGIN SELECT RAISE(ABORT, 'the installation id never changes'); END",
    ),
];

/// What brings a database from format n to n + 1; `user_version` counts the ones applied.
const MIGRATIONS: [&str; 2] = [
    "
CREATE TABLE events (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    stream TEXT NOT NULL,
    version INTEGER NOT NULL,
    kind TEXT NOT NULL,
    schema INTEGER NOT NULL,
    at INTEGER NOT NULL,
    actor TEXT NOT NULL,
    origin TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    operation TEXT,
    cause INTEGER,
    key TEXT,
    data TEXT NOT NULL,
    hash BLOB NOT NULL CHECK (length(hash) = 32),
    UNIQUE (stream, version)
) STRICT;
CREATE UNIQUE INDEX events_key ON events (stream, key) WHERE key IS NOT NULL;
CREATE INDEX events_operation ON events (operation) WHERE operation IS NOT NULL;
CREATE INDEX events_domains ON events (seq) WHERE kind >= 'Domain.' AND kind < 'Domain/';
CREATE INDEX events_at ON events (at);
CREATE TABLE meta (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    installation BLOB NOT NULL CHECK (length(installation) = 32)
) STRICT;
CREATE TABLE owner (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    epoch INTEGER NOT NULL,
    pid INTEGER NOT NULL,
    host TEXT NOT NULL,
    since TEXT NOT NULL,
    program TEXT NOT NULL
) STRICT;
",
    // Policies are read at every start, and whenever somebody asks for them: without it, by a walk over the whole log.
    "CREATE INDEX events_policies ON events (seq) WHERE kind >= 'Policy.' AND kind < 'Policy/';",
];

/// The format that this program writes.
const FORMAT: i64 = 2;

/// What a database turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// Nothing was ever stored in it.
    Empty,
    /// Ours, with that many migrations applied.
    Format(i64),
}

/// Opens a connection that only reads. `immutable` is for a directory that cannot be written.
pub(crate) fn open_reader(file: &Path, access: ReadAccess) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = match access {
        ReadAccess::Shared => Connection::open_with_flags(file, flags)?,
        ReadAccess::Immutable => {
            let uri = format!("file:{}?immutable=1", percent_encoded(file));
            Connection::open_with_flags(uri, flags | OpenFlags::SQLITE_OPEN_URI)?
        }
    };
    configure(&connection)?;
    Ok(connection)
}

/// How a reader opens the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReadAccess {
    /// Together with a writer, through the `-shm` file.
    Shared,
    /// The file cannot change, and nothing can be made beside it.
    Immutable,
}

/// Opens the connection of the writer; the file is there.
pub(crate) fn open_writer(file: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(file, flags)?;
    configure(&connection)?;
    Ok(connection)
}

fn configure(connection: &Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.set_prepared_statement_cache_capacity(STATEMENTS_MAX);
    connection.set_limit(Limit::SQLITE_LIMIT_LENGTH, ROW_BYTES_MAX)?;
    // The file may be anybody's: its triggers and views get no functions with side effects.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
    // Else a statement that binds a parameter near a partial index is compiled anew for each value (measured: a third
    // of a read's time).
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    // A reader that ends last must not write; a writer does it itself, when it goes.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    // TEMP tables, and what a statement that is taken back would need, are small.
    connection.pragma_update(None, "temp_store", "MEMORY")
}

/// The path for a `file:` URI (<https://www.sqlite.org/uri.html>).
fn percent_encoded(file: &Path) -> String {
    use std::fmt::Write as _;
    use std::os::unix::ffi::OsStrExt;
    let mut uri = String::new();
    for byte in file.as_os_str().as_bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'/' | b'-' | b'_' | b'.') {
            uri.push(char::from(*byte));
        } else {
            // Writing to a String does not fail.
            let _ = write!(uri, "%{byte:02X}");
        }
    }
    uri
}

/// Says what the database is, and refuses what this program cannot read.
pub(crate) fn recognise(connection: &Connection, file: &Path) -> Result<Found, StoreError> {
    let ask = |pragma: &str| connection.pragma_query_value(None, pragma, |row| row.get::<_, i64>(0));
    let foreign = |why: String| StoreError::Foreign { file: file.to_owned(), why };
    let (application, format) = match (ask("application_id"), ask("user_version")) {
        (Ok(application), Ok(format)) => (application, format),
        (Err(error), _) | (_, Err(error)) => {
            if error.sqlite_error_code() == Some(rusqlite::ErrorCode::NotADatabase) {
                return Err(foreign("it is no SQLite database at all".to_owned()));
            }
            return Err(StoreError::Database {
                what: format!("cannot read the database {}", file.display()),
                source: error,
            });
        }
    };
    if application == 0 && format == 0 {
        let objects = connection
            .query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get::<_, i64>(0))
            .tried("cannot read the schema")?;
        if objects == 0 {
            return Ok(Found::Empty);
        }
    }
    if application != APPLICATION_ID {
        return Err(foreign(format!("its application_id is {application:#x}, not {APPLICATION_ID:#x}")));
    }
    match format {
        newer if newer > FORMAT => {
            Err(StoreError::Newer { file: file.to_owned(), found: newer, known: FORMAT })
        }
        0 => Err(foreign("its user_version is 0".to_owned())),
        known => Ok(Found::Format(known)),
    }
}

/// Looks for damage to the file that a walk over the events would not meet: in indexes, and in free pages.
pub(crate) fn check(connection: &Connection) -> Result<(), LogError> {
    let what = "cannot check the database";
    let found: String =
        connection.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0)).tried(what)?;
    if found == "ok" { Ok(()) } else { Err(LogError::Damaged(found)) }
}

/// Whether the format is the one of this program.
pub(crate) fn is_current(format: i64) -> bool {
    format == FORMAT
}

/// Applies what is missing from `format` on, in the caller's transaction.
pub(crate) fn migrate(connection: &Connection, format: i64) -> Result<(), LogError> {
    let applied = usize::try_from(format).unwrap_or(MIGRATIONS.len());
    for migration in MIGRATIONS.iter().skip(applied) {
        connection.execute_batch(migration).tried("cannot make the tables")?;
    }
    connection.pragma_update(None, "application_id", APPLICATION_ID).tried("cannot mark the database")?;
    connection.pragma_update(None, "user_version", FORMAT).tried("cannot mark the database")?;
    restore_triggers(connection)
}

/// Empties the WAL file if it is long, as a writer comes that was preceded by one that was killed.
pub(crate) fn shorten_wal(connection: &Connection) {
    empty_wal(connection, WAL_BYTES_MAX);
}

/// Brings everything into the database's own file as a writer goes, so that a copy of that file alone is whole.
pub(crate) fn bring_home(connection: &Connection) {
    empty_wal(connection, 0);
}

/// Empties a WAL file longer than that, and waits for nobody: whoever still reads it leaves it to the next writer.
fn empty_wal(connection: &Connection, bytes: u64) {
    let wal = connection.path().map(|file| format!("{file}-wal"));
    let is_long = |wal| std::fs::metadata(wal).is_ok_and(|wal| wal.len() > bytes);
    if !wal.is_some_and(is_long) {
        return;
    }
    let emptied = connection
        .busy_timeout(std::time::Duration::ZERO)
        .and_then(|()| connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())));
    let patient = connection.busy_timeout(BUSY_TIMEOUT);
    if let Err(error) = emptied.and(patient) {
        tracing::debug!(%error, "the write-ahead log stays as long as it is");
    }
}

/// Whether every trigger is there as this program makes it.
pub(crate) fn has_triggers(connection: &Connection) -> Result<bool, LogError> {
    for (name, sql) in TRIGGERS {
        let there = connection
            .prepare_cached("SELECT 1 FROM sqlite_schema WHERE type = 'trigger' AND name = ?1 AND sql = ?2")
            .and_then(|mut statement| statement.exists((name, sql)))
            .tried("cannot read the schema")?;
        if !there {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Makes the triggers. Whoever drops them can change events until then, and the chain shows it.
fn restore_triggers(connection: &Connection) -> Result<(), LogError> {
    for (name, sql) in TRIGGERS {
        connection
            .execute_batch(&format!("DROP TRIGGER IF EXISTS {name}; {sql};"))
            .tried("cannot make the triggers")?;
    }
    Ok(())
}

/// The installation id, which is the first previous hash.
pub(crate) fn installation(connection: &Connection) -> Result<Hash, LogError> {
    let id: Vec<u8> = connection
        .query_row("SELECT installation FROM meta", [], |row| row.get(0))
        .tried("cannot read the installation id")?;
    id.try_into()
        .map(Hash)
        .map_err(|_| LogError::Damaged("the installation id does not have 32 bytes".to_owned()))
}
