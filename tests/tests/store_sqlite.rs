//! What the SQLite store promises beyond the port: an append-only file, a chain that anybody can check, one writer.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed step of a test fails the test")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rusqlite::Connection;
use sha2::{Digest, Sha256};
use snaptree_engine::event::{Envelope, PolicyRemoved, PolicyResumed};
use snaptree_engine::ids::{DomainName, StreamId};
use snaptree_engine::log::{Checkpoint, EventFilter, EventLog, LogError, NewEvent, OperationFilter};
use snaptree_store::{DATABASE_FILE, LockWait, Store, StoreError, Verification};
use snaptree_tests::conformance::{
    create_requested, created, deleted, domain_id, facts, join, new, noise, of, operation_id, registered,
    snapshot_id,
};

const NO_WAIT: LockWait = LockWait { timeout: Duration::ZERO };

fn open(dir: &Path) -> Store {
    Store::open_writer(dir, NO_WAIT).unwrap()
}

fn raw(dir: &Path) -> Connection {
    Connection::open(dir.join(DATABASE_FILE)).unwrap()
}

/// A domain with two snapshots, the first deleted, and an open request. Gives its stream.
async fn fill(store: &Store) -> StreamId {
    let (id, one, two) = (domain_id(), snapshot_id(), snapshot_id());
    let stream = StreamId::Domain(id);
    let (a, b, c) = (operation_id(), operation_id(), operation_id());
    let keyed =
        NewEvent { key: Some("k".into()), ..of(c, &stream, create_requested(snapshot_id(), "three")) };
    for events in [
        vec![new(&stream, registered(id, "web"))],
        vec![of(a, &stream, create_requested(one, "one")), of(a, &stream, created(one, "one", a))],
        vec![of(b, &stream, create_requested(two, "two")), of(b, &stream, created(two, "two", b))],
        vec![of(b, &stream, deleted(one, "one")), keyed],
    ] {
        store.append(facts(events)).await.unwrap();
    }
    stream
}

async fn everything(store: &Store) -> Vec<Envelope> {
    store.read(0, &EventFilter::default(), usize::MAX).await.unwrap()
}

fn problem(store: &Store) -> (u64, String) {
    match store.verify(None).unwrap() {
        Verification::Broken(problem) => (problem.seq, problem.what),
        Verification::Sound(sound) => panic!("{sound:?}"),
    }
}

/// Runs SQL in the sqlite3 shell; none if there is no shell here.
fn shell(dir: &Path, sql: &str) -> Option<(bool, String)> {
    let output = Command::new("sqlite3").arg(dir.join(DATABASE_FILE)).arg(sql).output().ok()?;
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    Some((output.status.success(), text))
}

#[tokio::test]
async fn nobody_changes_an_event_with_sql() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    fill(&store).await;
    let before = everything(&store).await;
    let insert =
        |values: &str| format!("INSERT OR REPLACE INTO events SELECT {values} FROM events WHERE seq = 3");
    let rest = "kind, schema, at, actor, origin, epoch, operation, cause";
    let replacements = [
        insert(&format!("3, 'x', stream, version, {rest}, key, data, hash")),
        insert(&format!("99, 'x', stream, version, {rest}, key, data, hash")),
        // The next seq, but the id, the place in the stream, or the key of another event.
        insert(&format!("9, id, stream, 8, {rest}, key, data, hash")),
        insert(&format!("9, 'x', stream, version, {rest}, key, data, hash")),
        insert(&format!("9, 'x', stream, 8, {rest}, 'k', data, hash")),
        insert(&format!("NULL, 'x', stream, version, {rest}, key, data, hash")),
    ];
    assert_eq!(before.len(), 8);
    let sql = [
        "UPDATE events SET actor = 'engine' WHERE seq = 3",
        "UPDATE OR REPLACE events SET seq = 4 WHERE seq = 3",
        "DELETE FROM events WHERE seq = 8",
        "DELETE FROM events",
        "UPDATE meta SET installation = zeroblob(32)",
        "DELETE FROM meta",
    ];
    for sql in sql.into_iter().chain(replacements.iter().map(String::as_str)) {
        let error = raw(dir.path()).execute_batch(sql).unwrap_err().to_string();
        assert!(error.contains("append-only") || error.contains("never changes"), "{sql}: {error}");
        if let Some((done, text)) = shell(dir.path(), sql) {
            assert!(!done && (text.contains("never") || text.contains("append-only")), "{sql}: {text}");
        }
        assert_eq!(everything(&store).await, before, "{sql}");
    }
    // The same way does change what is not the log.
    raw(dir.path()).execute_batch("UPDATE snapshots SET name = 'x'").unwrap();
}

/// The definition in `chain`'s documentation, written a second time.
fn independent_head(connection: &Connection) -> (i64, Vec<u8>, bool) {
    let mut previous: Vec<u8> =
        connection.query_row("SELECT installation FROM meta", [], |row| row.get(0)).unwrap();
    let mut statement = connection.prepare("SELECT * FROM events ORDER BY seq").unwrap();
    let mut rows = statement.query([]).unwrap();
    let (mut seq, mut sound) = (0, true);
    while let Some(row) = rows.next().unwrap() {
        let mut bytes = previous.clone();
        for column in 0..14 {
            let text = match row.get::<_, rusqlite::types::Value>(column).unwrap() {
                rusqlite::types::Value::Null => None,
                rusqlite::types::Value::Integer(number) => Some(format!("{number}")),
                rusqlite::types::Value::Text(text) => Some(text),
                other => panic!("{other:?}"),
            };
            match text {
                None => bytes.extend([0xff; 8]),
                Some(text) => {
                    bytes.extend(u64::try_from(text.len()).unwrap().to_be_bytes());
                    bytes.extend(text.as_bytes());
                }
            }
        }
        previous = Sha256::digest(&bytes).to_vec();
        sound &= previous == row.get::<_, Vec<u8>>(14).unwrap();
        seq = row.get(0).unwrap();
    }
    (seq, previous, sound)
}

/// The verifier of the documentation, as it stands there.
fn documented_verifier() -> String {
    let source =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../store/src/chain.rs")).unwrap();
    let inside = source.split("//! ```python\n").nth(1).unwrap().split("//! ```").next().unwrap();
    inside
        .lines()
        .map(|line| line.trim_start_matches("//!").strip_prefix(' ').unwrap_or(""))
        .fold(String::new(), |program, line| program + line + "\n")
}

#[tokio::test]
async fn anybody_can_check_the_chain() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    fill(&store).await;
    let head = store.head().await.unwrap();
    let (seq, hash, sound) = independent_head(&raw(dir.path()));
    assert!(sound);
    assert_eq!((u64::try_from(seq).unwrap(), hash), (head.seq, head.hash.0.to_vec()));
    let python = || {
        let output = Command::new("python3")
            .args(["-c", &documented_verifier()])
            .arg(dir.path().join(DATABASE_FILE))
            .output()
            .ok()?;
        Some((output.status.success(), String::from_utf8(output.stdout).unwrap()))
    };
    let Some(told) = python() else { return };
    assert_eq!(told, (true, format!("{} {}\n", head.seq, head.hash)));
    tamper(dir.path(), "UPDATE events SET actor = 'engine' WHERE seq = 4");
    assert!(!python().unwrap().0);
}

/// As somebody would who knows about the triggers.
fn tamper(dir: &Path, sql: &str) {
    raw(dir)
        .execute_batch(&format!(
            "DROP TRIGGER events_no_update; DROP TRIGGER events_no_delete; DROP TRIGGER events_in_order; {sql}"
        ))
        .unwrap();
}

#[tokio::test]
async fn verify_names_the_event_that_was_touched() {
    for (sql, seq, what) in [
        ("UPDATE events SET data = replace(data, 'one', 'onf') WHERE seq = 4", 4, "not what was written"),
        ("UPDATE events SET hash = zeroblob(32) WHERE seq = 8", 8, "not what was written"),
        ("UPDATE events SET key = NULL WHERE seq = 8", 8, "not what was written"),
        ("UPDATE events SET operation = '' WHERE seq = 2", 2, "not what was written"),
        ("DELETE FROM events WHERE seq = 5", 5, "missing"),
        ("DELETE FROM events WHERE seq = 1", 1, "missing"),
        ("UPDATE events SET cause = 1 WHERE seq = 3", 3, "not what was written"),
        (
            "DROP TRIGGER meta_no_update; UPDATE meta SET installation = zeroblob(32)",
            1,
            "not what was written",
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        fill(&store).await;
        assert!(matches!(store.verify(None).unwrap(), Verification::Sound(sound) if sound.events == 8));
        tamper(dir.path(), sql);
        let found = problem(&store);
        assert_eq!(found.0, seq, "{sql}: {found:?}");
        assert!(found.1.contains(what), "{sql}: {found:?}");
    }
}

#[tokio::test]
async fn only_a_head_kept_elsewhere_shows_that_the_tail_was_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    fill(&store).await;
    let head = store.head().await.unwrap();
    let earlier = everything(&store).await[4].clone();
    let kept = snaptree_engine::driver::Head { seq: earlier.seq, hash: earlier.hash };
    for expected in [None, Some(head), Some(kept)] {
        assert!(matches!(store.verify(expected).unwrap(), Verification::Sound(_)));
    }
    let wrong = snaptree_engine::driver::Head { seq: earlier.seq, hash: head.hash };
    assert!(matches!(store.verify(Some(wrong)).unwrap(), Verification::Broken(p) if p.seq == earlier.seq));
    tamper(dir.path(), "DELETE FROM events WHERE seq > 6");
    assert!(matches!(store.verify(None).unwrap(), Verification::Sound(sound) if sound.events == 6));
    assert!(matches!(store.verify(Some(head)).unwrap(), Verification::Broken(p) if p.seq == 7));
    // The process that wrote the cut-off events notices by itself.
    let error = store.append(facts(vec![new(&StreamId::System, noise())])).await.unwrap_err();
    assert!(matches!(error, LogError::Damaged(_)), "{error}");
}

#[tokio::test]
async fn a_writer_brings_back_the_triggers_that_somebody_dropped() {
    let dir = tempfile::tempdir().unwrap();
    fill(&open(dir.path())).await;
    tamper(dir.path(), "");
    let _store = open(dir.path());
    raw(dir.path()).execute_batch("DELETE FROM events").unwrap_err();
}

#[tokio::test]
async fn a_creation_that_was_cut_short_is_finished_by_the_next_writer() {
    let dir = tempfile::tempdir().unwrap();
    // Killed after the file was made, and after it was switched to a write-ahead log.
    std::fs::write(dir.path().join(DATABASE_FILE), "").unwrap();
    raw(dir.path()).query_row("PRAGMA journal_mode = WAL", [], |_| Ok(())).unwrap();
    let first = everything(&open(dir.path())).await;
    assert_eq!(first.iter().map(|e| (e.seq, e.event.kind())).collect::<Vec<_>>(), [(1, "System.Opened")]);
    // Killed before the first event.
    tamper(dir.path(), "DELETE FROM events; DELETE FROM owner; UPDATE read_model SET seq = 0");
    assert_eq!(everything(&Store::open_reader(dir.path()).unwrap()).await, []);
    let store = open(dir.path());
    let again = everything(&store).await;
    assert_eq!((again.len(), &again[0].event), (1, &first[0].event));
    assert!(matches!(store.verify(None).unwrap(), Verification::Sound(sound) if sound.events == 1));
}

#[tokio::test]
async fn an_epoch_is_claimed_with_the_first_append_and_not_before() {
    let dir = tempfile::tempdir().unwrap();
    let mut epochs = Vec::new();
    for appends in [2, 0, 0, 1] {
        let store = open(dir.path());
        for _ in 0..appends {
            epochs.push(store.append(facts(vec![new(&StreamId::System, noise())])).await.unwrap()[0].epoch);
        }
    }
    assert_eq!(epochs, [1, 1, 2]);
}

#[tokio::test]
async fn a_process_that_lost_the_ownership_cannot_append() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let append = || store.append(facts(vec![new(&StreamId::System, noise())]));
    append().await.unwrap();
    raw(dir.path()).execute_batch("UPDATE owner SET epoch = epoch + 1").unwrap();
    let head = store.head().await.unwrap();
    for _ in 0..2 {
        let error = append().await.unwrap_err();
        assert!(matches!(error, LogError::Fenced { ours: 1, current: 2 }), "{error}");
    }
    assert_eq!(store.head().await.unwrap(), head);
    raw(dir.path()).execute_batch("DELETE FROM owner").unwrap();
    assert!(matches!(append().await.unwrap_err(), LogError::Fenced { ours: 1, current: 0 }));
}

#[tokio::test]
async fn one_process_writes_and_the_others_are_told_who() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(dir.path());
    match Store::open_writer(dir.path(), LockWait { timeout: Duration::from_millis(30) }) {
        Err(StoreError::Locked { holder, waited, .. }) => {
            assert_eq!(holder.pid, std::process::id());
            assert!(!holder.command.is_empty());
            assert!(waited >= Duration::from_millis(30));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(snaptree_store::lock::holder(dir.path()).unwrap().map(|h| h.pid), Some(std::process::id()));
    // A reader does not ask, and the writer goes on.
    let reader = Store::open_reader(dir.path()).unwrap();
    first.append(facts(vec![new(&StreamId::System, noise())])).await.unwrap();
    assert_eq!(reader.head().await.unwrap().seq, 2);
    let error = reader.append(facts(vec![new(&StreamId::System, noise())])).await.unwrap_err();
    assert!(matches!(error, LogError::ReadOnly(_)), "{error}");

    let path = dir.path().to_owned();
    let waiting =
        std::thread::spawn(move || Store::open_writer(&path, LockWait { timeout: Duration::from_secs(60) }));
    drop(first);
    waiting.join().unwrap().unwrap();
    assert_eq!(snaptree_store::lock::holder(dir.path()).unwrap(), None);
}

#[tokio::test]
async fn what_is_not_ours_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(Store::open_reader(dir.path()), Err(StoreError::Missing { .. })));
    assert!(matches!(Store::open_reader(&dir.path().join("no")), Err(StoreError::Missing { .. })));
    std::fs::write(dir.path().join(DATABASE_FILE), "").unwrap();
    assert!(matches!(Store::open_reader(dir.path()), Err(StoreError::Missing { .. })));

    std::fs::write(dir.path().join(DATABASE_FILE), "no database, but long enough to be one".repeat(200))
        .unwrap();
    let foreign = |result| matches!(result, Err(StoreError::Foreign { .. }));
    assert!(foreign(Store::open_reader(dir.path())));
    assert!(foreign(Store::open_writer(dir.path(), NO_WAIT)));

    std::fs::remove_file(dir.path().join(DATABASE_FILE)).unwrap();
    raw(dir.path()).execute_batch("CREATE TABLE theirs (x)").unwrap();
    let bytes = std::fs::read(dir.path().join(DATABASE_FILE)).unwrap();
    assert!(foreign(Store::open_reader(dir.path())));
    assert!(foreign(Store::open_writer(dir.path(), NO_WAIT)));
    assert_eq!(std::fs::read(dir.path().join(DATABASE_FILE)).unwrap(), bytes);
}

#[tokio::test]
async fn a_newer_format_is_refused_in_words() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()));
    raw(dir.path()).execute_batch("PRAGMA user_version = 3").unwrap();
    for result in [Store::open_reader(dir.path()), Store::open_writer(dir.path(), NO_WAIT)] {
        let error = result.unwrap_err();
        assert!(matches!(error, StoreError::Newer { found: 3, known: 2, .. }));
        assert!(error.to_string().contains("newer snaptree"), "{error}");
    }
}

#[tokio::test]
async fn a_log_of_the_first_format_gets_its_index_of_policies() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    fill(&store).await;
    let policy = StreamId::Policy("nightly".parse().unwrap());
    let events = vec![new(&policy, PolicyResumed {}), new(&policy, PolicyRemoved {})];
    store.append(facts(events)).await.unwrap();
    let whole = everything(&store).await;
    drop(store);
    raw(dir.path()).execute_batch("DROP INDEX events_policies; PRAGMA user_version = 1").unwrap();
    assert!(matches!(Store::open_reader(dir.path()), Err(StoreError::Older { found: 1, .. })));
    let store = open(dir.path());
    assert_eq!(everything(&store).await[..whole.len()], whole);
    let kinds = async |kind: &str, seq: u64| {
        let filter = EventFilter { kind: Some(kind.to_owned()), ..EventFilter::default() };
        let read = store.read(seq, &filter, usize::MAX).await.unwrap();
        read.iter().map(|envelope| envelope.event.kind()).collect::<Vec<_>>()
    };
    assert_eq!(kinds("Policy.", 0).await, ["Policy.Resumed", "Policy.Removed"]);
    assert_eq!(kinds("Policy.Removed", 0).await, ["Policy.Removed"]);
    let last = whole.last().unwrap().seq;
    assert_eq!(kinds("Policy.", last - 1).await, ["Policy.Removed"]);
}

#[tokio::test]
async fn files_are_for_their_owner_alone() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("a/b");
    let store = open(&state);
    fill(&store).await;
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&state), 0o700);
    for file in [DATABASE_FILE, "snaptree.db-wal", "snaptree.db-shm", "lock"] {
        assert_eq!(mode(&state.join(file)), 0o600, "{file}");
    }
}

/// Everything that the read model and the checkpoints answer.
async fn answers(store: &Store, stream: &StreamId) -> String {
    let every = OperationFilter::default();
    format!(
        "{:?} {:?} {:?} {:?}",
        store.domains(u64::MAX).await.unwrap(),
        store.domains(3).await.unwrap(),
        store.domain_by_name(&DomainName::new("web").unwrap()).await.unwrap(),
        store.operations(&every, 100).await.unwrap(),
    ) + &format!("{:?}", store.read_stream(stream, 0, u64::MAX, 100).await.unwrap())
}

#[tokio::test]
async fn dropping_what_can_be_made_again_changes_no_answer() {
    for sql in [
        "DROP TABLE domains",
        "DROP TABLE snapshots",
        "DROP TABLE operations",
        "DROP TABLE read_model",
        "DROP TABLE checkpoints",
        "DROP VIEW audit",
        "DELETE FROM read_model",
        "UPDATE read_model SET seq = 2",
        "UPDATE read_model SET version = 0; DROP TABLE domains; CREATE TABLE domains (x)",
        "DROP TABLE domains; DROP TABLE snapshots; DROP TABLE operations; DROP TABLE read_model; DROP VIEW audit",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let writer = open(dir.path());
        let stream = fill(&writer).await;
        let reader = Store::open_reader(dir.path()).unwrap();
        let before = answers(&writer, &stream).await;
        assert!(before.contains("\"web\"") && before.contains("three"), "{before}");
        assert_eq!(answers(&reader, &stream).await, before);
        raw(dir.path()).execute_batch(sql).unwrap();
        // A reader that was open, one that is opened now, and the writer's own.
        assert_eq!(answers(&reader, &stream).await, before, "{sql}");
        assert_eq!(answers(&Store::open_reader(dir.path()).unwrap(), &stream).await, before, "{sql}");
        assert_eq!(answers(&writer, &stream).await, before, "{sql}");
        // The writer goes on, and readers with tables of their own follow.
        let id = domain_id();
        let more = StreamId::Domain(id);
        let request = of(operation_id(), &more, create_requested(snapshot_id(), "s"));
        writer.append(facts(vec![new(&more, registered(id, "more")), request])).await.unwrap();
        let after = answers(&writer, &stream).await;
        assert!(after.contains("\"more\""));
        assert_eq!(answers(&reader, &stream).await, after, "{sql}");
        drop(writer);
        assert_eq!(answers(&open(dir.path()), &stream).await, after, "{sql}");
        let rows: i64 =
            raw(dir.path()).query_row("SELECT count(*) FROM audit", [], |row| row.get(0)).unwrap();
        assert_eq!(rows, 10, "{sql}");
        assert!(matches!(open(dir.path()).verify(None).unwrap(), Verification::Sound(_)));
    }
}

#[tokio::test]
async fn checkpoints_can_be_dropped_and_kept_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let stream = fill(&store).await;
    let last = store.read_stream(&stream, 0, u64::MAX, 100).await.unwrap().pop().unwrap();
    let checkpoint = Checkpoint {
        stream: stream.clone(),
        version: last.version,
        seq: last.seq,
        hash: last.hash.to_string(),
        projector: 1,
        state: "{}".into(),
    };
    for sql in ["", "DROP TABLE checkpoints", "DELETE FROM checkpoints"] {
        raw(dir.path()).execute_batch(sql).unwrap();
        store.save_checkpoint(checkpoint.clone()).await.unwrap();
        assert_eq!(store.checkpoint(&stream, 1, u64::MAX).await.unwrap().as_ref(), Some(&checkpoint));
    }
    raw(dir.path()).execute_batch("DROP TABLE checkpoints").unwrap();
    assert_eq!(store.checkpoint(&stream, 1, u64::MAX).await.unwrap(), None);
}

#[tokio::test]
async fn the_audit_view_speaks_to_people() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    fill(&store).await;
    let line = |seq: i64| -> (String, String, i64, String, String, String) {
        raw(dir.path())
            .query_row(
                "SELECT time, actor, uid, kind, domain, snapshot FROM audit WHERE seq = ?1",
                [seq],
                |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?, row.get(5)?)),
            )
            .unwrap()
    };
    let (time, actor, uid, kind, domain, snapshot) = line(7);
    assert_eq!(time, "2026-11-18T11:06:40.000000Z");
    assert_eq!((actor.as_str(), uid, kind.as_str()), ("user:ann", 1000, "Snapshot.Deleted"));
    assert_eq!((domain.as_str(), snapshot.as_str()), ("web", "one"));
    assert_eq!(line(8).5, "three");
}

#[tokio::test]
async fn a_row_that_cannot_be_read_is_named() {
    for (sql, what) in [
        ("UPDATE events SET data = '{' WHERE seq = 4", "event 4: data"),
        ("UPDATE events SET kind = 'Snapshot.Invented' WHERE seq = 4", "event 4: data"),
        ("UPDATE events SET origin = '' WHERE seq = 4", "event 4: origin"),
        ("UPDATE events SET actor = 'nobody' WHERE seq = 4", "event 4: actor"),
        ("UPDATE events SET epoch = -1 WHERE seq = 4", "event 4: epoch"),
        ("UPDATE events SET at = 9223372036854775807 WHERE seq = 4", "event 4: at"),
        ("UPDATE events SET data = cast(zeroblob(17000000) AS TEXT) WHERE seq = 4", "event 4: data"),
        ("UPDATE events SET data = cast(zeroblob(90000000) AS TEXT) WHERE seq = 4", "larger"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        fill(&store).await;
        tamper(dir.path(), sql);
        match store.read(0, &EventFilter::default(), 100).await {
            Err(LogError::Damaged(why)) => assert!(why.contains(what), "{sql}: {why}"),
            other => panic!("{sql}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn appends_that_come_together_share_a_commit() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let before = store.commits();
    let streams: Vec<_> = (0..400).map(|_| StreamId::Domain(domain_id())).collect();
    let keyed = NewEvent { key: Some("k".into()), ..new(&StreamId::System, noise()) };
    store.append(facts(vec![keyed.clone()])).await.unwrap();
    let results = join(streams.iter().enumerate().map(|(index, stream)| {
        // Every tenth is refused, after its first event was written, which must not hurt its neighbours.
        let mut append = facts(vec![new(stream, noise())]);
        if index % 10 == 0 {
            append.events.push(keyed.clone());
        }
        store.append(append)
    }))
    .await;
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 360);
    for (index, result) in results.iter().enumerate() {
        assert_eq!(result.is_err(), index % 10 == 0);
    }
    let commits = store.commits() - before;
    assert!((1..100).contains(&commits), "{commits} commits");
    assert!(matches!(store.verify(None).unwrap(), Verification::Sound(sound) if sound.events == 362));
}

#[tokio::test]
async fn a_reader_waits_for_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let stream = fill(&store).await;
    let blocker = raw(dir.path());
    blocker.execute_batch("BEGIN IMMEDIATE; UPDATE owner SET pid = 0").unwrap();
    let reader = Store::open_reader(dir.path()).unwrap();
    let begun = std::time::Instant::now();
    answers(&reader, &stream).await;
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    drop(blocker);
}

#[tokio::test]
async fn followers_notice_what_was_appended() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let reader = Store::open_reader(dir.path()).unwrap();
    assert!(!reader.watch_head().has_changed().unwrap());
    let mut head = store.watch_head();
    assert_eq!(*head.borrow_and_update(), 1);
    let version = reader.data_version().unwrap();
    assert_eq!(reader.data_version().unwrap(), version);
    fill(&store).await;
    assert!(head.has_changed().unwrap());
    assert_eq!(*head.borrow_and_update(), 8);
    assert_ne!(reader.data_version().unwrap(), version);
}

#[tokio::test]
async fn a_long_write_ahead_log_is_emptied_and_a_short_one_stays() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let wal = dir.path().join("snaptree.db-wal");
    let reader = raw(dir.path());
    // A reader that stays in the past keeps the log from starting over.
    reader.execute_batch("BEGIN; SELECT count(*) FROM events").unwrap();
    let noise = facts(vec![new(&StreamId::System, noise()); 20_000]);
    let length = || std::fs::metadata(&wal).unwrap().len();
    store.append(noise.clone()).await.unwrap();
    let begun = std::time::Instant::now();
    drop(store);
    assert!(begun.elapsed() < Duration::from_secs(2), "closing waits for no reader");
    assert!(length() > 1 << 20);
    drop(reader);
    let store = open(dir.path());
    assert_eq!(length(), 0);
    store.append(noise).await.unwrap();
    drop(store);
    assert_eq!(length(), 0);
    // A short one stays: closing must not pay for a checkpoint.
    fill(&open(dir.path())).await;
    assert!(length() > 0);
    let store = open(dir.path());
    assert!(matches!(store.verify(None).unwrap(), Verification::Sound(_)));
}

/// What a child of this test program does: the variable names the role, and the directory.
const ROLE: &str = "SNAPTREE_STORE_TEST_ROLE";

/// Not a test of its own: the other tests run this program again, and get here.
#[tokio::test]
async fn child() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let (role, dir) = role.split_once(':').unwrap();
    let dir = PathBuf::from(dir);
    let say = |text: String| {
        let mut out = std::io::stdout().lock();
        writeln!(out, "\n@{text}").unwrap();
        out.flush().unwrap();
    };
    match role {
        "append" => {
            let store = open(&dir);
            loop {
                let events = (0..3).map(|_| new(&StreamId::System, noise())).collect();
                let done = store.append(facts(events)).await.unwrap();
                say(format!("{} {}", done[2].seq, done[2].hash));
            }
        }
        "hold" => {
            let _store = open(&dir);
            say("held".to_owned());
            std::io::stdin().lines().next();
        }
        "read" => match Store::open_reader(&dir) {
            Ok(store) => say(format!("{}", answers(&store, &StreamId::System).await.len())),
            Err(error) => say(format!("{error}")),
        },
        other => panic!("{other}"),
    }
}

fn child_of(role: &str, dir: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child", "--nocapture"]).env(ROLE, format!("{role}:{}", dir.display()));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    command
}

fn said(out: impl std::io::Read) -> impl Iterator<Item = String> {
    BufReader::new(out)
        .lines()
        .map_while(Result::ok)
        .filter_map(|line| line.strip_prefix('@').map(str::to_owned))
}

#[tokio::test]
async fn no_acknowledged_append_is_lost_when_the_process_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let mut acknowledged: Vec<(u64, String)> = Vec::new();
    for round in 1..=5 {
        let mut child = child_of("append", dir.path()).spawn().unwrap();
        let mut lines = said(child.stdout.take().unwrap());
        let mut heard: Vec<String> = lines.by_ref().take(7 * round).collect();
        assert_eq!(heard.len(), 7 * round);
        child.kill().unwrap();
        // What it still said before it died counts too.
        heard.extend(lines);
        child.wait().unwrap();
        acknowledged.extend(heard.iter().filter_map(|line| {
            let (seq, hash) = line.split_once(' ')?;
            (hash.len() == 64).then(|| (seq.parse().unwrap(), hash.to_owned()))
        }));
        // Nobody cleaned up, and the next process goes on.
        let store = open(dir.path());
        assert!(matches!(store.verify(None).unwrap(), Verification::Sound(_)));
        let events = everything(&store).await;
        for (seq, hash) in &acknowledged {
            let index = usize::try_from(*seq).unwrap() - 1;
            assert_eq!(events[index].hash.to_string(), *hash);
        }
        // Whole appends only: three events each, after the first event.
        assert_eq!(events.len() % 3, 1);
    }
    assert!(acknowledged.len() >= 7 * 15);
}

#[tokio::test]
async fn the_lock_ends_with_its_process() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = child_of("hold", dir.path()).spawn().unwrap();
    let mut lines = said(child.stdout.take().unwrap());
    assert_eq!(lines.next().as_deref(), Some("held"));
    match Store::open_writer(dir.path(), NO_WAIT) {
        Err(StoreError::Locked { holder, .. }) => assert_eq!(holder.pid, child.id()),
        other => panic!("{other:?}"),
    }
    child.kill().unwrap();
    child.wait().unwrap();
    open(dir.path());
}

/// Only root can become somebody who may not write; elsewhere there is nothing to try.
#[tokio::test]
async fn a_directory_that_cannot_be_written_can_be_read() {
    const NOBODY: u32 = 65534;
    let dir = tempfile::tempdir().unwrap();
    let root = std::fs::metadata(dir.path()).map(|m| std::os::unix::fs::MetadataExt::uid(&m)).unwrap() == 0;
    let program = tempfile::Builder::new().prefix("snaptree-store-test").tempdir().unwrap();
    if !root {
        return;
    }
    let open_up = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    // The build directory may be closed to others.
    let copy = program.path().join("program");
    std::fs::copy(std::env::current_exe().unwrap(), &copy).unwrap();
    open_up(program.path(), 0o755);
    open_up(&copy, 0o755);
    let store = open(dir.path());
    fill(&store).await;
    let length = answers(&store, &StreamId::System).await.len();
    drop(store);
    open_up(dir.path(), 0o755);
    let files = || ["", "-wal", "-shm"].map(|end| dir.path().join(format!("{DATABASE_FILE}{end}")));
    let ask = || {
        files().iter().filter(|file| file.exists()).for_each(|file| open_up(file, 0o644));
        let mut command = Command::new(&copy);
        command.args(["--exact", "child", "--nocapture"]).env(ROLE, format!("read:{}", dir.path().display()));
        let output = command.uid(NOBODY).gid(NOBODY).stdin(Stdio::null()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        said(output.stdout.as_slice()).next().unwrap_or(text)
    };
    // With everything there, the newest events are in the -wal file, and are read.
    assert_eq!(ask(), length.to_string());
    // Without the -shm file, they cannot be, and an answer without them would be a lie.
    std::fs::remove_file(&files()[2]).unwrap();
    assert!(ask().contains("-wal file"), "{}", ask());
    // With an empty log there is nothing to miss.
    let connection = raw(dir.path());
    connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
    drop(connection);
    files()[1..].iter().filter(|file| file.exists()).for_each(|file| std::fs::remove_file(file).unwrap());
    assert_eq!(ask(), length.to_string());
}
