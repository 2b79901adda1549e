//! Which planned instants are due: the schedule against the log.

use std::collections::{BTreeMap, BTreeSet};

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use snaptree_engine::{DomainId, PolicyName};

use super::Schedule;
use crate::span::Elapsed;

/// How late a run may be and still be on time: as long as a busy engine may take to look.
const ON_TIME: SignedDuration = SignedDuration::from_secs(60);

/// The most planned instants that are counted one by one when they are skipped.
const COUNTED_MAX: u32 = 1_000;

/// What becomes of runs that were missed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CatchUp {
    /// They are skipped: a run that is more than a minute late does not happen.
    None,
    /// The last one happens, however late (but see the window), and stands for all.
    #[default]
    Once,
}

/// How many of the latest instants of a history are always kept. With twice as many, the earlier half is thinned.
const INSTANTS_KEPT: usize = 64;

/// What the log says about one policy's runs on one domain: the latest instants all, and the earlier ones the fewer, the
/// longer ago. They matter only to a clock that goes back beyond the latest: what is not kept would be due there once
/// more, and its request has the key of the one before, so that nothing is asked for twice.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct History {
    fired: BTreeSet<Timestamp>,
    /// The last instant of what was skipped, and when that was recorded.
    skipped: BTreeMap<Timestamp, Timestamp>,
}

impl History {
    /// The planned instant ran.
    pub fn fired(&mut self, planned: Timestamp) {
        self.fired.insert(planned);
        if self.fired.len() == 2 * INSTANTS_KEPT {
            let mut place = 0;
            self.fired.retain(|_| is_kept(&mut place));
        }
    }

    /// All up to and with `last` that had not run were skipped, and that was recorded at `at`.
    pub fn skipped(&mut self, last: Timestamp, at: Timestamp) {
        self.skipped.insert(last, at);
        if self.skipped.len() == 2 * INSTANTS_KEPT {
            let mut place = 0;
            self.skipped.retain(|_, _| is_kept(&mut place));
        }
    }

    /// How many instants are kept.
    pub fn len(&self) -> usize {
        self.fired.len() + self.skipped.len()
    }

    /// Whether nothing ran and nothing was skipped.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The latest instant until which all is settled, as far as `now` can know.
    ///
    /// A skip that was recorded later than `now` was recorded by a clock that has gone back since, and settles nothing.
    fn settled(&self, now: Timestamp) -> Option<Timestamp> {
        let fired = self.fired.range(..=now).next_back().copied();
        let skipped = self.skipped.range(..=now).rev().find(|(_, at)| **at <= now).map(|(last, _)| *last);
        fired.max(skipped)
    }
}

/// Whether the instant at the next place stays: every second one of the earlier half, and all of the later one.
fn is_kept(place: &mut usize) -> bool {
    *place += 1;
    *place > INSTANTS_KEPT || place.is_multiple_of(2)
}

/// What is asked.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// The policy's schedule.
    pub schedule: &'a Schedule,
    /// The policy's time zone.
    pub zone: &'a TimeZone,
    /// How much later than planned this domain runs; see [`delay`].
    pub delay: SignedDuration,
    /// What becomes of missed runs.
    pub catch_up: CatchUp,
    /// The age past which a missed run is skipped even so.
    pub window: Option<Elapsed>,
    /// When the policy was defined, last changed, or resumed: nothing before is ever due.
    pub since: Timestamp,
    /// What ran and what was skipped.
    pub history: &'a History,
}

/// What is due.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Due {
    /// The planned instant to run now, if there is one. It is the run's key: record it with the run's requests.
    pub run: Option<Timestamp>,
    /// What is skipped, to be recorded.
    pub skipped: Option<Skipped>,
    /// When to ask again: the next run's instant, with the delay.
    pub next_at: Option<Timestamp>,
}

/// Planned instants that are passed over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Skipped {
    /// The first.
    pub first: Timestamp,
    /// The last.
    pub last: Timestamp,
    /// How many.
    pub count: Count,
    /// Why.
    pub why: SkipReason,
}

/// How many; a second-by-second schedule over a year is not counted out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Count {
    /// So many.
    Exactly(u32),
    /// At least so many.
    AtLeast(u32),
}

/// Why planned instants are passed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SkipReason {
    /// The policy does not catch up.
    NoCatchUp,
    /// The run of a later instant stands for them.
    CaughtUp,
    /// They are older than the window.
    TooLate,
}

/// What is due at `now`.
///
/// # Guarantees
/// * At most one run, of the last planned instant that has passed; the others are skipped, as one range.
/// * A planned instant that is in the history never runs again, wherever the clock jumps.
/// * A clock that was ahead for a while does not keep later instants from running: only what is not after `now` settles.
/// * The work is bounded, however long ago the last run was.
pub fn due(asked: &Asked<'_>, now: Timestamp) -> Due {
    let settled = asked.history.settled(now);
    let base = match settled {
        _ if asked.since <= now => settled.map_or(asked.since, |settled| settled.max(asked.since)),
        Some(settled) => settled,
        // Defined by a clock that has gone back since.
        None => now.checked_sub(ON_TIME).unwrap_or(Timestamp::MIN),
    };
    let passed = now.checked_sub(asked.delay).unwrap_or(Timestamp::MIN);
    // Looking back for the last instant costs seventy times as much as looking ahead for the first, and mostly there is none.
    let any = asked.schedule.next_after(base, asked.zone).is_some_and(|first| first <= passed);
    let newest = any.then(|| asked.schedule.last_until(passed, asked.zone)).flatten();
    let Some(newest) = newest.filter(|planned| *planned > base) else {
        return Due { run: None, skipped: None, next_at: next_at(asked, base.max(passed)) };
    };
    let late = passed.duration_since(newest);
    let (run, why) = match (asked.catch_up, asked.window) {
        (CatchUp::None, _) => (Some(newest).filter(|_| late <= ON_TIME), SkipReason::NoCatchUp),
        (CatchUp::Once, Some(window)) if late > window.duration().max(ON_TIME) => (None, SkipReason::TooLate),
        (CatchUp::Once, _) => (Some(newest), SkipReason::CaughtUp),
    };
    let skipped = skipped(asked, base, newest, run, why);
    Due { run, skipped, next_at: next_at(asked, newest.max(passed)) }
}

/// The planned instants after `base` that do not run, up to and with `newest`.
fn skipped(
    asked: &Asked<'_>,
    base: Timestamp,
    newest: Timestamp,
    run: Option<Timestamp>,
    why: SkipReason,
) -> Option<Skipped> {
    let first = asked.schedule.next_after(base, asked.zone)?;
    let last = match run {
        None => newest,
        Some(run) if first < run => {
            let before = run.checked_sub(SignedDuration::from_secs(1)).ok()?;
            asked.schedule.last_until(before, asked.zone)?
        }
        Some(_) => return None,
    };
    let mut count = 0;
    for planned in asked.schedule.upcoming(base, asked.zone) {
        if planned > last {
            break;
        }
        if count == COUNTED_MAX {
            return Some(Skipped { first, last, count: Count::AtLeast(count), why });
        }
        count += 1;
    }
    Some(Skipped { first, last, count: Count::Exactly(count), why })
}

/// When the first planned instant after `base` that has not run is due.
fn next_at(asked: &Asked<'_>, base: Timestamp) -> Option<Timestamp> {
    let next = asked
        .schedule
        .upcoming(base, asked.zone)
        .take(asked.history.fired.len().saturating_add(1))
        .find(|planned| !asked.history.fired.contains(planned))?;
    next.checked_add(asked.delay).ok()
}

/// How much later than planned a policy runs on a domain: the same every time, and spread evenly over the domains from
/// nothing to `jitter`.
pub fn delay(jitter: Option<Elapsed>, policy: &PolicyName, domain: DomainId) -> SignedDuration {
    let Some(jitter) = jitter else { return SignedDuration::ZERO };
    let mut hash = Sha256::new();
    hash.update(policy.as_str().as_bytes());
    hash.update([0]);
    hash.update(domain.as_uuid().as_bytes());
    let digest = hash.finalize();
    let number = digest.iter().take(8).fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
    let seconds = number % (u64::from(jitter.seconds()) + 1);
    SignedDuration::from_secs(i64::try_from(seconds).unwrap_or(0))
}
