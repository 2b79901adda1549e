//! What no single crate can test. This library holds what the tests and benchmarks share.

pub mod images;
pub mod program;
pub mod random;
