//! Lengths of time as policy files write them: [`Reach`] back over a calendar, and [`Elapsed`] time.
//!
//! The two are apart because a day is not always 24 hours. "Seven days back" is the same time of day a week ago;
//! "every 15 minutes" counts seconds.

use std::fmt;
use std::str::FromStr;

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Span, Timestamp};
use serde::{Deserialize, Serialize};

/// The furthest that a length of time can reach: a hundred years, in days.
const DAYS_MAX: u64 = 36_525;

/// A length of time that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpanError {
    /// Not written as one.
    #[error("'{text}' is no length of time; write {allowed}")]
    Form {
        /// What was written.
        text: String,
        /// What may be.
        allowed: &'static str,
    },
    /// `m` is minutes here and months elsewhere; a snapshot is not deleted on a guess.
    #[error("'{0}' could be minutes or months; write 'min' or 'mo'")]
    Ambiguous(String),
    /// No time at all.
    #[error("'{0}' is no time at all; leave the line out instead")]
    Zero(String),
    /// More than a hundred years.
    #[error("'{0}' is longer than a hundred years")]
    TooLong(String),
}

const REACH_FORM: &str = "36h, 7d, 2w, 6mo or 1y (also together: 1y 6mo)";
const ELAPSED_FORM: &str = "30s, 15m, 1h30m, 2h or 1d (24 hours)";

fn shown(text: &str) -> String {
    text.chars().take(60).collect()
}

/// The numbers and their units, in the order written: `1h30m`, `1y 6mo`.
fn parts(text: &str) -> Option<Vec<(u64, &str)>> {
    let mut rest = text.trim();
    let mut found = Vec::new();
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let number: u64 = rest.get(..digits)?.parse().ok()?;
        let tail = rest.get(digits..)?.trim_start();
        let end = tail.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(end);
        if unit.is_empty() || found.len() == 8 {
            return None;
        }
        found.push((number, unit));
        rest = tail.trim_start();
    }
    Some(found).filter(|found| !found.is_empty())
}

/// How far back a rule reaches: calendar months and days, and exact seconds, counted in the policy's time zone.
///
/// ```
/// use snaptree_policies::Reach;
/// let reach: Reach = "1y 6mo".parse().unwrap();
/// assert_eq!(reach.to_string(), "1y 6mo");
/// assert_eq!("2w".parse::<Reach>().unwrap(), "14d".parse().unwrap());
/// assert!("6m".parse::<Reach>().is_err(), "minutes, or months?");
/// assert!("0d".parse::<Reach>().is_err());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Reach {
    months: u32,
    days: u32,
    seconds: u32,
}

impl Reach {
    /// The instant that lies this far before `at` on the calendar of `zone`: the same day of the month and the same
    /// time of day, or the nearest before that there is.
    ///
    /// The earliest instant that can be written, if there is none so early.
    pub fn before(&self, at: Timestamp, zone: &TimeZone) -> Timestamp {
        let calendar = Span::new()
            .try_months(self.months)
            .and_then(|span| span.try_days(self.days))
            .and_then(|span| at.to_zoned(zone.clone()).checked_sub(span));
        calendar
            .and_then(|then| then.timestamp().checked_sub(SignedDuration::from_secs(i64::from(self.seconds))))
            .unwrap_or(Timestamp::MIN)
    }
}

impl FromStr for Reach {
    type Err = SpanError;

    fn from_str(text: &str) -> Result<Self, SpanError> {
        let form = || SpanError::Form { text: shown(text), allowed: REACH_FORM };
        let too_long = || SpanError::TooLong(shown(text));
        let (mut months, mut days, mut seconds) = (0_u64, 0_u64, 0_u64);
        for (number, unit) in parts(text).ok_or_else(form)? {
            let (total, factor) = match unit {
                "y" | "year" | "years" => (&mut months, 12),
                "mo" | "month" | "months" => (&mut months, 1),
                "w" | "week" | "weeks" => (&mut days, 7),
                "d" | "day" | "days" => (&mut days, 1),
                "h" | "hour" | "hours" => (&mut seconds, 3_600),
                "min" | "minute" | "minutes" => (&mut seconds, 60),
                "s" | "second" | "seconds" => (&mut seconds, 1),
                "m" => return Err(SpanError::Ambiguous(shown(text))),
                _ => return Err(form()),
            };
            *total = number
                .checked_mul(factor)
                .and_then(|number| number.checked_add(*total))
                .filter(|total| *total <= DAYS_MAX * 86_400)
                .ok_or_else(too_long)?;
        }
        // 487/16 days are the mean month of the calendar with a leap year in four.
        let in_days = (months.saturating_mul(487) / 16).saturating_add(days).saturating_add(seconds / 86_400);
        if in_days > DAYS_MAX {
            return Err(too_long());
        }
        if months == 0 && days == 0 && seconds == 0 {
            return Err(SpanError::Zero(shown(text)));
        }
        let narrow = |number: u64| u32::try_from(number).map_err(|_| too_long());
        Ok(Self { months: narrow(months)?, days: narrow(days)?, seconds: narrow(seconds)? })
    }
}

impl fmt::Display for Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let calendar = [(self.months / 12, "y"), (self.months % 12, "mo"), (self.days, "d")];
        let clock =
            [(self.seconds / 3_600, "h"), (self.seconds % 3_600 / 60, "min"), (self.seconds % 60, "s")];
        write_parts(f, calendar.into_iter().chain(clock).map(|(number, unit)| (u64::from(number), unit)), " ")
    }
}

/// Time as a stopwatch counts it, in whole seconds.
///
/// ```
/// use snaptree_policies::Elapsed;
/// let quarter: Elapsed = "15m".parse().unwrap();
/// assert_eq!(quarter.seconds(), 900);
/// assert_eq!("90m".parse::<Elapsed>().unwrap().to_string(), "1h30m");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Elapsed {
    seconds: u32,
}

impl Elapsed {
    /// So many seconds.
    pub const fn from_seconds(seconds: u32) -> Self {
        Self { seconds }
    }

    /// In seconds.
    pub const fn seconds(self) -> u32 {
        self.seconds
    }

    /// For arithmetic with timestamps.
    pub const fn duration(self) -> SignedDuration {
        SignedDuration::from_secs(self.seconds as i64)
    }
}

impl FromStr for Elapsed {
    type Err = SpanError;

    fn from_str(text: &str) -> Result<Self, SpanError> {
        let form = || SpanError::Form { text: shown(text), allowed: ELAPSED_FORM };
        let too_long = || SpanError::TooLong(shown(text));
        let mut seconds = 0_u64;
        for (number, unit) in parts(text).ok_or_else(form)? {
            let factor = match unit {
                "w" | "week" | "weeks" => 604_800,
                "d" | "day" | "days" => 86_400,
                "h" | "hour" | "hours" => 3_600,
                "m" | "min" | "minute" | "minutes" => 60,
                "s" | "sec" | "second" | "seconds" => 1,
                _ => return Err(form()),
            };
            seconds = number
                .checked_mul(factor)
                .and_then(|number| number.checked_add(seconds))
                .filter(|seconds| *seconds <= DAYS_MAX * 86_400)
                .ok_or_else(too_long)?;
        }
        if seconds == 0 {
            return Err(SpanError::Zero(shown(text)));
        }
        Ok(Self { seconds: u32::try_from(seconds).map_err(|_| too_long())? })
    }
}

impl fmt::Display for Elapsed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let clock = [
            (self.seconds / 86_400, "d"),
            (self.seconds % 86_400 / 3_600, "h"),
            (self.seconds % 3_600 / 60, "m"),
            (self.seconds % 60, "s"),
        ];
        write_parts(f, clock.into_iter().map(|(number, unit)| (u64::from(number), unit)), "")
    }
}

fn write_parts(
    f: &mut fmt::Formatter<'_>,
    parts: impl Iterator<Item = (u64, &'static str)>,
    between: &str,
) -> fmt::Result {
    let written: Vec<String> =
        parts.filter(|(number, _)| *number > 0).map(|(number, unit)| format!("{number}{unit}")).collect();
    if written.is_empty() { f.pad("0s") } else { f.pad(&written.join(between)) }
}

macro_rules! as_text {
    ($name:ident) => {
        impl TryFrom<String> for $name {
            type Error = SpanError;
            fn try_from(text: String) -> Result<Self, SpanError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(span: $name) -> String {
                span.to_string()
            }
        }
    };
}
as_text!(Reach);
as_text!(Elapsed);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_length_of_time_is_refused() {
        for bad in ["", "7", "d", "-7d", "7 parsecs", "1.5h", "soon", "٧d", "99999999999999999999d", "101y"]
        {
            assert!(bad.parse::<Reach>().is_err(), "{bad}");
        }
        for bad in ["", "15", "6mo", "1y", "0s", "-5m", "99999999999w"] {
            assert!(bad.parse::<Elapsed>().is_err(), "{bad}");
        }
        assert!("100y".parse::<Reach>().is_ok());
    }

    #[test]
    fn reaching_back_over_a_change_of_the_clock_keeps_the_time_of_day() {
        let zone = TimeZone::get("Europe/Vienna").unwrap();
        let at: Timestamp = "2026-03-30T10:00:00+02:00".parse().unwrap();
        let back = |text: &str| text.parse::<Reach>().unwrap().before(at, &zone).to_string();
        assert_eq!(back("2d"), "2026-03-28T09:00:00Z");
        assert_eq!(back("48h"), "2026-03-28T08:00:00Z");
        assert_eq!(back("1mo"), "2026-02-28T09:00:00Z", "there is no 30 February");
        assert_eq!("100y".parse::<Reach>().unwrap().before(Timestamp::MIN, &zone), Timestamp::MIN);
    }

    #[test]
    fn what_is_printed_reads_back() {
        for text in ["36h", "7d", "6mo", "1y 6mo", "1y 1mo 1d 1h 1min 1s"] {
            assert_eq!(text.parse::<Reach>().unwrap().to_string(), text);
        }
        for text in ["15m", "1h30m", "1d", "2d1h1m1s"] {
            assert_eq!(text.parse::<Elapsed>().unwrap().to_string(), text);
        }
    }
}
