//! The order of deletes, and the depth.

use std::collections::{BTreeMap, BTreeSet};

use jiff::tz::TimeZone;
use proptest::prelude::*;

use super::*;

/// A tree: each snapshot's parent (an earlier one) and size; the last one is current.
fn shape(nodes: &[(Option<usize>, u64)], active_bytes: u64) -> Shape {
    let node = |(parent, bytes): &(Option<usize>, u64)| Node {
        parent: parent.map(id),
        bytes: *bytes,
        file: File::Layer,
    };
    let nodes: BTreeMap<SnapshotId, Node> =
        nodes.iter().enumerate().map(|(n, found)| (id(n), node(found))).collect();
    let current = nodes.keys().next_back().copied();
    Shape { nodes, current, active_bytes, ..Shape::default() }
}

fn line(sizes: &[u64], active_bytes: u64) -> Shape {
    let nodes: Vec<_> = sizes.iter().enumerate().map(|(n, bytes)| (n.checked_sub(1), *bytes)).collect();
    shape(&nodes, active_bytes)
}

fn ids(numbers: &[usize]) -> BTreeSet<SnapshotId> {
    numbers.iter().map(|n| id(*n)).collect()
}

fn ordered(deletes: &[Delete]) -> Vec<usize> {
    deletes.iter().map(|delete| number(delete.snapshot)).collect()
}

/// What deleting in this order costs, told by doing it on the files: parents, sizes, and who stands upon whom.
fn cost(shape: &Shape, order: &[SnapshotId]) -> u64 {
    // The active layer is a file like the others, with an id that no snapshot has.
    let active = id(1_000);
    let mut files: BTreeMap<SnapshotId, Node> = shape.nodes.clone();
    files.insert(active, Node { parent: shape.current, bytes: shape.active_bytes, file: File::Layer });
    let mut moved = 0;
    for gone in order {
        let node = files.remove(gone).unwrap();
        let upon: Vec<SnapshotId> =
            files.iter().filter(|(_, file)| file.parent == Some(*gone)).map(|(id, _)| *id).collect();
        for dependant in &upon {
            let file = files.get_mut(dependant).unwrap();
            let one = upon.len() == 1;
            moved += match node.file {
                File::Registered if one => file.bytes,
                File::Layer if one => node.bytes.min(file.bytes),
                File::Registered => unreachable!("it waits"),
                File::Layer => node.bytes,
            };
            file.bytes += node.bytes;
            file.parent = node.parent;
            if node.file == File::Registered {
                file.file = File::Registered;
            }
        }
    }
    moved
}

fn permutations(of: &[SnapshotId]) -> Vec<Vec<SnapshotId>> {
    if of.is_empty() {
        return vec![Vec::new()];
    }
    let mut all = Vec::new();
    for (at, first) in of.iter().enumerate() {
        let mut rest = of.to_vec();
        rest.remove(at);
        for mut tail in permutations(&rest) {
            tail.insert(0, *first);
            all.push(tail);
        }
    }
    all
}

#[test]
fn a_row_is_deleted_outward_from_its_largest_file() {
    // Taking the cheapest first would move the 1 twice: 7 in all.
    let deletes = order(&line(&[3, 1, 2, 10], 50), &ids(&[0, 1, 2]));
    assert_eq!(ordered(&deletes), [2, 1, 0]);
    assert_eq!(deletes.iter().map(|delete| delete.bytes_moved_max).sum::<u64>(), 6);

    let deletes = order(&line(&[3, 90, 2, 10], 50), &ids(&[0, 1, 2]));
    assert_eq!(ordered(&deletes), [1, 2, 0]);
    assert_eq!(deletes.iter().map(|delete| delete.bytes_moved_max).collect::<Vec<_>>(), [2, 10, 3]);
}

#[test]
fn what_stands_upon_the_registered_image_goes_down_into_it() {
    let mut shape = line(&[3, 90, 2], 50);
    shape.nodes.get_mut(&id(0)).unwrap().file = File::Registered;
    let deletes = order(&shape, &ids(&[0]));
    assert_eq!(deletes[0].bytes_moved_max, 90);
}

#[test]
fn what_nothing_stands_upon_goes_first_and_frees_its_space() {
    // 0 - 1 - 2 (current), and 3 upon 0: a branch that was left behind.
    let mut shape = shape(&[(None, 5), (Some(0), 5), (Some(1), 5), (Some(0), 7)], 1);
    shape.current = Some(id(2));
    let deletes = order(&shape, &ids(&[1, 3]));
    assert_eq!(ordered(&deletes), [3, 1]);
    assert_eq!((deletes[0].bytes_moved_max, deletes[0].bytes_freed_min), (0, 7));
}

#[test]
fn the_current_snapshot_has_the_machine_upon_it() {
    let deletes = order(&line(&[5, 7], 2), &ids(&[1]));
    assert_eq!((deletes[0].bytes_moved_max, deletes[0].bytes_freed_min), (2, 0));
}

#[test]
fn unknown_snapshots_are_left_out() {
    assert!(order(&line(&[1], 0), &ids(&[7])).is_empty());
}

/// Trees of up to seven, some of which go.
fn trees() -> impl Strategy<Value = (Shape, BTreeSet<SnapshotId>)> {
    let node = (any::<prop::sample::Index>(), 0..20_u64, any::<bool>(), 0..10_u8);
    (prop::collection::vec(node, 1..8), 0..20_u64, any::<prop::sample::Index>(), any::<bool>()).prop_map(
        |(nodes, active, current, registered)| {
            let parents: Vec<(Option<usize>, u64)> = nodes
                .iter()
                .enumerate()
                .map(|(n, (parent, bytes, _, straight))| {
                    // Mostly in a line, as in life.
                    let parent =
                        n.checked_sub(1).map(|last| if *straight < 7 { last } else { parent.index(n) });
                    (parent, *bytes)
                })
                .collect();
            let mut shape = shape(&parents, active);
            let in_a_line = parents.iter().enumerate().all(|(n, (parent, _))| *parent == n.checked_sub(1));
            // With several upon it, the registered image waits: there is no order to compare.
            if registered && in_a_line {
                shape.nodes.get_mut(&id(0)).unwrap().file = File::Registered;
            } else {
                shape.current = Some(id(current.index(nodes.len())));
            }
            let going: Vec<usize> =
                nodes.iter().enumerate().filter(|(_, node)| node.2).map(|(n, _)| n).take(5).collect();
            (shape, ids(&going))
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn no_other_order_moves_less((shape, going) in trees()) {
        let deletes = order(&shape, &going);
        let ours: Vec<SnapshotId> = deletes.iter().map(|delete| delete.snapshot).collect();
        prop_assert_eq!(&ours.iter().copied().collect::<BTreeSet<_>>(), &going);
        let all: Vec<SnapshotId> = going.iter().copied().collect();
        let least = permutations(&all).iter().map(|other| cost(&shape, other)).min().unwrap_or(0);
        prop_assert_eq!(cost(&shape, &ours), least);
        prop_assert_eq!(deletes.iter().map(|delete| delete.bytes_moved_max).sum::<u64>(), least);
    }

    #[test]
    fn when_the_plan_is_done_the_next_one_is_empty(
        hours in prop::collection::btree_set(0..2_000_i64, 1..60), last in 1..5_u32, hourly in 1..40_u32,
        depth_max in 1..30_u32
    ) {
        let now = Timestamp::from_second(1_795_435_200).unwrap();
        let candidates: Vec<Candidate> = hours.iter().enumerate().map(|(n, hour)| Candidate {
            snapshot: id(n),
            created: Timestamp::from_second(1_780_000_000 + hour * 3_600).unwrap(),
            seq: n as u64,
            standing: Standing::Counted,
        }).collect();
        let keep = keep(&[count(Per::Snapshot, last), count(Per::Hour, hourly), count(Per::Day, 7)]);
        let limits = Limits { depth_max: NonZeroU32::new(depth_max).unwrap(), deletes_max: None };
        let full = line(&vec![1; candidates.len()], 1);
        let first = plan(&candidates, &keep, limits, &full, now, &TimeZone::UTC);
        let stays = kept(&first.verdicts);
        prop_assert!(stays.len() <= depth_max.max(last) as usize);
        prop_assert!(stays.len() >= (last as usize).min(candidates.len()));

        let left: Vec<Candidate> =
            candidates.iter().filter(|c| stays.contains(&number(c.snapshot))).copied().collect();
        let mut shape = Shape { current: left.last().map(|c| c.snapshot), ..Shape::default() };
        for (at, candidate) in left.iter().enumerate() {
            let parent = at.checked_sub(1).map(|below| left[below].snapshot);
            shape.nodes.insert(candidate.snapshot, Node { parent, bytes: 1, file: File::Layer });
        }
        let second = plan(&left, &keep, limits, &shape, now, &TimeZone::UTC);
        prop_assert_eq!(second.deletes, vec![]);
        prop_assert_eq!(second.depth, first.depth);
    }
}

fn hourly(count: usize) -> Vec<Candidate> {
    let at = |n: usize| Timestamp::from_second(1_795_435_200 + 3_600 * i64::try_from(n).unwrap()).unwrap();
    (0..count)
        .map(|n| Candidate { snapshot: id(n), created: at(n), seq: n as u64, standing: Standing::Counted })
        .collect()
}

fn planned(candidates: &[Candidate], keep: &Keep, depth_max: u32, deletes_max: Option<u32>) -> Plan {
    let limits = Limits {
        depth_max: NonZeroU32::new(depth_max).unwrap(),
        deletes_max: deletes_max.and_then(NonZeroU32::new),
    };
    let shape = line(&vec![1; candidates.len()], 1);
    plan(candidates, keep, limits, &shape, "2026-11-25T12:00:00Z".parse().unwrap(), &TimeZone::UTC)
}

#[test]
fn too_deep_a_chain_loses_the_oldest_of_the_finest_rule() {
    // 2026-11-23T12:00Z and on: twelve hours of one day, then twelve of the next.
    let candidates = hourly(24);
    let keep = keep(&[count(Per::Snapshot, 2), count(Per::Hour, 24), count(Per::Day, 2)]);
    let plan = planned(&candidates, &keep, 5, None);
    assert_eq!(plan.depth, Depth::Fits(5));
    assert_eq!(kept(&plan.verdicts), [23, 22, 21, 20, 11], "the ends of both days, and the newest hours");
    let gone = plan.verdicts.iter().find(|verdict| verdict.snapshot == id(5)).unwrap();
    assert_eq!(gone.reasons[0].to_string(), "max-depth: more than 5 in a row, though hourly would keep it");
}

#[test]
fn what_is_held_or_another_makes_it_too_deep_and_stays() {
    let mut candidates = hourly(6);
    for candidate in &mut candidates[..4] {
        candidate.standing = Standing::Held;
    }
    let plan = planned(&candidates, &keep(&[count(Per::Snapshot, 1)]), 3, None);
    assert_eq!(plan.depth, Depth::Exceeds(5));
    assert_eq!(kept(&plan.verdicts), [5, 3, 2, 1, 0]);
}

#[test]
fn a_policy_without_rules_deletes_nothing_however_deep() {
    let plan = planned(&hourly(6), &Keep::default(), 3, None);
    assert_eq!((plan.deletes.len(), plan.depth), (0, Depth::Exceeds(6)));
}

#[test]
fn a_run_asks_for_no_more_deletes_than_it_may() {
    let plan = planned(&hourly(10), &keep(&[count(Per::Snapshot, 1)]), 64, Some(4));
    assert_eq!((plan.deletes.len(), plan.postponed.len()), (4, 5));
}

#[test]
fn a_branch_beside_the_machine_does_not_count_for_its_depth() {
    // 0 - 1, and the machine stands upon 0.
    let mut shape = line(&[1, 1], 1);
    shape.current = Some(id(0));
    let mut verdicts = verdicts(&hourly(2), &keep(&[count(Per::Hour, 9)]), Timestamp::MAX, &TimeZone::UTC);
    assert_eq!(press(&mut verdicts, &shape, DepthLimit::Policy(NonZeroU32::MIN)), Depth::Fits(1));
    assert_eq!(kept(&verdicts), [1, 0]);
}

#[test]
fn what_is_dated_later_than_now_takes_no_place_of_the_policys_and_one_of_the_hypervisors() {
    let shape = line(&[1; 6], 1);
    let keep = keep(&[count(Per::Hour, 9)]);
    let now = hourly(6)[3].created;
    let press = |limit: fn(NonZeroU32) -> DepthLimit, most| {
        let mut verdicts = verdicts(&hourly(6), &keep, now, &TimeZone::UTC);
        let depth = press(&mut verdicts, &shape, limit(NonZeroU32::new(most).unwrap()));
        (depth, kept(&verdicts).len())
    };
    assert_eq!(press(DepthLimit::Policy, 4), (Depth::Fits(6), 6));
    assert_eq!(press(DepthLimit::Policy, 3), (Depth::Fits(5), 5));
    assert_eq!(press(DepthLimit::Hypervisor, 4), (Depth::Exceeds(6), 6), "it displaces nothing");
}

#[test]
fn the_hypervisors_limit_presses_what_last_counts_and_in_doubt_only_what_it_must() {
    let mut shape = line(&[1; 6], 1);
    shape.depth_max = NonZeroU32::new(4);
    let keep = keep(&[count(Per::Snapshot, 9)]);
    let limits = Limits { depth_max: NonZeroU32::new(64).unwrap(), deletes_max: None };
    let planned = |keep: &Keep| plan(&hourly(6), keep, limits, &shape, Timestamp::MAX, &TimeZone::UTC);
    assert_eq!(kept(&planned(&keep).verdicts), [5, 4, 3, 2]);
    let few = super::keep(&[count(Per::Snapshot, 1)]);
    assert_eq!(kept(&planned(&few).verdicts), [5]);
    assert_eq!(
        kept(&planned(&few).held_back(&shape, limits).verdicts),
        [5, 4, 3, 2],
        "room is needed for two"
    );
}
