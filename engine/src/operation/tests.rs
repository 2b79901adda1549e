use super::*;
use crate::event::{
    DomainUnregisterRequested, HowFinished, OperationFailed, OperationNeedsAttention, OperationPlanned,
    OperationStepFinished, OperationStepStarted, OperationSucceeded, OperationUndoFinished,
    OperationUndoStarted,
};

fn failure() -> Failure {
    Failure::new(Code::Io, "no")
}

fn started(step: usize) -> Event {
    OperationStepStarted { step }.into()
}

fn finished(step: usize) -> Event {
    OperationStepFinished {
        step,
        how: HowFinished::Executed,
        changes: vec![],
        learnt: serde_json::Value::Null,
    }
    .into()
}

fn undo(step: usize) -> Event {
    OperationUndoStarted { step, failure: failure() }.into()
}

fn undone(step: usize) -> Event {
    OperationUndoFinished { step, changes: vec![] }.into()
}

/// Runs two-step histories through `next`; `Err` names the event that could not follow.
fn run(events: &[Event]) -> Result<Phase, usize> {
    events
        .iter()
        .enumerate()
        .try_fold(Phase::Requested, |phase, (index, event)| phase.next(event, 2).ok_or(index))
}

#[test]
fn a_whole_life_forward() {
    let planned: Event = OperationPlanned { steps: vec![] }.into();
    let end = run(&[planned, started(0), finished(0), started(1), finished(1), OperationSucceeded {}.into()]);
    assert_eq!(end, Ok(Phase::Ended { outcome: Outcome::Succeeded, failure: None }));
}

#[test]
fn a_whole_life_back() {
    let planned: Event = OperationPlanned { steps: vec![] }.into();
    let failed: Event = OperationFailed { failure: failure() }.into();
    let end =
        run(&[planned, started(0), finished(0), started(1), undo(1), undone(1), undo(0), undone(0), failed]);
    assert_eq!(end, Ok(Phase::Ended { outcome: Outcome::Failed, failure: Some(failure()) }));
}

#[test]
fn what_someone_says_of_a_stuck_step_leads_on_again_or_out() {
    let attention: Event = OperationNeedsAttention { failure: failure() }.into();
    let said = |verdict| -> Event {
        OperationResolved { verdict, reason: "seen".to_owned(), changes: vec![] }.into()
    };
    let planned = || Event::from(OperationPlanned { steps: vec![] });
    let stuck = |last| run(&[planned(), started(0), attention.clone(), last]);
    assert_eq!(stuck(said(Verdict::Done)), Ok(Phase::Ready { step: 1 }));
    assert_eq!(stuck(said(Verdict::NotDone)), Ok(Phase::Ready { step: 0 }));
    assert!(matches!(stuck(said(Verdict::Abandon)), Ok(Phase::Ended { outcome: Outcome::Failed, .. })));
    let back = run(&[planned(), started(0), undo(0), attention.clone(), said(Verdict::Done)]);
    assert_eq!(back, Ok(Phase::Undone { step: 0, failure: failure() }));
    assert_eq!(run(&[planned(), started(0), said(Verdict::Done)]), Err(2), "nothing needed attention");
    assert_eq!(run(&[planned(), attention.clone(), said(Verdict::Done)]), Err(2), "no step was in hand");
}

#[test]
fn the_stages_of_hooks_follow_one_another_and_a_hook_that_was_cut_short_may_begin_again() {
    use HookPhase::{After, Before};
    let started = |hook| Event::from(crate::event::OperationHookStarted { hook });
    let ended = |hook| Event::from(crate::event::OperationHookFinished { hook, failure: None });
    let planned = || Event::from(OperationPlanned { steps: vec![] });
    let failed = || Event::from(OperationFailed { failure: failure() });
    let attention = || Event::from(OperationNeedsAttention { failure: failure() });
    let follow = |events: &[Event]| {
        let request = DomainUnregisterRequested {
            wish: crate::event::UnregisterWish::Untouched,
            request: crate::event::RequestTerms::default(),
        };
        let mut operation = Operation {
            id: OperationId::from_uuid(uuid::Uuid::nil()),
            request: Request::Unregister(request),
            seq: 1,
            requested: Timestamp::UNIX_EPOCH,
            actor: Actor::Engine,
            cause: None,
            steps: vec![],
            phase: Phase::Requested,
            attempts: 0,
            learnt: Learnt::default(),
            stages: HookStages::default(),
        };
        let broken = events.iter().position(|event| operation.apply(event, 2).is_err());
        broken.map_or(Ok(operation.stages), Err)
    };
    let stages = |before, after| Ok(HookStages { before, after });
    let all =
        [started(Before), started(Before), ended(Before), planned(), started(After), ended(After), failed()];
    assert_eq!(follow(&all), stages(HookStage::Finished, HookStage::Finished));
    assert_eq!(follow(&all[..5]), stages(HookStage::Finished, HookStage::Started));
    for (events, at) in [
        (vec![ended(Before)], 0),
        (vec![started(Before), ended(After)], 1),
        (vec![started(Before), ended(Before), started(Before)], 2),
        (vec![planned(), started(Before)], 1),
        (vec![started(After), ended(After), started(After)], 2),
        (vec![attention(), started(After)], 1),
        (vec![failed(), started(After)], 1),
    ] {
        assert_eq!(follow(&events), Err(at), "{events:?}");
    }
}

#[test]
fn illegal_histories_are_refused_at_the_event_that_breaks_them() {
    let planned = || Event::from(OperationPlanned { steps: vec![] });
    let failed = || Event::from(OperationFailed { failure: failure() });
    for (events, at) in [
        (vec![started(0)], 0),
        (vec![planned(), started(1)], 1),
        (vec![planned(), started(0), started(0)], 2),
        (vec![planned(), started(0), finished(1)], 2),
        (vec![planned(), started(0), failed()], 2),
        (vec![planned(), started(0), finished(0), failed()], 3),
        (vec![planned(), started(0), finished(0), OperationSucceeded {}.into()], 3),
        (vec![planned(), started(0), finished(0), started(1), undo(0)], 4),
        (vec![planned(), started(0), finished(0), started(1), undo(1), undone(1), failed()], 6),
        (vec![planned(), planned()], 1),
        (vec![failed(), failed()], 1),
    ] {
        assert_eq!(run(&events), Err(at), "{events:?}");
    }
}
