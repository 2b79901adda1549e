//! The tree of snapshots, drawn.
//!
//! A chain is drawn flat: whoever stands below another one in the same column, with nothing between them but branches, is
//! its child. At a branch the side branches are indented, and the main line goes on in its column: the line to the current
//! snapshot, or else the longest.
//!
//! ```text
//! ○ base
//! ├─○ after-install
//! │ ○ upgrade
//! ● other-idea ← current
//! ```

use std::collections::HashMap;

use super::list::notes;
use super::table::{Cell, aligned};
use super::text::{Look, count, safe};
use super::view::{ListView, PhaseWord, SnapshotView};

/// A column is not padded beyond this: a deep tree would push everything else out of sight.
const COLUMNS_MAX: usize = 48;

/// How many snapshots of a folded run stay at each of its ends.
const FOLD_ENDS: usize = 2;
/// The fewest that are folded into one line.
const FOLD_MIN: usize = 5;

const CURRENT: &str = " ← current";

/// What becomes of a long run of snapshots of which there is nothing to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runs {
    /// All but its ends become one line.
    Folded,
    /// It is drawn.
    Drawn,
}

/// The tree under the domain's name.
pub fn tree(view: &ListView, runs: Runs, look: &Look) -> String {
    let lines = lines(&view.snapshots);
    let rows: Vec<Vec<Cell>> = match runs {
        Runs::Drawn => lines.iter().map(|line| row(line, look)).collect(),
        Runs::Folded => folded(&lines, look),
    };
    format!("{}\n{}", look.paint.bold(safe(&view.domain)), aligned(&rows, COLUMNS_MAX, look))
}

/// One line of the drawing.
struct Line<'a> {
    /// What stands before its column.
    rails: String,
    /// Whether it is its parent's only child, and so stands right below it.
    in_run: bool,
    snapshot: &'a SnapshotView,
}

/// The children of each snapshot, and of none, in the order in which they were taken. Nothing stands below a tombstone,
/// whose name may be a live snapshot's too.
struct Below<'a> {
    roots: Vec<&'a SnapshotView>,
    children: HashMap<&'a str, Vec<&'a SnapshotView>>,
    /// Per live snapshot: whether the current one is at or below it, and how many lie on the longest way down from it.
    weight: HashMap<&'a str, (bool, usize)>,
}

impl<'a> Below<'a> {
    fn of(snapshots: &'a [SnapshotView]) -> Self {
        let mut below = Self { roots: Vec::new(), children: HashMap::new(), weight: HashMap::new() };
        for snapshot in snapshots {
            match &snapshot.parent {
                Some(parent) => below.children.entry(parent).or_default().push(snapshot),
                None => below.roots.push(snapshot),
            }
        }
        for siblings in below.children.values_mut().chain([&mut below.roots]) {
            siblings.sort_by_key(|one| (one.created.or(one.deleted), &one.name));
        }
        let mut down = below.roots.clone();
        let mut next = 0;
        while let Some(snapshot) = down.get(next).copied() {
            down.extend(below.under(snapshot));
            next += 1;
        }
        for snapshot in down.into_iter().rev().filter(|one| one.phase != PhaseWord::Tombstone) {
            let weights: Vec<_> = below.under(snapshot).iter().map(|child| below.weight(child)).collect();
            let current = snapshot.current || weights.iter().any(|(current, _)| *current);
            let height = weights.iter().map(|(_, height)| height + 1).max().unwrap_or(0);
            below.weight.insert(&snapshot.name, (current, height));
        }
        below
    }

    fn under(&self, snapshot: &SnapshotView) -> &[&'a SnapshotView] {
        match snapshot.phase {
            PhaseWord::Tombstone => &[],
            _ => self.children.get(&*snapshot.name).map_or(&[], Vec::as_slice),
        }
    }

    fn weight(&self, snapshot: &SnapshotView) -> (bool, usize) {
        match snapshot.phase {
            PhaseWord::Tombstone => (false, 0),
            _ => self.weight.get(&*snapshot.name).copied().unwrap_or_default(),
        }
    }
}

/// The snapshots in the order of the drawing: parents first, side branches before the main line.
fn lines(snapshots: &[SnapshotView]) -> Vec<Line<'_>> {
    let below = Below::of(snapshots);
    let mut lines = Vec::with_capacity(snapshots.len());
    // What is still to be drawn, the next one last: what stands before its line, and before its children's.
    let mut open: Vec<(String, String, bool, &SnapshotView)> = Vec::new();
    push(&mut open, &below, "", None);
    while let Some((rails, column, in_run, snapshot)) = open.pop() {
        push(&mut open, &below, &column, Some(snapshot));
        lines.push(Line { rails, in_run, snapshot });
    }
    lines
}

fn push<'a>(
    open: &mut Vec<(String, String, bool, &'a SnapshotView)>,
    below: &Below<'a>,
    column: &str,
    parent: Option<&SnapshotView>,
) {
    let children = parent.map_or(&*below.roots, |parent| below.under(parent));
    let main = children.iter().max_by_key(|child| below.weight(child)).map(|main| main.id);
    let alone = parent.is_some() && children.len() == 1;
    for child in children.iter().rev().filter(|child| Some(child.id) == main) {
        open.push((column.to_owned(), column.to_owned(), alone, child));
    }
    for child in children.iter().rev().filter(|child| Some(child.id) != main) {
        open.push((format!("{column}├─"), format!("{column}│ "), false, child));
    }
}

/// The rows with long runs folded: what is said of a snapshot, and where the tree branches, is never in a fold.
fn folded(lines: &[Line<'_>], look: &Look) -> Vec<Vec<Cell>> {
    let mut rows = Vec::new();
    let mut at = 0;
    while let Some(line) = lines.get(at) {
        let plain = |line: &&Line<'_>| line.in_run && is_plain(line.snapshot);
        // A line whose successor is not its only child is a branch, or an end.
        let run = lines[at..].iter().take_while(plain).count();
        let goes_on = lines.get(at + run).is_some_and(|next| next.in_run);
        let run = if goes_on { run } else { run.saturating_sub(1) };
        let hidden = run.saturating_sub(2 * FOLD_ENDS);
        if hidden < FOLD_MIN {
            rows.extend(lines[at..at + run.max(1)].iter().map(|line| row(line, look)));
            at += run.max(1);
            continue;
        }
        let end = at + run;
        rows.extend(lines[at..at + FOLD_ENDS].iter().map(|line| row(line, look)));
        rows.push(fold(&line.rails, &lines[at + FOLD_ENDS..end - FOLD_ENDS], look));
        rows.extend(lines[end - FOLD_ENDS..end].iter().map(|line| row(line, look)));
        at = end;
    }
    rows
}

/// Whether nothing is to be said of a snapshot but its name and age.
fn is_plain(snapshot: &SnapshotView) -> bool {
    !snapshot.current && !snapshot.held && snapshot.phase == PhaseWord::Ready
}

fn fold(rails: &str, hidden: &[Line<'_>], look: &Look) -> Vec<Cell> {
    let what = format!("{rails}┆ {} more", count(hidden.len(), "snapshot"));
    vec![Cell::painted(&what, |text| look.paint.dim(text))]
}

fn row(line: &Line<'_>, look: &Look) -> Vec<Cell> {
    let paint = look.paint;
    let snapshot = line.snapshot;
    let name = safe(&snapshot.name);
    let (mark, shown) = match (snapshot.current, snapshot.phase) {
        (true, _) => ("●", format!("{}{}", paint.bold(paint.name(&name)), paint.good(CURRENT))),
        (false, PhaseWord::Tombstone) => ("◌", paint.dim(&name)),
        (false, _) => ("○", paint.name(&name)),
    };
    let current = if snapshot.current { CURRENT } else { "" };
    let when = snapshot.created.or(snapshot.deleted).map(|at| look.age(at)).unwrap_or_default();
    let notes = notes(snapshot);
    vec![
        Cell::painted(&format!("{}{mark} {name}{current}", line.rails), |_| {
            format!("{} {shown}", paint.dim(format!("{}{mark}", line.rails)))
        }),
        Cell::painted(&when, |text| paint.dim(text)),
        Cell::plain(snapshot.state.unwrap_or("deleted")),
        Cell::painted(&notes, |text| if snapshot.held { paint.warn(text) } else { paint.dim(text) }),
    ]
}
