//! Long histories, written straight into a store, for benchmarks of what reads them.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use snaptree_drivers::sim::Profile;
use snaptree_engine::domain::{Disk, Domain, DriverKind};
use snaptree_engine::driver::Learnt;
use snaptree_engine::event::{
    Actor, DomainRegistered, Event, HowFinished, MemoryKind, OperationPlanned, OperationStepFinished,
    OperationStepStarted, OperationSucceeded, Origin, Place, RequestTerms, SnapshotCreateRequested,
    SnapshotCreated, SnapshotRevertRequested, SnapshotReverted,
};
use snaptree_engine::log::{Append, EventLog, NewEvent};
use snaptree_engine::operation::{Poison, Reversal, Step};
use snaptree_engine::tree::{Snapshot, SnapshotState};
use snaptree_engine::{DiskName, DomainId, DomainName, OperationId, SnapshotId, SnapshotName, StreamId};
use snaptree_store::Store;
use uuid::Uuid;

/// Events of one create or revert.
pub const EVENTS_OF_AN_OPERATION: usize = 6;

/// The history of a domain with `snapshots` snapshots and `reverts` reverts to the last one after them.
///
/// # Panics
/// The name is none.
pub fn history(name: &str, snapshots: usize, reverts: usize) -> Vec<NewEvent> {
    let id = DomainId::from_uuid(Uuid::now_v7());
    let disk = DiskName::new("vda").expect("a disk name");
    let domain = Domain {
        id,
        name: DomainName::new(name).expect("a domain name"),
        driver: DriverKind::Sim,
        disks: vec![Disk::new(disk.clone(), None, 1 << 20)],
        config: serde_json::json!({}),
        labels: BTreeMap::new(),
        capabilities: Profile::Default.capabilities(),
    };
    let mut events = vec![event(id, None, DomainRegistered { domain, claims: Vec::new() })];
    let disks = BTreeSet::from([disk]);
    let ids: Vec<SnapshotId> = (0..snapshots).map(|_| SnapshotId::from_uuid(Uuid::now_v7())).collect();
    for (number, snapshot) in ids.iter().enumerate() {
        events.extend(create(id, *snapshot, number, &disks));
    }
    for _ in 0..reverts {
        if let Some(snapshot) = ids.last() {
            events.extend(revert(id, *snapshot));
        }
    }
    events
}

/// Appends events in large pieces.
///
/// # Panics
/// The store fails.
pub async fn append(store: &Store, events: Vec<NewEvent>) {
    let origin =
        Origin { uid: 0, host: "bench".to_owned(), pid: 1, via: "bench".to_owned(), sudo_user: None };
    let append = Append {
        expect: vec![],
        actor: Actor::User("bench".to_owned()),
        origin,
        at: Timestamp::now(),
        events,
    };
    store.append(append).await.expect("the store appends");
}

fn event(domain: DomainId, operation: Option<OperationId>, event: impl Into<Event>) -> NewEvent {
    NewEvent { stream: StreamId::Domain(domain), event: event.into(), operation, cause: None, key: None }
}

fn operation(domain: DomainId, request: Event, outcome: Event) -> Vec<NewEvent> {
    let operation = Some(OperationId::from_uuid(Uuid::now_v7()));
    let step = Step {
        name: "step".to_owned(),
        reversal: Reversal::Undoable,
        poison: Poison::Nothing,
        data: serde_json::json!({"step": "bench"}),
    };
    let learnt = Learnt { taken: Some(Timestamp::now()), ..Learnt::default() };
    let finished = OperationStepFinished {
        step: 0,
        how: HowFinished::Executed,
        changes: vec![],
        learnt: serde_json::to_value(learnt).expect("JSON"),
    };
    let events: [Event; EVENTS_OF_AN_OPERATION] = [
        request,
        OperationPlanned { steps: vec![step] }.into(),
        OperationStepStarted { step: 0 }.into(),
        finished.into(),
        outcome,
        OperationSucceeded {}.into(),
    ];
    events.into_iter().map(|each| event(domain, operation, each)).collect()
}

fn create(domain: DomainId, id: SnapshotId, number: usize, disks: &BTreeSet<DiskName>) -> Vec<NewEvent> {
    let name = SnapshotName::new(format!("snapshot-{number}")).expect("a name");
    let request = SnapshotCreateRequested {
        snapshot: id,
        name: name.clone(),
        description: None,
        labels: BTreeMap::new(),
        disks: disks.clone(),
        memory: MemoryKind::No,
        place: Place::Usual,
        quiesce: false,
        before_revert: false,
        request: RequestTerms::default(),
    };
    let snapshot = Snapshot {
        id,
        name,
        description: None,
        parent: None,
        created: Timestamp::now(),
        state: SnapshotState::Shutoff,
        memory: MemoryKind::No,
        disks: disks.clone(),
        labels: BTreeMap::new(),
        hold: None,
        made_by: Actor::User("bench".to_owned()),
        made_in: Some(OperationId::from_uuid(Uuid::now_v7())),
        lost: false,
        real_name: None,
        native: None,
        left_out: Vec::new(),
    };
    operation(domain, request.into(), SnapshotCreated { snapshot }.into())
}

fn revert(domain: DomainId, snapshot: SnapshotId) -> Vec<NewEvent> {
    let request =
        SnapshotRevertRequested { snapshot, run_state: None, keep: None, request: RequestTerms::default() };
    operation(domain, request.into(), SnapshotReverted { snapshot }.into())
}
