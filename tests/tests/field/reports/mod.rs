//! A: what is told, and whether it is so.

mod busy;
mod forged;
mod gone;
mod passing;
mod policies;
mod policies_unreadable;
mod sick;
