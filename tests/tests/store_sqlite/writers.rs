//! One process that writes, and the others.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};
use snaptree_engine::ids::StreamId;
use snaptree_engine::log::{EventLog, LogError, NewEvent};
use snaptree_store::{DATABASE_FILE, LockWait, Store, StoreError, Verification};
use snaptree_tests::conformance::{domain_id, facts, join, new, noise};

use super::{NO_WAIT, answers, everything, fill, open, raw};

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
    command.args(["--exact", "writers::child", "--nocapture"]).env(ROLE, format!("{role}:{}", dir.display()));
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
    // Who reads what was keeps what is new in the write-ahead log; a connection that cannot write leaves it there.
    let reader =
        Connection::open_with_flags(dir.path().join(DATABASE_FILE), OpenFlags::SQLITE_OPEN_READ_ONLY);
    let reader = reader.unwrap();
    reader.execute_batch("BEGIN; SELECT count(*) FROM events").unwrap();
    fill(&store).await;
    let length = answers(&store, &StreamId::System).await.len();
    drop(store);
    drop(reader);
    open_up(dir.path(), 0o755);
    let files = || ["", "-wal", "-shm"].map(|end| dir.path().join(format!("{DATABASE_FILE}{end}")));
    let ask = || {
        files().iter().filter(|file| file.exists()).for_each(|file| open_up(file, 0o644));
        let mut command = Command::new(&copy);
        command
            .args(["--exact", "writers::child", "--nocapture"])
            .env(ROLE, format!("read:{}", dir.path().display()));
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
