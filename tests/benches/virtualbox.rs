//! Whole processes on the real VirtualBox, beside bare VBoxManage that does the same to a machine of its own.
//!
//! `SNAPTREE_MERGE_MIB=N` merges another amount, `SNAPTREE_ROUNDS=N` measures that often.

#![allow(missing_docs, clippy::expect_used, reason = "a bench binary")]

use std::process::Command;

use snaptree_tests::measure::{Times, quiet, time};
use snaptree_tests::virtualbox::Vbox;

const ROUNDS_DEFAULT: usize = 21;
const MERGE_MIB_DEFAULT: usize = 64;
/// Snapshots that both machines have all the time.
const SNAPSHOTS: usize = 10;
/// What is measured: `name` for both, the program's arguments, and VBoxManage's.
const ROWS: [&str; 6] =
    ["create", "list", "revert", "delete, a leaf", "delete, merged up", "delete, merged down"];

fn number(variable: &str, default: usize) -> usize {
    std::env::var(variable).ok().map_or(default, |text| text.parse().expect("a number"))
}

struct Bench {
    vbox: Vbox,
    /// Bare and with Snaptree, row by row.
    times: [[Times; 2]; ROWS.len()],
}

impl Bench {
    /// Measures one command each, first bare and then ours.
    fn row(&mut self, row: usize, bare: &[&str], ours: &[&str]) {
        self.times[row][0].push(time(quietly(&mut self.vbox.command(bare))));
        let program = self.vbox.snaptree_release();
        self.times[row][1].push(time(quietly(&mut program.command(ours))));
    }

    fn write(&self, blocks: usize) {
        ["bare", "ours"].iter().for_each(|machine| self.vbox.write(machine, 0, 0..blocks, 7));
    }

    fn take(&self, name: &str) {
        self.vbox.must(&["snapshot", "bare", "take", name]);
        self.vbox.snaptree_release().json(0, &["create", "ours", name]);
    }

    /// A snapshot with so many blocks in it goes, and what stands upon it has so many.
    fn merge(&mut self, row: usize, below: usize, above: usize) {
        self.write(below);
        self.take("middle");
        self.write(above);
        self.take("upper");
        quiet();
        self.row(row, &["snapshot", "bare", "delete", "middle"], &["delete", "ours", "middle", "--now"]);
        self.vbox.must(&["snapshot", "bare", "delete", "upper"]);
        self.vbox.snaptree_release().json(0, &["delete", "ours", "upper", "--now"]);
    }

    fn round(&mut self, merged: usize) {
        self.row(0, &["snapshot", "bare", "take", "leaf"], &["create", "ours", "leaf"]);
        self.row(1, &["snapshot", "bare", "list"], &["list", "ours"]);
        self.row(2, &["snapshot", "bare", "restore", "s0"], &["revert", "ours", "s0"]);
        self.row(3, &["snapshot", "bare", "delete", "leaf"], &["delete", "ours", "leaf"]);
        self.merge(4, merged, merged + merged / 4);
        self.merge(5, merged + merged / 4, merged);
    }
}

fn quietly(command: &mut Command) -> &mut Command {
    command.stderr(std::process::Stdio::null())
}

fn main() {
    let vbox = Vbox::new();
    let merged = number("SNAPTREE_MERGE_MIB", MERGE_MIB_DEFAULT);
    ["bare", "ours"].iter().for_each(|machine| vbox.machine(machine, 1, 2 * merged));
    vbox.snaptree_release().json(0, &["domain", "add", "ours", "--driver", "virtualbox", "--vm", "ours"]);
    let mut bench = Bench { vbox, times: Default::default() };
    (0..SNAPSHOTS).for_each(|number| bench.take(&format!("s{number}")));
    let mut version = Times::default();
    for _ in 0..number("SNAPTREE_ROUNDS", ROUNDS_DEFAULT) {
        bench.round(merged);
        version.push(time(quietly(&mut bench.vbox.command(&["list", "vms"]))));
    }
    version.print("VBoxManage list vms", None);
    for (what, [bare, ours]) in ROWS.iter().zip(&bench.times) {
        bare.print(&format!("VBoxManage, {what}"), None);
        ours.print(&format!("snaptree {what}"), Some(bare));
    }
}
