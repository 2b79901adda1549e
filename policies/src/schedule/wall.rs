//! From what a clock on the wall shows to the time line, over changes of the clock.

use jiff::civil::DateTime;
use jiff::tz::{AmbiguousOffset, TimeZone};
use jiff::{SignedDuration, Timestamp};

use super::second_of;

/// The longest gap, in seconds, whose times are made up for at its end. A longer one is a day that a country left out
/// when it moved over the date line; that day never was.
const GAP_S_MAX: i32 = 12 * 3_600;

/// More changes of the clock than there are in any time zone until 2199.
const CHANGES_MAX: usize = 1_000;

/// What happens when the clock changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rhythm {
    /// In every hour, as time passes.
    Elapsed,
    /// At times of day, each once a day.
    TimesOfDay,
}

/// Times that a clock on the wall shows.
pub(super) trait WallTimes {
    /// The first of them that is not before `from`, a whole second.
    fn first_from(&self, from: DateTime) -> Option<DateTime>;
    /// What happens when the clock changes.
    fn rhythm(&self) -> Rhythm;
}

/// The first instant after `at` at which the clock of `zone` shows one of `times`.
pub(super) fn next_after(times: &impl WallTimes, at: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
    match times.rhythm() {
        Rhythm::Elapsed => next_elapsed(times, at, zone),
        Rhythm::TimesOfDay => next_time_of_day(times, at, zone),
    }
}

/// From one change of the clock to the next, since between them it runs evenly.
fn next_elapsed(times: &impl WallTimes, at: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
    let mut from = Timestamp::from_second(second_of(at).checked_add(1)?).ok()?;
    for _ in 0..CHANGES_MAX {
        let offset = zone.to_offset(from);
        let shown = times.first_from(offset.to_datetime(from))?;
        let found = offset.to_timestamp(shown).ok()?;
        match zone.following(from).next().map(|change| change.timestamp()) {
            Some(change) if change <= found => from = change,
            _ => return Some(found),
        }
    }
    None
}

/// Every time that is shown, put on the time line; what is shown later never comes to stand earlier.
fn next_time_of_day(times: &impl WallTimes, at: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
    let second = Timestamp::from_second(second_of(at)).ok()?;
    let mut from = zone.to_datetime(second);
    loop {
        let shown = times.first_from(from)?;
        match instant(shown, zone) {
            Some(found) if found > at => return Some(found),
            _ => from = shown.checked_add(SignedDuration::from_secs(1)).ok()?,
        }
    }
}

/// The instant for a time of day: the first of two; the end of the gap that it falls into.
fn instant(shown: DateTime, zone: &TimeZone) -> Option<Timestamp> {
    match zone.to_ambiguous_timestamp(shown).offset() {
        AmbiguousOffset::Unambiguous { offset } => offset.to_timestamp(shown).ok(),
        AmbiguousOffset::Fold { before, .. } => before.to_timestamp(shown).ok(),
        AmbiguousOffset::Gap { before, after } => {
            if after.seconds().saturating_sub(before.seconds()) > GAP_S_MAX {
                return None;
            }
            // By the later offset the time lies before the change.
            let earlier = after.to_timestamp(shown).ok()?;
            zone.following(earlier).next().map(|change| change.timestamp())
        }
    }
}
