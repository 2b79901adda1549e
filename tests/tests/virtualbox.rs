//! The program on the real VirtualBox. Every content is compared with what was written, by reading the images themselves.
#![cfg(feature = "lab")]
#![allow(clippy::expect_used, reason = "a test")]

use std::ops::Range;

use snaptree_tests::random::Random;
use snaptree_tests::virtualbox::is_left_out;
use snaptree_tests::virtualbox::model::{BLOCKS, Modelled};

fn one(block: usize) -> Range<usize> {
    block..block + 1
}

fn operations() -> usize {
    std::env::var("SNAPTREE_OPERATIONS").ok().and_then(|text| text.parse().ok()).unwrap_or(25)
}

#[test]
fn random_operations_on_two_disks_leave_tree_and_contents_as_the_model_has_them() {
    if is_left_out() {
        return;
    }
    let seed = std::env::var("SNAPTREE_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(7);
    println!("SNAPTREE_SEED={seed}");
    let mut random = Random::new(seed);
    let mut bench = Modelled::new(2, BLOCKS);
    for number in 0..operations() {
        let names: Vec<String> = bench.snapshots.keys().cloned().collect();
        for _ in 0..=random.below(2) {
            let (disk, block) = (random.below(bench.disks), random.below(BLOCKS));
            bench.write(disk, one(block));
        }
        match random.below(100) {
            _ if names.is_empty() => bench.create(&format!("s{number}")),
            0..45 => bench.create(&format!("s{number}")),
            45..65 => bench.revert(random.pick::<String>(&names)),
            65..92 => drop(bench.delete(random.pick::<String>(&names))),
            _ => {
                let (old, new) = (random.pick(&names).clone(), format!("'r{number}'=\"ä <&> {number}"));
                let text = format!("line 1\n\"{number}\" = <&>");
                bench.program.json(0, &["edit", "web", &old, "--name", &new, "--description", &text]);
                let (parent, content) = bench.snapshots.remove(&old).expect("it is there");
                for (above, _) in
                    bench.snapshots.values_mut().filter(|(above, _)| *above == Some(old.clone()))
                {
                    *above = Some(new.clone());
                }
                bench.current = bench.current.take().map(|name| if name == old { new.clone() } else { name });
                bench.snapshots.insert(new, (parent, content));
            }
        }
        bench.check();
    }
    assert_eq!(bench.program.json(0, &["audit", "verify"])["ok"], true);
}

#[test]
fn a_snapshot_with_three_children_is_deleted_at_once_and_merged_when_one_is_left_also_after_a_crash() {
    if is_left_out() {
        return;
    }
    let mut bench = Modelled::new(2, BLOCKS);
    bench.write(0, one(0));
    bench.write(1, one(1));
    bench.create("p");
    for (number, child) in ["a", "b", "c"].into_iter().enumerate() {
        bench.revert("p");
        bench.write(0, one(2 + number));
        bench.write(1, one(0));
        bench.create(child);
    }
    // Killed before the delete took effect, and after it, before the log knew.
    let killed =
        bench.program.with_fault("virtualbox.hide.before=kill").run(&["delete", "web", "p", "--yes"]);
    assert_eq!(killed.code, None, "{killed:?}");
    let recovered = bench.program.json(0, &["recover"]);
    assert_eq!(recovered["operations"][0]["outcome"], "succeeded", "{recovered}");
    bench.deleted("p");
    bench.check();
    assert_eq!(bench.hidden(), 1);
    let all = bench.program.run(&["tree", "web", "--all"]).stdout;
    assert!(all.contains("3 children"), "the reason is told: {all}");
    bench.create("p");
    bench.check();

    bench.delete("a");
    bench.check();
    assert_eq!(bench.hidden(), 1, "two children are left");
    // The merge that the last delete brings is killed in the middle.
    let killed =
        bench.program.with_fault("virtualbox.delete.after@2=kill").run(&["delete", "web", "b", "--yes"]);
    assert_eq!(killed.code, None, "{killed:?}");
    bench.program.json(0, &["recover"]);
    bench.deleted("b");
    bench.check();
    assert_eq!(bench.hidden(), 0, "merged into the one that is left");
}

#[test]
fn what_was_done_by_hand_is_adopted_followed_and_marked_lost() {
    if is_left_out() {
        return;
    }
    let mut bench = Modelled::new(1, BLOCKS);
    bench.vbox.must(&["snapshot", "web", "take", "first", "--description", "by hand"]);
    // A machine that has snapshots already is registered with them.
    bench.program.json(0, &["domain", "remove", "web", "--metadata"]);
    bench.program.json(0, &["domain", "add", "web", "--driver", "virtualbox", "--vm", "web"]);
    assert_eq!(bench.program.json(0, &["show", "web", "first"])["description"], "by hand");
    bench.created("first");
    bench.create("second");
    bench.vbox.must(&["snapshot", "web", "take", "third"]);
    bench.vbox.must(&["snapshot", "web", "edit", "second", "--name", "renamed"]);
    bench.write(0, one(3));
    // Taken over before anything is planned upon it.
    bench.program.json(0, &["create", "web", "fourth"]);
    let (parent, content) = bench.snapshots.remove("second").expect("it is there");
    bench.snapshots.insert("renamed".to_owned(), (parent, content.clone()));
    bench.snapshots.insert("third".to_owned(), (Some("renamed".to_owned()), content));
    bench.current = Some("third".to_owned());
    bench.created("fourth");
    bench.check();

    bench.vbox.must(&["snapshot", "web", "delete", "third"]);
    let drift = bench.program.json(5, &["drift", "web"]);
    assert_eq!(drift["domains"][0]["findings"][0]["name"], "third", "{drift}");
    assert_eq!(bench.program.json(4, &["revert", "web", "third", "--yes"])["error"]["code"], "drift");
    bench.program.json(0, &["delete", "web", "third", "--metadata"]);
    bench.deleted("third");
    bench.check();
    bench.delete("fourth");
    bench.check();
    let log = bench.program.run(&["log", "web", "--kind", "Snapshot.Edited"]).stdout;
    assert!(log.contains("engine") && log.contains("renamed"), "{log}");
}
