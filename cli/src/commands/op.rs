//! `snaptree op ...`: operations and their stories.

use anyhow::Result;
use serde::Serialize;
use snaptree_engine::OperationId;
use snaptree_engine::command::Command;
use snaptree_engine::engine::Submitted;
use snaptree_engine::event::{Course, Envelope, Event, StepFound};
use snaptree_engine::log::{OpenOnly, OperationFilter, OperationRow};
use snaptree_engine::operation::Outcome;

use super::carry::{call_off, finish, open};
use super::history::{find_operation, learn};
use crate::args::operation::{OpCommand, ResolveArgs};
use crate::context::Context;
use crate::exit::{ErrorView, Exit, Trouble};
use crate::render;
use crate::render::table::{Cell, table};
use crate::render::text::{Look, safe, short, took};
use crate::render::words::{Known, request_words, words};
use crate::story::{Cut, StepView, Story, cuts};

/// A row of `op list`.
#[derive(Serialize)]
struct Row {
    operation: OperationId,
    kind: String,
    domain: String,
    snapshot: Option<String>,
    outcome: Option<&'static str>,
    requested: jiff::Timestamp,
    finished: Option<jiff::Timestamp>,
}

/// The document of `op list`.
#[derive(Serialize)]
struct Rows {
    operations: Vec<Row>,
}

impl From<OperationRow> for Row {
    fn from(row: OperationRow) -> Self {
        let outcome = match (row.outcome, row.needs_attention) {
            (Some(outcome), _) => Some(outcome.as_str()),
            (None, true) => Some("needs-attention"),
            (None, false) => None,
        };
        Self {
            operation: row.id,
            kind: row.kind,
            domain: row.domain_name.to_string(),
            snapshot: row.snapshot,
            outcome,
            requested: row.requested,
            finished: row.finished,
        }
    }
}

/// Carries out a command on operations.
///
/// # Errors
/// There is no such operation, or the log cannot be read.
pub async fn run(context: &Context, command: OpCommand) -> Result<Exit> {
    match command {
        OpCommand::List { domain, open, limit } => list(context, domain.as_deref(), open, limit).await,
        OpCommand::Show { id } => show(context, &id).await,
        OpCommand::Cancel { id, writer } => {
            let writer = open(context, &writer).await?;
            let row = find_operation(&writer.engine, &id).await?;
            call_off(context, &writer, row.domain, row.id).await
        }
        OpCommand::Resolve(args) => resolve(context, args).await,
        OpCommand::Retry { id, writer } => {
            let writer = open(context, &writer).await?;
            let row = find_operation(&writer.engine, &id).await?;
            let command = Command::Retry(row.id);
            match writer.office.submit(row.domain, &command, None).await? {
                Submitted::Operation(operation) => finish(context, &writer, row.domain, operation).await,
                Submitted::Repeated(_) | Submitted::Recorded => Ok(Exit::Done),
            }
        }
    }
}

/// Says what became of the step in hand, and goes on from there.
async fn resolve(context: &Context, args: ResolveArgs) -> Result<Exit> {
    let writer = open(context, &args.writer).await?;
    let row = find_operation(&writer.engine, &args.id).await?;
    let verdict = args.verdict.verdict();
    let command = Command::Resolve { operation: row.id, verdict, reason: args.reason };
    writer.office.submit(row.domain, &command, None).await?;
    finish(context, &writer, row.domain, row.id).await
}

async fn list(context: &Context, domain: Option<&str>, open: bool, limit: usize) -> Result<Exit> {
    let reader = context.reader().await?;
    let domain = match domain {
        Some(domain) => Some(reader.find(domain).await?),
        None => None,
    };
    let filter = OperationFilter { domain, open: open.then_some(OpenOnly), operation: None, after: None };
    let rows: Vec<Row> =
        reader.engine.log().operations(&filter, limit).await?.into_iter().map(Row::from).collect();
    if context.json {
        render::json(&Rows { operations: rows })?;
        return Ok(Exit::Done);
    }
    let look = Look::of_stdout();
    let cells: Vec<Vec<Cell>> = rows.iter().map(|row| cells(row, &look)).collect();
    if cells.is_empty() {
        render::note("no such operations");
        return Ok(Exit::Done);
    }
    let heads = ["ID", "REQUESTED", "KIND", "DOMAIN", "SNAPSHOT", "OUTCOME", "TOOK"];
    render::print(&table(&heads, &cells, &look))?;
    Ok(Exit::Done)
}

fn cells(row: &Row, look: &Look) -> Vec<Cell> {
    let lasted = row.finished.map(|finished| took(finished.duration_since(row.requested)));
    vec![
        Cell::plain(short(row.operation)),
        Cell::plain(look.time(row.requested)),
        Cell::plain(safe(&row.kind)),
        Cell::painted(&safe(&row.domain), |text| look.paint.name(text)),
        Cell::plain(row.snapshot.as_deref().map(|name| safe(name).into_owned()).unwrap_or_default()),
        Cell::painted(row.outcome.unwrap_or("open"), |text| outcome_painted(text, look)),
        Cell::plain(lasted.unwrap_or_default()),
    ]
}

fn outcome_painted(word: &str, look: &Look) -> String {
    match word {
        "succeeded" => look.paint.good(word),
        "failed" | "needs-attention" => look.paint.bad(word),
        _ => look.paint.warn(word),
    }
}

/// The document of `op show`.
#[derive(Serialize)]
struct ShowDocument {
    #[serde(flatten)]
    row: Row,
    actor: String,
    steps: Vec<StepView>,
    cuts: Vec<CutDocument>,
    error: Option<ErrorView>,
    events: Vec<u64>,
}

#[derive(Serialize)]
struct CutDocument {
    /// The first event of the process that took it up.
    seq: u64,
    pid: u32,
    recovered_by: u32,
    /// The step that was in flight, what was found of it, and what followed; null if none was.
    step: Option<String>,
    found: Option<StepFound>,
    course: Option<Course>,
}

impl CutDocument {
    fn of(cut: Cut, events: &[Envelope], story: &Story) -> Self {
        let next = events.get(cut.before);
        let recovered = next.and_then(|event| match &event.event {
            Event::SystemRecovered(recovered) => Some(recovered),
            _ => None,
        });
        let step = recovered.and_then(|recovered| story.steps.get(recovered.step));
        Self {
            seq: next.map_or(0, |event| event.seq),
            pid: cut.pid,
            recovered_by: cut.next_pid,
            step: step.map(|step| step.name.clone()),
            found: recovered.map(|recovered| recovered.found),
            course: recovered.map(|recovered| recovered.course),
        }
    }
}

async fn show(context: &Context, id: &str) -> Result<Exit> {
    let reader = context.reader().await?;
    let row = find_operation(&reader.engine, id).await?;
    let events = reader.engine.operation_events(row.id).await?;
    let story = Story::of(&events).ok_or_else(|| Trouble::not_found("the log has no request for it"))?;
    if context.json {
        render::json(&ShowDocument {
            row: row.into(),
            actor: story.actor.to_string(),
            steps: story.steps.clone(),
            cuts: cuts(&events).into_iter().map(|cut| CutDocument::of(cut, &events, &story)).collect(),
            error: story.failure.as_ref().map(ErrorView::from),
            events: events.iter().map(|event| event.seq).collect(),
        })?;
        return Ok(Exit::Done);
    }
    let mut known = Known::default();
    for event in &events {
        learn(&reader.engine, &mut known, event).await?;
    }
    render::print(&told(&story, row.domain_name.as_str(), &events, &known, &Look::of_stdout()))?;
    Ok(Exit::Done)
}

/// The whole story, line by line.
fn told(story: &Story, domain: &str, events: &[Envelope], known: &Known, look: &Look) -> String {
    let paint = look.paint;
    let mut out = format!(
        "{} {}: {}\n",
        paint.dim(format!("operation {}", story.id)),
        paint.name(safe(domain)),
        paint.bold(safe(&request_words(&story.request, known))),
    );
    out.push_str(&format!(
        "asked by {} on {} (process {}, {})\n\n",
        safe(&story.actor.to_string()),
        look.time(story.requested),
        story.origin.pid,
        safe(&story.origin.via),
    ));
    let cuts = cuts(events);
    for (index, event) in events.iter().enumerate() {
        if let Some(cut) = cuts.iter().find(|cut| cut.before == index) {
            let since = events.get(index - 1).map_or(event.at, |last| last.at);
            let text = format!(
                "-- process {} ended here; process {} took it up {} later",
                cut.pid,
                cut.next_pid,
                took(event.at.duration_since(since))
            );
            out.push_str(&format!("  {}\n", paint.warn(text)));
            if let Some(how) = taken_up(&event.event) {
                out.push_str(&format!("  {}\n", paint.warn(format!("-- {how}"))));
            }
        }
        out.push_str(&format!(
            "  {}  {}  {}\n",
            paint.dim(format!("{:>5}", event.seq)),
            paint.dim(look.precise(event.at)),
            safe(&words(event, known, look)),
        ));
    }
    out.push_str(&format!("\n{}\n", ending(story, look)));
    out
}

/// How the operation was taken up, where the next event does not say it by itself.
fn taken_up(next: &Event) -> Option<&'static str> {
    match next {
        Event::SystemRecovered(_)
        | Event::OperationRetried(_)
        | Event::OperationResolved(_)
        | Event::OperationNeedsAttention(_) => None,
        Event::OperationUndoFinished(_) => Some("it went on taking back"),
        _ => Some("nothing was in flight; it went on"),
    }
}

fn ending(story: &Story, look: &Look) -> String {
    let failure = story.failure.as_ref().map(|failure| format!(": {}", safe(&failure.message)));
    let failure = failure.unwrap_or_default();
    let lasted = story.finished.map(|finished| took(finished.duration_since(story.requested)));
    let lasted = lasted.map(|lasted| format!(" after {lasted}")).unwrap_or_default();
    match story.outcome {
        Some(Outcome::Succeeded) => look.paint.good(format!("succeeded{lasted}")),
        Some(Outcome::Failed) => look.paint.bad(format!("failed{lasted}{failure}")),
        Some(Outcome::Expired) => look.paint.warn(format!("expired{lasted}{failure}")),
        Some(Outcome::Cancelled) => look.paint.warn(format!("called off{lasted}{failure}")),
        None if story.needs_attention => look.paint.bad(format!("needs attention{failure}")),
        None => look.paint.warn("still open: `snaptree recover` finishes it"),
    }
}
