//! Retention beside rustic's `KeepOptions`: the same snapshots stay, for the same reasons.

use std::collections::{BTreeMap, BTreeSet};

use fastrand::Rng;
use jiff::tz::TimeZone;
use jiff::{Span, Timestamp};
use rustic_core::{KeepOptions, repofile::SnapshotFile};
use snaptree_peers::{All, NOW_S, counts, instants, ours, sets, turn_of_the_year, withins};
use snaptree_policies::retention::{Limit, Per, Reason, Rule, Verdict};

const PERS: [Per; 7] = [Per::Snapshot, Per::Hour, Per::Day, Per::Week, Per::Month, Per::Quarter, Per::Year];

type Kept = BTreeMap<Timestamp, BTreeSet<String>>;

fn options(counts: &[Rule], withins: &[(Rule, u32)]) -> KeepOptions {
    let mut options = KeepOptions::default();
    for rule in counts {
        let count = match rule.limit {
            Limit::Count(count) => i32::try_from(count.get()).unwrap(),
            Limit::All => -1,
            Limit::Within(_) => unreachable!("rules by age come apart"),
        };
        options = match rule.per {
            Per::Snapshot => options.keep_last(count),
            Per::Hour => options.keep_hourly(count),
            Per::Day => options.keep_daily(count),
            Per::Week => options.keep_weekly(count),
            Per::Month => options.keep_monthly(count),
            Per::Quarter => options.keep_quarter_yearly(count),
            Per::Year => options.keep_yearly(count),
        };
    }
    for (rule, hours) in withins {
        let span = Span::new().hours(*hours);
        options = match rule.per {
            Per::Snapshot => options.keep_within(span),
            Per::Hour => options.keep_within_hourly(span),
            Per::Day => options.keep_within_daily(span),
            Per::Week => options.keep_within_weekly(span),
            Per::Month => options.keep_within_monthly(span),
            Per::Quarter => options.keep_within_quarter_yearly(span),
            Per::Year => options.keep_within_yearly(span),
        };
    }
    options
}

/// What stays, with the keys of the rules that keep it, as rustic says.
fn theirs(instants: &BTreeSet<Timestamp>, options: &KeepOptions, zone: &TimeZone) -> Kept {
    let snapshot =
        |at: &Timestamp| SnapshotFile { time: at.to_zoned(zone.clone()), ..SnapshotFile::default() };
    let now = Timestamp::from_second(NOW_S).unwrap().to_zoned(zone.clone());
    let judged = options.apply(instants.iter().map(snapshot).collect(), &now).unwrap();
    let key = |reason: &String| reason.replace("quarter-yearly", "quarterly").replace(' ', "-");
    judged
        .into_iter()
        .filter(|judged| judged.keep)
        .map(|judged| (judged.snapshot.time.timestamp(), judged.reasons.iter().map(key).collect()))
        .collect()
}

/// The same, as we say.
fn told(verdicts: &[Verdict]) -> Kept {
    let key = |reason: &Reason| match reason {
        Reason::Newest { rule, .. } | Reason::Oldest { rule, .. } => Some(rule.key().to_owned()),
        _ => None,
    };
    let kept = verdicts.iter().filter(|verdict| verdict.keeps());
    kept.map(|verdict| (verdict.created, verdict.reasons.iter().filter_map(key).collect())).collect()
}

#[test]
fn the_same_snapshots_stay_for_the_same_reasons_as_in_rustic() {
    let zones = ["UTC", "Europe/Vienna", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu"];
    let zones = zones.map(|name| TimeZone::get(name).unwrap());
    let (mut snapshots, mut deleted) = (0, 0);
    for set in 0..sets(100_000) {
        let mut random = Rng::with_seed(u64::try_from(set).unwrap());
        let zone = &zones[random.usize(..zones.len())];
        let (counts, withins) = loop {
            let rules = (counts(&mut random, &PERS, All::Allowed), withins(&mut random, &PERS));
            if !rules.0.is_empty() || !rules.1.is_empty() {
                break rules;
            }
        };
        let rules: Vec<Rule> = counts.iter().copied().chain(withins.iter().map(|(rule, _)| *rule)).collect();
        let mut instants = instants(&mut random, 40, zone);
        if rules.iter().any(|rule| rule.per == Per::Week) {
            // rustic cuts a week at the turn of the year in two; ISO 8601, restic and we do not.
            instants.retain(|at| !turn_of_the_year(*at, zone));
        }
        let theirs = theirs(&instants, &options(&counts, &withins), zone);
        let ours = ours(&instants, &rules, zone);
        assert_eq!(told(&ours), theirs, "set {set}: {rules:?}");
        snapshots += instants.len();
        deleted += instants.len() - theirs.len();
    }
    println!("{} sets, {snapshots} snapshots, {deleted} of them to be deleted", sets(100_000));
    assert!(deleted * 5 > snapshots, "the sets are no test if nearly everything stays");
}

fn both(times: &[&str], rule: Rule, options: &KeepOptions, zone: &str) -> (usize, usize) {
    let instants = times.iter().map(|time| time.parse().unwrap()).collect();
    let zone = TimeZone::get(zone).unwrap();
    (told(&ours(&instants, &[rule], &zone)).len(), theirs(&instants, options, &zone).len())
}

#[test]
fn on_purpose_a_week_that_spans_two_years_is_one() {
    let times = ["2024-12-01T12:00:00Z", "2024-12-30T12:00:00Z", "2025-01-02T12:00:00Z"];
    let rule = Rule { per: Per::Week, limit: Limit::Count(2.try_into().unwrap()) };
    let options = KeepOptions::default().keep_weekly(2);
    let kept = |times: &[&str]| both(times, rule, &options, "UTC");
    assert_eq!(kept(&times), (2, 2));
    let four: Vec<&str> = ["2024-11-01T12:00:00Z"].into_iter().chain(times).collect();
    assert_eq!(kept(&four), (2, 2));
    // With three weeks to keep, ours reach back further.
    let rule = Rule { per: Per::Week, limit: Limit::Count(3.try_into().unwrap()) };
    let instants: BTreeSet<Timestamp> = four.iter().map(|time| time.parse().unwrap()).collect();
    let ours = told(&ours(&instants, &[rule], &TimeZone::UTC));
    let theirs = theirs(&instants, &KeepOptions::default().keep_weekly(3), &TimeZone::UTC);
    let first: Timestamp = "2024-11-01T12:00:00Z".parse().unwrap();
    assert!(ours.contains_key(&first) && !theirs.contains_key(&first));
}

#[test]
fn on_purpose_both_runs_of_a_repeated_hour_are_kept() {
    let times = ["2026-10-24T20:00:00Z", "2026-10-25T00:10:00Z", "2026-10-25T01:10:00Z"];
    let rule = Rule { per: Per::Hour, limit: Limit::Count(2.try_into().unwrap()) };
    let instants: BTreeSet<Timestamp> = times.iter().map(|time| time.parse().unwrap()).collect();
    let zone = TimeZone::get("Europe/Vienna").unwrap();
    let first: Timestamp = times[1].parse().unwrap();
    assert!(told(&ours(&instants, &[rule], &zone)).contains_key(&first));
    assert!(!theirs(&instants, &KeepOptions::default().keep_hourly(2), &zone).contains_key(&first));
}
