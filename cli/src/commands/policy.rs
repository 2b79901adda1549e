//! `snaptree policy ...`

use std::io::Read as _;
use std::num::NonZeroU32;
use std::path::Path;

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use serde::Serialize;
use snaptree_engine::engine::Engine;
use snaptree_engine::event::{Actor, PolicyRequest};
use snaptree_engine::project::DomainState;
use snaptree_policies::file::{FILE_BYTES_MAX, Policy};
use snaptree_policies::retention::{LongRun, long_run};
use snaptree_policies::runner::{
    Book, Chosen, ClockState, Entry, For, PolicyState, Run, RunOutcome, agenda, chosen, depth_max,
    failure_of, outcome_of, plan_of, told,
};

use crate::args::policy::{PolicyCommand, RemoveArgs, RunArgs, SetArgs};
use crate::confirm::confirm;
use crate::context::{Context, Missing, Writer};
use crate::exit::{ErrorView, Exit, Trouble, is_of_one_domain};
use crate::office::{domains_of, in_engine, readable, sick};
use crate::render;
use crate::render::policy::{
    DeleteView, DomainPlanView, EntryView, HookView, NextView, PlanView, PolicyView, RanView, RunView,
    SetView, What, changes,
};
use crate::render::text::{Look, count, safe};
use crate::story::Story;
use crate::wire::{ClockView, LeftOut, PolicyAsk};

use super::carry::open;

/// Carries out a command on policies.
///
/// # Errors
/// It was rejected, or the state cannot be used.
pub async fn run(context: &Context, command: PolicyCommand) -> Result<Exit> {
    match command {
        PolicyCommand::Set(args) => set(context, args).await,
        PolicyCommand::List => list(context).await,
        PolicyCommand::Show { name } => show(context, &name).await,
        PolicyCommand::Plan { name, domain } => plan(context, &name, domain.as_deref()).await,
        PolicyCommand::Run(args) => run_now(context, args).await,
        PolicyCommand::Runs { name, count } => runs(context, name.as_deref(), count).await,
        PolicyCommand::Next { count } => next(context, usize::from(count)).await,
        PolicyCommand::Suspend(args) => {
            let writer = open(context, &args.writer).await?;
            let ask = PolicyAsk::Suspend { name: args.name.clone(), reason: args.reason };
            recorded(context, &writer, ask, &args.name, "suspended").await
        }
        PolicyCommand::Resume(args) => {
            let writer = open(context, &args.writer).await?;
            let ask = PolicyAsk::Resume { name: args.name.clone() };
            recorded(context, &writer, ask, &args.name, "running").await
        }
        PolicyCommand::ConfirmClock(args) => {
            let writer = open(context, &args.writer).await?;
            writer.office.policy(PolicyAsk::ConfirmClock).await?;
            if context.json {
                render::json(&serde_json::json!({ "clock": "believed" }))?;
            } else {
                render::print("The clock is believed: policies delete again, after their next runs.\n")?;
            }
            Ok(Exit::Done)
        }
        PolicyCommand::Remove(args) => remove(context, args).await,
    }
}

/// The document of `policy suspend`, `resume` and `remove`.
#[derive(Serialize)]
struct Standing<'a> {
    name: &'a str,
    state: &'a str,
}

async fn recorded(
    context: &Context,
    writer: &Writer,
    ask: PolicyAsk,
    name: &str,
    state: &str,
) -> Result<Exit> {
    writer.office.policy(ask).await?;
    if context.json {
        render::json(&Standing { name, state })?;
    } else {
        render::print(&format!("Policy '{}' is {state}.\n", safe(name)))?;
    }
    Ok(Exit::Done)
}

async fn remove(context: &Context, args: RemoveArgs) -> Result<Exit> {
    confirm(&format!("End policy '{}'? Its snapshots stay.", args.name), args.yes)?;
    let writer = open(context, &args.writer).await?;
    let ask = PolicyAsk::Remove { name: args.name.clone() };
    recorded(context, &writer, ask, &args.name, "removed").await
}

fn source_of(file: &Path) -> Result<String> {
    let limit = u64::try_from(FILE_BYTES_MAX)?.saturating_add(1);
    let mut bytes = Vec::new();
    if file == Path::new("-") {
        std::io::stdin().lock().take(limit).read_to_end(&mut bytes).context("cannot read standard input")?;
    } else {
        let opened = std::fs::File::open(file).with_context(|| format!("cannot read {}", file.display()))?;
        opened
            .take(limit)
            .read_to_end(&mut bytes)
            .with_context(|| format!("cannot read {}", file.display()))?;
    }
    String::from_utf8(bytes)
        .map_err(|_| Trouble::new(Exit::Refused, "invalid", "the policy file is not UTF-8").into())
}

async fn set(context: &Context, args: SetArgs) -> Result<Exit> {
    let source = source_of(&args.file)?;
    let policy = Policy::from_toml(&source).map_err(|error| in_engine(error.into()))?;
    let writer = if args.dry_run { None } else { Some(context.writer(&args.writer, Missing::Make).await?) };
    let engine = match &writer {
        Some(writer) => writer.engine.clone(),
        None => context.reader().await?.engine,
    };
    let book = Book::read(&engine).await?;
    let known = book.get(&policy.name).and_then(PolicyState::policy);
    let defined = book.get(&policy.name).is_some_and(PolicyState::is_there);
    let view = SetView {
        name: policy.name.clone(),
        change: match known {
            Some(known) if *known == policy => "same",
            _ if defined => "changed",
            _ => "new",
        },
        changes: known.map(|known| changes(known, &policy)).unwrap_or_default(),
        dry_run: args.dry_run,
        plan: plan_view(&engine, &policy, &chosen(&engine, &policy).await?).await?,
    };
    tell_unquiesced(&engine, &policy).await?;
    let text = render::policy::set(&view, &Look::of_stdout());
    if let Some(writer) = writer {
        let going = view.plan.deletes();
        if going > 0 {
            if !context.json {
                render::note(&text);
            }
            let question = format!(
                "With this policy {} would be deleted after its next runs. Go on?",
                count(going, "snapshot")
            );
            confirm(&question, args.yes)?;
        }
        writer.office.policy(PolicyAsk::Set { source }).await?;
    }
    if context.json {
        render::json(&view)?;
    } else {
        render::print(&text)?;
    }
    Ok(Exit::Done)
}

/// Says which machines would take no snapshot under a policy that wants them quiesced.
async fn tell_unquiesced(engine: &Engine, policy: &Policy) -> Result<()> {
    if !policy.snapshot.quiesce {
        return Ok(());
    }
    for domain in chosen(engine, policy).await? {
        // One that cannot be looked at is told of with the plan.
        let Ok(state) = engine.load(domain.id).await else { continue };
        let kind = state.domain.filter(|domain| !domain.capabilities.quiesce).map(|domain| domain.driver);
        if let Some(kind) = kind {
            let name = safe(domain.name.as_str());
            render::note(&format!(
                "domain '{name}' cannot be quiesced ({kind}): its runs will be refused while snapshot.quiesce is set"
            ));
        }
    }
    Ok(())
}

async fn plan_view(engine: &Engine, policy: &Policy, domains: &[Chosen]) -> Result<PlanView> {
    let now = Timestamp::now();
    let clock = ClockState::read(engine).await?;
    let lasting = long_run(&policy.schedule, &policy.keep, now, policy.zone());
    let mut notes = Vec::new();
    if domains.is_empty() {
        notes.push(matches_nothing(policy));
    }
    let (mut views, mut left_out) = (Vec::with_capacity(domains.len()), Vec::new());
    for domain in domains {
        let state = match engine.load(domain.id).await {
            Ok(state) => state,
            Err(error) if error.spares_others() => {
                left_out.push(LeftOut::new(&domain.name, error));
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let plan = plan_of(policy, &state, now, For::Show, clock.trust());
        notes.extend(notes_on(policy, &state, lasting));
        views.push(DomainPlanView::of(domain.name.clone(), &state, &plan));
    }
    Ok(PlanView {
        policy: policy.name.clone(),
        clock: clock.doubt.map(ClockView::from),
        notes,
        max_depth: policy.max_depth.get(),
        long_run: lasting.into(),
        domains: views,
        left_out,
    })
}

/// That a policy does nothing as it is.
fn matches_nothing(policy: &Policy) -> String {
    format!(
        "policy '{}' is for no registered domain, and takes no snapshot: `snaptree domain list` lists the domains",
        policy.name
    )
}

/// What an administrator should know of a policy on a domain before its runs tell.
fn notes_on(policy: &Policy, state: &DomainState, lasting: LongRun) -> Vec<String> {
    let Some(domain) = &state.domain else { return Vec::new() };
    let mut notes = Vec::new();
    let keeps = match lasting {
        LongRun::Levels { snapshots } => Some(snapshots),
        LongRun::MoreThan { .. } | LongRun::Grows => None,
    };
    let room = depth_max(state).map(NonZeroU32::get).filter(|room| *room < policy.max_depth.get());
    let too_many =
        |room: &u32| keeps.is_none_or(|keeps| keeps > usize::try_from(*room).unwrap_or(usize::MAX));
    if let Some(room) = room.filter(too_many) {
        let keeps = keeps.map_or("all".to_owned(), |keeps| keeps.to_string());
        notes.push(format!(
            "{}: the policy would keep {keeps}; {} takes {} snapshots in a row, so {room} are kept and the oldest of the \
             finest rule go",
            domain.name, domain.driver, domain.capabilities.depth_max
        ));
    }
    let alike = format!("{}-", policy.name);
    let adopted = state
        .tree
        .iter()
        .filter(|snapshot| snapshot.made_by == Actor::Engine && snapshot.name.as_str().starts_with(&alike));
    let adopted = adopted.count();
    if adopted > 0 {
        notes.push(format!(
            "{}: {} named like this policy's were found at the hypervisor when the domain was added, and no policy deletes \
             them: `snaptree delete` does",
            domain.name,
            count(adopted, "snapshot")
        ));
    }
    notes
}

async fn list(context: &Context) -> Result<Exit> {
    let engine = context.reader().await?.engine;
    let book = Book::read(&engine).await?;
    let mut views = Vec::new();
    for state in book.defined() {
        views.push(policy_view(&engine, state).await?);
    }
    if context.json {
        render::json(&serde_json::json!({ "policies": views }))?;
    } else if views.is_empty() {
        render::note("no policy is defined; `snaptree policy set FILE` defines one");
    } else {
        render::print(&render::policy::list(&views, &Look::of_stdout()))?;
    }
    Ok(Exit::Done)
}

async fn policy_view(engine: &Engine, state: &PolicyState) -> Result<PolicyView> {
    let policy = state.policy();
    let domains = match policy {
        Some(policy) => chosen(engine, policy).await?,
        None => Vec::new(),
    };
    let next = agenda(engine, [state], Timestamp::now(), 1).await?;
    let error = state.problem().map(str::to_owned);
    Ok(PolicyView {
        name: state.name.clone(),
        schedule: policy.map(|policy| policy.schedule.to_string()),
        timezone: policy.map(|policy| policy.timezone.to_string()),
        domains: domains.into_iter().map(|domain| domain.name).collect(),
        suspended: state.suspended.as_ref().map(|suspended| suspended.reason.clone()),
        last: state.last,
        next: next.first().map(|appointment| appointment.at),
        error,
    })
}

async fn show(context: &Context, name: &str) -> Result<Exit> {
    let engine = context.reader().await?.engine;
    let book = Book::read(&engine).await?;
    let state = book.find(name)?;
    let policy = readable(state)?;
    let domains = chosen(&engine, policy).await?;
    let definition = state.definition.as_ref();
    let names: Vec<&str> = domains.iter().map(|domain| domain.name.as_str()).collect();
    let lasting = long_run(&policy.schedule, &policy.keep, Timestamp::now(), policy.zone());
    if context.json {
        let suspended = state.suspended.as_ref().map(|suspended| {
            serde_json::json!({ "reason": suspended.reason, "by": suspended.by, "at": suspended.at })
        });
        render::json(&serde_json::json!({
            "name": state.name,
            "defined": definition.map(|definition| definition.at),
            "suspended": suspended,
            "domains": names,
            "policy": policy,
            "source": definition.map(|definition| &definition.source),
            "long_run": render::policy::LongRunView::from(lasting),
        }))?;
        return Ok(Exit::Done);
    }
    let look = Look::of_stdout();
    let mut text = format!("# Policy '{}'", state.name);
    if let Some(definition) = definition {
        text.push_str(&format!(", defined {}", look.time(definition.at)));
    }
    text.push('\n');
    if let Some(suspended) = &state.suspended {
        let (at, reason) = (look.time(suspended.at), safe(&suspended.reason));
        text.push_str(&format!("# suspended by {} {at}: {reason}\n", suspended.by));
    }
    text.push_str(&format!("# for {}: {}\n\n", count(names.len(), "domain"), safe(&names.join(", "))));
    for line in definition.map(|definition| definition.source.lines()).into_iter().flatten() {
        text.push_str(&safe(line));
        text.push('\n');
    }
    render::print(&text)?;
    Ok(Exit::Done)
}

async fn plan(context: &Context, name: &str, domain: Option<&str>) -> Result<Exit> {
    let engine = context.reader().await?.engine;
    let book = Book::read(&engine).await?;
    let policy = readable(book.find(name)?)?;
    let view = plan_view(&engine, policy, &domains_of(&engine, policy, domain).await?).await?;
    if context.json {
        render::json(&view)?;
    } else {
        render::print(&render::policy::plan(&view, &Look::of_stdout()))?;
    }
    Ok(Exit::Done)
}

async fn run_now(context: &Context, args: RunArgs) -> Result<Exit> {
    let writer = open(context, &args.writer).await?;
    let ask = PolicyAsk::Run { name: args.name.clone(), domain: args.domain };
    let answer = writer.office.policy(ask).await?;
    let (mut ended, mut left_out) = (Vec::with_capacity(answer.runs.len()), Vec::new());
    // The deletes of all are asked for before any is waited for: whoever carries them out does so side by side.
    for run in &answer.runs {
        let Some(create) = run.requests.first() else { continue };
        let outcome = created(&writer, run.domain, create).await?;
        let mut asked = Vec::new();
        if let Some(planned) = answer.planned.filter(|_| outcome.is_success() && !writer.office.is_ending()) {
            let ask = PolicyAsk::Retain { name: args.name.clone(), planned, domain: run.domain };
            match writer.office.policy(ask).await {
                Ok(answer) => asked = answer.runs.into_iter().flat_map(|run| run.requests).collect(),
                Err(error) if is_of_one_domain(&error) => left_out.push(LeftOut::new(&run.name, error)),
                Err(error) => return Err(error),
            }
        }
        ended.push((run, create, outcome, asked));
    }
    let mut runs = Vec::with_capacity(ended.len());
    for (run, create, outcome, asked) in ended {
        let mut deletes = Vec::with_capacity(asked.len());
        for request in &asked {
            let outcome = awaited(&writer, run.domain, request).await?;
            deletes.push(delete_view(&writer.engine, request, outcome).await?);
        }
        runs.push(ran_view(&writer.engine, run.name.clone(), create, outcome, deletes).await?);
    }
    let exit = match exit_of(&runs) {
        Exit::Done | Exit::Refused if !left_out.is_empty() => Exit::Failed,
        exit => exit,
    };
    // A daemon sees to it by itself, and tells whoever wants to hear of it.
    let suspended = if writer.office.works_on_alone() || exit == Exit::Done {
        None
    } else {
        writer.office.policy(PolicyAsk::Review { name: args.name.clone() }).await?.suspended
    };
    if let Some(reason) = &suspended {
        let resume = format!("`snaptree policy resume {}`", args.name);
        render::note(&safe(&format!("the policy does not run by itself any more, until {resume}: {reason}")));
    }
    let clock = ClockState::read(&writer.engine).await?.doubt.map(ClockView::from);
    if let Some(clock) = &clock {
        render::note(&safe(&clock.message));
    }
    let view = RunView { policy: args.name, planned: answer.planned, runs, left_out, suspended, clock };
    if context.json {
        render::json(&view)?;
    } else {
        render::print(&render::policy::run(&view, &Look::of_stdout()))?;
    }
    Ok(exit)
}

/// Waits for a snapshot; where somebody else has taken it meanwhile, there is nothing to wait for.
async fn created(
    writer: &Writer,
    domain: snaptree_engine::DomainId,
    request: &PolicyRequest,
) -> Result<RunOutcome> {
    match outcome_of(&writer.engine, request).await? {
        RunOutcome::Open => awaited(writer, domain, request).await,
        outcome => Ok(outcome),
    }
}

/// Waits for a request to end; what it failed with is told with its outcome.
async fn awaited(
    writer: &Writer,
    domain: snaptree_engine::DomainId,
    request: &PolicyRequest,
) -> Result<RunOutcome> {
    if let Some(operation) = request.operation
        && let Err(error) = writer.office.finish(domain, operation).await
    {
        render::note(&crate::exit::in_words(&crate::exit::told(&error)));
    }
    Ok(outcome_of(&writer.engine, request).await?)
}

/// The worst of what the runs and their deletes came to.
fn exit_of(runs: &[RanView]) -> Exit {
    let deletes = runs.iter().flat_map(|run| run.deletes.iter().map(|delete| delete.outcome));
    let all: Vec<_> = runs.iter().map(|run| run.outcome).chain(deletes).collect();
    let any = |words: &[Option<&str>]| all.iter().any(|outcome| words.contains(outcome));
    if any(&[None, Some("needs-attention")]) {
        Exit::Attention
    } else if any(&[Some("failed"), Some("cancelled"), Some("expired")]) {
        Exit::Failed
    } else if any(&[Some("refused")]) {
        Exit::Refused
    } else {
        Exit::Done
    }
}

/// Why a request did not come to what it asked for, as far as the log tells.
async fn error_of(
    engine: &Engine,
    request: &PolicyRequest,
    outcome: RunOutcome,
) -> Result<Option<ErrorView>> {
    if outcome.is_success() || outcome == RunOutcome::Open {
        return Ok(None);
    }
    let failure = failure_of(engine, request).await?;
    Ok(failure.as_ref().map(ErrorView::from))
}

async fn delete_view(engine: &Engine, request: &PolicyRequest, outcome: RunOutcome) -> Result<DeleteView> {
    Ok(DeleteView::of(request, outcome, error_of(engine, request, outcome).await?))
}

async fn ran_view(
    engine: &Engine,
    domain: snaptree_engine::DomainName,
    create: &PolicyRequest,
    outcome: RunOutcome,
    deletes: Vec<DeleteView>,
) -> Result<RanView> {
    let story = match create.operation {
        Some(operation) => Story::of(&engine.operation_events(operation).await?),
        None => None,
    };
    let error = error_of(engine, create, outcome).await?;
    let hooks = story.iter().flat_map(|story| &story.hooks).map(HookView::from).collect();
    Ok(RanView {
        domain,
        snapshot: create.snapshot.clone(),
        operation: create.operation,
        outcome: outcome.as_str(),
        error,
        hooks,
        deletes,
    })
}

async fn runs(context: &Context, name: Option<&str>, count: usize) -> Result<Exit> {
    let engine = context.reader().await?.engine;
    let book = Book::read(&engine).await?;
    if let Some(name) = name
        && !book.all().any(|state| state.name.as_str() == name)
    {
        book.find(name)?;
    }
    let mut entries: Vec<(&PolicyState, Entry)> = Vec::new();
    for state in book.all().filter(|state| name.is_none_or(|name| state.name.as_str() == name)) {
        entries.extend(told(&engine, state, count).await?.into_iter().map(|entry| (state, entry)));
    }
    let at = |entry: &Entry| match entry {
        Entry::Ran(run) => run.at,
        Entry::Skipped(skip) => skip.at,
    };
    entries.sort_by_key(|(_, entry)| std::cmp::Reverse(at(entry)));
    let mut views = Vec::new();
    for (state, entry) in entries.into_iter().take(count) {
        let what = match &entry {
            Entry::Ran(run) => ran(&engine, run).await?,
            Entry::Skipped(skip) => What::Skipped {
                domain: skip.skipped.name.clone(),
                first: skip.skipped.first,
                last: skip.skipped.last,
                count: skip.skipped.count,
                more: skip.skipped.more,
                why: skip.skipped.why.clone(),
            },
        };
        views.push(EntryView { policy: state.name.clone(), at: at(&entry), what });
    }
    let clock = ClockState::read(&engine).await?.doubt.map(ClockView::from);
    let mut notes = Vec::new();
    for state in book.defined().filter(|state| name.is_none_or(|name| state.name.as_str() == name)) {
        if let Some(policy) = state.policy()
            && chosen(&engine, policy).await?.is_empty()
        {
            notes.push(matches_nothing(policy));
        }
    }
    if context.json {
        render::json(&serde_json::json!({ "runs": views, "clock": clock, "notes": notes }))?;
        return Ok(Exit::Done);
    }
    clock.iter().map(|clock| &clock.message).chain(&notes).for_each(|note| render::note(&safe(note)));
    if views.is_empty() {
        render::note("nothing has run");
    } else {
        render::print(&render::policy::runs(&views, &Look::of_stdout()))?;
    }
    Ok(Exit::Done)
}

async fn ran(engine: &Engine, run: &Run) -> Result<What> {
    let mut deletes = Vec::new();
    for request in run.deletes.iter().flatten() {
        deletes.push(delete_view(engine, request, outcome_of(engine, request).await?).await?);
    }
    let outcome = outcome_of(engine, &run.create).await?;
    Ok(What::Ran {
        planned: run.planned,
        asked_by: run.asked_by.as_ref().map(ToString::to_string),
        ran: ran_view(engine, run.name.clone(), &run.create, outcome, deletes).await?,
    })
}

async fn next(context: &Context, count: usize) -> Result<Exit> {
    let engine = context.reader().await?.engine;
    let book = Book::read(&engine).await?;
    let coming = agenda(&engine, book.defined(), Timestamp::now(), count).await?;
    let view = |appointment: snaptree_policies::runner::Appointment| NextView {
        at: appointment.at,
        planned: appointment.planned,
        policy: appointment.policy,
        domain: appointment.domain.name,
    };
    let views: Vec<NextView> = coming.into_iter().map(view).collect();
    let sick = sick(&book);
    for (name, problem) in &sick {
        render::note(&safe(&format!(
            "policy '{name}' does not run, since it cannot be read: {problem}; `snaptree policy set` defines it anew"
        )));
    }
    if context.json {
        render::json(&serde_json::json!({ "runs": views, "sick_policies": sick }))?;
    } else if views.is_empty() {
        render::note("nothing will run; `snaptree policy list` lists the policies");
    } else {
        render::print(&render::policy::next(&views, &Look::of_stdout()))?;
    }
    Ok(Exit::Done)
}
