//! Retention beside the real borg: `borg prune --dry-run`.
//!
//! With one rule the two agree. With several, borg does not count for a coarser rule what a finer one keeps, so it keeps
//! all that we keep, and more; we let one snapshot count for every rule that it fits, as restic does.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use fastrand::Rng;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use snaptree_peers::{All, counts, instants, kept, ours, program, run, sets};
use snaptree_policies::retention::{Limit, Per, Rule};

const ZONE: &str = "Europe/Vienna";
const COUNTED: [Per; 6] = [Per::Snapshot, Per::Hour, Per::Day, Per::Week, Per::Month, Per::Year];

fn borg(folder: &Path) -> Command {
    let mut command = Command::new(program("borg"));
    command
        .env("TZ", ZONE)
        .env("BORG_BASE_DIR", folder)
        .env("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes");
    command
}

struct Set {
    rules: Vec<Rule>,
    members: BTreeSet<Timestamp>,
}

/// Sets that share their archives. The name of an archive says by a 0 or 1 for each set whether it is in it.
fn all_sets(random: &mut Rng, number: usize, zone: &TimeZone) -> (Vec<Timestamp>, Vec<Set>) {
    let mut pool = BTreeSet::new();
    while pool.len() < 40 + number / 2 {
        pool.extend(instants(random, 20, zone));
    }
    let mut found = Vec::new();
    while found.len() < number {
        let mut rules = counts(random, &COUNTED, All::Left);
        if found.len() % 2 == 0 {
            rules.truncate(1);
        }
        let share = random.u8(1..8);
        let members: BTreeSet<Timestamp> = pool.iter().copied().filter(|_| random.u8(..8) < share).collect();
        if !rules.is_empty() && !members.is_empty() {
            found.push(Set { rules, members });
        }
    }
    (pool.into_iter().collect(), found)
}

/// What stays, told by the archive's number at the end of its name.
fn stays(
    folder: &Path,
    repository: &Path,
    number: usize,
    set: &Set,
    pool: &[Timestamp],
) -> BTreeSet<Timestamp> {
    let mut command = borg(folder);
    command.args(["prune", "--dry-run", "--list", "--glob-archives", &format!("{}1*", "?".repeat(number))]);
    for rule in &set.rules {
        let Limit::Count(count) = rule.limit else { unreachable!("borg only counts here") };
        command.args([format!("--keep-{}", rule.key()), count.to_string()]);
    }
    let (_, told) = run(command.arg(repository));
    let archive = |line: &str| {
        let name = line.split_whitespace().find(|word| word.contains("-archive-"))?;
        name.rsplit('-').next()?.parse::<usize>().ok()
    };
    let lines: Vec<&str> = told.lines().filter(|line| archive(line).is_some()).collect();
    assert_eq!(lines.len(), set.members.len(), "{told}");
    let kept = lines.iter().filter(|line| line.contains("Keeping archive"));
    kept.filter_map(|line| archive(line)).map(|archive| pool[archive]).collect()
}

#[test]
fn one_rule_keeps_the_same_as_borg_and_several_no_more() {
    let folder = tempfile::tempdir().unwrap();
    let (repository, file) = (folder.path().join("repository"), folder.path().join("file"));
    std::fs::write(&file, "").unwrap();
    run(borg(folder.path()).args(["init", "--encryption", "none"]).arg(&repository));
    let zone = TimeZone::get(ZONE).unwrap();
    let (pool, sets) = all_sets(&mut Rng::with_seed(4), sets(200), &zone);
    for (number, at) in pool.iter().enumerate() {
        let bits: String = sets.iter().map(|set| if set.members.contains(at) { '1' } else { '0' }).collect();
        let place = format!("{}::{bits}-archive-{number}", repository.display());
        let time = TimeZone::UTC.to_datetime(*at).strftime("%Y-%m-%dT%H:%M:%S").to_string();
        run(borg(folder.path()).args(["create", "--timestamp", &time, &place]).arg(&file));
    }
    let mut more = 0;
    for (number, set) in sets.iter().enumerate() {
        let theirs = stays(folder.path(), &repository, number, set, &pool);
        let ours = kept(&ours(&set.members, &set.rules, &zone));
        if set.rules.len() == 1 {
            assert_eq!(ours, theirs, "set {number}: {:?}", set.rules);
        } else {
            assert!(ours.is_subset(&theirs), "set {number}: {:?}", set.rules);
            more += theirs.len() - ours.len();
        }
    }
    println!("{} sets of {} archives; with several rules borg keeps {more} more", sets.len(), pool.len());
    assert!(more > 0, "else the difference that is named above is none");
}
