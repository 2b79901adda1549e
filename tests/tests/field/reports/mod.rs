//! A: what is told, and whether it is so.

mod gone;
mod sick;
