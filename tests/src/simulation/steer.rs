//! Toward a cell: which request brings a step of the kind that is aimed at.

use snaptree_engine::command::{Command, Delete, SnapshotRef};
use snaptree_engine::event::{DeleteScope, DeleteWhat, MergeWish, UnregisterWish};
use snaptree_engine::{SnapshotId, SnapshotName};

use super::check::Violation;
use super::coverage::{Cell, Machines, machines_of};
use super::life::{Cast, DOMAINS_MIN, LATE, Life};

/// Live snapshots that a domain is given before some are folded away.
const TREE_MIN: usize = 4;

impl Cast {
    /// One thing happens that leads to the cell.
    pub(super) async fn act_toward(&mut self, life: &Life, cell: Cell) -> Result<(), Violation> {
        self.world.fault_chance(0);
        let (kind, ..) = cell;
        let number = self.domain_for(kind);
        let command = self.command_for(kind, number);
        self.submit(life, number, command).await?;
        self.drive(life, number).await?;
        self.see_to_attention(life, number).await?;
        self.check(life, number).await?;
        if self.watched[number].model.registered {
            self.guest(number)?;
        }
        Ok(())
    }

    fn domain_for(&mut self, kind: &str) -> usize {
        let wanted = machines_of(kind);
        let registered = self.registered();
        if kind == "adopt" {
            // Only what was never snapshotted is adopted.
            let fresh =
                registered.iter().find(|number| self.is_layered(**number) && self.can_be_adopted(**number));
            return fresh.copied().unwrap_or(LATE);
        }
        let fitting: Vec<usize> = registered
            .into_iter()
            .filter(|number| match wanted {
                Machines::Copies => !self.is_layered(*number),
                Machines::Layers => self.is_layered(*number) && *number != LATE,
                Machines::All => *number != 0,
            })
            .collect();
        if fitting.is_empty() { 0 } else { *self.random.pick(&fitting) }
    }

    fn is_layered(&self, number: usize) -> bool {
        let domain = &self.watched[number].rebuilt.domain;
        domain.as_ref().is_some_and(|domain| !domain.capabilities.merges_itself)
    }

    fn can_be_adopted(&self, number: usize) -> bool {
        let state = &self.watched[number].rebuilt;
        let mut disks = state.domain.iter().flat_map(|domain| &domain.disks);
        disks.any(|disk| state.layers.disks.get(&disk.name).is_none_or(|layers| layers.active.is_none()))
    }

    /// A live snapshot that nobody holds; the oldest, if only one layer stands on the registered image then.
    fn free_snapshot(&mut self, number: usize, oldest: bool) -> Option<SnapshotId> {
        let now = snaptree_engine::engine::Clock::now(&self.world);
        let model = &self.watched[number].model;
        let free = |known: &super::model::Known| {
            !known.lost && known.hold.as_ref().is_none_or(|hold| !hold.in_force(now))
        };
        let free: Vec<SnapshotId> =
            model.snapshots.iter().filter(|(_, known)| free(known)).map(|(id, _)| *id).collect();
        match free.first() {
            Some(first) if oldest => Some(*first),
            Some(_) => Some(*self.random.pick(&free)),
            None => None,
        }
    }

    fn command_for(&mut self, kind: &str, number: usize) -> Command {
        let live = self.watched[number].model.snapshots.len();
        let enough = match kind {
            "create" | "switch-create" | "adopt" => return self.plain_create(),
            "switch-merge" | "switch-restack" | "pull" | "push" => live >= TREE_MIN,
            _ => live >= 1,
        };
        let oldest = matches!(kind, "push" | "switch-restack") && self.random.chance(70);
        let snapshot = self.free_snapshot(number, oldest);
        let Some(snapshot) = snapshot.filter(|_| enough) else { return self.plain_create() };
        let named = SnapshotRef::Id(snapshot);
        match kind {
            "revert" | "switch-revert" => Command::Revert { snapshot: named, run_state: None, keep: false },
            "drop" if self.random.chance(50) => {
                Command::Revert { snapshot: named, run_state: None, keep: false }
            }
            "flatten" if self.registered().len() > DOMAINS_MIN => match self.held(number) {
                Some(held) => Command::Release { snapshot: SnapshotRef::Id(held) },
                None => Command::Unregister(UnregisterWish::Flatten),
            },
            _ => Command::Delete(Delete {
                snapshots: vec![named],
                scope: DeleteScope::Named,
                what: if kind == "forget" { DeleteWhat::Metadata } else { DeleteWhat::Snapshot },
                merge: MergeWish::Now,
                reasons: vec![],
            }),
        }
    }

    fn held(&self, number: usize) -> Option<SnapshotId> {
        let snapshots = &self.watched[number].model.snapshots;
        snapshots.iter().find(|(_, known)| known.hold.is_some()).map(|(id, _)| *id)
    }

    fn plain_create(&mut self) -> Command {
        let name = Some(self.fresh_name());
        Command::Create(snaptree_engine::command::Create { name, ..Default::default() })
    }

    pub(super) fn fresh_name(&mut self) -> SnapshotName {
        self.names += 1;
        let number = if self.random.chance(20) { self.names / 2 } else { self.names };
        SnapshotName::new(format!("s{number}")).expect("a name")
    }
}
