//! What may be asked, and with which words it is turned down.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod common;

use std::collections::BTreeMap;

use common::{History, at, disk, name, snapshot_id, uuid};
use snaptree_engine::command::{Command, Content, Create, Delete, SnapshotRef};
use snaptree_engine::decide::{Ctx, LABELS_MAX, TEXT_BYTES_MAX, decide};
use snaptree_engine::domain::Capabilities;
use snaptree_engine::event::{
    Actor, DeleteScope, DeleteWhat, Event, MemoryKind, MergeWish, OperationNeedsAttention, Place,
    RequestTerms, SnapshotHeld, UnregisterWish,
};
use snaptree_engine::layer::{Layer, LayerChange};
use snaptree_engine::operation::{Code, Failure};
use snaptree_engine::reconcile::beside::Blocked;
use snaptree_engine::tree::Hold;
use snaptree_engine::{LabelKey, LayerId, OperationId};

/// a <- b <- c, and b <- d; current is d.
fn history() -> History {
    let mut history = History::new(&["vda", "vdb"]);
    history.create(1, "a", vec![]);
    history.create(2, "b", vec![]);
    history.create(3, "c", vec![]);
    history.revert(2, vec![]);
    history.create(4, "d", vec![]);
    history
}

fn ctx() -> Ctx {
    let actor = Actor::User("ada".to_owned());
    Ctx { now: at(500), fresh: uuid(77), actor, terms: RequestTerms::default(), blocked: Blocked::Domain }
}

fn by_name(text: &str) -> SnapshotRef {
    SnapshotRef::Name(name(text))
}

fn delete(snapshots: &[&str], scope: DeleteScope) -> Command {
    Command::Delete(Delete {
        snapshots: snapshots.iter().map(|text| by_name(text)).collect(),
        scope,
        what: DeleteWhat::Snapshot,
        merge: MergeWish::Auto,
        reasons: vec![],
    })
}

fn create(called: Option<&str>) -> Create {
    Create { name: called.map(name), ..Create::default() }
}

/// The code and words of a rejection.
fn refused(history: &History, command: &Command) -> (Code, String) {
    let rejection = decide(&history.state, command, &ctx()).expect_err("it must be refused");
    assert!(rejection.refused);
    (rejection.code, rejection.message)
}

fn going(history: &History, command: &Command) -> Vec<String> {
    let events = decide(&history.state, command, &ctx()).unwrap();
    let [Event::SnapshotDeleteRequested(request)] = events.as_slice() else { panic!("{events:?}") };
    let name = |id: &_| history.state.tree.get(*id).unwrap().name.to_string();
    request.snapshots.iter().map(name).collect()
}

#[test]
fn a_taken_name_is_refused_in_libvirts_words() {
    let found = refused(&history(), &Command::Create(create(Some("a"))));
    assert_eq!(found, (Code::Exists, "domain moment a already exists".to_owned()));
}

#[test]
fn a_deleted_name_is_free_again_and_one_that_is_asked_for_is_taken() {
    let mut history = history();
    history.delete(&[3], MergeWish::Auto);
    assert!(decide(&history.state, &Command::Create(create(Some("c"))), &ctx()).is_ok());
    let operation = Some(history.fresh_operation());
    let request = history.create_requested(snapshot_id(9), "c");
    history.push(operation, request);
    assert_eq!(refused(&history, &Command::Create(create(Some("c")))).0, Code::Exists);
}

#[test]
fn a_name_left_out_is_the_seconds_since_the_epoch_or_the_next_free_number() {
    let mut history = history();
    let seconds = at(500).as_second();
    history.create(11, &seconds.to_string(), vec![]);
    let events = decide(&history.state, &Command::Create(create(None)), &ctx()).unwrap();
    let [Event::SnapshotCreateRequested(request)] = events.as_slice() else { panic!("{events:?}") };
    assert_eq!(request.name.as_str(), (seconds + 1).to_string());
}

#[test]
fn delete_takes_what_its_scope_says_children_first() {
    let history = history();
    assert_eq!(going(&history, &delete(&["b"], DeleteScope::Named)), ["b"]);
    assert_eq!(going(&history, &delete(&["b"], DeleteScope::Children)), ["c", "d", "b"]);
    assert_eq!(going(&history, &delete(&["b"], DeleteScope::ChildrenOnly)), ["c", "d"]);
    assert_eq!(going(&history, &delete(&["a", "d"], DeleteScope::Named)), ["d", "a"]);
    assert_eq!(going(&history, &delete(&["d", "d"], DeleteScope::Named)), ["d"]);
}

#[test]
fn one_held_descendant_refuses_the_whole_delete_until_the_hold_ends() {
    let mut history = history();
    let hold = Hold { reason: "audit".to_owned(), until: Some(at(600)), by: Actor::Engine };
    history.push(None, SnapshotHeld { snapshot: snapshot_id(3), hold });
    let (code, text) = refused(&history, &delete(&["b"], DeleteScope::Children));
    assert_eq!(code, Code::Held);
    assert!(text.contains("'c' is held by engine") && text.contains("audit"), "{text}");
    let later = Ctx { now: at(600), ..ctx() };
    assert!(decide(&history.state, &delete(&["b"], DeleteScope::Children), &later).is_ok());
    // Merging into a held snapshot is fine.
    assert!(decide(&history.state, &delete(&["b"], DeleteScope::Named), &ctx()).is_ok());
}

#[test]
fn requests_are_judged_by_the_tree_after_the_open_ones() {
    let mut history = history();
    let events = decide(&history.state, &delete(&["d"], DeleteScope::Named), &ctx()).unwrap();
    let operation = Some(history.fresh_operation());
    history.push(operation, events.into_iter().next().unwrap());
    let revert = Command::Revert { snapshot: by_name("d"), run_state: None, keep: false };
    assert_eq!(refused(&history, &revert).1, "snapshot 'd' of domain 'web' is being deleted");
    let hold = Command::Hold { snapshot: by_name("d"), reason: "x".to_owned(), until: None };
    assert_eq!(refused(&history, &hold).0, Code::NotFound);
    // `--current` is resolved now: d's parent.
    let revert = Command::Revert { snapshot: SnapshotRef::Current, run_state: None, keep: false };
    let events = decide(&history.state, &revert, &ctx()).unwrap();
    assert!(matches!(&events[..], [Event::SnapshotRevertRequested(r)] if r.snapshot == snapshot_id(2)));
}

#[test]
fn what_is_not_there_is_not_found() {
    let revert = Command::Revert { snapshot: by_name("zz"), run_state: None, keep: false };
    assert_eq!(refused(&history(), &revert), (Code::NotFound, "web has no snapshot 'zz'".to_owned()));
    let mut empty = History::new(&["vda"]);
    let revert = Command::Revert { snapshot: SnapshotRef::Current, run_state: None, keep: false };
    assert_eq!(refused(&empty, &revert).1, "web has no current snapshot");
    empty.state.registered = false;
    assert_eq!(refused(&empty, &revert).1, "the domain is not registered");
}

#[test]
fn disks_are_selected_by_name() {
    let history = history();
    let with = |disks: &[&str]| {
        Command::Create(Create { disks: Some(disks.iter().map(|d| disk(d)).collect()), ..create(Some("x")) })
    };
    assert!(decide(&history.state, &with(&["vdb"]), &ctx()).is_ok());
    assert_eq!(refused(&history, &with(&["vdc"])).1, "no disk named 'vdc'");
    assert_eq!(refused(&history, &with(&[])).1, "nothing selected for snapshot");
}

#[test]
fn what_the_driver_cannot_do_is_refused_before_anything_is_written() {
    type Change = fn(&mut Capabilities);
    let memory = Command::Create(Create { content: Content::WithMemory, ..create(None) });
    let metadata = match delete(&["a"], DeleteScope::Named) {
        Command::Delete(delete) => Command::Delete(Delete { what: DeleteWhat::Metadata, ..delete }),
        other => other,
    };
    let quiesce = || Command::Create(Create { quiesce: true, ..create(None) });
    let internal = Command::Create(Create { place: Place::Internal, ..create(None) });
    let cases: [(Change, Command, Code); 8] = [
        (|c| c.memory = false, memory.clone(), Code::Unsupported),
        (|c| c.internal = false, internal, Code::Unsupported),
        (|c| c.children_only = false, delete(&["b"], DeleteScope::ChildrenOnly), Code::Unsupported),
        (|c| c.metadata_only = false, metadata, Code::Unsupported),
        (|c| c.depth_max = 3, Command::Create(create(Some("x"))), Code::Unsupported),
        (|c| c.quiesce = false, quiesce(), Code::Unsupported),
        // libvirt: quiesce requires disk-only, and memory would be kept here.
        (|c| (c.quiesce, c.memory) = (true, true), quiesce(), Code::Invalid),
        (|c| c.name_bytes_max = 3, Command::Create(create(Some("long"))), Code::Invalid),
    ];
    for (change, command, code) in cases {
        let mut history = history();
        change(&mut history.state.domain.as_mut().unwrap().capabilities);
        assert_eq!(refused(&history, &command).0, code, "{command:?}");
    }
    // It can be kept inside the images alone, and for a first snapshot that has to be asked for.
    let mut history = History::new(&["vda"]);
    history.state.domain.as_mut().unwrap().capabilities.internal = true;
    assert_eq!(refused(&history, &memory).0, Code::Unsupported);
}

/// A domain that can have both kinds, and has `a` inside its image (`layers` is then empty), or as a layer.
fn of_both_kinds(changes: Vec<LayerChange>) -> History {
    let mut history = History::new(&["vda"]);
    history.state.domain.as_mut().unwrap().capabilities.internal = true;
    history.create(1, "a", changes);
    history
}

fn layer_of_a() -> Vec<LayerChange> {
    let (disk, layer) = (disk("vda"), LayerId::adopted(&disk("vda"), OperationId::from_uuid(uuid(9))));
    let facts = Layer {
        file: "/vda".into(),
        parent: None,
        snapshot: Some(snapshot_id(1)),
        mode: 0o600,
        virtual_size_bytes: 1,
        registered: true,
        stamp: None,
    };
    vec![LayerChange::Added { disk, layer, facts }]
}

#[test]
fn the_first_snapshot_says_where_the_others_go() {
    let asked = |history: &History, place| {
        let command = Command::Create(Create { place, ..create(Some("b")) });
        let events = decide(&history.state, &command, &ctx()).unwrap();
        let [Event::SnapshotCreateRequested(request)] = events.as_slice() else { panic!("{events:?}") };
        (request.place, request.memory)
    };
    let inside = of_both_kinds(vec![]);
    assert_eq!(asked(&inside, Place::Usual), (Place::Internal, MemoryKind::Internal));
    assert_eq!(asked(&inside, Place::Internal), (Place::Internal, MemoryKind::Internal));
    let outside = of_both_kinds(layer_of_a());
    assert_eq!(asked(&outside, Place::Usual), (Place::Usual, MemoryKind::No));
    let mixed = Command::Create(Create { place: Place::Internal, ..create(Some("b")) });
    let (code, message) = refused(&outside, &mixed);
    assert_eq!(code, Code::Unsupported);
    assert!(message.contains("not mixed"), "{message}");
}

#[test]
fn a_revert_that_keeps_asks_for_a_snapshot_first_and_names_it() {
    let revert = Command::Revert { snapshot: by_name("a"), run_state: None, keep: true };
    let events = decide(&history().state, &revert, &ctx()).unwrap();
    let [Event::SnapshotCreateRequested(kept), Event::SnapshotRevertRequested(revert)] = events.as_slice()
    else {
        panic!("{events:?}")
    };
    assert_eq!(kept.name, name(&format!("before-revert-{}", at(500).as_second())));
    assert!(kept.before_revert);
    assert_eq!(revert.keep, Some(kept.snapshot));
}

#[test]
fn memory_is_kept_where_the_domain_can_and_with_all_disks() {
    type Change = fn(&mut Capabilities);
    let with = |content, place| Create { content, place, ..create(Some("x")) };
    let cases: [(Change, Create, MemoryKind); 6] = [
        (|c| c.memory = true, with(Content::Auto, Place::Usual), MemoryKind::Internal),
        (|c| c.memory = true, with(Content::DisksOnly, Place::Usual), MemoryKind::No),
        (|c| c.memory_external = true, with(Content::WithMemory, Place::Usual), MemoryKind::External),
        (
            |c| (c.memory, c.memory_external) = (false, true),
            with(Content::Auto, Place::Usual),
            MemoryKind::No,
        ),
        (|c| c.internal = true, with(Content::WithMemory, Place::Internal), MemoryKind::Internal),
        (|c| c.internal = true, with(Content::DisksOnly, Place::Internal), MemoryKind::No),
    ];
    for (change, wanted, memory) in cases {
        let mut history = history();
        change(&mut history.state.domain.as_mut().unwrap().capabilities);
        let place = wanted.place;
        let events = decide(&history.state, &Command::Create(wanted), &ctx()).unwrap();
        let [Event::SnapshotCreateRequested(request)] = events.as_slice() else { panic!("{events:?}") };
        assert_eq!((request.memory, request.place), (memory, place));
    }
    let mut history = history();
    history.state.domain.as_mut().unwrap().capabilities.memory_external = true;
    let some = Create { disks: Some([disk("vda")].into()), ..with(Content::WithMemory, Place::Usual) };
    assert_eq!(refused(&history, &Command::Create(some)).0, Code::Invalid);
}

#[test]
fn texts_and_labels_have_limits() {
    let long = "x".repeat(TEXT_BYTES_MAX + 1);
    let described = Create { description: Some(long.clone()), ..create(None) };
    assert_eq!(refused(&history(), &Command::Create(described)).0, Code::Invalid);
    let key = |n: usize| LabelKey::new(format!("k{n}")).unwrap();
    let many: BTreeMap<_, _> = (0..=LABELS_MAX).map(|n| (key(n), "v".to_owned())).collect();
    assert_eq!(
        refused(&history(), &Command::Create(Create { labels: many, ..create(None) })).0,
        Code::Invalid
    );
    let control = BTreeMap::from([(key(1), "a\u{1b}[2J".to_owned())]);
    assert_eq!(
        refused(&history(), &Command::Set { name: None, labels: control, access: None }).0,
        Code::Invalid
    );
    let hold = Command::Hold { snapshot: by_name("a"), reason: " ".to_owned(), until: None };
    assert_eq!(refused(&history(), &hold).0, Code::Invalid);
    let hold = Command::Hold { snapshot: by_name("a"), reason: "x".to_owned(), until: Some(at(500)) };
    assert_eq!(refused(&history(), &hold).0, Code::Invalid, "a hold that has ended already");
}

#[test]
fn a_domain_with_snapshots_is_let_go_only_when_told_what_becomes_of_them() {
    let history = history();
    assert_eq!(refused(&history, &Command::Unregister(UnregisterWish::Untouched)).0, Code::Invalid);
    assert!(decide(&history.state, &Command::Unregister(UnregisterWish::KeepLayers), &ctx()).is_ok());
    let empty = History::new(&["vda"]);
    let events = decide(&empty.state, &Command::Unregister(UnregisterWish::Untouched), &ctx()).unwrap();
    assert!(
        matches!(&events[..], [Event::DomainUnregisterRequested(r)] if r.wish == UnregisterWish::Untouched)
    );
}

#[test]
fn a_stuck_removal_can_be_let_try_again() {
    let mut history = History::new(&["vda"]);
    let events = decide(&history.state, &Command::Unregister(UnregisterWish::Untouched), &ctx()).unwrap();
    let operation = history.fresh_operation();
    history.push(Some(operation), events.into_iter().next().unwrap());
    assert_eq!(refused(&history, &Command::Retry(operation)).0, Code::Invalid, "it is not stuck yet");
    let failure = Failure::new(Code::Io, "no");
    history.push(Some(operation), OperationNeedsAttention { failure });
    assert!(decide(&history.state, &Command::Retry(operation), &ctx()).is_ok());
    assert_eq!(refused(&history, &Command::Create(create(Some("x")))).0, Code::Invalid);
}

#[test]
fn an_empty_label_value_removes_the_label() {
    let mut history = history();
    let key = LabelKey::new("tier").unwrap();
    for (value, expected) in [("prod", 1), ("", 0)] {
        let labels = BTreeMap::from([(key.clone(), value.to_owned())]);
        let edit = Command::Edit { snapshot: by_name("a"), name: None, description: None, labels };
        let events = decide(&history.state, &edit, &ctx()).unwrap();
        history.push(None, events.into_iter().next().unwrap());
        assert_eq!(history.state.tree.get(snapshot_id(1)).unwrap().labels.len(), expected);
    }
    let nothing =
        Command::Edit { snapshot: by_name("a"), name: None, description: None, labels: BTreeMap::new() };
    assert_eq!(refused(&history, &nothing).1, "nothing to change");
}
