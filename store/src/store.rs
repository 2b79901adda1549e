//! The event log in a state directory.

use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use jiff::Timestamp;
use nix::unistd::{Gid, Group, Uid};
use rusqlite::{Connection, ErrorCode};
use sha2::{Digest, Sha256};
use snaptree_engine::driver::Head;
use snaptree_engine::event::{Actor, Envelope, Hash, Origin, SystemOpened};
use snaptree_engine::ids::{DomainName, PolicyName, StreamId};
use snaptree_engine::log::{
    Append, Checkpoint, DomainRow, EventFilter, EventLog, LogError, NewEvent, OperationFilter, OperationRow,
    SeqAt,
};
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::{Semaphore, watch};

use crate::error::{StoreError, Tried, Words};
use crate::lock::{Lock, LockWait};
use crate::read_model::{self, Place};
use crate::reader::{self, Pool, locked};
use crate::row::prepare;
use crate::schema::{self, Found, ReadAccess, WAL_BYTES_KEPT, shorten_wal};
use crate::verify::{Verification, verify};
use crate::writer::{CHECKPOINTS, Commits, Core, Done, Identity, Work, Writer, stored_head};
use crate::{DATABASE_FILE, audit};

/// How many reads that may be long go on at once.
const LONG_READS_MAX: usize = 8;
/// A read of one stream that brings no more events than this (some milliseconds) is not handed over to another thread.
const SHORT_EVENTS_MAX: usize = 4_096;

/// The event log in a state directory.
///
/// # Guarantees
/// * At most one process has a writer of a directory at a time; a reader takes no lock and waits for nobody.
/// * A writer that lost its lock to another process (a lock does not survive every network file system) cannot
///   append: its epoch is no longer the owner's.
///
/// * An append whose future is dropped was made or was not; if it was, it was made whole.
///
/// Reads that may return many rows run on tokio's blocking threads where the runtime has several threads, and in place
/// where it has one: there, handing over costs more than most reads.
#[derive(Debug)]
pub struct Store {
    // Dropped in this order: the thread ends, then the connections are closed, then the lock is released.
    writer: Option<Writer>,
    readers: Arc<Pool>,
    /// Who may read on a blocking thread; more at once than this would only open more connections.
    long_reads: Semaphore,
    follower: Mutex<Option<Connection>>,
    head: watch::Receiver<u64>,
    // Of a store that only reads: kept, so that whoever watches waits instead of being told that all is over.
    _unmoved: Option<watch::Sender<u64>>,
    _lock: Option<Lock>,
}

impl Store {
    /// Opens a state directory for reading and writing, and makes it if it is not there.
    ///
    /// # Errors
    /// [`StoreError::Locked`] names who has it; the others say why the directory cannot be used.
    pub fn open_writer(dir: &Path, wait: LockWait) -> Result<Self, StoreError> {
        Self::open_writer_with(dir, wait, Commits::Thread)
    }

    /// The same, and says who commits.
    ///
    /// # Errors
    /// Those of [`Store::open_writer`].
    pub fn open_writer_with(dir: &Path, wait: LockWait, commits: Commits) -> Result<Self, StoreError> {
        make_dir(dir)?;
        snaptree_files::check_folder(dir)?;
        let lock = Lock::take(dir, wait)?;
        let file = dir.join(DATABASE_FILE);
        make_file(&file)?;
        let identity = this_process();
        let mut connection = schema::open_writer(&file).map_err(|source| StoreError::Database {
            what: format!("cannot open {}", file.display()),
            source,
        })?;
        let found = schema::recognise(&connection, &file)?;
        to_wal(&connection)?;
        match found {
            Found::Empty => create(&mut connection)?,
            Found::Format(format) => bring_up_to_date(&mut connection, format)?,
        }
        shorten_wal(&connection);
        let first = opened(schema::installation(&connection)?, &identity)?;
        let mut core = Core::new(connection, identity)?;
        if core.head.seq == 0 {
            core.commit(vec![first]).into_iter().try_for_each(|result| result.map(|_| ()))?;
        }
        let (sender, head) = watch::channel(core.head.seq);
        let writer = Writer::start(core, sender, commits).map_err(|source| StoreError::Io {
            what: "cannot start the writer's thread".to_owned(),
            source,
        })?;
        Ok(Self {
            writer: Some(writer),
            readers: Arc::new(Pool::new(dir.to_owned(), ReadAccess::Shared, None)),
            long_reads: Semaphore::new(LONG_READS_MAX),
            follower: Mutex::new(None),
            head,
            _unmoved: None,
            _lock: Some(lock),
        })
    }

    /// Opens a state directory for reading. It takes no lock, and works in a directory that cannot be written.
    ///
    /// # Errors
    /// [`StoreError::Missing`] if nothing was stored there yet; the others say why it cannot be read.
    pub fn open_reader(dir: &Path) -> Result<Self, StoreError> {
        let (connection, access) = connect_reader(dir)?;
        let (sender, head) = watch::channel(stored_head(&connection)?.seq);
        Ok(Self {
            writer: None,
            readers: Arc::new(Pool::new(dir.to_owned(), access, Some(connection))),
            long_reads: Semaphore::new(LONG_READS_MAX),
            follower: Mutex::new(None),
            head,
            _unmoved: Some(sender),
            _lock: None,
        })
    }

    /// The seq of the last event that *this* process committed, for whoever follows the log within it.
    /// In a store that was opened for reading it never moves; see [`Store::data_version`].
    pub fn watch_head(&self) -> watch::Receiver<u64> {
        self.head.clone()
    }

    /// A number that changes when any process has committed since it was last asked for
    /// (SQLite's `PRAGMA data_version`). Asking costs some microseconds.
    ///
    /// # Errors
    /// The database failed.
    pub fn data_version(&self) -> Result<u64, LogError> {
        let mut follower = locked(&self.follower);
        let connection = match follower.take() {
            Some(connection) => connection,
            None => self.readers.connect()?,
        };
        // The number means something only on the connection that gave the one before.
        let connection = follower.insert(connection);
        connection
            .pragma_query_value(None, "data_version", |row| row.get(0))
            .tried("cannot ask whether the log has grown")
    }

    /// How many transactions this process committed: fewer than appends, where appends came together.
    pub fn commits(&self) -> u64 {
        self.writer.as_ref().map_or(0, |writer| writer.commits.load(Ordering::Relaxed))
    }

    /// Walks the whole log and checks the chain, every seq and every version, before anything is decoded.
    /// See [`crate::chain`] for what is hashed. That the newest events were cut off shows only against a head that
    /// was kept elsewhere: give it as `expected`.
    ///
    /// # Errors
    /// The database could not be read, or is damaged as a file. A log that is not sound is no error but a [`Verification::Broken`].
    pub fn verify(&self, expected: Option<Head>) -> Result<Verification, LogError> {
        self.readers.with(|connection| {
            schema::check(connection)?;
            verify(connection, expected)
        })
    }

    /// What is stored beside the log and contradicts it, in sentences: rows of the read model, checkpoints of events that
    /// are not there, a write-ahead log that breaks off. Nothing goes by such a row that decides anything.
    ///
    /// # Errors
    /// The database could not be read.
    pub fn differences(&self) -> Result<Vec<String>, LogError> {
        audit::differences(&self.readers.connect()?)
    }

    /// Makes the read model again from the events.
    ///
    /// # Errors
    /// The store was opened for reading, or failed.
    pub async fn rebuild_read_model(&self) -> Result<(), LogError> {
        self.ask(Work::Rebuild).await.map(|_| ())
    }

    async fn ask(&self, work: Work) -> Result<Done, LogError> {
        match &self.writer {
            Some(writer) => writer.ask(work).await,
            None => Err(LogError::ReadOnly("it was opened for reading".to_owned())),
        }
    }

    /// Runs a read that may be long where it holds nobody up.
    async fn read_many<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Pool) -> Result<T, LogError> + Send + 'static,
    ) -> Result<T, LogError> {
        let several = Handle::try_current().is_ok_and(|h| h.runtime_flavor() == RuntimeFlavor::MultiThread);
        if !several {
            return query(&self.readers);
        }
        // It is never closed; without a slot the read would only be slower.
        let _slot = self.long_reads.acquire().await;
        let readers = Arc::clone(&self.readers);
        tokio::task::spawn_blocking(move || query(&readers)).await.map_err(|error| LogError::Backend {
            message: "a read was cut short".to_owned(),
            source: Box::new(error),
        })?
    }
}

#[async_trait]
impl EventLog for Store {
    async fn append(&self, append: Append) -> Result<Vec<Envelope>, LogError> {
        match self.ask(Work::Append(prepare(append)?)).await? {
            Done::Appended(envelopes) => Ok(envelopes),
            Done::Kept => Ok(Vec::new()),
        }
    }

    async fn read_stream(
        &self,
        stream: &StreamId,
        version: u64,
        seq_max: u64,
        count: usize,
    ) -> Result<Vec<Envelope>, LogError> {
        if count <= SHORT_EVENTS_MAX {
            return self.readers.with(|c| reader::stream(c, stream, version, seq_max, count));
        }
        let stream = stream.clone();
        self.read_many(move |pool| pool.with(|c| reader::stream(c, &stream, version, seq_max, count))).await
    }

    async fn read(&self, seq: u64, filter: &EventFilter, count: usize) -> Result<Vec<Envelope>, LogError> {
        let filter = filter.clone();
        self.read_many(move |pool| pool.with(|c| reader::filtered(c, seq, &filter, count))).await
    }

    async fn head(&self) -> Result<Head, LogError> {
        self.readers.with(stored_head)
    }

    async fn by_key(&self, stream: &StreamId, key: &str) -> Result<Option<Envelope>, LogError> {
        self.readers.with(|c| reader::by_key(c, stream, key))
    }

    async fn checkpoint(
        &self,
        stream: &StreamId,
        projector: u32,
        seq_max: u64,
    ) -> Result<Option<Checkpoint>, LogError> {
        self.readers.with(|c| reader::checkpoint(c, stream, projector, seq_max))
    }

    async fn save_checkpoint(&self, checkpoint: Checkpoint) -> Result<(), LogError> {
        // Whoever cannot write reads the stream from its start the next time, and that is all.
        if self.writer.is_none() {
            return Ok(());
        }
        self.ask(Work::Keep(checkpoint)).await.map(|_| ())
    }

    async fn domains(&self, seq_max: u64) -> Result<Vec<DomainRow>, LogError> {
        self.read_many(move |pool| match seq_max {
            u64::MAX => pool.with_model(|c, _| reader::domains_now(c)),
            _ => pool.with(|c| reader::domains_at(c, seq_max)),
        })
        .await
    }

    async fn domain_by_name(&self, name: &DomainName) -> Result<Option<DomainRow>, LogError> {
        self.readers.with_model(|c, _| reader::domain_by_name(c, name))
    }

    async fn policies(&self) -> Result<Vec<PolicyName>, LogError> {
        self.readers.with(reader::policies)
    }

    async fn operations(
        &self,
        filter: &OperationFilter,
        count: usize,
    ) -> Result<Vec<OperationRow>, LogError> {
        let filter = *filter;
        self.read_many(move |pool| pool.with_model(|c, _| reader::operations(c, &filter, count))).await
    }

    async fn seq_at(&self, at: Timestamp) -> Result<SeqAt, LogError> {
        self.read_many(move |pool| pool.with(|c| reader::seq_at(c, at))).await
    }
}

fn this_process() -> Identity {
    let host = nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned());
    Identity {
        pid: std::process::id(),
        host: host.unwrap_or_else(|_| "unknown".to_owned()),
        program: format!("snaptree {}", env!("CARGO_PKG_VERSION")),
    }
}

/// Makes the directory, and syncs the one above it: a log that was acknowledged must not vanish with its directory.
fn make_dir(dir: &Path) -> Result<(), StoreError> {
    if dir.is_dir() {
        return Ok(());
    }
    let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.and_then(|()| sync_parent(dir))
        .map_err(|source| StoreError::Io { what: format!("cannot make {}", dir.display()), source })
}

/// Makes the file if it is not there. SQLite gives its companions the same mode.
fn make_file(file: &Path) -> Result<(), StoreError> {
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(file) {
        Ok(_) => sync_parent(file),
        // SQLite would follow a link.
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            snaptree_files::open(file, OpenOptions::new().read(true)).map(|_| ())
        }
        Err(error) => Err(error),
    }
    .map_err(|source| StoreError::Io { what: format!("cannot make {}", file.display()), source })
}

fn sync_parent(path: &Path) -> std::io::Result<()> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => File::open(parent)?.sync_all(),
        _ => File::open(".")?.sync_all(),
    }
}

/// Makes the tables in one transaction: a crash leaves an empty database, or one that lacks only its first event,
/// which the next writer appends.
fn create(connection: &mut Connection) -> Result<(), LogError> {
    let what = "cannot make the database";
    let transaction = connection.transaction().tried(what)?;
    schema::migrate(&transaction, 0)?;
    transaction.execute("INSERT INTO meta VALUES (1, ?1)", [random().0]).tried(what)?;
    transaction.execute_batch(CHECKPOINTS).tried(what)?;
    read_model::rebuild(&transaction, Place::Main, 0)?;
    transaction.commit().tried(what)?;
    // What tells that this is a log of ours must not hang on the sums of a write-ahead log.
    connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).tried(what)
}

/// 32 random bytes, from the operating system by way of three version 4 UUIDs (366 random bits).
fn random() -> Hash {
    let mut digest = Sha256::new();
    (0..3).for_each(|_| digest.update(uuid::Uuid::new_v4().as_bytes()));
    Hash(digest.finalize().into())
}

/// The first event: the installation id that the chain begins with.
fn opened(installation: Hash, identity: &Identity) -> Result<Work, LogError> {
    let event = SystemOpened { installation: installation.to_string(), program: identity.program.clone() };
    prepare(Append {
        expect: vec![(StreamId::System, 0)],
        actor: Actor::Engine,
        origin: Origin {
            uid: nix::unistd::getuid().as_raw(),
            host: identity.host.clone(),
            pid: identity.pid,
            via: "engine".to_owned(),
            sudo_user: None,
        },
        at: Timestamp::now(),
        events: vec![NewEvent {
            stream: StreamId::System,
            event: event.into(),
            operation: None,
            cause: None,
            key: None,
        }],
    })
    .map(Work::Append)
}

/// Migrates an older database, and makes whatever somebody dropped: triggers, and tables of the read model.
fn bring_up_to_date(connection: &mut Connection, format: i64) -> Result<(), LogError> {
    let whole = read_model::is_whole(connection)?;
    if schema::is_current(format) && whole && schema::has_triggers(connection)? {
        let head = stored_head(connection)?.seq;
        if read_model::is_at(connection, head) {
            return Ok(());
        }
    }
    let what = "cannot bring the database up to date";
    let transaction =
        connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate).tried(what)?;
    schema::migrate(&transaction, format)?;
    let head = stored_head(&transaction)?.seq;
    if whole {
        read_model::ensure(&transaction, Place::Main, head)?;
    } else {
        read_model::rebuild(&transaction, Place::Main, head)?;
    }
    transaction.commit().tried(what)
}

fn to_wal(connection: &Connection) -> Result<(), LogError> {
    let what = "cannot switch the database to a write-ahead log";
    let mode: String = connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0)).tried(what)?;
    if mode != "wal" {
        return Err(LogError::Backend {
            message: what.to_owned(),
            source: Box::new(Words(format!("its mode is {mode}: does its file system have shared memory?"))),
        });
    }
    connection.query_row(&format!("PRAGMA journal_size_limit = {WAL_BYTES_KEPT}"), [], |_| Ok(())).tried(what)
}

/// Opens the first connection of a reader, and finds out how the file can be read at all.
fn connect_reader(dir: &Path) -> Result<(Connection, ReadAccess), StoreError> {
    let file = dir.join(DATABASE_FILE);
    match std::fs::metadata(&file) {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(StoreError::Missing { dir: dir.to_owned() });
        }
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            return Err(not_readable(dir));
        }
        Err(source) => {
            return Err(StoreError::Io { what: format!("cannot read {}", file.display()), source });
        }
    }
    if nix::unistd::access(&file, nix::unistd::AccessFlags::R_OK) == Err(nix::errno::Errno::EACCES) {
        return Err(not_readable(dir));
    }
    let first = recognised(&file, ReadAccess::Shared);
    let no_index = match &first {
        Err(StoreError::Database { source, .. }) => matches!(
            source.sqlite_error_code(),
            Some(ErrorCode::CannotOpen | ErrorCode::ReadOnly | ErrorCode::PermissionDenied)
        ),
        _ => false,
    };
    let writable = nix::unistd::access(dir, nix::unistd::AccessFlags::W_OK).is_ok();
    if !no_index || writable {
        return first.map(|connection| (connection, ReadAccess::Shared));
    }
    // Without its -shm file a WAL cannot be read, and an immutable database is read without its WAL.
    let wal = dir.join(format!("{DATABASE_FILE}-wal"));
    if std::fs::metadata(wal).is_ok_and(|wal| wal.len() > 0) {
        return Err(StoreError::UnreadableWal { dir: dir.to_owned() });
    }
    Ok((recognised(&file, ReadAccess::Immutable)?, ReadAccess::Immutable))
}

/// Who may read the state, by the owners and modes that this user can see.
fn not_readable(dir: &Path) -> StoreError {
    let file = dir.join(DATABASE_FILE);
    // Where the directory is closed to this user, it is what keeps them out.
    let (found, group_may) = match (file.metadata(), dir.metadata()) {
        (Ok(file), _) => (Some(file), 0o040),
        (Err(_), Ok(dir)) => (Some(dir), 0o050),
        (Err(_), Err(_)) => (None, 0),
    };
    let who = found.map_or_else(
        || "its owner".to_owned(),
        |found| {
            let owner = snaptree_files::user(Uid::from_raw(found.uid()));
            let gid = Gid::from_raw(found.gid());
            let group =
                Group::from_gid(gid).ok().flatten().map_or_else(|| gid.to_string(), |group| group.name);
            match found.mode() & group_may == group_may {
                true => format!("user {owner} and members of the group {group}"),
                false => format!("user {owner}"),
            }
        },
    );
    StoreError::NotReadable { dir: dir.to_owned(), who }
}

fn recognised(file: &Path, access: ReadAccess) -> Result<Connection, StoreError> {
    let connection = schema::open_reader(file, access)
        .map_err(|source| StoreError::Database { what: format!("cannot open {}", file.display()), source })?;
    match schema::recognise(&connection, file)? {
        Found::Empty => {
            let dir = file.parent().unwrap_or(Path::new(".")).to_owned();
            Err(StoreError::Missing { dir })
        }
        Found::Format(format) if schema::is_current(format) => Ok(connection),
        Found::Format(found) => Err(StoreError::Older { file: file.to_owned(), found }),
    }
}
