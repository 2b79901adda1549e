//! What every [`EventLog`] has to keep, whatever lies below it.
//!
//! Each function takes an empty log (one may hold a `System.Opened`, so seqs are compared with the head found first)
//! and panics where the log breaks the port's promises. [`conformance!`](crate::conformance!) makes a test of each.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a suite of assertions")]

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use snaptree_engine::claim::{Claim, ClaimKind};
use snaptree_engine::domain::{Capabilities, Domain, DriverKind};
use snaptree_engine::event::{
    Actor, DeleteScope, DeleteWhat, DomainChanged, DomainRegistered, DomainUnregistered, Event, MemoryKind,
    MergeWish, OperationFailed, OperationNeedsAttention, OperationPlanned, OperationSucceeded, Origin, Place,
    RequestTerms, SnapshotCreateRequested, SnapshotCreated, SnapshotDeleteRequested, SnapshotDeleted,
    SnapshotRevertRequested, SnapshotReverted, UnregisterWish,
};
use snaptree_engine::ids::{DomainId, DomainName, OperationId, SnapshotId, SnapshotName, StreamId};
use snaptree_engine::log::{
    Append, Checkpoint, ClockOrder, EventFilter, EventLog, LogError, NewEvent, OpenOnly, OperationFilter,
};
use snaptree_engine::operation::{Code, Failure, Outcome};
use snaptree_engine::tree::{Snapshot, SnapshotState};
use uuid::Uuid;

/// Makes a `#[tokio::test]` of every function of the suite. `$make` is called per test and gives the log and
/// whatever has to live as long as it.
#[macro_export]
macro_rules! conformance {
    ($make:expr) => {
        $crate::conformance!(@each $make; appends_are_read_back_as_they_were_answered, seq_and_versions_have_no_gaps,
            a_broken_expectation_writes_nothing, a_key_is_used_once_per_stream, an_append_is_all_or_nothing,
            an_append_without_events_is_judged, times_are_cut_to_microseconds, too_many_events_are_refused,
            streams_are_read_in_pieces, filters_let_through_what_they_say, a_checkpoint_must_agree_with_the_log,
            domains_are_listed_now_and_then, operations_are_listed_newest_last,
            operations_keep_the_names_of_their_snapshots, times_stand_for_prefixes,
            concurrent_appends_all_get_in, one_of_two_racing_appends_loses, what_one_has_no_other_takes,
            what_is_taken_at_once_has_one_owner);
    };
    (@each $make:expr; $($name:ident),* $(,)?) => {
        $(#[tokio::test]
        async fn $name() {
            let (log, _alive) = ($make)();
            $crate::conformance::$name(&log).await;
        })*
    };
}

/// A time, `us` microseconds after a fixed moment.
pub fn time(us: i64) -> Timestamp {
    Timestamp::from_microsecond(1_795_000_000_000_000 + us).unwrap()
}

/// A fresh domain's id.
pub fn domain_id() -> DomainId {
    DomainId::from_uuid(Uuid::now_v7())
}

/// A fresh operation's id.
pub fn operation_id() -> OperationId {
    OperationId::from_uuid(Uuid::now_v7())
}

/// A fresh snapshot's id.
pub fn snapshot_id() -> SnapshotId {
    SnapshotId::from_uuid(Uuid::now_v7())
}

/// Some origin.
pub fn origin() -> Origin {
    Origin { uid: 1000, host: "host".into(), pid: 7, via: "cli".into(), sudo_user: None }
}

/// `Domain.Registered`.
pub fn registered(id: DomainId, name: &str) -> Event {
    let capabilities = Capabilities {
        memory: true,
        memory_external: false,
        disk_only: true,
        quiesce: false,
        internal: false,
        disk_selection: false,
        children_only: true,
        metadata_only: true,
        merges_itself: false,
        keeps_names: false,
        name_bytes_max: 255,
        depth_max: 100,
    };
    DomainRegistered {
        domain: Domain {
            id,
            name: DomainName::new(name).unwrap(),
            driver: DriverKind::Sim,
            disks: Vec::new(),
            config: serde_json::Value::Null,
            labels: BTreeMap::new(),
            capabilities,
        },
        claims: Vec::new(),
    }
    .into()
}

/// `Snapshot.CreateRequested`.
pub fn create_requested(snapshot: SnapshotId, name: &str) -> Event {
    SnapshotCreateRequested {
        snapshot,
        name: SnapshotName::new(name).unwrap(),
        description: Some("ein Grund: ü".into()),
        labels: BTreeMap::new(),
        disks: BTreeSet::new(),
        memory: MemoryKind::No,
        place: Place::Usual,
        quiesce: false,
        before_revert: false,
        request: RequestTerms::default(),
    }
    .into()
}

/// `Snapshot.Created`.
pub fn created(snapshot: SnapshotId, name: &str, operation: OperationId) -> Event {
    SnapshotCreated {
        snapshot: Snapshot {
            id: snapshot,
            name: SnapshotName::new(name).unwrap(),
            description: None,
            parent: None,
            created: time(0),
            state: SnapshotState::Shutoff,
            memory: MemoryKind::No,
            disks: BTreeSet::new(),
            labels: BTreeMap::new(),
            hold: None,
            made_by: Actor::Engine,
            made_in: Some(operation),
            lost: false,
            real_name: None,
            native: None,
            left_out: Vec::new(),
        },
    }
    .into()
}

/// `Snapshot.DeleteRequested` of these.
pub fn delete_requested(snapshots: Vec<SnapshotId>) -> Event {
    SnapshotDeleteRequested {
        named: snapshots.clone(),
        snapshots,
        scope: DeleteScope::Named,
        what: DeleteWhat::Snapshot,
        merge: MergeWish::Auto,
        reasons: vec!["too old".into()],
        request: RequestTerms::default(),
    }
    .into()
}

/// `Snapshot.Deleted`.
pub fn deleted(snapshot: SnapshotId, name: &str) -> Event {
    SnapshotDeleted { snapshot, name: SnapshotName::new(name).unwrap(), stays: false }.into()
}

/// Some failure.
pub fn failure() -> Failure {
    Failure::new(Code::Io, "the disk made a noise")
}

/// An event to be appended to a stream, and nothing else about it.
pub fn new(stream: &StreamId, event: impl Into<Event>) -> NewEvent {
    NewEvent { stream: stream.clone(), event: event.into(), operation: None, cause: None, key: None }
}

/// The same, as part of an operation.
pub fn of(operation: OperationId, stream: &StreamId, event: impl Into<Event>) -> NewEvent {
    NewEvent { operation: Some(operation), ..new(stream, event) }
}

/// An append of facts, by a user, at [`time`] 0.
pub fn facts(events: Vec<NewEvent>) -> Append {
    Append { expect: Vec::new(), actor: Actor::User("ann".into()), origin: origin(), at: time(0), events }
}

/// A harmless event for any stream.
pub fn noise() -> Event {
    DomainChanged::default().into()
}

fn stream() -> StreamId {
    StreamId::Domain(domain_id())
}

async fn all(log: &impl EventLog) -> Vec<snaptree_engine::event::Envelope> {
    log.read(0, &EventFilter::default(), usize::MAX).await.unwrap()
}

/// What an append answers is what is stored, field by field.
pub async fn appends_are_read_back_as_they_were_answered(log: &impl EventLog) {
    let (stream, operation, snapshot) = (stream(), operation_id(), snapshot_id());
    let before = log.head().await.unwrap();
    let mut request = of(operation, &stream, create_requested(snapshot, "eins"));
    request.key = Some("the key".into());
    request.cause = Some(1);
    let answered = log.append(facts(vec![request, new(&stream, noise())])).await.unwrap();
    assert_eq!(log.read(before.seq, &EventFilter::default(), 10).await.unwrap(), answered);
    assert_eq!(log.read_stream(&stream, 0, u64::MAX, 10).await.unwrap(), answered);
    let head = log.head().await.unwrap();
    assert_eq!((head.seq, head.hash), (answered[1].seq, answered[1].hash));
    assert_ne!(before.hash, head.hash);
    let first = &answered[0];
    assert_eq!(
        (first.operation, first.cause, first.key.as_deref()),
        (Some(operation), Some(1), Some("the key"))
    );
    assert_eq!((&first.actor, &first.origin), (&Actor::User("ann".into()), &origin()));
    assert_eq!(first.event, create_requested(snapshot, "eins"));
}

/// Also over several streams and appends, refused ones among them.
pub async fn seq_and_versions_have_no_gaps(log: &impl EventLog) {
    let (a, b) = (stream(), stream());
    let start = log.head().await.unwrap().seq;
    for _ in 0..3 {
        log.append(facts(vec![new(&a, noise()), new(&b, noise()), new(&a, noise())])).await.unwrap();
        log.append(Append { expect: vec![(a.clone(), 999)], ..facts(vec![new(&a, noise())]) })
            .await
            .unwrap_err();
    }
    let seqs: Vec<u64> =
        log.read(start, &EventFilter::default(), 100).await.unwrap().iter().map(|e| e.seq).collect();
    assert_eq!(seqs, (start + 1..=start + 9).collect::<Vec<_>>());
    for (stream, count) in [(a, 6), (b, 3)] {
        let events = log.read_stream(&stream, 0, u64::MAX, 100).await.unwrap();
        assert_eq!(events.iter().map(|e| e.version).collect::<Vec<_>>(), (1..=count).collect::<Vec<_>>());
    }
}

/// It names the stream, what was expected and what was found.
pub async fn a_broken_expectation_writes_nothing(log: &impl EventLog) {
    let (a, b) = (stream(), stream());
    log.append(Append { expect: vec![(a.clone(), 0)], ..facts(vec![new(&a, noise())]) }).await.unwrap();
    let before = all(log).await;
    let append = Append {
        expect: vec![(b.clone(), 0), (a.clone(), 0)],
        ..facts(vec![new(&b, noise()), new(&a, noise())])
    };
    match log.append(append).await {
        Err(LogError::Conflict { stream, expected: 0, found: 1 }) => assert_eq!(stream, a),
        other => panic!("{other:?}"),
    }
    assert_eq!(all(log).await, before);
    log.append(Append { expect: vec![(b.clone(), 0), (a.clone(), 1)], ..facts(vec![new(&a, noise())]) })
        .await
        .unwrap();
}

/// Also twice in one append; another stream may use it.
pub async fn a_key_is_used_once_per_stream(log: &impl EventLog) {
    let (a, b) = (stream(), stream());
    let keyed = |stream: &StreamId, key: &str| NewEvent { key: Some(key.into()), ..new(stream, noise()) };
    let first = log.append(facts(vec![keyed(&a, "k")])).await.unwrap();
    log.append(facts(vec![keyed(&b, "k")])).await.unwrap();
    let before = all(log).await;
    for append in [vec![keyed(&a, "k")], vec![keyed(&a, "twice"), keyed(&a, "twice")]] {
        let key = append[0].key.clone().unwrap();
        match log.append(facts(append)).await {
            Err(LogError::KeyUsed { stream, key: used }) => assert_eq!((stream, used), (a.clone(), key)),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(all(log).await, before);
    assert_eq!(log.by_key(&a, "k").await.unwrap().as_ref(), first.first());
    assert_eq!(log.by_key(&a, "twice").await.unwrap(), None);
}

/// Over several streams: the last event's key is used, so none of the others is there.
pub async fn an_append_is_all_or_nothing(log: &impl EventLog) {
    let (a, b) = (stream(), stream());
    let keyed = NewEvent { key: Some("k".into()), ..new(&b, noise()) };
    log.append(facts(vec![keyed.clone()])).await.unwrap();
    let before = all(log).await;
    let StreamId::Domain(id) = a else { unreachable!() };
    log.append(facts(vec![new(&a, registered(id, "half")), new(&b, noise()), keyed])).await.unwrap_err();
    assert_eq!(all(log).await, before);
    assert_eq!(log.domain_by_name(&DomainName::new("half").unwrap()).await.unwrap(), None);
}

/// Nothing to write, but an expectation that may be broken.
pub async fn an_append_without_events_is_judged(log: &impl EventLog) {
    let a = stream();
    assert_eq!(log.append(Append { expect: vec![(a.clone(), 0)], ..facts(vec![]) }).await.unwrap(), vec![]);
    assert!(log.append(Append { expect: vec![(a, 1)], ..facts(vec![]) }).await.is_err());
}

/// In the answer as in what is stored.
pub async fn times_are_cut_to_microseconds(log: &impl EventLog) {
    let a = stream();
    let at = Timestamp::from_nanosecond(1_795_000_000_123_456_789).unwrap();
    let cut = Timestamp::from_nanosecond(1_795_000_000_123_456_000).unwrap();
    let answered = log.append(Append { at, ..facts(vec![new(&a, noise())]) }).await.unwrap();
    assert_eq!(answered[0].at, cut);
    assert_eq!(log.read_stream(&a, 0, u64::MAX, 1).await.unwrap()[0].at, cut);
}

/// More than `APPEND_EVENTS_MAX`.
pub async fn too_many_events_are_refused(log: &impl EventLog) {
    let before = log.head().await.unwrap();
    let event = new(&stream(), noise());
    let events = vec![event; snaptree_engine::log::APPEND_EVENTS_MAX + 1];
    assert!(log.append(facts(events)).await.is_err());
    assert_eq!(log.head().await.unwrap(), before);
}

/// By version, by count, and not beyond a seq.
pub async fn streams_are_read_in_pieces(log: &impl EventLog) {
    let (a, b) = (stream(), stream());
    for _ in 0..10 {
        log.append(facts(vec![new(&a, noise()), new(&b, noise())])).await.unwrap();
    }
    let whole = log.read_stream(&a, 0, u64::MAX, 100).await.unwrap();
    assert_eq!(whole.len(), 10);
    assert_eq!(log.read_stream(&a, 3, u64::MAX, 4).await.unwrap(), whole[3..7]);
    assert_eq!(log.read_stream(&a, 10, u64::MAX, 4).await.unwrap(), vec![]);
    assert_eq!(log.read_stream(&a, 0, u64::MAX, 0).await.unwrap(), vec![]);
    for (index, event) in whole.iter().enumerate() {
        assert_eq!(log.read_stream(&a, 0, event.seq, 100).await.unwrap(), whole[..=index]);
        // The other stream's event stands between.
        assert_eq!(log.read_stream(&a, 0, event.seq + 1, 100).await.unwrap(), whole[..=index]);
    }
    assert_eq!(log.read_stream(&a, 0, 0, 100).await.unwrap(), vec![]);
    assert_eq!(log.read_stream(&stream(), 0, u64::MAX, 100).await.unwrap(), vec![]);
}

/// Each alone and some together, against the plain list.
pub async fn filters_let_through_what_they_say(log: &impl EventLog) {
    let (a, b, operation) = (stream(), stream(), operation_id());
    for index in 0..12_i64 {
        let (stream, actor) = if index % 3 == 0 { (&a, "ann") } else { (&b, "bob") };
        let event = if index % 2 == 0 { create_requested(snapshot_id(), "s") } else { noise() };
        let new = if index % 4 == 0 { of(operation, stream, event) } else { new(stream, event) };
        let append = Append { actor: Actor::User(actor.into()), at: time(index), ..facts(vec![new]) };
        log.append(append).await.unwrap();
    }
    let everything = all(log).await;
    let some = EventFilter::default;
    let filters = [
        some(),
        EventFilter { stream: Some(a.clone()), ..some() },
        EventFilter { operation: Some(operation), ..some() },
        EventFilter { actor: Some("user:bob".into()), ..some() },
        EventFilter { actor: Some("bob".into()), ..some() },
        EventFilter { kind: Some("Snapshot.".into()), ..some() },
        EventFilter { kind: Some("Snapshot.CreateRequested".into()), ..some() },
        EventFilter { kind: Some("Snapshot.Create".into()), ..some() },
        EventFilter { since: Some(time(5)), ..some() },
        EventFilter {
            since: Some(time(5).checked_add(jiff::SignedDuration::from_nanos(1)).unwrap()),
            ..some()
        },
        EventFilter { until: Some(time(5)), ..some() },
        EventFilter { since: Some(time(99_000_000_000)), ..some() },
        EventFilter { since: Some(time(3)), until: Some(time(9)), stream: Some(b), ..some() },
        EventFilter {
            kind: Some("Snapshot.".into()),
            actor: Some("user:ann".into()),
            stream: Some(a),
            ..some()
        },
    ];
    for filter in filters {
        for after in [0, everything[4].seq] {
            let expected: Vec<_> = everything
                .iter()
                .filter(|e| e.seq > after)
                .filter(|e| filter.stream.as_ref().is_none_or(|s| *s == e.stream))
                .filter(|e| filter.operation.is_none_or(|o| Some(o) == e.operation))
                .filter(|e| filter.actor.as_ref().is_none_or(|a| *a == e.actor.to_string()))
                .filter(|e| {
                    filter.kind.as_ref().is_none_or(|k| {
                        e.event.kind() == k || (k.ends_with('.') && e.event.kind().starts_with(k))
                    })
                })
                .filter(|e| filter.since.is_none_or(|since| e.at >= since))
                .filter(|e| filter.until.is_none_or(|until| e.at <= until))
                .cloned()
                .collect();
            assert_eq!(log.read(after, &filter, 100).await.unwrap(), expected, "{filter:?} after {after}");
            let two = expected.len().min(2);
            assert_eq!(log.read(after, &filter, 2).await.unwrap(), expected[..two], "{filter:?}");
        }
    }
}

/// Another projector's, a later one's, and one of another history are no checkpoints.
pub async fn a_checkpoint_must_agree_with_the_log(log: &impl EventLog) {
    let a = stream();
    let mut events = Vec::new();
    for _ in 0..3 {
        events.extend(log.append(facts(vec![new(&a, noise())])).await.unwrap());
    }
    let at = |index: usize| Checkpoint {
        stream: a.clone(),
        version: events[index].version,
        seq: events[index].seq,
        hash: events[index].hash.to_string(),
        projector: 7,
        state: "{\"x\":\"ü\"}".into(),
    };
    assert_eq!(log.checkpoint(&a, 7, u64::MAX).await.unwrap(), None);
    log.save_checkpoint(at(0)).await.unwrap();
    log.save_checkpoint(at(1)).await.unwrap();
    assert_eq!(log.checkpoint(&a, 7, u64::MAX).await.unwrap(), Some(at(1)));
    assert_eq!(log.checkpoint(&a, 7, events[1].seq).await.unwrap(), Some(at(1)));
    assert_eq!(log.checkpoint(&a, 7, events[1].seq - 1).await.unwrap(), None);
    assert_eq!(log.checkpoint(&a, 8, u64::MAX).await.unwrap(), None);
    assert_eq!(log.checkpoint(&stream(), 7, u64::MAX).await.unwrap(), None);
    for wrong in [
        Checkpoint { hash: at(2).hash, ..at(1) },
        Checkpoint { seq: at(2).seq, ..at(1) },
        Checkpoint { version: 3, ..at(1) },
        Checkpoint { version: 99, seq: 99, ..at(1) },
        Checkpoint { hash: String::new(), ..at(1) },
    ] {
        log.save_checkpoint(wrong.clone()).await.unwrap();
        assert_eq!(log.checkpoint(&a, 7, u64::MAX).await.unwrap(), None, "{wrong:?}");
    }
    log.save_checkpoint(at(2)).await.unwrap();
    assert_eq!(log.checkpoint(&a, 7, u64::MAX).await.unwrap(), Some(at(2)));
}

/// Registered, renamed, unregistered; the past stays as it was.
pub async fn domains_are_listed_now_and_then(log: &impl EventLog) {
    let (one, two) = (domain_id(), domain_id());
    let rename = DomainChanged { name: Some(DomainName::new("c").unwrap()), ..DomainChanged::default() };
    let gone = DomainUnregistered { wish: UnregisterWish::Untouched, left: vec![] };
    let start = log.head().await.unwrap().seq;
    for (id, event) in [
        (one, registered(one, "b")),
        (two, registered(two, "a")),
        (two, noise()),
        (two, rename.into()),
        (one, gone.into()),
        (two, noise()),
    ] {
        log.append(facts(vec![new(&StreamId::Domain(id), event)])).await.unwrap();
    }
    let head = log.head().await.unwrap().seq;
    let expected: [&[&str]; 7] = [&[], &["b"], &["a", "b"], &["a", "b"], &["b", "c"], &["c"], &["c"]];
    for (past, names) in expected.iter().enumerate() {
        let seq = start + u64::try_from(past).unwrap();
        let rows = log.domains(seq).await.unwrap();
        assert_eq!(rows.iter().map(|row| row.name.as_str()).collect::<Vec<_>>(), *names, "at {past}");
    }
    assert_eq!(log.domains(u64::MAX).await.unwrap(), log.domains(head).await.unwrap());
    let name = |name: &str| DomainName::new(name).unwrap();
    assert_eq!(log.domain_by_name(&name("c")).await.unwrap().map(|row| row.id), Some(two));
    assert_eq!(log.domain_by_name(&name("a")).await.unwrap(), None);
    assert_eq!(log.domain_by_name(&name("b")).await.unwrap(), None);
}

/// Outcomes, attention, and each filter.
pub async fn operations_are_listed_newest_last(log: &impl EventLog) {
    let (one, two) = (domain_id(), domain_id());
    let (a, b) = (StreamId::Domain(one), StreamId::Domain(two));
    log.append(facts(vec![new(&a, registered(one, "a")), new(&b, registered(two, "b"))])).await.unwrap();
    let ids: Vec<OperationId> = (0..4).map(|_| operation_id()).collect();
    for (index, id) in ids.iter().enumerate() {
        let stream = if index == 3 { &b } else { &a };
        let request = of(*id, stream, create_requested(snapshot_id(), &format!("s{index}")));
        let at = time(i64::try_from(index).unwrap());
        log.append(Append { at, ..facts(vec![request]) }).await.unwrap();
    }
    log.append(facts(vec![of(ids[0], &a, OperationPlanned { steps: vec![] })])).await.unwrap();
    let done = facts(vec![of(ids[0], &a, OperationSucceeded {})]);
    log.append(Append { at: time(77), ..done }).await.unwrap();
    log.append(facts(vec![of(ids[1], &a, OperationFailed { failure: failure() })])).await.unwrap();
    log.append(facts(vec![of(ids[2], &a, OperationNeedsAttention { failure: failure() })])).await.unwrap();

    let list = async |filter: OperationFilter, count| {
        let rows = log.operations(&filter, count).await.unwrap();
        rows.iter().map(|row| row.id).collect::<Vec<_>>()
    };
    let every = OperationFilter::default();
    assert_eq!(list(every, 100).await, ids);
    assert_eq!(list(every, 2).await, ids[2..]);
    assert_eq!(list(OperationFilter { domain: Some(one), ..every }, 100).await, ids[..3]);
    assert_eq!(list(OperationFilter { open: Some(OpenOnly), ..every }, 100).await, ids[2..]);
    assert_eq!(list(OperationFilter { operation: Some(ids[1]), ..every }, 100).await, ids[1..2]);
    assert_eq!(
        list(
            OperationFilter { domain: Some(two), open: Some(OpenOnly), operation: Some(ids[0]), after: None },
            100
        )
        .await,
        vec![]
    );
    let rows = log.operations(&every, 100).await.unwrap();
    assert_eq!(
        rows.iter().map(|row| (row.outcome, row.needs_attention)).collect::<Vec<_>>(),
        [(Some(Outcome::Succeeded), false), (Some(Outcome::Failed), false), (None, true), (None, false)]
    );
    assert_eq!((rows[0].requested, rows[0].finished), (time(0), Some(time(77))));
    assert_eq!((rows[3].requested, rows[3].finished), (time(3), None));
    assert_eq!((rows[3].domain, rows[3].domain_name.as_str(), rows[3].kind.as_str()), (two, "b", "create"));
}

/// Also after the snapshot was deleted, and while its create is still open.
pub async fn operations_keep_the_names_of_their_snapshots(log: &impl EventLog) {
    let (id, first, second) = (domain_id(), snapshot_id(), snapshot_id());
    let stream = StreamId::Domain(id);
    let ids: Vec<OperationId> = (0..5).map(|_| operation_id()).collect();
    let revert = |snapshot| SnapshotRevertRequested {
        snapshot,
        run_state: None,
        keep: None,
        request: RequestTerms::default(),
    };
    log.append(facts(vec![
        new(&stream, registered(id, "d")),
        of(ids[0], &stream, create_requested(first, "first")),
        of(ids[0], &stream, created(first, "first", ids[0])),
        of(ids[1], &stream, create_requested(second, "second")),
        of(ids[2], &stream, revert(second)),
        of(ids[3], &stream, revert(first)),
        of(ids[3], &stream, SnapshotReverted { snapshot: first }),
        of(ids[4], &stream, delete_requested(vec![first, second])),
        of(ids[4], &stream, deleted(first, "first")),
    ]))
    .await
    .unwrap();
    let rows = log.operations(&OperationFilter::default(), 100).await.unwrap();
    assert_eq!(
        rows.iter().map(|row| (row.kind.as_str(), row.snapshot.as_deref().unwrap())).collect::<Vec<_>>(),
        [
            ("create", "first"),
            ("create", "second"),
            ("revert", "second"),
            ("revert", "first"),
            ("delete", "first")
        ]
    );
}

/// A clock that goes back is noticed exactly where it matters.
pub async fn times_stand_for_prefixes(log: &impl EventLog) {
    let a = stream();
    let start = log.head().await.unwrap().seq;
    // The log may begin with an event of now; these are all later than it.
    let later = |us: i64| {
        Timestamp::now().max(time(0)).checked_add(jiff::SignedDuration::from_hours(9)).unwrap()
            + jiff::SignedDuration::from_micros(us)
    };
    let base = later(0);
    let at = |us: i64| base + jiff::SignedDuration::from_micros(us);
    for us in [10, 20, 20, 30, 25, 40] {
        log.append(Append { at: at(us), ..facts(vec![new(&a, noise())]) }).await.unwrap();
    }
    for (us, seq, clock) in [
        (5, 0, ClockOrder::Monotone),
        (10, 1, ClockOrder::Monotone),
        (19, 1, ClockOrder::Monotone),
        (20, 3, ClockOrder::Monotone),
        (25, 5, ClockOrder::WentBack),
        (29, 5, ClockOrder::WentBack),
        (30, 5, ClockOrder::Monotone),
        (40, 6, ClockOrder::Monotone),
        (99, 6, ClockOrder::Monotone),
    ] {
        let found = log.seq_at(at(us)).await.unwrap();
        assert_eq!((found.seq, found.clock), (start + seq, clock), "at {us}");
    }
}

/// Each is stored once.
pub async fn concurrent_appends_all_get_in(log: &impl EventLog) {
    let streams: Vec<StreamId> = (0..8).map(|_| stream()).collect();
    let appends = streams.iter().cycle().take(64).map(|stream| log.append(facts(vec![new(stream, noise())])));
    let mut seqs = Vec::new();
    for result in join(appends).await {
        seqs.push(result.unwrap()[0].seq);
    }
    seqs.sort_unstable();
    seqs.dedup();
    assert_eq!(seqs.len(), 64);
    for stream in streams {
        assert_eq!(log.read_stream(&stream, 0, u64::MAX, 100).await.unwrap().len(), 8);
    }
}

/// Both expect the same version.
pub async fn one_of_two_racing_appends_loses(log: &impl EventLog) {
    let a = stream();
    let appends =
        (0..8).map(|_| log.append(Append { expect: vec![(a.clone(), 0)], ..facts(vec![new(&a, noise())]) }));
    let results = join(appends).await;
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
    assert!(results.iter().filter_map(|r| r.as_ref().err()).all(|e| matches!(e, LogError::Conflict { .. })));
    assert_eq!(log.read_stream(&a, 0, u64::MAX, 100).await.unwrap().len(), 1);
}

/// A name and whatever else an event claims, until it is given back; nothing of a refused append is kept.
pub async fn what_one_has_no_other_takes(log: &impl EventLog) {
    let (a, b) = (domain_id(), domain_id());
    let (of_a, of_b) = (StreamId::Domain(a), StreamId::Domain(b));
    let having = |image: &str| {
        let claims = Some(vec![Claim::new(ClaimKind::Image, image)]);
        DomainChanged { claims, ..DomainChanged::default() }
    };
    let named =
        |name: &str| DomainChanged { name: Some(DomainName::new(name).unwrap()), ..DomainChanged::default() };
    log.append(facts(vec![new(&of_a, registered(a, "a")), new(&of_a, having("/a"))])).await.unwrap();
    log.append(facts(vec![new(&of_b, registered(b, "b"))])).await.unwrap();
    let before = all(log).await;
    for events in [
        vec![new(&of_b, named("a"))],
        vec![new(&of_b, having("/a"))],
        // What the first of them takes is not taken.
        vec![new(&of_b, named("free")), new(&of_b, having("/a"))],
    ] {
        match log.append(facts(events)).await {
            Err(LogError::Claimed { owner, .. }) => assert_eq!(owner, a),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(all(log).await, before);
    log.append(facts(vec![new(&of_a, named("free"))])).await.unwrap();
    log.append(facts(vec![new(&of_b, named("a"))])).await.unwrap();
    let gone = DomainUnregistered { wish: UnregisterWish::KeepLayers, left: Vec::new() };
    log.append(facts(vec![new(&of_a, gone), new(&of_b, having("/a"))])).await.unwrap();
}

/// Also where several appends are carried out together.
pub async fn what_is_taken_at_once_has_one_owner(log: &impl EventLog) {
    let ids: Vec<DomainId> = (0..16).map(|_| domain_id()).collect();
    let register = |id: &DomainId, index: usize| {
        let name = if index.is_multiple_of(2) { "same".to_owned() } else { format!("own-{index}") };
        log.append(facts(vec![new(&StreamId::Domain(*id), registered(*id, &name))]))
    };
    let results = join(ids.iter().enumerate().map(|(index, id)| register(id, index))).await;
    let refused = results.iter().filter(|r| matches!(r, Err(LogError::Claimed { .. }))).count();
    assert_eq!((refused, results.iter().filter(|r| r.is_ok()).count()), (7, 9), "{results:?}");
    assert_eq!(log.domains(u64::MAX).await.unwrap().len(), 9);
}

/// Polls all of them together, and gives their results in order.
pub async fn join<F: Future>(futures: impl Iterator<Item = F>) -> Vec<F::Output> {
    let mut waiting: Vec<_> = futures.map(Box::pin).map(Some).collect();
    let mut results: Vec<Option<F::Output>> = waiting.iter().map(|_| None).collect();
    std::future::poll_fn(|context| {
        for (slot, result) in waiting.iter_mut().zip(&mut results) {
            if let Some(future) = slot
                && let std::task::Poll::Ready(output) = future.as_mut().poll(context)
            {
                *result = Some(output);
                *slot = None;
            }
        }
        if waiting.iter().all(Option::is_none) {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
    results.into_iter().flatten().collect()
}
