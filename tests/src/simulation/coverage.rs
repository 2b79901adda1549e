//! What the simulation met: how often each kind of step, each fault and each place of a crash came together.
//!
//! # Which cells there are
//! A cell is a kind of step, the fault that befell it last, and the place at which the program was killed while that
//! step was in hand, or *no crash*: the step came to its end, forward or back. What cannot come together is no cell:
//!
//! * A step with one effect is never half done. Where the effects are several, [`Fault::HalfDone`] and [`Place::Half`]
//!   lie between them.
//! * A step that was refused for good is taken back, so it has no end; but one that only goes forward waits for
//!   someone who lets it try again, and is not taken back.
//! * What went on behind its client's back and is seen to be done is not carried out once more. Whether a pull, a push
//!   or a drop came to its end cannot be seen, so these are run again.
//! * A step's start is journaled once more only after a refusal that may pass.
//! * A request is no step; the program is killed around its append.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use snaptree_drivers::sim::Fault;

/// Where the program was killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    /// Nowhere: the step came to its end in one life.
    Nowhere,
    /// Before an event was appended.
    AppendBefore,
    /// After it was appended, before anyone was told.
    AppendAfter,
    /// After the start of the step was journaled.
    Started,
    /// In the hypervisor's call, before any effect.
    Before,
    /// Between two of its effects.
    Half,
    /// After its last effect.
    After,
    /// After the driver's answer, before it was journaled.
    Done,
    /// Before a step was taken back.
    UndoBefore,
    /// After it was taken back.
    UndoAfter,
}

impl Place {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Nowhere,
        Self::AppendBefore,
        Self::AppendAfter,
        Self::Started,
        Self::Before,
        Self::Half,
        Self::After,
        Self::Done,
        Self::UndoBefore,
        Self::UndoAfter,
    ];

    /// The word in the table.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Nowhere => "no crash",
            Self::AppendBefore => "append<",
            Self::AppendAfter => "append>",
            Self::Started => "started",
            Self::Before => "effect<",
            Self::Half => "half",
            Self::After => "effect>",
            Self::Done => "done",
            Self::UndoBefore => "undo<",
            Self::UndoAfter => "undo>",
        }
    }

    /// The place that a hook stands for.
    pub fn of_hook(name: &str) -> Option<Self> {
        Some(match name {
            "append.before" | "log.before" => Self::AppendBefore,
            "append.after" | "log.after" => Self::AppendAfter,
            "sim.undo.before" => Self::UndoBefore,
            "sim.undo.after" => Self::UndoAfter,
            _ if name.starts_with("step.started.") => Self::Started,
            _ if name.starts_with("step.done.") => Self::Done,
            _ if name.starts_with("sim.") && name.ends_with(".before") => Self::Before,
            _ if name.starts_with("sim.") && name.ends_with(".half") => Self::Half,
            _ if name.starts_with("sim.") && name.ends_with(".after") => Self::After,
            _ => return None,
        })
    }
}

/// How many effects a step has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effects {
    One,
    Several,
}

/// Where a step can go once it was begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Either,
    Forward,
}

/// Whether an observation shows that a step is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trace {
    Shown,
    Hidden,
}

/// On which machines there is such a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Machines {
    /// Those whose snapshots are copies.
    Copies,
    /// Those whose disks are chains of layers.
    Layers,
    /// All.
    All,
}

/// A kind of step, with what decides which cells it has.
#[derive(Clone, Copy, Debug)]
struct Kind {
    /// The driver's word.
    word: &'static str,
    machines: Machines,
    effects: Effects,
    way: Way,
    trace: Trace,
}

const fn kind(word: &'static str, machines: Machines, effects: Effects) -> Kind {
    Kind { word, machines, effects, way: Way::Either, trace: Trace::Shown }
}

const KINDS: [Kind; 14] = [
    kind("create", Machines::Copies, Effects::One),
    kind("revert", Machines::Copies, Effects::One),
    kind("delete", Machines::Copies, Effects::One),
    kind("forget", Machines::Copies, Effects::One),
    kind("flatten", Machines::All, Effects::One),
    kind("adopt", Machines::Layers, Effects::One),
    kind("switch-create", Machines::Layers, Effects::Several),
    kind("switch-revert", Machines::Layers, Effects::Several),
    kind("switch-delete", Machines::Layers, Effects::One),
    kind("switch-merge", Machines::Layers, Effects::One),
    kind("switch-restack", Machines::Layers, Effects::Several),
    Kind { trace: Trace::Hidden, ..kind("pull", Machines::Layers, Effects::Several) },
    Kind { trace: Trace::Hidden, ..kind("push", Machines::Layers, Effects::Several) },
    Kind { trace: Trace::Hidden, way: Way::Forward, ..kind("drop", Machines::Layers, Effects::Several) },
];

/// The word for what is no step.
pub(super) const REQUEST: &str = "request";

/// One cell of the table: the step's kind, the fault that befell it last, and the place of the crash.
pub type Cell = (&'static str, Option<Fault>, Place);

fn found(word: &str) -> Option<&'static Kind> {
    KINDS.iter().find(|kind| kind.word == word)
}

/// The kind of step of that word.
pub(super) fn step_kind(word: &str) -> &'static str {
    found(word).map_or(REQUEST, |kind| kind.word)
}

/// On which machines there is a step of that kind.
pub(super) fn machines_of(word: &str) -> Machines {
    found(word).map_or(Machines::All, |kind| kind.machines)
}

/// Whether a step of that kind can be half done.
pub(super) fn can_be_half_done(word: &str) -> bool {
    found(word).is_some_and(|kind| kind.effects == Effects::Several)
}

impl Kind {
    /// Whether the step can be in hand at `place` with `fault` behind it. The reasons stand above.
    fn has(&self, fault: Option<Fault>, place: Place) -> bool {
        let several = self.effects == Effects::Several;
        if fault == Some(Fault::HalfDone) && !several {
            return false;
        }
        let refused = fault == Some(Fault::Permanent);
        let carried_out = match fault {
            Some(Fault::Permanent) => self.way == Way::Forward,
            Some(Fault::GoesOn) => self.trace == Trace::Hidden,
            _ => true,
        };
        match place {
            Place::Nowhere | Place::AppendBefore | Place::AppendAfter | Place::Before => true,
            Place::Started => matches!(fault, None | Some(Fault::Transient | Fault::Busy)),
            Place::Half => carried_out && several,
            Place::After => carried_out,
            Place::Done => carried_out || !refused,
            Place::UndoBefore | Place::UndoAfter => refused && self.way == Way::Either,
        }
    }
}

fn faults() -> impl Iterator<Item = Option<Fault>> {
    std::iter::once(None).chain(Fault::ALL.into_iter().map(Some))
}

/// Every cell that there is.
pub fn cells() -> Vec<Cell> {
    let mut cells = vec![(REQUEST, None, Place::AppendBefore), (REQUEST, None, Place::AppendAfter)];
    for kind in &KINDS {
        for fault in faults() {
            let places = Place::ALL.into_iter().filter(|place| kind.has(fault, *place));
            cells.extend(places.map(|place| (kind.word, fault, place)));
        }
    }
    cells
}

/// How often each cell was hit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage(BTreeMap<Cell, u64>);

impl Coverage {
    /// Counts a hit.
    pub fn hit(&mut self, cell: Cell) {
        *self.0.entry(cell).or_default() += 1;
    }

    /// Adds another run's hits.
    pub fn add(&mut self, other: &Self) {
        for (cell, count) in &other.0 {
            *self.0.entry(*cell).or_default() += count;
        }
    }

    /// The cells that were not hit.
    pub fn zeros(&self) -> Vec<Cell> {
        cells().into_iter().filter(|cell| !self.0.contains_key(cell)).collect()
    }

    /// The least number of hits that a cell has.
    pub fn least(&self) -> u64 {
        cells().iter().map(|cell| self.0.get(cell).copied().unwrap_or(0)).min().unwrap_or(0)
    }

    /// The table, for people.
    pub fn table(&self) -> String {
        let mut text = format!("{:<15} {:<11}", "step", "fault");
        for place in Place::ALL {
            let _ = write!(text, " {:>9}", place.as_str());
        }
        text.push('\n');
        let cells = cells();
        let mut rows: Vec<(&str, Option<Fault>)> =
            cells.iter().map(|(word, fault, _)| (*word, *fault)).collect();
        rows.dedup();
        for (word, fault) in rows {
            let _ = write!(text, "{word:<15} {:<11}", fault.map_or("none", Fault::as_str));
            for place in Place::ALL {
                let cell = (word, fault, place);
                let shown = match self.0.get(&cell) {
                    Some(count) => count.to_string(),
                    None if cells.contains(&cell) => "0".to_owned(),
                    None => "-".to_owned(),
                };
                let _ = write!(text, " {shown:>9}");
            }
            text.push('\n');
        }
        text
    }
}
