//! The event log of Snaptree in SQLite: one file, `snaptree.db`, in the state directory.
//!
//! The modules follow the path of an append: [`chain`] (how the hash over everything is made), [`lock`] (one process
//! at a time writes), `schema` (the tables), `row` (an event as its columns), `writer` (the one who commits),
//! `reader` (connections that only read), `read_model` (tables for the sqlite3 shell, and for lists), [`verify`],
//! and [`Store`], which is [`EventLog`](snaptree_engine::log::EventLog) over all of them.
//!
//! # The file
//! `application_id` is `0x534E5054` ("SNPT"), `user_version` the number of migrations applied. WAL, `synchronous=FULL`.
//!
//! | table | what | can be dropped |
//! |---|---|---|
//! | `events` | the log; triggers abort UPDATE, DELETE and REPLACE | no |
//! | `meta` | the installation id, which is the first previous hash | no |
//! | `owner` | who owns the state: the epoch that each append compares | no |
//! | `checkpoints` | stored projections | yes: only slower |
//! | `domains`, `snapshots`, `operations`, `read_model` | the read model | yes: made again |
//! | `audit` | a view: the log with names and times for people | yes: made again |
//!
//! `snapshots` keeps the rows of deleted snapshots, with `deleted_at` set: a query for the living ones says
//! `WHERE deleted_at IS NULL`.
//!
//! Architecture Invariant: nothing but the writer changes the log, and readers never wait for it.

mod audit;
pub mod chain;
mod error;
pub mod lock;
mod read_model;
mod reader;
mod row;
mod schema;
mod store;
pub mod verify;
mod wal;
mod writer;

pub use error::StoreError;
pub use lock::{Holder, LockWait};
pub use store::Store;
pub use verify::{Problem, Verification, Verified};
pub use writer::Commits;

/// The database's file name in the state directory.
pub const DATABASE_FILE: &str = "snaptree.db";

/// Most bytes of one event's payload; a longer one is refused by an append, and is damage when it is read.
pub const DATA_BYTES_MAX: usize = 16 << 20;

/// Most bytes of a checkpoint's state.
pub const CHECKPOINT_BYTES_MAX: usize = 48 << 20;
