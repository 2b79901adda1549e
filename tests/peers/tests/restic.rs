//! Retention beside the real restic: `restic forget --dry-run`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use fastrand::Rng;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use snaptree_peers::{All, counts, instants, kept, ours, program, run, sets, withins};
use snaptree_policies::retention::{Limit, Per, Rule};

const ZONE: &str = "Europe/Vienna";
const COUNTED: [Per; 6] = [Per::Snapshot, Per::Hour, Per::Day, Per::Week, Per::Month, Per::Year];

fn restic(repository: &Path) -> Command {
    let mut command = Command::new(program("restic"));
    command.args(["--insecure-no-password", "--no-cache", "--quiet", "--repo"]).arg(repository);
    // The zone of the process is the one that --time is read in, and that the snapshot keeps.
    command.env("TZ", ZONE).env_remove("RESTIC_REPOSITORY").env_remove("RESTIC_PASSWORD");
    command
}

struct Set {
    rules: Vec<Rule>,
    hours: BTreeMap<&'static str, u32>,
    members: BTreeSet<Timestamp>,
}

/// Sets that share their snapshots: one repository serves all, with a tag for each set.
fn all_sets(random: &mut Rng, number: usize, zone: &TimeZone) -> Vec<Set> {
    let mut pool = BTreeSet::new();
    while pool.len() < 40 + number {
        pool.extend(instants(random, 20, zone));
    }
    let mut found = Vec::new();
    while found.len() < number {
        let mut rules = counts(random, &COUNTED, All::Allowed);
        let withins = withins(random, &COUNTED);
        rules.extend(withins.iter().map(|(rule, _)| *rule));
        let share = random.u8(1..8);
        let members: BTreeSet<Timestamp> = pool.iter().copied().filter(|_| random.u8(..8) < share).collect();
        if !rules.is_empty() && !members.is_empty() {
            let hours = withins.iter().map(|(rule, hours)| (rule.key(), *hours)).collect();
            found.push(Set { rules, hours, members });
        }
    }
    found
}

fn take(repository: &Path, file: &Path, at: Timestamp, tags: &[String], zone: &TimeZone) {
    let time = zone.to_datetime(at).strftime("%Y-%m-%d %H:%M:%S").to_string();
    let mut command = restic(repository);
    command.args(["backup", "--host", "h", "--force", "--time", &time, "--tag", &tags.join(",")]);
    run(command.arg(file));
}

fn stays(repository: &Path, tag: &str, set: &Set) -> BTreeSet<Timestamp> {
    let mut command = restic(repository);
    command.args(["forget", "--dry-run", "--json", "--no-lock", "--group-by", "", "--tag", tag]);
    for rule in &set.rules {
        command.arg(format!("--keep-{}", rule.key()));
        command.arg(match rule.limit {
            Limit::Count(count) => count.to_string(),
            Limit::All => "unlimited".to_owned(),
            Limit::Within(_) => format!("{}h", set.hours[rule.key()]),
        });
    }
    let (out, _) = run(&mut command);
    let answer: serde_json::Value = serde_json::from_str(&out).unwrap();
    let kept = answer[0]["keep"].as_array().unwrap();
    kept.iter().map(|snapshot| snapshot["time"].as_str().unwrap().parse().unwrap()).collect()
}

#[test]
fn the_same_snapshots_stay_as_in_restic() {
    let folder = tempfile::tempdir().unwrap();
    let (repository, file) = (folder.path().join("repository"), folder.path().join("file"));
    std::fs::write(&file, "").unwrap();
    run(restic(&repository).arg("init"));
    let zone = TimeZone::get(ZONE).unwrap();
    let sets = all_sets(&mut Rng::with_seed(4), sets(200), &zone);
    let mut tags: BTreeMap<Timestamp, Vec<String>> = BTreeMap::new();
    for (number, set) in sets.iter().enumerate() {
        for at in &set.members {
            tags.entry(*at).or_default().push(format!("set{number}"));
        }
    }
    for (at, tags) in &tags {
        take(&repository, &file, *at, tags, &zone);
    }
    let mut deleted = 0;
    for (number, set) in sets.iter().enumerate() {
        let theirs = stays(&repository, &format!("set{number}"), set);
        assert_eq!(kept(&ours(&set.members, &set.rules, &zone)), theirs, "set {number}: {:?}", set.rules);
        deleted += set.members.len() - theirs.len();
    }
    println!("{} sets of {} snapshots, {deleted} to be deleted", sets.len(), tags.len());
    assert!(deleted > 0);
}
