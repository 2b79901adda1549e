//! The hypervisors that Snaptree drives, one folder each, all behind the engine's `Driver` trait.

pub mod child;
mod disks;
pub mod esx;
mod failing;
mod operation_lock;
mod process;
pub mod qemu;
mod room;
pub mod sim;
pub mod virtualbox;
