//! `create`, `revert`, `delete`, `edit`, `hold`, `release`.

use std::io::Read as _;

use anyhow::{Context as _, Result};
use snaptree_engine::command::{Command, Content, Create, Delete, SnapshotRef};
use snaptree_engine::domain::RunState;
use snaptree_engine::engine::{Engine, Submitted};
use snaptree_engine::event::{DeleteScope, DeleteWhat, Event, MergeWish, Place};
use snaptree_engine::tree::Snapshot;
use snaptree_engine::{OperationId, xml};

use super::carry::{Asked, carry, dry_run, giving_up, open, report, would_lose};
use super::query::{one, show_view};
use crate::args::snapshot::{CreateArgs, DeleteArgs, EditArgs, HoldArgs, ReleaseArgs, RevertArgs};
use crate::args::value::labels;
use crate::confirm::{confirm, confirm_unnamed, is_asked};
use crate::context::{Context, Writer};
use crate::exit::{Exit, Trouble};
use crate::render;
use crate::render::text::{count, safe};
use crate::render::view::domain_name;
use crate::when::{Direction, local_now, time};

/// `snaptree create`
///
/// # Errors
/// It was rejected, or the state cannot be used.
pub async fn create(context: &Context, args: CreateArgs) -> Result<Exit> {
    let document = args.xml.as_deref().map(read_xml).transpose()?;
    let writer = if args.dry_run.dry_run { None } else { Some(open(context, &args.writer).await?) };
    let command = match document {
        Some(document) => {
            let state = match &writer {
                Some(writer) => writer.engine.load(writer.engine.find_domain(&args.domain).await?).await?,
                None => {
                    let reader = context.reader().await?;
                    let prefix = reader.prefix(None).await?;
                    reader.domain(&args.domain, prefix).await?
                }
            };
            let disks = state.domain.map(|domain| domain.disks).unwrap_or_default();
            let asked = document
                .to_create(&disks)
                .map_err(|error| Trouble::new(Exit::Refused, "xml", error.to_string()))?;
            overridden(asked, &args)
        }
        None => overridden(Create::default(), &args),
    };
    let asked = Asked {
        domain: &args.domain,
        command: giving_up(args.give_up, Command::Create(command)),
        key: args.key.as_deref(),
        wait: args.wait.wait(),
    };
    match writer {
        Some(writer) => carry(context, &writer, &asked).await,
        None => dry_run(context, &asked).await,
    }
}

/// What the options say takes the place of what a document says.
fn overridden(base: Create, args: &CreateArgs) -> Create {
    let content = match (args.memory, args.disk_only) {
        (true, _) => Content::WithMemory,
        (false, true) => Content::DisksOnly,
        (false, false) => base.content,
    };
    let mut all = base.labels;
    all.extend(labels(&args.label));
    Create {
        name: args.name.clone().or(base.name),
        description: args.description.clone().or(base.description),
        labels: all,
        content,
        place: if args.internal { Place::Internal } else { base.place },
        disks: base.disks,
        quiesce: args.quiesce || base.quiesce,
    }
}

fn read_xml(file: &str) -> Result<xml::SnapshotXml> {
    let limit = xml::TEXT_BYTES_MAX as u64 + 1;
    let mut bytes = Vec::new();
    if file == "-" {
        std::io::stdin().lock().take(limit).read_to_end(&mut bytes).context("cannot read standard input")?;
    } else {
        let opened = std::fs::File::open(file).with_context(|| format!("cannot read {file}"))?;
        opened.take(limit).read_to_end(&mut bytes).with_context(|| format!("cannot read {file}"))?;
    }
    let text =
        String::from_utf8(bytes).map_err(|_| Trouble::new(Exit::Refused, "xml", "the XML is not UTF-8"))?;
    Ok(xml::read(&text).map_err(|error| Trouble::new(Exit::Refused, "xml", error.to_string()))?)
}

/// `snaptree revert`
///
/// # Errors
/// It was rejected or called off, or the state cannot be used.
pub async fn revert(context: &Context, args: RevertArgs) -> Result<Exit> {
    let snapshot = args.name.unwrap_or(SnapshotRef::Current);
    let run_state = match (args.running, args.paused) {
        (true, _) => Some(RunState::Running),
        (false, true) => Some(RunState::Paused),
        (false, false) => None,
    };
    let question = format!(
        "Reverting {} to {} discards what it wrote since its last snapshot. Go on?",
        safe(&args.domain),
        ref_words(&snapshot)
    );
    let asked = Asked {
        domain: &args.domain,
        command: Command::Revert { snapshot, run_state, keep: args.keep },
        key: None,
        wait: args.wait.wait(),
    };
    if args.dry_run.dry_run {
        return dry_run(context, &asked).await;
    }
    // What is kept is not discarded.
    let unasked = args.yes || args.keep;
    let mut question = question;
    if is_asked(unasked) {
        let lost = would_lose(context, &asked).await;
        let lost =
            lost.iter().filter(|lost| lost.starts_with("disk ")).map(|lost| format!("{}\n", safe(lost)));
        question.insert_str(0, &lost.collect::<String>());
    }
    confirm(&question, unasked)?;
    carry(context, &open(context, &args.writer).await?, &asked).await
}

/// `snaptree delete`
///
/// # Errors
/// It was rejected or called off, or the state cannot be used.
pub async fn delete(context: &Context, args: DeleteArgs) -> Result<Exit> {
    let snapshots = if args.current { vec![SnapshotRef::Current] } else { args.name };
    let scope = match (args.children, args.children_only) {
        (true, _) => DeleteScope::Children,
        (false, true) => DeleteScope::ChildrenOnly,
        (false, false) => DeleteScope::Named,
    };
    let going = Going::of(context, &args.domain, &snapshots, scope).await?;
    let merge = match (args.now, args.defer) {
        (true, _) => MergeWish::Now,
        (false, true) => MergeWish::Defer,
        (false, false) => MergeWish::Auto,
    };
    let what = if args.metadata { DeleteWhat::Metadata } else { DeleteWhat::Snapshot };
    let delete = Delete { snapshots, scope, what, merge, reasons: Vec::new() };
    let command = giving_up(args.give_up, Command::Delete(delete));
    let asked = Asked { domain: &args.domain, command, key: None, wait: args.wait.wait() };
    if args.dry_run.dry_run {
        return dry_run(context, &asked).await;
    }
    let question = format!("Delete {}?", going.words(&args.domain));
    if going.unnamed == 0 {
        confirm(&question, args.yes)?;
    } else {
        confirm_unnamed(&format!("this deletes {}", going.words(&args.domain)), &question, args.yes)?;
    }
    carry(context, &open(context, &args.writer).await?, &asked).await
}

/// The snapshots that a delete takes.
struct Going {
    names: Vec<String>,
    /// How many of them the command does not name.
    unnamed: usize,
}

/// So many names are told; of the rest the number.
const NAMES_TOLD: usize = 10;

impl Going {
    /// As the log has them now; whether they may go is decided later.
    async fn of(context: &Context, domain: &str, named: &[SnapshotRef], scope: DeleteScope) -> Result<Self> {
        if scope == DeleteScope::Named {
            return Ok(Self { names: named.iter().map(ref_words).collect(), unnamed: 0 });
        }
        let reader = context.reader().await?;
        let prefix = reader.prefix(None).await?;
        let state = reader.domain(domain, prefix).await?;
        let mut going: Vec<&Snapshot> = Vec::new();
        let mut unnamed = 0;
        for snapshot in named {
            let snapshot = one(&state, snapshot)?;
            let below = state.tree.descendants(snapshot.id);
            let mut below: Vec<&Snapshot> = below.into_iter().filter_map(|id| state.tree.get(id)).collect();
            below.sort_by_key(|one| one.created);
            let itself = (scope == DeleteScope::Children).then_some(snapshot);
            for one in itself.into_iter().chain(below) {
                if going.iter().all(|known| known.id != one.id) {
                    unnamed += usize::from(one.id != snapshot.id);
                    going.push(one);
                }
            }
        }
        Ok(Self {
            names: going.iter().map(|one| format!("'{}'", safe(one.name.as_str()))).collect(),
            unnamed,
        })
    }

    /// `2 snapshots of web: 'a', 'b'`
    fn words(&self, domain: &str) -> String {
        let (domain, number) = (safe(domain), self.names.len());
        match &self.names[..] {
            [name] => format!("{name} of {domain}"),
            names if number <= NAMES_TOLD => {
                format!("{} of {domain}: {}", count(number, "snapshot"), names.join(", "))
            }
            names => {
                let told = names.iter().take(NAMES_TOLD).cloned().collect::<Vec<_>>().join(", ");
                format!("{number} snapshots of {domain}: {told}, and {} more", number - NAMES_TOLD)
            }
        }
    }
}

fn ref_words(snapshot: &SnapshotRef) -> String {
    match snapshot {
        SnapshotRef::Name(name) => format!("'{}'", safe(name.as_str())),
        SnapshotRef::There(name) => format!("'{}'", safe(name)),
        SnapshotRef::Id(id) => id.to_string(),
        SnapshotRef::Current => "its current snapshot".to_owned(),
    }
}

/// `snaptree edit`
///
/// # Errors
/// It was rejected, or the state cannot be used.
pub async fn edit(context: &Context, args: EditArgs) -> Result<Exit> {
    let command = Command::Edit {
        snapshot: args.snapshot.clone(),
        name: args.name.clone(),
        description: args.description,
        labels: labels(&args.label),
    };
    let writer = open(context, &args.writer).await?;
    recorded(context, &writer, &args.domain, &args.snapshot, command, "Changed").await
}

/// `snaptree hold`
///
/// # Errors
/// It was rejected, or the state cannot be used.
pub async fn hold(context: &Context, args: HoldArgs) -> Result<Exit> {
    let until = args.until.as_deref().map(|text| time(text, &local_now(), Direction::Future)).transpose()?;
    let command = Command::Hold { snapshot: args.name.clone(), reason: args.reason, until };
    let writer = open(context, &args.writer).await?;
    recorded(context, &writer, &args.domain, &args.name, command, "Holding").await
}

/// `snaptree release`
///
/// # Errors
/// It was rejected, or the state cannot be used.
pub async fn release(context: &Context, args: ReleaseArgs) -> Result<Exit> {
    let command = Command::Release { snapshot: args.name.clone() };
    let writer = open(context, &args.writer).await?;
    recorded(context, &writer, &args.domain, &args.name, command, "Released").await
}

/// A command that is carried out by being written, or by one step at the hypervisor; the snapshot as it is afterwards is the answer.
async fn recorded(
    context: &Context,
    writer: &Writer,
    domain: &str,
    snapshot: &SnapshotRef,
    command: Command,
    word: &str,
) -> Result<Exit> {
    let Writer { engine, office } = writer;
    let domain = engine.find_domain(domain).await?;
    let before = engine.load(domain).await?;
    let id = one(&before, snapshot).map(|snapshot| snapshot.id);
    if let Submitted::Operation(operation) = office.submit(domain, &command, None).await? {
        let driven = office.finish(domain, operation).await;
        if !succeeded(engine, operation).await? {
            return report(context, writer, domain, operation, &driven).await;
        }
    }
    let state = engine.load(domain).await?;
    let snapshot = one(&state, &SnapshotRef::Id(id?))?;
    if context.json {
        render::json(&show_view(&state, snapshot, None))?;
    } else {
        let name = safe(snapshot.name.as_str());
        render::print(&format!("{word} snapshot '{name}' of {}.\n", safe(&domain_name(&state))))?;
    }
    Ok(Exit::Done)
}

/// Whether the log says that an operation succeeded.
async fn succeeded(engine: &Engine, operation: OperationId) -> Result<bool> {
    let events = engine.operation_events(operation).await?;
    Ok(events.iter().any(|envelope| matches!(envelope.event, Event::OperationSucceeded(_))))
}
