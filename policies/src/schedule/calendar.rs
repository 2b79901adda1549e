//! Calendar expressions, as `OnCalendar=` in systemd.time(7) has them.
//!
//! ```text
//!  Mon..Fri,Sun  2026-*-01..07  00/2:30:00  Europe/Vienna
//!  weekdays      year-month-day hour:min:s  time zone
//!
//!  *       any                       a..b    a range, upward          weekdays may be left out (any),
//!  a,b,c   several                   a..b/n  every n-th of it         so may the date (any), the time (midnight),
//!  a/n     a, a+n, ... to the end    *-*~01  days from month's end    the seconds (0) and the time zone (the policy's)
//!
//!  minutely hourly daily weekly monthly quarterly semiannually yearly
//! ```
//!
//! What systemd refuses is refused: a range that goes downward, a repetition that never comes. Fractions of a second and
//! `@seconds` are refused too, since a schedule's instants are whole seconds and come again.

use std::fmt;
use std::str::FromStr;

use jiff::civil::{Date, DateTime, Time};
use jiff::tz::TimeZone;

use super::wall::{Rhythm, WallTimes};

const YEAR_MIN: i16 = 1970;
const YEAR_MAX: i16 = 2199;

/// The most items in one list.
const ITEMS_MAX: usize = 60;

const WEEKDAYS: [&str; 7] = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"];

/// The shorthands, with what they stand for.
const SHORTHANDS: [(&str, &str); 12] = [
    ("minutely", "*-*-* *:*:00"),
    ("hourly", "*-*-* *:00:00"),
    ("daily", "*-*-* 00:00:00"),
    ("weekly", "Mon *-*-* 00:00:00"),
    ("monthly", "*-*-01 00:00:00"),
    ("quarterly", "*-01,04,07,10-01 00:00:00"),
    ("semiannually", "*-01,07-01 00:00:00"),
    ("semi-annually", "*-01,07-01 00:00:00"),
    ("biannually", "*-01,07-01 00:00:00"),
    ("bi-annually", "*-01,07-01 00:00:00"),
    ("yearly", "*-01-01 00:00:00"),
    ("annually", "*-01-01 00:00:00"),
];

/// A calendar expression that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is no calendar expression: {problem}")]
pub struct CalendarError {
    text: String,
    problem: String,
}

/// One item of a list: a value, a range, or either with a repetition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Item {
    start: i16,
    stop: Option<i16>,
    step: Option<i16>,
}

impl Item {
    /// Its values, where `last` is the greatest that there is.
    fn values(self, last: i16) -> impl Iterator<Item = i16> {
        let stop = match (self.stop, self.step) {
            (Some(stop), _) => stop.min(last),
            (None, Some(_)) => last,
            (None, None) => self.start.min(last),
        };
        let step = usize::try_from(self.step.unwrap_or(1).max(1)).unwrap_or(1);
        (self.start..=stop).step_by(step)
    }

    /// The same, counted from the end of a month of `days` days.
    fn turned(self, days: i16) -> Self {
        let forward = |day: i16| days + 1 - day;
        let (start, stop) = match self.stop {
            // The repetition begins at the start, which is now the end.
            Some(stop) => {
                let over = (stop - self.start) % self.step.unwrap_or(1).max(1);
                (forward(stop - over), Some(forward(self.start)))
            }
            None => (forward(self.start), None),
        };
        Self { start, stop, step: self.step }
    }
}

/// A field: any value (`None`), or those of a list.
type Field = Option<Vec<Item>>;

/// Bits for the values of `field` from 0 to `last`.
fn bits(field: &Field, last: i16) -> u64 {
    match field {
        None => !0,
        Some(items) => {
            items.iter().flat_map(|item| item.values(last)).fold(0, |bits, value| bits | bit(value))
        }
    }
}

fn bit(value: i16) -> u64 {
    u32::try_from(value).ok().and_then(|value| 1_u64.checked_shl(value)).unwrap_or(0)
}

/// The least value from `from` to `last` that is set.
fn least(bits: u64, from: i16, last: i16) -> Option<i16> {
    (from..=last).find(|value| bits & bit(*value) != 0)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DaysFrom {
    Start,
    End,
}

/// A calendar expression. Prints as it was written, blanks apart.
#[derive(Clone, Debug)]
pub struct OnCalendar {
    text: String,
    /// Bit 0 is Monday.
    weekdays: u64,
    years: Field,
    months: u64,
    days: Field,
    days_from: DaysFrom,
    hours: u64,
    minutes: u64,
    seconds: u64,
    zone: Option<TimeZone>,
}

impl PartialEq for OnCalendar {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for OnCalendar {}

impl fmt::Display for OnCalendar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl OnCalendar {
    /// The time zone that it names itself.
    pub fn zone(&self) -> Option<&TimeZone> {
        self.zone.as_ref()
    }

    /// Bits for the days of a month that match, by their number.
    fn days_of(&self, year: i16, month: i8) -> u64 {
        let Ok(first) = Date::new(year, month, 1) else { return 0 };
        let last = i16::from(first.days_in_month());
        let mut days = match (&self.days, self.days_from) {
            (Some(items), DaysFrom::End) => {
                let items = items.iter().map(|item| item.turned(last)).filter(|item| item.start > 0);
                bits(&Some(items.collect()), last)
            }
            (days, _) => bits(days, last),
        };
        let first_weekday = i16::from(first.weekday().to_monday_zero_offset());
        for day in 1..=last {
            if self.weekdays & bit((first_weekday + day - 1) % 7) == 0 {
                days &= !bit(day);
            }
        }
        days
    }

    /// The first matching date that is not before `from`.
    fn date_from(&self, from: Date) -> Option<Date> {
        let years = (from.year().max(YEAR_MIN)..=YEAR_MAX).filter(|year| match &self.years {
            None => true,
            Some(items) => items.iter().any(|item| item.values(YEAR_MAX).any(|value| value == *year)),
        });
        for year in years {
            for month in (1..=12_i8).filter(|month| self.months & bit(i16::from(*month)) != 0) {
                let first = match (year, month).cmp(&(from.year(), from.month())) {
                    std::cmp::Ordering::Less => continue,
                    std::cmp::Ordering::Equal => i16::from(from.day()),
                    std::cmp::Ordering::Greater => 1,
                };
                let days = self.days_of(year, month);
                // No month is so long that the last bits are set.
                let found = least(days, first, i16::from(Date::new(year, month, 1).ok()?.days_in_month()));
                if let Some(day) = found.and_then(|day| i8::try_from(day).ok()) {
                    return Date::new(year, month, day).ok();
                }
            }
        }
        None
    }

    /// The first matching time of day that is not before `from`.
    fn time_from(&self, from: Time) -> Option<Time> {
        let (hour, minute, second) =
            (i16::from(from.hour()), i16::from(from.minute()), i16::from(from.second()));
        let first = |bits, last| least(bits, 0, last);
        let at = |hour: i16, minute: i16, second: i16| {
            let small = |value: i16| i8::try_from(value).ok();
            Time::new(small(hour)?, small(minute)?, small(second)?, 0).ok()
        };
        if self.hours & bit(hour) != 0 {
            if self.minutes & bit(minute) != 0
                && let Some(second) = least(self.seconds, second, 59)
            {
                return at(hour, minute, second);
            }
            if let Some(minute) = least(self.minutes, minute + 1, 59) {
                return at(hour, minute, first(self.seconds, 59)?);
            }
        }
        let hour = least(self.hours, hour + 1, 23)?;
        at(hour, first(self.minutes, 59)?, first(self.seconds, 59)?)
    }
}

impl WallTimes for OnCalendar {
    fn first_from(&self, from: DateTime) -> Option<DateTime> {
        let date = self.date_from(from.date())?;
        if date == from.date() {
            if let Some(time) = self.time_from(from.time()) {
                return Some(date.to_datetime(time));
            }
            let later = self.date_from(date.tomorrow().ok()?)?;
            return Some(later.to_datetime(self.time_from(Time::midnight())?));
        }
        Some(date.to_datetime(self.time_from(Time::midnight())?))
    }

    fn rhythm(&self) -> Rhythm {
        let all = (0..24).all(|hour| self.hours & bit(hour) != 0);
        if all { Rhythm::Elapsed } else { Rhythm::TimesOfDay }
    }
}

impl FromStr for OnCalendar {
    type Err = CalendarError;

    fn from_str(text: &str) -> Result<Self, CalendarError> {
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        let parsed = parse(&text);
        let shown = text.chars().take(60).collect();
        let mut calendar = parsed.map_err(|problem| CalendarError { text: shown, problem })?;
        calendar.text = text;
        Ok(calendar)
    }
}

/// The words of an expression: `[weekdays] [date] [time] [time zone]`, or a shorthand for all but the last.
fn parse(text: &str) -> Result<OnCalendar, String> {
    let mut words: Vec<&str> = text.split(' ').filter(|word| !word.is_empty()).collect();
    let zone = words.last().copied().and_then(zone_of);
    if zone.is_some() {
        words.pop();
    }
    if let [word] = words.as_slice()
        && let Some((_, long)) = SHORTHANDS.iter().find(|(name, _)| word.eq_ignore_ascii_case(name))
    {
        words = long.split(' ').collect();
    }
    if words.is_empty() {
        return Err("it is empty".to_owned());
    }
    let mut words = words.into_iter().peekable();
    let weekdays = match words.next_if(|word| word.starts_with(|c: char| c.is_ascii_alphabetic())) {
        Some(word) => weekdays_of(word)?,
        None => !0,
    };
    let (years, months, days, days_from) = match words.next_if(|word| !word.contains(':')) {
        Some(word) => date_of(word)?,
        None => (None, None, None, DaysFrom::Start),
    };
    let (hours, minutes, seconds) = match words.next() {
        Some(word) => time_of(word)?,
        None => (single(0), single(0), single(0)),
    };
    if let Some(word) = words.next() {
        return Err(format!("'{word}' is too much, or no time zone"));
    }
    Ok(OnCalendar {
        text: String::new(),
        weekdays,
        years,
        months: bits(&months, 12),
        days,
        days_from,
        hours: bits(&hours, 23),
        minutes: bits(&minutes, 59),
        seconds: bits(&seconds, 59),
        zone,
    })
}

fn single(value: i16) -> Field {
    Some(vec![Item { start: value, stop: None, step: None }])
}

/// A word that can only be a time zone: not one that begins like a weekday, a date or a time.
fn zone_of(word: &str) -> Option<TimeZone> {
    if word.eq_ignore_ascii_case("utc") {
        return Some(TimeZone::UTC);
    }
    if !word.starts_with(|c: char| c.is_ascii_alphabetic()) || weekdays_of(word).is_ok() {
        return None;
    }
    TimeZone::get(word).ok()
}

/// The number of a weekday, by its name or the first three letters.
fn weekday_of(name: &str) -> Result<i16, String> {
    let name = name.to_ascii_lowercase();
    let found = WEEKDAYS.iter().zip(0_i16..).find(|(long, _)| **long == name || long.get(..3) == Some(&name));
    found.map(|(_, number)| number).ok_or_else(|| near_word(&name))
}

/// What a word that is neither a weekday nor a shorthand was perhaps meant to be.
fn near_word(name: &str) -> String {
    let known = SHORTHANDS.iter().map(|(name, _)| *name).chain(WEEKDAYS);
    match snaptree_engine::near::nearest(name, known) {
        Some(near) => format!("there is no '{name}'; did you mean '{near}'?"),
        None => format!("'{name}' is neither a weekday nor a shorthand such as hourly or daily"),
    }
}

fn weekdays_of(word: &str) -> Result<u64, String> {
    let mut bits = 0;
    // systemd lets a comma stand at the end.
    for part in word.strip_suffix(',').unwrap_or(word).split(',') {
        let (first, last) = match part.split_once("..").or_else(|| part.split_once('-')) {
            Some((first, last)) => (weekday_of(first)?, weekday_of(last)?),
            None => (weekday_of(part)?, weekday_of(part)?),
        };
        if last < first {
            return Err(format!("'{part}' goes backward; a week begins on Monday: write Sat,Sun,Mon"));
        }
        bits |= (first..=last).fold(0, |bits, day| bits | bit(day));
    }
    Ok(bits)
}

type DateFields = (Field, Field, Field, DaysFrom);

fn date_of(word: &str) -> Result<DateFields, String> {
    let wrong = || format!("'{word}' is no date; write year-month-day, month-day, or month~day from its end");
    let (before, day, days_from) = match word.rsplit_once(['-', '~']) {
        Some((before, day)) if word[before.len()..].starts_with('~') => (before, day, DaysFrom::End),
        Some((before, day)) => (before, day, DaysFrom::Start),
        None => return Err(wrong()),
    };
    let (year, month) = match before.split_once('-') {
        Some((year, month)) => (year, month),
        None => ("*", before),
    };
    if month.contains(['-', '~']) {
        return Err(wrong());
    }
    let bounds = match days_from {
        DaysFrom::Start => Bounds { what: "day", first: 1, last: 31, turned: false },
        // systemd counts at most 28 days from the end.
        DaysFrom::End => Bounds { what: "day", first: 1, last: 28, turned: true },
    };
    Ok((
        years_of(year)?,
        field_of(month, Bounds { what: "month", first: 1, last: 12, turned: false })?,
        field_of(day, bounds)?,
        days_from,
    ))
}

fn time_of(word: &str) -> Result<(Field, Field, Field), String> {
    let parts: Vec<&str> = word.split(':').collect();
    let (hour, minute, second) = match parts.as_slice() {
        [hour, minute] => (*hour, *minute, "0"),
        [hour, minute, second] => (*hour, *minute, *second),
        _ => return Err(format!("'{word}' is no time; write hour:minute or hour:minute:second")),
    };
    let upto = |what, last| Bounds { what, first: 0, last, turned: false };
    if second.contains('.') && !second.contains("..") {
        return Err(format!("'{second}': seconds are whole"));
    }
    Ok((
        field_of(hour, upto("hour", 23))?,
        field_of(minute, upto("minute", 59))?,
        field_of(second, upto("second", 59))?,
    ))
}

/// What the values of a field can be.
#[derive(Clone, Copy)]
struct Bounds {
    what: &'static str,
    first: i16,
    last: i16,
    /// Counted from the end of the month, so that a repetition goes down.
    turned: bool,
}

/// Years of two digits are those from 1970 to 2069.
fn years_of(text: &str) -> Result<Field, String> {
    let full = |year: i16| match year {
        0..70 => year + 2000,
        70..100 => year + 1900,
        year => year,
    };
    let items = items_of(text, "year")?.map(|items| {
        let full = |item: Item| Item { start: full(item.start), stop: item.stop.map(full), step: item.step };
        items.into_iter().map(full).collect()
    });
    check(items, Bounds { what: "year", first: YEAR_MIN, last: YEAR_MAX, turned: false })
}

fn field_of(text: &str, bounds: Bounds) -> Result<Field, String> {
    check(items_of(text, bounds.what)?, bounds)
}

fn check(field: Field, bounds: Bounds) -> Result<Field, String> {
    let Bounds { what, first, last, turned } = bounds;
    for item in field.iter().flatten() {
        let inside = |value: i16| (first..=last).contains(&value);
        if !inside(item.start) || !item.stop.is_none_or(inside) {
            return Err(format!("a {what} is from {first} to {last}"));
        }
        match (item.stop, item.step) {
            (Some(stop), _) if stop < item.start => {
                return Err(format!("the {what}s {}..{stop} do not go upward", item.start));
            }
            (None, Some(step)) => {
                let next = if turned { item.start - step } else { item.start + step };
                if !inside(next) {
                    return Err(format!(
                        "a repetition every {step} from {what} {} on never comes",
                        item.start
                    ));
                }
            }
            _ => {}
        }
    }
    Ok(field)
}

fn items_of(text: &str, what: &str) -> Result<Field, String> {
    if text == "*" {
        return Ok(None);
    }
    if let Some(step) = text.strip_prefix("*/") {
        return Err(format!("'{text}' has no start; write 0/{step} (months and days 1/{step})"));
    }
    let number = |text: &str| {
        let digits = !text.is_empty() && text.len() <= 4 && text.bytes().all(|byte| byte.is_ascii_digit());
        let value = if digits { text.parse::<i16>().ok() } else { None };
        value.ok_or_else(|| format!("'{text}' is no {what}"))
    };
    let item = |part: &str| {
        let (range, step) = match part.split_once('/') {
            Some((range, step)) => (range, Some(number(step)?)),
            None => (part, None),
        };
        if step == Some(0) {
            return Err(format!("'{part}' repeats every 0"));
        }
        let (start, stop) = match range.split_once("..") {
            Some((start, stop)) => (number(start)?, Some(number(stop)?)),
            None => (number(range)?, None),
        };
        Ok(Item { start, stop, step })
    };
    let items: Vec<Item> = text.split(',').map(item).collect::<Result<_, String>>()?;
    if items.len() > ITEMS_MAX {
        return Err(format!("more than {ITEMS_MAX} in one list"));
    }
    Ok(Some(items))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_from_the_end_of_the_month() {
        let first = |text: &str, from: &str| {
            let from: DateTime = from.parse().unwrap();
            text.parse::<OnCalendar>().unwrap().first_from(from).map(|at| at.to_string())
        };
        assert_eq!(first("*-02~01", "2028-01-01T00:00").as_deref(), Some("2028-02-29T00:00:00"));
        assert_eq!(first("*-*~02..03", "2026-02-01T00:00").as_deref(), Some("2026-02-26T00:00:00"));
        assert_eq!(first("Mon *-05~07/1", "2026-01-01T00:00").as_deref(), Some("2026-05-25T00:00:00"));
        assert_eq!(first("*-02~10..21/7", "2026-02-01T00:00").as_deref(), Some("2026-02-12T00:00:00"));
        assert_eq!(first("2020-*-*", "2026-01-01T00:00"), None);
    }

    #[test]
    fn what_is_refused_says_what_is_wrong() {
        let problem = |text: &str| text.parse::<OnCalendar>().unwrap_err().to_string();
        insta::assert_snapshot!(
            [
                "",
                "hourli",
                "Mond",
                "Fri..Mon",
                "12",
                "12:60",
                "*/15:00",
                "10..9:00",
                "20/6:00",
                "12:00:00.5",
                "*-02~30",
                "1969-*-*",
                "12:00 Europe/Wien",
                "2026-1-1-1",
                "12:00:00:00",
                "5/0:00",
                "@12345",
                "1,2,,3:00",
                "-5:00",
            ]
            .map(problem)
            .join("\n")
        );
    }
}
