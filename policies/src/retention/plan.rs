//! What a run of retention does to one domain.

use std::collections::BTreeSet;
use std::num::NonZeroU32;

use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::depth::{Depth, DepthLimit, press};
use super::keep::Keep;
use super::order::{Delete, Shape, order};
use super::verdict::{Candidate, Decision, Reason, Verdict, verdicts};

/// What bounds a run besides the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// How many snapshots the machine's disk may stand upon.
    pub depth_max: NonZeroU32,
    /// How many deletes a run asks for; none for as many as there are.
    pub deletes_max: Option<NonZeroU32>,
}

/// Whether the clock can be believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// It can.
    Sound,
    /// It has leapt, and nothing has confirmed it since.
    InDoubt,
}

/// What a run would do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// On every candidate, the newest first.
    pub verdicts: Vec<Verdict>,
    /// This run's deletes, in their order.
    pub deletes: Vec<Delete>,
    /// Deletes that a later run asks for.
    pub postponed: Vec<Delete>,
    /// What the machine's disk stands upon when all of them are done.
    pub depth: Depth,
}

impl Plan {
    /// The plan while the clock is in doubt: only as many deletes as the depth needs, the oldest of those that the plan
    /// has, and of what a rule would keep only if that is not enough.
    pub(crate) fn held_back(mut self, shape: &Shape, limits: Limits) -> Self {
        let chain: BTreeSet<_> = shape.chain().collect();
        let future =
            self.verdicts.iter().filter(|found| found.is_future() && chain.contains(&found.snapshot));
        let counted = chain.len().saturating_sub(future.count());
        let most = usize::try_from(DepthLimit::of(limits.depth_max, shape).get()).unwrap_or(usize::MAX);
        let mut left = counted.saturating_sub(most);
        let pressed = |verdict: &Verdict| matches!(verdict.reasons.as_slice(), [Reason::TooDeep { .. }]);
        let mut oldest: Vec<&mut Verdict> =
            self.verdicts.iter_mut().rev().filter(|verdict| !verdict.keeps()).collect();
        oldest.sort_by_key(|verdict| pressed(verdict));
        for verdict in oldest {
            if left > 0 && chain.contains(&verdict.snapshot) {
                left -= 1;
            } else {
                verdict.decision = Decision::Keep;
                verdict.reasons = vec![Reason::InDoubt];
            }
        }
        let going: BTreeSet<_> = self.verdicts.iter().filter(|v| !v.keeps()).map(|v| v.snapshot).collect();
        self.deletes = order(shape, &going);
        self.postponed = Vec::new();
        self
    }
}

/// Judges `candidates` and puts the deletes in order. `policy plan` prints it, and the run carries it out.
///
/// Pure: the same arguments give the same plan, and when all its deletes are done the next plan has none.
pub fn plan(
    candidates: &[Candidate],
    keep: &Keep,
    limits: Limits,
    shape: &Shape,
    now: Timestamp,
    zone: &TimeZone,
) -> Plan {
    let mut verdicts = verdicts(candidates, keep, now, zone);
    let depth = press(&mut verdicts, shape, DepthLimit::of(limits.depth_max, shape));
    let going: BTreeSet<_> = verdicts.iter().filter(|v| !v.keeps()).map(|v| v.snapshot).collect();
    let mut deletes = order(shape, &going);
    let most =
        limits.deletes_max.map_or(usize::MAX, |most| usize::try_from(most.get()).unwrap_or(usize::MAX));
    let postponed = deletes.split_off(most.min(deletes.len()));
    Plan { verdicts, deletes, postponed, depth }
}
