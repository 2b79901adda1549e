//! A simulated stretch of policies with crashes, as far as every test run has time for it; `--bin year` runs the whole.

#![allow(clippy::expect_used, reason = "these are tests")]

use snaptree_tests::year::{Wanted, live};

#[test]
fn after_days_with_crashes_the_trees_are_what_the_rules_say_and_each_delete_says_why() {
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder");
    let wanted = Wanted { domains: 3, days: 16, crashes: 20, seed: 1 };
    let figures = live(wanted, folder.path(), &mut |_| {}).expect("as the rules say");
    assert_eq!(figures.crashes, wanted.crashes);
    assert!(figures.audited.resolved > 0, "some crash was in the middle of a step");
    assert!(figures.audited.deleted > 0 && figures.audited.merged > 0);
}
