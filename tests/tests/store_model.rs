//! The read model against the engine's projection, over random histories.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed step of a test fails the test")]

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use proptest::prelude::*;
use rusqlite::Connection;
use snaptree_engine::event::{
    Actor, DomainChanged, DomainUnregistered, Event, OperationFailed, OperationNeedsAttention,
    OperationPlanned, OperationRetried, OperationSucceeded, RequestTerms, SnapshotEdited, SnapshotHeld,
    SnapshotReleased, SnapshotRevertRequested, SnapshotReverted, UnregisterWish,
};
use snaptree_engine::ids::{DomainId, DomainName, OperationId, SnapshotId, SnapshotName, StreamId};
use snaptree_engine::log::{Append, EventFilter, EventLog, NewEvent, OpenOnly, OperationFilter};
use snaptree_engine::operation::{Outcome, Phase};
use snaptree_engine::project::DomainState;
use snaptree_engine::tree::Hold;
use snaptree_store::{DATABASE_FILE, LockWait, Store};
use snaptree_tests::conformance::{
    create_requested, created, delete_requested, deleted, facts, failure, new, of, registered, time,
};
use uuid::Uuid;

/// One random step: what, on which of two domains, and to which of a few snapshots or operations.
type Step = (u8, u8, u8);

/// A snapshot that was made by the step `index`; ids never come twice.
fn made_by(index: usize) -> SnapshotId {
    SnapshotId::from_uuid(Uuid::from_u64_pair(55, u64::try_from(index).unwrap()))
}

fn domain(which: u8) -> DomainId {
    DomainId::from_uuid(Uuid::from_u64_pair(77, u64::from(which)))
}

/// The events of one step. Operations follow the rules of their machine; what is said of snapshots need not make
/// sense, for the projection is total.
fn events(index: usize, step: Step, open: &mut Vec<(u8, OperationId)>) -> Vec<NewEvent> {
    let (what, on, which) = (step.0 % 16, step.1 % 2, step.2);
    let stream = StreamId::Domain(domain(on));
    // One of the last few: of this domain or the other, alive or not, or not even a snapshot.
    let earlier = |back: u8| made_by(index.saturating_sub(usize::from(back % 8) + 1));
    let (id, fresh) = (earlier(which), made_by(index));
    let operation = OperationId::from_uuid(Uuid::from_u64_pair(99, u64::try_from(index).unwrap()));
    let name = format!("s{which}-{index}");
    let plain = |event: Event| vec![new(&stream, event)];
    let whole = |request: Event, fact: Event| {
        let planned = OperationPlanned { steps: vec![] };
        let done = OperationSucceeded {};
        [request, planned.into(), fact, done.into()].map(|event| of(operation, &stream, event)).to_vec()
    };
    match what {
        0..=2 => whole(create_requested(fresh, &name), created(fresh, &name, operation)),
        3 => {
            let request = SnapshotRevertRequested {
                snapshot: id,
                run_state: None,
                keep: None,
                request: RequestTerms::default(),
            };
            whole(request.into(), SnapshotReverted { snapshot: id }.into())
        }
        4..=6 => whole(delete_requested(vec![id, earlier(which.wrapping_add(1))]), deleted(id, "was")),
        7 => plain(
            SnapshotEdited {
                snapshot: id,
                name: (which % 2 == 0).then(|| SnapshotName::new(&name).unwrap()),
                real_name: None,
                description: (which % 3 == 0)
                    .then(|| if which % 2 == 0 { String::new() } else { name.clone() }),
                labels: (which % 5 == 0).then(|| [("k".parse().unwrap(), name.clone())].into()),
            }
            .into(),
        ),
        8 => {
            let hold = Hold { reason: name, until: (which % 2 == 0).then(|| time(5)), by: Actor::Engine };
            plain(SnapshotHeld { snapshot: id, hold }.into())
        }
        9 => plain(SnapshotReleased { snapshot: id }.into()),
        10 => plain(registered(domain(on), &format!("d{which}-{on}"))),
        11 => {
            let name = DomainName::new(format!("r{which}-{on}")).unwrap();
            plain(DomainChanged { name: Some(name), ..DomainChanged::default() }.into())
        }
        12 => plain(DomainUnregistered { wish: UnregisterWish::Untouched, left: vec![] }.into()),
        13 => {
            open.push((on, operation));
            vec![of(operation, &stream, create_requested(fresh, &name))]
        }
        _ => advance(what, which, open),
    }
}

/// An open operation ends, or needs attention and goes on.
fn advance(what: u8, which: u8, open: &mut Vec<(u8, OperationId)>) -> Vec<NewEvent> {
    if open.is_empty() {
        return Vec::new();
    }
    let position = usize::from(which) % open.len();
    let (on, operation) = open[position];
    let stream = StreamId::Domain(domain(on));
    let attention: Event = OperationNeedsAttention { failure: failure() }.into();
    let (events, ends): (Vec<Event>, bool) = match (what, which % 3) {
        (14, _) => (vec![OperationFailed { failure: failure() }.into()], true),
        (_, 0) => (vec![attention, OperationRetried {}.into()], false),
        // Nothing may follow it here, so it is no longer ours to advance.
        (_, _) => (vec![attention], true),
    };
    if ends {
        open.remove(position);
    }
    events.into_iter().map(|event| of(operation, &stream, event)).collect()
}

/// A table as text, row by row.
fn dump(connection: &Connection, sql: &str) -> Vec<Vec<String>> {
    let mut statement = connection.prepare(sql).unwrap();
    let columns = statement.column_count();
    let rows = statement
        .query_map([], |row| (0..columns).map(|c| row.get_ref(c).map(|v| format!("{v:?}"))).collect())
        .unwrap();
    rows.map(Result::unwrap).collect()
}

fn tables(dir: &Path) -> Vec<Vec<Vec<String>>> {
    let connection = Connection::open(dir.join(DATABASE_FILE)).unwrap();
    ["domains", "snapshots", "operations", "read_model"]
        .map(|table| dump(&connection, &format!("SELECT * FROM {table} ORDER BY 1")))
        .to_vec()
}

/// The living snapshots of a domain, as the tables tell it.
type Rows =
    BTreeMap<String, (String, Option<String>, Option<String>, bool, String, Option<String>, Option<String>)>;

fn living(connection: &Connection, id: DomainId) -> Rows {
    let mut statement = connection
        .prepare(
            "SELECT id, name, description, parent, current, labels, held, held_until FROM snapshots
             WHERE domain = ?1 AND deleted_at IS NULL",
        )
        .unwrap();
    let rows = statement
        .query_map([id.to_string()], |r| {
            Ok((r.get(0)?, (r.get(1)?, r.get(2)?, r.get(3)?, r.get(4)?, r.get(5)?, r.get(6)?, r.get(7)?)))
        })
        .unwrap();
    rows.map(Result::unwrap).collect()
}

/// The same, as the projection tells it.
fn projected(state: &DomainState) -> Rows {
    let current = state.tree.current().map(|snapshot| snapshot.id);
    state
        .tree
        .iter()
        .map(|s| {
            let row = (
                s.name.to_string(),
                s.description.clone(),
                s.parent.map(|id| id.to_string()),
                current == Some(s.id),
                serde_json::to_string(&s.labels).unwrap(),
                s.hold.as_ref().map(|hold| hold.reason.clone()),
                s.hold.as_ref().and_then(|hold| hold.until).map(|until| format!("{until:.6}")),
            );
            (s.id.to_string(), row)
        })
        .collect()
}

async fn compare(store: &Store, dir: &Path) {
    let connection = Connection::open(dir.join(DATABASE_FILE)).unwrap();
    let mut names = Vec::new();
    let mut open = BTreeMap::new();
    for which in 0..2 {
        let id = domain(which);
        let mut state = DomainState::default();
        let stream = StreamId::Domain(id);
        state.apply_all(&store.read_stream(&stream, 0, u64::MAX, usize::MAX).await.unwrap());
        assert_eq!(state.illegal, None, "the generator broke the rules");
        assert_eq!(living(&connection, id), projected(&state));
        if let Some(domain) = state.domain.filter(|_| state.registered) {
            names.push((domain.name.clone(), domain.id));
            let current: Option<String> = connection
                .query_row("SELECT current FROM domains WHERE id = ?1", [id.to_string()], |row| row.get(0))
                .unwrap();
            assert_eq!(current, state.tree.current().map(|snapshot| snapshot.id.to_string()));
        }
        for operation in &state.open {
            let attention = matches!(operation.phase, Phase::NeedsAttention { .. });
            open.insert(operation.seq, (operation.id, operation.requested, attention));
        }
    }
    names.sort();
    let head = store.head().await.unwrap().seq;
    for seq in [head, u64::MAX] {
        let rows = store.domains(seq).await.unwrap();
        assert_eq!(rows.into_iter().map(|row| (row.name, row.id)).collect::<Vec<_>>(), names);
    }
    let filter = OperationFilter { open: Some(OpenOnly), ..OperationFilter::default() };
    let rows = store.operations(&filter, usize::MAX).await.unwrap();
    assert_eq!(
        rows.into_iter().map(|row| (row.id, row.requested, row.needs_attention)).collect::<Vec<_>>(),
        open.into_values().collect::<Vec<_>>()
    );
    let ended = store.operations(&OperationFilter::default(), usize::MAX).await.unwrap();
    let ends = EventFilter { kind: Some("Operation.".into()), ..EventFilter::default() };
    for envelope in store.read(0, &ends, 10_000).await.unwrap() {
        let outcome = match envelope.event {
            Event::OperationSucceeded(_) => Outcome::Succeeded,
            Event::OperationFailed(_) => Outcome::Failed,
            _ => continue,
        };
        let row = ended.iter().find(|row| Some(row.id) == envelope.operation).unwrap();
        assert_eq!((row.outcome, row.finished), (Some(outcome), Some(envelope.at)));
    }
}

async fn check(steps: Vec<Step>) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open_writer(dir.path(), LockWait { timeout: Duration::ZERO }).unwrap();
    let mut open = Vec::new();
    for (index, step) in steps.into_iter().enumerate() {
        let at = time(i64::try_from(index).unwrap());
        store.append(Append { at, ..facts(events(index, step, &mut open)) }).await.unwrap();
    }
    compare(&store, dir.path()).await;
    // Made again at once, it is what it became event by event.
    let grown = tables(dir.path());
    store.rebuild_read_model().await.unwrap();
    assert_eq!(tables(dir.path()), grown);
    // And a reader that finds nothing makes the same answers.
    let every = OperationFilter::default();
    let answers = (store.domains(u64::MAX).await.unwrap(), store.operations(&every, 1000).await.unwrap());
    Connection::open(dir.path().join(DATABASE_FILE)).unwrap().execute_batch("DROP TABLE operations").unwrap();
    let reader = Store::open_reader(dir.path()).unwrap();
    assert_eq!(
        (reader.domains(u64::MAX).await.unwrap(), reader.operations(&every, 1000).await.unwrap()),
        answers
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_read_model_is_what_the_projection_is(
        steps in proptest::collection::vec((any::<u8>(), any::<u8>(), any::<u8>()), 1..60)
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(check(steps));
    }
}
