//! Lines of cron. Reading and matching are croner's; what happens when the clocks change is decided here, as for
//! calendar expressions: croner takes only a single time of day for one, so `0 2,14 * * *` would lose a run in spring
//! and double one in autumn.

use std::fmt;
use std::str::FromStr;

use croner::parser::{CronParser, Year};
use jiff::civil::DateTime;

use super::wall::{Rhythm, WallTimes};

/// A line of cron: minute, hour, day of the month, month, day of the week; with six fields, seconds first.
///
/// If both days are given, either will do, as cron has it. `L`, `W` and `#` are understood, and `@hourly` to
/// `@yearly`.
#[derive(Clone, Debug)]
pub struct Cron {
    text: String,
    // Large beside the other kinds of schedule.
    cron: Box<croner::Cron>,
    rhythm: Rhythm,
}

/// A line that is none of cron's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is no line of cron (minute hour day month weekday): {problem}")]
pub struct CronError {
    text: String,
    problem: String,
}

impl FromStr for Cron {
    type Err = CronError;

    fn from_str(text: &str) -> Result<Self, CronError> {
        let problem = |problem: String| CronError { text: text.chars().take(60).collect(), problem };
        if !text.is_ascii() {
            return Err(problem("only ASCII is allowed".to_owned()));
        }
        let parser = CronParser::builder().year(Year::Disallowed).build();
        let cron = parser.parse(text).map_err(|error| problem(error.to_string()))?;
        let hours = cron.pattern.hours.values().len();
        let rhythm = if hours == 24 { Rhythm::Elapsed } else { Rhythm::TimesOfDay };
        Ok(Self { text: text.split_whitespace().collect::<Vec<_>>().join(" "), cron: Box::new(cron), rhythm })
    }
}

impl PartialEq for Cron {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Cron {}

impl fmt::Display for Cron {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl WallTimes for Cron {
    fn first_from(&self, from: DateTime) -> Option<DateTime> {
        self.cron.find_next_occurrence(&from, true).ok()
    }

    fn rhythm(&self) -> Rhythm {
        self.rhythm
    }
}
