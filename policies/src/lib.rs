//! Schedules and retention: pure functions, and the runner that turns them into commands.

pub mod retention;
mod span;

pub use span::{Elapsed, Reach, SpanError};
