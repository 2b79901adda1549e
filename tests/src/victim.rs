//! Who is killed in a crash matrix, and where.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command};

use crate::running::wait_until;

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Victim {
    /// The program.
    Snaptree,
    /// The hypervisor.
    Qemu,
    /// Both at once.
    Both,
}

/// All of them.
pub const VICTIMS: [Victim; 3] = [Victim::Snaptree, Victim::Qemu, Victim::Both];

/// What came of the kills of one of them.
#[derive(Debug, Default)]
pub struct Tally {
    /// How often all was well afterwards.
    pub recovered: usize,
    /// How often of these it was as before the operation.
    pub before: usize,
    /// How often the operation ended first.
    pub missed: usize,
    /// What was not well.
    pub failed: Vec<String>,
}

/// The places in a trace of what was reached, each with the number of the reach.
///
/// # Panics
/// There is no trace.
pub fn numbered(trace: &Path) -> Vec<(String, usize)> {
    let mut reached: BTreeMap<String, usize> = BTreeMap::new();
    let lines = std::fs::read_to_string(trace).expect("the trace");
    let number = |line: &str| {
        let count = reached.entry(line.to_owned()).or_default();
        *count += 1;
        (line.to_owned(), *count)
    };
    lines.lines().map(number).collect()
}

/// The places that are tried, with whom to kill there: some of them, each with one; with `SNAPTREE_POINTS=all` all of
/// them, with each; with `SNAPTREE_POINTS=N` about N.
///
/// # Panics
/// `SNAPTREE_POINTS` is neither.
pub fn points(places: &[(String, usize)], usual: usize) -> Vec<((String, usize), Victim)> {
    match std::env::var("SNAPTREE_POINTS").ok().as_deref() {
        Some("all") => {
            places.iter().flat_map(|place| VICTIMS.map(|victim| (place.clone(), victim))).collect()
        }
        wanted => {
            let wanted = wanted.map_or(usual, |wanted| wanted.parse().expect("a number, or all"));
            let victims = VICTIMS.into_iter().cycle();
            some(places, wanted).into_iter().zip(victims).collect()
        }
    }
}

/// Prints what came of the kills.
///
/// # Panics
/// Something was not well, or nothing was killed.
pub fn tell(name: &str, places: usize, table: &BTreeMap<Victim, Tally>) {
    println!("{name}: {places} places");
    for (victim, tally) in table {
        println!(
            "  {victim:?}: recovered {} ({} as it began), missed {}, failed {}",
            tally.recovered,
            tally.before,
            tally.missed,
            tally.failed.len()
        );
    }
    let failed: Vec<&String> = table.values().flat_map(|tally| &tally.failed).collect();
    assert!(failed.is_empty(), "not recovered: {failed:#?}");
    assert!(table.values().map(|tally| tally.recovered).sum::<usize>() > 0, "nothing was killed");
}

/// Sends a signal.
///
/// # Panics
/// It cannot be sent.
pub fn signal(pid: u32, name: &str) {
    let sent = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status();
    assert!(sent.expect("kill runs").success(), "{name} to {pid}");
}

/// Waits until a process is stopped, or has ended; whether it is stopped.
///
/// # Panics
/// Neither comes to be.
pub fn stopped(child: &mut Child) -> bool {
    let mut is_stopped = false;
    wait_until("it is stopped, or has ended", || {
        let stat = std::fs::read_to_string(Path::new("/proc").join(child.id().to_string()).join("stat"));
        let state =
            stat.ok().and_then(|stat| stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()));
        is_stopped = state == Some('T');
        is_stopped || matches!(state, None | Some('Z'))
    });
    if !is_stopped {
        child.wait().expect("it ended");
    }
    is_stopped
}

/// Some of `all`, evenly.
fn some<T: Clone>(all: &[T], wanted: usize) -> Vec<T> {
    let step = all.len().div_ceil(wanted.max(1)).max(1);
    all.iter().step_by(step).cloned().collect()
}
