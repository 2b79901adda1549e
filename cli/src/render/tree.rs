//! The tree of snapshots, drawn.

use std::collections::BTreeMap;

use super::list::notes;
use super::table::{Cell, aligned};
use super::text::{Look, safe};
use super::view::{ListView, PhaseWord, SnapshotView};

/// A column is not padded beyond this: a deep tree would push everything else out of sight.
const COLUMNS_MAX: usize = 48;

/// One line of the drawing.
struct Line<'a> {
    rails: String,
    snapshot: &'a SnapshotView,
}

const CURRENT: &str = " ← current";

/// The tree under the domain's name.
pub fn tree(view: &ListView, look: &Look) -> String {
    let rows: Vec<Vec<Cell>> = lines(&view.snapshots).iter().map(|line| row(line, look)).collect();
    format!("{}\n{}", look.paint.bold(safe(&view.domain)), aligned(&rows, COLUMNS_MAX))
}

/// The snapshots in the order of the drawing: parents first, siblings by name.
fn lines(snapshots: &[SnapshotView]) -> Vec<Line<'_>> {
    let mut below: BTreeMap<Option<&str>, Vec<&SnapshotView>> = BTreeMap::new();
    for snapshot in snapshots {
        below.entry(snapshot.parent.as_deref()).or_default().push(snapshot);
    }
    let mut lines = Vec::with_capacity(snapshots.len());
    // Siblings that are still to be drawn, the next one last, with the rails that lead to them.
    let mut open: Vec<(String, &SnapshotView, bool)> = Vec::new();
    push(&mut open, "", below.get(&None));
    while let Some((rails, snapshot, last)) = open.pop() {
        let rails_below = format!("{rails}{}", if last { "    " } else { "│   " });
        lines.push(Line {
            rails: format!("{rails}{}", if last { "└── " } else { "├── " }), snapshot
        });
        // A tombstone's name may be a live snapshot's too, and nothing is drawn below a tombstone.
        if snapshot.phase != PhaseWord::Tombstone {
            push(&mut open, &rails_below, below.get(&Some(&*snapshot.name)));
        }
    }
    lines
}

fn push<'a>(
    open: &mut Vec<(String, &'a SnapshotView, bool)>,
    rails: &str,
    children: Option<&Vec<&'a SnapshotView>>,
) {
    let children = children.map_or(&[][..], Vec::as_slice);
    for (index, child) in children.iter().enumerate().rev() {
        open.push((rails.to_owned(), child, index + 1 == children.len()));
    }
}

fn row(line: &Line<'_>, look: &Look) -> Vec<Cell> {
    let paint = look.paint;
    let snapshot = line.snapshot;
    let name = safe(&snapshot.name);
    let shown = match (snapshot.current, snapshot.phase) {
        (true, _) => format!("{}{}", paint.bold(paint.name(&name)), paint.good(CURRENT)),
        (false, PhaseWord::Tombstone) => paint.dim(&name),
        (false, _) => paint.name(&name),
    };
    let mark = if snapshot.current { CURRENT } else { "" };
    let when = snapshot.created.or(snapshot.deleted).map(|at| look.age(at)).unwrap_or_default();
    let notes = notes(snapshot);
    vec![
        Cell::painted(&format!("{}{name}{mark}", line.rails), |_| {
            format!("{}{shown}", paint.dim(&line.rails))
        }),
        Cell::painted(&when, |text| paint.dim(text)),
        Cell::plain(snapshot.state.unwrap_or("deleted")),
        Cell::painted(&notes, |text| if snapshot.held { paint.warn(text) } else { paint.dim(text) }),
    ]
}
