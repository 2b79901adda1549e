//! The SQLite store keeps the port's promises, as a writer of a fresh directory.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed step of a test fails the test")]

use std::time::Duration;

use snaptree_store::{LockWait, Store};

snaptree_tests::conformance!(|| {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let store = Store::open_writer(&dir.path().join("state"), LockWait { timeout: Duration::ZERO })
        .expect("a fresh state directory");
    (store, dir)
});
