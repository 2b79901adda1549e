//! A: what is told, and whether it is so.

mod busy;
mod gone;
mod passing;
mod policies_unreadable;
mod sick;
