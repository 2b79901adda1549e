//! Runs seeds of the simulation, and says what they met.
//!
//! `cargo run --release -p snaptree-tests --bin simulate -- --seeds N --from S [--jobs J] [--seconds T] [--verbose]`
//!
//! Seeds run in `J` threads (one a core). With `--seconds` no seed is begun after that time. What is printed does not
//! depend on the threads. It fails if a seed violates an invariant, and if after `SEEDS_FOR_COVERAGE` seeds or more a
//! cell of the table was never hit.

#![allow(clippy::expect_used, reason = "a test program ends with what went wrong")]

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use snaptree_drivers::sim::Fault;
use snaptree_tests::simulation::coverage::{Coverage, cells};
use snaptree_tests::simulation::{Broken, run};

/// So many seeds have to hit every cell of the table.
const SEEDS_FOR_COVERAGE: u64 = 2_000;

/// What was asked for.
struct Asked {
    seeds: u64,
    from: u64,
    jobs: usize,
    seconds: u64,
    verbose: bool,
}

/// What all seeds came to.
#[derive(Default)]
struct Sum {
    coverage: Coverage,
    operations: u64,
    crashes: u64,
    events: u64,
    broken: Option<(u64, Box<Broken>)>,
    /// With `--verbose`, what is to be told of each seed.
    told: BTreeMap<u64, Vec<String>>,
}

fn asked() -> Result<Asked, String> {
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let mut asked = Asked { seeds: 100, from: 0, jobs, seconds: u64::MAX, verbose: false };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut number = || {
            let text = words.next().ok_or_else(|| format!("{word} needs a number"))?;
            text.parse::<u64>().map_err(|error| format!("{word} {text}: {error}"))
        };
        match word.as_str() {
            "--seeds" => asked.seeds = number()?,
            "--from" => asked.from = number()?,
            "--jobs" => asked.jobs = usize::try_from(number()?).unwrap_or(1).clamp(1, 256),
            "--seconds" => asked.seconds = number()?,
            "--verbose" => asked.verbose = true,
            other => return Err(format!("unknown option {other}")),
        }
    }
    Ok(asked)
}

fn main() -> ExitCode {
    let asked = match asked() {
        Ok(asked) => asked,
        Err(error) => {
            eprintln!("{error}\nusage: simulate [--seeds N] [--from S] [--jobs J] [--seconds T] [--verbose]");
            return ExitCode::from(2);
        }
    };
    let began = Instant::now();
    let done = AtomicU64::new(0);
    let sum = all(&asked, began, &done);
    let seconds = began.elapsed().as_secs_f64();
    let seeds = done.load(Ordering::Relaxed);
    sum.told.values().flatten().for_each(|line| println!("{line}"));
    println!("{}", sum.coverage.table());
    let zeros = sum.coverage.zeros();
    println!("cells: {}, never hit: {}, least hits: {}", cells().len(), zeros.len(), sum.coverage.least());
    for (kind, fault, place) in &zeros {
        println!("  {kind} x {} x {}", fault.map_or("none", Fault::as_str), place.as_str());
    }
    #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
    let rate = seeds as f64 / seconds;
    println!(
        "{seeds} seeds from {}: {} operations, {} crashes, {} events in {seconds:.1} s: {rate:.1} seeds/s",
        asked.from, sum.operations, sum.crashes, sum.events
    );
    match sum.broken {
        None if seeds >= SEEDS_FOR_COVERAGE && !zeros.is_empty() => {
            println!("{seeds} seeds did not hit every cell");
            ExitCode::FAILURE
        }
        None => ExitCode::SUCCESS,
        Some((seed, broken)) => {
            tell(seed, &broken, asked.verbose);
            ExitCode::FAILURE
        }
    }
}

/// Runs all seeds, one a thread at a time, until one is broken.
fn all(asked: &Asked, began: Instant, done: &AtomicU64) -> Sum {
    let next = AtomicU64::new(asked.from);
    let stop = AtomicBool::new(false);
    let sum = Mutex::new(Sum::default());
    std::thread::scope(|scope| {
        for _ in 0..asked.jobs {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) && began.elapsed().as_secs() < asked.seconds {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= asked.from + asked.seeds {
                        break;
                    }
                    one(seed, asked, &sum, &stop);
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    sum.into_inner().expect("no thread panicked")
}

fn one(seed: u64, asked: &Asked, sum: &Mutex<Sum>, stop: &AtomicBool) {
    let folder = tempfile::tempdir_in("/dev/shm").expect("a folder in /dev/shm");
    let ran = run(seed, folder.path());
    let mut sum = sum.lock().expect("no thread panicked");
    match ran {
        Ok(run) => {
            sum.coverage.add(&run.coverage);
            sum.operations += u64::from(run.operations);
            sum.crashes += u64::from(run.crashes);
            sum.events += run.events;
            if asked.verbose {
                let digest = run.digest();
                let mut lines = run.story;
                lines.push(format!("seed {seed}: {} operations, digest {digest}", run.operations));
                sum.told.insert(seed, lines);
            }
        }
        Err(broken) => {
            stop.store(true, Ordering::Relaxed);
            if sum.broken.as_ref().is_none_or(|(known, _)| seed < *known) {
                sum.broken = Some((seed, broken));
            }
        }
    }
}

fn tell(seed: u64, broken: &Broken, verbose: bool) {
    let count = if verbose { usize::MAX } else { 30 };
    println!("\nseed {seed} violates: {}\n{}", broken.violation.invariant, broken.violation.what);
    println!("\nthe last acts:");
    let skip = broken.story.len().saturating_sub(count);
    broken.story.iter().skip(skip).for_each(|line| println!("  {line}"));
    println!("\nthe last events:");
    broken.events.iter().for_each(|line| println!("  {line}"));
    println!(
        "\nrepeat it: cargo run --release -p snaptree-tests --bin simulate -- --seeds 1 --from {seed} --verbose"
    );
}
