//! What retention promises: the rules by example, and properties on random sets.

mod examples;
mod long_run;
mod ordering;
mod properties;

use std::num::NonZeroU32;

use jiff::Timestamp;
use snaptree_engine::SnapshotId;
use uuid::Uuid;

use super::*;

/// The snapshot of that number.
fn id(number: usize) -> SnapshotId {
    SnapshotId::from_uuid(Uuid::from_u128(number as u128 + 1))
}

fn number(id: SnapshotId) -> usize {
    usize::try_from(id.as_uuid().as_u128() - 1).unwrap()
}

/// Counted snapshots, numbered in the order given.
fn taken(times: &[&str]) -> Vec<Candidate> {
    let at = |time: &str| -> Timestamp { time.parse().unwrap() };
    times
        .iter()
        .enumerate()
        .map(|(n, time)| Candidate {
            snapshot: id(n),
            created: at(time),
            seq: n as u64,
            standing: Standing::Counted,
        })
        .collect()
}

fn rule(per: Per, limit: Limit) -> Rule {
    Rule { per, limit }
}

fn count(per: Per, count: u32) -> Rule {
    rule(per, Limit::Count(NonZeroU32::new(count).unwrap()))
}

fn within(per: Per, reach: &str) -> Rule {
    rule(per, Limit::Within(reach.parse().unwrap()))
}

fn keep(rules: &[Rule]) -> Keep {
    Keep::new(rules.to_vec(), None, NonZeroU32::MIN).unwrap()
}

/// The numbers of those that stay, the newest first.
fn kept(verdicts: &[Verdict]) -> Vec<usize> {
    verdicts.iter().filter(|verdict| verdict.keeps()).map(|verdict| number(verdict.snapshot)).collect()
}
