//! Driving the hypervisors toward the projected state.

pub mod merge;
pub mod recovery;
pub mod worker;
