//! `max-depth`: how many snapshots the machine's disk may stand upon.

use std::num::NonZeroU32;

use snaptree_engine::SnapshotId;

use super::keep::{Limit, Rule};
use super::order::Shape;
use super::period::Per;
use super::verdict::{Decision, Reason, Verdict};

/// What the machine's disk stands upon once the verdicts are carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// So many snapshots, which is within the limit.
    Fits(u32),
    /// So many, and none of them may go: no new snapshot should be taken.
    Exceeds(u32),
}

/// Turns as many verdicts into deletes as it takes for the machine's disk to stand upon at most `depth_max` snapshots.
///
/// What only the finest rule keeps goes first, and of that the oldest. What `last` or `min-keep` keeps, what is held,
/// what the policy did not make, and what stays because there is no rule are never touched; so the depth can still be
/// too great afterwards.
pub fn press(verdicts: &mut [Verdict], shape: &Shape, depth_max: NonZeroU32) -> Depth {
    let mut going: Vec<SnapshotId> = verdicts.iter().filter(|v| !v.keeps()).map(|v| v.snapshot).collect();
    going.sort_unstable();
    let mut chain: Vec<SnapshotId> = shape.chain().collect();
    chain.sort_unstable();
    // Both are sorted, so one walk along them tells what stays.
    let mut left = going.iter().peekable();
    chain.retain(|id| {
        while left.next_if(|going| *going < id).is_some() {}
        left.peek() != Some(&id)
    });
    let depth = chain.len();
    let limit = usize::try_from(depth_max.get()).unwrap_or(usize::MAX);
    let mut least: Vec<(Rule, &mut Verdict)> = verdicts
        .iter_mut()
        .filter(|verdict| verdict.keeps() && chain.binary_search(&verdict.snapshot).is_ok())
        .filter_map(|verdict| Some((coarsest(&verdict.reasons)?, verdict)))
        .collect();
    least.sort_by_key(|(rule, verdict)| (rule.per, verdict.created, verdict.snapshot));
    let excess = depth.saturating_sub(limit).min(least.len());
    for (rule, verdict) in least.into_iter().take(excess) {
        verdict.decision = Decision::Delete;
        verdict.reasons = vec![Reason::TooDeep { rule, depth_max: depth_max.get() }];
    }
    let left = depth - excess;
    let count = u32::try_from(left).unwrap_or(u32::MAX);
    if left <= limit { Depth::Fits(count) } else { Depth::Exceeds(count) }
}

/// The coarsest rule that keeps a snapshot; none if something keeps it that is not to be pressed.
fn coarsest(reasons: &[Reason]) -> Option<Rule> {
    let mut coarsest: Option<Rule> = None;
    for reason in reasons {
        let (Reason::Newest { rule, .. } | Reason::Oldest { rule, .. }) = reason else { return None };
        if rule.per == Per::Snapshot && !matches!(rule.limit, Limit::Within(_)) {
            return None;
        }
        if coarsest.is_none_or(|so_far| so_far.per < rule.per) {
            coarsest = Some(*rule);
        }
    }
    coarsest
}
