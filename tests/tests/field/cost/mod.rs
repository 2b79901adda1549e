//! C: cost that must not grow with what ever happened.

mod answers;
mod connections;
mod policies;
