//! What is asked of the program, and what the guests do in between.

use std::collections::{BTreeMap, BTreeSet};

use jiff::SignedDuration;
use snaptree_engine::command::{Command, Content, Create, Delete, SnapshotRef};
use snaptree_engine::domain::RunState;
use snaptree_engine::driver::NoWatch;
use snaptree_engine::engine::{Clock, EngineError, Requester, Submitted};
use snaptree_engine::event::{CheckpointKept, DeleteScope, DeleteWhat, MergeWish, UnregisterWish};
use snaptree_engine::log::{Append, Checkpoint, EventLog, NewEvent};
use snaptree_engine::operation::Code;
use snaptree_engine::project::PROJECTOR;
use snaptree_engine::{OperationId, SnapshotId, StreamId};

use super::check::{Must, Violation, broken};
use super::life::{Cast, Keyed, LATE, Life};
use super::model::GuestAct;

/// Blocks that the guests write: few, so that they meet.
const BLOCKS_USED: usize = 6;

impl Cast {
    pub(super) fn registered(&self) -> Vec<usize> {
        (0..self.watched.len()).filter(|number| self.watched[*number].model.registered).collect()
    }

    /// One thing happens, and everything is looked at after it.
    pub(super) async fn act(&mut self, life: &Life) -> Result<(), Violation> {
        let registered: Vec<usize> = self.registered().into_iter().filter(|number| *number != LATE).collect();
        // The layers are where most can go wrong.
        let number = if self.random.chance(45) { 0 } else { *self.random.pick(&registered) };
        let chance = *self.random.pick(&[0, 20, 40]);
        self.world.fault_chance(chance);
        match self.random.below(100) {
            0..3 => self.jump(),
            3..6 => self.dry_run(life, number).await?,
            6..9 => self.reconcile(life, number).await?,
            9..13 => self.repeat(life).await?,
            13..17 => self.drift(life, number).await?,
            17..22 => self.by_hand(number)?,
            22..26 => self.change_its_mind(life, number).await?,
            26..29 => self.come_too_late(life, number).await?,
            _ => {
                // Several requests may wait before anyone carries them out.
                let count = if self.random.chance(25) { 1 + self.random.below(3) } else { 1 };
                for _ in 0..count {
                    let command = self.command(number);
                    self.submit(life, number, command).await?;
                }
            }
        }
        self.drive(life, number).await?;
        self.see_to_attention(life, number).await?;
        self.check(life, number).await?;
        if self.random.chance(15) {
            self.checkpoint(life, number).await?;
        }
        if self.random.chance(60) {
            self.guest(number)?;
        }
        Ok(())
    }

    /// Someone asks for one thing or two, and calls one of them off before anyone has begun.
    async fn change_its_mind(&mut self, life: &Life, number: usize) -> Result<(), Violation> {
        let mut asked = Vec::new();
        for _ in 0..=self.random.below(2) {
            let command = self.command(number);
            asked.extend(self.submit(life, number, command).await?);
        }
        if asked.is_empty() {
            return Ok(());
        }
        let operation = *self.random.pick(&asked);
        self.call_off(life, number, operation).await
    }

    /// Nobody comes to carry out a request until its time is over.
    async fn come_too_late(&mut self, life: &Life, number: usize) -> Result<(), Violation> {
        let command = self.command(number);
        self.submit(life, number, command).await?;
        self.jump_by(24 * 365);
        Ok(())
    }

    /// The guest writes, or someone switches the machine.
    pub(super) fn guest(&mut self, number: usize) -> Result<(), Violation> {
        let state = self.watched[number].rebuilt.clone();
        let disks: Vec<_> =
            state.domain.iter().flat_map(|domain| &domain.disks).map(|d| d.name.clone()).collect();
        let mut acts = Vec::new();
        for _ in 0..=self.random.below(4) {
            let block = self.random.below(BLOCKS_USED) as u64;
            let value = if self.random.chance(15) { 0 } else { self.random.next_u64() | 1 };
            acts.push(GuestAct::Write(self.random.pick(&disks).clone(), block, value));
        }
        if self.random.chance(20) {
            let states = [RunState::Off, RunState::Running, RunState::Paused];
            acts.push(GuestAct::Power(*self.random.pick(&states)));
        }
        for act in &acts {
            match act {
                GuestAct::Write(disk, block, value) => self.driver.write(&state, disk, *block, *value),
                GuestAct::Power(run_state) => self.driver.power(&state, *run_state),
            }
            .must("the guest can go on")?;
        }
        self.tell(format!("guest of {number}: {acts:?}"));
        self.watched[number].model.guest(&acts);
        Ok(())
    }

    pub(super) fn some_snapshot(&mut self, number: usize) -> Option<SnapshotId> {
        let live: Vec<SnapshotId> = self.watched[number].model.snapshots.keys().copied().collect();
        if live.is_empty() { None } else { Some(*self.random.pick(&live)) }
    }

    pub(super) fn command(&mut self, number: usize) -> Command {
        let Some(id) = self.some_snapshot(number) else { return self.create(number) };
        let snapshot = if self.random.chance(15) { SnapshotRef::Current } else { SnapshotRef::Id(id) };
        match self.random.below(100) {
            0..42 => self.create(number),
            42..60 => {
                let states =
                    [None, None, None, Some(RunState::Running), Some(RunState::Paused), Some(RunState::Off)];
                Command::Revert { snapshot, run_state: *self.random.pick(&states), keep: false }
            }
            60..85 => self.delete(number, snapshot),
            85..90 => Command::Edit {
                snapshot,
                name: Some(self.fresh_name()),
                description: None,
                labels: BTreeMap::new(),
            },
            90..95 => {
                let until = self.world.now().checked_add(SignedDuration::from_mins(30)).ok();
                let until = until.filter(|_| self.random.chance(70));
                Command::Hold { snapshot, reason: "kept".to_owned(), until }
            }
            _ => Command::Release { snapshot },
        }
    }

    fn create(&mut self, number: usize) -> Command {
        let disks: Vec<_> = self.watched[number]
            .rebuilt
            .domain
            .iter()
            .flat_map(|d| &d.disks)
            .map(|d| d.name.clone())
            .collect();
        let one = BTreeSet::from([self.random.pick(&disks).clone()]);
        let content =
            *self.random.pick(&[Content::Auto, Content::Auto, Content::DisksOnly, Content::WithMemory]);
        Command::Create(Create {
            name: Some(self.fresh_name()).filter(|_| self.random.chance(90)),
            content,
            disks: Some(one).filter(|_| self.random.chance(15)),
            ..Create::default()
        })
    }

    fn delete(&mut self, number: usize, snapshot: SnapshotRef) -> Command {
        let mut snapshots = vec![snapshot];
        if self.random.chance(20) {
            snapshots.extend(self.some_snapshot(number).map(SnapshotRef::Id));
        }
        let scopes = [
            DeleteScope::Named,
            DeleteScope::Named,
            DeleteScope::Named,
            DeleteScope::Named,
            DeleteScope::Children,
            DeleteScope::ChildrenOnly,
        ];
        let what = if self.random.chance(15) { DeleteWhat::Metadata } else { DeleteWhat::Snapshot };
        Command::Delete(Delete {
            snapshots,
            scope: *self.random.pick(&scopes),
            what,
            merge: *self.random.pick(&[MergeWish::Auto, MergeWish::Auto, MergeWish::Now, MergeWish::Defer]),
            reasons: vec![],
        })
    }

    /// Asks, sometimes with a key; returns the operation, if it is one.
    pub(super) async fn submit(
        &mut self,
        life: &Life,
        number: usize,
        command: Command,
    ) -> Result<Option<OperationId>, Violation> {
        let key = self.random.chance(30).then(|| {
            self.names += 1;
            format!("key-{}", self.names)
        });
        self.tell(format!("ask {number}: {command:?} {key:?}"));
        if let Some(key) = &key {
            let (key, command) = (key.clone(), command.clone());
            self.keyed.push(Keyed { domain: number, key, command, operation: None });
        }
        let id = self.watched[number].id;
        self.world.no_step();
        let answer = life.engine.submit(&life.requester, id, &command, key.as_deref()).await;
        let operation = match answer {
            Ok(Submitted::Operation(operation)) => {
                self.operations += 1;
                Some(operation)
            }
            Ok(Submitted::Recorded) => None,
            Err(EngineError::Rejected(rejection)) => {
                self.tell(format!("rejected: {rejection}"));
                None
            }
            Ok(Submitted::Repeated(operation)) => {
                return broken("a new key is new", format!("{operation}"));
            }
            Err(error) => return broken("a request is answered", error.to_string()),
        };
        if key.is_some() {
            match operation {
                Some(_) => self.keyed.last_mut().expect("it was pushed").operation = operation,
                None => drop(self.keyed.pop()),
            }
        }
        self.watched[number].catch_up(&self.world)?;
        Ok(operation)
    }

    /// A client that does not know whether it was heard asks again with the same key.
    async fn repeat(&mut self, life: &Life) -> Result<(), Violation> {
        let count = self.keyed.len();
        if count == 0 {
            return Ok(());
        }
        let at = self.random.below(count);
        let Keyed { domain, key, command, operation } = self.keyed[at].clone();
        if !self.watched[domain].model.registered {
            return Ok(());
        }
        self.tell(format!("ask {domain} again: {key}"));
        let id = self.watched[domain].id;
        let before = life.engine.log().head().await.must("the log can be read")?;
        match (life.engine.submit(&life.requester, id, &command, Some(&key)).await, operation) {
            (Ok(Submitted::Repeated(found)), Some(known)) if found == known => {
                let after = life.engine.log().head().await.must("the log can be read")?;
                if after.seq != before.seq {
                    return broken("a repeated key writes nothing", key);
                }
                let other = Command::Unregister(UnregisterWish::KeepLayers);
                match life.engine.submit(&life.requester, id, &other, Some(&key)).await {
                    Err(EngineError::Rejected(rejection)) if rejection.code == Code::Exists => {}
                    wrong => return broken("a key stands for one command", format!("{wrong:?}")),
                }
            }
            // The reply of the first one was lost in a crash.
            (Ok(Submitted::Repeated(found) | Submitted::Operation(found)), None) => {
                self.operations += 1;
                self.keyed[at].operation = Some(found);
            }
            (Ok(Submitted::Recorded) | Err(EngineError::Rejected(_)), None) => {
                self.keyed.remove(at);
            }
            (wrong, known) => {
                return broken(
                    "a repeated key gives the first operation",
                    format!("{wrong:?}, not {known:?}"),
                );
            }
        }
        self.drive(life, domain).await?;
        self.see_to_attention(life, domain).await?;
        self.check(life, domain).await
    }

    /// What would be done is said, and nothing is.
    async fn dry_run(&mut self, life: &Life, number: usize) -> Result<(), Violation> {
        let command = self.command(number);
        let id = self.watched[number].id;
        let state = life.engine.load(id).await.must("the domain can be loaded")?;
        let head = life.engine.log().head().await.must("the log can be read")?;
        let holding = self.driver.holding(&state).must("the hypervisor can be asked")?;
        let _ = life.engine.dry_run(&life.requester, id, &command).await;
        let after = life.engine.log().head().await.must("the log can be read")?;
        if head != after || holding != self.driver.holding(&state).must("the hypervisor can be asked")? {
            return broken("a dry run changes nothing", format!("{command:?}"));
        }
        Ok(())
    }

    async fn reconcile(&mut self, life: &Life, number: usize) -> Result<(), Violation> {
        self.tell(format!("reconcile {number}"));
        let id = self.watched[number].id;
        let driven = life.engine.reconcile(&life.requester, id, &NoWatch).await;
        driven.map(|_| ()).must("a domain can be reconciled")
    }

    /// A checkpoint is kept, as the engine does when the stream has grown enough.
    async fn checkpoint(&mut self, life: &Life, number: usize) -> Result<(), Violation> {
        let stream = StreamId::Domain(self.watched[number].id);
        let state = life.engine.load(self.watched[number].id).await.must("the domain can be loaded")?;
        let last = life.store.read_stream(&stream, state.version - 1, u64::MAX, 1).await;
        let last = last.must("the log can be read")?;
        let Some(last) = last.first() else { return broken("the log has its events", "the last is missing") };
        let checkpoint = Checkpoint {
            stream,
            version: state.version,
            seq: state.seq,
            hash: last.hash.to_string(),
            projector: PROJECTOR,
            state: serde_json::to_string(&state).must("a state can be written")?,
        };
        let told = NewEvent {
            stream: checkpoint.stream.clone(),
            event: CheckpointKept::of(PROJECTOR, &checkpoint.state).into(),
            operation: None,
            cause: None,
            key: None,
        };
        let Requester { actor, origin } = life.requester.clone();
        let expect = vec![(checkpoint.stream.clone(), checkpoint.version)];
        let append = Append { expect, actor, origin, at: self.world.now(), events: vec![told] };
        life.engine.log().append(append).await.must("a checkpoint can be told")?;
        life.store.save_checkpoint(checkpoint).await.must("a checkpoint can be kept")
    }
}
