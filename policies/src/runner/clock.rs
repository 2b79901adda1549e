//! The machine's clock, as far as policies believe it: leaps are found, recorded, and believed again.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use snaptree_engine::StreamId;
use snaptree_engine::engine::{Engine, EngineError, Requester};
use snaptree_engine::event::{ClockConfirmed, ClockLeapt, ClockWitness, Event};
use snaptree_engine::log::LogError;
use snaptree_engine::operation::{Code, Failure};
use snaptree_engine::together::Beside;

use super::book::Book;
use crate::leap::{Doubt, Leap, Reading, leap};

/// How many events of the installation are read at once.
const PAGE_EVENTS: usize = 1_024;

/// A reading, and the last event that was written when it was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// The event.
    pub seq: u64,
    /// What the clocks showed.
    pub reading: Reading,
}

/// What a look at the clock came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It is believed or in doubt as before.
    None,
    /// It has leapt just now.
    Leapt,
    /// It is believed from now on.
    Believed,
}

/// The clock, as the log tells it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClockState {
    /// Why it is not believed.
    pub doubt: Option<Doubt>,
    last: Option<Seen>,
    version: u64,
}

impl ClockState {
    /// Reads the log.
    ///
    /// # Errors
    /// The store failed.
    pub async fn read(engine: &Engine) -> Result<Self, EngineError> {
        let mut state = Self::default();
        loop {
            let page =
                engine.log().read_stream(&StreamId::System, state.version, u64::MAX, PAGE_EVENTS).await?;
            for envelope in &page {
                state.version = envelope.version;
                let (doubt, uptime) = match &envelope.event {
                    Event::ClockLeapt(e) => {
                        let since = Reading { at: envelope.at, uptime: e.uptime };
                        (Some(Doubt { leap: Leap { from: e.from, to: e.to }, since }), e.uptime)
                    }
                    Event::ClockConfirmed(e) => (None, e.uptime),
                    _ => continue,
                };
                state.doubt = doubt;
                state.last = Some(Seen { seq: envelope.seq, reading: Reading { at: envelope.at, uptime } });
            }
            if page.len() < PAGE_EVENTS {
                return Ok(state);
            }
        }
    }

    /// Whether what policies delete is held back.
    pub fn trust(&self) -> Trust {
        if self.doubt.is_some() { Trust::InDoubt } else { Trust::Sound }
    }

    async fn write(&self, engine: &Engine, requester: &Requester, event: Event) -> Result<(), EngineError> {
        let matters = |_: &Event| true;
        let mut beside = Beside { stream: StreamId::System, version: self.version, matters: &matters };
        engine.submit_together(requester, &mut beside, &[], &|_| vec![event.clone()]).await?;
        Ok(())
    }
}

pub use crate::retention::Trust;

/// What the clocks show.
pub(super) fn reading(engine: &Engine) -> Reading {
    Reading { at: engine.now(), uptime: engine.uptime() }
}

/// Looks whether the clock goes on from where it was, and records it if not. `looked` is when this process looked last;
/// it counts if nothing was recorded since.
///
/// Whoever writes about policies looks first: what they write would pass for a clock that was right.
///
/// # Errors
/// The store failed.
pub async fn watch_clock(
    engine: &Engine,
    requester: &Requester,
    book: &Book,
    looked: Option<Seen>,
) -> Result<(ClockState, Turn), EngineError> {
    loop {
        let state = ClockState::read(engine).await?;
        let now = reading(engine);
        let before = book.all().filter_map(|policy| policy.seen).chain(state.last).chain(looked);
        let before = before.max_by_key(|seen| seen.seq);
        let leapt = before.and_then(|before| leap(&before.reading, &now, next_run(book, before.reading.at)));
        let (event, turn) = match (leapt, state.doubt) {
            (Some(Leap { from, to }), _) => (ClockLeapt { from, to, uptime: now.uptime }.into(), Turn::Leapt),
            (None, Some(doubt)) if doubt.is_over(&now) => {
                (confirmed(ClockWitness::Time, &now), Turn::Believed)
            }
            (None, _) => return Ok((state, Turn::None)),
        };
        match state.write(engine, requester, event).await {
            Ok(()) => return Ok((ClockState::read(engine).await?, turn)),
            // Somebody else wrote to the installation's stream first.
            Err(EngineError::Log(LogError::Conflict { .. })) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Believes the clock, since somebody says that it is right.
///
/// # Errors
/// It is not in doubt, or the store failed.
pub async fn confirm_clock(engine: &Engine, requester: &Requester) -> Result<(), EngineError> {
    loop {
        let state = ClockState::read(engine).await?;
        if state.doubt.is_none() {
            let message = "the clock is not in doubt, and policies delete what they let go";
            return Err(EngineError::Rejected(Failure::new(Code::Invalid, message).refused()));
        }
        let event = confirmed(ClockWitness::Person, &reading(engine));
        match state.write(engine, requester, event).await {
            Err(EngineError::Log(LogError::Conflict { .. })) => {}
            other => return other,
        }
    }
}

fn confirmed(by: ClockWitness, now: &Reading) -> Event {
    ClockConfirmed { by, uptime: now.uptime }.into()
}

/// When the first run after `at` was planned, of the policies that have run before.
fn next_run(book: &Book, at: Timestamp) -> Option<Timestamp> {
    let ran = book.defined().filter(|state| state.last_runs().next().is_some());
    let next = ran.filter_map(|state| {
        let policy = state.running()?;
        let jitter = policy.jitter.map_or(jiff::SignedDuration::ZERO, |jitter| jitter.duration());
        policy.schedule.next_after(at.max(state.since), policy.zone())?.checked_add(jitter).ok()
    });
    next.min()
}
