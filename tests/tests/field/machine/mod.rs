//! M: what a machine consists of.

#[cfg(feature = "lab")]
mod disks;
#[cfg(feature = "lab")]
mod grown;
#[cfg(feature = "lab")]
mod left_out;
mod listed_disks;
#[cfg(feature = "lab")]
mod options;
#[cfg(feature = "lab")]
mod rig;
