//! Where commands that write are carried out: by this process, or by the daemon that has the state.
//!
//! Architecture Invariant: a command does not know which of the two it works with, and prints the same.

mod here;
mod host;
mod log;
mod policy;
pub mod there;

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use async_trait::async_trait;
use serde::Deserialize;
use snaptree_drivers::esx::EsxOptions;
use snaptree_drivers::qemu::{AccessWish, PathWish, QemuOptions, RawWish, RepairWish, bases_of, files_of};
use snaptree_drivers::sim::{Profile, SimOptions};
use snaptree_drivers::virtualbox::{self, VirtualboxOptions};
use snaptree_engine::command::Command;
use snaptree_engine::domain::DriverKind;
use snaptree_engine::driver::{PowerWish, Registration};
use snaptree_engine::engine::{Engine, Requester, Submitted};
use snaptree_engine::operation::Outcome;
use snaptree_engine::project::DomainState;
use snaptree_engine::reconcile::drift::Drift;
use snaptree_engine::reconcile::recovery::{Recovered, Recovery};
use snaptree_engine::reconcile::worker::Driven;
use snaptree_engine::{DomainId, DomainName, OperationId};
use uuid::Uuid;

pub use here::{Here, PARK_AFTER};
pub use host::{LogHosts, domains_on, host};
pub use log::ReadOut;
pub use policy::{Policies, domains_of, in_engine, policy, readable, sick};

use crate::exit::Trouble;
use crate::wire::{
    Account, Accounts, HostAnswer, HostAsk, LeftOut, PolicyAnswer, PolicyAsk, Registered, Registering,
};

/// What commands that write ask for.
#[async_trait]
pub trait Office: Send + Sync {
    /// Puts a request into the log.
    ///
    /// # Errors
    /// It was rejected, or the state cannot be used.
    async fn submit(&self, domain: DomainId, command: &Command, key: Option<&str>) -> Result<Submitted>;

    /// Waits for an operation to end, or to rest, with a progress bar and with Ctrl-C in mind. A delete is waited for
    /// with the merges that it causes.
    ///
    /// # Errors
    /// The hypervisor cannot be asked, or the state cannot be used. What the operation failed with is no error.
    async fn finish(&self, domain: DomainId, operation: OperationId) -> Result<Driven>;

    /// Takes an operation back, or sees it carried through where it is too late for that.
    ///
    /// # Errors
    /// It is not open, or as [`Office::finish`].
    async fn cancel(&self, domain: DomainId, operation: OperationId) -> Result<Driven>;

    /// Looks at all data of deleted snapshots anew, and merges what can be.
    ///
    /// # Errors
    /// As [`Office::finish`].
    async fn reconcile(&self, domain: DomainId) -> Result<Driven>;

    /// Finishes what was cut short, and says what was found and done.
    ///
    /// # Errors
    /// The state cannot be used.
    async fn recover(&self) -> Result<Accounts>;

    /// Compares the hypervisor with the log.
    ///
    /// # Errors
    /// The hypervisor cannot be asked, or the state cannot be used.
    async fn drift(&self, domain: DomainId) -> Result<Drift>;

    /// The same of many domains, in the order given. One that cannot be looked at keeps none of the others back.
    ///
    /// # Errors
    /// The state cannot be used.
    async fn drift_all(&self, domains: &[DomainId]) -> Result<Vec<(DomainId, Result<Drift>)>>;

    /// Starts or ends a machine.
    ///
    /// # Errors
    /// An operation is open, somebody else starts and ends it, or it could not be done.
    async fn power(&self, domain: DomainId, wish: PowerWish) -> Result<()>;

    /// Registers a machine.
    ///
    /// # Errors
    /// The name is taken, the machine is unfit, or the state cannot be used.
    async fn register(&self, registering: Registering) -> Result<Registered>;

    /// Carries out a request about a host.
    ///
    /// # Errors
    /// It was rejected, the host does not answer, or the state cannot be used.
    async fn host(&self, ask: HostAsk) -> Result<HostAnswer>;

    /// Carries out a request about a policy. What a run asked for is in the log then, and is to be waited for with
    /// [`Office::finish`].
    ///
    /// # Errors
    /// It was rejected, or the state cannot be used.
    async fn policy(&self, ask: PolicyAsk) -> Result<PolicyAnswer>;

    /// Whether Ctrl-C was pressed, so that nothing more is to begin.
    fn is_ending(&self) -> bool;

    /// Whether work goes on when this process ends.
    fn works_on_alone(&self) -> bool;
}

/// Registers a machine with the engine of this process.
///
/// # Errors
/// As [`Office::register`].
pub async fn register(
    engine: &Engine,
    requester: &Requester,
    registering: Registering,
) -> Result<Registered> {
    registering.fits()?;
    let options = match registering.driver {
        DriverKind::Sim => sim_options(registering.profile.as_deref())?,
        DriverKind::Qemu => qemu_options(engine, &registering).await?,
        DriverKind::Esx => esx_options(engine, &registering).await?,
        DriverKind::Virtualbox => {
            let vm = registering.vm.clone().unwrap_or_default();
            serde_json::to_value(VirtualboxOptions { vm })?
        }
    };
    let registration = Registration {
        id: DomainId::from_uuid(Uuid::now_v7()),
        name: registering.name,
        driver: registering.driver,
        disks: registering.disks,
        options,
        taken: files_of_all(engine, |state| {
            files_of(state).into_iter().chain(virtualbox::file_of(state)).collect()
        })
        .await?,
    };
    let (domain, mut notes) = engine.register(requester, registration, registering.labels).await?;
    if domain.capabilities.merges_itself && domain.driver != DriverKind::Sim {
        // What is there already is taken over, unless the settings say otherwise.
        match engine.drift(requester, domain.id).await {
            Ok(found) if found.adopted.is_empty() => {}
            Ok(found) => notes.push(format!("took over {} snapshots that were there", found.adopted.len())),
            Err(error) => notes.push(format!("its snapshots could not be looked at: {error}")),
        }
    }
    Ok(Registered { domain, notes })
}

fn sim_options(profile: Option<&str>) -> Result<serde_json::Value> {
    let profile = match profile {
        Some(word) => Profile::deserialize(serde_json::Value::from(word)).map_err(|_| {
            Trouble::usage(format!("there is no profile '{word}'"))
                .hint("there are default, qemu, virtualbox, esx and libvirt-test")
        })?,
        None => Profile::default(),
    };
    Ok(serde_json::to_value(SimOptions { profile })?)
}

/// What only the qemu driver understands, and the files that other domains are built upon.
async fn qemu_options(engine: &Engine, registering: &Registering) -> Result<serde_json::Value> {
    let layers_dir = registering.layers.clone();
    let keep_path = if registering.keep_path { PathWish::Keep } else { PathWish::Follow };
    let raw = if registering.convert { RawWish::Convert } else { RawWish::Refuse };
    let repair = if registering.repair { RepairWish::Mend } else { RepairWish::Leave };
    let bases = files_of_all(engine, bases_of).await?;
    let (runs, agent) = (registering.runs.clone(), registering.agent.clone());
    Ok(serde_json::to_value(QemuOptions { layers_dir, keep_path, raw, repair, bases, runs, agent })?)
}

/// What only the esx driver understands, and the machines of its host that are registered already.
async fn esx_options(engine: &Engine, registering: &Registering) -> Result<serde_json::Value> {
    let (Some(host), Some(vm)) = (registering.host.clone(), registering.vm.clone()) else {
        return Err(Trouble::usage("an esx domain is on a host").hint("--host HOST --vm PATH|UUID").into());
    };
    let taken = domains_on(engine, &host).await?;
    Ok(serde_json::to_value(EsxOptions { host, vm, taken })?)
}

/// The command with whose files are whose, where it brings disks: nobody's word is taken for that.
///
/// # Errors
/// The log cannot be read.
pub async fn with_owners(engine: &Engine, command: Command) -> Result<Command> {
    let Command::Set { name, labels, access: Some(access) } = command else { return Ok(command) };
    let access = match AccessWish::deserialize(&access) {
        Ok(mut wish) if !wish.disks.is_none() => {
            wish.disks.taken = files_of_all(engine, |state| {
                files_of(state).into_iter().chain(virtualbox::file_of(state)).collect()
            })
            .await?;
            wish.disks.bases = files_of_all(engine, bases_of).await?;
            serde_json::to_value(wish)?
        }
        _ => access,
    };
    Ok(Command::Set { name, labels, access: Some(access) })
}

/// Files of the registered domains, with the owner's name.
async fn files_of_all(
    engine: &Engine,
    files: impl Fn(&DomainState) -> Vec<PathBuf>,
) -> Result<BTreeMap<PathBuf, DomainName>> {
    let mut owned = BTreeMap::new();
    for row in engine.domains().await? {
        let state = engine.load_as_far_as_known(row.id).await?;
        owned.extend(files(&state).into_iter().map(|file| (file, row.name.clone())));
    }
    Ok(owned)
}

impl From<&Recovered> for Account {
    fn from(recovered: &Recovered) -> Self {
        let attention = recovered.outcome.is_none() && recovered.failure.is_some();
        let outcome = recovered.outcome.map(Outcome::as_str).or(attention.then_some("needs-attention"));
        Self {
            operation: recovered.operation,
            kind: recovered.kind.to_owned(),
            domain: recovered.domain.to_string(),
            found: recovered.found.clone(),
            did: recovered.did.clone(),
            outcome: outcome.map(str::to_owned),
        }
    }
}

impl From<Recovery> for Accounts {
    fn from(recovery: Recovery) -> Self {
        let left_out = recovery.left_out.into_iter().map(|(domain, error)| LeftOut::new(domain, error));
        Self {
            operations: recovery.operations.iter().map(Account::from).collect(),
            left_out: left_out.collect(),
        }
    }
}
