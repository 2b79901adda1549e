//! The tree of snapshots, drawn.

use std::collections::BTreeMap;

use super::list::notes;
use super::text::{Look, safe, width};
use super::view::{ListView, PhaseWord, SnapshotView};

/// Names are padded to one column, up to this one.
const NAMES_COLUMNS_MAX: usize = 64;

/// One line of the drawing.
struct Line<'a> {
    rails: String,
    snapshot: &'a SnapshotView,
}

impl Line<'_> {
    fn columns(&self) -> usize {
        let mark = if self.snapshot.current { width(CURRENT) } else { 0 };
        width(&self.rails) + width(&safe(&self.snapshot.name)) + mark
    }
}

const CURRENT: &str = " ← current";

/// The tree under the domain's name.
pub fn tree(view: &ListView, look: &Look) -> String {
    let mut out = format!("{}\n", look.paint.bold(safe(&view.domain)));
    let lines = lines(&view.snapshots);
    let column = lines.iter().map(Line::columns).max().unwrap_or(0).min(NAMES_COLUMNS_MAX);
    for line in &lines {
        out.push_str(&drawn(line, column, look));
        out.push('\n');
    }
    out
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

fn drawn(line: &Line<'_>, column: usize, look: &Look) -> String {
    let paint = look.paint;
    let snapshot = line.snapshot;
    let name = safe(&snapshot.name);
    let name = match (snapshot.current, snapshot.phase) {
        (true, _) => format!("{}{}", paint.bold(paint.name(&name)), paint.good(CURRENT)),
        (false, PhaseWord::Tombstone) => paint.dim(&name),
        (false, _) => paint.name(&name),
    };
    let when = match (snapshot.created, snapshot.deleted) {
        (Some(created), _) => look.age(created),
        (None, Some(deleted)) => format!("deleted {}", look.age(deleted)),
        (None, None) => String::new(),
    };
    let state = snapshot.state.unwrap_or_default();
    let notes = notes(snapshot);
    let notes = if snapshot.held { paint.warn(notes) } else { paint.dim(notes) };
    let padding = column.saturating_sub(line.columns());
    let text = format!(
        "{}{name}{:padding$}  {}  {state:<9}  {notes}",
        paint.dim(&line.rails),
        "",
        paint.dim(format!("{when:>10}")),
    );
    text.trim_end().to_owned()
}
