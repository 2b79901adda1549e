//! H: somebody else at work on the same files, and hostile hands.

mod beside;
mod database;
mod devices;
mod lengths;
mod state;
