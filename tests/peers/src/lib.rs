//! Random snapshots and policies that every peer can be asked about, and what Snaptree says about them.
//!
//! `tests/lab/peers` has to have been run for restic, borg and systemd. A tenth of the sets runs unless
//! `SNAPTREE_SETS=all`.

use std::collections::BTreeSet;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::process::Command;

use fastrand::Rng;
use jiff::civil::DateTime;
use jiff::tz::{AmbiguousOffset, TimeZone};
use jiff::{SignedDuration, Timestamp};
use snaptree_engine::SnapshotId;
use snaptree_policies::retention::{Candidate, Keep, Limit, Per, Rule, Standing, Verdict, verdicts};
use uuid::Uuid;

/// 2026-11-23T12:00:00Z: later than any snapshot here.
pub const NOW_S: i64 = 1_795_435_200;

/// How many sets: all of them, or a tenth.
pub fn sets(all: usize) -> usize {
    if std::env::var("SNAPTREE_SETS").as_deref() == Ok("all") { all } else { all / 10 }
}

/// A program that `tests/lab/peers` unpacked.
///
/// # Panics
/// It was not run.
pub fn program(name: &str) -> PathBuf {
    let unpacked = std::env::var_os("SNAPTREE_PEERS").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target/lab/peers"),
        PathBuf::from,
    );
    let found = match name {
        "restic" => unpacked.join("root/usr/bin/restic"),
        other => unpacked.join(other),
    };
    assert!(found.exists(), "{} is not there: run tests/lab/peers first", found.display());
    found
}

/// Runs a program to its end and gives what it printed, standard output and standard error.
///
/// # Panics
/// It cannot be run, or fails.
pub fn run(command: &mut Command) -> (String, String) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{out}\n{err}", output.status);
    (out, err)
}

/// Whether the clock of `zone` shows this time twice, or is about to: there counting by the clock's hour differs from
/// ours on purpose.
pub fn repeated(at: Timestamp, zone: &TimeZone) -> bool {
    let shown = zone.to_datetime(at);
    let hour = |time: DateTime| time.with().minute(0).second(0).build().unwrap_or(time);
    [shown, hour(shown), hour(shown) + SignedDuration::from_secs(3_599)]
        .into_iter()
        .any(|time| matches!(zone.to_ambiguous_timestamp(time).offset(), AmbiguousOffset::Fold { .. }))
}

/// Whether a week that spans two years may be near.
pub fn turn_of_the_year(at: Timestamp, zone: &TimeZone) -> bool {
    let date = zone.to_datetime(at).date();
    (date.month() == 12 && date.day() >= 28) || (date.month() == 1 && date.day() <= 4)
}

/// Instants over hours, weeks or years before [`NOW_S`], with bursts; all different, none in a repeated hour.
pub fn instants(random: &mut Rng, most: usize, zone: &TimeZone) -> BTreeSet<Timestamp> {
    let reach = [86_400, 20 * 86_400, 400 * 86_400, 3_000 * 86_400][random.usize(..4)];
    let mut found = BTreeSet::new();
    for _ in 0..random.usize(1..=most) {
        let at = NOW_S - random.i64(1..reach);
        for _ in 0..if random.u8(..4) == 0 { 3 } else { 1 } {
            let at = Timestamp::from_second(at - random.i64(0..7_200)).expect("in our time");
            if !repeated(at, zone) {
                found.insert(at);
            }
        }
    }
    found
}

/// Counting rules of some of `pers`, `all` now and then where that is allowed.
pub fn counts(random: &mut Rng, pers: &[Per], all: All) -> Vec<Rule> {
    let mut rules = Vec::new();
    for per in pers {
        if random.u8(..3) > 0 {
            continue;
        }
        let limit = match random.u32(0..14) {
            0 if all == All::Allowed => Limit::All,
            count => Limit::Count(NonZeroU32::new(count.max(1)).expect("not 0")),
        };
        rules.push(Rule { per: *per, limit });
    }
    rules
}

/// Whether a rule may keep all.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum All {
    /// It may.
    Allowed,
    /// The peer cannot.
    Left,
}

/// Rules by age of some of `pers`, with the hours that they reach back: hours, since peers disagree about days and months.
pub fn withins(random: &mut Rng, pers: &[Per]) -> Vec<(Rule, u32)> {
    let mut rules = Vec::new();
    for per in pers {
        if random.u8(..5) == 0 {
            let hours = [random.u32(1..48), random.u32(1..1_000), random.u32(1..20_000)][random.usize(..3)];
            let limit = Limit::Within(format!("{hours}h").parse().expect("a reach"));
            rules.push((Rule { per: *per, limit }, hours));
        }
    }
    rules
}

/// Our verdicts, the newest first.
pub fn ours(instants: &BTreeSet<Timestamp>, rules: &[Rule], zone: &TimeZone) -> Vec<Verdict> {
    let candidates: Vec<Candidate> = instants
        .iter()
        .zip(1_u64..)
        .map(|(created, number)| Candidate {
            snapshot: SnapshotId::from_uuid(Uuid::from_u128(number.into())),
            created: *created,
            seq: number,
            standing: Standing::Counted,
        })
        .collect();
    let keep = Keep::new(rules.to_vec(), None, NonZeroU32::MIN).expect("each rule once");
    verdicts(&candidates, &keep, Timestamp::from_second(NOW_S).expect("in our time"), zone)
}

/// When those were taken that stay.
pub fn kept(verdicts: &[Verdict]) -> BTreeSet<Timestamp> {
    verdicts.iter().filter(|verdict| verdict.keeps()).map(|verdict| verdict.created).collect()
}
