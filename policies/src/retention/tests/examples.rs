//! The rules, one by one, and the mistakes that others have made with them.

use jiff::tz::TimeZone;

use super::*;

const NOW: &str = "2026-11-23T12:00:00Z";

fn judged(candidates: &[Candidate], keep: &Keep, zone: &str) -> Vec<Verdict> {
    verdicts(candidates, keep, NOW.parse().unwrap(), &TimeZone::get(zone).unwrap())
}

/// Those that stay in UTC.
fn stays(times: &[&str], rules: &[Rule]) -> Vec<usize> {
    kept(&judged(&taken(times), &keep(rules), "UTC"))
}

fn told(verdicts: &[Verdict]) -> String {
    let line = |verdict: &Verdict| {
        let reasons: Vec<String> = verdict.reasons.iter().map(ToString::to_string).collect();
        let word = if verdict.keeps() { "keep  " } else { "delete" };
        format!("{} {word} {}", verdict.created, reasons.join("; "))
    };
    verdicts.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[test]
fn the_newest_of_a_period_is_kept() {
    let times = ["2026-11-21T01:00:00Z", "2026-11-21T23:00:00Z", "2026-11-22T05:00:00Z"];
    assert_eq!(stays(&times, &[count(Per::Day, 2)]), [2, 1]);
}

#[test]
fn one_snapshot_counts_for_every_rule_that_it_fits() {
    let times = ["2026-11-20T01:00:00Z", "2026-11-21T01:00:00Z", "2026-11-22T01:00:00Z"];
    assert_eq!(stays(&times, &[count(Per::Snapshot, 1), count(Per::Day, 1)]), [2]);
}

#[test]
fn periods_without_a_snapshot_do_not_count() {
    let times = ["2019-01-01T00:00:00Z", "2022-01-01T00:00:00Z", "2026-11-22T00:00:00Z"];
    assert_eq!(stays(&times, &[count(Per::Day, 3)]), [2, 1, 0]);
    assert_eq!(stays(&times, &[count(Per::Day, 2)]), [2, 1]);
}

#[test]
fn the_oldest_is_kept_while_a_rule_is_not_full() {
    let times = ["2026-11-02T01:00:00Z", "2026-11-02T02:00:00Z", "2026-11-22T00:00:00Z"];
    assert_eq!(stays(&times, &[count(Per::Month, 2)]), [2, 0]);
    assert_eq!(stays(&times, &[count(Per::Month, 1)]), [2]);
}

#[test]
fn within_reaches_back_from_the_newest_and_a_pause_deletes_nothing() {
    let times = ["2020-01-01T00:00:00Z", "2020-01-02T00:00:00Z", "2020-01-02T00:00:01Z"];
    assert_eq!(stays(&times, &[within(Per::Snapshot, "1d")]), [2, 1], "the bound itself is outside");
}

#[test]
fn a_snapshot_of_the_future_does_not_move_what_within_reaches_back_from() {
    let times = ["2026-11-23T11:00:00Z", "2036-01-01T00:00:00Z"];
    assert_eq!(stays(&times, &[within(Per::Snapshot, "1h")]), [1, 0]);
}

#[test]
fn week_one_and_month_one_are_different_periods() {
    // kopia keys both as 2026-01, and loses the week.
    let times = ["2026-01-04T00:00:00Z", "2026-01-11T00:00:00Z", "2026-01-12T00:00:00Z"];
    let rules = [count(Per::Week, 3), count(Per::Month, 3)];
    assert_eq!(stays(&times, &rules), [2, 1, 0]);
}

#[test]
fn a_week_that_spans_two_years_is_one() {
    let times = ["2024-12-30T00:00:00Z", "2024-12-31T00:00:00Z", "2025-01-01T00:00:00Z"];
    let older = ["2024-12-20T00:00:00Z"];
    let all: Vec<&str> = older.into_iter().chain(times).collect();
    assert_eq!(stays(&all, &[count(Per::Week, 2)]), [3, 0]);
}

#[test]
fn both_runs_of_a_repeated_hour_are_kept() {
    let times = ["2026-10-24T23:00:00Z", "2026-10-25T00:00:00Z", "2026-10-25T01:00:00Z"];
    let verdicts = judged(&taken(&times), &keep(&[count(Per::Hour, 2)]), "Europe/Vienna");
    assert_eq!(kept(&verdicts), [2, 1]);
}

#[test]
fn counting_goes_by_the_policys_time_zone() {
    let times = ["2026-11-20T22:30:00Z", "2026-11-20T23:30:00Z", "2026-11-21T12:00:00Z"];
    let keep = keep(&[count(Per::Day, 2)]);
    assert_eq!(kept(&judged(&taken(&times), &keep, "UTC")), [2, 1]);
    assert_eq!(kept(&judged(&taken(&times), &keep, "Europe/Vienna")), [2, 0]);
}

#[test]
fn what_does_not_count_stays_and_changes_nothing() {
    let times = ["2026-11-20T00:00:00Z", "2026-11-21T00:00:00Z", "2026-11-22T00:00:00Z"];
    for why in [Uncounted::Failed, Uncounted::Foreign, Uncounted::Lost, Uncounted::Unfinished] {
        let mut candidates = taken(&times);
        candidates[2].standing = Standing::Uncounted(why);
        assert_eq!(kept(&judged(&candidates, &keep(&[count(Per::Snapshot, 1)]), "UTC")), [2, 1], "{why:?}");
    }
}

#[test]
fn max_age_goes_before_the_rules_and_min_keep_before_max_age() {
    let times = ["2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z", "2026-03-01T00:00:00Z"];
    let judge = |min| {
        let rules = vec![rule(Per::Month, Limit::All)];
        let keep = Keep::new(rules, "30d".parse().ok(), NonZeroU32::new(min).unwrap()).unwrap();
        kept(&judged(&taken(&times), &keep, "UTC"))
    };
    assert_eq!(judge(1), [2]);
    assert_eq!(judge(2), [2, 1]);
}

#[test]
fn without_a_rule_everything_stays() {
    let times = ["1999-01-01T00:00:00Z", "2026-02-01T00:00:00Z"];
    assert_eq!(kept(&judged(&taken(&times), &Keep::default(), "UTC")), [1, 0]);
    assert!(Keep::default().keeps_all());
}

#[test]
fn a_rule_stands_once() {
    let twice = Keep::new(vec![count(Per::Day, 1), count(Per::Day, 2)], None, NonZeroU32::MIN);
    assert_eq!(twice.unwrap_err().to_string(), "'daily' is there twice");
    let both = Keep::new(vec![count(Per::Day, 1), within(Per::Day, "7d")], None, NonZeroU32::MIN);
    assert!(both.is_ok());
}

#[test]
fn rules_read_back_from_json() {
    let rules = vec![count(Per::Day, 7), rule(Per::Year, Limit::All), within(Per::Snapshot, "36h")];
    let keep = Keep::new(rules, "2y".parse().ok(), NonZeroU32::new(3).unwrap()).unwrap();
    let json = serde_json::to_string(&keep).unwrap();
    assert_eq!(serde_json::from_str::<Keep>(&json).unwrap(), keep);
    assert!(serde_json::from_str::<Keep>(r#"{"min-keep":0}"#).is_err());
}

#[test]
fn what_is_beyond_every_rule_says_so_once() {
    let times = ["2026-11-20T10:00:00Z", "2026-11-21T10:00:00Z"];
    let reasons = |rules: &[Rule]| told(&judged(&taken(&times), &keep(rules), "UTC"));
    assert!(reasons(&[count(Per::Snapshot, 1)]).ends_with("delete last 1: full with newer ones"));
    let both = [count(Per::Snapshot, 1), count(Per::Day, 1)];
    assert!(reasons(&both).ends_with("delete every rule is full with newer ones"));
}

#[test]
fn every_verdict_says_why() {
    let times = [
        "2026-01-01T00:00:00Z",
        "2026-10-30T10:00:00Z",
        "2026-11-20T10:00:00Z",
        "2026-11-21T10:00:00Z",
        "2026-11-22T09:00:00Z",
        "2026-11-22T10:00:00Z",
        "2026-11-23T10:00:00Z",
        "2026-11-23T11:00:00Z",
        "2026-11-23T11:30:00Z",
    ];
    let mut candidates = taken(&times);
    candidates[3].standing = Standing::Held;
    candidates[6].standing = Standing::Uncounted(Uncounted::Foreign);
    let rules = vec![
        count(Per::Snapshot, 1),
        within(Per::Snapshot, "2h"),
        count(Per::Day, 2),
        within(Per::Week, "40d"),
        rule(Per::Month, Limit::All),
    ];
    let keep = Keep::new(rules, "6mo".parse().ok(), NonZeroU32::new(2).unwrap()).unwrap();
    insta::assert_snapshot!(told(&judged(&candidates, &keep, "Europe/Vienna")));
}

/// At the hours of that day in this order in the log.
fn at_hours(hours: &[u32]) -> Vec<Candidate> {
    let times: Vec<String> = hours.iter().map(|hour| format!("2026-11-23T{hour:02}:00:00Z")).collect();
    taken(&times.iter().map(String::as_str).collect::<Vec<_>>())
}

#[test]
fn what_is_dated_later_than_now_neither_counts_nor_goes() {
    // It is 12:00; those of 20 and 21 were taken by a clock that was ahead.
    let candidates = at_hours(&[20, 21, 9, 10, 11]);
    let keep = Keep::new(vec![count(Per::Snapshot, 2)], "1h".parse().ok(), NonZeroU32::MIN).unwrap();
    assert_eq!(kept(&judged(&candidates, &keep, "UTC")), [4, 1, 0]);
}

#[test]
fn the_log_says_which_is_newer_once_the_clock_has_come_to_a_date_again() {
    let candidates = at_hours(&[11, 9, 10]);
    assert_eq!(kept(&judged(&candidates, &keep(&[count(Per::Snapshot, 2)]), "UTC")), [2, 1]);
    // And an hour that the clock went through twice is one.
    let candidates = at_hours(&[10, 11, 10]);
    assert_eq!(
        kept(&judged(&candidates, &keep(&[count(Per::Hour, 3)]), "UTC")),
        [2, 1, 0],
        "the oldest stays"
    );
    assert_eq!(kept(&judged(&candidates, &keep(&[count(Per::Hour, 2)]), "UTC")), [2, 1]);
}

#[test]
fn what_a_clock_dated_years_back_is_as_old_as_what_was_taken_before_it() {
    let times = ["2026-11-23T09:00:00Z", "2000-01-01T00:00:00Z", "2026-11-23T11:00:00Z"];
    let keep = Keep::new(Vec::new(), "30d".parse().ok(), NonZeroU32::MIN).unwrap();
    assert_eq!(kept(&judged(&taken(&times), &keep, "UTC")), [2, 1, 0]);
    assert_eq!(kept(&judged(&taken(&times), &super::keep(&[within(Per::Snapshot, "1d")]), "UTC")), [2, 1, 0]);
}

#[test]
fn a_run_keeps_what_it_has_taken_whatever_the_rules_say() {
    let mut candidates = at_hours(&[8, 9, 10]);
    candidates[0].standing = Standing::Own;
    assert_eq!(kept(&judged(&candidates, &keep(&[count(Per::Snapshot, 1)]), "UTC")), [2, 0]);
}
