//! What the simulation met: how often each kind of step, each fault and each place of a crash came together.

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

/// The kinds of steps, by the driver's words: whether a step has several effects, and whether it can be taken back.
const STEPS: [(&str, bool, bool); 15] = [
    ("create", false, true),
    ("revert", false, true),
    ("delete", false, true),
    ("forget", false, true),
    ("flatten", false, true),
    ("adopt", false, true),
    ("switch-create", true, true),
    ("switch-revert", true, true),
    ("switch-delete", false, true),
    ("switch-merge", false, true),
    ("switch-restack", true, true),
    ("pull", true, true),
    ("push", true, true),
    ("drop", true, false),
    ("request", false, false),
];

/// One cell of the table.
pub type Cell = (&'static str, Option<Fault>, Place);

/// How often each cell was hit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage(BTreeMap<Cell, u64>);

/// The kind of step of that word.
pub fn step_kind(word: &str) -> &'static str {
    STEPS.iter().find(|(known, ..)| *known == word).map_or("request", |(known, ..)| known)
}

/// Whether a cell can be hit at all.
fn possible(kind: (&'static str, bool, bool), fault: Option<Fault>, place: Place) -> bool {
    let (word, several, undoable) = kind;
    if word == "request" {
        return fault.is_none() && matches!(place, Place::AppendBefore | Place::AppendAfter);
    }
    // It is taken back then, or waits for someone.
    let ends = fault == Some(Fault::Permanent);
    // What went on behind is found done, unless nobody can see whether it is.
    let settled = fault == Some(Fault::GoesOn) && !matches!(word, "pull" | "push" | "drop");
    match place {
        Place::Half if !several => false,
        Place::UndoBefore | Place::UndoAfter => undoable && ends,
        // Only what was refused is journaled as started once more.
        Place::Started => matches!(fault, None | Some(Fault::Transient | Fault::Busy)),
        Place::Half | Place::After => !ends && !settled,
        Place::Done => !ends,
        Place::Nowhere | Place::AppendBefore | Place::AppendAfter | Place::Before => undoable || !ends,
    }
}

impl Coverage {
    /// Counts a hit.
    pub fn hit(&mut self, kind: &'static str, fault: Option<Fault>, place: Place) {
        *self.0.entry((kind, fault, place)).or_default() += 1;
    }

    /// Adds another run's hits.
    pub fn add(&mut self, other: &Self) {
        for (cell, count) in &other.0 {
            *self.0.entry(*cell).or_default() += count;
        }
    }

    /// The cells that can be hit and were not.
    pub fn zeros(&self) -> Vec<Cell> {
        cells().filter(|cell| !self.0.contains_key(cell)).collect()
    }

    /// The table, for people.
    pub fn table(&self) -> String {
        let mut text = format!("{:<15} {:<11}", "step", "fault");
        for place in Place::ALL {
            let _ = write!(text, " {:>9}", place.as_str());
        }
        text.push('\n');
        for kind in STEPS {
            for fault in faults() {
                if Place::ALL.iter().all(|place| !possible(kind, fault, *place)) {
                    continue;
                }
                let _ = write!(text, "{:<15} {:<11}", kind.0, fault.map_or("none", Fault::as_str));
                for place in Place::ALL {
                    let count = self.0.get(&(kind.0, fault, place));
                    let shown = match count {
                        Some(count) => count.to_string(),
                        None if possible(kind, fault, place) => "0".to_owned(),
                        None => "-".to_owned(),
                    };
                    let _ = write!(text, " {shown:>9}");
                }
                text.push('\n');
            }
        }
        text
    }
}

fn faults() -> impl Iterator<Item = Option<Fault>> {
    std::iter::once(None).chain(Fault::ALL.into_iter().map(Some))
}

fn cells() -> impl Iterator<Item = Cell> {
    STEPS.into_iter().flat_map(|kind| {
        faults().flat_map(move |fault| {
            let places = Place::ALL.into_iter().filter(move |place| possible(kind, fault, *place));
            places.map(move |place| (kind.0, fault, place))
        })
    })
}
