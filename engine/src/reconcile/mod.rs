//! Driving the hypervisors toward the projected state.

pub mod drift;
pub mod merge;
pub mod recovery;
pub mod worker;
