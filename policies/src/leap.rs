//! Whether the machine's clock goes on from where it was.
//!
//! ```text
//!             leaps                     goes on for as long as it leapt, a day at most; or a person says that it is right
//!  believed ─────────▶ in doubt ──────────────────────────────────────────────────────────────────────▶ believed
//!                       │    ▲
//!                       └────┘ leaps again
//! ```
//!
//! Within one boot, the time that the machine has been up tells a leap from a pause. Across boots, and where that time
//! is not known, a clock that goes back has leapt, and one that goes on past the next planned run by more than an hour
//! may have: whether the machine was off or its clock is wrong, nobody can tell but time and a person.

use std::fmt;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use snaptree_engine::event::Uptime;

/// How far the clock may be from where it should be: time services put it right by that much, and by more in doubt.
const TOLERANCE: SignedDuration = SignedDuration::from_secs(60);

/// How much later than planned the next run may be after a boot.
const BOOT: SignedDuration = SignedDuration::from_hours(1);

/// For how long a clock that leapt far has to go on.
const BELIEVED_AFTER: SignedDuration = SignedDuration::from_hours(24);

/// What the clocks showed at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reading {
    /// The clock.
    pub at: Timestamp,
    /// For how long the machine had been up.
    pub uptime: Option<Uptime>,
}

impl Reading {
    /// How much time has passed since `before` in truth, if both are of one boot.
    fn since(&self, before: &Reading) -> Option<SignedDuration> {
        let (now, before) = (self.uptime?, before.uptime?);
        let ms = now.ms.checked_sub(before.ms).filter(|_| now.boot == before.boot)?;
        i64::try_from(ms).ok().map(SignedDuration::from_millis)
    }
}

/// A clock that does not go on from where it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leap {
    /// What it should have shown, at the latest if it went forward.
    pub from: Timestamp,
    /// What it showed.
    pub to: Timestamp,
}

impl Leap {
    /// For how long the clock has to go on until it is believed.
    fn wait(&self) -> SignedDuration {
        self.to.duration_since(self.from).abs().min(BELIEVED_AFTER)
    }
}

/// A clock in doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doubt {
    /// The leap.
    pub leap: Leap,
    /// What the clocks showed then.
    pub since: Reading,
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Leap { from, to } = self.leap;
        let way = if to < from { "back" } else { "forward" };
        let [from, to, until] = [from, to, self.until()].map(|at| at.strftime("%Y-%m-%dT%H:%M:%SZ"));
        write!(
            f,
            "the clock went {way} from {from} to {to}: policies delete nothing that they need not until \
             `snaptree policy confirm-clock`, or until {until} if the clock goes on"
        )
    }
}

impl Doubt {
    /// When the clock is believed if it goes on from now on as it does.
    pub fn until(&self) -> Timestamp {
        self.since.at.checked_add(self.leap.wait()).unwrap_or(Timestamp::MAX)
    }

    /// Whether it has gone on for long enough.
    pub fn is_over(&self, now: &Reading) -> bool {
        let passed = now.since(&self.since).unwrap_or_else(|| now.at.duration_since(self.since.at));
        passed >= self.leap.wait()
    }
}

/// The leap between two readings, if there is one. `next` is when the first run after `before` was planned, the one that
/// should have been recorded; none if none was.
pub fn leap(before: &Reading, now: &Reading, next: Option<Timestamp>) -> Option<Leap> {
    if let Some(passed) = now.since(before) {
        let from = before.at.checked_add(passed).ok()?;
        return (now.at.duration_since(from).abs() > TOLERANCE).then_some(Leap { from, to: now.at });
    }
    if before.at.duration_since(now.at) > TOLERANCE {
        return Some(Leap { from: before.at, to: now.at });
    }
    let from = next?.max(before.at);
    (now.at.duration_since(from) > BOOT).then_some(Leap { from, to: now.at })
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn reading(time: &str, boot: u128, ms: u64) -> Reading {
        let uptime = (boot > 0).then_some(Uptime { boot: Uuid::from_u128(boot), ms });
        Reading { at: time.parse().unwrap(), uptime }
    }

    #[test]
    fn within_a_boot_the_time_that_the_machine_was_up_tells_a_leap_from_a_pause() {
        let before = reading("2026-01-01T00:00:00Z", 1, 0);
        let next = "2026-01-01T01:00:00Z".parse().ok();
        let month_ms = 31 * 86_400_000;
        assert_eq!(leap(&before, &reading("2026-02-01T00:00:30Z", 1, month_ms), next), None, "a pause");
        let ahead = leap(&before, &reading("2026-01-01T00:12:00Z", 1, 600_000), next).unwrap();
        assert_eq!(ahead.from, "2026-01-01T00:10:00Z".parse().unwrap());
        let back = leap(&before, &reading("2026-01-01T00:00:01Z", 1, 600_000), next).unwrap();
        assert!(back.to < back.from);
    }

    #[test]
    fn across_boots_a_clock_that_goes_back_or_past_the_next_run_is_in_doubt() {
        let before = reading("2026-01-01T00:00:00Z", 1, 0);
        let next = "2026-01-01T01:00:00Z".parse().ok();
        for boot in [0, 2] {
            assert_eq!(leap(&before, &reading("2026-01-01T01:59:00Z", boot, 5), next), None);
            assert!(leap(&before, &reading("2026-01-01T02:01:00Z", boot, 5), next).is_some());
            assert!(leap(&before, &reading("2025-12-31T23:58:00Z", boot, 5), next).is_some());
            assert_eq!(
                leap(&before, &reading("2027-01-01T00:00:00Z", boot, 5), None),
                None,
                "nothing was planned"
            );
        }
    }

    #[test]
    fn doubt_ends_when_the_clock_has_gone_on_for_as_long_as_it_leapt_or_for_a_day() {
        let since = reading("2027-01-01T00:00:00Z", 1, 0);
        let near = Leap { from: "2026-12-31T23:00:00Z".parse().unwrap(), to: since.at };
        let far = Leap { from: "2026-01-01T00:00:00Z".parse().unwrap(), to: since.at };
        let over = |leap, at, ms| Doubt { leap, since }.is_over(&reading(at, 1, ms));
        assert!(!over(near, "2027-01-01T00:59:00Z", 59 * 60_000));
        assert!(over(near, "2027-01-01T01:00:00Z", 60 * 60_000));
        assert!(
            !over(far, "2029-01-01T00:00:00Z", 23 * 3_600_000),
            "it leapt on, and was up for less than a day"
        );
        assert!(over(far, "2027-01-02T00:00:00Z", 24 * 3_600_000));
    }
}
