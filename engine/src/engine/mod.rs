//! The facade: everything that a program does with Snaptree goes through [`Engine`].

mod forget;
mod read;
mod request;

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;

use crate::around::{HookRunner, NoHookRunner};
use crate::command::reject;
use crate::domain::DriverKind;
use crate::driver::{Driver, Hooks, NoHooks, PowerWish, Watch};
use crate::event::{Actor, Envelope, Origin};
use crate::ids::{DomainId, DomainName, IdSource, OperationId, StreamId, UuidV7};
use crate::loaded::Loaded;
use crate::log::{Append, EventLog, LogError, NewEvent};
use crate::operation::Code;
use crate::project::DomainState;
use crate::reconcile::connection::{Bounded, ConnectionState, Connections, WhenSuspended};
use crate::reconcile::recovery::{Recovered, Recovery, recover_domain, unrecovered};
use crate::reconcile::worker::{Driven, Worker};
use crate::together::Gates;

pub use crate::error::EngineError;
pub use crate::settings::{Clock, Foreign, Settings, Stop, SystemClock};
pub(crate) use request::command_digest;
pub use request::{DryRun, KEY_BYTES_MAX, Submitted};

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
    pub(crate) gates: Arc<Gates>,
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
            gates: Arc::default(),
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

    /// For how long the machine has been up, by the engine's clock.
    pub fn uptime(&self) -> Option<crate::event::Uptime> {
        self.clock.uptime()
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

    /// Finishes, forward or back, whatever was cut short, and says what was found and done. A domain that cannot be
    /// looked at keeps none of the others back.
    ///
    /// # Errors
    /// The store failed.
    pub async fn recover(&self, requester: &Requester, watch: &dyn Watch) -> Result<Recovery, EngineError> {
        let open = crate::log::OperationFilter { open: Some(crate::log::OpenOnly), ..Default::default() };
        let mut domains: Vec<(DomainId, DomainName)> = Vec::new();
        for row in self.log.operations(&open, usize::MAX >> 1).await? {
            if !domains.iter().any(|(id, _)| *id == row.domain) {
                domains.push((row.domain, row.domain_name));
            }
        }
        let mut recovery = Recovery::default();
        for row in self.log.domains(u64::MAX).await? {
            // A log that is behind may not know what was open; what cannot be asked is told of below.
            if let Err(error @ (EngineError::Log(_) | EngineError::Illegal { .. })) =
                self.load_for_work(requester, row.id).await
            {
                domains.retain(|(id, _)| *id != row.id);
                recovery.leave_out(row.name, error)?;
            }
        }
        for (domain, name) in domains {
            match self.recover_one(requester, domain, watch).await {
                Ok(recovered) => recovery.operations.extend(recovered),
                Err(error) => recovery.leave_out(name, error)?,
            }
        }
        Ok(recovery)
    }

    async fn recover_one(
        &self,
        requester: &Requester,
        domain: DomainId,
        watch: &dyn Watch,
    ) -> Result<Vec<Recovered>, EngineError> {
        let state = self.load(domain).await?;
        if state.open.is_empty() {
            return Ok(Vec::new());
        }
        match recover_domain(self, requester, &state, watch).await {
            Err(EngineError::Driver(error)) => Ok(unrecovered(&state, &error.failure)),
            other => other,
        }
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
        self.driver_until(state, self.stop.clone())
    }

    /// The hypervisor of a domain; calls that wait for their turn are given up when `stop` is asked.
    pub(crate) fn driver_until(
        &self,
        state: &DomainState,
        stop: Stop,
    ) -> Result<Arc<dyn Driver>, EngineError> {
        let domain = state.domain.as_ref();
        let domain = domain.ok_or_else(|| reject(Code::NotFound, "the domain is not registered"))?;
        Ok(Arc::new(Bounded {
            driver: self.driver(domain.driver)?,
            connections: Arc::clone(&self.connections),
            clock: Arc::clone(&self.clock),
            stop,
            when_suspended: self.when_suspended,
        }))
    }
}
