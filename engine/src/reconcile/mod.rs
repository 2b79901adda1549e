//! Driving the hypervisors toward the projected state.

pub mod adopt;
pub mod beside;
pub mod connection;
pub mod dispatch;
pub mod drift;
mod lookout;
pub mod merge;
pub mod recovery;
mod restore;
pub mod space;
pub mod worker;
