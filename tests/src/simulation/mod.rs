//! The simulation: the real engine and the real store on the simulated hypervisor, all from one seed.
//!
//! A seed rules the requests, the guest's writes, the faults, the moments at which the program is killed, time and
//! ids; so the same seed gives the same run. Beside it a [model] says what has to be true, and after every operation
//! and every restart the [invariants](check) are compared with it.
//!
//! Code Map: [`world`] (what the seed rules), [`model`] (what has to be true), [`check`] (the invariants), `life`
//! (one process from its start to its end), `acts` (what is asked of it at random), `steer` (what leads to a cell of the
//! table), `stuck` (what needs someone), `outside` (what happens past the program), [`coverage`] (what was met).

mod acts;
pub mod check;
pub mod coverage;
mod life;
pub mod model;
mod outside;
mod steer;
mod stuck;
pub mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use sha2::{Digest, Sha256};
use snaptree_engine::event::{Envelope, Event};

use check::Violation;
use coverage::Coverage;
use life::{Cast, End};
use world::Killed;

/// Operations of a seed, at least.
pub const OPERATIONS_MIN: u32 = 50;
/// Crashes of a seed, at least.
pub const CRASHES_MIN: u32 = 3;
/// Lives of a seed, at most: one that crashes for ever does not end.
const LIVES_MAX: u32 = 60;

/// What a seed came to.
#[derive(Clone, Debug)]
pub struct Run {
    /// Operations that were accepted.
    pub operations: u32,
    /// How often the program was killed.
    pub crashes: u32,
    /// Events in the log at the end.
    pub events: u64,
    /// What was met.
    pub coverage: Coverage,
    /// The log.
    pub log: Vec<Envelope>,
    /// The story, if it was asked for.
    pub story: Vec<String>,
}

impl Run {
    /// The SHA-256 of all that the seed decides of the log.
    pub fn digest(&self) -> String {
        digest(&self.log)
    }
}

/// A seed that showed a violation.
#[derive(Clone, Debug)]
pub struct Broken {
    /// What was broken.
    pub violation: Violation,
    /// What was done, the last acts last.
    pub story: Vec<String>,
    /// The last events of the log.
    pub events: Vec<String>,
}

/// Runs a seed in `folder`, which has to be empty.
///
/// # Errors
/// A violated invariant.
///
/// # Panics
/// A runtime cannot be made.
pub fn run(seed: u64, folder: &Path) -> Result<Run, Box<Broken>> {
    let mut cast = Cast::new(seed, folder);
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    for life in 0..LIVES_MAX {
        let lived = catch_unwind(AssertUnwindSafe(|| runtime.block_on(cast.live(life))));
        match lived {
            Ok(Ok(End::Finished(log))) => return Ok(finished(&cast, log)),
            Ok(Ok(End::Restart)) => {}
            Ok(Err(violation)) => return Err(Box::new(told(&cast, violation))),
            Err(panic) if panic.is::<Killed>() => cast.killed(),
            Err(panic) => {
                let what = panic.downcast_ref::<String>().cloned();
                let what = what.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
                let invariant = "the program does not panic";
                return Err(Box::new(told(&cast, Violation { invariant, what: what.unwrap_or_default() })));
            }
        }
    }
    let what = format!("{LIVES_MAX} lives were not enough");
    Err(Box::new(told(&cast, Violation { invariant: "the seed comes to its end", what })))
}

fn finished(cast: &Cast, log: Vec<Envelope>) -> Run {
    Run {
        operations: cast.operations,
        crashes: cast.crashes,
        events: log.len() as u64,
        coverage: cast.world.coverage(),
        story: cast.story().to_vec(),
        log,
    }
}

fn told(cast: &Cast, violation: Violation) -> Broken {
    let events = cast.events().iter().rev().take(25).rev().map(shown).collect();
    Broken { violation, story: cast.story().to_vec(), events }
}

fn shown(envelope: &Envelope) -> String {
    let mut data = envelope.event.encode().unwrap_or_default();
    if let Some((end, _)) = data.char_indices().nth(300) {
        data.truncate(end);
    }
    let operation = envelope.operation.map_or_else(String::new, |id| id.to_string());
    format!("{:>5} {} {:<26} {operation} {data}", envelope.seq, envelope.stream, envelope.event.kind())
}

/// The hash over what the seed decides: everything but the events' own ids, the installation and the hash chain.
fn digest(log: &[Envelope]) -> String {
    let mut hasher = Sha256::new();
    for envelope in log {
        if matches!(envelope.event, Event::SystemOpened(_)) {
            continue;
        }
        let data = envelope.event.encode().unwrap_or_default();
        let line = format!(
            "{} {} {} {} {} {} {} {:?} {:?} {:?} {data}\n",
            envelope.seq,
            envelope.stream,
            envelope.version,
            envelope.event.kind(),
            envelope.at,
            envelope.actor,
            envelope.epoch,
            envelope.operation,
            envelope.cause,
            envelope.key,
        );
        hasher.update(line.as_bytes());
    }
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
