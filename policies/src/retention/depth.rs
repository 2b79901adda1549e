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

/// Who says how many snapshots a disk may stand upon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DepthLimit {
    /// The policy's `max-depth`.
    Policy(NonZeroU32),
    /// The hypervisor, which takes no more.
    Hypervisor(NonZeroU32),
}

impl DepthLimit {
    /// The lower of the two.
    pub fn of(policy: NonZeroU32, shape: &Shape) -> Self {
        match shape.depth_max {
            Some(most) if most < policy => Self::Hypervisor(most),
            _ => Self::Policy(policy),
        }
    }

    /// How many.
    pub const fn get(self) -> u32 {
        match self {
            Self::Policy(most) | Self::Hypervisor(most) => most.get(),
        }
    }
}

/// Turns as many verdicts into deletes as it takes for the machine's disk to stand upon at most so many snapshots.
///
/// Snapshots that are dated later than now take no place of the policy's, so that they displace nothing; the hypervisor
/// counts them.
///
/// What only the finest rule keeps goes first, and of that the oldest. What `min-keep` keeps, what is held, what the
/// policy did not make, and what stays because there is no rule are never touched, and what `last` counts only where the
/// hypervisor takes no more; so the depth can still be too great afterwards.
pub fn press(verdicts: &mut [Verdict], shape: &Shape, limit: DepthLimit) -> Depth {
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
    let future = verdicts
        .iter()
        .filter(|verdict| verdict.is_future() && chain.binary_search(&verdict.snapshot).is_ok());
    let future = future.count();
    let depth = chain.len() - future;
    let most = usize::try_from(limit.get()).unwrap_or(usize::MAX);
    // The oldest first.
    let mut least: Vec<(Rule, &mut Verdict)> = verdicts
        .iter_mut()
        .rev()
        .filter(|verdict| verdict.keeps() && chain.binary_search(&verdict.snapshot).is_ok())
        .filter_map(|verdict| Some((coarsest(&verdict.reasons, limit)?, verdict)))
        .collect();
    least.sort_by_key(|(rule, _)| rule.per);
    let excess = depth.saturating_sub(most).min(least.len());
    for (rule, verdict) in least.into_iter().take(excess) {
        verdict.decision = Decision::Delete;
        verdict.reasons = vec![Reason::TooDeep { rule, limit }];
    }
    let left = depth - excess;
    let count = u32::try_from(left + future).unwrap_or(u32::MAX);
    let counted = match limit {
        DepthLimit::Policy(_) => left,
        DepthLimit::Hypervisor(_) => left + future,
    };
    if counted <= most { Depth::Fits(count) } else { Depth::Exceeds(count) }
}

/// The coarsest rule that keeps a snapshot; none if something keeps it that is not to be pressed.
fn coarsest(reasons: &[Reason], limit: DepthLimit) -> Option<Rule> {
    let mut coarsest: Option<Rule> = None;
    for reason in reasons {
        let (Reason::Newest { rule, .. } | Reason::Oldest { rule, .. }) = reason else { return None };
        let spared = matches!(
            (rule.per, rule.limit, limit),
            (Per::Snapshot, Limit::All, _) | (Per::Snapshot, Limit::Count(_), DepthLimit::Policy(_))
        );
        if spared {
            return None;
        }
        if coarsest.is_none_or(|so_far| so_far.per < rule.per) {
            coarsest = Some(*rule);
        }
    }
    coarsest
}
