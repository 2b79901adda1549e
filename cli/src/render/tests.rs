//! What is printed, as golden text. Everything comes from events, as in the program.

use jiff::{SignedDuration, Timestamp};
use serde_json::json;
use snaptree_engine::command::SnapshotRef;
use snaptree_engine::domain::{Capabilities, Disk, Domain, DriverKind};
use snaptree_engine::event::{
    Actor, DomainRegistered, Envelope, Event, Hash, HowFinished, MergeDeferred, OperationAttemptFailed,
    OperationFailed, OperationNeedsAttention, OperationPlanned, OperationStepFinished, OperationStepStarted,
    OperationSucceeded, OperationUndoFinished, OperationUndoStarted, Origin, RetryKind, SnapshotHeld,
};
use snaptree_engine::ids::{EventId, StreamId};
use snaptree_engine::layer::LayerChange;
use snaptree_engine::operation::{Code, Failure, Poison, Reversal, Step};
use snaptree_engine::project::DomainState;
use snaptree_engine::tree::{Hold, Labels};
use snaptree_engine::{DomainId, OperationId, SnapshotId};
use uuid::Uuid;

use super::operation::{Cost, MergeView, OperationView, done, planned};
use super::text::Look;
use super::tree::Runs;
use super::view::{DomainView, Files, FreesView, ListView, Which, current_name, domain_name, snapshots};
use super::words::{Known, line};
use super::{list, tree};
use crate::exit::ErrorView;
use crate::story::{StepOutcome, StepView, Story, cuts};

/// A number's UUID: the tests' ids are readable.
fn uuid(number: u128) -> Uuid {
    Uuid::from_u128(0x0190_0000_0000_7000_8000_0000_0000_0000 | number)
}

fn snapshot(number: u128) -> SnapshotId {
    SnapshotId::from_uuid(uuid(number))
}

fn start() -> Timestamp {
    "2026-11-23T04:00:00Z".parse().unwrap()
}

fn look() -> Look {
    Look { now: start() + SignedDuration::from_hours(2), ..Look::plain() }
}

/// Writes events as the store would, a minute apart.
#[derive(Default)]
struct Log {
    events: Vec<Envelope>,
    epoch: u64,
}

impl Log {
    fn add(&mut self, operation: Option<u128>, event: impl Into<Event>) -> &mut Self {
        let seq = self.events.len() as u64 + 1;
        let minutes = i64::try_from(seq).unwrap();
        self.events.push(Envelope {
            seq,
            id: EventId::from_uuid(uuid(u128::from(seq))),
            stream: StreamId::Domain(DomainId::from_uuid(uuid(0xd0))),
            version: seq,
            at: start() + SignedDuration::from_mins(minutes),
            actor: Actor::User("alice".to_owned()),
            origin: Origin {
                uid: 1000,
                host: "host".to_owned(),
                pid: 4000 + u32::try_from(self.epoch).unwrap(),
                via: "cli".to_owned(),
                sudo_user: None,
            },
            epoch: self.epoch,
            operation: operation.map(|number| OperationId::from_uuid(uuid(number))),
            cause: None,
            key: None,
            event: event.into(),
            hash: Hash([0; 32]),
        });
        self
    }

    /// An event from its JSON, where building it by hand would take a page.
    fn decoded(&mut self, operation: u128, kind: &str, data: &serde_json::Value) -> &mut Self {
        let event = Event::decode(kind, 1, &data.to_string()).unwrap();
        self.add(Some(operation), event)
    }

    fn created(&mut self, operation: u128, id: u128, name: &str, state: &str) -> &mut Self {
        let labels = if name == "b" { json!({"tier": "prod"}) } else { json!({}) };
        let request = json!({"snapshot": snapshot(id), "name": name, "disks": ["vda"], "memory": "no"});
        let at = start() + SignedDuration::from_mins(i64::try_from(self.events.len()).unwrap());
        let made = json!({
            "id": snapshot(id), "name": name, "created": at, "state": state, "memory": "no", "disks": ["vda"],
            "labels": labels, "made_by": "user:alice", "made_in": OperationId::from_uuid(uuid(operation)),
        });
        let step = OperationStepFinished {
            step: 0,
            how: HowFinished::Executed,
            changes: layer(id),
            learnt: serde_json::Value::Null,
        };
        self.decoded(operation, "Snapshot.CreateRequested", &request)
            .add(Some(operation), plan(&["switch"]))
            .add(Some(operation), OperationStepStarted { step: 0 })
            .add(Some(operation), step)
            .decoded(operation, "Snapshot.Created", &made)
            .add(Some(operation), OperationSucceeded {})
    }

    fn state(&self) -> DomainState {
        let mut state = DomainState::default();
        state.apply_all(&self.events);
        assert_eq!(state.illegal, None);
        state
    }
}

fn plan(steps: &[&str]) -> OperationPlanned {
    let step = |name: &&str| Step {
        name: (*name).to_owned(),
        reversal: Reversal::Undoable,
        poison: Poison::Nothing,
        data: serde_json::Value::Null,
    };
    OperationPlanned { steps: steps.iter().map(step).collect() }
}

/// The layer that reads as a snapshot, so that it leaves a tombstone when it is deleted.
fn layer(id: u128) -> Vec<LayerChange> {
    let added = json!({
        "change": "added", "disk": "vda", "layer": format!("vda-{id}"),
        "facts": {
            "file": format!("/vm/vda-{id}.qcow2"), "snapshot": snapshot(id), "mode": 0o644,
            "virtual_size_bytes": 1024, "parent": (id == 0xb).then_some("vda-10"),
        },
    });
    vec![serde_json::from_value(added).unwrap()]
}

fn registered() -> DomainRegistered {
    DomainRegistered {
        domain: Domain {
            id: DomainId::from_uuid(uuid(0xd0)),
            name: "web".parse().unwrap(),
            driver: DriverKind::Qemu,
            disks: vec![Disk::new("vda".parse().unwrap(), Some("/vm/web.qcow2".into()), 1 << 30)],
            config: serde_json::Value::Null,
            labels: Labels::new(),
            capabilities: Capabilities {
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
            },
        },
        claims: Vec::new(),
    }
}

/// a -> b -> (c, d), a second root e; reverted to c; d held; b deleted, its data deferred.
fn grown() -> Log {
    let mut log = Log::default();
    log.add(None, registered());
    log.created(1, 0xa, "a", "shutoff");
    log.created(2, 0xb, "b", "shutoff");
    log.created(3, 0xd, "d \u{202e}x", "disk-snapshot");
    let hold = Hold { reason: "audit".to_owned(), until: None, by: Actor::User("alice".to_owned()) };
    log.add(None, SnapshotHeld { snapshot: snapshot(0xd), hold });
    log.decoded(4, "Snapshot.RevertRequested", &json!({"snapshot": snapshot(0xb)}))
        .add(Some(4), plan(&["switch", "drop"]))
        .add(Some(4), OperationStepStarted { step: 0 })
        .decoded(4, "Operation.StepFinished", &json!({"step": 0, "how": "executed"}))
        .add(Some(4), OperationStepStarted { step: 1 })
        .decoded(4, "Operation.StepFinished", &json!({"step": 1, "how": "executed"}))
        .decoded(4, "Snapshot.Reverted", &json!({"snapshot": snapshot(0xb)}))
        .add(Some(4), OperationSucceeded {});
    log.created(5, 0xc, "c", "shutoff");
    log
}

/// And then b is deleted, and its data stays.
fn grown_and_deleted() -> Log {
    let mut log = grown();
    let request = json!({
        "snapshots": [snapshot(0xb)], "named": [snapshot(0xb)], "scope": "named", "what": "snapshot", "merge": "auto",
    });
    log.decoded(6, "Snapshot.DeleteRequested", &request)
        .add(Some(6), plan(&["mark as deleted"]))
        .add(Some(6), OperationStepStarted { step: 0 })
        .decoded(6, "Operation.StepFinished", &json!({"step": 0, "how": "executed"}))
        .decoded(6, "Snapshot.Deleted", &json!({"snapshot": snapshot(0xb), "name": "b"}))
        .add(Some(6), OperationSucceeded {});
    let reason =
        "folding it into its 2 dependants would copy 9.0 GiB, and merge.copy-max is 4.0 GiB".to_owned();
    log.add(None, MergeDeferred { snapshot: snapshot(0xb), reason });
    log
}

fn view(log: &Log, which: Which) -> ListView {
    let state = log.state();
    ListView {
        domain: domain_name(&state),
        current: current_name(&state),
        snapshots: snapshots(&state, look().now, which, Files::Unseen),
        at: None,
    }
}

#[test]
fn the_tree() {
    insta::assert_snapshot!(tree::tree(&view(&grown(), Which::Live), Runs::Drawn, &look()));
}

#[test]
fn the_tree_with_tombstones() {
    insta::assert_snapshot!(tree::tree(&view(&grown_and_deleted(), Which::All), Runs::Drawn, &look()));
}

#[test]
fn an_empty_tree_is_the_domain_alone() {
    let mut log = Log::default();
    log.add(None, registered());
    assert_eq!(tree::tree(&view(&log, Which::All), Runs::Folded, &look()), "web\n");
}

#[test]
fn the_list() {
    insta::assert_snapshot!(list::list(&view(&grown_and_deleted(), Which::All), &look()));
}

#[test]
fn the_list_in_json() {
    let mut listed = view(&grown_and_deleted(), Which::All);
    insta::assert_snapshot!(serde_json::to_string_pretty(&listed).unwrap());
    listed.snapshots.clear();
    listed.current = None;
    assert_eq!(serde_json::to_string(&listed).unwrap(), r#"{"domain":"web","current":null,"snapshots":[]}"#);
}

#[test]
fn one_snapshot() {
    let state = grown().state();
    let found = crate::commands::query::one(&state, &SnapshotRef::Id(snapshot(0xd))).unwrap();
    let view = crate::commands::query::show_view(&state, found, None);
    insta::assert_snapshot!(list::show(&view, &look()));
}

#[test]
fn one_domain() {
    let view = DomainView::of(&grown_and_deleted().state()).unwrap();
    insta::assert_snapshot!(list::domain(&view, &look()));
    insta::assert_snapshot!(list::domains(&[view], &look()));
}

fn told(log: &Log) -> String {
    let mut known = Known::default();
    let tell = |event: &Envelope| {
        known.learn(event);
        format!("{}\n", line(event, &known, &look()))
    };
    log.events.iter().map(tell).collect()
}

#[test]
fn the_log() {
    insta::assert_snapshot!(told(&grown_and_deleted()));
}

/// A create that is cut short, found half done, taken back; with an attempt that failed before.
fn cut_short() -> Log {
    let failure =
        || Failure::new(Code::InUse, "image x was written:\u{1b}]0;evil\u{7} the machine ran meanwhile");
    let mut log = Log::default();
    let request = json!({"snapshot": snapshot(0xa), "name": "a", "disks": ["vda"], "memory": "no"});
    let attempt = OperationAttemptFailed {
        step: 0,
        failure: Failure::new(Code::InUse, "busy"),
        kind: RetryKind::Busy,
        retry_at: start(),
    };
    log.decoded(1, "Snapshot.CreateRequested", &request)
        .add(Some(1), plan(&["adopt vda", "switch"]))
        .add(Some(1), OperationStepStarted { step: 0 })
        .add(Some(1), attempt)
        .add(Some(1), OperationStepStarted { step: 0 })
        .decoded(1, "Operation.StepFinished", &json!({"step": 0, "how": "executed"}))
        .add(Some(1), OperationStepStarted { step: 1 });
    log.epoch = 7;
    log.add(Some(1), OperationUndoStarted { step: 1, failure: failure() })
        .add(Some(1), OperationUndoFinished { step: 1, changes: vec![] })
        .add(Some(1), OperationUndoStarted { step: 0, failure: failure() })
        .add(Some(1), OperationUndoFinished { step: 0, changes: vec![] })
        .add(Some(1), OperationFailed { failure: failure() });
    log
}

#[test]
fn the_log_of_an_operation_that_went_back() {
    insta::assert_snapshot!(told(&cut_short()));
}

#[test]
fn a_story_tells_steps_cuts_and_the_end() {
    let log = cut_short();
    let story = Story::of(&log.events).unwrap();
    let step = |name: &str| StepView { name: name.to_owned(), outcome: StepOutcome::Undone };
    assert_eq!(story.steps, [step("adopt vda"), step("switch")]);
    assert_eq!(story.outcome_word(), Some("failed"));
    assert!(story.failure.unwrap().message.contains("ran meanwhile"));
    let cuts = cuts(&log.events);
    assert_eq!(
        cuts.iter().map(|cut| (cut.before, cut.pid, cut.next_pid)).collect::<Vec<_>>(),
        [(7, 4000, 4007)]
    );
}

#[test]
fn a_story_that_waits_for_someone() {
    let mut log = cut_short();
    log.events.truncate(7);
    let failure = Failure::new(Code::Drift, "strange");
    assert_eq!(Story::of(&log.events).unwrap().outcome_word(), None);
    log.add(Some(1), OperationNeedsAttention { failure });
    assert_eq!(Story::of(&log.events).unwrap().outcome_word(), Some("needs-attention"));
}

fn operation() -> OperationView {
    OperationView {
        operation: Some(OperationId::from_uuid(uuid(1))),
        outcome: Some("succeeded"),
        snapshot: Some("b".to_owned()),
        snapshots: vec!["b".to_owned()],
        current: Some("c".to_owned()),
        steps: vec![StepView { name: "mark as deleted".to_owned(), outcome: StepOutcome::Done }],
        merges: vec![
            MergeView {
                operation: Some(OperationId::from_uuid(uuid(2))),
                snapshot: "b".to_owned(),
                outcome: Some("succeeded"),
                reason: Some("pulled up into its child".to_owned()),
            },
            MergeView {
                operation: None,
                snapshot: "b".to_owned(),
                outcome: Some("deferred"),
                reason: Some("left to later".to_owned()),
            },
        ],
        left: vec![],
        left_out: vec![],
        cost: None,
        error: None,
        kind: "delete",
        domain: "web".to_owned(),
        parent: None,
    }
}

#[test]
fn an_operation_in_json() {
    insta::assert_snapshot!(serde_json::to_string_pretty(&operation()).unwrap());
    let failed = OperationView {
        outcome: Some("failed"),
        merges: vec![],
        error: Some(ErrorView { code: "in-use".to_owned(), message: "m".to_owned(), hint: None }),
        ..operation()
    };
    let text = serde_json::to_string(&failed).unwrap();
    assert!(text.ends_with(r#""error":{"code":"in-use","message":"m","hint":null}}"#), "{text}");
}

#[test]
fn a_dry_run_in_json_adds_what_it_costs() {
    let cost =
        Cost { bytes_moved: 3, bytes_freed: 2, peak_space: 1, frees: None, lost: vec!["x".to_owned()] };
    let view = OperationView {
        operation: None,
        outcome: Some("planned"),
        steps: vec![StepView { name: "s".to_owned(), outcome: StepOutcome::Planned }],
        merges: vec![],
        cost: Some(cost),
        ..operation()
    };
    assert_eq!(
        serde_json::to_string(&view).unwrap(),
        r#"{"operation":null,"outcome":"planned","snapshot":"b","snapshots":["b"],"current":"c","steps":[{"name":"s","outcome":"planned"}],"merges":[],"bytes_moved":3,"bytes_freed":2,"peak_space":1,"lost":["x"],"error":null}"#
    );
    insta::assert_snapshot!(planned(&view, &look()));
}

#[test]
fn sizes_say_how_sure_they_are() {
    let mut view = view(&grown(), Which::Live);
    let sizes = [(3 << 20, 3 << 20), (1 << 20, 2 << 20), (0, 5 << 20), (-(1 << 30), 1 << 30)];
    let shown = view.snapshots.iter_mut().zip(sizes).map(|(snapshot, (at_least, at_most))| {
        snapshot.allocated = Some(7 << 20);
        let frees = FreesView { at_least, at_most };
        snapshot.frees = Some(frees);
        list::taken(frees)
    });
    let shown: Vec<Option<String>> = shown.collect();
    assert!(shown[..3].iter().all(Option::is_none), "{shown:?}");
    assert!(shown[3].as_deref().is_some_and(|text| text.contains("1.0 GiB more")), "{shown:?}");
    insta::assert_snapshot!(list::list(&view, &look()));
}

#[test]
fn an_operation_in_words() {
    let create =
        OperationView { kind: "create", merges: vec![], parent: Some("a".to_owned()), ..operation() };
    let revert = OperationView { kind: "revert", merges: vec![], ..operation() };
    let words: String = [operation(), create, revert].iter().map(|view| done(view, &look())).collect();
    insta::assert_snapshot!(words);
}
