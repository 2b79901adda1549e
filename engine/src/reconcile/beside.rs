//! What may go on beside an operation that needs attention: whatever does not touch the same layers. Pure.
//!
//! A stuck operation's files are those of the steps whose end is not known or that may be taken back, and, past its
//! point of no return, of all that is still to come. Where a driver cannot tell a step's files, the whole domain waits.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::driver::{Driver, Touched};
use crate::layer::LayerGraph;
use crate::operation::{Code, Failure, Operation, Phase, Step};
use crate::project::DomainState;

/// What stuck operations keep others from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Blocked {
    /// Nothing is stuck.
    #[default]
    Nothing,
    /// These files.
    Files(Touched),
    /// The whole domain.
    Domain,
}

/// What the operations of `state` that need attention block.
pub(crate) fn blocked(driver: &dyn Driver, state: &DomainState) -> Blocked {
    let mut stuck = state
        .open
        .iter()
        .filter(|operation| matches!(operation.phase, Phase::NeedsAttention { .. }))
        .peekable();
    if stuck.peek().is_none() {
        return Blocked::Nothing;
    }
    let mut files = Touched::default();
    for step in stuck.flat_map(uncertain) {
        match driver.touches(step) {
            Some(touched) => files.add(touched),
            None => return Blocked::Domain,
        }
    }
    Blocked::Files(files)
}

/// The steps of a stuck operation whose files nobody else may touch.
fn uncertain(operation: &Operation) -> &[Step] {
    let Phase::NeedsAttention { before, .. } = &operation.phase else { return &[] };
    let steps = operation.steps.as_slice();
    let standing = Operation { phase: (**before).clone(), ..operation.clone() };
    let (in_hand, goes_back) = match **before {
        Phase::Running { step } | Phase::Waiting { step, .. } | Phase::Ready { step } => {
            (step, standing.can_go_back())
        }
        Phase::Undoing { step, .. } | Phase::Undone { step, .. } => (step, true),
        Phase::Requested | Phase::Planned => (0, true),
        Phase::NeedsAttention { .. } | Phase::Ended { .. } => return steps,
    };
    if goes_back { steps.get(..=in_hand).unwrap_or(steps) } else { steps.get(in_hand..).unwrap_or(&[]) }
}

/// Why a plan must wait, if it touches what is blocked.
pub(crate) fn in_the_way(driver: &dyn Driver, state: &DomainState, plan: &[Step]) -> Option<Failure> {
    let stuck = match blocked(driver, state) {
        Blocked::Nothing => return None,
        Blocked::Domain => return Some(waits("this domain")),
        Blocked::Files(stuck) => stuck,
    };
    let mut planned = Touched::default();
    for step in plan {
        match driver.touches(step) {
            Some(touched) => planned.add(touched),
            None => return Some(waits("this domain")),
        }
    }
    let needs = |touched: &Touched| with_below(&state.layers, touched.writes.union(&touched.reads));
    let (ours, theirs) = (needs(&planned), needs(&stuck));
    let shared = ours.intersection(&stuck.writes).chain(theirs.intersection(&planned.writes)).next();
    shared.map(|file| waits(&file.display().to_string()))
}

fn waits(what: &str) -> Failure {
    Failure::new(Code::NeedsAttention, format!("another operation on {what} needs attention first"))
        .hint("`snaptree op list --open` names it; then `snaptree op retry` or `snaptree op resolve`")
}

/// The files, and all that they are built upon.
fn with_below<'f>(graph: &LayerGraph, files: impl Iterator<Item = &'f PathBuf>) -> BTreeSet<PathBuf> {
    let mut all: BTreeSet<PathBuf> = files.cloned().collect();
    let named = all.clone();
    for layers in graph.disks.values() {
        let of_file = |file: &Path| layers.layers.iter().find(|(_, layer)| layer.file == file);
        for (id, _) in named.iter().filter_map(|file| of_file(file)) {
            let below = layers.chain(id).into_iter().filter_map(|id| layers.layers.get(id));
            all.extend(below.map(|layer| layer.file.clone()));
        }
    }
    all
}
