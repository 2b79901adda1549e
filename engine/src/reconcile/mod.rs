//! Driving the hypervisors toward the projected state.

pub mod merge;
