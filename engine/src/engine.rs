//! The facade: everything that a program does with Snaptree goes through [`Engine`].

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use sha2::{Digest, Sha256};
use tracing::instrument;

use crate::around::{HookRunner, NoHookRunner};
use crate::command::{Command, reject};
use crate::decide::{Ctx, decide};
use crate::domain::{Domain, DriverKind};
use crate::driver::{
    CallOff, Driver, Hooks, NoHooks, NoWatch, Observation, Plan, PowerWish, Registration, Resolution,
    StepContext, Watch,
};
use crate::event::{Actor, DeleteWhat, DomainRegistered, Envelope, Event, Origin, RequestTerms};
use crate::ids::{DomainId, DomainName, IdSource, LayerId, OperationId, StreamId, UuidV7};
use crate::layer::{LayerChange, Role};
use crate::loaded::Loaded;
use crate::log::{Append, Checkpoint, DomainRow, EventFilter, EventLog, LogError, NewEvent, SeqAt};
use crate::operation::{Code, Request, Verdict as Said};
use crate::project::{DomainState, PROJECTOR};
use crate::reconcile::beside::{self, Blocked};
use crate::reconcile::connection::{Bounded, ConnectionState, Connections, WhenSuspended};
use crate::reconcile::merge::Verdict;
use crate::reconcile::recovery::{Recovered, recover_domain, unrecovered};
use crate::reconcile::space::{self, Frees, Occupied};
use crate::reconcile::worker::{Driven, Worker};

pub use crate::error::EngineError;
pub use crate::settings::{Clock, Foreign, Settings, Stop, SystemClock};

/// How many events are read from a stream at once.
const PAGE_EVENTS: usize = 4_096;
/// How often a request is decided anew because somebody else appended first.
pub(crate) const CONFLICTS_MAX: u32 = 16;

/// Who asks, and from where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requester {
    /// Who.
    pub actor: Actor,
    /// From where.
    pub origin: Origin,
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Submitted {
    /// It is an operation, to be driven.
    Operation(OperationId),
    /// The same key and command was given before, and this operation was its answer.
    Repeated(OperationId),
    /// It was carried out by being written.
    Recorded,
}

/// What a request would do. Nothing was written or touched.
#[derive(Clone, Debug)]
pub struct DryRun {
    /// The request.
    pub request: Request,
    /// Its steps and costs; the space is that of the worst moment, merges included.
    pub plan: Plan,
    /// For a delete: what becomes of each tombstone.
    pub merges: Vec<Verdict>,
    /// For a delete: what it gives back once all of it is merged; none where that cannot be told.
    pub frees: Option<Frees>,
    /// The domain, as the log tells it.
    pub state: DomainState,
    /// The domain as it would be after the request, before any merge.
    pub after: DomainState,
}

/// Snaptree, without a terminal, a database or a hypervisor of its own: those are given to it.
#[derive(Clone)]
pub struct Engine {
    pub(crate) log: Arc<dyn EventLog>,
    pub(crate) drivers: BTreeMap<DriverKind, Arc<dyn Driver>>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) ids: Arc<dyn IdSource>,
    pub(crate) hooks: Arc<dyn Hooks>,
    pub(crate) hook_runner: Arc<dyn HookRunner>,
    pub(crate) settings: Settings,
    pub(crate) stop: Stop,
    loaded: Arc<Loaded>,
    pub(crate) connections: Arc<Connections>,
    pub(crate) when_suspended: WhenSuspended,
}

impl Engine {
    /// An engine on a log, with the system's clock and ids, default settings and no driver.
    pub fn new(log: Arc<dyn EventLog>) -> Self {
        let settings = Settings::default();
        Self {
            log,
            connections: Arc::new(Connections::new(&settings)),
            drivers: BTreeMap::new(),
            clock: Arc::new(SystemClock),
            ids: Arc::new(UuidV7),
            hooks: Arc::new(NoHooks),
            hook_runner: Arc::new(NoHookRunner),
            settings,
            stop: Stop::default(),
            loaded: Arc::default(),
            when_suspended: WhenSuspended::default(),
        }
    }

    /// Adds a hypervisor.
    #[must_use]
    pub fn with_driver(mut self, kind: DriverKind, driver: Arc<dyn Driver>) -> Self {
        self.drivers.insert(kind, driver);
        self
    }

    /// Takes another clock.
    #[must_use]
    pub fn with_clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    /// Takes other ids.
    #[must_use]
    pub fn with_ids(mut self, ids: Arc<dyn IdSource>) -> Self {
        self.ids = ids;
        self
    }

    /// Calls these hooks at the named places.
    #[must_use]
    pub fn with_hooks(mut self, hooks: Arc<dyn Hooks>) -> Self {
        self.hooks = hooks;
        self
    }

    /// Runs the programs before and after by this.
    #[must_use]
    pub fn with_hook_runner(mut self, hook_runner: Arc<dyn HookRunner>) -> Self {
        self.hook_runner = hook_runner;
        self
    }

    /// Takes other settings.
    #[must_use]
    pub fn with_settings(mut self, settings: Settings) -> Self {
        self.connections = Arc::new(Connections::new(&settings));
        self.settings = settings;
        self
    }

    /// Says what a call gets while its connection is suspended.
    #[must_use]
    pub fn with_suspended(mut self, when_suspended: WhenSuspended) -> Self {
        self.when_suspended = when_suspended;
        self
    }

    /// How the connection stands that a domain is reached by; none for a domain without a driver.
    pub fn connection_of(&self, state: &DomainState) -> Option<ConnectionState> {
        let domain = state.domain.as_ref()?;
        let driver = self.drivers.get(&domain.driver)?;
        Some(self.connections.state(driver.connection(domain)))
    }

    /// How the connections that were used stand.
    pub fn connections(&self) -> Vec<ConnectionState> {
        self.connections.states()
    }

    /// The handle that asks the work in hand to end.
    pub fn stop_handle(&self) -> Stop {
        self.stop.clone()
    }

    /// Now, by the engine's clock.
    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// Returns at `until` by the engine's clock, or at once if that has passed.
    pub async fn sleep_until(&self, until: Timestamp) {
        self.clock.sleep_until(until).await;
    }

    /// The log.
    pub fn log(&self) -> &Arc<dyn EventLog> {
        &self.log
    }

    /// The hypervisor of that kind.
    pub(crate) fn driver(&self, kind: DriverKind) -> Result<Arc<dyn Driver>, EngineError> {
        self.drivers.get(&kind).cloned().ok_or_else(|| {
            EngineError::Rejected(reject(Code::Unsupported, format!("this program has no driver for {kind}")))
        })
    }

    /// The registered domains, in the order of their names.
    ///
    /// # Errors
    /// The store failed.
    pub async fn domains(&self) -> Result<Vec<DomainRow>, EngineError> {
        Ok(self.log.domains(u64::MAX).await?)
    }

    /// Finds a registered domain by name or id.
    ///
    /// # Errors
    /// `NotFound`, or the store failed.
    pub async fn find_domain(&self, wanted: &str) -> Result<DomainId, EngineError> {
        self.find_domain_at(wanted, u64::MAX).await
    }

    /// Finds a domain that was registered when the log ended at `seq_max`.
    ///
    /// # Errors
    /// `NotFound`, or the store failed.
    pub async fn find_domain_at(&self, wanted: &str, seq_max: u64) -> Result<DomainId, EngineError> {
        let unknown = || {
            let shown: String = wanted.chars().filter(|c| !c.is_control()).take(60).collect();
            EngineError::Rejected(
                reject(Code::NotFound, format!("there is no domain '{shown}'"))
                    .hint("`snaptree domain list` lists them, `snaptree domain add` registers one"),
            )
        };
        if let Ok(id) = wanted.parse::<DomainId>() {
            let known = self.log.domains(seq_max).await?.iter().any(|row| row.id == id);
            return known.then_some(id).ok_or_else(unknown);
        }
        let name = DomainName::new(wanted).map_err(|_| unknown())?;
        let found = if seq_max == u64::MAX {
            self.log.domain_by_name(&name).await?
        } else {
            self.log.domains(seq_max).await?.into_iter().find(|row| row.name == name)
        };
        found.map(|row| row.id).ok_or_else(unknown)
    }

    /// The domain as the log tells it.
    ///
    /// # Errors
    /// The store failed, or the log contradicts itself.
    pub async fn load(&self, domain: DomainId) -> Result<DomainState, EngineError> {
        self.load_at(domain, u64::MAX).await
    }

    /// The domain as the log told it when it ended at `seq_max`.
    ///
    /// # Errors
    /// The store failed, or the log contradicts itself.
    #[instrument(skip(self))]
    pub async fn load_at(&self, domain: DomainId, seq_max: u64) -> Result<DomainState, EngineError> {
        let stream = StreamId::Domain(domain);
        let mut state = match self.loaded.get(domain, seq_max) {
            Some(state) => state,
            None => {
                let checkpoint = self.log.checkpoint(&stream, PROJECTOR, seq_max).await?;
                checkpoint.and_then(|c| serde_json::from_str(&c.state).ok()).unwrap_or_default()
            }
        };
        let known = state.version;
        loop {
            let page = self.log.read_stream(&stream, state.version, seq_max, PAGE_EVENTS).await?;
            state.apply_all(&page);
            if page.len() < PAGE_EVENTS {
                break;
            }
        }
        match state.illegal.clone() {
            Some(source) => Err(EngineError::Illegal { domain, source }),
            None => {
                if seq_max == u64::MAX && state.version != known {
                    self.loaded.keep(domain, &state);
                }
                Ok(state)
            }
        }
    }

    /// Keeps what a worker knows of its domain, so that it need not be read again.
    pub(crate) fn remember(&self, state: &DomainState) {
        if let (Some(domain), None) = (&state.domain, &state.illegal) {
            self.loaded.keep(domain.id, state);
        }
    }

    /// Keeps a checkpoint of `state`, whose last event is `last`.
    pub(crate) async fn keep_checkpoint(&self, state: &DomainState, last: &Envelope) {
        let Some(domain) = &state.domain else { return };
        let Ok(text) = serde_json::to_string(state) else { return };
        let checkpoint = Checkpoint {
            stream: StreamId::Domain(domain.id),
            version: state.version,
            seq: state.seq,
            hash: last.hash.to_string(),
            projector: PROJECTOR,
            state: text,
        };
        if let Err(error) = self.log.save_checkpoint(checkpoint).await {
            tracing::debug!(%error, "the checkpoint was not kept; nothing depends on it");
        }
    }

    /// Looks at a domain and registers it. Returns what was found, and notes for the user.
    ///
    /// # Errors
    /// The name is taken, the driver says that it is unfit, or the store failed.
    pub async fn register(
        &self,
        requester: &Requester,
        registration: Registration,
        labels: crate::tree::Labels,
    ) -> Result<(Domain, Vec<String>), EngineError> {
        self.name_is_free(&registration.name).await?;
        crate::decide::labels_fit(&labels)?;
        let driver = self.driver(registration.driver)?;
        let probe = driver.probe(&registration).await.map_err(EngineError::Driver)?;
        let domain = Domain {
            id: registration.id,
            name: registration.name,
            driver: registration.driver,
            disks: probe.disks,
            config: probe.config,
            labels,
            capabilities: probe.capabilities,
        };
        let stream = StreamId::Domain(domain.id);
        let event = NewEvent {
            stream: stream.clone(),
            event: DomainRegistered { domain: domain.clone() }.into(),
            operation: None,
            cause: None,
            key: None,
        };
        self.append(requester, vec![(stream, 0)], vec![event]).await?;
        Ok((domain, probe.notes))
    }

    /// A fresh domain id.
    pub fn fresh_domain_id(&self) -> DomainId {
        DomainId::from_uuid(self.ids.next())
    }

    async fn name_is_free(&self, name: &DomainName) -> Result<(), EngineError> {
        match self.log.domain_by_name(name).await? {
            Some(_) => Err(reject(Code::Exists, format!("a domain '{name}' is registered already"))
                .hint("choose another name, or `snaptree domain remove` the old one")
                .into()),
            None => Ok(()),
        }
    }

    pub(crate) async fn append(
        &self,
        requester: &Requester,
        expect: Vec<(StreamId, u64)>,
        events: Vec<NewEvent>,
    ) -> Result<Vec<Envelope>, LogError> {
        let append = Append {
            expect,
            actor: requester.actor.clone(),
            origin: requester.origin.clone(),
            at: self.clock.now(),
            events,
        };
        self.log.append(append).await
    }

    /// Decides a command and writes what follows from it. An operation is then to be [driven](Engine::drive).
    ///
    /// A `key` makes it idempotent: the same key with the same command is answered with the first operation.
    ///
    /// # Errors
    /// A rejection (nothing was written), or the store failed.
    #[instrument(skip_all, fields(%domain))]
    pub async fn submit(
        &self,
        requester: &Requester,
        domain: DomainId,
        command: &Command,
        key: Option<&str>,
    ) -> Result<Submitted, EngineError> {
        if let Command::Set { name: Some(name), .. } = command {
            let owner = self.log.domain_by_name(name).await?;
            if owner.is_some_and(|row| row.id != domain) {
                self.name_is_free(name).await?;
            }
        }
        let digest = key.map(|_| command_digest(command)).transpose()?;
        let stream = StreamId::Domain(domain);
        let mut conflicts = 0;
        loop {
            if let (Some(key), Some(digest)) = (key, &digest)
                && let Some(earlier) = self.log.by_key(&stream, key).await?
            {
                return repeated(&earlier, key, digest);
            }
            let state = self.load_for_work(requester, domain).await?;
            let ctx = self.ctx(requester, &state, digest.clone());
            let mut events = decide(&state, command, &ctx)?;
            if let Command::Resolve { operation, verdict: Said::Done | Said::Abandon, .. } = command {
                self.fill_in_changes(&state, *operation, &mut events).await;
            }
            let operation = OperationId::from_uuid(self.ids.next());
            let (submitted, events) = self.addressed(&stream, command, operation, key, events);
            match self.append(requester, vec![(stream.clone(), state.version)], events).await {
                Ok(_) => return Ok(submitted),
                Err(LogError::Conflict { .. } | LogError::KeyUsed { .. }) if conflicts < CONFLICTS_MAX => {
                    conflicts += 1;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// What of the layer graph changed with a step that someone says is done, or with an operation that is abandoned, as
    /// far as an observation tells.
    async fn fill_in_changes(&self, state: &DomainState, id: OperationId, events: &mut [Event]) {
        let Some((operation, step)) =
            state.operation(id).and_then(|found| Some((found, found.step_in_hand()?)))
        else {
            return;
        };
        let Ok(driver) = self.driver_of(state) else { return };
        let (Ok(seen), Ok(head)) = (driver.observe(state).await, self.log.head().await) else { return };
        let context = StepContext {
            state,
            operation: id,
            request: &operation.request,
            index: step,
            head,
            now: self.clock.now(),
            hooks: &*self.hooks,
            progress: &NoWatch,
            call_off: CallOff::default(),
        };
        let Some(step) = operation.steps.get(step) else { return };
        for event in events {
            let Event::OperationResolved(resolved) = event else { continue };
            resolved.changes = match resolved.verdict {
                Said::Abandon => vanished(state, &seen),
                Said::Done | Said::NotDone => match driver.resolve(&context, step, &seen) {
                    Resolution::Done(report) => report.changes,
                    _ => Vec::new(),
                },
            };
        }
    }

    pub(crate) fn ctx(&self, requester: &Requester, state: &DomainState, digest: Option<String>) -> Ctx {
        let now = self.clock.now();
        let wait = self.settings.first_step_s_max.and_then(|seconds| i64::try_from(seconds).ok());
        let deadline = wait.and_then(|seconds| now.checked_add(SignedDuration::from_secs(seconds)).ok());
        Ctx {
            now,
            fresh: self.ids.next(),
            actor: requester.actor.clone(),
            terms: RequestTerms { command_sha256: digest, deadline, around: None },
            blocked: self.driver_of(state).map_or(Blocked::Domain, |driver| beside::blocked(&*driver, state)),
        }
    }

    /// Puts decided events on their stream: a request begins an operation, the rest is only recorded.
    pub(crate) fn addressed(
        &self,
        stream: &StreamId,
        command: &Command,
        operation: OperationId,
        key: Option<&str>,
        events: Vec<Event>,
    ) -> (Submitted, Vec<NewEvent>) {
        let is_request = events.iter().any(|event| Request::of(event).is_some());
        let (operation, submitted) = match command {
            Command::Resolve { operation, .. } => (Some(*operation), Submitted::Operation(*operation)),
            Command::Retry(retried) => (Some(*retried), Submitted::Operation(*retried)),
            _ if is_request => (Some(operation), Submitted::Operation(operation)),
            _ => (None, Submitted::Recorded),
        };
        // What a command is about is its last request: those before it make it possible, as operations of their own.
        let mut last = true;
        let mut addressed: Vec<NewEvent> = Vec::with_capacity(events.len());
        for event in events.into_iter().rev() {
            let is_request = Request::of(&event).is_some();
            let before = is_request && !last;
            addressed.push(NewEvent {
                stream: stream.clone(),
                key: key.filter(|_| is_request && !before).map(str::to_owned),
                event,
                operation: if before { Some(OperationId::from_uuid(self.ids.next())) } else { operation },
                cause: None,
            });
            last &= !is_request;
        }
        addressed.reverse();
        (submitted, addressed)
    }

    /// Carries out everything that is open for a domain, in the order of the requests, and the merges after it.
    ///
    /// # Errors
    /// The store failed, or the hypervisor could not be asked. What a step failed with is an outcome, not an error.
    pub async fn drive(
        &self,
        requester: &Requester,
        domain: DomainId,
        watch: &dyn Watch,
    ) -> Result<Driven, EngineError> {
        let state = self.load_for_work(requester, domain).await?;
        Worker::new(self, requester, state, watch)?.drive().await
    }

    /// Takes an open operation back, or carries it through where it is past its point of no return.
    ///
    /// # Errors
    /// There is no such open operation, or the store failed.
    pub async fn cancel(
        &self,
        requester: &Requester,
        domain: DomainId,
        operation: OperationId,
        watch: &dyn Watch,
    ) -> Result<Driven, EngineError> {
        let state = self.load_for_work(requester, domain).await?;
        self.may_cancel(&state, operation)?;
        self.stop.call_off(operation, requester.actor.clone());
        let done = Worker::new(self, requester, state, watch)?.call_off(operation).await;
        self.stop.forget(operation);
        done
    }

    /// Looks at every tombstone of a domain anew, also those that were put off with `--defer`, and merges what can be.
    ///
    /// # Errors
    /// The store failed, or the hypervisor could not be asked.
    pub async fn reconcile(
        &self,
        requester: &Requester,
        domain: DomainId,
        watch: &dyn Watch,
    ) -> Result<Driven, EngineError> {
        let state = self.load_for_work(requester, domain).await?;
        let mut worker = Worker::new(self, requester, state, watch)?;
        worker.forget_deferrals();
        worker.drive().await
    }

    /// Finishes, forward or back, whatever was cut short, and says what was found and done.
    ///
    /// # Errors
    /// The store failed.
    pub async fn recover(
        &self,
        requester: &Requester,
        watch: &dyn Watch,
    ) -> Result<Vec<Recovered>, EngineError> {
        let open = crate::log::OperationFilter { open: Some(crate::log::OpenOnly), ..Default::default() };
        let rows = self.log.operations(&open, usize::MAX >> 1).await?;
        let mut domains: Vec<DomainId> = Vec::new();
        for row in rows {
            if !domains.contains(&row.domain) {
                domains.push(row.domain);
            }
        }
        let mut recovered = Vec::new();
        for row in self.log.domains(u64::MAX).await? {
            // A log that is behind may not know what was open; what cannot be asked is told of below.
            if let Err(error @ (EngineError::Log(_) | EngineError::Illegal { .. })) =
                self.load_for_work(requester, row.id).await
            {
                return Err(error);
            }
        }
        for domain in domains {
            let state = self.load(domain).await?;
            if state.open.is_empty() {
                continue;
            }
            recovered.extend(match recover_domain(self, requester, &state, watch).await {
                Ok(recovered) => recovered,
                // One hypervisor that cannot be asked does not keep the others from being recovered.
                Err(EngineError::Driver(error)) => unrecovered(&state, &error.failure),
                Err(error) => return Err(error),
            });
        }
        Ok(recovered)
    }

    /// What a command would do. It takes no lock and writes nothing.
    ///
    /// # Errors
    /// A rejection, a precondition that is broken, or the hypervisor could not be asked.
    pub async fn dry_run(
        &self,
        requester: &Requester,
        domain: DomainId,
        command: &Command,
    ) -> Result<DryRun, EngineError> {
        let state = self.load(domain).await?;
        let events = decide(&state, command, &self.ctx(requester, &state, None))?;
        let mut requests: Vec<Request> = events.iter().filter_map(Request::of).collect();
        let request = requests.pop().ok_or_else(|| reject(Code::Invalid, "this command has no steps"))?;
        let driver = self.driver_of(&state)?;
        let observation = driver.observe(&state).await.map_err(EngineError::Driver)?;
        let mut plan =
            driver.plan(OperationId::from_uuid(self.ids.next()), &request, &state, &observation)?;
        let policy = self.settings.merge_policy();
        space::check_plan(&request, &plan, &observation, policy.margin_bytes)?;
        for before in &requests {
            let mut first =
                driver.plan(OperationId::from_uuid(self.ids.next()), before, &state, &observation)?;
            space::check_plan(before, &first, &observation, policy.margin_bytes)?;
            first.steps.append(&mut plan.steps);
            // What the revert would give up is in the snapshot that is taken first.
            plan = Plan {
                steps: first.steps,
                bytes_moved: plan.bytes_moved.saturating_add(first.bytes_moved),
                bytes_freed: 0,
                peak_space_bytes: plan.peak_space_bytes.saturating_add(first.peak_space_bytes),
                lost: first.lost,
            };
        }
        let (mut after, mut merges, mut frees) = (state.clone(), Vec::new(), None);
        if let Request::Delete(delete) = &request {
            let deleted = (&requester.actor, self.clock.now());
            let foreseen = space::foresee(&state, delete, deleted, &observation, policy)?;
            plan.peak_space_bytes = plan.peak_space_bytes.max(foreseen.peak_bytes);
            (after, merges) = (foreseen.after, foreseen.verdicts);
            let allocated = |file: &Path| Some(observation.files.get(file)?.allocated_bytes);
            frees = (delete.what == DeleteWhat::Snapshot)
                .then(|| Occupied::new(&state, allocated).frees(&delete.snapshots))
                .flatten();
        }
        Ok(DryRun { request, plan, merges, frees, state, after })
    }

    /// What the hypervisor says is there.
    ///
    /// # Errors
    /// The hypervisor could not be asked.
    pub async fn observe(&self, state: &DomainState) -> Result<Observation, EngineError> {
        self.driver_of(state)?.observe(state).await.map_err(EngineError::Driver)
    }

    /// Starts or ends a machine. It is no operation: the log tells of snapshots, and whoever may start the machine
    /// by hand may do so at any time.
    ///
    /// # Errors
    /// An operation is open, the machine is started and ended by someone else, or it could not be done.
    pub async fn power(&self, domain: DomainId, wish: PowerWish) -> Result<(), EngineError> {
        let state = self.load(domain).await?;
        if let Some(open) = state.open.first() {
            let message =
                format!("operation {} ({}) on this domain is not finished", open.id, open.request.kind());
            return Err(reject(Code::InUse, message).into());
        }
        self.driver_of(&state)?.power(&state, wish).await.map_err(EngineError::Driver)
    }

    pub(crate) fn driver_of(&self, state: &DomainState) -> Result<Arc<dyn Driver>, EngineError> {
        let domain = state.domain.as_ref();
        let domain = domain.ok_or_else(|| reject(Code::NotFound, "the domain is not registered"))?;
        Ok(Arc::new(Bounded {
            driver: self.driver(domain.driver)?,
            connections: Arc::clone(&self.connections),
            clock: Arc::clone(&self.clock),
            stop: self.stop.clone(),
            when_suspended: self.when_suspended,
        }))
    }

    /// The prefix of the log that a time stands for.
    ///
    /// # Errors
    /// The store failed.
    pub async fn seq_at(&self, at: Timestamp) -> Result<SeqAt, EngineError> {
        Ok(self.log.seq_at(at).await?)
    }

    /// The events of an operation.
    ///
    /// # Errors
    /// The store failed.
    pub async fn operation_events(&self, operation: OperationId) -> Result<Vec<Envelope>, EngineError> {
        let filter = EventFilter { operation: Some(operation), ..EventFilter::default() };
        Ok(self.log.read(0, &filter, usize::MAX >> 1).await?)
    }
}

/// What an abandoned operation may have unlinked: layers that nobody needs, and whose files are gone; upper ones first.
fn vanished(state: &DomainState, seen: &Observation) -> Vec<LayerChange> {
    let mut left = state.layers.clone();
    let mut changes = Vec::new();
    let there = |file: &Path| seen.files.contains_key(file) || seen.unreadable.contains_key(file);
    loop {
        let gone = left.disks.iter().find_map(|(disk, layers)| {
            let needless = |id: &LayerId| {
                matches!(layers.role(id, &state.tree), Role::Tombstone(_))
                    && layers.dependants(id).next().is_none()
            };
            let gone = layers.layers.iter().find(|(id, layer)| needless(id) && !there(&layer.file));
            gone.map(|(layer, _)| LayerChange::Dropped { disk: disk.clone(), layer: layer.clone() })
        });
        let Some(gone) = gone else { return changes };
        left.apply(&gone);
        changes.push(gone);
    }
}

/// The SHA-256 of a command's JSON, in hex.
pub(crate) fn command_digest<T: Serialize>(command: &T) -> Result<String, serde_json::Error> {
    let digest = Sha256::digest(serde_json::to_vec(command)?);
    Ok(digest.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The answer to a key that was used before.
fn repeated(earlier: &Envelope, key: &str, digest: &str) -> Result<Submitted, EngineError> {
    let stored = match Request::of(&earlier.event) {
        Some(Request::Create(r)) => r.request.command_sha256,
        Some(Request::Revert(r)) => r.request.command_sha256,
        Some(Request::Delete(r)) => r.request.command_sha256,
        Some(Request::Edit(r)) => r.request.command_sha256,
        Some(Request::Unregister(r)) => r.request.command_sha256,
        Some(Request::Merge(_)) | None => None,
    };
    match (earlier.operation, stored) {
        (Some(operation), Some(stored)) if stored == digest => Ok(Submitted::Repeated(operation)),
        _ => Err(reject(Code::Exists, format!("the key '{key}' was given with another command before"))
            .hint("a key stands for one command; choose another")
            .into()),
    }
}
