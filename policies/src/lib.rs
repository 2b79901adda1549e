//! Schedules and retention: pure functions, and the runner that turns them into commands.
//!
//! | module | |
//! |---|---|
//! | [`file`](mod@file) | the policy file: what it may say, and a [`Policy`](file::Policy), checked, as `Policy.Defined` records it |
//! | [`schedule`] | which instants are planned, and which of them are due |
//! | [`leap`] | whether the clock goes on from where it was |
//! | [`retention`] | which snapshots stay and which go, why, and in which order |
//!
//! Architecture Invariant: what is here is a pure function of its arguments: no clock, no randomness, no environment.
//! (Names of time zones are looked up in the machine's time zone database when text is read.) What `policy plan` and
//! `policy next` print is told by the functions that a run uses.
//!
//! A run of a policy on a domain, in terms of this crate:
//!
//! 1. [`History`](schedule::History) from the log; [`due`](schedule::due) of [`Policy::asked`](file::Policy::asked).
//! 2. Record [`Due::run`](schedule::Due::run) with its requests, and [`Due::skipped`](schedule::Due::skipped); look again
//!    at [`Due::next_at`](schedule::Due::next_at).
//! 3. When the snapshot stands: [`Candidate::of`](retention::Candidate::of) each snapshot, a
//!    [`Shape`](retention::Shape) of the tree, and [`Policy::plan`](file::Policy::plan). Request
//!    [`Plan::deletes`](retention::Plan::deletes) with their reasons.

pub mod file;
pub mod leap;
pub mod retention;
pub mod runner;
pub mod schedule;
mod span;

pub use span::{Elapsed, Reach, SpanError};
