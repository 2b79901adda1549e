//! From policies to requests: what is due is asked for, and what retention lets go is deleted.
//!
//! ```text
//!   log ──▶ Book ──▶ due? ──▶ Policy.Fired + one create per domain   (one append per few domains)
//!                              │ the create succeeded
//!                              ▼
//!                             plan ──▶ Policy.Fired + deletes        (one append per domain)
//! ```
//!
//! It is level-triggered: what is due follows from the log and the clock alone. A domain's run is in the log with its
//! requests or not at all, so it happens exactly once per domain however often the engine dies.
//!
//! The cost is that of what changed: a [`Book`] begins at checkpoints and reads what follows, keeps of each domain what the
//! next look needs, and whoever wants to [tell](told) of more reads the log back as far as that goes.
//!
//! Architecture Invariant: nothing is deleted because a snapshot failed, and no delete waits for one that did. Deletes
//! follow a run of their domain that succeeded.

mod agenda;
mod book;
mod clock;
mod define;
mod fire;
mod look;
mod notable;
mod outcome;
mod project;
mod retain;
mod scheduler;
mod told;

pub use agenda::{Appointment, agenda};
pub use book::{Book, Chosen, News, chosen};
pub use clock::{ClockState, Seen, Turn, confirm_clock, watch_clock};
pub use define::{PolicyRequestError, define, remove, resume, suspend};
pub use fire::{Firing, Ran, fire};
pub use look::{For, candidates, depth_max, plan_of, shape};
pub use notable::{Notable, failure_of};
pub use outcome::{Open, RunOutcome, outcome_of};
pub use project::{Definition, Entry, PROJECTOR, PolicyState, RUNS_KEPT_MAX, Run, Skip, Suspension};
pub use retain::retain;
pub use scheduler::{Scheduler, Tick, suspend_if_hopeless};
pub use told::told;
