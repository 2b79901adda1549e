//! The hypervisors that Snaptree drives, one folder each, all behind the engine's `Driver` trait.

pub mod esx;
pub mod qemu;
pub mod sim;
pub mod virtualbox;
