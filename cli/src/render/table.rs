//! Columns that line up.

use std::borrow::Cow;
use std::fmt::Write as _;

use super::text::{Look, width};

/// One cell: its text, and the same with colours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cell {
    columns: usize,
    shown: String,
}

impl Cell {
    /// A cell without colours.
    pub fn plain(text: impl Into<String>) -> Self {
        let shown = text.into();
        Self { columns: width(&shown), shown }
    }

    /// A cell whose text is painted.
    pub fn painted(text: &str, paint: impl FnOnce(&str) -> String) -> Self {
        Self { columns: width(text), shown: paint(text) }
    }
}

/// The narrowest that a column is made to fit the terminal.
const SHRUNK_MIN: usize = 8;
/// The space between two columns.
const GAP: usize = 2;
/// What stands for the rest of a text that does not fit.
const CUT: &str = "…";

/// Rows of cells under their heads. Columns that are empty everywhere vanish with their heads; on a terminal the last
/// ones are cut until a row fits into a line.
pub fn table(heads: &[&str], rows: &[Vec<Cell>], look: &Look) -> String {
    let mut widths: Vec<usize> = heads
        .iter()
        .zip(widest(rows, heads.len()))
        .map(|(head, columns)| if columns == 0 { 0 } else { columns.max(width(head)) })
        .collect();
    fit(&mut widths, look.columns);
    let head: Vec<Cell> = heads.iter().map(|head| Cell::painted(head, |text| look.paint.dim(text))).collect();
    std::iter::once(&head).chain(rows).map(|row| line(row, &widths, Wide::Cut, look.columns)).collect()
}

/// Rows without heads. A column is at most `columns_max` wide; what is wider pushes the rest of its row to the right.
pub fn aligned(rows: &[Vec<Cell>], columns_max: usize, look: &Look) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> =
        widest(rows, count).into_iter().map(|columns| columns.min(columns_max)).collect();
    rows.iter().map(|row| line(row, &widths, Wide::Push, look.columns)).collect()
}

/// What becomes of a cell that is wider than its column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wide {
    /// Its end is cut off.
    Cut,
    /// It pushes the rest of the row to the right.
    Push,
}

/// Takes from the columns until a row fits, from the last one on: what matters most stands first, and the name, in the
/// first column that is no mark, is cut when nothing else is left to cut.
fn fit(widths: &mut [usize], columns: Option<usize>) {
    let Some(columns) = columns else { return };
    let shown = widths.iter().filter(|columns| **columns > 0);
    let taken = shown.map(|columns| columns + GAP).sum::<usize>().saturating_sub(GAP);
    let mut over = taken.saturating_sub(columns);
    let name = widths.iter().position(|columns| *columns > SHRUNK_MIN);
    let others = (0..widths.len()).rev().filter(|column| Some(*column) != name);
    for column in others.chain(name).collect::<Vec<_>>() {
        let Some(columns) = widths.get_mut(column) else { continue };
        let cut = over.min(columns.saturating_sub(SHRUNK_MIN));
        *columns -= cut;
        over -= cut;
    }
}

fn widest(rows: &[Vec<Cell>], count: usize) -> Vec<usize> {
    let column = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.columns).max();
    (0..count).map(|index| column(index).unwrap_or(0)).collect()
}

fn line(row: &[Cell], widths: &[usize], wide: Wide, columns: Option<usize>) -> String {
    let mut out = String::new();
    let mut pending = 0;
    for (cell, columns) in row.iter().zip(widths).filter(|(_, columns)| **columns > 0) {
        let cut = wide == Wide::Cut && cell.columns > *columns;
        if cell.columns > 0 {
            let shown = if cut {
                console::truncate_str(&cell.shown, *columns, CUT)
            } else {
                Cow::Borrowed(&*cell.shown)
            };
            // Writing to a String does not fail.
            let _ = write!(out, "{:pending$}{shown}", "");
            pending = 0;
        }
        pending += columns.saturating_sub(cell.columns) + GAP;
    }
    if let Some(columns) = columns {
        out = console::truncate_str(&out, columns, CUT).into_owned();
    }
    out.push('\n');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_empty_ones_vanish() {
        let row = |cells: [&str; 3]| cells.iter().map(|cell| Cell::plain(*cell)).collect::<Vec<_>>();
        let rows = [row(["ä", "", "x"]), row(["longer", "", ""])];
        assert_eq!(table(&["A", "B", "C"], &rows, &Look::plain()), "A       C\nä       x\nlonger\n");
    }

    #[test]
    fn on_a_terminal_columns_are_cut_from_the_last_one_on_so_that_no_line_wraps() {
        let row = |cells: [&str; 3]| cells.iter().map(|cell| Cell::plain(*cell)).collect::<Vec<_>>();
        let rows = [row(["a longer name", "a description that goes on and on", "end"])];
        let narrow = Look { columns: Some(30), ..Look::plain() };
        assert_eq!(
            table(&["A", "B", "C"], &rows, &narrow),
            "A              B           C\na longer name  a descrip…  end\n"
        );
        let pushed = aligned(&rows, 10, &Look { columns: Some(24), ..Look::plain() });
        assert_eq!(pushed, "a longer name  a descri…\n");
    }
}
