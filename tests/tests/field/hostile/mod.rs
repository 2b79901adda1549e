//! H: somebody else at work on the same files, and hostile hands.

mod beside;
mod devices;
mod state;
