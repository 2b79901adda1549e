//! Submitting a request, driving it to its outcome, and telling what came of it.

use anyhow::Result;
use snaptree_engine::DomainId;
use snaptree_engine::command::Command;
use snaptree_engine::engine::{DryRun, Submitted};
use snaptree_engine::layer::MemoryWay;
use snaptree_engine::operation::{Outcome, Request};
use snaptree_engine::project::DomainState;
use snaptree_engine::reconcile::merge::Verdict;
use snaptree_engine::reconcile::worker::{Carried, Driven};
use snaptree_engine::{OperationId, SnapshotId};

use super::history::{learn_names, names_in};
use crate::args::snapshot::Wait;
use crate::context::{Context, Missing, Reader, Writer};
use crate::exit::{ErrorView, Exit, Told, Trouble, exit_of, in_words, told, whole};
use crate::render;
use crate::render::operation::{Cost, MergeView, OperationView, done, planned};
use crate::render::text::{Look, safe, short};
use crate::render::view::{FreesView, current_name, domain_name};
use crate::render::words::{Known, way};
use crate::story::{StepOutcome, StepView, Story};

/// A request that becomes an operation.
pub struct Asked<'a> {
    /// The domain's name or id.
    pub domain: &'a str,
    /// What is asked.
    pub command: Command,
    /// The key that makes it idempotent.
    pub key: Option<&'a str>,
    /// Whether its outcome is waited for.
    pub wait: Wait,
}

/// A request for which these names inside the images are given up, if there are any.
pub fn giving_up(names: Vec<String>, request: Command) -> Command {
    if names.is_empty() {
        return request;
    }
    Command::GivingUp { names: names.into_iter().collect(), request: Box::new(request) }
}

/// Submits a request, carries it out, and prints its outcome.
///
/// # Errors
/// It was rejected, or the state cannot be used.
pub async fn carry(context: &Context, writer: &Writer, asked: &Asked<'_>) -> Result<Exit> {
    if asked.wait == Wait::Detached && !writer.office.works_on_alone() {
        return Err(Trouble::new(
            Exit::Refused,
            "no-daemon",
            "--detach needs a daemon, and none has the state",
        )
        .hint("start one with `snaptree serve`, or leave --detach out")
        .into());
    }
    let domain = writer.engine.find_domain(asked.domain).await?;
    let operation = match writer.office.submit(domain, &asked.command, asked.key).await? {
        Submitted::Operation(operation) | Submitted::Repeated(operation) => operation,
        Submitted::Recorded => return Ok(Exit::Done),
    };
    match asked.wait {
        Wait::ToTheEnd => finish(context, writer, domain, operation).await,
        Wait::Detached => detached(context, writer, domain, operation).await,
    }
}

/// Prints an operation that is not waited for.
async fn detached(
    context: &Context,
    writer: &Writer,
    domain: DomainId,
    operation: OperationId,
) -> Result<Exit> {
    let driven = Driven { carried: Vec::new(), state: writer.engine.load(domain).await? };
    let Some((view, story)) = account(writer, domain, operation, &driven).await? else {
        return Ok(Exit::Failed);
    };
    if context.json {
        render::json(&view)?;
    } else {
        render::print(&format!(
            "{} of {} is under way: `snaptree op show {}`\n",
            view.kind,
            safe(&view.domain),
            short(story.id)
        ))?;
    }
    Ok(Exit::Done)
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
    let driven = writer.office.finish(domain, operation).await;
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
    let driven = writer.office.cancel(domain, operation).await?;
    let Some((view, story)) = account(writer, domain, operation, &driven).await? else {
        return Ok(Exit::Failed);
    };
    match story.outcome {
        // What was asked for here has happened, and is no failure.
        Some(Outcome::Cancelled) if context.json => render::json(&view).map(|()| Exit::Done),
        Some(Outcome::Cancelled) => {
            let (kind, domain) = (view.kind, safe(&view.domain));
            let id = short(story.id);
            render::print(&format!(
                "Cancelled the {kind} of {domain}, which is as it was (operation {id}).\n"
            ))?;
            Ok(Exit::Done)
        }
        outcome => {
            let exit = report(context, writer, domain, operation, &Ok(driven)).await?;
            if outcome != Some(Outcome::Succeeded) {
                return Ok(exit);
            }
            render::note("it was past its point of no return, and could only be carried through");
            Ok(Exit::Refused)
        }
    }
}

/// Prints what came of an operation.
///
/// # Errors
/// The state cannot be read.
pub async fn report(
    context: &Context,
    writer: &Writer,
    domain: DomainId,
    operation: OperationId,
    driven: &Result<Driven>,
) -> Result<Exit> {
    let (driven, problem) = match driven {
        Ok(driven) => (driven.clone(), None),
        Err(error) => (Driven { carried: Vec::new(), state: writer.engine.load(domain).await? }, Some(error)),
    };
    let Some((mut view, story)) = account(writer, domain, operation, &driven).await? else {
        return Ok(Exit::Failed);
    };
    note_memory(&driven.state, &story);
    note_others(&driven.carried, &story);
    let mut told_problem = problem.map(told);
    if story.outcome.is_some() {
        // The request has its outcome; what failed came after it.
        if let Some(problem) = told_problem.take() {
            render::note(&in_words(&problem));
        }
    }
    print(context, &mut view, &story, told_problem)
}

/// Says that a guest was stopped for longer than need be.
fn note_memory(state: &DomainState, story: &Story) {
    let kept = story.request.snapshots().into_iter().find_map(|id| state.layers.memory.get(&id));
    let (Request::Create(_), Some(MemoryWay::Stopped)) = (&story.request, kept.map(|memory| memory.way))
    else {
        return;
    };
    render::note(&format!(
        "the guest was stopped while its memory was written: this QEMU and kernel cannot write it while it runs \
         (`snaptree log --operation {}` tells why)",
        story.id
    ));
}

/// An operation as it is told; none if the log has no request for it.
async fn account(
    writer: &Writer,
    domain: DomainId,
    operation: OperationId,
    driven: &Driven,
) -> Result<Option<(OperationView, Story)>> {
    let Driven { carried, state } = driven;
    let events = writer.engine.operation_events(operation).await?;
    let Some(story) = Story::of(&events) else { return Ok(None) };
    let mut known = Known::default();
    let unnamed = |id: &SnapshotId| names_in(state, *id).is_none() && !story.names.contains_key(id);
    if story.request.snapshots().iter().any(unnamed) {
        learn_names(&writer.engine, &mut known, domain, u64::MAX).await?;
    }
    Ok(Some((view_of(&story, state, carried, &known), story)))
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
        view.error = Some(whole(problem));
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
        Some(_) if !story.deleted.is_empty() => {
            "what is deleted stays so, and its data is merged later: `snaptree tree --all` shows it"
        }
        Some(_) if story.steps.iter().any(|step| step.outcome == StepOutcome::Done) => {
            "what was done before that stays so"
        }
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

/// Tells of operations that had been cut short and were carried through first, and of what is kept.
fn note_others(carried: &[Carried], story: &Story) {
    let kept = match &story.request {
        Request::Revert(revert) => revert.keep,
        _ => None,
    };
    for other in carried {
        if other.operation.id == story.id || matches!(other.operation.request, Request::Merge(_)) {
            continue;
        }
        if let Request::Create(create) = &other.operation.request
            && kept == Some(create.snapshot)
        {
            let name = safe(create.name.as_str());
            let outcome = match (&other.outcome, &other.failure) {
                (Some(Outcome::Succeeded), _) => format!("what was there is kept as '{name}'"),
                (_, Some(failure)) => format!("'{name}' was not taken: {}", safe(&failure.message)),
                (_, None) => format!("'{name}' was not taken"),
            };
            render::note(&format!("note: {outcome}\n"));
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
    let left_out = match &story.request {
        Request::Create(request) => {
            state.tree.get(request.snapshot).map(|snapshot| snapshot.left_out.clone())
        }
        Request::Revert(request) => Some(state.left_by_revert(request.snapshot)),
        _ => None,
    };
    let left_out = left_out.unwrap_or_default();
    OperationView {
        operation: Some(story.id),
        outcome: story.outcome_word(),
        snapshot: snapshots.first().cloned(),
        snapshots,
        current: current_name(state),
        steps: story.steps.clone(),
        merges: merges(story, state, carried, &name),
        left: story.left.clone(),
        left_out,
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
    let Reader { engine, .. } = context.planner().await?;
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

/// What a request would take for good, where that can be told before it is made.
pub async fn would_lose(context: &Context, asked: &Asked<'_>) -> Vec<String> {
    let tried = async {
        let Reader { engine, .. } = context.planner().await?;
        let domain = engine.find_domain(asked.domain).await?;
        let run = engine.dry_run(&crate::requester::this_user(), domain, &asked.command).await?;
        anyhow::Ok(run.plan.lost)
    };
    // What stands in the way is told when it is asked for.
    tried.await.unwrap_or_default()
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
        frees: run.frees.map(FreesView::from),
        lost: run.plan.lost.clone(),
    };
    let mut merges = Vec::new();
    for verdict in &run.merges {
        match verdict {
            Verdict::Merge(plan) => {
                cost.bytes_moved = cost.bytes_moved.saturating_add(plan.bytes_moved);
                cost.bytes_freed = cost.bytes_freed.saturating_add(plan.bytes_freed);
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
        left_out: run.plan.left_out.clone(),
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
pub async fn open(context: &Context, args: &crate::args::WriterArgs) -> Result<Writer> {
    context.writer(args, Missing::Refuse).await
}
