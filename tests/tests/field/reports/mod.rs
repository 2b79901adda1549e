//! A: what is told, and whether it is so.

mod busy;
mod gone;
mod policies_unreadable;
mod sick;
