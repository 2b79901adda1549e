//! Whole processes on an offline machine, beside the bare `qemu-img` commands that do the same.

#![allow(missing_docs, clippy::expect_used, reason = "a bench binary")]

use std::path::Path;
use std::process::Command;

use snaptree_tests::images::{text, tool};
use snaptree_tests::measure::{Times, time};
use snaptree_tests::program::Program;

const ROUNDS: usize = 30;
const MERGES: usize = 7;
const MERGE_MIB: usize = 64;

fn qemu_img(args: &[&str]) -> Command {
    let mut command = Command::new("qemu-img");
    command.args(args);
    command
}

fn machine(folder: &Path) -> Program {
    let image = folder.join("vda.qcow2");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", text(&image), "1G"]);
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
    tool("qemu-img", &["create", "-q", "-f", "qcow2", text(&base), "1G"]);
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

/// A delete that has to merge, and `qemu-img commit` or `rebase` of the same data.
fn merge(folder: &Path) {
    let program = machine(folder);
    let path = folder.join("vda.qcow2");
    let fill = format!("write -P 7 0 {MERGE_MIB}M");
    let [mut bare_commit, mut bare_rebase, mut delete] = std::array::from_fn(|_| Times::default());
    for round in 0..MERGES {
        tool("qemu-io", &["-f", "qcow2", "-c", &fill, text(&path)]);
        program.json(0, &["create", "web", "middle"]);
        tool("qemu-io", &["-f", "qcow2", "-c", "write -P 8 512M 80M", text(&path)]);
        delete.push(time(&mut program.command(&["delete", "web", "middle", "--now"])));

        let [low, middle, high] =
            ["low", "middle", "high"].map(|name| folder.join(format!("{name}-{round}")));
        for (file, backing) in [(&low, None), (&middle, Some(&low)), (&high, Some(&middle))] {
            let mut args = vec!["create", "-q", "-f", "qcow2"];
            backing.iter().for_each(|backing| args.extend(["-b", text(backing), "-F", "qcow2"]));
            args.extend([text(file), "1G"]);
            tool("qemu-img", &args);
        }
        tool("qemu-io", &["-f", "qcow2", "-c", &fill, text(&middle)]);
        tool("qemu-io", &["-f", "qcow2", "-c", "write -P 8 512M 80M", text(&high)]);
        bare_commit.push(time(&mut qemu_img(&["commit", "-q", "-d", "-f", "qcow2", text(&middle)])));
        bare_rebase.push(time(&mut qemu_img(&[
            "rebase",
            "-q",
            "-f",
            "qcow2",
            "-b",
            text(&low),
            "-F",
            "qcow2",
            text(&high),
        ])));
        [low, middle, high].iter().for_each(|file| std::fs::remove_file(file).expect("it is there"));
    }
    bare_rebase.print(&format!("qemu-img rebase, {MERGE_MIB} MiB"), None);
    bare_commit.print(&format!("qemu-img commit, {MERGE_MIB} MiB"), None);
    delete.print(&format!("snaptree delete, merging {MERGE_MIB} MiB"), Some(&bare_rebase));
}

fn main() {
    let [one, two] = [(); 2].map(|()| tempfile::tempdir().expect("a folder"));
    small(one.path());
    merge(two.path());
}
