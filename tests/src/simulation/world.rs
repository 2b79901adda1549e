//! What one seed rules: time, ids, faults and the moment at which the program is killed.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;
use jiff::{SignedDuration, Timestamp};
use snaptree_drivers::sim::{Direction, Fault, FaultPoint, Faults};
use snaptree_engine::driver::{Head, Hooks};
use snaptree_engine::engine::Clock;
use snaptree_engine::event::{Envelope, Event, Hash};
use snaptree_engine::ids::{DomainName, IdSource, PolicyName, StreamId};
use snaptree_engine::log::{
    Append, Checkpoint, DomainRow, EventFilter, EventLog, LogError, OperationFilter, OperationRow, SeqAt,
};
use snaptree_engine::operation::Reversal;
use snaptree_engine::{DomainId, OperationId};
use snaptree_store::Store;
use uuid::Uuid;

use super::coverage::{Cell, Coverage, Place, REQUEST, can_be_half_done, step_kind};
use crate::random::Random;

/// What a killed program leaves on the stack.
pub struct Killed;

/// Most faults of one step, so that each comes to its end.
const FAULTS_OF_A_STEP_MAX: u32 = 2;

/// Where the program is to be killed next.
#[derive(Clone, Copy, Debug)]
pub enum Aim {
    /// After so many more places.
    Any(u32),
    /// In this cell. The fault is seen to, for the first step of that kind.
    In(Cell),
}

/// Everything that one seed rules.
#[derive(Clone)]
pub struct World(Arc<Mutex<Inner>>);

struct Inner {
    random: Random,
    now: Timestamp,
    ids: u64,
    aim: Option<Aim>,
    chance: usize,
    coverage: Coverage,
    /// The kind of the step in hand, and the fault that befell it last.
    step: (&'static str, Option<Fault>),
    words: BTreeMap<OperationId, Vec<&'static str>>,
    faults: BTreeMap<(OperationId, usize, Direction), u32>,
    last: BTreeMap<(OperationId, usize), Fault>,
    /// Operations that were denied behind their point of no return.
    denied: BTreeSet<OperationId>,
    appended: Vec<(u64, Hash)>,
    /// What was appended in this life and nobody looked at yet, by domain.
    news: BTreeMap<DomainId, Vec<Envelope>>,
}

impl World {
    /// The world of a seed.
    ///
    /// # Panics
    /// Never: the first moment is a time.
    pub fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            random: Random::new(seed ^ 0x5eed_0000_0000_0000),
            now: Timestamp::from_second(1_795_401_658).expect("a time"),
            ids: 0,
            aim: None,
            chance: 0,
            coverage: Coverage::default(),
            step: (REQUEST, None),
            words: BTreeMap::new(),
            faults: BTreeMap::new(),
            last: BTreeMap::new(),
            denied: BTreeSet::new(),
            appended: Vec::new(),
            news: BTreeMap::new(),
        })))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The clock is set to another time.
    pub fn jump(&self, by: SignedDuration) {
        let mut inner = self.inner();
        inner.now = inner.now.checked_add(by).unwrap_or(inner.now);
    }

    /// Kills the program there; `None` lets it live.
    pub fn aim(&self, aim: Option<Aim>) {
        self.inner().aim = aim;
    }

    /// Where the program is to be killed next.
    pub fn aimed_at(&self) -> Option<Aim> {
        self.inner().aim
    }

    /// How many of 100 steps a fault befalls.
    pub fn fault_chance(&self, percent: usize) {
        self.inner().chance = percent;
    }

    /// Whether an operation was denied behind its point of no return, so that someone has to look at it.
    pub fn was_denied(&self, operation: OperationId) -> bool {
        self.inner().denied.contains(&operation)
    }

    /// Every event whose append returned since this was last asked: its place and its hash.
    pub fn take_appended(&self) -> Vec<(u64, Hash)> {
        std::mem::take(&mut self.inner().appended)
    }

    /// What was appended to a domain's stream in this life since this was last asked.
    pub fn take_news(&self, domain: DomainId) -> Vec<Envelope> {
        self.inner().news.remove(&domain).unwrap_or_default()
    }

    /// A process is gone, and with it what it knew.
    pub fn forget_news(&self) {
        self.inner().news.clear();
    }

    /// What was met.
    pub fn coverage(&self) -> Coverage {
        self.inner().coverage.clone()
    }

    /// No step is in hand.
    pub fn no_step(&self) {
        self.inner().step = (REQUEST, None);
    }

    /// A place was reached; the program may be killed here.
    fn reached(&self, name: &str) {
        let Some(place) = Place::of_hook(name) else { return };
        let mut inner = self.inner();
        let (kind, fault) = inner.step;
        let strikes = match &mut inner.aim {
            None => false,
            Some(Aim::Any(left)) => {
                let now = *left == 0;
                *left = left.saturating_sub(1);
                now
            }
            Some(Aim::In(cell)) => *cell == (kind, fault, place),
        };
        if strikes {
            inner.aim = None;
            inner.coverage.hit((kind, fault, place));
            drop(inner);
            resume_unwind(Box::new(Killed));
        }
    }

    /// Follows which step is in hand.
    fn follow(&self, envelopes: &[Envelope]) {
        let mut inner = self.inner();
        for envelope in envelopes {
            inner.appended.push((envelope.seq, envelope.hash));
            if let StreamId::Domain(domain) = envelope.stream {
                inner.news.entry(domain).or_default().push(envelope.clone());
            }
            let Some(operation) = envelope.operation else { continue };
            match &envelope.event {
                Event::OperationPlanned(e) => {
                    let words = e.steps.iter().map(|step| word(&step.data)).collect();
                    inner.words.insert(operation, words);
                }
                Event::OperationStepStarted(e) => inner.take_up(operation, e.step),
                Event::OperationUndoStarted(e) => inner.take_up(operation, e.step),
                Event::OperationStepFinished(e) => {
                    let kind = inner.word(operation, e.step);
                    let fault = inner.last.get(&(operation, e.step)).copied();
                    inner.met((kind, fault, Place::Nowhere));
                }
                Event::OperationUndoFinished(e) => {
                    let kind = inner.word(operation, e.step);
                    inner.met((kind, Some(Fault::Permanent), Place::Nowhere));
                }
                Event::OperationSucceeded(_)
                | Event::OperationFailed(_)
                | Event::OperationCancelled(_)
                | Event::OperationExpired(_) => inner.step = (REQUEST, None),
                _ => {}
            }
        }
    }
}

/// The driver's word for a step, read from its data.
fn word(data: &serde_json::Value) -> &'static str {
    let action = data["action"].as_str().unwrap_or_default();
    if action != "switch" {
        return step_kind(action);
    }
    let purpose = data["purpose"]["for"].as_str().unwrap_or_default();
    let restacks = data["restack"].as_array().is_some_and(|list| !list.is_empty());
    match purpose {
        "merge" if restacks => "switch-restack",
        other => step_kind(&format!("switch-{other}")),
    }
}

impl Inner {
    fn word(&self, operation: OperationId, step: usize) -> &'static str {
        self.words.get(&operation).and_then(|words| words.get(step)).copied().unwrap_or(REQUEST)
    }

    fn take_up(&mut self, operation: OperationId, step: usize) {
        self.step = (self.word(operation, step), self.last.get(&(operation, step)).copied());
    }

    /// A step came to its end in one life.
    fn met(&mut self, cell: Cell) {
        self.coverage.hit(cell);
        if matches!(self.aim, Some(Aim::In(aimed)) if aimed == cell) {
            self.aim = None;
        }
    }

    fn choose(&mut self, point: &FaultPoint) -> Option<Fault> {
        if let Some(Aim::In((kind, wanted, _))) = self.aim
            && kind == point.word
        {
            return self.choose_for(wanted, point);
        }
        let count = self.faults.entry((point.operation, point.step, point.direction)).or_default();
        if *count >= FAULTS_OF_A_STEP_MAX {
            return None;
        }
        let roll = self.random.below(100);
        if roll >= self.chance {
            return None;
        }
        let fault = match *self.random.pick(&Fault::ALL) {
            Fault::HalfDone if !can_be_half_done(point.word) => Fault::Hang,
            fault => fault,
        };
        let fault = match (point.direction, fault) {
            (Direction::Back, Fault::Transient | Fault::LostReply | Fault::Hang) => fault,
            (Direction::Back, _) => Fault::Transient,
            (Direction::Forward, Fault::Permanent) if point.reversal == Reversal::ForwardOnly => {
                if !self.random.chance(20) {
                    return None;
                }
                self.denied.insert(point.operation);
                fault
            }
            (Direction::Forward, _) => fault,
        };
        *self.faults.entry((point.operation, point.step, point.direction)).or_default() += 1;
        Some(fault)
    }

    /// The fault that the aim is about befalls each step of its kind once, and nothing else does.
    fn choose_for(&mut self, wanted: Option<Fault>, point: &FaultPoint) -> Option<Fault> {
        let before = self.last.get(&(point.operation, point.step)).copied();
        let fault =
            wanted.filter(|wanted| point.direction == Direction::Forward && before != Some(*wanted))?;
        if fault == Fault::Permanent && point.reversal == Reversal::ForwardOnly {
            self.denied.insert(point.operation);
        }
        Some(fault)
    }
}

#[async_trait]
impl Clock for World {
    fn now(&self) -> Timestamp {
        self.inner().now
    }

    async fn sleep_until(&self, until: Timestamp) {
        let mut inner = self.inner();
        inner.now = inner.now.max(until);
    }
}

impl IdSource for World {
    fn next(&self) -> Uuid {
        let mut inner = self.inner();
        inner.ids += 1;
        let ids = inner.ids;
        inner.random.id(ids)
    }
}

impl Hooks for World {
    fn reached(&self, name: &str) {
        World::reached(self, name);
    }
}

#[async_trait]
impl Faults for World {
    fn fault(&self, point: &FaultPoint) -> Option<Fault> {
        let mut inner = self.inner();
        let fault = inner.choose(point);
        let key = (point.operation, point.step);
        if let Some(fault) = fault
            && point.direction == Direction::Forward
        {
            inner.last.insert(key, fault);
        }
        let known = match point.direction {
            Direction::Forward => inner.last.get(&key).copied(),
            Direction::Back => Some(Fault::Permanent),
        };
        inner.step = (step_kind(point.word), known);
        fault
    }

    async fn latency(&self, _point: &FaultPoint) {
        let mut inner = self.inner();
        let random = if inner.random.chance(5) { 600_000 } else { inner.random.below(200) };
        let ms = i64::try_from(random).unwrap_or(0);
        inner.now = inner.now.checked_add(SignedDuration::from_millis(ms)).unwrap_or(inner.now);
    }
}

/// The store, with places to be killed at, which remembers what it promised to keep.
pub struct Recorder {
    /// The real one.
    pub store: Arc<Store>,
    /// Who watches.
    pub world: World,
}

#[async_trait]
impl EventLog for Recorder {
    async fn append(&self, append: Append) -> Result<Vec<Envelope>, LogError> {
        self.world.reached("log.before");
        let appended = self.store.append(append).await?;
        self.world.reached("log.after");
        self.world.follow(&appended);
        Ok(appended)
    }

    async fn read_stream(
        &self,
        stream: &StreamId,
        version: u64,
        seq_max: u64,
        count: usize,
    ) -> Result<Vec<Envelope>, LogError> {
        self.store.read_stream(stream, version, seq_max, count).await
    }

    async fn read(&self, seq: u64, filter: &EventFilter, count: usize) -> Result<Vec<Envelope>, LogError> {
        self.store.read(seq, filter, count).await
    }

    async fn head(&self) -> Result<Head, LogError> {
        self.store.head().await
    }

    async fn by_key(&self, stream: &StreamId, key: &str) -> Result<Option<Envelope>, LogError> {
        self.store.by_key(stream, key).await
    }

    async fn checkpoint(
        &self,
        stream: &StreamId,
        projector: u32,
        seq_max: u64,
    ) -> Result<Option<Checkpoint>, LogError> {
        self.store.checkpoint(stream, projector, seq_max).await
    }

    async fn save_checkpoint(&self, checkpoint: Checkpoint) -> Result<(), LogError> {
        self.store.save_checkpoint(checkpoint).await
    }

    async fn domains(&self, seq_max: u64) -> Result<Vec<DomainRow>, LogError> {
        self.store.domains(seq_max).await
    }

    async fn domain_by_name(&self, name: &DomainName) -> Result<Option<DomainRow>, LogError> {
        self.store.domain_by_name(name).await
    }

    async fn policies(&self) -> Result<Vec<PolicyName>, LogError> {
        self.store.policies().await
    }

    async fn operations(
        &self,
        filter: &OperationFilter,
        count: usize,
    ) -> Result<Vec<OperationRow>, LogError> {
        self.store.operations(filter, count).await
    }

    async fn seq_at(&self, at: Timestamp) -> Result<SeqAt, LogError> {
        self.store.seq_at(at).await
    }
}

/// The id of a domain, by its number.
pub fn domain_id(number: usize) -> DomainId {
    DomainId::from_uuid(Uuid::from_u128((0xd0 << 120) | (0x7 << 76) | (0b10 << 62) | number as u128))
}
