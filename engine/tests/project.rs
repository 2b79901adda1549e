//! Recorded histories lead to the trees that libvirt's rules say.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod common;

use common::{History, snapshot_id};
use insta::assert_snapshot;
use snaptree_engine::event::{
    Event, MergeWish, OperationPlanned, OperationStepStarted, OperationSucceeded, SnapshotCreated,
};

/// a <- b <- c, and b <- d <- e after a revert to b; current is e.
fn branched() -> History {
    let mut history = History::new(&["vda"]);
    history.create(1, "a", vec![]);
    history.create(2, "b", vec![]);
    history.create(3, "c", vec![]);
    history.revert(2, vec![]);
    history.create(4, "d", vec![]);
    history.create(5, "e", vec![]);
    history
}

#[test]
fn creates_and_reverts_branch_the_tree() {
    assert_snapshot!(branched().drawn(), @r"
    a
      b
        c
        d
          e *
    ");
}

#[test]
fn deleting_the_current_snapshot_makes_its_parent_current() {
    let mut history = branched();
    history.delete(&[5], MergeWish::Auto);
    assert_snapshot!(history.drawn(), @r"
    a
      b
        c
        d *
    ");
}

#[test]
fn deleting_another_snapshot_moves_its_children_to_its_parent_and_leaves_the_current() {
    let mut history = branched();
    history.delete(&[2], MergeWish::Auto);
    assert_snapshot!(history.drawn(), @r"
    a
      c
      d
        e *
    ");
}

#[test]
fn deleting_a_root_leaves_several_roots_and_perhaps_no_current() {
    let mut history = branched();
    history.delete(&[1], MergeWish::Auto);
    history.delete(&[2], MergeWish::Auto);
    assert_snapshot!(history.drawn(), @r"
    c
    d
      e *
    ");
    history.delete(&[5], MergeWish::Auto);
    history.delete(&[4], MergeWish::Auto);
    assert_eq!(history.drawn(), "c\n");
    assert!(history.state.tree.current().is_none());
}

#[test]
fn descendants_come_children_first() {
    let history = branched();
    let order = history.state.tree.descendants(snapshot_id(1));
    assert_eq!(order.len(), 4);
    for (index, id) in order.iter().enumerate() {
        let parent = history.state.tree.get(*id).unwrap().parent.unwrap();
        assert!(!order[..index].contains(&parent), "{parent} stands before its child {id}");
    }
}

#[test]
fn the_tree_changes_at_the_outcome_and_never_at_the_request() {
    let mut history = branched();
    let before = history.drawn();
    let operation = Some(history.fresh_operation());
    let request = history.create_requested(snapshot_id(9), "z");
    history.push(operation, request);
    history.push(operation, OperationPlanned { steps: vec![] });
    assert_eq!(history.drawn(), before);
    assert_eq!(history.state.tree_after_open().current().unwrap().name.as_str(), "z");
    let snapshot = history.snapshot(snapshot_id(9), "z");
    history.push(operation, SnapshotCreated { snapshot });
    history.push(operation, OperationSucceeded {});
    assert_ne!(history.drawn(), before);
    assert!(history.state.open.is_empty());
}

#[test]
fn an_illegal_history_is_kept_as_such_and_does_not_panic() {
    let mut history = branched();
    let operation = Some(history.fresh_operation());
    history.push(operation, OperationStepStarted { step: 0 });
    let illegal = history.state.illegal.clone().expect("a step of an unknown operation");
    assert_eq!(illegal.event, "Operation.StepStarted");
}

#[test]
fn a_state_read_back_from_its_checkpoint_is_the_same() {
    let history = branched();
    let text = serde_json::to_string(&history.state).unwrap();
    assert_eq!(serde_json::from_str::<snaptree_engine::project::DomainState>(&text).unwrap(), history.state);
}

#[test]
fn every_event_of_a_history_reads_back_from_its_stored_form() {
    for envelope in branched().envelopes {
        let event = &envelope.event;
        let text = event.encode().unwrap();
        assert_eq!(Event::decode(event.kind(), event.schema(), &text).unwrap(), *event);
    }
    assert!(Event::decode("Snapshot.Created", 2, "{}").is_err(), "a newer schema is refused");
    assert!(Event::decode("Snapshot.Painted", 1, "{}").is_err(), "an unknown kind is refused");
}
