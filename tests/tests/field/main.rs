//! What administrators met elsewhere and reported in public, tried on the real program: a module for each kind of trouble,
//! each test with the value that is right. The letter and number of a test stand for one report; tests of the same kind
//! that no report told of have the letter alone.

#![allow(clippy::expect_used, reason = "a test")]

mod clock;
mod cost;
mod foreign_data;
mod hostile;
mod machine;
mod names;
mod reports;
mod running;
mod terminal;
