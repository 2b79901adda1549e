//! Whole processes on an offline machine, beside the bare `qemu-img` commands that do the same.

#![allow(missing_docs, clippy::expect_used, reason = "a bench binary")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use jiff::Timestamp;
use serde_json::Value;
use snaptree_tests::images::{text, tool};
use snaptree_tests::measure::{Times, quiet, time};
use snaptree_tests::program::Program;

const ROUNDS: usize = 30;
const MERGES: usize = 7;
const DISK: &str = "4G";
/// `SNAPTREE_MERGE_MIB` is another.
const MERGE_MIB_DEFAULT: usize = 64;

fn qemu_img(args: &[&str]) -> Command {
    let mut command = Command::new("qemu-img");
    command.args(args);
    command
}

fn machine(folder: &Path) -> Program {
    let image = folder.join("vda.qcow2");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", text(&image), DISK]);
    let program = Program::release(folder.join("state"));
    let disk = format!("vda={}", text(&image));
    program.json(0, &["domain", "add", "web", "--driver", "qemu", "--disk", &disk]);
    program.json(0, &["create", "web", "first"]);
    program
}

/// create, and delete of a leaf.
fn small(folder: &Path) {
    let program = machine(folder);
    let base = folder.join("bare.qcow2");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", text(&base), DISK]);
    let [mut bare, mut create, mut bare_delete, mut delete, mut nothing] =
        std::array::from_fn(|_| Times::default());
    for round in 0..ROUNDS {
        let overlay = folder.join(format!("bare-{round}.qcow2"));
        bare.push(time(&mut qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            text(&base),
            "-F",
            "qcow2",
            text(&overlay),
        ])));
        create.push(time(&mut program.command(&["create", "web", "leaf"])));
        bare_delete.push(time(Command::new("rm").arg(&overlay)));
        // The machine moves off the leaf, so that nothing is built upon it.
        time(&mut program.command(&["revert", "web", "first"]));
        delete.push(time(&mut program.command(&["delete", "web", "leaf"])));
        nothing.push(time(&mut program.command(&["--version"])));
    }
    nothing.print("snaptree --version", None);
    bare.print("qemu-img create -b", None);
    create.print("snaptree create", Some(&bare));
    bare_delete.print("rm", None);
    delete.print("snaptree delete, a leaf", Some(&bare_delete));
}

/// Writes so many MiB from that GiB on.
fn fill(image: &Path, from: &str, mib: usize) {
    let write = format!("write -P 7 {from} {mib}M");
    tool("qemu-io", &["-f", "qcow2", "-c", &write, text(image)]);
}

/// A delete that has to merge: `lower` MiB are in the layer that goes, `upper` in what stands upon it.
struct Merge {
    lower_mib: usize,
    upper_mib: usize,
    /// What is run on the bare layers `low`, `middle` and `high` for the same end.
    bare: fn(&[PathBuf; 3]) -> Command,
    /// Of those three, the one that took the data, and the one that is not needed any more.
    taker: usize,
    gone: usize,
}

impl Merge {
    /// The command alone; and with what else leaves the same behind: the data on the disk, and the file gone.
    fn bare(&self, folder: &Path) -> (Duration, Duration) {
        let files = ["low", "middle", "high"].map(|name| folder.join(name));
        let [low, middle, high] = &files;
        for (file, backing) in [(low, None), (middle, Some(low)), (high, Some(middle))] {
            let mut args = vec!["create", "-q", "-f", "qcow2"];
            backing.iter().for_each(|backing| args.extend(["-b", text(backing), "-F", "qcow2"]));
            args.extend([text(file), DISK]);
            tool("qemu-img", &args);
        }
        fill(middle, "0", self.lower_mib);
        fill(high, "2G", self.upper_mib);
        quiet();
        let alone = time(&mut (self.bare)(&files));
        let synced = time(Command::new("sync").arg(&files[self.taker]));
        let removed = time(Command::new("rm").arg(&files[self.gone]));
        for file in files.iter().filter(|file| **file != files[self.gone]) {
            std::fs::remove_file(file).expect("it is there");
        }
        (alone, alone + synced + removed)
    }

    fn print(&self, what: &str, rounds: usize) {
        let folder = tempfile::tempdir().expect("a folder");
        let program = machine(folder.path());
        let path = folder.path().join("vda.qcow2");
        let [mut bare, mut whole, mut step, mut delete] = std::array::from_fn(|_| Times::default());
        let mut merges = Value::Null;
        for _ in 0..rounds {
            let (alone, with_all) = self.bare(folder.path());
            bare.push(alone);
            whole.push(with_all);
            fill(&path, "0", self.lower_mib);
            program.json(0, &["create", "web", "middle"]);
            fill(&path, "2G", self.upper_mib);
            merges = program.json(0, &["delete", "web", "middle", "--dry-run"])["merges"].take();
            quiet();
            let since = Timestamp::now();
            delete.push(time(&mut program.command(&["delete", "web", "middle", "--now"])));
            step.push(program.longest_step(since));
            program.json(0, &["revert", "web", "first"]);
            program.json(0, &["reconcile", "web"]);
        }
        bare.print(&format!("qemu-img {what}"), None);
        whole.print(&format!("qemu-img {what}, then sync and rm"), Some(&bare));
        step.print(&format!("the step that moves the data, by {what}"), Some(&bare));
        delete.print(&format!("snaptree delete, by {what}"), Some(&bare));
        println!(
            "throughput beside bare qemu-img {:.2}, of the whole process {:.2}, of that beside qemu-img, sync and rm {:.2}; \
             planned: {merges}",
            bare.median_ms() / step.median_ms(),
            bare.median_ms() / delete.median_ms(),
            whole.median_ms() / delete.median_ms()
        );
    }
}

fn rebase([low, _, high]: &[PathBuf; 3]) -> Command {
    qemu_img(&["rebase", "-q", "-f", "qcow2", "-b", text(low), "-F", "qcow2", text(high)])
}

fn commit([_, _, high]: &[PathBuf; 3]) -> Command {
    qemu_img(&["commit", "-q", "-d", "-f", "qcow2", text(high)])
}

fn main() {
    let folder = tempfile::tempdir().expect("a folder");
    small(folder.path());
    let wanted = std::env::var("SNAPTREE_MERGE_MIB").ok();
    let mib = wanted.map_or(MERGE_MIB_DEFAULT, |wanted| wanted.parse().expect("a number"));
    // Whichever direction moves fewer bytes is taken.
    let more = mib + mib / 4;
    Merge { lower_mib: mib, upper_mib: more, bare: rebase, taker: 2, gone: 1 }
        .print(&format!("rebase, {mib} MiB"), MERGES);
    Merge { lower_mib: more, upper_mib: mib, bare: commit, taker: 1, gone: 2 }
        .print(&format!("commit, {mib} MiB"), MERGES);
}
