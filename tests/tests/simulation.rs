//! The simulation, as far as every test run has time for it: `SNAPTREE_SEEDS` seeds (20), and those that once
//! showed a violation.

#![allow(clippy::expect_used, reason = "these are tests")]

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use snaptree_tests::simulation::{CRASHES_MIN, OPERATIONS_MIN, Run, run};

/// Runs a seed where fsync costs nothing, if there is such a place.
fn seed(seed: u64) -> Run {
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder");
    match run(seed, folder.path()) {
        Ok(run) => run,
        Err(broken) => panic!(
            "seed {seed} violates: {}\n{}\n{}\nrepeat it: cargo run --release -p snaptree-tests --bin simulate -- \
             --seeds 1 --from {seed} --verbose",
            broken.violation.invariant,
            broken.violation.what,
            broken.story.join("\n"),
        ),
    }
}

fn all(seeds: &[u64]) {
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(number) = seeds.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let run = seed(*number);
                    assert!(run.operations >= OPERATIONS_MIN, "seed {number}: {} operations", run.operations);
                    assert!(run.crashes >= CRASHES_MIN, "seed {number}: {} crashes", run.crashes);
                }
            });
        }
    });
}

/// The seeds that once showed a violation.
fn regressions() -> Vec<u64> {
    let text = include_str!("../regressions/seeds.txt");
    let seeds = text.lines().filter_map(|line| line.split('#').next()?.trim().parse().ok());
    seeds.collect()
}

#[test]
fn what_was_broken_once_holds() {
    all(&regressions());
}

#[test]
fn many_seeds_hold() {
    let count = std::env::var("SNAPTREE_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(20);
    all(&(0..count).collect::<Vec<u64>>());
}

#[test]
fn the_same_seed_is_the_same_run() {
    let digests = Mutex::new(Vec::new());
    for number in [3, 3, 4] {
        let run = seed(number);
        digests.lock().expect("one thread").push((run.digest(), run.events, run.operations, run.crashes));
    }
    let digests = digests.into_inner().expect("one thread");
    assert_eq!(digests[0], digests[1]);
    assert_ne!(digests[0], digests[2]);
}
