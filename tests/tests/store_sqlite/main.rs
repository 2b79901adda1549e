//! What the SQLite store promises beyond the port: an append-only file, a chain that anybody can check, one writer.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed step of a test fails the test")]

mod chain;
mod writers;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use rusqlite::Connection;
use snaptree_engine::event::{Envelope, PolicyRemoved, PolicyResumed};
use snaptree_engine::ids::{DomainName, StreamId};
use snaptree_engine::log::{Checkpoint, EventFilter, EventLog, NewEvent, OperationFilter};
use snaptree_store::{DATABASE_FILE, LockWait, Store, StoreError, Verification};
use snaptree_tests::conformance::{
    create_requested, created, deleted, domain_id, facts, new, noise, of, operation_id, registered,
    snapshot_id,
};

const NO_WAIT: LockWait = LockWait { timeout: Duration::ZERO };

fn open(dir: &Path) -> Store {
    Store::open_writer(dir, NO_WAIT).unwrap()
}

fn raw(dir: &Path) -> Connection {
    Connection::open(dir.join(DATABASE_FILE)).unwrap()
}

fn tamper(dir: &Path, sql: &str) {
    raw(dir)
        .execute_batch(&format!(
            "DROP TRIGGER events_no_update; DROP TRIGGER events_no_delete; DROP TRIGGER events_in_order; {sql}"
        ))
        .unwrap();
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
async fn the_write_ahead_log_is_emptied_as_a_writer_goes_or_the_next_comes() {
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
    // A short one too: a copy of the database alone is whole.
    fill(&open(dir.path())).await;
    assert_eq!(length(), 0);
    let store = open(dir.path());
    assert!(matches!(store.verify(None).unwrap(), Verification::Sound(_)));
}
