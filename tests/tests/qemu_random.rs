//! Random operations on real qcow2 images, against a model kept beside them.
//!
//! `SNAPTREE_SEED=N` repeats a run, `SNAPTREE_OPERATIONS=N` makes it longer.

#![cfg(feature = "lab")]
#![allow(clippy::expect_used, reason = "a test")]

use std::collections::BTreeSet;

use snaptree_tests::images::Content;
use snaptree_tests::lab::{DISKS, Lab};
use snaptree_tests::random::Random;

/// More snapshots than this are not made, so that a run stays short.
const SNAPSHOTS_MAX: usize = 14;

struct Run {
    lab: Lab,
    random: Random,
    named: usize,
    merged: usize,
    deferred: usize,
    deletes: usize,
    reverts: usize,
    roots_max: usize,
}

impl Run {
    fn any_snapshot(&mut self) -> Option<String> {
        let names: Vec<String> = self.lab.model.snapshots.keys().cloned().collect();
        (!names.is_empty()).then(|| self.random.pick(&names).clone())
    }

    /// One random operation; says what it was.
    fn act(&mut self) -> String {
        let full = self.lab.model.snapshots.len() > SNAPSHOTS_MAX;
        match self.random.below(100) {
            0..=24 => self.write(),
            25..=49 if !full => self.create(),
            50..=66 => self.revert(),
            67..=92 => self.delete(),
            93..=95 => self.rename(),
            96..=97 => self.hold_or_release(),
            _ if full => self.delete(),
            _ => {
                self.lab.program.json(0, &["reconcile", "web"]);
                "reconcile".to_owned()
            }
        }
    }

    fn write(&mut self) -> String {
        let disk = *self.random.pick(&DISKS);
        let (first, count) = (self.random.below(Content::BLOCKS), 1 + self.random.below(24));
        let pattern = u8::try_from(1 + self.random.below(255)).expect("a byte");
        self.lab.write(disk, first, count, pattern);
        format!("write {disk}")
    }

    fn create(&mut self) -> String {
        self.named += 1;
        let name = format!("s{}", self.named);
        let mut held = DISKS.to_vec();
        if self.random.chance(15) {
            let left_out = *self.random.pick(&DISKS);
            held.retain(|disk| *disk != left_out);
            let disks = format!("<disks><disk name='{left_out}' snapshot='no'/></disks>");
            let xml = format!("<domainsnapshot><name>{name}</name>{disks}</domainsnapshot>");
            self.lab.program.json_with_stdin(&["create", "web", "--xml", "-"], &xml);
        } else {
            self.lab.program.json(0, &["create", "web", &name]);
        }
        self.lab.model.create(&name, &held);
        format!("create {name} of {held:?}")
    }

    fn revert(&mut self) -> String {
        let Some(name) = self.any_snapshot() else { return self.create() };
        self.lab.program.json(0, &["revert", "web", &name]);
        self.lab.model.revert(&name);
        self.reverts += 1;
        format!("revert {name}")
    }

    fn delete(&mut self) -> String {
        let Some(name) = self.any_snapshot() else { return self.create() };
        let mut args = vec!["delete".to_owned(), "web".to_owned(), name.clone()];
        let mut going = BTreeSet::from([name.clone()]);
        match self.random.below(10) {
            0 => {
                args.extend(["--children", "--yes"].map(str::to_owned));
                going.extend(self.lab.model.descendants(&name));
            }
            1 => {
                args.extend(["--children-only", "--yes"].map(str::to_owned));
                going = self.lab.model.descendants(&name);
            }
            2 | 3 => {
                let other = self.any_snapshot().expect("there is one");
                going.insert(other.clone());
                args.push(other);
            }
            _ => {}
        }
        match self.random.below(10) {
            0 => args.push("--now".to_owned()),
            1 => args.push("--defer".to_owned()),
            _ => {}
        }
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        if going.iter().any(|name| self.lab.model.snapshots[name].held) {
            let refused = self.lab.program.json(4, &args);
            assert_eq!(refused["error"]["code"], "held", "{refused}");
            return format!("{args:?}, refused as held");
        }
        let done = self.lab.program.json(0, &args);
        assert_eq!(done["outcome"], "succeeded", "{done}");
        for merge in done["merges"].as_array().expect("merges") {
            match merge["outcome"].as_str() {
                Some("succeeded") => self.merged += 1,
                Some("deferred") => self.deferred += 1,
                other => panic!("{other:?}: {done}"),
            }
        }
        self.deletes += 1;
        going.iter().for_each(|name| self.lab.model.delete(name));
        format!("{args:?}")
    }

    fn rename(&mut self) -> String {
        let Some(old) = self.any_snapshot() else { return self.create() };
        self.named += 1;
        let new = format!("renamed {}", self.named);
        self.lab.program.json(0, &["edit", "web", &old, "--name", &new]);
        self.lab.model.rename(&old, &new);
        format!("rename {old} to {new}")
    }

    fn hold_or_release(&mut self) -> String {
        let Some(name) = self.any_snapshot() else { return self.create() };
        let snapshot = self.lab.model.snapshots.get_mut(&name).expect("it lives");
        snapshot.held = !snapshot.held;
        if snapshot.held {
            self.lab.program.json(0, &["hold", "web", &name, "--reason", "the test"]);
        } else {
            self.lab.program.json(0, &["release", "web", &name]);
        }
        format!("hold or release {name}")
    }
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().map_or(default, |text| text.parse().expect("a number"))
}

#[test]
fn random_operations_agree_with_the_model() {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
    let seed = number("SNAPTREE_SEED", u64::from(clock.subsec_nanos()));
    let operations = number("SNAPTREE_OPERATIONS", 200);
    println!("repeat with: SNAPTREE_SEED={seed} SNAPTREE_OPERATIONS={operations}");
    let folder = tempfile::tempdir().expect("a folder");
    let lab = Lab::new(folder.path());
    let random = Random::new(seed);
    let mut run = Run { lab, random, named: 0, merged: 0, deferred: 0, deletes: 0, reverts: 0, roots_max: 0 };
    for number in 0..operations {
        let what = format!("seed {seed}, operation {number}: {}", run.act());
        if number % 50 == 49 {
            run.lab.forget_read();
        }
        run.lab.check(&what);
        let roots = run.lab.model.snapshots.values().filter(|snapshot| snapshot.parent.is_none()).count();
        run.roots_max = run.roots_max.max(roots);
    }
    run.lab.program.json(0, &["reconcile", "web"]);
    run.lab.forget_read();
    run.lab.check("the end");
    assert_eq!(run.lab.program.json(0, &["audit", "verify"])["ok"], true);
    println!(
        "{operations} operations: {} deletes, {} reverts, {} merges done, {} deferred, up to {} roots, {} left",
        run.deletes,
        run.reverts,
        run.merged,
        run.deferred,
        run.roots_max,
        run.lab.model.snapshots.len()
    );
    assert!(run.merged > 0 && run.reverts > 0, "the run exercised too little");
}
