//! What has to be true: libvirt's rules over the outcomes that the log tells, and the guest's own account of what it
//! wrote. Nothing of the engine's projection is used.
//!
//! While a step was in flight when the program was killed, nobody outside can tell whether it took effect before or
//! after what the guest did meanwhile. Both are kept as possible, until the next look tells.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use snaptree_drivers::sim::{ByHand, Holding};
use snaptree_engine::domain::{Domain, RunState};
use snaptree_engine::event::{Envelope, Event, MemoryKind};
use snaptree_engine::operation::{Failure, Outcome, Request};
use snaptree_engine::tree::Hold;
use snaptree_engine::{DiskName, OperationId, SnapshotId, SnapshotName};

/// What the guest, or the person at the machine, does.
#[derive(Clone, Debug)]
pub enum GuestAct {
    /// Writes a block.
    Write(DiskName, u64, u64),
    /// Switches the machine on or off, pauses or resumes it.
    Power(RunState),
}

/// A snapshot.
#[derive(Clone, Debug)]
pub struct Known {
    /// Its name.
    pub name: SnapshotName,
    /// Its parent.
    pub parent: Option<SnapshotId>,
    /// What it may hold: one thing, once it was looked at.
    pub holdings: Vec<Holding>,
    /// The mark that forbids its deletion.
    pub hold: Option<Hold>,
    /// Whether someone deleted it at the hypervisor itself.
    pub lost: bool,
}

/// What a hypervisor that lists snapshots has, by libvirt's rules. It differs from the tree once someone used the
/// hypervisor itself. A snapshot that does not carry our mark stands for its nearest ancestor that does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listed {
    /// Ours, with their parents.
    pub parents: BTreeMap<SnapshotId, Option<SnapshotId>>,
    /// Where the machine stands.
    pub current: Option<SnapshotId>,
    /// How many carry no mark of ours.
    pub unmarked: usize,
}

impl Listed {
    fn remove(&mut self, id: SnapshotId) {
        let Some(parent) = self.parents.remove(&id) else { return };
        for above in self.parents.values_mut().chain([&mut self.current]) {
            if *above == Some(id) {
                *above = parent;
            }
        }
    }
}

/// An operation.
#[derive(Clone, Debug)]
pub struct Asked {
    /// What was asked.
    pub request: Request,
    /// When.
    pub at: Timestamp,
    /// How it ended.
    pub outcome: Option<Outcome>,
    /// Why it did not succeed, or rests.
    pub failure: Option<Failure>,
    /// Whether a step is in flight.
    pub in_flight: bool,
    /// Whether it waits for someone.
    pub attention: bool,
    /// Whether someone wanted it taken back.
    pub called_off: bool,
    /// Whether its first step was begun once.
    begun: bool,
}

/// One domain.
#[derive(Clone, Debug)]
pub struct Model {
    /// Whether it is registered.
    pub registered: bool,
    /// The live snapshots.
    pub snapshots: BTreeMap<SnapshotId, Known>,
    /// The current one.
    pub current: Option<SnapshotId>,
    /// What the machine may hold.
    pub machine: Vec<Holding>,
    /// What the hypervisor lists.
    pub listed: Listed,
    /// Every snapshot that was ever lost.
    pub lost: BTreeSet<SnapshotId>,
    /// Every operation.
    pub operations: BTreeMap<OperationId, Asked>,
    /// What the machine held before each batch of the guest's acts since the step in flight began.
    window: Vec<(Vec<Holding>, Vec<GuestAct>)>,
}

/// The machine brought to a run state: one that was off boots with an empty memory.
fn brought_to(holding: &mut Holding, run_state: RunState) {
    let memory = holding.memory.unwrap_or(0);
    holding.run_state = run_state;
    holding.memory = (run_state != RunState::Off).then_some(memory);
}

fn act(holding: &mut Holding, done: &GuestAct) {
    match done {
        GuestAct::Write(disk, block, value) => {
            if let Some(blocks) = holding.disks.get_mut(disk) {
                if *value == 0 {
                    blocks.remove(block);
                } else {
                    blocks.insert(*block, *value);
                }
            }
            if holding.run_state == RunState::Running {
                holding.memory = holding.memory.map(|memory| memory.wrapping_add(1));
            }
        }
        GuestAct::Power(run_state) => brought_to(holding, *run_state),
    }
}

fn taken(machine: &Holding, disks: &BTreeSet<DiskName>, memory: MemoryKind) -> Holding {
    let mut holding = machine.clone();
    holding.disks.retain(|disk, _| disks.contains(disk));
    if memory == MemoryKind::No {
        brought_to(&mut holding, RunState::Off);
    }
    holding
}

/// The moment after which a request must not begin any more.
fn deadline(request: &Request) -> Option<Timestamp> {
    match request {
        Request::Create(request) => request.request.deadline,
        Request::Revert(request) => request.request.deadline,
        Request::Delete(_) | Request::Edit(_) | Request::Merge(_) | Request::Unregister(_) => None,
    }
}

fn keep(list: &mut Vec<Holding>, holding: Holding) {
    if !list.contains(&holding) {
        list.push(holding);
    }
}

impl Model {
    /// A domain that was registered just now.
    pub fn new(domain: &Domain) -> Self {
        let disks = domain.disks.iter().map(|disk| (disk.name.clone(), BTreeMap::new())).collect();
        Self {
            registered: true,
            snapshots: BTreeMap::new(),
            current: None,
            machine: vec![Holding { disks, run_state: RunState::Off, memory: None }],
            listed: Listed::default(),
            lost: BTreeSet::new(),
            operations: BTreeMap::new(),
            window: Vec::new(),
        }
    }

    /// The guest did something, after the last event that was applied.
    pub fn guest(&mut self, acts: &[GuestAct]) {
        if self.operations.values().any(|asked| asked.in_flight) {
            self.window.push((self.machine.clone(), acts.to_vec()));
        }
        for holding in &mut self.machine {
            acts.iter().for_each(|done| act(holding, done));
        }
    }

    /// Someone used the hypervisor itself, while nothing was open.
    pub fn by_hand(&mut self, act: &ByHand) {
        match act {
            ByHand::Take(_) => self.listed.unmarked += 1,
            ByHand::Rename(..) => {}
            ByHand::Remove(id) => {
                self.listed.remove(*id);
                self.lost.insert(*id);
                if let Some(known) = self.snapshots.get_mut(id) {
                    known.lost = true;
                }
            }
            ByHand::Revert(id) => {
                self.listed.current = Some(*id);
                let kept = self.snapshots.get(id).map(|known| known.holdings.clone()).unwrap_or_default();
                self.machine = self.brought_back(&kept, None);
            }
        }
    }

    /// What the machine may hold after a revert to one of `kept`.
    fn brought_back(&self, kept: &[Holding], run_state: Option<RunState>) -> Vec<Holding> {
        let mut machine = Vec::new();
        for (before, later) in self.moments() {
            for kept in kept {
                let mut holding = before.clone();
                holding.disks.extend(kept.disks.clone());
                (holding.run_state, holding.memory) = (kept.run_state, kept.memory);
                if let Some(wanted) = run_state {
                    brought_to(&mut holding, wanted);
                }
                later.iter().for_each(|done| act(&mut holding, done));
                keep(&mut machine, holding);
            }
        }
        machine
    }

    /// Applies the next event of the domain.
    ///
    /// # Errors
    /// The event breaks a rule.
    pub fn apply(&mut self, envelope: &Envelope) -> Result<(), String> {
        if let (Some(request), Some(id)) = (Request::of(&envelope.event), envelope.operation) {
            return self.asked(id, request, envelope.at);
        }
        match &envelope.event {
            Event::DomainUnregistered(_) => self.registered = false,
            Event::SnapshotCreated(e) => return self.created(envelope, e.snapshot.id),
            Event::SnapshotReverted(e) => return self.reverted(envelope, e.snapshot),
            Event::SnapshotDeleted(e) => return self.deleted(envelope, e.snapshot),
            Event::SnapshotEdited(e) => {
                if let (Some(known), Some(name)) = (self.snapshots.get_mut(&e.snapshot), &e.name) {
                    known.name = name.clone();
                }
            }
            Event::SnapshotHeld(e) => {
                if let Some(known) = self.snapshots.get_mut(&e.snapshot) {
                    known.hold = Some(e.hold.clone());
                }
            }
            Event::SnapshotReleased(e) => {
                if let Some(known) = self.snapshots.get_mut(&e.snapshot) {
                    known.hold = None;
                }
            }
            _ => {}
        }
        self.follow(envelope)
    }

    fn asked(&mut self, id: OperationId, request: Request, at: Timestamp) -> Result<(), String> {
        if let Request::Delete(delete) = &request {
            let held = |id: &&SnapshotId| {
                let hold = self.snapshots.get(id).and_then(|known| known.hold.as_ref());
                hold.is_some_and(|hold| hold.in_force(at))
            };
            if let Some(held) = delete.snapshots.iter().find(held) {
                return Err(format!("the held snapshot {held} is to be deleted"));
            }
        }
        let asked = Asked {
            request,
            at,
            outcome: None,
            failure: None,
            in_flight: false,
            attention: false,
            called_off: false,
            begun: false,
        };
        match self.operations.insert(id, asked) {
            Some(_) => Err(format!("operation {id} was asked for twice")),
            None => Ok(()),
        }
    }

    /// Where the machine stood at each moment at which the step in flight may have taken effect, with what the guest
    /// did afterwards.
    fn moments(&self) -> Vec<(Holding, Vec<GuestAct>)> {
        let mut moments = Vec::new();
        for (index, (before, _)) in self.window.iter().enumerate() {
            let later: Vec<GuestAct> =
                self.window[index..].iter().flat_map(|(_, acts)| acts.clone()).collect();
            moments.extend(before.iter().map(|holding| (holding.clone(), later.clone())));
        }
        moments.extend(self.machine.iter().map(|holding| (holding.clone(), Vec::new())));
        moments
    }

    fn operation_of(&self, envelope: &Envelope) -> Result<&Asked, String> {
        let asked = envelope.operation.and_then(|id| self.operations.get(&id));
        asked.ok_or_else(|| format!("event {} has no operation", envelope.seq))
    }

    fn created(&mut self, envelope: &Envelope, id: SnapshotId) -> Result<(), String> {
        let Request::Create(request) = self.operation_of(envelope)?.request.clone() else {
            return Err(format!("snapshot {id} was created by something else than a create"));
        };
        if request.snapshot != id || self.snapshots.contains_key(&id) {
            return Err(format!("snapshot {id} was created twice, or for another one"));
        }
        let mut holdings = Vec::new();
        for (machine, _) in self.moments() {
            keep(&mut holdings, taken(&machine, &request.disks, request.memory));
        }
        let parent = self.current.replace(id);
        self.snapshots.insert(id, Known { name: request.name, parent, holdings, hold: None, lost: false });
        let below = self.listed.current.replace(id);
        self.listed.parents.insert(id, below);
        Ok(())
    }

    fn reverted(&mut self, envelope: &Envelope, id: SnapshotId) -> Result<(), String> {
        let Request::Revert(request) = self.operation_of(envelope)?.request.clone() else {
            return Err("a revert that nobody asked for".to_owned());
        };
        let known = self.snapshots.get(&id).filter(|known| request.snapshot == id && !known.lost);
        let known = known.ok_or_else(|| format!("reverted to {id}, which is not there"))?;
        self.machine = self.brought_back(&known.holdings, request.run_state);
        self.current = Some(id);
        self.listed.current = Some(id);
        Ok(())
    }

    fn deleted(&mut self, envelope: &Envelope, id: SnapshotId) -> Result<(), String> {
        match &self.operation_of(envelope)?.request {
            Request::Delete(request) if request.snapshots.contains(&id) => {}
            Request::Unregister(_) => {}
            _ => return Err(format!("snapshot {id} was deleted, and nobody asked for it")),
        }
        self.listed.remove(id);
        let gone = self.snapshots.remove(&id).ok_or_else(|| format!("snapshot {id} was deleted twice"))?;
        for known in self.snapshots.values_mut().filter(|known| known.parent == Some(id)) {
            known.parent = gone.parent;
        }
        if self.current == Some(id) {
            self.current = gone.parent;
        }
        Ok(())
    }

    /// Where an operation stands.
    fn follow(&mut self, envelope: &Envelope) -> Result<(), String> {
        let Some(asked) = envelope.operation.and_then(|id| self.operations.get_mut(&id)) else {
            return Ok(());
        };
        let ended = match &envelope.event {
            Event::OperationStepStarted(_) => {
                asked.in_flight = true;
                let first = !std::mem::replace(&mut asked.begun, true);
                return match deadline(&asked.request).filter(|deadline| first && *deadline < envelope.at) {
                    Some(deadline) => Err(format!("an operation began after its deadline {deadline}")),
                    None => Ok(()),
                };
            }
            Event::OperationUndoStarted(_) => {
                asked.in_flight = true;
                return Ok(());
            }
            Event::OperationNeedsAttention(e) => {
                asked.attention = true;
                asked.failure = Some(e.failure.clone());
                return Ok(());
            }
            Event::OperationRetried(_) => {
                asked.attention = false;
                return Ok(());
            }
            Event::OperationResolved(e) => {
                asked.attention = false;
                match e.abandoned() {
                    Some(failure) => (Outcome::Failed, Some(failure)),
                    None => return Ok(()),
                }
            }
            Event::OperationSucceeded(_) => (Outcome::Succeeded, None),
            Event::OperationFailed(e) => (Outcome::Failed, Some(e.failure.clone())),
            Event::OperationCancelled(e) => (Outcome::Cancelled, Some(e.failure.clone())),
            Event::OperationExpired(e) => {
                if deadline(&asked.request).is_none_or(|deadline| deadline >= envelope.at) {
                    return Err("an operation expired before its deadline".to_owned());
                }
                (Outcome::Expired, Some(e.failure.clone()))
            }
            _ => return Ok(()),
        };
        if asked.outcome.is_some() {
            return Err(format!("operation {:?} ended twice", envelope.operation));
        }
        (asked.outcome, asked.failure) = (Some(ended.0), ended.1);
        asked.in_flight = false;
        // One that only waited may end while another one's step is in flight.
        if !self.operations.values().any(|asked| asked.in_flight) {
            self.window.clear();
        }
        Ok(())
    }
}
