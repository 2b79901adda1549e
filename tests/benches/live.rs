//! A merge of 1 GiB under a running machine, beside bare block jobs of the same data on a QEMU of the same kind.
//!
//! `TMPDIR` says on which file system; `SNAPTREE_MERGE_MIB` and `SNAPTREE_ROUNDS` how much and how often.

#![allow(missing_docs, clippy::expect_used, reason = "a bench binary")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde_json::{Value, json};
use snaptree_tests::images::{text, tool};
use snaptree_tests::measure::{Times, quiet, time, until_idle};
use snaptree_tests::program::Program;
use snaptree_tests::running::wait_until;

const QEMU: [&str; 10] =
    ["-accel", "tcg", "-machine", "pc", "-m", "64", "-nodefaults", "-no-user-config", "-display", "none"];
const DISK: &str = "4G";

fn number(variable: &str, default: usize) -> usize {
    std::env::var(variable).ok().map_or(default, |text| text.parse().expect("a number"))
}

fn fill(image: &Path, from: &str, mib: usize) {
    let write = format!("write -P 7 {from} {mib}M");
    tool("qemu-io", &["-f", "qcow2", "-c", &write, text(image)]);
}

fn layer(file: &Path, on: Option<&Path>) {
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    on.iter().for_each(|on| args.extend(["-b", text(on), "-F", "qcow2"]));
    args.extend([text(file), DISK]);
    tool("qemu-img", &args);
}

/// A QEMU of the bench's own, with a QMP connection.
struct Bare {
    child: Child,
    answers: BufReader<UnixStream>,
}

impl Bare {
    fn start(folder: &Path, image: &Path) -> Self {
        let socket = folder.join("bare-qmp");
        std::fs::remove_file(&socket).ok();
        let drive = format!("driver=qcow2,node-name=vda,file.driver=file,file.filename={}", text(image));
        let child = Command::new("qemu-system-x86_64")
            .args(QEMU)
            .args(["-qmp", &format!("unix:{},server=on,wait=off", text(&socket)), "-blockdev", &drive])
            .args(["-device", "virtio-blk-pci,drive=vda"])
            .stdin(Stdio::null())
            .spawn()
            .expect("QEMU starts");
        wait_until("the monitor is there", || UnixStream::connect(&socket).is_ok());
        let answers = BufReader::new(UnixStream::connect(&socket).expect("the monitor"));
        let mut bare = Self { child, answers };
        bare.next();
        bare.ask("qmp_capabilities", json!({}));
        bare
    }

    fn next(&mut self) -> Value {
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("an answer");
        serde_json::from_str(&line).expect("JSON")
    }

    fn ask(&mut self, command: &str, arguments: Value) -> Value {
        let line = json!({ "execute": command, "arguments": arguments }).to_string() + "\n";
        self.answers.get_mut().write_all(line.as_bytes()).expect("the monitor");
        loop {
            let mut answer = self.next();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if let Some(answer) = answer.get_mut("return") {
                return answer.take();
            }
        }
    }

    /// The job alone, and with a flush after it: what the job wrote is on disk only then.
    fn job(&mut self, command: &str, arguments: Value) -> (Duration, Duration) {
        let start = Instant::now();
        self.ask(command, arguments);
        while self.next()["event"] != "BLOCK_JOB_COMPLETED" {}
        let job = start.elapsed();
        self.ask("human-monitor-command", json!({ "command-line": "qemu-io vda \"flush\"" }));
        (job, start.elapsed())
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Three layers with the data in the middle one, and a QEMU on the highest: the lower two, and QEMU.
fn bare_layers(folder: &Path, mib: usize) -> ([PathBuf; 2], Bare) {
    let [low, middle, high] = ["low", "middle", "high"].map(|name| folder.join(name));
    layer(&low, None);
    layer(&middle, Some(&low));
    fill(&middle, "0", mib);
    layer(&high, Some(&middle));
    let bare = Bare::start(folder, &high);
    until_idle(bare.child.id());
    quiet();
    ([low, middle], bare)
}

/// Bare block-stream of the middle of three layers.
fn bare_stream(folder: &Path, mib: usize) -> (Duration, Duration) {
    let ([low, _], mut bare) = bare_layers(folder, mib);
    bare.job("block-stream", json!({ "job-id": "pull", "device": "vda", "base": text(&low) }))
}

/// Bare block-commit of the middle of three layers.
fn bare_commit(folder: &Path, mib: usize) -> (Duration, Duration) {
    let ([low, middle], mut bare) = bare_layers(folder, mib);
    let arguments = json!({ "job-id": "push", "device": "vda", "top": text(&middle), "base": text(&low) });
    bare.job("block-commit", arguments)
}

/// A machine with 1 GiB between the snapshots `low` and `high`, running.
fn machine(folder: &Path, mib: usize) -> Program {
    let image: PathBuf = folder.join("vda.qcow2");
    layer(&image, None);
    let program = Program::release(folder.join("state"));
    let launch = format!(
        "qemu-system-x86_64 {} -qmp unix:{{qmp}},server=on,wait=off -pidfile {{pidfile}} -blockdev \
         driver={{vda.format}},node-name=vda,file.driver=file,file.filename={{vda}} -device \
         virtio-blk-pci,drive=vda {{incoming}}",
        QEMU.join(" ")
    );
    let disk = format!("vda={}", text(&image));
    program.json(0, &["domain", "add", "web", "--driver", "qemu", "--disk", &disk, "--launch", &launch]);
    program.json(0, &["create", "web", "low"]);
    fill(&image, "0", mib);
    program.json(0, &["create", "web", "high"]);
    program.json(0, &["domain", "start", "web"]);
    until_idle(pid_in(&folder.join("state/run")));
    program
}

/// The number in the only file there that a QEMU wrote its own to.
fn pid_in(folder: &Path) -> u32 {
    let files = std::fs::read_dir(folder).expect("the folder").flatten().map(|entry| entry.path());
    let mut pids = files.filter(|file| file.extension().is_some_and(|extension| extension == "pid"));
    let file = pids.next().expect("a running machine");
    std::fs::read_to_string(file).expect("it can be read").trim().parse().expect("a number")
}

/// A delete that merges under the machine: the whole process, its longest step, and what was planned.
fn snaptree(folder: &Path, mib: usize, deleted: &str) -> (Duration, Duration, Value) {
    let program = machine(folder, mib);
    let planned = program.json(0, &["delete", "web", deleted, "--dry-run"]);
    quiet();
    let since = Timestamp::now();
    let took = time(&mut program.command(&["delete", "web", deleted, "--now"]));
    program.json(0, &["domain", "stop", "web", "--force"]);
    (took, program.longest_step(since), planned)
}

fn compare(
    what: &str,
    deleted: &str,
    mib: usize,
    rounds: usize,
    bare: fn(&Path, usize) -> (Duration, Duration),
) {
    let [mut job, mut flushed, mut ours, mut step] = std::array::from_fn(|_| Times::default());
    let mut planned = Value::Null;
    for round in 0..rounds {
        // Whoever comes second finds another disk and other memory, so they take turns.
        for turn in [round, round + 1] {
            let folder = tempfile::tempdir().expect("a folder");
            if turn % 2 == 0 {
                let (alone, with_flush) = bare(folder.path(), mib);
                job.push(alone);
                flushed.push(with_flush);
            } else {
                let (took, longest, plan) = snaptree(folder.path(), mib, deleted);
                ours.push(took);
                step.push(longest);
                planned = plan;
            }
        }
    }
    job.print(&format!("bare {what}, {mib} MiB"), None);
    flushed.print(&format!("bare {what}, and a flush"), Some(&job));
    step.print(&format!("snaptree's step of {what}, which flushes, too"), Some(&flushed));
    ours.print("snaptree delete, the whole process", Some(&flushed));
    println!(
        "throughput of the step beside the bare job {:.2}, beside the one that is flushed {:.2}; planned: {}",
        job.median_ms() / step.median_ms(),
        flushed.median_ms() / step.median_ms(),
        planned["merges"]
    );
}

fn main() {
    let (mib, rounds) = (number("SNAPTREE_MERGE_MIB", 1024), number("SNAPTREE_ROUNDS", 3));
    // What stands upon `high` is what the machine writes, so its gigabyte is pulled up.
    compare("block-stream", "high", mib, rounds, bare_stream);
    // What `low` holds is the registered image, so the gigabyte above goes down into it.
    compare("block-commit", "low", mib, rounds, bare_commit);
}
