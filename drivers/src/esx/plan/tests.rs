//! What became of a revert, from what is left to be seen of it.

use serde_json::json;
use snaptree_engine::domain::RunState;
use snaptree_engine::driver::{Observation, Remedy, Resolution, StepReport};
use uuid::Uuid;

use super::super::step::{Action, Before, PowerOn};
use super::*;

const OURS: &str = "root";

/// The machine stands on `current`, is powered so, and its host tells of these tasks (id, state, user).
fn seen(current: &str, power: RunState, tasks: &[(&str, &str, &str)]) -> Observation {
    let task = |(id, state, user): &(&str, &str, &str)| json!({ "id": id, "what": "VirtualMachine.revertToSnapshot", "state": state, "user": user });
    let detail = json!({ "user": OURS, "tasks": tasks.iter().map(task).collect::<Vec<_>>() });
    serde_json::from_value(json!({
        "at": "2026-01-01T00:00:00Z", "run_state": power, "in_use": [], "files": {}, "unreadable": {},
        "foreign_dependants": {}, "generation": null, "snapshots": [], "current": current, "detail": detail,
    }))
    .unwrap()
}

/// A revert to `a` of a machine that ran and stood on `from`, and of whose tasks `old` was known.
fn resolved(from: &str, seen: &Observation) -> Resolution {
    let before = Before {
        current: Some(from.to_owned()),
        power: RunState::Running,
        booted: None,
        tasks: [("old".to_owned(), None)].into(),
    };
    let snapshot = SnapshotId::from_uuid(Uuid::from_u128(1));
    resolve(&Action::Revert { snapshot, native: "a".to_owned(), power_on: PowerOn::AsTaken, before }, seen)
}

#[test]
fn a_revert_is_done_when_its_own_task_says_so_or_the_machine_has_moved() {
    let done = Resolution::Done(StepReport::default());
    let running = RunState::Running;
    for (from, now) in [
        ("b", seen("a", running, &[("new", "success", "root")])),
        ("a", seen("a", running, &[("new", "success", "ROOT")])),
        ("b", seen("a", running, &[])),
        // The host forgot the task, but the machine was switched off by it.
        ("a", seen("a", RunState::Off, &[])),
    ] {
        assert_eq!(resolved(from, &now), done, "{from} {now:?}");
    }
}

#[test]
fn a_revert_is_not_done_where_only_others_or_nobody_did_anything() {
    let running = RunState::Running;
    for (from, now) in [
        ("b", seen("b", running, &[])),
        ("a", seen("a", running, &[])),
        ("a", seen("a", running, &[("old", "success", "root")])),
        ("a", seen("a", running, &[("new", "success", "backup")])),
        ("b", seen("b", running, &[("new", "error", "root")])),
    ] {
        assert_eq!(resolved(from, &now), Resolution::NotDone, "{from} {now:?}");
    }
}

#[test]
fn a_revert_that_failed_after_it_had_moved_the_machine_is_finished() {
    let now = seen("a", RunState::Running, &[("new", "error", "root")]);
    assert_eq!(resolved("b", &now), Resolution::HalfDone(Remedy::Finish));
}
