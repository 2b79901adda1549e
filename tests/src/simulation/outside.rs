//! What happens past Snaptree: someone uses the hypervisor itself, and drift tells of it.
//!
//! Here the engine only reports. That it takes over what it finds, and a log that was put back from an older copy, is
//! tested through the program alone (`tests/tests/adopt.rs`, `restored.rs`).

use std::collections::BTreeSet;

use snaptree_drivers::sim::ByHand;
use snaptree_engine::SnapshotId;
use snaptree_engine::reconcile::drift::Finding;

use super::check::{Must, Violation, broken};
use super::life::{Cast, Life};

impl Cast {
    /// Someone takes, deletes or reverts to a snapshot at the hypervisor itself, while nothing is open.
    pub(super) fn by_hand(&mut self, number: usize) -> Result<(), Violation> {
        let watched = &self.watched[number];
        let lists = watched.rebuilt.domain.as_ref().is_some_and(|domain| domain.capabilities.merges_itself);
        if !lists || !watched.rebuilt.open.is_empty() {
            return Ok(());
        }
        let there: Vec<SnapshotId> = watched.model.listed.parents.keys().copied().collect();
        self.names += 1;
        let act = match self.random.below(3) {
            0 if !there.is_empty() => ByHand::Remove(*self.random.pick(&there)),
            1 if !there.is_empty() => ByHand::Revert(*self.random.pick(&there)),
            _ => ByHand::Take(format!("by-hand-{}", self.names)),
        };
        self.tell(format!("by hand at {number}: {act:?}"));
        let state = self.watched[number].rebuilt.clone();
        self.driver.by_hand(&state, &act).must("the hypervisor can be used")?;
        self.watched[number].model.by_hand(&act);
        Ok(())
    }

    /// The drift that is found is what was done by hand, and nothing else.
    pub(super) async fn drift(&mut self, life: &Life, number: usize) -> Result<(), Violation> {
        self.tell(format!("drift of {number}"));
        let id = self.watched[number].id;
        let found = life.engine.drift(&life.requester, id).await.must("drift can be looked for")?;
        self.watched[number].catch_up(&self.world)?;
        let state = &self.watched[number].rebuilt;
        if state.open.is_empty() { self.check_drift(number, &found.findings) } else { Ok(()) }
    }

    fn check_drift(&self, number: usize, found: &BTreeSet<Finding>) -> Result<(), Violation> {
        let (model, state) = (&self.watched[number].model, &self.watched[number].rebuilt);
        let (mut lost, mut unmarked, mut moved) = (BTreeSet::new(), 0, false);
        for finding in found {
            match finding {
                Finding::SnapshotLost { snapshot, .. } => {
                    lost.insert(*snapshot);
                }
                Finding::SnapshotFound { .. } => unmarked += 1,
                Finding::CurrentMoved { .. } => moved = true,
                other => return broken("drift is what was done outside", other.to_string()),
            }
        }
        let listed = &model.listed;
        let expected: BTreeSet<SnapshotId> =
            model.snapshots.iter().filter(|(_, known)| known.lost).map(|(id, _)| *id).collect();
        let marked: BTreeSet<SnapshotId> =
            state.tree.iter().filter(|snapshot| snapshot.lost).map(|snapshot| snapshot.id).collect();
        let lists = state.domain.as_ref().is_some_and(|domain| domain.capabilities.merges_itself);
        // Where the machine stands on a snapshot without our mark, or on none for a lost one, the two tell it apart.
        let current_is_plain =
            listed.unmarked == 0 && model.current.is_none_or(|current| !expected.contains(&current));
        let moved_for_nothing = moved && current_is_plain && listed.current == model.current;
        let move_missed = !moved && lists && listed.current != model.current && current_is_plain;
        if lost != expected
            || marked != expected
            || unmarked != listed.unmarked
            || moved_for_nothing
            || move_missed
        {
            let what = format!("{found:?}\nnot\n{listed:?}\nlost {expected:?}, current {:?}", model.current);
            return broken("drift is what was done outside", what);
        }
        Ok(())
    }
}
