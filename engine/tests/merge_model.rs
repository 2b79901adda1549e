//! Whatever the merge planner decides, no content that anyone still needs changes.
//!
//! The model keeps the content of every layer as a map from block to value. It carries out the planner's actions as
//! their definitions say, and compares what every live snapshot and the machine read before and after.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::{History, at, disk, snapshot_id, uuid};
use proptest::prelude::*;
use snaptree_engine::domain::RunState;
use snaptree_engine::driver::{FileFacts, Observation, Room};
use snaptree_engine::event::MergeWish;
use snaptree_engine::layer::{FileStamp, Layer, LayerChange, Role};
use snaptree_engine::reconcile::merge::{MergeAction, MergePolicy, PutOff, Verdict, verdicts};
use snaptree_engine::reconcile::space::{Frees, Occupied, growth_bytes};
use snaptree_engine::{LayerId, OperationId, SnapshotId};

type Blocks = BTreeMap<u8, u32>;

struct Model {
    history: History,
    blocks: BTreeMap<LayerId, Blocks>,
    next: u128,
    value: u32,
    policy: MergePolicy,
    room: Option<Room>,
    run_state: RunState,
}

/// What a block occupies.
const BLOCK_BYTES: u64 = 65_536;

#[derive(Clone, Debug)]
enum Act {
    Write(u8),
    Create,
    Revert(usize),
    Delete(usize),
    Merge,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        4 => any::<u8>().prop_map(|block| Act::Write(block % 8)),
        4 => Just(Act::Create),
        2 => any::<usize>().prop_map(Act::Revert),
        4 => any::<usize>().prop_map(Act::Delete),
        2 => Just(Act::Merge),
    ];
    prop::collection::vec(act, 1..60)
}

impl Model {
    fn new() -> Self {
        let policy = MergePolicy { copy_bytes_max: 200_000, put_off: PutOff::Leave, margin_bytes: 0 };
        let (history, blocks) = (History::new(&["vda"]), BTreeMap::new());
        let mut model =
            Self { history, blocks, next: 0, value: 0, policy, room: None, run_state: RunState::Off };
        let image = model.fresh_layer();
        model.blocks.insert(image.clone(), Blocks::new());
        let facts = model.layer(&image, None, true);
        model.change(vec![
            LayerChange::Added { disk: disk("vda"), layer: image.clone(), facts },
            LayerChange::Activated { disk: disk("vda"), layer: image },
        ]);
        model
    }

    fn fresh_layer(&mut self) -> LayerId {
        self.next += 1;
        LayerId::new(&disk("vda"), OperationId::from_uuid(uuid(self.next)))
    }

    fn layer(&self, id: &LayerId, parent: Option<LayerId>, registered: bool) -> Layer {
        let file = PathBuf::from(format!("/l/{id}.qcow2"));
        let (mode, virtual_size_bytes) = (0o644, 1 << 20);
        Layer { file, parent, snapshot: None, mode, virtual_size_bytes, registered, stamp: None }
    }

    fn change(&mut self, changes: Vec<LayerChange>) {
        changes.iter().for_each(|change| self.history.state.layers.apply(change));
    }

    fn active(&self) -> LayerId {
        self.history.state.layers.disks[&disk("vda")].active.clone().unwrap()
    }

    fn read(&self, layer: &LayerId) -> Blocks {
        let layers = &self.history.state.layers.disks[&disk("vda")];
        let mut content = Blocks::new();
        for id in layers.chain(layer).into_iter().rev() {
            content.extend(self.blocks[id].iter());
        }
        content
    }

    /// What every live snapshot and the machine read.
    fn contents(&self) -> BTreeMap<Option<SnapshotId>, Blocks> {
        let layers = &self.history.state.layers.disks[&disk("vda")];
        layers
            .layers
            .keys()
            .filter_map(|id| match layers.role(id, &self.history.state.tree) {
                Role::Active => Some((None, self.read(id))),
                Role::Frozen(snapshot) => Some((Some(snapshot), self.read(id))),
                Role::Tombstone(_) => None,
            })
            .collect()
    }

    fn overlay(&mut self, on: &LayerId) -> Vec<LayerChange> {
        let id = self.fresh_layer();
        self.blocks.insert(id.clone(), Blocks::new());
        let facts = self.layer(&id, Some(on.clone()), false);
        vec![
            LayerChange::Added { disk: disk("vda"), layer: id.clone(), facts },
            LayerChange::Activated { disk: disk("vda"), layer: id },
        ]
    }

    fn create(&mut self) {
        let frozen = self.active();
        self.next += 1;
        let n = self.next;
        let mut changes = self.overlay(&frozen);
        let stamp = FileStamp { inode: 1, size_bytes: 1, mtime_ns: 1 };
        changes.push(LayerChange::Frozen {
            disk: disk("vda"),
            layer: frozen,
            snapshot: snapshot_id(n),
            stamp,
        });
        self.history.create(n, &format!("s{n}"), changes);
    }

    fn pick(&self, index: usize) -> Option<u128> {
        let ids: Vec<SnapshotId> = self.history.state.tree.iter().map(|snapshot| snapshot.id).collect();
        let id = ids.get(index.checked_rem(ids.len())?)?;
        Some(id.as_uuid().as_u128() - uuid(0).as_u128())
    }

    fn revert(&mut self, n: u128) {
        let old = self.active();
        let target =
            self.history.state.layers.disks[&disk("vda")].layer_of(snapshot_id(n)).unwrap().0.clone();
        let mut changes = self.overlay(&target);
        changes.push(LayerChange::Dropped { disk: disk("vda"), layer: old.clone() });
        self.blocks.remove(&old);
        self.history.revert(n, changes);
    }

    fn observation(&self) -> Observation {
        let layers = &self.history.state.layers.disks[&disk("vda")];
        let facts = |id: &LayerId| FileFacts {
            stamp: FileStamp { inode: 1, size_bytes: 1, mtime_ns: 1 },
            mode: 0o444,
            allocated_bytes: self.bytes(id),
            backing: None,
            virtual_size_bytes: 1 << 20,
            internal_snapshots: 0,
        };
        Observation {
            at: at(0),
            run_state: self.run_state,
            in_use: vec![],
            files: layers.layers.iter().map(|(id, layer)| (layer.file.clone(), facts(id))).collect(),
            unreadable: BTreeMap::new(),
            memory: BTreeMap::new(),
            foreign_dependants: BTreeMap::new(),
            disks: None,
            inside: BTreeMap::new(),
            generation: None,
            room: self.room.clone(),
            snapshots: vec![],
            current: None,
            detail: serde_json::Value::Null,
        }
    }

    fn verdicts(&self) -> Vec<Verdict> {
        verdicts(&self.history.state, &self.observation(), self.policy)
    }

    fn bytes(&self, id: &LayerId) -> u64 {
        self.blocks[id].len() as u64 * BLOCK_BYTES
    }

    fn all_bytes(&self) -> u64 {
        self.blocks.keys().map(|id| self.bytes(id)).sum()
    }

    fn frees(&self, snapshot: SnapshotId) -> Frees {
        let seen = self.observation();
        let allocated = |file: &Path| seen.files.get(file).map(|facts| facts.allocated_bytes);
        Occupied::new(&self.history.state, allocated).frees(&[snapshot]).expect("every layer can be seen")
    }

    /// Carries out merges until none is left.
    fn merge(&mut self) {
        for _ in 0..200 {
            let plan = self.verdicts().into_iter().find_map(|verdict| match verdict {
                Verdict::Merge(plan) => Some(plan),
                Verdict::Defer { .. } => None,
            });
            let Some(plan) = plan else { return };
            let tombstones = self.history.state.tombstones.len();
            let foreseen = growth_bytes(&plan.actions, &self.history.state.layers, &self.observation());
            let grown: u64 = plan.actions.iter().map(|action| self.act(action)).sum();
            assert!(grown <= foreseen, "it grew by {grown} and not by {foreseen} at most: {plan:?}");
            // What the projector does with a finished step: tombstones without data end.
            let held: Vec<SnapshotId> = self.history.state.layers.disks[&disk("vda")]
                .layers
                .values()
                .filter_map(|layer| layer.snapshot)
                .collect();
            self.history.state.tombstones.retain(|id, _| held.contains(id));
            assert!(
                self.history.state.tombstones.len() < tombstones,
                "a merge must end a tombstone: {plan:?}"
            );
        }
        panic!("the merges never end");
    }

    /// Carries an action out; says how much the layers that took data grew by.
    fn act(&mut self, action: &MergeAction) -> u64 {
        let registered =
            |model: &Self, id: &LayerId| model.history.state.layers.disks[&disk("vda")].layers[id].registered;
        let drop = |model: &mut Self, id: &LayerId| {
            assert!(!registered(model, id), "the registered image is never unlinked");
            let layers = &model.history.state.layers.disks[&disk("vda")];
            assert_eq!(layers.dependants(id).count(), 0, "a file with dependants is never unlinked");
            model.blocks.remove(id);
            model.change(vec![LayerChange::Dropped { disk: disk("vda"), layer: id.clone() }]);
        };
        let mut grown = 0;
        match action {
            MergeAction::Drop { layer, .. } => drop(self, layer),
            MergeAction::Fold { .. } => unreachable!("the layers are the engine's own"),
            MergeAction::Pull { vanish, dependants, onto, .. } => {
                for dependant in dependants {
                    let mut pulled = Blocks::new();
                    vanish.iter().for_each(|id| pulled.extend(self.blocks[id].iter()));
                    pulled.extend(self.blocks[dependant].iter());
                    grown += pulled.len() as u64 * BLOCK_BYTES - self.bytes(dependant);
                    self.blocks.insert(dependant.clone(), pulled);
                    let (layer, parent) = (dependant.clone(), Some(onto.clone()));
                    self.change(vec![LayerChange::Rebased { disk: disk("vda"), layer, parent, stamp: None }]);
                }
                vanish.iter().rev().for_each(|id| drop(self, id));
            }
            MergeAction::Push { from, into, between, .. } => {
                let layers = &self.history.state.layers.disks[&disk("vda")];
                assert_eq!(layers.dependants(into).count(), 1, "a push needs exactly one dependant");
                let mut pushed = self.blocks[into].clone();
                between.iter().chain([from]).for_each(|id| pushed.extend(self.blocks[id].iter()));
                grown += pushed.len() as u64 * BLOCK_BYTES - self.bytes(into);
                self.blocks.insert(into.clone(), pushed);
                let (from_id, into) = (from.clone(), into.clone());
                self.change(vec![LayerChange::Pushed {
                    disk: disk("vda"),
                    from: from_id,
                    into,
                    stamp: None,
                }]);
                [from].into_iter().chain(between.iter().rev()).for_each(|id| drop(self, id));
            }
        }
        grown
    }

    fn apply(&mut self, act: &Act) {
        match act {
            Act::Write(block) => {
                self.value += 1;
                let (active, value) = (self.active(), self.value);
                self.blocks.get_mut(&active).unwrap().insert(*block, value);
            }
            Act::Create => self.create(),
            Act::Revert(index) => {
                if let Some(n) = self.pick(*index) {
                    self.revert(n);
                }
            }
            Act::Delete(index) => {
                if let Some(n) = self.pick(*index) {
                    self.history.delete(&[n], MergeWish::Auto);
                }
            }
            Act::Merge => self.merge(),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn merges_change_no_live_content_and_lose_no_file(acts in acts()) {
        let mut model = Model::new();
        let mut deferred = Vec::new();
        for act in acts.iter().chain([&Act::Merge]) {
            let before = model.contents();
            model.apply(act);
            if matches!(act, Act::Merge) {
                prop_assert_eq!(before, model.contents());
                deferred = model.verdicts();
            }
        }
        // After the last merge, each tombstone has a layer and a stated reason.
        prop_assert_eq!(deferred.len(), model.history.state.tombstones.len());
        for verdict in deferred {
            let stays = matches!(&verdict, Verdict::Defer { reason, .. } if !reason.is_empty());
            prop_assert!(stays, "{:?}", verdict);
        }
    }

    #[test]
    fn a_delete_frees_what_was_foreseen(acts in acts(), index in any::<usize>()) {
        let mut model = Model::new();
        model.policy.copy_bytes_max = u64::MAX;
        for act in acts.iter().chain([&Act::Merge]) {
            model.apply(act);
        }
        let Some(n) = model.pick(index) else { return Ok(()) };
        let foreseen = model.frees(snapshot_id(n));
        let before = model.all_bytes().cast_signed();
        model.history.delete(&[n], MergeWish::Auto);
        model.merge();
        let freed = before - model.all_bytes().cast_signed();
        prop_assert!(foreseen.at_least_bytes <= freed, "{} freed, and {:?} foreseen", freed, foreseen);
        prop_assert!(freed <= foreseen.at_most_bytes.cast_signed(), "{} freed, and {:?} foreseen", freed, foreseen);
    }
}

/// s1 <- s2 <- s3 <- active, with 2, 3 and 1 blocks in the last three; s3 stands alone at the end of a branch.
#[test]
fn what_a_delete_frees_is_exact_where_nothing_stands_on_it_and_bounded_elsewhere() {
    let mut model = Model::new();
    model.create();
    for blocks in [0..2, 2..5, 5..6] {
        blocks.for_each(|block| model.apply(&Act::Write(block)));
        model.create();
    }
    let ids: Vec<u128> = (0..4).map(|index| model.pick(index).unwrap()).collect();
    model.revert(ids[2]);
    let blocks = |snapshot: u128| {
        let Frees { at_least_bytes, at_most_bytes } = model.frees(snapshot_id(snapshot));
        (at_least_bytes / BLOCK_BYTES.cast_signed(), at_most_bytes / BLOCK_BYTES)
    };
    assert_eq!(blocks(ids[3]), (1, 1), "nothing stands on it");
    assert_eq!(blocks(ids[1]), (0, 2), "the smaller of the two at most");
    assert_eq!(blocks(ids[2]), (-3, 3), "copied into two");
    assert_eq!(blocks(ids[0]), (0, 0), "there is nothing in it");
}

/// s1 <- s2 <- active, s2 deleted: one block would be copied.
#[test]
fn a_merge_needs_room_beyond_the_margin() {
    let mut model = Model::new();
    model.create();
    model.apply(&Act::Write(0));
    model.create();
    model.apply(&Act::Write(1));
    model.apply(&Act::Delete(1));
    model.policy.margin_bytes = 10 * BLOCK_BYTES;
    for (free_blocks, merges) in [(0, false), (10, false), (11, true)] {
        model.room = Some(Room { folder: "/l".into(), free_bytes: free_blocks * BLOCK_BYTES });
        match model.verdicts().as_slice() {
            [Verdict::Merge(_)] => assert!(merges, "{free_blocks}"),
            [Verdict::Defer { reason, .. }] => {
                assert!(!merges, "{free_blocks}: {reason}");
                assert!(
                    reason.contains("64.0 KiB of space") && reason.contains("640.0 KiB are to stay"),
                    "{reason}"
                );
            }
            other => panic!("{other:?}"),
        }
    }
}

/// s1 <- s2 <- active, s2 deleted; with 40 blocks a layer is full.
#[test]
fn a_layer_that_is_full_cannot_grow() {
    for (of_tombstone, of_dependant, merges) in [(8, 8, false), (40, 8, true), (8, 40, true)] {
        let mut model = Model::new();
        model.create();
        (0..of_tombstone).for_each(|block| model.apply(&Act::Write(block)));
        model.create();
        (0..of_dependant).for_each(|block| model.apply(&Act::Write(block)));
        model.apply(&Act::Delete(1));
        model.room = Some(Room { folder: "/l".into(), free_bytes: 0 });
        let found = model.verdicts();
        assert_eq!(matches!(found.as_slice(), [Verdict::Merge(_)]), merges, "{found:?}");
    }
}

/// s1 <- s2, the machine stands on s1: what is in s2 is only unlinked.
#[test]
fn what_is_only_unlinked_needs_no_room() {
    let mut model = Model::new();
    model.create();
    let first = model.pick(0).unwrap();
    model.apply(&Act::Write(0));
    model.create();
    model.revert(first);
    model.apply(&Act::Delete(1));
    model.room = Some(Room { folder: "/l".into(), free_bytes: 0 });
    let found = model.verdicts();
    assert!(matches!(found.as_slice(), [Verdict::Merge(_)]), "{found:?}");
}

/// s1 <- s2 <- active, s2 deleted under a running machine, which is therefore pulled into although that copies more. A
/// layer is full with 33 blocks: the pull takes 23 more, the push into the fuller layer 3.
#[test]
fn what_there_is_no_room_for_one_way_goes_the_other_way() {
    for (free_blocks, pulls) in [(23, Some(true)), (22, Some(false)), (3, Some(false)), (2, None)] {
        let mut model = Model::new();
        model.create();
        (0..30).for_each(|block| model.apply(&Act::Write(block)));
        model.create();
        (0..10).for_each(|block| model.apply(&Act::Write(block)));
        model.apply(&Act::Delete(1));
        model.run_state = RunState::Running;
        model.room = Some(Room { folder: "/l".into(), free_bytes: free_blocks * BLOCK_BYTES });
        let found = model.verdicts();
        let Some(pulls) = pulls else {
            assert!(matches!(found.as_slice(), [Verdict::Defer { .. }]), "{found:?}");
            continue;
        };
        let [Verdict::Merge(plan)] = found.as_slice() else { panic!("{free_blocks}: {found:?}") };
        assert_eq!(matches!(plan.actions[0], MergeAction::Pull { .. }), pulls, "{free_blocks}: {plan:?}");
        let (pulled, pushed) = (30 * BLOCK_BYTES, 10 * BLOCK_BYTES);
        let (moved, otherwise) = if pulls { (pulled, pushed) } else { (pushed, pulled) };
        assert_eq!((plan.bytes_moved, plan.bytes_moved_otherwise), (moved, Some(otherwise)));
    }
}

/// s1 <- s2 <- active, s2 deleted.
#[test]
fn a_single_dependant_is_contracted_the_cheaper_way() {
    for (blocks_of_tombstone, blocks_of_dependant, pulls) in [(5, 1, false), (1, 5, true)] {
        let mut model = Model::new();
        model.create();
        for block in 0..blocks_of_tombstone {
            model.apply(&Act::Write(block));
        }
        model.create();
        for block in 0..blocks_of_dependant {
            model.apply(&Act::Write(block));
        }
        model.apply(&Act::Delete(1));
        let found = model.verdicts();
        let [Verdict::Merge(plan)] = found.as_slice() else { panic!("{found:?}") };
        assert_eq!(matches!(plan.actions[0], MergeAction::Pull { .. }), pulls, "{plan:?}");
        assert_eq!((plan.bytes_moved, plan.bytes_moved_otherwise), (65_536, Some(5 * 65_536)));
    }
}

/// The registered image holds s1; two branches stand on it.
#[test]
fn the_registered_image_with_two_dependants_is_deferred_also_under_now() {
    let mut model = Model::new();
    model.create();
    let first = model.pick(0).unwrap();
    model.apply(&Act::Write(1));
    model.create();
    model.revert(first);
    model.history.delete(&[first], MergeWish::Now);
    let found = model.verdicts();
    let [Verdict::Defer { reason, .. }] = found.as_slice() else { panic!("{found:?}") };
    assert!(reason.contains("registered image"), "{reason}");
}

#[test]
fn copies_beyond_the_limit_are_deferred_unless_asked_for() {
    for (wish, merges) in [(MergeWish::Auto, false), (MergeWish::Now, true), (MergeWish::Defer, false)] {
        let mut model = Model::new();
        model.create();
        for block in 0..4 {
            model.apply(&Act::Write(block));
        }
        model.create();
        let second = model.pick(1).unwrap();
        model.create();
        model.revert(second);
        model.history.delete(&[second], wish);
        let found = model.verdicts();
        assert_eq!(matches!(found.as_slice(), [Verdict::Merge(_)]), merges, "{wish:?}: {found:?}");
    }
}
