//! Columns that line up.

use std::fmt::Write as _;

use super::text::{Paint, width};

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

/// Rows of cells; the last column is not padded, and columns that are empty everywhere vanish with their heads.
pub fn table(heads: &[&str], rows: &[Vec<Cell>], paint: Paint) -> String {
    let widths: Vec<usize> = heads
        .iter()
        .zip(widest(rows, heads.len()))
        .map(|(head, columns)| if columns == 0 { 0 } else { columns.max(width(head)) })
        .collect();
    let head: Vec<Cell> = heads.iter().map(|head| Cell::painted(head, |text| paint.dim(text))).collect();
    std::iter::once(&head).chain(rows).map(|row| line(row, &widths)).collect()
}

/// Rows without heads. A column is at most `columns_max` wide; what is wider pushes the rest of its row to the right.
pub fn aligned(rows: &[Vec<Cell>], columns_max: usize) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> =
        widest(rows, count).into_iter().map(|columns| columns.min(columns_max)).collect();
    rows.iter().map(|row| line(row, &widths)).collect()
}

fn widest(rows: &[Vec<Cell>], count: usize) -> Vec<usize> {
    let column = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.columns).max();
    (0..count).map(|index| column(index).unwrap_or(0)).collect()
}

fn line(row: &[Cell], widths: &[usize]) -> String {
    let mut out = String::new();
    let mut pending = 0;
    for (cell, columns) in row.iter().zip(widths).filter(|(_, columns)| **columns > 0) {
        if cell.columns > 0 {
            // Writing to a String does not fail.
            let _ = write!(out, "{:pending$}{}", "", cell.shown);
            pending = 0;
        }
        pending += columns.saturating_sub(cell.columns) + 2;
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
        assert_eq!(table(&["A", "B", "C"], &rows, Paint::PLAIN), "A       C\nä       x\nlonger\n");
    }
}
