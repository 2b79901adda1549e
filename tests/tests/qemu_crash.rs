//! The program is killed at every named place of every kind of operation on real images; then it recovers.
//!
//! After `recover` nothing is open, the tree is the one before or the one after the operation, and everything reads as
//! that says. An operation that did not take place can then be asked for again.

#![cfg(feature = "lab")]
#![allow(clippy::expect_used, reason = "a test")]

use snaptree_tests::lab::{DISKS, Lab, Model};

/// The places, by the prefix of their names. Each is tried at its first reach, its second, and so on.
const PLACES: [&str; 17] = [
    "append.before",
    "append.after",
    "qemu.adopt.begin",
    "qemu.adopt.linked",
    "qemu.adopt.switched",
    "qemu.adopt.renamed",
    "qemu.switch.begin",
    "qemu.switch.locked",
    "qemu.switch.renamed",
    "qemu.push.begin",
    "qemu.push.done",
    "qemu.pull.begin",
    "qemu.pull.done",
    "qemu.drop.begin",
    "qemu.drop.unlinked",
    "qemu.flatten.done",
    "qemu.place.renamed",
];

/// One kind of operation: what stands before it, the command, and what the model says of it.
struct Scenario {
    name: &'static str,
    prepare: fn(&mut Lab),
    command: &'static [&'static str],
    apply: fn(&mut Model),
}

fn snapshot(lab: &mut Lab, name: &str, pattern: u8) {
    lab.write("vda", usize::from(pattern) % 64, 12, pattern);
    lab.write("vdb", usize::from(pattern) % 64, 5, pattern);
    lab.program.json(0, &["create", "web", name]);
    lab.model.create(name, &DISKS);
}

/// a <- b <- c, and b <- d; the machine stands on d.
fn branched(lab: &mut Lab) {
    snapshot(lab, "a", 1);
    snapshot(lab, "b", 2);
    snapshot(lab, "c", 3);
    lab.program.json(0, &["revert", "web", "b"]);
    lab.model.revert("b");
    snapshot(lab, "d", 4);
    lab.write("vda", 9, 3, 99);
}

fn chain(lab: &mut Lab) {
    snapshot(lab, "a", 1);
    snapshot(lab, "b", 2);
    snapshot(lab, "c", 3);
    lab.write("vda", 1, 40, 98);
}

const SCENARIOS: [Scenario; 8] = [
    Scenario {
        name: "first create, adopting two disks",
        prepare: |lab| lab.write("vda", 0, 4, 7),
        command: &["create", "web", "new"],
        apply: |model| model.create("new", &DISKS),
    },
    Scenario {
        name: "create",
        prepare: branched,
        command: &["create", "web", "new"],
        apply: |model| model.create("new", &DISKS),
    },
    Scenario {
        name: "revert",
        prepare: branched,
        command: &["revert", "web", "a"],
        apply: |model| model.revert("a"),
    },
    Scenario {
        name: "delete with several dependants",
        prepare: branched,
        command: &["delete", "web", "b"],
        apply: |model| model.delete("b"),
    },
    Scenario {
        name: "delete with one dependant",
        prepare: chain,
        command: &["delete", "web", "b"],
        apply: |model| model.delete("b"),
    },
    Scenario {
        name: "delete of the root, pushed into the registered image",
        prepare: chain,
        command: &["delete", "web", "a"],
        apply: |model| model.delete("a"),
    },
    Scenario {
        name: "delete of a whole branch, several tombstones in a row",
        prepare: chain,
        command: &["delete", "web", "a", "--children"],
        apply: |model| ["c", "b", "a"].iter().for_each(|name| model.delete(name)),
    },
    Scenario {
        name: "delete of the current one",
        prepare: branched,
        command: &["delete", "web", "d"],
        apply: |model| model.delete("d"),
    },
];

/// Kills at the n-th reach of a place. `None` if the operation ended before it came there.
fn kill_and_recover(scenario: &Scenario, place: &str, reach: usize) -> Option<()> {
    let folder = tempfile::tempdir().expect("a folder");
    let mut lab = Lab::new(folder.path());
    (scenario.prepare)(&mut lab);
    let what = format!("{}, killed at {place}@{reach}", scenario.name);

    let ran = lab.program.with_fault(&format!("{place}@{reach}=kill")).run(scenario.command);
    if ran.code == Some(0) {
        return None;
    }
    assert_eq!(ran.code, None, "{what}: killed by a signal: {ran:?}");

    let recovered = lab.program.json(0, &["recover"]);
    let open = lab.program.json(0, &["op", "list"]);
    for operation in open["operations"].as_array().expect("operations") {
        assert!(operation["outcome"].is_string(), "{what}: {operation} after {recovered}");
        assert_ne!(operation["outcome"], "needs-attention", "{what}: {operation}");
    }
    let mut after = lab.model.clone();
    (scenario.apply)(&mut after);
    if lab.tree_is(&after) {
        lab.model = after;
        lab.check(&what);
    } else {
        lab.check(&what);
        lab.program.json(0, scenario.command);
        (scenario.apply)(&mut lab.model);
        lab.check(&format!("{what}, asked for again"));
    }
    assert_eq!(lab.program.json(0, &["audit", "verify"])["ok"], true, "{what}");
    // And life goes on.
    snapshot(&mut lab, "afterwards", 50);
    lab.check(&format!("{what}, a snapshot afterwards"));
    Some(())
}

#[test]
fn killed_at_every_place_of_every_operation_it_recovers() {
    let mut hits = std::collections::BTreeMap::new();
    for scenario in &SCENARIOS {
        for place in PLACES {
            let reached =
                (1..).take_while(|reach| kill_and_recover(scenario, place, *reach).is_some()).count();
            *hits.entry(place).or_insert(0) += reached;
        }
    }
    println!("kills by place: {hits:?}; {} in all", hits.values().sum::<usize>());
    assert!(hits["append.after"] > 20 && hits["qemu.switch.locked"] > 0 && hits["qemu.switch.renamed"] > 0);
}
