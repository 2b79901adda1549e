//! Which tombstones can be folded away, and which way: a pure function of the layer graph.
//!
//! ```text
//!  no dependant        drop the file
//!  one dependant       contract: *pull* the tombstone's data up into the dependant, or *push* the dependant
//!                      down into the tombstone's file, whichever moves fewer bytes; tombstones in a row at once;
//!                      what a running machine writes is pulled into where that is possible
//!  several             pull into each, if the copies are within the limit; else it stays, with the reason
//! ```
//! Where the file system has no [room](crate::reconcile::space) for that way, the one that takes less is gone, if there
//! is room for it; else it stays, too.
//!
//! Two rules are older than any wish for speed. What a layer with dependants reads as never changes, except by the
//! push of its only dependant into it. The registered image is never unlinked, so a tombstone in it can only take
//! the push of its single dependant.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::domain::RunState;
use crate::driver::{FileFacts, Observation};
use crate::event::MergeWish;
use crate::ids::{DiskName, LayerId, SnapshotId};
use crate::layer::{DiskLayers, Layer, Role};
use crate::project::{DomainState, Tombstone};
use crate::reconcile::space;

/// How much may be copied when a tombstone has several dependants; the setting `merge.copy-max`.
pub const COPY_BYTES_MAX_DEFAULT: u64 = 4 << 30;

const PUT_OFF: &str = "left to later, as asked with --defer";

/// One thing to do on one disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "action", rename_all = "kebab-case")]
pub enum MergeAction {
    /// Nothing is built upon it: unlink it.
    Drop {
        /// The disk.
        disk: DiskName,
        /// The tombstone.
        layer: LayerId,
    },
    /// The dependants take what they need of the tombstones, and stand on `onto` afterwards.
    Pull {
        /// The disk.
        disk: DiskName,
        /// The tombstones that go, lowest first.
        vanish: Vec<LayerId>,
        /// The layers that take their data.
        dependants: Vec<LayerId>,
        /// The layer below the tombstones.
        onto: LayerId,
    },
    /// `from` and the tombstones between go down into `into`, whose file becomes `from`'s.
    Push {
        /// The disk.
        disk: DiskName,
        /// The only dependant, whose content stays.
        from: LayerId,
        /// The lowest tombstone, whose file stays.
        into: LayerId,
        /// The tombstones between the two, lowest first.
        between: Vec<LayerId>,
    },
    /// The hypervisor merges what it lists, in one call.
    Fold {
        /// The snapshot that it had been.
        snapshot: SnapshotId,
    },
}

/// A merge: what one operation folds away.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MergePlan {
    /// The snapshots that the tombstones had been.
    pub snapshots: Vec<SnapshotId>,
    /// Per disk.
    pub actions: Vec<MergeAction>,
    /// Bytes that have to be copied, at most.
    pub bytes_moved: u64,
    /// Bytes that the other direction would copy, at most, where there is a choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_moved_otherwise: Option<u64>,
    /// Bytes that the files which are unlinked occupy. What was copied takes some of them again.
    pub bytes_freed: u64,
}

/// What can be done about one deleted snapshot now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Fold it away like this.
    Merge(MergePlan),
    /// It stays for now.
    Defer {
        /// The snapshot that it had been.
        snapshot: SnapshotId,
        /// Why.
        reason: String,
    },
}

/// What a merge may cost, and which tombstones are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MergePolicy {
    /// Most bytes to copy when a tombstone has several dependants.
    pub copy_bytes_max: u64,
    /// What to do with those that were put off.
    pub put_off: PutOff,
    /// How much of the file system stays free.
    pub margin_bytes: u64,
}

/// What to do with tombstones whose merge was put off with `--defer`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PutOff {
    /// Leave them.
    Leave,
    /// Merge them like the others.
    Take,
}

impl Verdict {
    /// Whether it is about one of `snapshots`.
    pub fn is_about(&self, snapshots: &[SnapshotId]) -> bool {
        match self {
            Self::Merge(plan) => plan.snapshots.iter().any(|id| snapshots.contains(id)),
            Self::Defer { snapshot, .. } => snapshots.contains(snapshot),
        }
    }
}

/// The verdict on every tombstone, oldest snapshot first.
///
/// Only the first [`Verdict::Merge`] may be carried out; it changes the graph, and the others are to be asked for
/// again.
pub fn verdicts(state: &DomainState, observation: &Observation, policy: MergePolicy) -> Vec<Verdict> {
    let found = verdicts_given_room(state, observation, policy);
    space::within_room(found, state, observation, policy.margin_bytes)
}

/// The verdicts; a merge that there is no room for is still one.
pub(super) fn verdicts_given_room(
    state: &DomainState,
    observation: &Observation,
    policy: MergePolicy,
) -> Vec<Verdict> {
    if state.domain.as_ref().is_some_and(|domain| domain.capabilities.merges_itself) {
        return listed_verdicts(state, observation, policy);
    }
    let planner = Planner { state, observation, policy };
    let mut found = Vec::new();
    let mut done = BTreeSet::new();
    for snapshot in state.tombstones.keys() {
        if !done.contains(snapshot) {
            let verdict = planner.verdict(*snapshot);
            if let Verdict::Merge(plan) = &verdict {
                done.extend(plan.snapshots.iter().copied());
            }
            found.push(verdict);
        }
    }
    found.extend(planner.leftovers());
    found
}

/// The verdicts where the hypervisor keeps a list, and merges in one call what it can.
fn listed_verdicts(state: &DomainState, seen: &Observation, policy: MergePolicy) -> Vec<Verdict> {
    let verdict = |(&snapshot, tombstone): (&SnapshotId, &Tombstone)| {
        if tombstone.wish == MergeWish::Defer && policy.put_off == PutOff::Leave {
            return Verdict::Defer { snapshot, reason: PUT_OFF.to_owned() };
        }
        let listed = seen.snapshots.iter().find(|listed| listed.id == Some(snapshot));
        match listed.and_then(|listed| listed.stays.clone()) {
            Some(reason) => Verdict::Defer { snapshot, reason },
            None => Verdict::Merge(MergePlan {
                snapshots: vec![snapshot],
                actions: vec![MergeAction::Fold { snapshot }],
                ..MergePlan::default()
            }),
        }
    };
    state.tombstones.iter().map(verdict).collect()
}

/// Whether there may be anything to fold away: a tombstone, or a layer that nobody holds.
pub(crate) fn is_called_for(state: &DomainState) -> bool {
    let leftover =
        |disk: &DiskLayers| disk.layers.keys().any(|id| disk.role(id, &state.tree) == Role::Tombstone(None));
    !state.tombstones.is_empty() || state.layers.disks.values().any(leftover)
}

struct Planner<'a> {
    state: &'a DomainState,
    observation: &'a Observation,
    policy: MergePolicy,
}

/// What can be done about a layer: the way that is taken while there is room for it, and the other one.
struct Ways {
    first: MergeAction,
    second: Option<MergeAction>,
}

/// A row of tombstones with one dependant each, lowest first, and what stands on it.
struct Run {
    tombstones: Vec<LayerId>,
    top: LayerId,
}

impl Planner<'_> {
    /// Layers that hold nothing and that nothing stands upon: an operation that was abandoned left them.
    fn leftovers(&self) -> Option<Verdict> {
        let mut actions = Vec::new();
        for (name, disk) in &self.state.layers.disks {
            let held_by_none = |id: &&LayerId| disk.role(id, &self.state.tree) == Role::Tombstone(None);
            let alone =
                disk.layers.keys().filter(held_by_none).filter(|id| disk.dependants(id).next().is_none());
            let droppable = alone.filter(|id| self.may_unlink(disk, id).is_ok());
            actions.extend(
                droppable.map(|layer| MergeAction::Drop { disk: name.clone(), layer: layer.clone() }),
            );
        }
        (!actions.is_empty()).then(|| Verdict::Merge(self.plan(actions, None)))
    }

    fn verdict(&self, snapshot: SnapshotId) -> Verdict {
        let tombstone = self.state.tombstones.get(&snapshot);
        let wish = tombstone.map_or(MergeWish::Auto, |tombstone| tombstone.wish);
        let defer = |reason: String| Verdict::Defer { snapshot, reason };
        if wish == MergeWish::Defer && self.policy.put_off == PutOff::Leave {
            return defer(PUT_OFF.to_owned());
        }
        let copy_bytes_max = if wish == MergeWish::Now { u64::MAX } else { self.policy.copy_bytes_max };
        let mut ways = Vec::new();
        let mut reasons = Vec::new();
        for (name, disk) in &self.state.layers.disks {
            let Some((layer, _)) = disk.layer_of(snapshot) else { continue };
            match self.ways(name, disk, layer, copy_bytes_max) {
                Ok(found) => ways.push(found),
                Err(reason) => reasons.push(reason),
            }
        }
        if ways.is_empty() {
            reasons.dedup();
            return defer(reasons.join("; "));
        }
        Verdict::Merge(self.choose(ways))
    }

    /// The first way of every disk; where there is no room for those, and there is for the ways that take the least, the
    /// latter.
    fn choose(&self, ways: Vec<Ways>) -> MergePlan {
        let growth =
            |actions: &[MergeAction]| space::growth_bytes(actions, &self.state.layers, self.observation);
        let fits = |ways: &[Ways]| {
            let firsts: Vec<MergeAction> = ways.iter().map(|way| way.first.clone()).collect();
            space::shortage(growth(&firsts), self.observation, self.policy.margin_bytes).is_none()
        };
        let least = |way: &Ways| match &way.second {
            Some(second)
                if growth(std::slice::from_ref(second)) < growth(std::slice::from_ref(&way.first)) =>
            {
                Ways { first: second.clone(), second: Some(way.first.clone()) }
            }
            second => Ways { first: way.first.clone(), second: second.clone() },
        };
        let ways = match fits(&ways) {
            true => ways,
            false => {
                Some(ways.iter().map(least).collect::<Vec<_>>()).filter(|least| fits(least)).unwrap_or(ways)
            }
        };
        let otherwise = ways
            .iter()
            .any(|way| way.second.is_some())
            .then(|| ways.iter().map(|way| self.moved(way.second.as_ref().unwrap_or(&way.first))))
            .map(|moved| moved.fold(0, u64::saturating_add));
        self.plan(ways.into_iter().map(|way| way.first).collect(), otherwise)
    }

    /// Bytes that an action copies, at most.
    fn moved(&self, action: &MergeAction) -> u64 {
        let (disk, copied, times): (_, Vec<&LayerId>, _) = match action {
            MergeAction::Drop { .. } | MergeAction::Fold { .. } => return 0,
            MergeAction::Pull { disk, vanish, dependants, .. } => {
                (disk, vanish.iter().collect(), dependants.len() as u64)
            }
            MergeAction::Push { disk, from, between, .. } => {
                (disk, between.iter().chain([from]).collect(), 1)
            }
        };
        let Some(layers) = self.state.layers.disks.get(disk) else { return 0 };
        let bytes = copied.into_iter().fold(0_u64, |sum, id| sum.saturating_add(self.allocated(layers, id)));
        bytes.saturating_mul(times)
    }

    /// Adds up what the actions cost, and which snapshots they end.
    fn plan(&self, actions: Vec<MergeAction>, bytes_moved_otherwise: Option<u64>) -> MergePlan {
        let mut snapshots = BTreeSet::new();
        let mut plan = MergePlan { bytes_moved_otherwise, ..MergePlan::default() };
        for action in &actions {
            let (disk, gone, unlinked) = match action {
                MergeAction::Fold { .. } => continue,
                MergeAction::Drop { disk, layer } => (disk, vec![layer], vec![layer]),
                MergeAction::Pull { disk, vanish, .. } => {
                    (disk, vanish.iter().collect(), vanish.iter().collect())
                }
                MergeAction::Push { disk, from, into, between } => (
                    disk,
                    between.iter().chain([into]).collect(),
                    between.iter().chain([from]).collect::<Vec<_>>(),
                ),
            };
            let Some(layers) = self.state.layers.disks.get(disk) else { continue };
            snapshots.extend(
                gone.iter().filter_map(|id| layers.layers.get(*id)).filter_map(|layer| layer.snapshot),
            );
            let freed: u64 = unlinked.iter().map(|id| self.allocated(layers, id)).sum();
            plan.bytes_moved = plan.bytes_moved.saturating_add(self.moved(action));
            plan.bytes_freed = plan.bytes_freed.saturating_add(freed);
        }
        plan.snapshots = snapshots.into_iter().collect();
        plan.actions = actions;
        plan
    }

    fn ways(
        &self,
        name: &DiskName,
        disk: &DiskLayers,
        layer: &LayerId,
        copy_bytes_max: u64,
    ) -> Result<Ways, String> {
        let dependants: Vec<LayerId> = disk.dependants(layer).cloned().collect();
        match dependants.as_slice() {
            [] => {
                self.may_unlink(disk, layer)?;
                let first = MergeAction::Drop { disk: name.clone(), layer: layer.clone() };
                Ok(Ways { first, second: None })
            }
            [_] => self.contract(name, disk, layer),
            _ => {
                let first = self.pull_into_each(name, disk, layer, dependants, copy_bytes_max)?;
                Ok(Ways { first, second: None })
            }
        }
    }

    fn contract(&self, name: &DiskName, disk: &DiskLayers, layer: &LayerId) -> Result<Ways, String> {
        let run = self.run(disk, layer)?;
        let (Some(lowest), Some(highest)) = (run.tombstones.first(), run.tombstones.last()) else {
            return Err("the layer graph has a cycle".to_owned());
        };
        debug_assert!(disk.dependants(highest).eq([&run.top]));
        self.has_no_internal_snapshots(disk, &run.top)?;
        let pull = self
            .may_pull(disk, &run.tombstones, lowest)
            .and_then(|onto| self.drops_no_bitmaps(disk, &run.tombstones).map(|()| onto));
        let push = self.may_push(disk, &run, lowest).and_then(|()| self.carries_bitmaps(disk, &run));
        let pull_bytes: u64 = run.tombstones.iter().map(|id| self.allocated(disk, id)).sum();
        let push_bytes: u64 =
            run.tombstones.iter().skip(1).chain([&run.top]).map(|id| self.allocated(disk, id)).sum();
        // A push of what a running machine writes stops it for a moment, and has to switch what it opens.
        let is_written =
            disk.active.as_ref() == Some(&run.top) && self.observation.run_state != RunState::Off;
        let pull = pull.map(|onto| MergeAction::Pull {
            disk: name.clone(),
            vanish: run.tombstones.clone(),
            dependants: vec![run.top.clone()],
            onto,
        });
        let push = push.map(|()| MergeAction::Push {
            disk: name.clone(),
            from: run.top.clone(),
            into: lowest.clone(),
            between: run.tombstones[1..].to_vec(),
        });
        match (pull, push) {
            (Ok(pull), Ok(push)) if is_written || pull_bytes <= push_bytes => {
                Ok(Ways { first: pull, second: Some(push) })
            }
            (Ok(pull), Ok(push)) => Ok(Ways { first: push, second: Some(pull) }),
            (Ok(only), Err(_)) | (Err(_), Ok(only)) => Ok(Ways { first: only, second: None }),
            (Err(pull), Err(push)) => Err(if pull == push { pull } else { format!("{push}; {pull}") }),
        }
    }

    /// The tombstones around `layer` that have one dependant each, and the first layer above them that is not so.
    fn run(&self, disk: &DiskLayers, layer: &LayerId) -> Result<Run, String> {
        let lone = |id: &LayerId| {
            matches!(disk.role(id, &self.state.tree), Role::Tombstone(_)) && disk.dependants(id).count() == 1
        };
        let mut tombstones = vec![layer.clone()];
        while let Some(parent) =
            tombstones.last().and_then(|id| disk.layers.get(id)).and_then(|l| l.parent.clone())
        {
            if !lone(&parent) || tombstones.contains(&parent) {
                break;
            }
            tombstones.push(parent);
        }
        tombstones.reverse();
        loop {
            let highest = tombstones.last().ok_or("the layer graph has a cycle")?;
            let above = disk.dependants(highest).next().ok_or("nothing is built upon it")?.clone();
            if !lone(&above) || tombstones.contains(&above) {
                return Ok(Run { tombstones, top: above });
            }
            tombstones.push(above);
        }
    }

    fn pull_into_each(
        &self,
        name: &DiskName,
        disk: &DiskLayers,
        layer: &LayerId,
        dependants: Vec<LayerId>,
        copy_bytes_max: u64,
    ) -> Result<MergeAction, String> {
        let onto = self.may_pull(disk, std::slice::from_ref(layer), layer)?;
        self.drops_no_bitmaps(disk, std::slice::from_ref(layer))?;
        for dependant in &dependants {
            self.has_no_internal_snapshots(disk, dependant)?;
        }
        let bytes = self.allocated(disk, layer).saturating_mul(dependants.len() as u64);
        if bytes > copy_bytes_max {
            return Err(format!(
                "folding it into its {} dependants would copy {}, and merge.copy-max is {}",
                dependants.len(),
                human_bytes(bytes),
                human_bytes(copy_bytes_max),
            ));
        }
        Ok(MergeAction::Pull { disk: name.clone(), vanish: vec![layer.clone()], dependants, onto })
    }

    /// Whether all of `tombstones` may be unlinked, and the layer that their dependants would stand on.
    fn may_pull(
        &self,
        disk: &DiskLayers,
        tombstones: &[LayerId],
        lowest: &LayerId,
    ) -> Result<LayerId, String> {
        for tombstone in tombstones {
            self.may_unlink(disk, tombstone)?;
        }
        let layer = disk.layers.get(lowest).ok_or("it is not in the layer graph")?;
        layer.parent.clone().ok_or_else(|| "there is no layer below it".to_owned())
    }

    fn may_push(&self, disk: &DiskLayers, run: &Run, into: &LayerId) -> Result<(), String> {
        for id in run.tombstones.iter().skip(1).chain([&run.top]) {
            self.may_unlink(disk, id)?;
        }
        self.has_no_foreign_dependant(disk, into)?;
        // What the machine writes may have been resized since the log was told of it.
        let size = |id: &LayerId| {
            let recorded = disk.layers.get(id).map(|layer| layer.virtual_size_bytes);
            self.facts(disk, id).map(|facts| facts.virtual_size_bytes).or(recorded)
        };
        let sizes: Vec<_> = run.tombstones.iter().chain([&run.top]).map(size).collect();
        if !sizes.is_sorted() {
            return Err(
                "the disk was made smaller in between, and a layer can only be pushed into one that is no \
                        larger than it"
                    .to_owned(),
            );
        }
        Ok(())
    }

    fn may_unlink(&self, disk: &DiskLayers, id: &LayerId) -> Result<(), String> {
        if disk.layers.get(id).is_some_and(|layer| layer.registered) {
            return Err("its data is in the registered image, which is never unlinked: \
                        it is folded once one dependant is left"
                .to_owned());
        }
        self.has_no_internal_snapshots(disk, id)?;
        self.has_no_foreign_dependant(disk, id)
    }

    fn has_no_foreign_dependant(&self, disk: &DiskLayers, id: &LayerId) -> Result<(), String> {
        let Some(layer) = disk.layers.get(id) else { return Ok(()) };
        match self.observation.foreign_dependants.get(&layer.file).and_then(|found| found.first()) {
            Some(foreign) => {
                Err(format!("{}, which Snaptree does not know, is built upon its data", foreign.display()))
            }
            None => Ok(()),
        }
    }

    fn has_no_internal_snapshots(&self, disk: &DiskLayers, id: &LayerId) -> Result<(), String> {
        match self.facts(disk, id) {
            Some(facts) if facts.internal_snapshots > 0 => Err(format!(
                "{} has snapshots inside the image, which a merge would damage",
                disk.layers.get(id).map_or_else(PathBuf::new, |layer| layer.file.clone()).display()
            )),
            _ => Ok(()),
        }
    }

    /// Whether all dirty bitmaps in `tombstones` were given up. What is pulled out of a layer leaves them behind, and they
    /// cannot be had in the layer above: what was written there before is not in them.
    fn drops_no_bitmaps(&self, disk: &DiskLayers, tombstones: &[LayerId]) -> Result<(), String> {
        let given_up = |id: &LayerId| {
            let snapshot = disk.layers.get(id).and_then(|layer| layer.snapshot)?;
            Some(&self.state.tombstones.get(&snapshot)?.give_up)
        };
        for id in tombstones {
            let given_up = given_up(id);
            let kept = |name: &&String| !given_up.is_some_and(|names| names.contains(*name));
            if let Some(name) = self.bitmaps(disk, id).find(kept) {
                return Err(format!(
                    "it would drop the dirty bitmap '{name}' that somebody keeps in {} (delete --give-up gives it up)",
                    disk.layers.get(id).map_or_else(PathBuf::new, |layer| layer.file.clone()).display()
                ));
            }
        }
        Ok(())
    }

    /// Whether the dirty bitmaps of what is pushed can be brought along: not under a running machine.
    fn carries_bitmaps(&self, disk: &DiskLayers, run: &Run) -> Result<(), String> {
        if self.observation.run_state == RunState::Off {
            return Ok(());
        }
        let mut pushed = run.tombstones.iter().skip(1).chain([&run.top]);
        match pushed.find_map(|id| Some((id, self.bitmaps(disk, id).next()?))) {
            None => Ok(()),
            Some((id, name)) => Err(format!(
                "{} has a dirty bitmap '{name}', which can be kept only once the machine is off",
                disk.layers.get(id).map_or_else(PathBuf::new, |layer| layer.file.clone()).display()
            )),
        }
    }

    fn bitmaps(&self, disk: &DiskLayers, id: &LayerId) -> impl Iterator<Item = &String> {
        let inside = disk.layers.get(id).and_then(|layer| self.observation.inside.get(&layer.file));
        inside.into_iter().flat_map(|inside| &inside.bitmaps)
    }

    fn facts(&self, disk: &DiskLayers, id: &LayerId) -> Option<&FileFacts> {
        disk.layers.get(id).and_then(|layer: &Layer| self.observation.files.get(&layer.file))
    }

    fn allocated(&self, disk: &DiskLayers, id: &LayerId) -> u64 {
        self.facts(disk, id).map_or(0, |facts| facts.allocated_bytes)
    }
}

/// A number of bytes for people: `4.0 GiB`.
///
/// ```
/// use snaptree_engine::reconcile::merge::human_bytes;
/// assert_eq!(human_bytes(0), "0 B");
/// assert_eq!(human_bytes(1536), "1.5 KiB");
/// assert_eq!(human_bytes(4 << 30), "4.0 GiB");
/// assert_eq!(human_bytes(u64::MAX), "16.0 EiB");
/// ```
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    #[expect(clippy::cast_precision_loss, reason = "two digits are shown")]
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}
