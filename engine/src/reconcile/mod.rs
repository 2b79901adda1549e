//! Driving the hypervisors toward the projected state.

pub mod adopt;
pub mod beside;
pub mod connection;
pub mod dispatch;
pub mod drift;
pub mod keeper;
mod lookout;
pub mod merge;
pub mod recovery;
pub(crate) mod restore;
pub mod space;
pub mod worker;
