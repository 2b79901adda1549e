//! The simulated hypervisor, through the `Driver` trait, as the engine would drive it.

#![allow(clippy::unwrap_used, reason = "these are tests")]

mod bench;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};
use snaptree_drivers::sim::{BLOCKS, DISK_BYTES, Profile, SimDriver};
use snaptree_engine::domain::RunState;
use snaptree_engine::driver::{Driver, ErrorClass, Resolution};
use snaptree_engine::event::{
    DeleteWhat, MemoryKind, MergeStarted, RequestTerms, SnapshotCreateRequested, SnapshotRevertRequested,
    UnregisterWish,
};
use snaptree_engine::operation::{Code, Poison, Request, Reversal};
use snaptree_engine::reconcile::merge::{MergeAction, MergePlan};
use snaptree_engine::tree::SnapshotState;
use snaptree_engine::{DiskName, LayerId, OperationId, SnapshotId};
use uuid::Uuid;

use bench::{Bench, Planned, create, delete, fresh, now, probe, revert, run, seen_tree, unregister, vda};

#[test]
fn survivors_keep_their_contents() {
    let mut bench = Bench::new();
    bench.write(0, 1);
    let a = bench.create("a");
    bench.write(0, 2);
    let b = bench.create("b");
    bench.write(1, 3);
    bench.carry(revert(a));
    assert_eq!(bench.content(), bench.content_of(a));
    bench.write(2, 4);
    let c = bench.create("c");
    let before = [bench.content_of(b), bench.content_of(c), bench.content()];
    assert_eq!(seen_tree(&bench.observe()), [(Some(a), None), (Some(b), Some(a)), (Some(c), Some(a))]);

    bench.carry(delete(&[a], DeleteWhat::Snapshot));
    assert_eq!([bench.content_of(b), bench.content_of(c), bench.content()], before);
    assert_eq!(seen_tree(&bench.observe()), [(Some(b), None), (Some(c), None)]);
    bench.carry(revert(b));
    assert_eq!(bench.content(), before[0]);
    let gone = bench.driver.snapshot_sha256(&bench.state, a, &vda()).unwrap_err();
    assert_eq!(gone.failure.code, Code::Drift);
}

#[test]
fn children_and_parents_go_one_by_one() {
    let mut bench = Bench::new();
    let (a, b) = (bench.create("a"), bench.create("b"));
    let planned = bench.plan(delete(&[b, a], DeleteWhat::Snapshot)).unwrap();
    let shape: Vec<_> = planned.steps.iter().map(|step| (step.reversal, step.poison.clone())).collect();
    assert_eq!(
        shape,
        [
            (Reversal::PointOfNoReturn, Poison::AtFinish(vec![b])),
            (Reversal::ForwardOnly, Poison::AtFinish(vec![a])),
        ]
    );
    bench.carry(delete(&[b, a], DeleteWhat::Snapshot));
    let seen = bench.observe();
    assert!(seen.snapshots.is_empty() && seen.current.is_none());
}

#[test]
fn a_content_is_what_the_disk_reads_as() {
    let bench = Bench::new();
    let empty = bench.content();
    bench.write(7, 9);
    assert_ne!(bench.content(), empty);
    bench.write(7, 0);
    assert_eq!(bench.content(), empty);
    let outside = bench.driver.write(&bench.state, &vda(), BLOCKS, 1).unwrap_err();
    assert_eq!(outside.failure.code, Code::Invalid);
    let sdz = DiskName::new("sdz").unwrap();
    assert_eq!(bench.driver.write(&bench.state, &sdz, 0, 1).unwrap_err().failure.code, Code::NotFound);
}

#[test]
fn memory_and_run_state_come_back() {
    let mut bench = Bench::new();
    bench.driver.power(&bench.state, RunState::Running).unwrap();
    bench.write(0, 1);
    let request = create("running");
    let running = request.snapshot;
    let learnt = bench.carry(Request::Create(request))[0].learnt.clone();
    assert_eq!(learnt, json!({"taken": now().to_string(), "state": "running", "native": "1"}));
    bench.write(0, 2);
    let mut request = create("disks");
    request.memory = MemoryKind::No;
    let disks = request.snapshot;
    bench.carry(Request::Create(request));
    assert_eq!(bench.state.tree.get(disks).unwrap().state, SnapshotState::DiskSnapshot);

    bench.carry(revert(running));
    assert_eq!(bench.observe().run_state, RunState::Running);
    assert_eq!(bench.driver.memory(&bench.state).unwrap(), Some(1));
    bench.carry(revert(disks));
    assert_eq!(bench.observe().run_state, RunState::Off);
    assert_eq!(bench.driver.memory(&bench.state).unwrap(), None);
    let mut paused = SnapshotRevertRequested {
        snapshot: running,
        run_state: Some(RunState::Paused),
        keep: None,
        request: RequestTerms::default(),
    };
    bench.carry(Request::Revert(paused.clone()));
    assert_eq!(bench.observe().run_state, RunState::Paused);
    assert_eq!(bench.driver.memory(&bench.state).unwrap(), Some(1));
    paused.snapshot = disks;
    bench.carry(Request::Revert(paused));
    assert_eq!(bench.driver.memory(&bench.state).unwrap(), Some(0), "it boots with an empty memory");
}

#[test]
fn disks_that_a_snapshot_does_not_hold_stay() {
    let mut bench = Bench::with(Value::Null, &[("vda", ""), ("vdb", "")]);
    let vdb = DiskName::new("vdb").unwrap();
    let a = bench.create("only vda");
    bench.write(0, 1);
    bench.driver.write(&bench.state, &vdb, 0, 1).unwrap();
    let kept = bench.driver.content_sha256(&bench.state, &vdb).unwrap();
    bench.carry(revert(a));
    assert_eq!(bench.content(), bench.content_of(a));
    assert_eq!(bench.driver.content_sha256(&bench.state, &vdb).unwrap(), kept);
    assert!(bench.driver.snapshot_sha256(&bench.state, a, &vdb).is_err());
}

/// Every kind of step, on a machine with a snapshot, and the word in the names of its hooks.
fn every_step(snapshot: SnapshotId) -> [(Request, &'static str); 5] {
    [
        (Request::Create(create("new")), "create"),
        (revert(snapshot), "revert"),
        (delete(&[snapshot], DeleteWhat::Snapshot), "delete"),
        (delete(&[snapshot], DeleteWhat::Metadata), "forget"),
        (unregister(UnregisterWish::Flatten), "flatten"),
    ]
}

#[test]
fn a_step_killed_after_its_effect_is_done_and_never_done_twice() {
    for index in 0..5 {
        let mut bench = Bench::new();
        let a = bench.create("a");
        bench.write(0, 1);
        let (request, word) = every_step(a)[index].clone();
        let planned = bench.plan(request).unwrap();
        bench.execute_killed_at(&planned, 0, &format!("sim.{word}.after"));
        let Resolution::Done(report) = bench.resolve(&planned, 0) else { panic!("{word} is done") };
        // The guest goes on, which must not hide what became of the step.
        bench.write(5, 5);
        let (seen, content) = (bench.observe().snapshots, bench.content());
        assert_eq!(bench.resolve(&planned, 0), Resolution::Done(report.clone()), "{word}");
        assert_eq!(bench.execute(&planned, 0).unwrap(), report, "{word}");
        assert_eq!((bench.observe().snapshots, bench.content()), (seen, content), "{word}");
    }
}

#[test]
fn a_step_killed_before_its_effect_is_not_done() {
    for index in 0..5 {
        let mut bench = Bench::new();
        let a = bench.create("a");
        bench.write(0, 1);
        let before = fs::read(bench.file()).unwrap();
        let (request, word) = every_step(a)[index].clone();
        let planned = bench.plan(request).unwrap();
        bench.execute_killed_at(&planned, 0, &format!("sim.{word}.before"));
        assert_eq!(bench.resolve(&planned, 0), Resolution::NotDone, "{word}");
        assert_eq!(fs::read(bench.file()).unwrap(), before, "{word}");
        bench.undo(&planned).unwrap();
        assert_eq!(fs::read(bench.file()).unwrap(), before, "{word}: there was nothing to take back");
        bench.execute(&planned, 0).unwrap();
        assert!(matches!(bench.resolve(&planned, 0), Resolution::Done(_)), "{word}");
    }
}

#[test]
fn the_first_step_ever_is_resolved_too() {
    for (place, done) in [("sim.create.before", false), ("sim.create.after", true)] {
        let bench = Bench::new();
        let planned = bench.plan(Request::Create(create("a"))).unwrap();
        bench.execute_killed_at(&planned, 0, place);
        assert_eq!(matches!(bench.resolve(&planned, 0), Resolution::Done(_)), done, "{place}");
        bench.undo(&planned).unwrap();
        assert!(bench.observe().snapshots.is_empty());
    }
}

#[test]
fn a_create_is_taken_back_and_the_guest_keeps_its_writes() {
    let mut bench = Bench::new();
    let a = bench.create("a");
    let before = bench.observe();
    let planned = bench.plan(Request::Create(create("b"))).unwrap();
    bench.execute(&planned, 0).unwrap();
    bench.write(0, 1);
    let written = bench.content();
    for _ in 0..2 {
        bench.undo(&planned).unwrap();
        let seen = bench.observe();
        assert_eq!((seen.snapshots, seen.current), (before.snapshots.clone(), before.current.clone()));
        assert_eq!(bench.content(), written);
        assert_eq!(bench.resolve(&planned, 0), Resolution::NotDone);
    }
    let planned = bench.plan(revert(a)).unwrap();
    bench.execute(&planned, 0).unwrap();
    let refused = bench.undo(&planned).unwrap_err();
    assert_eq!((refused.class, refused.failure.code), (ErrorClass::Permanent, Code::Invalid));
}

#[test]
fn a_forgotten_snapshot_stays_and_flatten_leaves_it() {
    let mut bench = Bench::new();
    let (a, b) = (bench.create("a"), bench.create("b"));
    bench.write(0, 1);
    let content = bench.content();
    bench.carry(delete(&[a], DeleteWhat::Metadata));
    assert_eq!(seen_tree(&bench.observe()), [(Some(a), None), (Some(b), Some(a))]);
    let planned = bench.plan(unregister(UnregisterWish::Flatten)).unwrap();
    assert_eq!(planned.steps.len(), 1);
    assert_eq!(planned.steps[0].poison, Poison::AtFinish(vec![b]));
    bench.carry(unregister(UnregisterWish::Flatten));
    assert_eq!(seen_tree(&bench.observe()), [(Some(a), None)]);
    assert_eq!(bench.content(), content);
    for wish in [UnregisterWish::Flatten, UnregisterWish::Untouched, UnregisterWish::KeepLayers] {
        assert!(bench.plan(unregister(wish)).unwrap().steps.is_empty());
    }
}

#[test]
fn a_broken_precondition_is_refused() {
    fn refused(bench: &Bench, request: Request, code: Code) {
        let Err(failure) = bench.plan(request) else { panic!("not refused") };
        assert_eq!((failure.code, failure.refused), (code, true), "{failure}");
    }
    let mut bench = Bench::with(json!({"profile": "virtualbox"}), &[]);
    let a = bench.create("a");
    refused(&bench, Request::Create(create("a")), Code::Exists);
    refused(&bench, Request::Create(SnapshotCreateRequested { snapshot: a, ..create("x") }), Code::Drift);
    refused(&bench, revert(fresh()), Code::NotFound);
    let layer = LayerId::new(&vda(), OperationId::from_uuid(Uuid::now_v7()));
    let actions = vec![MergeAction::Drop { disk: vda(), layer }];
    let merge = MergePlan { actions, ..MergePlan::default() };
    refused(&bench, Request::Merge(MergeStarted { plan: merge }), Code::Unsupported);
    bench.driver.power(&bench.state, RunState::Running).unwrap();
    let disks_only = SnapshotCreateRequested { memory: MemoryKind::No, ..create("x") };
    refused(&bench, Request::Create(disks_only), Code::Unsupported);

    bench.state.domain.as_mut().unwrap().capabilities.depth_max = 1;
    refused(&bench, Request::Create(create("deep")), Code::Unsupported);
    bench.state.domain.as_mut().unwrap().capabilities.name_bytes_max = 4;
    refused(&bench, Request::Create(create("longer")), Code::Invalid);

    bench.edit(|machine| machine["snapshots"][0]["mark"] = Value::Null);
    refused(&bench, revert(a), Code::Drift);
    refused(&bench, delete(&[a], DeleteWhat::Snapshot), Code::Drift);
    bench.carry(delete(&[a], DeleteWhat::Metadata));
    assert!(bench.state.tree.is_empty());
}

#[test]
fn a_lost_machine_is_drift_and_only_letting_go_is_left() {
    let mut bench = Bench::new();
    let a = bench.create("a");
    let planned = bench.plan(revert(a)).unwrap();
    fs::remove_file(bench.file()).unwrap();
    for (request, word) in every_step(a) {
        let Err(failure) = bench.plan(request) else { panic!("{word} was planned") };
        assert_eq!((failure.code, failure.refused), (Code::Drift, true), "{word}");
    }
    assert_eq!(bench.execute(&planned, 0).unwrap_err().failure.code, Code::Drift);
    assert!(matches!(bench.resolve(&planned, 0), Resolution::HalfDone(_)));
    assert!(bench.driver.write(&bench.state, &vda(), 0, 1).is_err());
    assert!(!bench.file().exists());
    assert!(bench.plan(unregister(UnregisterWish::KeepLayers)).unwrap().steps.is_empty());
}

#[test]
fn a_damaged_machine_file_is_an_error_and_stays_as_it_is() {
    let mut bench = Bench::new();
    bench.write(0, 1);
    let (a, _) = (bench.create("a"), bench.create("b"));
    let planned = bench.plan(revert(a)).unwrap();
    let sound = fs::read(bench.file()).unwrap();
    let edited = |change: fn(&mut Value)| {
        let mut machine = serde_json::from_slice(&sound).unwrap();
        change(&mut machine);
        machine.to_string().into_bytes()
    };
    let damaged: [(&str, Vec<u8>); 12] = [
        ("EOF while parsing a value", vec![]),
        ("expected value", b"\x00\xff{".to_vec()),
        ("EOF while parsing", sound[..sound.len() / 2].to_vec()),
        ("invalid type", "[".repeat(100_000).into_bytes()),
        ("unknown field `colour`", edited(|m| m["colour"] = json!("red"))),
        ("unknown variant `on fire`", edited(|m| m["power"] = json!({"state": "on fire"}))),
        ("does not stand before it", edited(|m| m["snapshots"][0]["parent"] = json!(2))),
        ("used twice", edited(|m| (m["snapshots"][1]["native"], m["current"]) = (json!(1), json!(1)))),
        ("another one's mark", edited(|m| m["snapshots"][1]["mark"] = m["snapshots"][0]["mark"].clone())),
        ("current snapshot does not exist", edited(|m| m["current"] = json!(77))),
        ("no snapshot ids are left", edited(|m| m["next-native"] = json!(u64::MAX))),
        ("blocks outside", edited(|m| m["disks"]["vda"]["1024"] = json!(1))),
    ];
    for (why, bytes) in damaged {
        fs::write(bench.file(), &bytes).unwrap();
        check_refused(&bench, &planned, why);
        assert!(fs::read(bench.file()).unwrap() == bytes, "{why}: the file was touched");
    }
    let file = fs::File::create(bench.file()).unwrap();
    file.set_len(1 << 40).unwrap();
    check_refused(&bench, &planned, "larger than");
    assert_eq!(file.metadata().unwrap().len(), 1 << 40);
    fs::write(bench.file(), &sound).unwrap();
    bench.execute(&planned, 0).unwrap();
}

fn check_refused(bench: &Bench, planned: &Planned, why: &str) {
    for error in [
        run(bench.driver.observe(&bench.state)).unwrap_err(),
        bench.execute(planned, 0).unwrap_err(),
        bench.undo(planned).unwrap_err(),
        bench.driver.write(&bench.state, &vda(), 0, 2).unwrap_err(),
    ] {
        assert_eq!((error.class, error.failure.code), (ErrorClass::Permanent, Code::BadImage), "{error}");
        let path = bench.file().display().to_string();
        let message = &error.failure.message;
        assert!(message.contains(&path) && message.contains(why), "{message}: expected '{why}'");
    }
}

#[test]
fn a_machine_without_the_domains_disks_is_drift() {
    let bench = Bench::new();
    bench.write(0, 1);
    bench.edit(|machine| machine["disks"] = json!({}));
    assert_eq!(run(bench.driver.observe(&bench.state)).unwrap_err().failure.code, Code::Drift);
}

#[test]
fn looking_changes_nothing_and_leftovers_do_no_harm() {
    let bench = Bench::new();
    let seen = bench.observe();
    assert_eq!((seen.run_state, seen.snapshots.len(), seen.current), (RunState::Off, 0, None));
    bench.plan(Request::Create(create("a"))).unwrap();
    bench.content();
    assert_eq!(fs::read_dir(bench.dir.path()).unwrap().count(), 0);
    bench.write(0, 1);
    fs::write(bench.file().with_extension("json.tmp"), "half a mach").unwrap();
    bench.write(0, 2);
    let left: Vec<_> = fs::read_dir(bench.dir.path().join("sim")).unwrap().collect();
    assert_eq!(left.len(), 2, "the machine and its lock: {left:?}");
}

#[test]
fn writers_at_once_lose_nothing() {
    let bench = Bench::new();
    std::thread::scope(|scope| {
        for writer in 0..4 {
            let (driver, state) = (SimDriver::new(bench.dir.path().to_owned()), &bench.state);
            scope.spawn(move || {
                (0..10).for_each(|block| driver.write(state, &vda(), writer * 10 + block, 1).unwrap());
            });
        }
    });
    let machine: Value = serde_json::from_slice(&fs::read(bench.file()).unwrap()).unwrap();
    assert_eq!(machine["disks"]["vda"].as_object().unwrap().len(), 40);
}

#[test]
fn registering_takes_names_and_no_paths() {
    let found = probe(Value::Null, &[]).unwrap();
    assert_eq!(found.disks.len(), 1);
    assert_eq!(found.disks[0].name, vda());
    assert_eq!(
        (found.disks[0].path.as_deref(), found.disks[0].virtual_size_bytes),
        (None::<&Path>, DISK_BYTES)
    );
    assert_eq!(found.config, json!({"profile": "default"}));
    assert_eq!(probe(json!({}), &[("sda", ""), ("sdb", "")]).unwrap().disks.len(), 2);

    let code = |options, disks: &[(&str, &str)]| probe(options, disks).unwrap_err().failure.code;
    assert_eq!(code(Value::Null, &[("vda", "/images/web.qcow2")]), Code::Unsupported);
    assert_eq!(code(Value::Null, &[("vda", ""), ("vda", "")]), Code::Invalid);
    assert_eq!(code(json!({"profile": "bhyve"}), &[]), Code::Invalid);
    assert_eq!(code(json!({"colour": "red"}), &[]), Code::Invalid);
    assert_eq!(code(json!([1]), &[]), Code::Invalid);
}

#[test]
fn a_profile_sets_the_capabilities() {
    for (word, profile) in [
        ("default", Profile::Default),
        ("qemu", Profile::Qemu),
        ("virtualbox", Profile::Virtualbox),
        ("esx", Profile::Esx),
        ("libvirt-test", Profile::LibvirtTest),
    ] {
        let can = probe(json!({"profile": word}), &[]).unwrap().capabilities;
        assert_eq!(can, profile.capabilities(), "{word}");
        // QEMU's deletes only mark, and the engine merges.
        let merges_itself = profile != Profile::Qemu;
        assert_eq!((can.merges_itself, can.metadata_only), (merges_itself, merges_itself), "{word}");
        assert!(can.memory, "{word}");
        let limited = matches!(profile, Profile::Virtualbox | Profile::Esx);
        assert_eq!((can.children_only, can.disk_selection), (!limited, !limited), "{word}");
        assert_eq!(can.disk_only, profile != Profile::Virtualbox, "{word}");
    }
}

/// What may happen to a machine, snapshots by their place among those that live.
#[derive(Clone, Debug)]
enum Act {
    Write(u64, u64),
    Create,
    Revert(prop::sample::Index),
    Delete(prop::sample::Index),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        3 => (0..4u64, 0..4u64).prop_map(|(block, value)| Act::Write(block, value)),
        3 => Just(Act::Create),
        1 => any::<prop::sample::Index>().prop_map(Act::Revert),
        1 => any::<prop::sample::Index>().prop_map(Act::Delete),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// A snapshot's content never changes, and the hypervisor's tree is the log's.
    #[test]
    fn contents_and_tree_hold(acts in prop::collection::vec(act(), 1..24)) {
        let mut bench = Bench::new();
        let mut contents: BTreeMap<SnapshotId, String> = BTreeMap::new();
        for (index, act) in acts.into_iter().enumerate() {
            let live: Vec<SnapshotId> = contents.keys().copied().collect();
            match act {
                Act::Write(block, value) => bench.write(block, value),
                Act::Create => {
                    let content = bench.content();
                    contents.insert(bench.create(&format!("s{index}")), content);
                }
                Act::Revert(at) if !live.is_empty() => {
                    bench.carry(revert(*at.get(&live)));
                    prop_assert_eq!(&bench.content(), &contents[at.get(&live)]);
                }
                Act::Delete(at) if !live.is_empty() => {
                    contents.remove(at.get(&live));
                    bench.carry(delete(&[*at.get(&live)], DeleteWhat::Snapshot));
                }
                Act::Revert(_) | Act::Delete(_) => {}
            }
            for (snapshot, content) in &contents {
                prop_assert_eq!(&bench.content_of(*snapshot), content);
            }
            let seen = bench.observe();
            let ours: BTreeMap<_, _> = seen_tree(&seen).into_iter().collect();
            let logged = bench.state.tree.iter().map(|s| (Some(s.id), s.parent)).collect();
            prop_assert_eq!(ours, logged);
            let current = seen.snapshots.iter().find(|s| Some(&s.native) == seen.current.as_ref());
            prop_assert_eq!(current.and_then(|s| s.id), bench.state.tree.current().map(|s| s.id));
        }
    }
}
