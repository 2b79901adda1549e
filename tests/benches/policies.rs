//! Policies: two of them over many domains at once beside the creates themselves, and a start after a year of runs.
//!
//! `SNAPTREE_BENCH_DAYS=N` makes the year shorter.

#![allow(missing_docs, clippy::expect_used, reason = "a bench binary")]

use std::path::Path;
use std::time::Instant;

use jiff::Timestamp;
use serde_json::Value;
use snaptree_tests::daemon::Daemon;
use snaptree_tests::measure::{Times, time};
use snaptree_tests::program::Program;
use snaptree_tests::year::{Wanted, live};

const DOMAINS: usize = 600;
const ROUNDS: usize = 3;
const STARTS: usize = 10;
const POLICIES: [&str; 2] = ["daily", "hourly"];

fn events(program: &Program, kind: &str) -> Vec<Timestamp> {
    let log = program.run(&["log", "--kind", kind, "--json"]).stdout;
    let at = |line: &str| serde_json::from_str::<Value>(line).ok()?["at"].as_str()?.parse().ok();
    log.lines().filter_map(at).collect()
}

/// Two policies that keep all, each asked to run at once.
fn two_at_once(folder: &Path) {
    let program = Program::release(folder.join("state"));
    program.json(0, &["domain", "add", "vm-0", "--driver", "sim"]);
    let daemon = Daemon::start(&program);
    for number in 1..DOMAINS {
        program.json(0, &["domain", "add", &format!("vm-{number}"), "--driver", "sim"]);
    }
    for name in POLICIES {
        let text =
            format!("name = \"{name}\"\ndomains = [\"*\"]\nschedule = \"2190-01-01\"\n[keep]\nlast = 9\n");
        let file = folder.join(format!("{name}.toml"));
        std::fs::write(&file, text).expect("a file");
        program.json(0, &["policy", "set", file.to_str().expect("a path")]);
    }
    for round in 1..=ROUNDS {
        let (begun, at) = (Instant::now(), Timestamp::now());
        let runs = POLICIES.map(|name| {
            let mut command = program.command(&["policy", "run", name, "--json"]);
            command.stdout(std::process::Stdio::null()).spawn().expect("it starts")
        });
        for mut run in runs {
            assert!(run.wait().expect("it ends").success(), "it failed");
        }
        let took = begun.elapsed();
        let first = events(&program, "Policy.Fired").into_iter().find(|fired| *fired >= at).expect("a run");
        let last = events(&program, "Snapshot.Created").into_iter().max().expect("a snapshot");
        let creates = last.duration_since(first).as_secs_f64();
        println!(
            "round {round}: {} creates by two policies at once: {:.2} s, the creates themselves {creates:.2} s  x{:.2}",
            2 * DOMAINS,
            took.as_secs_f64(),
            took.as_secs_f64() / creates
        );
    }
    daemon.end();
}

/// What a start costs once a year has passed.
fn after_a_year(folder: &Path) {
    let days = std::env::var("SNAPTREE_BENCH_DAYS").map_or(365, |text| text.parse().expect("a number"));
    let state = folder.join("year");
    std::fs::create_dir(&state).expect("a folder");
    let wanted = Wanted { domains: 20, days, crashes: 10, leaps: 0, seed: 1 };
    live(wanted, &state, &mut |_| ()).expect("as the rules say");
    let program = Program::release(&state);
    let size = std::fs::metadata(state.join("snaptree.db")).expect("the database").len();
    println!("{days} days of 20 domains: a log of {} MiB", size >> 20);
    let (mut next, mut start) = (Times::default(), Times::default());
    for _ in 0..STARTS {
        next.push(time(&mut program.command(&["policy", "next"])));
        let begun = Instant::now();
        let daemon = Daemon::start(&program);
        // It answers, and knows how its policies stand.
        program.json(0, &["policy", "list"]);
        start.push(begun.elapsed());
        daemon.end();
    }
    println!(
        "`policy next`: {:.0} ms; a daemon's start and its first answer: {:.0} ms",
        next.median_ms(),
        start.median_ms()
    );
}

fn main() {
    let folder = tempfile::tempdir().expect("a folder");
    two_at_once(folder.path());
    after_a_year(folder.path());
}
