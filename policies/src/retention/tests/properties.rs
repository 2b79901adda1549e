//! What holds for every set of snapshots and every policy.

use std::collections::BTreeSet;

use jiff::tz::TimeZone;
use proptest::prelude::*;

use super::*;

/// 2026-11-23T12:00:00Z.
const NOW_S: i64 = 1_795_435_200;

fn now() -> Timestamp {
    Timestamp::from_second(NOW_S).unwrap()
}

fn standing() -> impl Strategy<Value = Standing> {
    prop_oneof![
        8 => Just(Standing::Counted),
        1 => Just(Standing::Held),
        1 => Just(Standing::Uncounted(Uncounted::Failed)),
        1 => Just(Standing::Uncounted(Uncounted::Foreign)),
    ]
}

/// Snapshots over a few days, weeks or years, some of the future, some at the same instant; half of the sets by clocks
/// that leapt.
fn candidates() -> impl Strategy<Value = Vec<Candidate>> {
    let span = prop_oneof![Just(2_i64), Just(20), Just(800)];
    span.prop_flat_map(|days| {
        let at = prop_oneof![
            (-days * 86_400..3_600_i64).boxed(),
            (-days * 24..2).prop_map(|hours| hours * 3_600).boxed()
        ];
        (prop::collection::vec((at, standing()), 0..60), any::<bool>()).prop_map(|(mut taken, sound)| {
            if sound {
                taken.sort_by_key(|(at, _)| *at);
            }
            let candidate = |(n, (at, standing)): (usize, (i64, Standing))| Candidate {
                snapshot: id(n),
                created: Timestamp::from_second(NOW_S + at).unwrap(),
                seq: n as u64,
                standing,
            };
            taken.into_iter().enumerate().map(candidate).collect()
        })
    })
}

const PERS: [Per; 7] = [Per::Snapshot, Per::Hour, Per::Day, Per::Week, Per::Month, Per::Quarter, Per::Year];

/// A rule of each key, as steps on a ladder from strict to loose; 0 is no rule.
#[derive(Clone, Debug)]
struct Steps {
    counts: [u32; 7],
    reaches: [u32; 7],
    max_age_days: u32,
    min_keep: u32,
}

fn steps() -> impl Strategy<Value = Steps> {
    let counts = prop::array::uniform7(prop_oneof![3 => Just(0_u32), 2 => 1..6_u32, 1 => Just(99)]);
    let reaches = prop::array::uniform7(prop_oneof![4 => Just(0_u32), 1 => 1..50_u32]);
    (counts, reaches, prop_oneof![3 => Just(0_u32), 1 => 1..90_u32], 1..4_u32)
        .prop_map(|(counts, reaches, max_age_days, min_keep)| Steps {
            counts,
            reaches,
            max_age_days,
            min_keep,
        })
        .prop_filter("with a rule", |steps| steps.counts.iter().chain(&steps.reaches).any(|step| *step > 0))
}

impl Steps {
    fn keep(&self) -> Keep {
        let limit = |count: u32| match NonZeroU32::new(count) {
            Some(_) if count >= 99 => Some(Limit::All),
            count => count.map(Limit::Count),
        };
        let counts = PERS.iter().zip(self.counts).filter_map(|(per, count)| Some(rule(*per, limit(count)?)));
        let reaches = PERS
            .iter()
            .zip(self.reaches)
            .filter(|(_, days)| *days > 0)
            .map(|(per, days)| within(*per, &format!("{days}d")));
        let max_age = Some(self.max_age_days).filter(|days| *days > 0);
        Keep::new(
            counts.chain(reaches).collect(),
            max_age.map(|days| format!("{days}d").parse().unwrap()),
            NonZeroU32::new(self.min_keep).unwrap(),
        )
        .unwrap()
    }

    /// At least as loose in every respect.
    fn looser(&self, more: &Steps) -> Steps {
        let sum = |one: [u32; 7], other: [u32; 7]| std::array::from_fn(|at| one[at] + other[at]);
        Steps {
            counts: sum(self.counts, more.counts),
            reaches: sum(self.reaches, more.reaches),
            max_age_days: match (self.max_age_days, more.max_age_days) {
                (0, _) | (_, 0) => 0,
                (days, more) => days + more,
            },
            min_keep: self.min_keep + more.min_keep,
        }
    }
}

fn zone() -> impl Strategy<Value = TimeZone> {
    let names = ["UTC", "Europe/Vienna", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu"];
    prop::sample::select(names.to_vec()).prop_map(|name| TimeZone::get(name).unwrap())
}

fn kept_set(verdicts: &[Verdict]) -> BTreeSet<usize> {
    kept(verdicts).into_iter().collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn a_looser_policy_never_deletes_more(set in candidates(), strict in steps(), more in steps(), zone in zone()) {
        let loose = strict.looser(&more).keep();
        let strict = verdicts(&set, &strict.keep(), now(), &zone);
        let loose = verdicts(&set, &loose, now(), &zone);
        prop_assert!(kept_set(&strict).is_subset(&kept_set(&loose)));
    }

    #[test]
    fn planning_twice_changes_nothing(set in candidates(), steps in steps(), zone in zone()) {
        // Where dates lie, an age may be another once the snapshot is gone whose date it went by.
        let sound = set.is_sorted_by_key(|candidate| candidate.created);
        let steps = if sound { steps } else { Steps { reaches: [0; 7], max_age_days: 0, ..steps } };
        let first = verdicts(&set, &steps.keep(), now(), &zone);
        let stays = kept_set(&first);
        let left: Vec<Candidate> = set.into_iter().filter(|c| stays.contains(&number(c.snapshot))).collect();
        let second = verdicts(&left, &steps.keep(), now(), &zone);
        prop_assert_eq!(kept_set(&second), stays);
    }

    #[test]
    fn no_fewer_than_min_keep_are_left_and_none_goes_that_is_held_or_does_not_count(
        set in candidates(), steps in steps(), zone in zone()
    ) {
        let stays = kept_set(&verdicts(&set, &steps.keep(), now(), &zone));
        let counted: Vec<&Candidate> =
            set.iter().filter(|c| !matches!(c.standing, Standing::Uncounted(_))).collect();
        let left = counted.iter().filter(|c| stays.contains(&number(c.snapshot))).count();
        prop_assert!(left >= counted.len().min(steps.min_keep as usize));
        for candidate in set.iter().filter(|c| c.standing != Standing::Counted) {
            prop_assert!(stays.contains(&number(candidate.snapshot)));
        }
    }

    #[test]
    fn every_verdict_has_a_reason_and_every_snapshot_one_verdict_newest_first(
        set in candidates(), steps in steps(), zone in zone()
    ) {
        let found = verdicts(&set, &steps.keep(), now(), &zone);
        prop_assert_eq!(found.len(), set.len());
        prop_assert!(found.iter().all(|verdict| !verdict.reasons.is_empty()));
        prop_assert!(found.windows(2).all(|p| p[0].snapshot > p[1].snapshot));
    }

    #[test]
    fn a_hold_changes_nothing_for_the_others(set in candidates(), steps in steps(), zone in zone()) {
        let held: Vec<Candidate> = set.iter().map(|candidate| match candidate.standing {
            Standing::Held => Candidate { standing: Standing::Counted, ..*candidate },
            _ => *candidate,
        }).collect();
        let with = verdicts(&set, &steps.keep(), now(), &zone);
        let without = verdicts(&held, &steps.keep(), now(), &zone);
        for candidate in set.iter().filter(|c| c.standing != Standing::Held) {
            let of = |all: &[Verdict]| all.iter().find(|v| v.snapshot == candidate.snapshot).cloned();
            prop_assert_eq!(of(&with), of(&without));
        }
    }

    #[test]
    fn the_order_in_which_they_are_given_does_not_matter(set in candidates(), steps in steps()) {
        let mut turned = set.clone();
        turned.reverse();
        let zone = TimeZone::UTC;
        prop_assert_eq!(verdicts(&set, &steps.keep(), now(), &zone), verdicts(&turned, &steps.keep(), now(), &zone));
    }

    #[test]
    fn without_max_age_a_pause_deletes_nothing(set in candidates(), steps in steps(), days in 1..4_000_i64) {
        let steps = Steps { max_age_days: 0, ..steps };
        let set: Vec<Candidate> = set.into_iter().filter(|c| c.created <= now()).collect();
        let later = Timestamp::from_second(NOW_S + days * 86_400).unwrap();
        let zone = TimeZone::UTC;
        prop_assert_eq!(verdicts(&set, &steps.keep(), now(), &zone), verdicts(&set, &steps.keep(), later, &zone));
    }
}
