//! How many snapshots a policy comes to keep when it has run for long enough that every rule is full.

use std::collections::BTreeSet;

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp, Zoned};
use snaptree_engine::SnapshotId;
use uuid::Uuid;

use super::keep::{Keep, Limit, Rule};
use super::period::Per;
use super::verdict::{Candidate, Standing, verdicts};
use crate::schedule::Schedule;

/// The most planned instants that are looked for at one moment.
const INSTANTS_MAX: usize = 10_000;

/// The most that are looked for in all.
const WORK_MAX: usize = 40_000;

/// The most moments at which the number is taken, and how far they are apart: over a year, at all weekdays, days of the
/// month and times of day.
const MOMENTS_MAX: usize = 64;
const APART: SignedDuration = SignedDuration::from_hours(6 * 24 + 7);

/// How many snapshots of one domain a policy keeps in the long run. Where nobody reverts, they stand in one row, and
/// this is the depth as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LongRun {
    /// So many, the most at some moments over a year; `max-depth` left out of account.
    Levels {
        /// How many.
        snapshots: usize,
    },
    /// More than so many; they were not counted further.
    MoreThan {
        /// How many.
        snapshots: usize,
    },
    /// More and more, without end: a rule keeps all, and there is no `max-age`.
    Grows,
}

/// The number of snapshots in the long run, if runs happen as planned from `from` on.
///
/// Tells the state at a moment from the rules instead of playing years of runs: only the last run of each period that
/// a rule counts can be there, so only these are looked for, and then judged like any others.
pub fn long_run(schedule: &Schedule, keep: &Keep, from: Timestamp, zone: &TimeZone) -> LongRun {
    let endless = keep.rules().is_empty() || keep.rules().iter().any(|rule| rule.limit == Limit::All);
    if endless && keep.max_age().is_none() {
        return LongRun::Grows;
    }
    let spread = std::iter::successors(Some(from), |moment| moment.checked_add(APART).ok()).take(MOMENTS_MAX);
    match most_at(schedule, keep, spread, zone) {
        // No run lies behind: its first ones are to come.
        LongRun::Levels { snapshots: 0 } => {
            most_at(schedule, keep, schedule.upcoming(from, zone).take(MOMENTS_MAX), zone)
        }
        told => told,
    }
}

/// The most that are there at any of the moments.
fn most_at(
    schedule: &Schedule,
    keep: &Keep,
    moments: impl Iterator<Item = Timestamp>,
    zone: &TimeZone,
) -> LongRun {
    let (mut most, mut work) = (0, 0);
    for moment in moments {
        match steady(schedule, keep, moment, zone) {
            Some(instants) => {
                work += instants.looked_for;
                most = most.max(instants.kept.len());
            }
            None => return LongRun::MoreThan { snapshots: INSTANTS_MAX },
        }
        if work > WORK_MAX {
            break;
        }
    }
    LongRun::Levels { snapshots: most }
}

pub(super) struct Steady {
    /// When the snapshots that are there were taken.
    pub(super) kept: BTreeSet<Timestamp>,
    looked_for: usize,
}

/// What the last run until `moment` leaves, if the schedule ran for ever before; `None` if that is too much to look for.
pub(super) fn steady(schedule: &Schedule, keep: &Keep, moment: Timestamp, zone: &TimeZone) -> Option<Steady> {
    let mut instants = BTreeSet::new();
    let Some(newest) = schedule.last_until(moment, zone) else {
        return Some(Steady { kept: instants, looked_for: 0 });
    };
    let by_age = keep.max_age().map(|age| Rule { per: Per::Snapshot, limit: Limit::Within(age) });
    let all_by_age = keep.rules().is_empty().then_some(by_age).flatten();
    let mut looked_for = 0;
    for rule in keep.rules().iter().copied().chain(all_by_age) {
        let (count, since) = match (rule.limit, keep.max_age()) {
            // One more than it keeps, so that the oldest of all is never taken for one that it has to keep.
            (Limit::Count(count), _) => (usize::try_from(count.get()).ok()?.checked_add(1)?, Timestamp::MIN),
            (Limit::Within(reach), _) => (usize::MAX, reach.before(newest, zone)),
            (Limit::All, age) => (usize::MAX, age?.before(newest, zone)),
        };
        let mut next = Some(newest);
        let mut found = 0;
        while let Some(instant) = next.filter(|instant| *instant >= since && found < count) {
            instants.insert(instant);
            found += 1;
            looked_for += 1;
            if looked_for > INSTANTS_MAX {
                return None;
            }
            let before = start_of(rule.per, instant, zone)?.checked_sub(SignedDuration::from_secs(1)).ok()?;
            next = schedule.last_until(before, zone);
        }
        // What lies before all that it keeps.
        instants.extend(next);
    }
    let candidates: Vec<Candidate> = instants.iter().zip(0_u64..).map(candidate).collect();
    let judged = verdicts(&candidates, keep, newest, zone);
    let kept = judged.iter().filter(|verdict| verdict.keeps()).map(|verdict| verdict.created).collect();
    Some(Steady { kept, looked_for })
}

fn candidate((created, seq): (&Timestamp, u64)) -> Candidate {
    let snapshot = SnapshotId::from_uuid(Uuid::from_u128(seq.into()));
    Candidate { snapshot, created: *created, seq, standing: Standing::Counted }
}

/// The first instant of the period that `at` is in.
fn start_of(per: Per, at: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
    let zoned: Zoned = at.to_zoned(zone.clone());
    let date = zoned.date();
    let date = match per {
        Per::Snapshot => return Some(at),
        Per::Hour => {
            let into = i64::from(zoned.minute()) * 60 + i64::from(zoned.second());
            return at.checked_sub(SignedDuration::from_secs(into)).ok();
        }
        Per::Day => date,
        Per::Week => {
            let monday = -i64::from(date.weekday().to_monday_zero_offset());
            date.checked_add(SignedDuration::from_hours(24 * monday)).ok()?
        }
        Per::Month => date.first_of_month(),
        Per::Quarter => {
            let month = (date.month() - 1) / 3 * 3 + 1;
            date.with().month(month).day(1).build().ok()?
        }
        Per::Year => date.first_of_year(),
    };
    date.to_zoned(zone.clone()).ok().map(|start| start.timestamp())
}
