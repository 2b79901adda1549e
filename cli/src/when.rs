//! Points in time as people write them.

use jiff::civil::{DateTime, Time};
use jiff::tz::TimeZone;
use jiff::{Span, Timestamp, Zoned};

use crate::exit::Trouble;

/// What can be written where a time is asked for.
pub const FORMS: &str = "2026-11-23T04:25:00Z, '2026-11-23 04:25' (local), 04:25 (today), or 2h, 3d, 1w";

/// The moment that an `--at` asks about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// A time.
    Time(Timestamp),
    /// A place in the log.
    Seq(u64),
}

/// Which way a bare duration such as `2h` counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// It was so long ago.
    Past,
    /// It will be so long from now.
    Future,
}

/// The reader's time zone.
///
/// Asking jiff for it by name walks the whole time zone database, which takes longer than everything else that
/// `list` does; the file that `/etc/localtime` leads to holds all that is needed.
pub fn local_zone() -> TimeZone {
    if std::env::var_os("TZ").is_some() {
        return TimeZone::system();
    }
    let zone = std::fs::read("/etc/localtime").ok().and_then(|bytes| TimeZone::tzif("Local", &bytes).ok());
    zone.unwrap_or(TimeZone::UTC)
}

/// Now, in the reader's time zone.
pub fn local_now() -> Zoned {
    Timestamp::now().to_zoned(local_zone())
}

/// Reads a time.
///
/// # Errors
/// The text is none of [`FORMS`].
pub fn time(text: &str, now: &Zoned, direction: Direction) -> Result<Timestamp, Trouble> {
    let trimmed = text.trim();
    if trimmed == "now" {
        return Ok(now.timestamp());
    }
    if let Ok(at) = trimmed.parse::<Timestamp>() {
        return Ok(at);
    }
    let zone = now.time_zone();
    // An offset that was not understood must not be dropped in silence.
    let civil = !trimmed.ends_with(['Z', 'z']) && !trimmed.contains(['+', '[']);
    if let Some(at) = trimmed.parse::<DateTime>().ok().filter(|_| civil) {
        return local(at, zone).ok_or_else(|| unreadable(text));
    }
    if let Some(at) = trimmed.parse::<Time>().ok().filter(|_| civil && trimmed.contains(':')) {
        return local(now.date().to_datetime(at), zone).ok_or_else(|| unreadable(text));
    }
    let bare = trimmed.strip_suffix("ago").map_or(trimmed, str::trim_end);
    let span: Span = bare.parse().map_err(|_| unreadable(text))?;
    if span.is_negative() {
        return Err(unreadable(text));
    }
    let moved = match direction {
        Direction::Past => now.checked_sub(span),
        Direction::Future if bare.len() == trimmed.len() => now.checked_add(span),
        Direction::Future => return Err(unreadable(text)),
    };
    moved.map(|at| at.timestamp()).map_err(|_| unreadable(text))
}

fn local(at: DateTime, zone: &TimeZone) -> Option<Timestamp> {
    at.to_zoned(zone.clone()).ok().map(|at| at.timestamp())
}

/// Reads a moment: a time, or `seq:N`.
///
/// # Errors
/// The text is neither.
pub fn moment(text: &str, now: &Zoned) -> Result<Moment, Trouble> {
    match text.trim().strip_prefix("seq:") {
        Some(seq) => seq.parse().map(Moment::Seq).map_err(|_| unreadable(text)),
        None => time(text, now, Direction::Past).map(Moment::Time),
    }
}

fn unreadable(text: &str) -> Trouble {
    let shown: String = text.chars().take(60).collect();
    Trouble::usage(format!("'{shown}' is no time")).hint(format!("write {FORMS}; for --at also seq:N"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> Zoned {
        "2026-11-23T12:00:00+01:00[Europe/Vienna]".parse().unwrap()
    }

    #[test]
    fn times_as_people_write_them() {
        for (text, expected) in [
            ("2026-11-23T04:25:44Z", "2026-11-23T04:25:44Z"),
            ("2026-11-23T04:25:44+02:00", "2026-11-23T02:25:44Z"),
            ("2026-11-23 04:25:44", "2026-11-23T03:25:44Z"),
            ("2026-11-23T04:25", "2026-11-23T03:25:00Z"),
            ("2026-11-23", "2026-11-22T23:00:00Z"),
            ("04:25", "2026-11-23T03:25:00Z"),
            ("now", "2026-11-23T11:00:00Z"),
            ("2h", "2026-11-23T09:00:00Z"),
            ("2h ago", "2026-11-23T09:00:00Z"),
            ("90s", "2026-11-23T10:58:30Z"),
            ("1h30m", "2026-11-23T09:30:00Z"),
            ("3d", "2026-11-20T11:00:00Z"),
            ("1w", "2026-11-16T11:00:00Z"),
            (" 15 minutes ", "2026-11-23T10:45:00Z"),
        ] {
            assert_eq!(time(text, &now(), Direction::Past).unwrap().to_string(), expected, "{text}");
        }
    }

    #[test]
    fn durations_count_forward_where_a_time_to_come_is_meant() {
        let at = time("2h", &now(), Direction::Future).unwrap();
        assert_eq!(at.to_string(), "2026-11-23T13:00:00Z");
        assert!(time("2h ago", &now(), Direction::Future).is_err());
    }

    #[test]
    fn a_summer_time_change_counts_calendar_days() {
        let now: Zoned = "2026-10-26T12:00:00+01:00[Europe/Vienna]".parse().unwrap();
        assert_eq!(time("2d", &now, Direction::Past).unwrap().to_string(), "2026-10-24T10:00:00Z");
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for text in
            ["", "soon", "1795401658", "-2h", "25:00", "2026-13-01", "seq:5", "2026-11-23T04:25+99:00"]
        {
            assert!(time(text, &now(), Direction::Past).is_err(), "{text}");
        }
    }

    #[test]
    fn moments_may_name_a_place_in_the_log() {
        assert_eq!(moment("seq:12", &now()).unwrap(), Moment::Seq(12));
        assert!(matches!(moment("2h", &now()).unwrap(), Moment::Time(_)));
        assert!(moment("seq:-1", &now()).is_err());
        assert!(moment("seq:x", &now()).is_err());
    }
}
