//! An append-only file, and a chain that anybody can check.

use std::path::Path;
use std::process::Command;

use rusqlite::Connection;
use sha2::{Digest, Sha256};
use snaptree_engine::ids::StreamId;
use snaptree_engine::log::{EventFilter, EventLog, LogError};
use snaptree_store::{DATABASE_FILE, Store, Verification};
use snaptree_tests::conformance::{facts, new, noise};

use super::{everything, fill, open, raw, tamper};

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
