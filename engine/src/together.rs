//! Requests on several domains that are written together, beside an event that tells of them: a policy's run.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use crate::around::Around;
use crate::command::Command;
use crate::decide::decide;
use crate::engine::{CONFLICTS_MAX, Engine, EngineError, Requester, Submitted, command_digest};
use crate::event::{Envelope, Event, Hash};
use crate::ids::{DomainId, EventId, OperationId, StreamId};
use crate::log::{LogError, NewEvent};
use crate::operation::{Code, Failure};
use crate::project::DomainState;

/// One of several requests.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    /// The domain.
    pub domain: DomainId,
    /// What is asked.
    pub command: Command,
    /// The key that makes it idempotent.
    pub key: String,
    /// Programs to be run before and after; of a create alone.
    pub around: Option<Around>,
}

/// What was decided on one of several requests.
#[derive(Clone, Debug, PartialEq)]
pub enum Decided {
    /// It is an operation, to be driven.
    Operation(OperationId),
    /// It was refused, and the others were not.
    Refused(Failure),
}

/// The stream of the event that tells of the requests.
pub struct Beside<'a> {
    /// The stream.
    pub stream: StreamId,
    /// The version up to which it was thought over.
    pub version: u64,
    /// Whether an event that stands behind that version changes what was to be done. What does not keeps nobody back.
    pub matters: &'a (dyn Fn(&Event) -> bool + Send + Sync),
}

/// So many locks serve all streams beside which something is appended.
const GATES: usize = 64;
/// How many events are read from a stream at once.
const PAGE_EVENTS: usize = 256;

/// Appends beside one stream pass one gate in a process, so that many at once do not use up each other's tries.
#[derive(Debug)]
pub(crate) struct Gates([tokio::sync::Mutex<()>; GATES]);

impl Default for Gates {
    fn default() -> Self {
        Self(std::array::from_fn(|_| tokio::sync::Mutex::default()))
    }
}

impl Gates {
    fn of(&self, stream: &StreamId) -> &tokio::sync::Mutex<()> {
        let mut hasher = DefaultHasher::new();
        stream.to_string().hash(&mut hasher);
        let place = usize::try_from(hasher.finish() % GATES as u64).unwrap_or(0);
        &self.0[place]
    }
}

/// What is to be appended.
#[derive(Default)]
struct Draft {
    expect: Vec<(StreamId, u64)>,
    events: Vec<NewEvent>,
    decided: Vec<Decided>,
}

impl Engine {
    /// Decides requests on any number of domains, and appends what follows from them in one piece with the events that
    /// `tell` makes of the decisions. A request that is refused keeps none of the others back.
    ///
    /// Where somebody else appended to a domain meanwhile, all is decided again. `beside` is brought to the version that
    /// the stream has afterwards.
    ///
    /// # Errors
    /// Something that matters was appended to the stream beside ([`LogError::Conflict`]: what was to be done has to be
    /// thought over), the domains do not come to rest, or the store failed. Nothing was written then.
    pub async fn submit_together(
        &self,
        requester: &Requester,
        beside: &mut Beside<'_>,
        wanted: &[Wanted],
        tell: &(dyn Fn(&[Decided]) -> Vec<Event> + Send + Sync),
    ) -> Result<Vec<Decided>, EngineError> {
        let _gate = self.gates.of(&beside.stream).lock().await;
        self.catch_up(beside).await?;
        let mut conflicts = 0;
        loop {
            let mut draft = self.decide_together(requester, wanted).await?;
            let told = tell(&draft.decided).into_iter().map(|event| NewEvent {
                stream: beside.stream.clone(),
                event,
                operation: None,
                cause: None,
                key: None,
            });
            let events: Vec<NewEvent> = told.chain(draft.events).collect();
            if events.is_empty() {
                return Ok(draft.decided);
            }
            draft.expect.push((beside.stream.clone(), beside.version));
            self.hooks.reached("append.before");
            match self.append(requester, draft.expect, events).await {
                Ok(appended) => {
                    self.hooks.reached("append.after");
                    let told = appended.iter().rev().find(|envelope| envelope.stream == beside.stream);
                    beside.version = told.map_or(beside.version, |envelope| envelope.version);
                    return Ok(draft.decided);
                }
                Err(LogError::Conflict { stream, .. } | LogError::KeyUsed { stream, .. })
                    if conflicts < CONFLICTS_MAX =>
                {
                    conflicts += 1;
                    if stream == beside.stream {
                        self.catch_up(beside).await?;
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Reads what was appended to the stream beside, which is little.
    async fn catch_up(&self, beside: &mut Beside<'_>) -> Result<(), EngineError> {
        let expected = beside.version;
        loop {
            let page = self.log.read_stream(&beside.stream, beside.version, u64::MAX, PAGE_EVENTS).await?;
            if let Some(found) = page.iter().find(|envelope| (beside.matters)(&envelope.event)) {
                let (stream, found) = (beside.stream.clone(), found.version);
                return Err(LogError::Conflict { stream, expected, found }.into());
            }
            beside.version = page.last().map_or(beside.version, |last| last.version);
            if page.len() < PAGE_EVENTS {
                return Ok(());
            }
        }
    }

    async fn decide_together(&self, requester: &Requester, wanted: &[Wanted]) -> Result<Draft, EngineError> {
        let mut draft = Draft::default();
        // Each domain as it is after the requests so far.
        let mut states: BTreeMap<DomainId, DomainState> = BTreeMap::new();
        for want in wanted {
            let stream = StreamId::Domain(want.domain);
            let earlier = self.log.by_key(&stream, &want.key).await?;
            if let Some(operation) = earlier.and_then(|earlier| earlier.operation) {
                draft.decided.push(Decided::Operation(operation));
                continue;
            }
            let state = match states.entry(want.domain) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(vacant) => match self.load_for_work(requester, want.domain).await {
                    Ok(state) => {
                        draft.expect.push((stream.clone(), state.version));
                        vacant.insert(state)
                    }
                    Err(error) => {
                        draft.decided.push(Decided::Refused(refusal(error)?));
                        continue;
                    }
                },
            };
            let mut ctx = self.ctx(requester, state, Some(command_digest(&want.command)?));
            ctx.terms.around.clone_from(&want.around);
            let events = match decide(state, &want.command, &ctx) {
                Ok(events) => events,
                Err(rejection) => {
                    draft.decided.push(Decided::Refused(rejection));
                    continue;
                }
            };
            let operation = OperationId::from_uuid(self.ids.next());
            let (submitted, events) =
                self.addressed(&stream, &want.command, operation, Some(&want.key), events);
            if submitted == Submitted::Recorded {
                let failure = Failure::new(Code::Invalid, "this makes no operation");
                draft.decided.push(Decided::Refused(failure.refused()));
                continue;
            }
            for event in &events {
                let predicted = self.predicted(requester, state, event);
                state.apply(&predicted);
            }
            draft.decided.push(Decided::Operation(operation));
            draft.events.extend(events);
        }
        let written = |stream: &StreamId| draft.events.iter().any(|event| event.stream == *stream);
        draft.expect.retain(|(stream, _)| written(stream));
        Ok(draft)
    }

    /// The event as it will be in the log, as far as a projection looks at it.
    fn predicted(&self, requester: &Requester, state: &DomainState, event: &NewEvent) -> Envelope {
        Envelope {
            seq: state.seq.saturating_add(1),
            id: EventId::from_uuid(self.ids.next()),
            stream: event.stream.clone(),
            version: state.version.saturating_add(1),
            at: self.clock.now(),
            actor: requester.actor.clone(),
            origin: requester.origin.clone(),
            epoch: 0,
            operation: event.operation,
            cause: event.cause,
            key: event.key.clone(),
            event: event.event.clone(),
            hash: Hash([0; 32]),
        }
    }
}

/// Why a domain cannot be asked; an error if none can.
fn refusal(error: EngineError) -> Result<Failure, EngineError> {
    match error {
        EngineError::Rejected(failure) => Ok(failure),
        EngineError::Driver(error) => Ok(error.failure),
        EngineError::Illegal { .. } | EngineError::Log(LogError::Damaged(_)) => {
            Ok(Failure::new(Code::Invalid, error.to_string()))
        }
        EngineError::Log(_) | EngineError::Json(_) => Err(error),
    }
}
