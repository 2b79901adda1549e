//! Telling about an operation until it is over: live, and at the end from the log, which alone is complete.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use snaptree_engine::engine::EngineError;
use snaptree_engine::event::{Envelope, Event};
use snaptree_engine::operation::Request;
use snaptree_engine::reconcile::dispatch::{Following, Notice, Pass, Wish, account_since, ending};
use snaptree_engine::reconcile::worker::Driven;
use snaptree_engine::{DomainId, OperationId};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;

use super::Daemon;
use super::http::{Gone, Lines, stopping};
use crate::exit::told;
use crate::wire::{EventLine, Line, WireError};

/// After so long without news it is said what stands in the way, if that is known.
const SILENCE_MAX: Duration = Duration::from_secs(3);

/// How far an operation is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// Until it is over.
    Ended,
    /// A delete also until the data is folded away, or is known to stay for now.
    Settled,
}

/// A pass that failed, for several who wait for it.
#[derive(Debug)]
pub struct PassFailed(pub Arc<Pass>);

impl fmt::Display for PassFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0.came_to {
            Ok(_) => f.write_str("it did not fail"),
            Err(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for PassFailed {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.came_to.as_ref().err().map(|error| error as &(dyn std::error::Error + 'static))
    }
}

/// Why the telling ended without an account.
enum Short {
    /// Nobody listens.
    Gone,
    /// There is none.
    Failed(anyhow::Error),
}

impl From<Gone> for Short {
    fn from(_: Gone) -> Self {
        Self::Gone
    }
}

impl From<EngineError> for Short {
    fn from(error: EngineError) -> Self {
        Self::Failed(error.into())
    }
}

/// Tells about an operation, and at last what it came to.
///
/// # Errors
/// Nobody listens any more.
pub async fn follow(
    daemon: Arc<Daemon>,
    domain: DomainId,
    operation: OperationId,
    until: Until,
    mut lines: Lines,
) -> Result<(), Gone> {
    let account = Telling { daemon: &daemon, domain, lines: &mut lines }.operation(operation, until).await;
    last(lines, account).await
}

/// Lets every tombstone be looked at, tells what happens, and at last what that came to.
///
/// # Errors
/// Nobody listens any more.
pub async fn reconcile(daemon: Arc<Daemon>, domain: DomainId, mut lines: Lines) -> Result<(), Gone> {
    let account = Telling { daemon: &daemon, domain, lines: &mut lines }.reconcile().await;
    last(lines, account).await
}

async fn last(mut lines: Lines, account: Result<Driven, Short>) -> Result<(), Gone> {
    let line = match account {
        Ok(driven) => Line::Driven(Box::new(driven)),
        Err(Short::Gone) => return Err(Gone),
        Err(Short::Failed(error)) => Line::Error(WireError::from(&told(&error))),
    };
    lines.send(&line).await
}

struct Telling<'a> {
    daemon: &'a Daemon,
    domain: DomainId,
    lines: &'a mut Lines,
}

/// What live news led to.
enum News {
    /// The operation ended with this event.
    Ended(u64),
    /// It is time to look again.
    Look,
    /// The pass failed.
    Failed(Arc<Pass>),
}

impl Telling<'_> {
    async fn operation(&mut self, operation: OperationId, until: Until) -> Result<Driven, Short> {
        let events = self.daemon.engine.operation_events(operation).await?;
        let request = events.iter().find_map(|event| Some((event.version, Request::of(&event.event)?)));
        let Some((version, request)) = request else { return Err(Short::Failed(stopping().into())) };
        let with_merges = until == Until::Settled && matches!(request, Request::Delete(_));
        let wanted = (!with_merges).then_some(operation);
        let mut failed = None;
        loop {
            // In this order: what ends in between is told to whoever follows.
            let following = self.daemon.dispatcher.follow(self.domain);
            let ended = ended_at(&self.daemon.engine.operation_events(operation).await?);
            match (following, ended) {
                (_, Some(ended)) if !with_merges => return self.account(operation, version, ended).await,
                (Following::AtRest | Following::Waiting(_), Some(_)) => {
                    return self.account(operation, version, u64::MAX).await;
                }
                (Following::Waiting(pass), None) => return Err(Short::Failed(PassFailed(pass).into())),
                (Following::AtRest, None) if self.daemon.dispatcher.is_stopping() => {
                    return Err(Short::Failed(stopping().into()));
                }
                (Following::AtRest, None) => match failed {
                    Some(pass) => return Err(Short::Failed(PassFailed(pass).into())),
                    None => return self.account(operation, version, u64::MAX).await,
                },
                (Following::Running(notices), _) => match self.relay(notices, wanted).await? {
                    News::Ended(ended) => return self.account(operation, version, ended).await,
                    News::Failed(pass) => failed = Some(pass),
                    News::Look => {}
                },
            }
        }
    }

    async fn reconcile(&mut self) -> Result<Driven, Short> {
        let pass = self.daemon.dispatcher.run(self.domain, Wish::Reconcile);
        tokio::pin!(pass);
        loop {
            let Following::Running(notices) = self.daemon.dispatcher.follow(self.domain) else { break };
            tokio::select! {
                biased;
                pass = &mut pass => return came_to(pass),
                news = self.relay(notices, None) => {
                    news?;
                }
            }
        }
        came_to(pass.await)
    }

    /// The account of an operation and of the merges since its request.
    async fn account(&self, operation: OperationId, version: u64, seq_max: u64) -> Result<Driven, Short> {
        let before = version.saturating_sub(1);
        let mut driven = account_since(&self.daemon.engine, self.domain, before, seq_max).await?;
        driven.carried.retain(|carried| {
            carried.operation.id == operation || matches!(carried.operation.request, Request::Merge(_))
        });
        Ok(driven)
    }

    /// Passes on what happens, until `wanted` ends or the worker rests.
    async fn relay(
        &mut self,
        mut notices: Receiver<Notice>,
        wanted: Option<OperationId>,
    ) -> Result<News, Short> {
        let mut said = None;
        loop {
            let Ok(notice) = tokio::time::timeout(SILENCE_MAX, notices.recv()).await else {
                self.say_what_waits(&mut said).await?;
                continue;
            };
            match notice {
                Ok(Notice::Happened(envelope)) => {
                    let line = EventLine::of(&envelope).map_err(Short::Failed)?;
                    self.lines.send(&Line::Event(Box::new(line))).await?;
                    let ours = wanted.is_some() && envelope.operation == wanted;
                    if ours && ending(&envelope.event).is_some() {
                        return Ok(News::Ended(envelope.seq));
                    }
                }
                Ok(Notice::Progress(progress)) => {
                    self.lines.send(&Line::Progress(progress)).await?;
                }
                Ok(Notice::Rested(pass)) if pass.came_to.is_err() => return Ok(News::Failed(pass)),
                Ok(Notice::Rested(_)) | Err(RecvError::Closed) => return Ok(News::Look),
                Err(RecvError::Lagged(count)) => {
                    self.lines.send(&Line::Lagged(count)).await?;
                    return Ok(News::Look);
                }
            }
        }
    }

    /// Says once, and again when it changes, that the domain's connection is suspended.
    async fn say_what_waits(&mut self, said: &mut Option<jiff::Timestamp>) -> Result<(), Short> {
        let state = self.daemon.engine.load(self.domain).await?;
        let Some(connection) = self.daemon.engine.connection_of(&state) else { return Ok(()) };
        let until = connection.suspended_until;
        if until.is_some() && *said != until {
            *said = until;
            self.lines.send(&Line::Waits(format!("{connection}; it goes on by itself"))).await?;
        }
        Ok(())
    }
}

fn came_to(pass: Option<Arc<Pass>>) -> Result<Driven, Short> {
    let pass = pass.ok_or_else(|| Short::Failed(stopping().into()))?;
    match &pass.came_to {
        Ok(driven) => Ok(driven.clone()),
        Err(_) => Err(Short::Failed(PassFailed(pass).into())),
    }
}

/// Where an operation ended or came to rest; none while it goes on.
fn ended_at(events: &[Envelope]) -> Option<u64> {
    let last = events.iter().rev().find(|event| {
        ending(&event.event).is_some()
            || matches!(event.event, Event::OperationRetried(_) | Event::OperationResolved(_))
    })?;
    ending(&last.event).is_some().then_some(last.seq)
}
