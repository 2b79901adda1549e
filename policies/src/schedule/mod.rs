//! When a policy runs.
//!
//! A schedule is a set of *planned instants*, whole seconds on the time line, and nothing else: the same text and time
//! zone give the same instants for ever, whatever ran and whenever the engine was up. [`due`] compares them with what
//! the log says.
//!
//! | written | is | |
//! |---|---|---|
//! | `every 15m` | elapsed time | the multiples of 15 minutes since 1970-01-01T00:00:00Z; no time zone, no calendar |
//! | `hourly`, `Mon..Fri 02:30`, `*-*-01 04:00 UTC` | [`OnCalendar`] | systemd.time(7) |
//! | `30 2 * * 1-5`, `@daily` | [`Cron`] | five fields, or six with seconds first |
//!
//! **When the clocks change.** A schedule that names every hour of the day follows elapsed time: it runs in both runs of
//! a repeated hour, and not in one that is left out. Any other names times of day, and each of them happens once a day:
//! in a repeated hour at its first run, and where the clock leaves it out, at the instant at which it goes on. So no day
//! is lost and none doubled.

mod calendar;
mod cron;
mod due;
mod wall;

use std::fmt;
use std::str::FromStr;

pub use calendar::{CalendarError, OnCalendar};
pub use cron::{Cron, CronError};
pub use due::{Asked, CatchUp, Count, Due, History, SkipReason, Skipped, delay, due};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};

use crate::span::{Elapsed, SpanError};

/// The longest text of a schedule, in bytes.
pub const SCHEDULE_BYTES_MAX: usize = 256;

/// When a policy runs. Reads and prints as text.
///
/// ```
/// use jiff::tz::TimeZone;
/// use snaptree_policies::schedule::Schedule;
/// let vienna = TimeZone::get("Europe/Vienna").unwrap();
/// let schedule: Schedule = "Mon..Fri 02:30".parse().unwrap();
/// let at = schedule.next_after("2026-11-21T00:00:00Z".parse().unwrap(), &vienna).unwrap();
/// assert_eq!(at.to_string(), "2026-11-23T01:30:00Z");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Schedule {
    /// Elapsed time.
    Every(Elapsed),
    /// A calendar expression of systemd.
    Calendar(OnCalendar),
    /// A line of cron.
    Cron(Cron),
}

/// A schedule that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    /// Too long a text.
    #[error("a schedule has at most {SCHEDULE_BYTES_MAX} bytes, this one has {0}")]
    TooLong(usize),
    /// `every` something that is no length of time.
    #[error("'every' needs a length of time")]
    Every(#[source] SpanError),
    /// Neither `every` nor cron, and no calendar expression.
    #[error(transparent)]
    Calendar(#[from] CalendarError),
    /// No line of cron.
    #[error(transparent)]
    Cron(#[from] CronError),
    /// It names no instant at all, such as 30 February.
    #[error("'{0}' never comes")]
    Never(String),
}

impl FromStr for Schedule {
    type Err = ScheduleError;

    fn from_str(text: &str) -> Result<Self, ScheduleError> {
        if text.len() > SCHEDULE_BYTES_MAX {
            return Err(ScheduleError::TooLong(text.len()));
        }
        let text = text.trim();
        let schedule = if let Some(length) = text.strip_prefix("every ") {
            Self::Every(length.trim().parse().map_err(ScheduleError::Every)?)
        } else if text.starts_with('@') || text.split_whitespace().count() >= 5 {
            Self::Cron(text.parse()?)
        } else {
            Self::Calendar(text.parse()?)
        };
        let ever = schedule.next_after(Timestamp::UNIX_EPOCH, &TimeZone::UTC);
        ever.map(|_| schedule).ok_or_else(|| ScheduleError::Never(text.to_owned()))
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Every(length) => write!(f, "every {length}"),
            Self::Calendar(calendar) => calendar.fmt(f),
            Self::Cron(cron) => cron.fmt(f),
        }
    }
}

impl TryFrom<String> for Schedule {
    type Error = ScheduleError;
    fn try_from(text: String) -> Result<Self, ScheduleError> {
        text.parse()
    }
}

impl From<Schedule> for String {
    fn from(schedule: Schedule) -> String {
        schedule.to_string()
    }
}

/// The last whole second that is not after `at`.
fn second_of(at: Timestamp) -> i64 {
    let seconds = at.as_second();
    if at.subsec_nanosecond() < 0 { seconds.saturating_sub(1) } else { seconds }
}

impl Schedule {
    /// The first planned instant after `at`; none if there is no more (in the year 2199 at the latest).
    ///
    /// `zone` is the policy's; a calendar expression that names its own goes by that one.
    pub fn next_after(&self, at: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        match self {
            Self::Every(length) => {
                let length = i64::from(length.seconds());
                let next = second_of(at).div_euclid(length).checked_add(1)?.checked_mul(length)?;
                Timestamp::from_second(next).ok()
            }
            Self::Calendar(calendar) => wall::next_after(calendar, at, calendar.zone().unwrap_or(zone)),
            Self::Cron(cron) => wall::next_after(cron, at, zone),
        }
    }

    /// The last planned instant that is not after `at`; none if there is none in the 270 years before.
    ///
    /// Asks [`next_after`](Self::next_after) some seventy times at most, however rare or frequent the instants are.
    pub fn last_until(&self, at: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        let end = second_of(at);
        // The first instant in (since, at].
        let first_after = |since: i64| {
            let since = Timestamp::from_second(since).ok()?;
            self.next_after(since, zone).map(second_of).filter(|found| *found <= end)
        };
        let (mut without, mut found) = (end, None);
        for power in 0..34 {
            let since = end.saturating_sub(1 << power);
            found = first_after(since);
            if found.is_some() {
                break;
            }
            without = since;
        }
        // There is none in (without, at], and one at `last` or between the two.
        let mut last = found?;
        while without - last > 1 {
            let middle = last + (without - last) / 2;
            match first_after(middle) {
                Some(later) => last = later,
                None => without = middle,
            }
        }
        Timestamp::from_second(first_after(last).unwrap_or(last)).ok()
    }

    /// The planned instants after `at`, in order.
    pub fn upcoming<'a>(&'a self, at: Timestamp, zone: &'a TimeZone) -> impl Iterator<Item = Timestamp> + 'a {
        std::iter::successors(self.next_after(at, zone), move |at| self.next_after(*at, zone))
    }
}

#[cfg(test)]
mod tests;
