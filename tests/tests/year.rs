//! A simulated stretch of policies with crashes, as far as every test run has time for it; `--bin year` runs the whole.

#![allow(clippy::expect_used, reason = "these are tests")]

use snaptree_tests::year::{Wanted, live};

#[test]
fn after_days_with_crashes_the_trees_are_what_the_rules_say_and_each_delete_says_why() {
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder");
    let wanted = Wanted { domains: 3, days: 16, crashes: 20, leaps: 0, seed: 1 };
    let figures = live(wanted, folder.path(), &mut |_| {}).expect("as the rules say");
    assert_eq!(figures.crashes, wanted.crashes);
    assert!(figures.audited.resolved > 0, "some crash was in the middle of a step");
    assert!(figures.audited.deleted > 0 && figures.audited.merged > 0);
}

#[test]
fn clocks_that_leap_here_and_at_hosts_displace_nothing() {
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder");
    for seed in 1..=3 {
        let wanted = Wanted { domains: 2, days: 12, crashes: 6, leaps: 8, seed };
        let dir = folder.path().join(seed.to_string());
        std::fs::create_dir(&dir).expect("a folder");
        let figures = live(wanted, &dir, &mut |_| {}).expect("as the rules say");
        assert!(figures.audited.leapt > 0 && figures.audited.deleted > 0, "{:?}", figures.audited);
    }
}
