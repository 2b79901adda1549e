//! Text for terminals: nothing in it that a terminal would obey, colour only where it is wanted, times for people.

use std::borrow::Cow;
use std::fmt::Display;
use std::io::IsTerminal;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use unicode_width::UnicodeWidthStr;

use crate::when::local_zone;

/// Text from the log, from files or from tools, made safe to print: what a terminal would obey, or what would make a
/// line read otherwise than it is, is shown as `\u{..}`.
pub fn safe(text: &str) -> Cow<'_, str> {
    if !text.chars().any(is_unsafe) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_unsafe(c) {
            shown.push_str(&format!("\\u{{{:x}}}", u32::from(c)));
        } else {
            shown.push(c);
        }
    }
    Cow::Owned(shown)
}

/// Control characters, line and paragraph separators, and what reverses the direction of text.
fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

/// Columns that `text` takes on a terminal.
pub fn width(text: &str) -> usize {
    UnicodeWidthStr::width(text)
}

/// Colours, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paint {
    on: bool,
}

impl Paint {
    /// No colour at all.
    #[cfg(test)]
    pub const PLAIN: Self = Self { on: false };

    /// Colour if standard output is a terminal that wants it.
    pub fn of_stdout() -> Self {
        let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
            || std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        Self { on: std::io::stdout().is_terminal() && !refused }
    }

    fn code(self, code: &str, text: impl Display) -> String {
        if self.on { format!("\u{1b}[{code}m{text}\u{1b}[0m") } else { text.to_string() }
    }

    /// What matters.
    pub fn bold(self, text: impl Display) -> String {
        self.code("1", text)
    }

    /// What is there, and of less interest.
    pub fn dim(self, text: impl Display) -> String {
        self.code("2", text)
    }

    /// What is well.
    pub fn good(self, text: impl Display) -> String {
        self.code("32", text)
    }

    /// What is not.
    pub fn bad(self, text: impl Display) -> String {
        self.code("31", text)
    }

    /// What asks for attention.
    pub fn warn(self, text: impl Display) -> String {
        self.code("33", text)
    }

    /// Names.
    pub fn name(self, text: impl Display) -> String {
        self.code("36", text)
    }
}

/// How things are shown: colours, the time zone, and the moment that ages are counted from.
#[derive(Clone, Debug)]
pub struct Look {
    /// Colours.
    pub paint: Paint,
    /// The reader's time zone.
    pub zone: TimeZone,
    /// Now.
    pub now: Timestamp,
    /// How many columns a line has; none where the output is no terminal.
    pub columns: Option<usize>,
}

impl Look {
    /// For this process's standard output.
    pub fn of_stdout() -> Self {
        Self {
            paint: Paint::of_stdout(),
            zone: local_zone(),
            now: Timestamp::now(),
            columns: columns_of_stdout(),
        }
    }

    /// Without colours and without an end of the line.
    #[cfg(test)]
    pub fn plain() -> Self {
        Self { paint: Paint::PLAIN, zone: TimeZone::UTC, now: Timestamp::UNIX_EPOCH, columns: None }
    }

    /// A time of day with its date, in the reader's zone.
    pub fn time(&self, at: Timestamp) -> String {
        at.to_zoned(self.zone.clone()).strftime("%Y-%m-%d %H:%M:%S").to_string()
    }

    /// The same with milliseconds.
    pub fn precise(&self, at: Timestamp) -> String {
        at.to_zoned(self.zone.clone()).strftime("%Y-%m-%d %H:%M:%S.%3f").to_string()
    }

    /// How long ago it was.
    pub fn age(&self, at: Timestamp) -> String {
        age(self.now, at)
    }
}

/// The width of the terminal that standard output is; none if it is none.
fn columns_of_stdout() -> Option<usize> {
    let (_rows, columns) = console::Term::stdout().size_checked()?;
    Some(usize::from(columns)).filter(|columns| *columns > 0)
}

/// How long before `now` something was, as people say it.
pub fn age(now: Timestamp, at: Timestamp) -> String {
    let seconds = now.duration_since(at).as_secs();
    match seconds {
        ..0 => "in the future".to_owned(),
        0 => "just now".to_owned(),
        1..60 => format!("{seconds} s ago"),
        60..3_600 => format!("{} min ago", seconds / 60),
        3_600..86_400 => format!("{} h ago", seconds / 3_600),
        _ => format!("{} d ago", seconds / 86_400),
    }
}

/// How long something took: `12 ms`, `3.4 s`, `2 min 5 s`.
pub fn took(duration: jiff::SignedDuration) -> String {
    let millis = duration.as_millis().max(0);
    match millis {
        0..1_000 => format!("{millis} ms"),
        1_000..60_000 => format!("{}.{} s", millis / 1_000, millis % 1_000 / 100),
        60_000..3_600_000 => format!("{} min {} s", millis / 60_000, millis % 60_000 / 1_000),
        _ => format!("{} h {} min", millis / 3_600_000, millis % 3_600_000 / 60_000),
    }
}

/// `1 snapshot`, `2 snapshots`.
pub fn count(number: usize, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}

/// The last eight characters of an id: with time-ordered ids, those that differ.
pub fn short(id: impl Display) -> String {
    let id = id.to_string();
    let cut = id.len().saturating_sub(8);
    id.get(cut..).unwrap_or(&id).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_shown() {
        for (text, shown) in [
            ("plain ä 🦀", "plain ä 🦀"),
            ("\u{1b}[2J", "\\u{1b}[2J"),
            ("a\r\nb\tc", "a\\u{d}\\u{a}b\\u{9}c"),
            ("\u{9b}31m", "\\u{9b}31m"),
            ("abc\u{202e}fed", "abc\\u{202e}fed"),
            ("\u{7f}\u{0}", "\\u{7f}\\u{0}"),
            ("a\u{200b}b", "a\\u{200b}b"),
        ] {
            assert_eq!(safe(text), shown);
        }
    }

    #[test]
    fn ages_and_durations() {
        let now: Timestamp = "2026-11-23T12:00:00Z".parse().unwrap();
        for (seconds, shown) in [
            (-5, "in the future"),
            (0, "just now"),
            (59, "59 s ago"),
            (60, "1 min ago"),
            (7_200, "2 h ago"),
            (200_000, "2 d ago"),
        ] {
            assert_eq!(age(now, now - jiff::SignedDuration::from_secs(seconds)), shown);
        }
        for (millis, shown) in
            [(0, "0 ms"), (999, "999 ms"), (3_450, "3.4 s"), (125_000, "2 min 5 s"), (3_660_000, "1 h 1 min")]
        {
            assert_eq!(took(jiff::SignedDuration::from_millis(millis)), shown);
        }
    }

    #[test]
    fn plain_paint_adds_nothing() {
        assert_eq!(Paint::PLAIN.bold("x"), "x");
        assert_eq!(Paint { on: true }.bold("x"), "\u{1b}[1mx\u{1b}[0m");
    }
}
