//! The program is killed at every named place of every kind of operation on real images; then it recovers.
//!
//! After `recover` nothing is open, the tree is the one before or the one after the operation, and everything reads as
//! that says. An operation that did not take place can then be asked for again.

#![cfg(feature = "lab")]
#![allow(clippy::expect_used, reason = "a test")]

use std::collections::BTreeMap;

use snaptree_tests::scenarios::{self, Scenario};
use snaptree_tests::scene::Scene;

/// The places. Each is tried at its first reach, its second, and so on until the operation ends before it.
const PLACES: [&str; 27] = [
    "append.before",
    "append.after",
    "qemu.adopt.begin",
    "qemu.adopt.linked",
    "qemu.adopt.locked",
    "qemu.adopt.switched",
    "qemu.adopt.renamed",
    "qemu.adopt.done",
    "qemu.switch.begin",
    "qemu.switch.prepared",
    "qemu.switch.locked",
    "qemu.switch.renamed",
    "qemu.switch.done",
    "qemu.push.begin",
    "qemu.push.pushed",
    "qemu.push.done",
    "qemu.pull.begin",
    "qemu.pull.started",
    "qemu.pull.copied",
    "qemu.pull.pulled",
    "qemu.pull.done",
    "qemu.drop.begin",
    "qemu.drop.unlinked",
    "qemu.drop.done",
    "qemu.flatten.copied",
    "qemu.place.locked",
    "qemu.place.renamed",
];

/// Kills at the n-th reach of a place. `None` if the operation ended before it came there.
fn kill_and_recover(scene: &mut Scene, place: &str, reach: usize) -> Option<()> {
    scene.begin();
    let what = format!("{}, killed at {place}@{reach}", scene.scenario.name);

    let ran = scene.lab.program.with_fault(&format!("{place}@{reach}=kill")).run(scene.scenario.command);
    if ran.code == Some(0) {
        return None;
    }
    assert_eq!(ran.code, None, "{what}: killed by a signal: {ran:?}");

    scene.scenario.recover(&mut scene.lab, &what);
    Some(())
}

/// Kills the operation at every place that it reaches; at least `least` of them.
fn kill_everywhere(scenario: Scenario, least: usize) {
    let mut scene = Scene::new(scenario);
    let mut hits = BTreeMap::new();
    for place in PLACES {
        let reached = (1..).take_while(|reach| kill_and_recover(&mut scene, place, *reach).is_some()).count();
        if reached > 0 {
            hits.insert(place, reached);
        }
    }
    let sum: usize = hits.values().sum();
    println!("{}: {sum} kills, all recovered: {hits:?}", scenario.name);
    assert!(sum >= least, "only {sum} places were reached");
}

#[test]
fn the_first_create_adopting_two_disks_recovers() {
    kill_everywhere(scenarios::FIRST_CREATE, 9);
}

#[test]
fn a_create_recovers() {
    kill_everywhere(scenarios::CREATE, 9);
}

#[test]
fn a_revert_recovers() {
    kill_everywhere(scenarios::REVERT, 9);
}

#[test]
fn a_delete_with_several_dependants_recovers() {
    kill_everywhere(scenarios::DELETE_SEVERAL, 9);
}

#[test]
fn a_delete_with_one_dependant_recovers() {
    kill_everywhere(scenarios::DELETE_ONE, 9);
}

#[test]
fn a_delete_of_the_root_pushed_into_the_registered_image_recovers() {
    kill_everywhere(scenarios::DELETE_ROOT, 9);
}

#[test]
fn a_delete_of_a_branch_with_several_tombstones_in_a_row_recovers() {
    kill_everywhere(scenarios::DELETE_BRANCH, 9);
}

#[test]
fn a_delete_of_the_current_one_recovers() {
    kill_everywhere(scenarios::DELETE_CURRENT, 9);
}

/// Letting go of the domain with `--flatten`: one plain image at each path, whenever it was killed.
#[test]
fn a_removal_with_flatten_recovers() {
    let mut kills = 0;
    let args = ["domain", "remove", "web", "--flatten", "--yes"];
    let mut scene = Scene::new(scenarios::CREATE);
    for place in PLACES {
        for reach in 1.. {
            scene.begin();
            let lab = &mut scene.lab;
            let what = format!("removal, killed at {place}@{reach}");
            let ran = lab.program.with_fault(&format!("{place}@{reach}=kill")).run(&args);
            if ran.code == Some(0) {
                break;
            }
            assert_eq!(ran.code, None, "{what}: {ran:?}");
            kills += 1;
            lab.program.json(0, &["recover"]);
            lab.check_machine(&what);
            if lab.program.json(0, &["domain", "list"])["domains"] != serde_json::json!([]) {
                lab.check(&what);
                lab.program.json(0, &args);
            }
            lab.check_machine(&what);
            assert!(lab.paths.values().all(|path| !path.is_symlink()), "{what}: a plain image");
            assert!(!lab.layers.exists(), "{what}: the layers folder is gone");
        }
    }
    println!("removal with --flatten: {kills} kills, all recovered");
    assert!(kills > 10, "only {kills} places were reached");
}
