//! Histories for the engine's tests: a stream that numbers its events by itself.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use serde_json::json;
use snaptree_engine::domain::{Capabilities, Disk, Domain, DriverKind};
use snaptree_engine::event::*;
use snaptree_engine::layer::LayerChange;
use snaptree_engine::operation::{Poison, Reversal, Step};
use snaptree_engine::project::DomainState;
use snaptree_engine::tree::{Snapshot, SnapshotState};
use snaptree_engine::{
    DiskName, DomainId, DomainName, EventId, OperationId, SnapshotId, SnapshotName, StreamId,
};
use uuid::Uuid;

/// The n-th id of a test.
pub fn uuid(n: u128) -> Uuid {
    Uuid::from_u128(0x0190_0000_0000_7000_8000_0000_0000_0000 + n)
}

pub fn snapshot_id(n: u128) -> SnapshotId {
    SnapshotId::from_uuid(uuid(n))
}

pub fn disk(name: &str) -> DiskName {
    DiskName::new(name).unwrap()
}

pub fn name(text: &str) -> SnapshotName {
    SnapshotName::new(text).unwrap()
}

pub fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_795_400_000 + second).unwrap()
}

pub fn capabilities() -> Capabilities {
    Capabilities {
        memory: false,
        memory_external: false,
        disk_only: true,
        quiesce: false,
        internal: false,
        disk_selection: true,
        children_only: true,
        metadata_only: true,
        merges_itself: false,
        keeps_names: false,
        name_bytes_max: 255,
        depth_max: 200,
    }
}

/// One domain's history.
pub struct History {
    pub state: DomainState,
    pub envelopes: Vec<Envelope>,
    next_operation: u128,
}

impl History {
    /// A domain `web` with these disks.
    pub fn new(disks: &[&str]) -> Self {
        let mut history =
            Self { state: DomainState::default(), envelopes: Vec::new(), next_operation: 1_000 };
        let domain = Domain {
            id: DomainId::from_uuid(uuid(1)),
            name: DomainName::new("web").unwrap(),
            driver: DriverKind::Qemu,
            disks: disks.iter().map(|disk| Disk::new(self::disk(disk), None, 1 << 20)).collect(),
            config: serde_json::Value::Null,
            labels: BTreeMap::new(),
            capabilities: capabilities(),
        };
        history.push(None, DomainRegistered { domain, claims: Vec::new() });
        history
    }

    pub fn push(&mut self, operation: Option<OperationId>, event: impl Into<Event>) -> &Envelope {
        let seq = self.envelopes.len() as u64 + 1;
        let envelope = Envelope {
            seq,
            id: EventId::from_uuid(uuid(1 << 64 | u128::from(seq))),
            stream: StreamId::Domain(DomainId::from_uuid(uuid(1))),
            version: seq,
            at: at(i64::try_from(seq).unwrap()),
            actor: Actor::User("ada".to_owned()),
            origin: Origin { uid: 0, host: "h".to_owned(), pid: 1, via: "cli".to_owned(), sudo_user: None },
            epoch: 1,
            operation,
            cause: None,
            key: None,
            event: event.into(),
            hash: Hash([0; 32]),
        };
        self.state.apply(&envelope);
        self.envelopes.push(envelope);
        self.envelopes.last().unwrap()
    }

    pub fn fresh_operation(&mut self) -> OperationId {
        self.next_operation += 1;
        OperationId::from_uuid(uuid(self.next_operation))
    }

    /// An operation with one step that brings `changes`, and the events of its outcome.
    pub fn operation(&mut self, request: impl Into<Event>, changes: Vec<LayerChange>, outcome: Vec<Event>) {
        let operation = Some(self.fresh_operation());
        self.push(operation, request);
        let step = Step {
            name: "switch".to_owned(),
            reversal: Reversal::PointOfNoReturn,
            poison: Poison::Nothing,
            data: json!({}),
        };
        self.push(operation, OperationPlanned { steps: vec![step] });
        self.push(operation, OperationStepStarted { step: 0 });
        let learnt = serde_json::Value::Null;
        self.push(operation, OperationStepFinished { step: 0, how: HowFinished::Executed, changes, learnt });
        for event in outcome {
            self.push(operation, event);
        }
        self.push(operation, OperationSucceeded {});
    }

    pub fn create_requested(&self, id: SnapshotId, called: &str) -> SnapshotCreateRequested {
        SnapshotCreateRequested {
            snapshot: id,
            name: name(called),
            description: None,
            labels: BTreeMap::new(),
            disks: self.disks(),
            memory: MemoryKind::No,
            place: Place::Usual,
            quiesce: false,
            before_revert: false,
            request: RequestTerms::default(),
        }
    }

    pub fn disks(&self) -> BTreeSet<DiskName> {
        self.state.domain.as_ref().unwrap().disks.iter().map(|disk| disk.name.clone()).collect()
    }

    pub fn snapshot(&self, id: SnapshotId, called: &str) -> Snapshot {
        Snapshot {
            id,
            name: name(called),
            description: None,
            parent: None,
            created: at(0),
            state: SnapshotState::Shutoff,
            memory: MemoryKind::No,
            disks: self.disks(),
            labels: BTreeMap::new(),
            hold: None,
            made_by: Actor::User("ada".to_owned()),
            made_in: Some(OperationId::from_uuid(uuid(7))),
            lost: false,
            real_name: None,
            native: None,
            left_out: Vec::new(),
        }
    }

    pub fn create(&mut self, n: u128, called: &str, changes: Vec<LayerChange>) {
        let id = snapshot_id(n);
        let request = self.create_requested(id, called);
        let snapshot = self.snapshot(id, called);
        self.operation(request, changes, vec![SnapshotCreated { snapshot }.into()]);
    }

    pub fn revert(&mut self, n: u128, changes: Vec<LayerChange>) {
        let snapshot = snapshot_id(n);
        let request = SnapshotRevertRequested {
            snapshot,
            run_state: None,
            keep: None,
            request: RequestTerms::default(),
        };
        self.operation(request, changes, vec![SnapshotReverted { snapshot }.into()]);
    }

    pub fn delete(&mut self, ids: &[u128], merge: MergeWish) {
        let snapshots: Vec<SnapshotId> = ids.iter().copied().map(snapshot_id).collect();
        let deleted = snapshots
            .iter()
            .map(|id| {
                let name = self.state.tree.get(*id).unwrap().name.clone();
                SnapshotDeleted { snapshot: *id, name, stays: false }.into()
            })
            .collect();
        let request = SnapshotDeleteRequested {
            named: snapshots.clone(),
            snapshots,
            scope: DeleteScope::Named,
            what: DeleteWhat::Snapshot,
            merge,
            reasons: vec![],
            request: RequestTerms::default(),
        };
        self.operation(request, vec![], deleted);
    }

    /// The tree as text, two blanks a level, `*` at the current snapshot.
    pub fn drawn(&self) -> String {
        fn draw(history: &History, snapshot: &Snapshot, depth: usize, out: &mut String) {
            let current = history.state.tree.current().map(|c| c.id) == Some(snapshot.id);
            out.push_str(&format!(
                "{}{}{}\n",
                "  ".repeat(depth),
                snapshot.name,
                if current { " *" } else { "" }
            ));
            for child in history.state.tree.children(snapshot.id) {
                draw(history, child, depth + 1, out);
            }
        }
        let mut out = String::new();
        for root in self.state.tree.roots() {
            draw(self, root, 0, &mut out);
        }
        out
    }
}
