//! Retention: which of a policy's snapshots stay, and which go, in which order.
//!
//! ```text
//!  candidates ──▶ verdicts ──▶ press ──────▶ order ─────────▶ the first N are this run's deletes
//!                 the rules    max-depth    least data moved
//! ```
//!
//! Everything here is a pure function, so what `policy plan` prints is what a run does: both call [`plan`].

mod depth;
mod keep;
mod long_run;
mod order;
mod period;
mod plan;
#[cfg(test)]
mod tests;
mod verdict;

pub use depth::{Depth, DepthLimit, press};
pub use keep::{Keep, KeepError, Limit, Rule};
pub(crate) use keep::{count_key, within_key};
pub use long_run::{LongRun, long_run};
pub use order::{Delete, File, Node, Shape, order};
pub use period::{Per, Period};
pub use plan::{Limits, Plan, Trust, plan};
pub use verdict::{Candidate, Decision, Reason, Standing, Uncounted, Verdict, verdicts};
