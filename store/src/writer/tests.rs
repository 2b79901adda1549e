//! What only the connection itself can be made to do: full disks, commits that fail.

use snaptree_engine::event::{Actor, DomainChanged, Origin};
use snaptree_engine::ids::{DomainId, StreamId};
use snaptree_engine::log::{Append, NewEvent};

use super::*;
use crate::row::prepare;
use crate::{LockWait, Store};

fn core(dir: &std::path::Path) -> Core {
    // Made by the store, whose lock and connections are gone again.
    drop(Store::open_writer(dir, LockWait { timeout: std::time::Duration::ZERO }).unwrap());
    let connection = schema::open_writer(&dir.join(crate::DATABASE_FILE)).unwrap();
    let identity = Identity { pid: 1, host: "host".to_owned(), program: "test".to_owned() };
    Core::new(connection, identity).unwrap()
}

fn append(count: usize, label_bytes: usize) -> Work {
    let stream = StreamId::Domain(DomainId::from_uuid(uuid::Uuid::now_v7()));
    let label = [("k".parse().unwrap(), "x".repeat(label_bytes))].into();
    let event = NewEvent {
        stream,
        event: DomainChanged { labels: Some(label), ..DomainChanged::default() }.into(),
        operation: None,
        cause: None,
        key: None,
    };
    let origin = Origin { uid: 0, host: "host".to_owned(), pid: 1, via: "cli".to_owned(), sudo_user: None };
    let events = vec![event; count];
    let append = Append { expect: vec![], actor: Actor::Engine, origin, at: Timestamp::now(), events };
    Work::Append(prepare(append).unwrap())
}

#[test]
fn a_commit_that_fails_leaves_everything_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let mut core = core(dir.path());
    core.connection
        .execute_batch(
            "PRAGMA foreign_keys = ON;
             CREATE TABLE parents (id INTEGER PRIMARY KEY);
             CREATE TABLE children (id INTEGER REFERENCES parents DEFERRABLE INITIALLY DEFERRED);
             CREATE TRIGGER break AFTER INSERT ON events BEGIN INSERT INTO children VALUES (9); END;",
        )
        .unwrap();
    let before = (core.head, core.epoch, core.commits);
    let results = core.commit(vec![append(1, 0), append(2, 0)]);
    assert_eq!(results.len(), 2);
    assert!(results.iter().all(|r| matches!(r, Err(LogError::Backend { .. }))), "{results:?}");
    assert_eq!((core.head, core.epoch, core.commits), before);
    assert_eq!(stored_head(&core.connection).unwrap(), before.0);

    core.connection.execute_batch("DROP TRIGGER break").unwrap();
    let results = core.commit(vec![append(1, 0)]);
    assert!(results[0].is_ok(), "{results:?}");
    assert_eq!(core.head.seq, before.0.seq + 1);
    assert_eq!(stored_head(&core.connection).unwrap(), core.head);
}

#[test]
fn a_full_disk_refuses_the_group_and_harms_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut core = core(dir.path());
    let pages: i64 = core.connection.query_row("PRAGMA page_count", [], |row| row.get(0)).unwrap();
    let limit = |core: &Core, pages: i64| {
        core.connection.query_row(&format!("PRAGMA max_page_count = {pages}"), [], |_| Ok(())).unwrap();
    };
    limit(&core, pages + 20);
    let before = core.head;
    let results = core.commit(vec![append(1, 10), append(1, 1 << 20)]);
    assert!(results.iter().any(|r| matches!(r, Err(LogError::Full))), "{results:?}");
    // What was answered is what is stored, whichever of the two SQLite gave up.
    let stored = u64::try_from(results.iter().filter(|r| r.is_ok()).count()).unwrap();
    assert_eq!(core.head.seq, before.seq + stored);
    assert_eq!(stored_head(&core.connection).unwrap(), core.head);
    limit(&core, i64::from(u32::MAX) - 1);
    let results = core.commit(vec![append(1, 1 << 20)]);
    assert!(results[0].is_ok(), "{results:?}");
}

#[test]
fn a_file_that_may_not_be_written_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let mut core = core(dir.path());
    core.connection.execute_batch("PRAGMA query_only = ON").unwrap();
    let results = core.commit(vec![append(1, 0)]);
    assert!(
        matches!(&results[0], Err(LogError::ReadOnly(why)) if why.contains("not writable")),
        "{results:?}"
    );
}

#[test]
fn a_checkpoint_costs_no_sync_and_the_next_append_has_one() {
    let dir = tempfile::tempdir().unwrap();
    let mut core = core(dir.path());
    let level = |core: &Core| -> i64 {
        core.connection.query_row("PRAGMA synchronous", [], |row| row.get(0)).unwrap()
    };
    let checkpoint = || {
        Work::Keep(Checkpoint {
            stream: StreamId::System,
            version: 1,
            seq: 1,
            hash: String::new(),
            projector: 1,
            state: "{}".to_owned(),
        })
    };
    assert!(core.commit(vec![checkpoint()])[0].is_ok());
    assert_eq!(level(&core), 1);
    assert!(core.commit(vec![checkpoint(), append(1, 0)]).iter().all(Result::is_ok));
    assert_eq!(level(&core), 2);
}
