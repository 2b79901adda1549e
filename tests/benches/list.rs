//! `snaptree list` as a whole process: in an empty log, in one of a million events, and of many snapshots.
//!
//! `SNAPTREE_BENCH_EVENTS=N` makes the large log of another size.

#![allow(missing_docs, clippy::expect_used, reason = "a bench binary")]

use std::path::Path;
use std::time::{Duration, Instant};

use snaptree_store::{LockWait, Store};
use snaptree_tests::history::{EVENTS_OF_AN_OPERATION, append, history};
use snaptree_tests::measure::{Times, time};
use snaptree_tests::program::Program;

const ROUNDS: usize = 40;
const DOMAINS: usize = 1_000;

fn number(variable: &str, default: usize) -> usize {
    std::env::var(variable).ok().map_or(default, |text| text.parse().expect("a number"))
}

fn open(folder: &Path) -> Store {
    Store::open_writer(folder, LockWait { timeout: Duration::ZERO }).expect("a new state")
}

async fn fill(folder: &Path, events: usize) {
    let store = open(folder);
    let per_domain = events / DOMAINS;
    let operations = per_domain / EVENTS_OF_AN_OPERATION;
    let start = Instant::now();
    append(&store, history("target", 100, 0)).await;
    for domain in 1..DOMAINS {
        let snapshots = operations.min(100);
        append(&store, history(&format!("domain-{domain}"), snapshots, operations - snapshots)).await;
    }
    println!(
        "a log of {events} events over {DOMAINS} domains: written in {:.1} s",
        start.elapsed().as_secs_f64()
    );
}

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let folders = [(); 3].map(|()| tempfile::tempdir().expect("a folder"));
    let [empty, large, many] = folders.each_ref().map(tempfile::TempDir::path);
    runtime.block_on(async {
        append(&open(empty), history("target", 100, 0)).await;
        fill(large, number("SNAPTREE_BENCH_EVENTS", 1_000_000)).await;
        append(&open(many), history("target", 10_000, 0)).await;
    });
    let size = std::fs::metadata(large.join("snaptree.db")).expect("the database").len();
    println!("its database: {} MiB", size >> 20);

    let programs = [empty, large, many].map(Program::release);
    let mut times: [Times; 4] = std::array::from_fn(|_| Times::default());
    for _ in 0..ROUNDS {
        for (program, times) in programs.iter().zip(&mut times) {
            times.push(time(&mut program.command(&["list", "target"])));
        }
        times[3].push(time(&mut programs[0].command(&["--version"])));
    }
    times[3].print("snaptree --version", None);
    times[0].print("list, 100 snapshots, in an otherwise empty log", None);
    times[1].print("list, 100 snapshots, in the large log", Some(&times[0]));
    times[2].print("list, 10,000 snapshots", Some(&times[0]));
}
