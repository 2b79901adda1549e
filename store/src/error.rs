//! What can go wrong, in sentences.

use std::path::PathBuf;
use std::time::Duration;

use rusqlite::ErrorCode;
use snaptree_engine::log::LogError;
use snaptree_files::FolderError;

use crate::lock::Holder;

/// Why a state directory could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Expected in normal work: nothing was stored there yet.
    #[error("there is no Snaptree state in {}", dir.display())]
    Missing {
        /// The state directory.
        dir: PathBuf,
    },
    /// Expected in normal work: another process writes.
    #[error("{} is in use by {holder} (waited {} s)", dir.display(), waited.as_secs())]
    Locked {
        /// The state directory.
        dir: PathBuf,
        /// Who has it.
        holder: Holder,
        /// How long it was waited for.
        waited: Duration,
    },
    /// Nothing can be written there, by this user or by anybody.
    #[error("the state directory {} is {why}", dir.display())]
    NotWritable {
        /// The state directory.
        dir: PathBuf,
        /// In what way.
        why: &'static str,
        /// What the operating system said.
        #[source]
        source: std::io::Error,
    },
    /// Somebody else may put anything into the state directory.
    #[error("the state directory cannot be trusted")]
    Untrusted(#[from] FolderError),
    /// This user may not read it.
    #[error("you may not read the state in {}; {who} may", dir.display())]
    NotReadable {
        /// The state directory.
        dir: PathBuf,
        /// Who may.
        who: String,
    },
    /// The file is something else.
    #[error("{} is not a Snaptree database: {why}", file.display())]
    Foreign {
        /// The file.
        file: PathBuf,
        /// What it seems to be.
        why: String,
    },
    /// A newer program wrote it.
    #[error(
        "{} was written by a newer snaptree (format {found}, this program knows {known}); use that one",
        file.display()
    )]
    Newer {
        /// The file.
        file: PathBuf,
        /// Its format.
        found: i64,
        /// The newest format of this program.
        known: i64,
    },
    /// An older program wrote it, and a reader cannot bring it up to date.
    #[error("{} has the older format {found}; any command that writes brings it up to date", file.display())]
    Older {
        /// The file.
        file: PathBuf,
        /// Its format.
        found: i64,
    },
    /// The directory cannot be written, and part of the log is in a `-wal` file that cannot be read without writing.
    #[error(
        "{} cannot be written and its newest events are in a -wal file without its -shm file; \
         copy snaptree.db and snaptree.db-wal into one directory that can be written, and read them there",
        dir.display()
    )]
    UnreadableWal {
        /// The state directory.
        dir: PathBuf,
    },
    /// The log itself is damaged or cannot be written.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The operating system failed.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: String,
        /// What it said.
        #[source]
        source: std::io::Error,
    },
    /// SQLite failed.
    #[error("{what}")]
    Database {
        /// What was tried.
        what: String,
        /// What it said.
        #[source]
        source: rusqlite::Error,
    },
}

/// A failure that is known by its words alone.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Words(pub(crate) String);

/// SQLite's failure as the port to the store names it.
pub(crate) fn failed(what: &str, error: &rusqlite::Error) -> LogError {
    let backend =
        || LogError::Backend { message: what.to_owned(), source: Box::new(Words(error.to_string())) };
    let rusqlite::Error::SqliteFailure(code, _) = error else { return backend() };
    match code.code {
        ErrorCode::DiskFull => LogError::Full,
        ErrorCode::ReadOnly | ErrorCode::PermissionDenied => {
            LogError::ReadOnly(format!("{error}; the file or its directory is not writable for this user"))
        }
        ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase => LogError::Damaged(error.to_string()),
        ErrorCode::TooBig => LogError::Damaged("a row is larger than any that Snaptree writes".to_owned()),
        ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked => LogError::Backend {
            message: format!("{what}: another program, perhaps a sqlite3 shell, keeps a transaction open"),
            source: Box::new(Words(error.to_string())),
        },
        _ => backend(),
    }
}

/// The same failure once more, for everybody whose append was in the group that failed.
pub(crate) fn copy_of(error: &LogError) -> LogError {
    match error {
        LogError::Conflict { stream, expected, found } => {
            LogError::Conflict { stream: stream.clone(), expected: *expected, found: *found }
        }
        LogError::KeyUsed { stream, key } => LogError::KeyUsed { stream: stream.clone(), key: key.clone() },
        LogError::Claimed { claim, owner } => LogError::Claimed { claim: claim.clone(), owner: *owner },
        LogError::Fenced { ours, current } => LogError::Fenced { ours: *ours, current: *current },
        LogError::Full => LogError::Full,
        LogError::ReadOnly(why) => LogError::ReadOnly(why.clone()),
        LogError::Damaged(why) => LogError::Damaged(why.clone()),
        LogError::Backend { message, source } => {
            LogError::Backend { message: message.clone(), source: Box::new(Words(source.to_string())) }
        }
    }
}

/// Names what was tried when SQLite failed.
pub(crate) trait Tried<T> {
    /// What was tried, for the message.
    fn tried(self, what: &str) -> Result<T, LogError>;
}

impl<T> Tried<T> for rusqlite::Result<T> {
    fn tried(self, what: &str) -> Result<T, LogError> {
        self.map_err(|error| failed(what, &error))
    }
}
