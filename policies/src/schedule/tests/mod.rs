//! Schedules against other ways to tell the same.

mod cron;
mod due;
mod transitions;

use super::*;

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

fn zone(name: &str) -> TimeZone {
    TimeZone::get(name).unwrap()
}

fn schedule(text: &str) -> Schedule {
    text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
}

#[test]
fn each_kind_is_told_by_its_form() {
    assert!(matches!(schedule("every 15m"), Schedule::Every(_)));
    assert!(matches!(schedule("daily"), Schedule::Calendar(_)));
    assert!(matches!(schedule("Mon 2026-*-* 10:00 Europe/Vienna"), Schedule::Calendar(_)));
    assert!(matches!(schedule("0 2 * * *"), Schedule::Cron(_)));
    assert!(matches!(schedule("*/10 0 2 * * *"), Schedule::Cron(_)));
    assert!(matches!(schedule("@daily"), Schedule::Cron(_)));
}

#[test]
fn what_never_comes_or_is_no_schedule_is_refused() {
    for bad in [
        "",
        "every",
        "every 0s",
        "every 6mo",
        "*-02-30",
        "0 0 30 2 *",
        "0 0 0 0 0",
        "@never",
        "1 2 3 4 5 6 7",
        "ü * * * *",
    ] {
        assert!(bad.parse::<Schedule>().is_err(), "{bad}");
    }
    assert!("x".repeat(SCHEDULE_BYTES_MAX + 1).parse::<Schedule>().is_err());
}

#[test]
fn a_schedule_reads_back_from_what_it_prints() {
    for text in ["every 15m", "Mon..Fri 02:30", "daily Europe/Vienna", "30 2 * * 1-5", "@hourly"] {
        let schedule = schedule(text);
        assert_eq!(schedule.to_string(), text);
        let json = serde_json::to_string(&schedule).unwrap();
        assert_eq!(serde_json::from_str::<Schedule>(&json).unwrap(), schedule);
    }
}

#[test]
fn elapsed_time_knows_no_calendar() {
    let quarter = schedule("every 15m");
    assert_eq!(
        quarter.next_after(at("2026-10-25T00:59:59.5Z"), &zone("Europe/Vienna")),
        Some(at("2026-10-25T01:00:00Z"))
    );
    assert_eq!(
        quarter.next_after(at("2026-10-25T01:00:00Z"), &zone("Europe/Vienna")),
        Some(at("2026-10-25T01:15:00Z"))
    );
    assert_eq!(
        quarter.last_until(at("2026-10-25T01:00:00Z"), &TimeZone::UTC),
        Some(at("2026-10-25T01:00:00Z"))
    );
    assert_eq!(
        quarter.next_after(at("1969-12-31T23:50:00.5Z"), &TimeZone::UTC),
        Some(at("1970-01-01T00:00:00Z"))
    );
    assert_eq!(quarter.next_after(Timestamp::MAX, &TimeZone::UTC), None);
}

#[test]
fn a_time_zone_in_the_expression_goes_before_the_policys() {
    let next =
        |text: &str| schedule(text).next_after(at("2026-07-01T00:00:00Z"), &zone("Asia/Tokyo")).unwrap();
    assert_eq!(next("02:30"), at("2026-07-01T17:30:00Z"));
    assert_eq!(next("02:30 UTC"), at("2026-07-01T02:30:00Z"));
    assert_eq!(next("02:30 Europe/Vienna"), at("2026-07-01T00:30:00Z"));
}

proptest::proptest! {
    #[test]
    fn the_last_until_an_instant_is_the_one_that_no_other_follows(
        text in proptest::sample::select(vec![
            "every 7s", "hourly", "daily", "*-02-29 12:00", "Mon *-*~07/1 10:00", "0 2,14 * * *", "*:0/7:30", "yearly",
        ]),
        second in 0..4_000_000_000_i64,
        name in proptest::sample::select(vec!["UTC", "Europe/Vienna", "Australia/Lord_Howe", "America/Sao_Paulo"]),
    ) {
        let (schedule, zone) = (schedule(text), zone(name));
        let until = Timestamp::from_second(second).unwrap();
        match schedule.last_until(until, &zone) {
            Some(last) => {
                proptest::prop_assert!(last <= until);
                let before = Timestamp::from_second(last.as_second() - 1).unwrap();
                proptest::prop_assert_eq!(schedule.next_after(before, &zone), Some(last));
                proptest::prop_assert!(schedule.next_after(last, &zone).is_none_or(|next| next > until));
            }
            None => proptest::prop_assert!(
                schedule.next_after(Timestamp::UNIX_EPOCH, &zone).is_none_or(|first| first > until)
            ),
        }
    }
}
