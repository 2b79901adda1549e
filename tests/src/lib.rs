//! What no single crate can test. This library holds what the tests and benchmarks share.

#![allow(clippy::expect_used, reason = "everything here is for tests")]

pub mod agent;
pub mod alive;
pub mod conformance;
pub mod crowd;
pub mod daemon;
pub mod fleet;
pub mod guest;
pub mod history;
pub mod images;
pub mod inside;
pub mod kept;
pub mod lab;
pub mod left;
pub mod measure;
pub mod program;
pub mod random;
pub mod rewind;
pub mod running;
pub mod scenarios;
pub mod scene;
pub mod simulation;
pub mod small;
pub mod strace;
pub mod victim;
pub mod virtualbox;
pub mod vsphere;
pub mod watched;
pub mod wrapped;
pub mod year;
