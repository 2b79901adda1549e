//! Submitting a request, driving it to its outcome, and telling what came of it.

use std::future::Future;
use std::time::Duration;

use anyhow::Result;
use snaptree_engine::DomainId;
use snaptree_engine::command::Command;
use snaptree_engine::engine::{DryRun, Engine, EngineError, Requester, Stop, Submitted};
use snaptree_engine::operation::{Outcome, Request};
use snaptree_engine::project::DomainState;
use snaptree_engine::reconcile::merge::Verdict;
use snaptree_engine::reconcile::worker::{Carried, Driven};
use snaptree_engine::{OperationId, SnapshotId};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;

use super::history::{learn_names, names_in};
use crate::context::{Context, Missing, Reader, Writer};
use crate::exit::{ErrorView, Exit, Told, Trouble, exit_of, in_one, in_words, told};
use crate::progress::Shown;
use crate::render;
use crate::render::operation::{Cost, MergeView, OperationView, done, planned};
use crate::render::text::{Look, safe, short};
use crate::render::view::{current_name, domain_name};
use crate::render::words::{Known, way};
use crate::story::{StepOutcome, StepView, Story};

/// The process's exit code after a second Ctrl-C: 128 and the signal, as shells have it.
const INTERRUPTED: i32 = 130;

/// How long the step in hand may go on after a signal. Service managers and people give a program 10 s.
const PARK_AFTER: Duration = Duration::from_secs(8);

/// A request that becomes an operation.
pub struct Asked<'a> {
    /// The domain's name or id.
    pub domain: &'a str,
    /// What is asked.
    pub command: Command,
    /// The key that makes it idempotent.
    pub key: Option<&'a str>,
}

/// Submits a request, carries it out, and prints its outcome.
///
/// # Errors
/// It was rejected, or the state cannot be used.
pub async fn carry(context: &Context, writer: &Writer, asked: &Asked<'_>) -> Result<Exit> {
    let Writer { engine, requester } = writer;
    let domain = engine.find_domain(asked.domain).await?;
    match engine.submit(requester, domain, &asked.command, asked.key).await? {
        Submitted::Operation(operation) | Submitted::Repeated(operation) => {
            finish(context, writer, domain, operation).await
        }
        Submitted::Recorded => Ok(Exit::Done),
    }
}

/// Drives a domain until `operation` is over or rests, and prints what came of it.
///
/// # Errors
/// The state cannot be read.
pub async fn finish(
    context: &Context,
    writer: &Writer,
    domain: DomainId,
    operation: OperationId,
) -> Result<Exit> {
    let driven = drive(&writer.engine, &writer.requester, domain).await;
    report(context, writer, domain, operation, &driven).await
}

/// Takes an operation back, and prints what came of it.
///
/// # Errors
/// It is not open, or the state cannot be read.
pub async fn call_off(
    context: &Context,
    writer: &Writer,
    domain: DomainId,
    operation: OperationId,
) -> Result<Exit> {
    let Writer { engine, requester } = writer;
    let shown = Shown::on_stderr();
    let work = engine.cancel(requester, domain, operation, &shown);
    let driven = heeding(engine.stop_handle(), &shown, work).await;
    shown.end();
    let driven = Ok(driven?);
    let exit = report(context, writer, domain, operation, &driven).await?;
    let carried = driven.iter().flat_map(|driven| &driven.carried);
    match carried.filter(|carried| carried.operation.id == operation).find_map(|carried| carried.outcome) {
        Some(Outcome::Cancelled) => Ok(Exit::Done),
        Some(Outcome::Succeeded) => {
            render::note("it was past its point of no return, and could only be carried through");
            Ok(Exit::Refused)
        }
        _ => Ok(exit),
    }
}

/// Prints what came of an operation.
async fn report(
    context: &Context,
    writer: &Writer,
    domain: DomainId,
    operation: OperationId,
    driven: &Result<Driven>,
) -> Result<Exit> {
    let engine = &writer.engine;
    let (carried, problem) = match driven {
        Ok(driven) => (driven.carried.as_slice(), None),
        Err(error) => (&[][..], Some(error)),
    };
    note_recovered(carried, operation);
    let events = engine.operation_events(operation).await?;
    let Some(story) = Story::of(&events) else { return Ok(Exit::Failed) };
    let state = match driven {
        Ok(driven) => driven.state.clone(),
        Err(_) => engine.load(domain).await?,
    };
    let mut known = Known::default();
    if story
        .request
        .snapshots()
        .iter()
        .any(|id| names_in(&state, *id).is_none() && !story.names.contains_key(id))
    {
        learn_names(engine, &mut known, domain, u64::MAX).await?;
    }
    let mut view = view_of(&story, &state, carried, &known);
    let mut told_problem = problem.map(told);
    if story.outcome.is_some() {
        // The request has its outcome; what failed came after it.
        if let Some(problem) = told_problem.take() {
            render::note(&in_words(&problem));
        }
    }
    print(context, &mut view, &story, told_problem)
}

/// Prints the outcome of an operation, and says how the program ends with it.
fn print(context: &Context, view: &mut OperationView, story: &Story, problem: Option<Told>) -> Result<Exit> {
    let exit = match (story.outcome, &story.failure) {
        (Some(Outcome::Succeeded), _) => Exit::Done,
        (Some(_), Some(failure)) if failure.refused => match exit_of(failure) {
            Exit::NotFound => Exit::Refused,
            exit => exit,
        },
        (Some(_), _) => Exit::Failed,
        (None, _) => Exit::Attention,
    };
    if let Some(problem) = &problem {
        view.error = Some(in_one(problem));
    }
    if context.json {
        render::json(view)?;
        return Ok(exit);
    }
    if exit == Exit::Done {
        render::print(&done(view, &Look::of_stdout()))?;
        return Ok(exit);
    }
    match problem {
        Some(problem) => {
            let (kind, domain) = (view.kind, safe(&view.domain));
            let open = format!("  the {kind} of {domain} is not over (operation {})", short(story.id));
            render::note(&format!("{}{open}\n", in_words(&problem)));
        }
        None => render::note(&failed(view, story)),
    }
    Ok(exit)
}

/// The sentence on an operation that did not succeed.
fn failed(view: &OperationView, story: &Story) -> String {
    let reason = view.error.as_ref().map_or("it waits behind another operation", |error| &*error.message);
    let touched = story.steps.iter().any(|step| step.outcome != StepOutcome::NotDone);
    let end = match story.outcome {
        Some(Outcome::Cancelled) => "it was called off, and the domain is as it was",
        Some(Outcome::Expired) => "it came too late, and nothing was changed",
        Some(_) if touched => "what was done is taken back, and the domain is as it was",
        Some(_) => "nothing was changed",
        None if story.needs_attention => "it can go neither on nor back by itself",
        None => "it is not over",
    };
    let mut text = format!("error: {} of {}: {}\n", view.kind, safe(&view.domain), safe(reason));
    text.push_str(&format!("  {end} (operation {})\n", short(story.id)));
    let hint = view.error.as_ref().and_then(|error| error.hint.clone());
    let hint = hint.or_else(|| match story.outcome {
        Some(_) => None,
        None if story.needs_attention => Some(format!(
            "`snaptree op show {0}` tells its story, `snaptree op retry {0}` tries again, \
             `snaptree op resolve {0}` says what became of it",
            short(story.id)
        )),
        None => Some("`snaptree recover` finishes it".to_owned()),
    });
    if let Some(hint) = hint {
        text.push_str(&format!("hint: {}\n", safe(&hint)));
    }
    text
}

/// Drives a domain with a progress bar and with Ctrl-C in mind.
///
/// # Errors
/// The state cannot be written, or the hypervisor cannot be asked.
pub async fn drive(engine: &Engine, requester: &Requester, domain: DomainId) -> Result<Driven> {
    let shown = Shown::on_stderr();
    let driven = heeding(engine.stop_handle(), &shown, engine.drive(requester, domain, &shown)).await;
    shown.end();
    driven
}

/// Runs `work`; the first Ctrl-C asks it to end, the second ends the process. A step that goes on for too long after
/// the first is parked: what works for it is left alone, and recovery waits for it.
///
/// # Errors
/// The work's own, or it was parked.
pub async fn heeding<T>(
    stop: Stop,
    shown: &Shown,
    work: impl Future<Output = Result<T, EngineError>>,
) -> Result<T> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let park = tokio::time::sleep(Duration::MAX);
    tokio::pin!(work, park);
    loop {
        tokio::select! {
            biased;
            done = &mut work => return Ok(done?),
            () = &mut park => return Err(parked().into()),
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        if stop.asked() {
            shown.end();
            render::note("ended at once; `snaptree recover` finishes what is open");
            std::process::exit(INTERRUPTED);
        }
        stop.ask();
        park.as_mut().reset(Instant::now() + PARK_AFTER);
        shown.say(
            "ending after this step: what can be taken back is, the rest is left to `snaptree recover` \
                   (Ctrl-C again ends at once)",
        );
    }
}

fn parked() -> Trouble {
    let message =
        format!("the step in hand did not end within {} s and was left as it is", PARK_AFTER.as_secs());
    Trouble::new(Exit::Attention, "parked", message)
        .hint("`snaptree recover` waits for what still works for it, and finishes it")
}

/// Tells of operations that had been cut short and were carried through first.
fn note_recovered(carried: &[Carried], ours: OperationId) {
    for other in carried {
        if other.operation.id == ours || matches!(other.operation.request, Request::Merge(_)) {
            continue;
        }
        let outcome = other.outcome.map_or("still open", Outcome::as_str);
        let found = other.found.as_deref().map(|found| format!(" ({found})")).unwrap_or_default();
        render::note(&format!(
            "note: first went on with operation {}, a {} that had been cut short{}: {outcome}",
            short(other.operation.id),
            other.operation.request.kind(),
            safe(&found),
        ));
    }
}

fn view_of(story: &Story, state: &DomainState, carried: &[Carried], known: &Known) -> OperationView {
    let name = |id: SnapshotId| {
        let name = story.names.get(&id).cloned().or_else(|| names_in(state, id));
        name.or_else(|| known.snapshot_name(id).map(str::to_owned)).unwrap_or_else(|| id.to_string())
    };
    let ids = story.request.snapshots();
    let snapshots: Vec<String> = ids.iter().map(|id| name(*id)).collect();
    let parent = match &story.request {
        Request::Create(request) => {
            let parent = state.tree.get(request.snapshot).and_then(|snapshot| snapshot.parent);
            parent.and_then(|id| state.tree.get(id)).map(|parent| parent.name.to_string())
        }
        _ => None,
    };
    OperationView {
        operation: Some(story.id),
        outcome: story.outcome_word(),
        snapshot: snapshots.first().cloned(),
        snapshots,
        current: current_name(state),
        steps: story.steps.clone(),
        merges: merges(story, state, carried, &name),
        left: story.left.clone(),
        cost: None,
        error: story.failure.as_ref().map(ErrorView::from),
        kind: story.request.kind(),
        domain: domain_name(state),
        parent,
    }
}

/// What became of the data of the snapshots that an operation deleted.
fn merges(
    story: &Story,
    state: &DomainState,
    carried: &[Carried],
    name: &impl Fn(SnapshotId) -> String,
) -> Vec<MergeView> {
    let mut views = Vec::new();
    let mut tried = Vec::new();
    for other in carried {
        let Request::Merge(request) = &other.operation.request else { continue };
        for id in request.plan.snapshots.iter().filter(|id| story.deleted.contains(id)) {
            let failure = other.failure.as_ref().map(|failure| failure.message.clone());
            tried.push((*id, other.outcome));
            views.push(MergeView {
                operation: Some(other.operation.id),
                snapshot: name(*id),
                outcome: other.outcome.map(Outcome::as_str),
                reason: failure.or_else(|| Some(way(&request.plan))),
            });
        }
    }
    let deferred = state.tombstones.iter().filter(|(id, _)| {
        let failed =
            tried.iter().any(|(tried, outcome)| tried == *id && *outcome != Some(Outcome::Succeeded));
        story.deleted.contains(id) && !failed
    });
    views.extend(deferred.map(|(id, stone)| MergeView {
        operation: None,
        snapshot: name(*id),
        outcome: Some("deferred"),
        reason: Some(stone.deferred.clone().unwrap_or_else(|| "not looked at yet".to_owned())),
    }));
    views
}

/// Prints what a request would do. No lock, no event.
///
/// # Errors
/// It would be rejected, or the hypervisor cannot be asked.
pub async fn dry_run(context: &Context, asked: &Asked<'_>) -> Result<Exit> {
    let Reader { engine, .. } = context.planner()?;
    let domain = engine.find_domain(asked.domain).await?;
    let run = engine.dry_run(&crate::requester::this_user(), domain, &asked.command).await?;
    let view = dry_view(&run);
    if context.json {
        render::json(&view)?;
    } else {
        render::print(&planned(&view, &Look::of_stdout()))?;
    }
    Ok(Exit::Done)
}

fn dry_view(run: &DryRun) -> OperationView {
    let name = |id: SnapshotId| match &run.request {
        Request::Create(request) => request.name.to_string(),
        _ => names_in(&run.state, id).unwrap_or_else(|| id.to_string()),
    };
    let mut cost = Cost {
        bytes_moved: run.plan.bytes_moved,
        bytes_freed: run.plan.bytes_freed,
        peak_space: run.plan.peak_space_bytes,
        lost: run.plan.lost.clone(),
    };
    let mut merges = Vec::new();
    for verdict in &run.merges {
        match verdict {
            Verdict::Merge(plan) => {
                cost.bytes_moved = cost.bytes_moved.saturating_add(plan.bytes_moved);
                cost.bytes_freed = cost.bytes_freed.saturating_add(plan.bytes_freed);
                // What is copied is there twice until the tombstone goes.
                cost.peak_space = cost.peak_space.max(plan.bytes_moved);
                merges.extend(plan.snapshots.iter().map(|id| MergeView {
                    operation: None,
                    snapshot: name(*id),
                    outcome: Some("planned"),
                    reason: Some(way(plan)),
                }));
            }
            Verdict::Defer { snapshot, reason } => merges.push(MergeView {
                operation: None,
                snapshot: name(*snapshot),
                outcome: Some("deferred"),
                reason: Some(reason.clone()),
            }),
        }
    }
    let snapshots: Vec<String> = run.request.snapshots().into_iter().map(name).collect();
    let current = match &run.request {
        Request::Create(_) | Request::Revert(_) => snapshots.first().cloned(),
        _ => current_name(&run.after),
    };
    let step = |step: &snaptree_engine::operation::Step| StepView {
        name: step.name.clone(),
        outcome: StepOutcome::Planned,
    };
    OperationView {
        operation: None,
        outcome: Some("planned"),
        snapshot: snapshots.first().cloned(),
        snapshots,
        current,
        steps: run.plan.steps.iter().map(step).collect(),
        merges,
        left: Vec::new(),
        cost: Some(cost),
        error: None,
        kind: run.request.kind(),
        domain: domain_name(&run.state),
        parent: None,
    }
}

/// Opens the state for a request on something that must be there.
///
/// # Errors
/// It is not there, or cannot be used.
pub fn open(context: &Context, args: &crate::args::WriterArgs) -> Result<Writer> {
    context.writer(args, Missing::Refuse)
}
