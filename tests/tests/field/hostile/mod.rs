//! H: somebody else at work on the same files, and hostile hands.

mod beside;
mod database;
mod devices;
#[cfg(feature = "lab")]
mod full;
mod lengths;
mod state;
