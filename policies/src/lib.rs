//! Schedules and retention: pure functions, and the runner that turns them into commands.
//!
//! Nothing is in it yet; it stands here so that the arrows between the crates are what they will be.
