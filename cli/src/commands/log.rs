//! `snaptree log`: who did what, and when.

use std::io::Write as _;
use std::time::Duration;

use anyhow::Result;
use snaptree_engine::engine::Engine;
use snaptree_engine::event::{Actor, Envelope, Event};
use snaptree_engine::log::EventFilter;
use snaptree_engine::near::nearest;
use snaptree_engine::{DomainId, OperationId, SnapshotId, StreamId};

use super::history::{each_event, find_operation, learn, learn_names};
use crate::args::inspect::LogArgs;
use crate::context::{Context, Reader};
use crate::exit::{Exit, Trouble};
use crate::render::text::Look;
use crate::render::words::{Known, line, mentioned};
use crate::when::{Direction, local_now, time};
use crate::wire::EventLine;

/// Events that are read at once.
const PAGE_EVENTS: usize = 1_000;
/// How often a log that is followed is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// What is let through beside the store's own filter.
struct About {
    snapshots: Vec<SnapshotId>,
    operations: Vec<OperationId>,
}

impl About {
    /// Whether an event is about one of the snapshots; an operation's events are about all that it was asked for.
    fn lets(&mut self, envelope: &Envelope) -> bool {
        let named = mentioned(&envelope.event).iter().any(|id| self.snapshots.contains(id));
        let known = envelope.operation.filter(|operation| self.operations.contains(operation));
        if named && known.is_none() {
            self.operations.extend(envelope.operation);
        }
        named || known.is_some()
    }
}

/// `snaptree log`
///
/// # Errors
/// An argument names nothing, or the log cannot be read.
pub async fn run(context: &Context, args: LogArgs) -> Result<Exit> {
    let reader = context.reader().await?;
    let filter = filter(&reader.engine, &args).await?;
    let mut about = about(&reader, &args, &filter).await?;
    let mut printer = Printer { json: context.json, look: Look::of_stdout(), known: Known::default() };
    let mut seq = 0;
    let mut version = reader.version().await?;
    loop {
        let page = reader.engine.log().read(seq, &filter, PAGE_EVENTS).await?;
        seq = page.last().map_or(seq, |last| last.seq);
        let whole = page.len() < PAGE_EVENTS;
        printer.print(&reader.engine, page, about.as_mut()).await?;
        if !whole {
            continue;
        }
        if !args.follow {
            return Ok(Exit::Done);
        }
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let now = reader.version().await?;
            if now != version {
                version = now;
                break;
            }
        }
    }
}

struct Printer {
    json: bool,
    look: Look,
    known: Known,
}

impl Printer {
    async fn print(
        &mut self,
        engine: &Engine,
        page: Vec<Envelope>,
        mut about: Option<&mut About>,
    ) -> Result<()> {
        let mut text = String::new();
        for envelope in &page {
            if about.as_mut().is_some_and(|about| !about.lets(envelope)) {
                continue;
            }
            if self.json {
                text.push_str(&serde_json::to_string(&EventLine::of(envelope)?)?);
            } else {
                learn(engine, &mut self.known, envelope).await?;
                text.push_str(&line(envelope, &self.known, &self.look));
            }
            text.push('\n');
        }
        let mut out = std::io::stdout().lock();
        out.write_all(text.as_bytes())?;
        Ok(out.flush()?)
    }
}

async fn filter(engine: &Engine, args: &LogArgs) -> Result<EventFilter> {
    let now = local_now();
    let when =
        |text: &Option<String>| text.as_deref().map(|text| time(text, &now, Direction::Past)).transpose();
    let stream = match &args.domain {
        Some(domain) => Some(StreamId::Domain(domain_of(engine, domain).await?)),
        None => None,
    };
    let operation = match &args.operation {
        Some(operation) => Some(find_operation(engine, operation).await?.id),
        None => None,
    };
    Ok(EventFilter {
        stream,
        operation,
        actor: args.actor.as_deref().map(actor).transpose()?,
        kind: args.kind.as_deref().map(kind).transpose()?,
        since: when(&args.since)?,
        until: when(&args.until)?,
    })
}

/// A registered domain, or one that was removed.
async fn domain_of(engine: &Engine, wanted: &str) -> Result<DomainId> {
    let unknown = match engine.find_domain(wanted).await {
        Ok(id) => return Ok(id),
        Err(error) => error,
    };
    let filter = EventFilter { kind: Some("Domain.Registered".to_owned()), ..EventFilter::default() };
    let mut found = None;
    each_event(engine, &filter, |event| match (&event.stream, &event.event) {
        (StreamId::Domain(id), Event::DomainRegistered(e))
            if id.to_string() == wanted || e.domain.name.as_str() == wanted =>
        {
            found = Some(*id);
        }
        _ => {}
    })
    .await?;
    Ok(found.ok_or(unknown)?)
}

fn actor(text: &str) -> Result<String, Trouble> {
    let named = if text == "engine" || text.contains(':') { text.to_owned() } else { format!("user:{text}") };
    let actor: Actor = named.parse().map_err(|error| Trouble::usage(format!("{error}")))?;
    Ok(actor.to_string())
}

/// A kind as the store knows it, whatever its case; a group may be written with or without its dot.
fn kind(text: &str) -> Result<String, Trouble> {
    let wanted = text.to_ascii_lowercase();
    let whole = Event::KINDS.iter().find(|kind| kind.to_ascii_lowercase() == wanted);
    let group = format!("{}.", wanted.trim_end_matches('.'));
    let prefix = Event::KINDS.iter().find(|kind| kind.to_ascii_lowercase().starts_with(&group));
    match (whole, prefix) {
        (Some(kind), _) => return Ok((*kind).to_owned()),
        (None, Some(kind)) => return Ok(kind.chars().take(group.chars().count()).collect()),
        (None, None) => {}
    }
    // `deleted` alone, without its group.
    let word = |kind: &str| kind.split_once('.').map(|(_, word)| word.to_ascii_lowercase());
    let of_word: Vec<&str> =
        Event::KINDS.iter().copied().filter(|kind| word(kind).as_deref() == Some(&wanted)).collect();
    if let [kind] = of_word[..] {
        return Ok(kind.to_owned());
    }
    let shown: String = text.chars().take(60).collect();
    let lowered: Vec<(String, &str)> =
        Event::KINDS.iter().map(|kind| (kind.to_ascii_lowercase(), *kind)).collect();
    let near = nearest(&wanted, lowered.iter().map(|(lower, _)| lower.as_str()));
    let near = near.and_then(|near| lowered.iter().find(|(lower, _)| lower == near));
    let hint = match (&of_word[..], near) {
        ([_, ..], _) => format!("did you mean {}?", of_word.join(" or ")),
        ([], Some((_, kind))) => format!("did you mean {kind}?"),
        ([], None) => "a kind is a group and what happened, such as Snapshot.Deleted; or a group alone: \
                       Domain, Snapshot, Operation, Merge, Layer, Drift, Policy, Host, System"
            .to_owned(),
    };
    Err(Trouble::usage(format!("there is no kind of event '{shown}'")).hint(hint))
}

/// The snapshots that have, or had, the name that was asked for.
async fn about(reader: &Reader, args: &LogArgs, filter: &EventFilter) -> Result<Option<About>> {
    let (Some(wanted), Some(StreamId::Domain(domain))) = (&args.snapshot, &filter.stream) else {
        return Ok(None);
    };
    let mut known = Known::default();
    learn_names(&reader.engine, &mut known, *domain, u64::MAX).await?;
    let names = EventFilter {
        stream: filter.stream.clone(),
        kind: Some("Snapshot.".to_owned()),
        ..EventFilter::default()
    };
    let mut snapshots: Vec<SnapshotId> = Vec::new();
    each_event(&reader.engine, &names, |envelope| {
        let mut named = |id: SnapshotId, name: &str| {
            if (name == wanted || id.to_string() == *wanted) && !snapshots.contains(&id) {
                snapshots.push(id);
            }
        };
        match &envelope.event {
            Event::SnapshotCreateRequested(e) => named(e.snapshot, e.name.as_str()),
            Event::SnapshotEdited(e) => {
                if let Some(name) = &e.name {
                    named(e.snapshot, name.as_str());
                }
            }
            _ => {}
        }
    })
    .await?;
    if snapshots.is_empty() {
        return Err(Trouble::not_found(format!("no snapshot was ever named '{wanted}'")).into());
    }
    Ok(Some(About { snapshots, operations: Vec::new() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_and_actors_as_people_write_them() {
        for (text, found) in [
            ("Snapshot.Created", "Snapshot.Created"),
            ("snapshot.created", "Snapshot.Created"),
            ("Snapshot.", "Snapshot."),
            ("snapshot", "Snapshot."),
            ("operation", "Operation."),
            ("deleted", "Snapshot.Deleted"),
            ("reverted", "Snapshot.Reverted"),
        ] {
            assert_eq!(kind(text).unwrap(), found, "{text}");
        }
        assert_eq!(kind("Snapshot.Creatd").unwrap_err().hint.unwrap(), "did you mean Snapshot.Created?");
        let several = kind("removed").unwrap_err().hint.unwrap();
        assert!(several.contains("Policy.Removed") && several.contains(" or "), "{several}");
        assert!(kind("nonsense").unwrap_err().hint.unwrap().starts_with("a kind is a group"));
        assert_eq!(actor("root").unwrap(), "user:root");
        assert_eq!(actor("engine").unwrap(), "engine");
        assert!(actor("alien:x").is_err());
    }
}
