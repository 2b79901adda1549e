//! What a run of retention does to one domain.

use std::collections::BTreeSet;
use std::num::NonZeroU32;

use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::depth::{Depth, press};
use super::keep::Keep;
use super::order::{Delete, Shape, order};
use super::verdict::{Candidate, Verdict, verdicts};

/// What bounds a run besides the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// How many snapshots the machine's disk may stand upon.
    pub depth_max: NonZeroU32,
    /// How many deletes a run asks for; none for as many as there are.
    pub deletes_max: Option<NonZeroU32>,
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
    let depth = press(&mut verdicts, shape, limits.depth_max);
    let going: BTreeSet<_> = verdicts.iter().filter(|v| !v.keeps()).map(|v| v.snapshot).collect();
    let mut deletes = order(shape, &going);
    let most =
        limits.deletes_max.map_or(usize::MAX, |most| usize::try_from(most.get()).unwrap_or(usize::MAX));
    let postponed = deletes.split_off(most.min(deletes.len()));
    Plan { verdicts, deletes, postponed, depth }
}
