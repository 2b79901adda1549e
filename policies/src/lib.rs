//! Schedules and retention: pure functions, and the runner that turns them into commands.

pub mod file;
mod near;
pub mod retention;
pub mod schedule;
mod span;

pub use span::{Elapsed, Reach, SpanError};
