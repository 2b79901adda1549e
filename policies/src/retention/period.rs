//! Periods of the calendar: what a snapshot is the newest of.

use std::fmt;

use jiff::civil::{Date, DateTime};
use jiff::tz::{Offset, TimeZone};
use jiff::{Timestamp, civil::ISOWeekDate};
use serde::{Deserialize, Serialize};

/// What a rule keeps one of, from the finest to the coarsest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Per {
    /// Each snapshot.
    Snapshot,
    /// An hour. One that the clock goes through twice is two.
    Hour,
    /// A day, from midnight to midnight.
    Day,
    /// A week of ISO 8601: from Monday; the first one of a year has its first Thursday.
    Week,
    /// A month.
    Month,
    /// Three months, from January.
    Quarter,
    /// A year.
    Year,
}

/// One period of a [`Per`].
///
/// Keyed by the rule's kind as well as by its number: week 1 and month 1 of a year are not the same period.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Period {
    /// A snapshot of its own.
    Snapshot,
    /// The hour of a day, and the offset from UTC, which tells the two runs of a repeated hour apart.
    Hour(Date, i8, Offset),
    /// The day.
    Day(Date),
    /// The year of the week, and the week.
    Week(i16, i8),
    /// Year and month.
    Month(i16, i8),
    /// Year and quarter.
    Quarter(i16, i8),
    /// The year.
    Year(i16),
}

/// What a clock on the wall shows, and how far it is from UTC.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wall {
    time: DateTime,
    offset: Offset,
}

impl Wall {
    pub(super) fn at(at: Timestamp, zone: &TimeZone) -> Self {
        let offset = zone.to_offset(at);
        Self { time: offset.to_datetime(at), offset }
    }

    pub(super) fn period(&self, per: Per) -> Period {
        let date = self.time.date();
        match per {
            Per::Snapshot => Period::Snapshot,
            Per::Hour => Period::Hour(date, self.time.hour(), self.offset),
            Per::Day => Period::Day(date),
            Per::Week => {
                let week: ISOWeekDate = date.iso_week_date();
                Period::Week(week.year(), week.week())
            }
            Per::Month => Period::Month(date.year(), date.month()),
            Per::Quarter => Period::Quarter(date.year(), (date.month() - 1) / 3 + 1),
            Per::Year => Period::Year(date.year()),
        }
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Snapshot => f.write_str("the snapshot itself"),
            Self::Hour(date, hour, offset) => write!(f, "{date} {hour:02}h{offset}"),
            Self::Day(date) => write!(f, "{date}"),
            Self::Week(year, week) => write!(f, "{year}-W{week:02}"),
            Self::Month(year, month) => write!(f, "{year}-{month:02}"),
            Self::Quarter(year, quarter) => write!(f, "{year}-Q{quarter}"),
            Self::Year(year) => write!(f, "{year}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn period(at: &str, zone: &str, per: Per) -> String {
        Wall::at(at.parse().unwrap(), &TimeZone::get(zone).unwrap()).period(per).to_string()
    }

    #[test]
    fn periods_are_those_of_the_time_zone() {
        let at = "2026-12-31T23:30:00Z";
        assert_eq!(period(at, "UTC", Per::Year), "2026");
        assert_eq!(period(at, "Europe/Vienna", Per::Year), "2027");
        assert_eq!(period(at, "Europe/Vienna", Per::Day), "2027-01-01");
        assert_eq!(period(at, "Asia/Kathmandu", Per::Hour), "2027-01-01 05h+05:45");
        assert_eq!(period(at, "UTC", Per::Quarter), "2026-Q4");
        assert_eq!(period(at, "UTC", Per::Month), "2026-12");
    }

    #[test]
    fn a_week_belongs_to_the_year_of_its_thursday() {
        assert_eq!(period("2027-01-01T12:00:00Z", "UTC", Per::Week), "2026-W53");
        assert_eq!(period("2024-12-30T12:00:00Z", "UTC", Per::Week), "2025-W01");
    }

    #[test]
    fn an_hour_that_the_clock_goes_through_twice_is_two() {
        let first = period("2026-10-25T00:30:00Z", "Europe/Vienna", Per::Hour);
        let second = period("2026-10-25T01:30:00Z", "Europe/Vienna", Per::Hour);
        assert_eq!((first.as_str(), second.as_str()), ("2026-10-25 02h+02", "2026-10-25 02h+01"));
    }
}
