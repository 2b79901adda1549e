//! ESXi and vCenter, by their own API: vim25, in SOAP over HTTPS.
//!
//! A host keeps the list of a machine's snapshots, takes and deletes them in tasks, and merges when it deletes. What is
//! ours there is known by a mark in a snapshot's description (`name`), since names need not be unique there, and since
//! no call can carry a token that its task would tell.
//!
//! # What became of a call whose answer is lost
//! ```text
//!   call --answered--> task --polled--> ended: well, or with a fault (what it did is looked at)
//!     |                  |
//!     | no answer        | the host does not answer, or does not know the task any more
//!     v                  v
//!   fence the session: what still is on its way has no effect any more
//!   wait until no task works on the machine (its recentTask)
//!   observe:  create   our mark is there, or not          revert   the task's own account; else where the machine stands
//!             delete   the snapshot is there, or not
//! ```
//!
//! Code Map: `soap` (messages), `client` (a session and its calls), `tls`, `secret` and `host` (whom we speak to, and
//! who we are), `fault` (what failures mean), `vim` (objects and properties), `inventory` (finding machines), `observe`,
//! `plan` (also: what became of a step), `step`, `task`, `name` (escapes, and the mark), `config`.

mod client;
mod config;
mod fault;
mod host;
mod inventory;
mod name;
mod observe;
mod plan;
mod power;
mod secret;
pub mod soap;
mod step;
mod task;
mod tls;
mod vim;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use snaptree_engine::claim::{Claim, ClaimKind};
use snaptree_engine::domain::Domain;
use snaptree_engine::driver::{
    Driver, DriverError, Observation, Plan, PowerWish, Probe, Registration, Resolution, StepContext,
    StepReport,
};
use snaptree_engine::operation::{Code, Failure, Request, Step};
use snaptree_engine::project::DomainState;
use snaptree_engine::reconcile::connection::ConnectionId;
use snaptree_engine::{HostName, OperationId};

use crate::disks::left_out_notes;
pub use client::CallTimes;
use client::{Client, Effect};
pub use config::{EsxConfig, EsxOptions};
pub use host::{HostBook, HostConfig};
pub use inventory::Found;
pub use secret::PasswordSource;
use step::{Action, Work};
pub use tls::{Thumbprint, Trust};

/// What a host is, in its own words.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Introduced {
    /// Such as `VMware ESXi 8.0.1 build-21495797`.
    pub product: String,
    /// The version of its API.
    pub api_version: String,
    /// Whether it is a vCenter.
    pub is_vcenter: bool,
}

/// ESXi and vCenter. Clones share their sessions: one per host.
#[derive(Clone)]
pub struct EsxDriver {
    shared: Arc<Shared>,
}

struct Shared {
    book: Arc<dyn HostBook>,
    times: CallTimes,
    clients: Mutex<BTreeMap<HostName, Arc<Client>>>,
}

impl fmt::Debug for EsxDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EsxDriver").field("times", &self.shared.times).finish_non_exhaustive()
    }
}

impl EsxDriver {
    /// Speaks to the hosts in `book`.
    pub fn new(book: Arc<dyn HostBook>, times: CallTimes) -> Self {
        Self { shared: Arc::new(Shared { book, times, clients: Mutex::default() }) }
    }

    /// Logs in to a host that is to be registered, and out again.
    ///
    /// # Errors
    /// It cannot be reached, is not believed, or does not let us in.
    pub async fn introduce(&self, host: &HostName, config: HostConfig) -> Result<Introduced, DriverError> {
        let client = Client::new(host.clone(), config, self.shared.times)?;
        let content = client.content().await;
        client.close().await;
        let content = content.map_err(|error| client.told(error, Effect::None))?;
        Ok(Introduced {
            product: content.product.clone(),
            api_version: content.api_version.clone(),
            is_vcenter: content.api_type == "VirtualCenter",
        })
    }

    /// Every machine of a host.
    ///
    /// # Errors
    /// There is no such host, or it cannot be asked.
    pub async fn discover(&self, host: &HostName) -> Result<Vec<Found>, DriverError> {
        let client = self.client(host).await?;
        inventory::list(&client).await.map_err(|error| client.told(error, Effect::None))
    }

    /// Logs out everywhere.
    pub async fn close(&self) {
        let clients =
            std::mem::take(&mut *self.shared.clients.lock().unwrap_or_else(PoisonError::into_inner));
        for client in clients.into_values() {
            client.close().await;
        }
    }

    /// The one that speaks to a host. One whose entry in the log has changed is spoken to anew.
    async fn client(&self, host: &HostName) -> Result<Arc<Client>, DriverError> {
        let entry = self.shared.book.find(host).await?.ok_or_else(|| {
            let message = format!("there is no host '{host}'");
            DriverError::from(Failure::new(Code::NotFound, message).refused())
                .hint("`snaptree host list` lists them, `snaptree host add` registers one")
        })?;
        let config = HostConfig::of(&entry)?;
        let mut clients = self.shared.clients.lock().unwrap_or_else(PoisonError::into_inner);
        match clients.get(host) {
            Some(known) if known.config == config => Ok(Arc::clone(known)),
            _ => {
                let client = Arc::new(Client::new(host.clone(), config, self.shared.times)?);
                clients.insert(host.clone(), Arc::clone(&client));
                Ok(client)
            }
        }
    }

    async fn client_of(&self, state: &DomainState) -> Result<(Arc<Client>, EsxConfig), DriverError> {
        let config = EsxConfig::of_state(state)?;
        Ok((self.client(&config.host).await?, config))
    }

    async fn work<'c>(
        client: &'c Client,
        config: &EsxConfig,
        context: &'c StepContext<'c>,
    ) -> Result<Work<'c>, DriverError> {
        // The machine may be another object than when it was registered.
        let (vm, _) = observe::machine(client, config).await?;
        Ok(Work { client, vm, context })
    }
}

#[async_trait]
impl Driver for EsxDriver {
    fn connection(&self, domain: &Domain) -> ConnectionId {
        match EsxConfig::of(domain) {
            Ok(config) => ConnectionId::new(format!("esx:{}", config.host)),
            Err(_) => ConnectionId::new(domain.driver.as_str()),
        }
    }

    async fn probe(&self, registration: &Registration) -> Result<Probe, DriverError> {
        let options = EsxOptions::deserialize(&registration.options).map_err(|error| {
            Failure::new(Code::Invalid, format!("these are no options of a machine of a host: {error}"))
                .refused()
        })?;
        let client = self.client(&options.host).await?;
        let vm = inventory::find(&client, &options.vm).await?;
        if let Some(owner) = options.taken.get(&vm.id) {
            let message = format!("the machine {vm} of host '{}' is domain '{owner}' already", options.host);
            return Err(Failure::new(Code::Exists, message).refused().into());
        }
        let about = inventory::about(&client, &vm).await.map_err(|error| client.told(error, Effect::None))?;
        if about.template {
            let message = format!("'{}' is a template, and has no snapshots", about.name);
            return Err(Failure::new(Code::Unsupported, message).refused().into());
        }
        let claims = vec![Claim::new(ClaimKind::Machine, format!("esx {} {}", options.host, vm.id))];
        let config = EsxConfig { host: options.host, vm: vm.id, uuid: about.uuid, name: about.name };
        Ok(Probe {
            notes: left_out_notes(&about.disks),
            disks: about.disks,
            config: serde_json::to_value(&config)
                .map_err(|error| Failure::new(Code::Invalid, error.to_string()))?,
            capabilities: config::capabilities(),
            claims,
        })
    }

    async fn observe(&self, state: &DomainState) -> Result<Observation, DriverError> {
        let (client, config) = self.client_of(state).await?;
        let (_, machine) = observe::machine(&client, &config).await?;
        Ok(machine.observation(state, Timestamp::now())?)
    }

    async fn observe_all(
        &self,
        states: &[&DomainState],
    ) -> Result<Vec<Result<Observation, DriverError>>, DriverError> {
        let Some(first) = states.first() else { return Ok(Vec::new()) };
        let (client, _) = self.client_of(first).await?;
        let configs: Vec<EsxConfig> =
            states.iter().map(|state| EsxConfig::of_state(state)).collect::<Result<_, _>>()?;
        let wanted: Vec<soap::Moref> = configs.iter().map(EsxConfig::machine).collect();
        let found =
            observe::machines(&client, &wanted).await.map_err(|error| client.told(error, Effect::None))?;
        let mut seen = Vec::with_capacity(states.len());
        for ((state, config), vm) in states.iter().zip(&configs).zip(&wanted) {
            seen.push(match found.get(vm).filter(|machine| observe::is_meant(machine, config)) {
                Some(machine) => machine.observation(state, Timestamp::now()).map_err(DriverError::from),
                // It is another object now, or none.
                None => self.observe(state).await,
            });
        }
        Ok(seen)
    }

    fn plan(
        &self,
        _operation: OperationId,
        request: &Request,
        state: &DomainState,
        observation: &Observation,
    ) -> Result<Plan, Failure> {
        plan::plan(request, state, observation).map_err(Failure::refused)
    }

    async fn execute(&self, context: &StepContext<'_>, step: &Step) -> Result<StepReport, DriverError> {
        let action = Action::of(step)?;
        let (client, config) = self.client_of(context.state).await?;
        context.hooks.reached(&format!("esx.{}.before", action.word()));
        let report = Self::work(&client, &config, context).await?.execute(&action).await?;
        context.hooks.reached(&format!("esx.{}.after", action.word()));
        Ok(report)
    }

    fn resolve(&self, _context: &StepContext<'_>, step: &Step, observation: &Observation) -> Resolution {
        use snaptree_engine::driver::Remedy;
        match Action::of(step) {
            Ok(action) => plan::resolve(&action, observation),
            Err(failure) => Resolution::HalfDone(Remedy::AskSomeone(failure)),
        }
    }

    async fn undo(&self, context: &StepContext<'_>, step: &Step) -> Result<StepReport, DriverError> {
        let action = Action::of(step)?;
        let (client, config) = self.client_of(context.state).await?;
        Self::work(&client, &config, context).await?.undo(&action).await?;
        Ok(StepReport::default())
    }

    async fn power(&self, state: &DomainState, wish: PowerWish) -> Result<(), DriverError> {
        let (client, config) = self.client_of(state).await?;
        let (vm, machine) = observe::machine(&client, &config).await?;
        power::power(&client, &vm, machine.power, wish).await
    }

    async fn settle(&self, state: &DomainState, _operation: OperationId) -> Result<(), DriverError> {
        let (client, config) = self.client_of(state).await?;
        task::settle(&client, &config.machine()).await
    }
}
