//! The long run, against playing every run.

use jiff::SignedDuration;
use jiff::tz::TimeZone;

use super::super::long_run::steady;
use super::*;
use crate::schedule::Schedule;

const FROM: &str = "2026-11-23T12:00:00Z";

fn runs(schedule: &str, keep: &Keep) -> LongRun {
    let schedule: Schedule = schedule.parse().unwrap();
    long_run(&schedule, keep, FROM.parse().unwrap(), &TimeZone::get("Europe/Vienna").unwrap())
}

/// Every run of so many days, with retention after each; what is there in the end.
fn played(schedule: &Schedule, keep: &Keep, days: i64, zone: &TimeZone) -> Vec<Candidate> {
    let end: Timestamp = FROM.parse().unwrap();
    let begin = end.checked_sub(SignedDuration::from_hours(24 * days)).unwrap();
    let mut there: Vec<Candidate> = Vec::new();
    for (n, created) in schedule.upcoming(begin, zone).take_while(|at| *at <= end).enumerate() {
        there.push(Candidate { snapshot: id(n), created, seq: n as u64, standing: Standing::Counted });
        let judged = verdicts(&there, keep, created, zone);
        let stays = kept(&judged);
        there.retain(|candidate| stays.contains(&number(candidate.snapshot)));
    }
    there
}

#[test]
fn what_is_there_in_the_long_run_is_what_playing_every_run_gives() {
    let vienna = TimeZone::get("Europe/Vienna").unwrap();
    let two_weeks: Keep = Keep::new(Vec::new(), "14d".parse().ok(), NonZeroU32::MIN).unwrap();
    let aged = Keep::new(vec![rule(Per::Day, Limit::All)], "21d".parse().ok(), NonZeroU32::MIN).unwrap();
    let keeps = [
        keep(&[count(Per::Snapshot, 5), count(Per::Day, 7), count(Per::Week, 4)]),
        keep(&[within(Per::Snapshot, "36h"), count(Per::Hour, 12), within(Per::Week, "2mo")]),
        keep(&[count(Per::Hour, 24), count(Per::Month, 2), count(Per::Quarter, 1)]),
        two_weeks,
        aged,
    ];
    for text in ["0/4:30", "*-*-* 1,2,23:15", "Mon..Fri 08:00", "0 3 * * *"] {
        let schedule: Schedule = text.parse().unwrap();
        for keep in &keeps {
            let played = played(&schedule, keep, 130, &vienna);
            let told = steady(&schedule, keep, FROM.parse().unwrap(), &vienna).unwrap();
            let times: Vec<Timestamp> = played.iter().map(|candidate| candidate.created).collect();
            assert_eq!(told.kept.into_iter().collect::<Vec<_>>(), times, "{text} {keep:?}");
        }
    }
}

#[test]
fn the_number_levels_or_grows() {
    let usual = keep(&[count(Per::Snapshot, 3), count(Per::Hour, 24), count(Per::Day, 7)]);
    assert_eq!(runs("hourly", &usual), LongRun::Levels { snapshots: 30 });
    assert_eq!(runs("hourly", &Keep::default()), LongRun::Grows);
    assert_eq!(runs("hourly", &keep(&[rule(Per::Year, Limit::All)])), LongRun::Grows);
    let aged = Keep::new(Vec::new(), "10d".parse().ok(), NonZeroU32::MIN).unwrap();
    assert_eq!(runs("daily", &aged), LongRun::Levels { snapshots: 11 }, "one is just ten days old");
    assert_eq!(runs("every 1s", &aged), LongRun::MoreThan { snapshots: 10_000 });
}

#[test]
fn a_schedule_whose_runs_are_all_to_come_has_a_number_too() {
    let last = |number| keep(&[count(Per::Snapshot, number)]);
    assert_eq!(runs("2190-01-01", &last(3)), LongRun::Levels { snapshots: 1 });
    assert_eq!(runs("2190..2199-01-01", &last(3)), LongRun::Levels { snapshots: 3 });
    assert_eq!(runs("2190..2191-01-01", &last(3)), LongRun::Levels { snapshots: 2 });
    assert_eq!(runs("2020-01-01", &last(3)), LongRun::Levels { snapshots: 1 }, "it has run");
}
