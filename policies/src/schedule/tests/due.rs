//! What is due: downtime, clocks that jump, and engines that die.

use jiff::SignedDuration;
use proptest::prelude::*;
use snaptree_engine::{DomainId, PolicyName};
use uuid::Uuid;

use super::*;
use crate::span::Elapsed;

const SINCE: &str = "2026-11-01T00:00:00Z";

struct Policy {
    schedule: Schedule,
    catch_up: CatchUp,
    window: Option<Elapsed>,
    delay_s: i64,
    history: History,
    ran: Vec<Timestamp>,
}

impl Policy {
    fn new(text: &str, catch_up: CatchUp) -> Self {
        Self {
            schedule: schedule(text),
            catch_up,
            window: None,
            delay_s: 0,
            history: History::default(),
            ran: Vec::new(),
        }
    }

    fn due(&self, now: Timestamp) -> Due {
        let asked = Asked {
            schedule: &self.schedule,
            zone: &TimeZone::UTC,
            delay: SignedDuration::from_secs(self.delay_s),
            catch_up: self.catch_up,
            window: self.window,
            since: at(SINCE),
            history: &self.history,
        };
        due(&asked, now)
    }

    /// Asks at `now` and does what is due, as the runner does.
    fn tick(&mut self, now: Timestamp) -> Due {
        let due = self.due(now);
        if let Some(run) = due.run {
            self.history.fired(run);
            self.ran.push(run);
        }
        if let Some(skipped) = &due.skipped {
            self.history.skipped(skipped.last, now);
        }
        due
    }

    fn tick_at(&mut self, now: &str) -> Due {
        self.tick(at(now))
    }
}

#[test]
fn a_run_is_due_once_its_instant_has_passed_and_then_no_more() {
    let mut policy = Policy::new("hourly", CatchUp::Once);
    assert_eq!(policy.tick_at("2026-11-01T00:59:59Z").run, None);
    let due = policy.tick_at("2026-11-01T01:00:00Z");
    assert_eq!((due.run, due.skipped), (Some(at("2026-11-01T01:00:00Z")), None));
    assert_eq!(due.next_at, Some(at("2026-11-01T02:00:00Z")));
    assert_eq!(policy.tick_at("2026-11-01T01:00:00Z").run, None);
}

#[test]
fn what_was_planned_when_the_policy_was_defined_does_not_run() {
    assert_eq!(Policy::new("daily", CatchUp::Once).tick_at(SINCE).run, None);
}

#[test]
fn a_week_of_downtime_runs_once_and_says_what_was_skipped() {
    let mut policy = Policy::new("daily", CatchUp::Once);
    policy.tick_at("2026-11-02T00:00:00Z");
    let due = policy.tick_at("2026-11-09T12:00:00Z");
    assert_eq!(due.run, Some(at("2026-11-09T00:00:00Z")));
    let skipped = due.skipped.unwrap();
    assert_eq!((skipped.first, skipped.last), (at("2026-11-03T00:00:00Z"), at("2026-11-08T00:00:00Z")));
    assert_eq!((skipped.count, skipped.why), (Count::Exactly(6), SkipReason::CaughtUp));
    let again = policy.tick_at("2026-11-09T12:00:01Z");
    assert_eq!((again.run, again.skipped), (None, None));
}

#[test]
fn without_catch_up_a_missed_run_is_skipped_and_recorded_once() {
    let mut policy = Policy::new("daily", CatchUp::None);
    let due = policy.tick_at("2026-11-03T12:00:00Z");
    assert_eq!(due.run, None);
    let skipped = due.skipped.unwrap();
    assert_eq!((skipped.count, skipped.why), (Count::Exactly(2), SkipReason::NoCatchUp));
    let again = policy.tick_at("2026-11-03T12:00:01Z");
    assert_eq!((again.run, again.skipped), (None, None));
    let next = policy.tick_at("2026-11-04T00:00:59Z");
    assert_eq!(next.run, Some(at("2026-11-04T00:00:00Z")), "a busy minute is not a missed run");
}

#[test]
fn a_missed_run_that_is_older_than_the_window_is_skipped() {
    let mut policy = Policy::new("daily", CatchUp::Once);
    policy.window = "2h".parse().ok();
    let due = policy.tick_at("2026-11-03T02:00:01Z");
    assert_eq!(due.run, None);
    assert_eq!(due.skipped.unwrap().why, SkipReason::TooLate);
    assert_eq!(policy.tick_at("2026-11-04T02:00:00Z").run, Some(at("2026-11-04T00:00:00Z")));
}

#[test]
fn the_delay_moves_the_run_and_not_its_name() {
    let mut policy = Policy::new("hourly", CatchUp::None);
    policy.delay_s = 300;
    let early = policy.tick_at("2026-11-01T01:04:59Z");
    assert_eq!((early.run, early.next_at), (None, Some(at("2026-11-01T01:05:00Z"))));
    let due = policy.tick_at("2026-11-01T01:05:00Z");
    assert_eq!((due.run, due.next_at), (Some(at("2026-11-01T01:00:00Z")), Some(at("2026-11-01T02:05:00Z"))));
}

#[test]
fn a_clock_that_jumps_back_does_not_run_again() {
    let mut policy = Policy::new("hourly", CatchUp::Once);
    for hour in 1..=5 {
        policy.tick_at(&format!("2026-11-01T{hour:02}:00:00Z"));
    }
    for minute in 0..180 {
        let now = at("2026-11-01T02:30:00Z").checked_add(SignedDuration::from_mins(minute)).unwrap();
        let due = policy.tick(now);
        assert_eq!((due.run, due.skipped), (None, None), "{now}");
    }
    assert_eq!(policy.tick_at("2026-11-01T06:00:00Z").run, Some(at("2026-11-01T06:00:00Z")));
}

#[test]
fn a_clock_that_was_a_year_ahead_neither_loses_nor_floods() {
    let mut policy = Policy::new("hourly", CatchUp::Once);
    policy.tick_at("2026-11-01T01:00:00Z");
    assert_eq!(policy.tick_at("2027-11-01T01:30:00Z").run, Some(at("2027-11-01T01:00:00Z")));
    for hour in 2..=9 {
        let now = at(&format!("2026-11-01T{hour:02}:00:00Z"));
        let due = policy.tick(now);
        assert_eq!((due.run, due.skipped), (Some(now), None));
    }
    assert_eq!(policy.ran.len(), 10);
}

#[test]
fn a_policy_defined_by_a_clock_ahead_runs_when_the_clock_is_right_again() {
    let mut policy = Policy::new("hourly", CatchUp::Once);
    let before = at("2025-01-01T00:00:30Z");
    assert_eq!(policy.tick(before).run, Some(at("2025-01-01T00:00:00Z")));
    assert_eq!(policy.tick_at("2025-01-01T00:59:00Z").run, None);
    assert_eq!(policy.tick_at("2025-01-01T01:00:00Z").run, Some(at("2025-01-01T01:00:00Z")));
}

#[test]
fn a_long_gap_of_a_short_schedule_is_bounded_work() {
    let mut policy = Policy::new("every 1s", CatchUp::Once);
    let due = policy.tick_at("2099-01-01T00:00:00Z");
    assert_eq!(due.run, Some(at("2099-01-01T00:00:00Z")));
    assert_eq!(due.skipped.unwrap().count, Count::AtLeast(1_000));
}

#[test]
fn a_delay_is_stable_spread_and_within_the_jitter() {
    let policy = PolicyName::new("hourly").unwrap();
    let jitter: Option<Elapsed> = "5m".parse().ok();
    let domain = |number: u128| DomainId::from_uuid(Uuid::from_u128(number));
    let delays: Vec<i64> = (0..1_000).map(|n| delay(jitter, &policy, domain(n)).as_secs()).collect();
    assert!(delays.iter().all(|delay| (0..=300).contains(delay)));
    for third in 0..3 {
        let inside = delays.iter().filter(|delay| **delay / 101 == third).count();
        assert!((270..400).contains(&inside), "{inside} of 1000 in one third");
    }
    // Pinned: another value after an update would move every run.
    assert_eq!(delays[..3], [245, 61, 247]);
    assert_eq!(delay(None, &policy, domain(1)), SignedDuration::ZERO);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the clock does, no planned instant runs twice, and what runs has passed.
    #[test]
    fn no_planned_instant_runs_twice(
        text in prop::sample::select(vec!["hourly", "every 10m", "30 2 * * *", "daily"]),
        catch_up in prop::sample::select(vec![CatchUp::None, CatchUp::Once]),
        window in prop::option::of(60..200_000_u32),
        jumps in prop::collection::vec(prop_oneof![8 => 1..4_000_i64, 1 => -100_000..0_i64, 1 => 0..40_000_000_i64], 1..80),
        delay_s in 0..600_i64
    ) {
        let mut policy = Policy::new(text, catch_up);
        policy.window = window.map(Elapsed::from_seconds);
        policy.delay_s = delay_s;
        let mut now = at(SINCE);
        for jump in jumps {
            now = now.checked_add(SignedDuration::from_secs(jump)).unwrap();
            let due = policy.tick(now);
            if let Some(run) = due.run {
                prop_assert!(run.as_second() + delay_s <= now.as_second());
            }
            if let Some(next) = due.next_at {
                prop_assert!(next > now);
            }
            let again = policy.due(now);
            prop_assert_eq!((again.run, again.skipped), (None, None));
        }
        let mut distinct = policy.ran.clone();
        distinct.sort();
        distinct.dedup();
        prop_assert_eq!(distinct.len(), policy.ran.len());
    }

    /// An engine that looks at least once a minute runs every planned instant, and skips none.
    #[test]
    fn an_engine_that_is_up_loses_nothing(
        text in prop::sample::select(vec!["hourly", "*:0/5", "30 2 * * *", "0 */6 * * *"]),
        catch_up in prop::sample::select(vec![CatchUp::None, CatchUp::Once]),
        steps in prop::collection::vec(20..60_i64, 60..120),
    ) {
        let mut policy = Policy::new(text, catch_up);
        let mut now = at(SINCE);
        for step in steps {
            now = now.checked_add(SignedDuration::from_secs(step)).unwrap();
            prop_assert_eq!(policy.tick(now).skipped, None);
        }
        let planned: Vec<Timestamp> =
            policy.schedule.upcoming(at(SINCE), &TimeZone::UTC).take_while(|at| *at <= now).collect();
        prop_assert_eq!(policy.ran, planned);
    }
}
