//! What happens when the clocks change, in zones with changes by an hour, by half an hour, at midnight, at night and in
//! the other hemisphere, over ten years.

use std::collections::BTreeMap;

use jiff::SignedDuration;
use jiff::civil::Date;

use super::*;

const ZONES: [&str; 7] = [
    "Europe/Vienna",
    "America/New_York",
    "Australia/Lord_Howe",
    "Africa/Cairo",
    "America/Santiago",
    "Pacific/Chatham",
    "Asia/Beirut",
];

fn ten_years<'a>(schedule: &'a Schedule, zone: &'a TimeZone) -> impl Iterator<Item = Timestamp> + 'a {
    let end = at("2036-01-01T00:00:00Z");
    schedule.upcoming(at("2026-01-01T00:00:00Z"), zone).take_while(move |at| *at < end)
}

/// The planned instants from a day and a half before each change of the clock to a day and a half after it.
fn around_changes(schedule: &Schedule, zone: &TimeZone) -> Vec<Vec<Timestamp>> {
    let near = SignedDuration::from_hours(36);
    let end = at("2036-01-01T00:00:00Z");
    zone.following(at("2026-01-01T00:00:00Z"))
        .map(|change| change.timestamp())
        .take_while(|change| *change < end)
        .map(|change| {
            let upcoming = schedule.upcoming(change.checked_sub(near).unwrap(), zone);
            upcoming.take_while(|at| *at < change.checked_add(near).unwrap()).collect()
        })
        .collect()
}

fn instants(text: &str, zone_name: &str, from: &str, count: usize) -> Vec<String> {
    let (schedule, zone) = (schedule(text), zone(zone_name));
    schedule.upcoming(at(from), &zone).take(count).map(|at| at.to_string()).collect()
}

#[test]
fn no_day_is_lost_and_none_doubled() {
    for name in ZONES {
        let zone = zone(name);
        for time in ["00:00", "00:30", "01:30", "02:00", "02:30", "02:45", "03:00", "23:30"] {
            let (hour, minute) = time.split_once(':').unwrap();
            for text in [time.to_owned(), format!("{minute} {hour} * * *")] {
                let schedule = schedule(&text);
                let mut days: BTreeMap<Date, u32> = BTreeMap::new();
                for at in ten_years(&schedule, &zone) {
                    *days.entry(zone.to_datetime(at).date()).or_default() += 1;
                }
                assert!((3_650..=3_653).contains(&days.len()), "{name} {text}: {} days", days.len());
                assert!(days.values().all(|runs| *runs == 1), "{name} {text}");
            }
        }
    }
}

#[test]
fn what_runs_in_every_hour_follows_elapsed_time() {
    for name in ZONES {
        let zone = zone(name);
        for (text, seconds) in [
            ("hourly", 3_600),
            ("0 * * * *", 3_600),
            ("*:0/30", 1_800),
            ("*/30 * * * *", 1_800),
            ("*:0/15", 900),
            ("*/15 * * * *", 900),
        ] {
            // Where the clock moves by half an hour, the full hour does too.
            if name == "Australia/Lord_Howe" && seconds == 3_600 {
                continue;
            }
            let schedule = schedule(text);
            let all = around_changes(&schedule, &zone);
            assert_eq!(all.len(), 20, "{name} has two changes a year");
            for pair in all.iter().flat_map(|instants| instants.windows(2)) {
                assert_eq!(pair[1].as_second() - pair[0].as_second(), seconds, "{name} {text}");
            }
            assert!(
                all.iter().all(|instants| i64::try_from(instants.len()).unwrap() >= 71 * 3_600 / seconds),
                "{name} {text}"
            );
        }
    }
}

#[test]
fn the_instants_go_upward_and_each_is_found_from_the_one_before_it() {
    for name in ZONES {
        let zone = zone(name);
        for text in
            ["0/2:00", "02:0/10", "0 2,14 * * *", "*/17 1-3 * * *", "Sun *-*-* 02:30", "*-*~01 02:30", "*:30"]
        {
            let schedule = schedule(text);
            for pair in around_changes(&schedule, &zone).iter().flat_map(|instants| instants.windows(2)) {
                assert!(pair[0] < pair[1], "{name} {text}");
                let before = Timestamp::from_second(pair[1].as_second() - 1).unwrap();
                assert_eq!(schedule.next_after(before, &zone), Some(pair[1]), "{name} {text}");
                assert_eq!(schedule.last_until(before, &zone), Some(pair[0]), "{name} {text}");
            }
        }
    }
}

#[test]
fn a_time_that_is_left_out_runs_when_the_clock_goes_on() {
    for text in ["02:30", "30 2 * * *"] {
        let found = instants(text, "Europe/Vienna", "2026-03-28T00:00:00Z", 3);
        assert_eq!(found, ["2026-03-28T01:30:00Z", "2026-03-29T01:00:00Z", "2026-03-30T00:30:00Z"], "{text}");
    }
}

#[test]
fn a_time_that_comes_twice_runs_the_first_time() {
    for text in ["02:30", "30 2 * * *"] {
        let found = instants(text, "Europe/Vienna", "2026-10-24T22:30:00Z", 2);
        assert_eq!(found, ["2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"], "{text}");
    }
}

#[test]
fn every_half_hour_is_one_also_over_a_repeated_hour() {
    for text in ["*:0/30", "*/30 * * * *"] {
        let found = instants(text, "Europe/Vienna", "2026-10-24T23:59:00Z", 5);
        let expected =
            ["00:00", "00:30", "01:00", "01:30", "02:00"].map(|time| format!("2026-10-25T{time}:00Z"));
        assert_eq!(found, expected, "{text}");
    }
}

#[test]
fn twice_a_day_stays_twice_a_day() {
    for text in ["2,14:00", "0 2,14 * * *"] {
        let spring = instants(text, "Europe/Vienna", "2026-03-29T00:30:00Z", 2);
        assert_eq!(spring, ["2026-03-29T01:00:00Z", "2026-03-29T12:00:00Z"], "{text}");
        let autumn = instants(text, "Europe/Vienna", "2026-10-24T23:30:00Z", 2);
        assert_eq!(autumn, ["2026-10-25T00:00:00Z", "2026-10-25T13:00:00Z"], "{text}");
    }
}

#[test]
fn several_times_in_what_is_left_out_run_once() {
    let found = instants("02:0/10", "Europe/Vienna", "2026-03-29T00:00:00Z", 2);
    assert_eq!(found, ["2026-03-29T01:00:00Z", "2026-03-30T00:00:00Z"]);
}

#[test]
fn a_day_that_a_country_left_out_never_was() {
    let found = instants("12:00", "Pacific/Apia", "2011-12-29T00:00:00Z", 3);
    assert_eq!(found, ["2011-12-29T22:00:00Z", "2011-12-30T22:00:00Z", "2011-12-31T22:00:00Z"]);
}

#[test]
fn midnight_that_is_left_out_runs_on_its_own_day() {
    // Beirut goes from 00:00 to 01:00.
    let found = instants("daily", "Asia/Beirut", "2026-03-28T12:00:00Z", 2);
    assert_eq!(found, ["2026-03-28T22:00:00Z", "2026-03-29T21:00:00Z"]);
}
