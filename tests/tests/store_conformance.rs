//! The SQLite store keeps the port's promises, as a writer of a fresh directory, whoever commits.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed step of a test fails the test")]

use std::time::Duration;

use snaptree_store::{Commits, LockWait, Store};

fn fresh(commits: Commits) -> (Store, tempfile::TempDir) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let wait = LockWait { timeout: Duration::ZERO };
    let store = Store::open_writer_with(&dir.path().join("state"), wait, commits);
    (store.expect("a fresh state directory"), dir)
}

mod a_thread_commits {
    snaptree_tests::conformance!(|| super::fresh(snaptree_store::Commits::Thread));
}

mod whoever_asks_commits {
    snaptree_tests::conformance!(|| super::fresh(snaptree_store::Commits::InPlace));
}
