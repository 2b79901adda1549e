//! Where the machines are kept: in files, or in memory, where they outlive every engine but not the process.

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use snaptree_engine::DomainId;
use snaptree_engine::driver::{DriverError, ErrorClass};
use snaptree_engine::operation::Code;

use super::file::MachineFile;
use super::host::Host;

/// Machines by domain; each is a [`Host`].
type Machines = BTreeMap<DomainId, Arc<dyn Any + Send + Sync>>;

#[derive(Clone)]
pub(super) enum Vault {
    /// A file a machine, in this folder.
    Folder(PathBuf),
    /// Shared by all clones.
    Memory(Arc<Mutex<Machines>>),
}

impl fmt::Debug for Vault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(folder) => f.debug_tuple("Folder").field(folder).finish(),
            Self::Memory(_) => f.write_str("Memory"),
        }
    }
}

impl Vault {
    /// The machine; none if it was never changed, or is gone.
    pub(super) fn read<H: Host>(&self, domain: DomainId) -> Result<Option<H>, DriverError> {
        match self {
            Self::Folder(folder) => MachineFile::new(folder, domain).read(),
            Self::Memory(machines) => kept(&locked(machines), domain),
        }
    }

    /// Replaces the machine as a whole, if `effect` gives another one. Nobody else changes it meanwhile.
    pub(super) fn change<H: Host, T>(
        &self,
        domain: DomainId,
        effect: impl FnOnce(Option<H>) -> Result<(H, T), DriverError>,
    ) -> Result<T, DriverError> {
        match self {
            Self::Folder(folder) => {
                let file = MachineFile::new(folder, domain);
                let lock = file.lock()?;
                let (machine, answer) = effect(file.read()?)?;
                file.write(&lock, &machine)?;
                Ok(answer)
            }
            Self::Memory(machines) => {
                let mut machines = locked(machines);
                let (machine, answer) = effect(kept(&machines, domain)?)?;
                debug_assert_eq!(machine.check(), Ok(()), "a machine never contradicts itself");
                machines.insert(domain, Arc::new(machine));
                Ok(answer)
            }
        }
    }

    /// Makes what is read now outlast a power cut.
    pub(super) fn sync(&self, domain: DomainId) -> Result<(), DriverError> {
        match self {
            Self::Folder(folder) => MachineFile::new(folder, domain).sync(),
            Self::Memory(_) => Ok(()),
        }
    }

    /// Where the machine is, for people.
    pub(super) fn place(&self, domain: DomainId) -> String {
        match self {
            Self::Folder(folder) => MachineFile::new(folder, domain).path().display().to_string(),
            Self::Memory(_) => "memory".to_owned(),
        }
    }
}

fn locked(machines: &Mutex<Machines>) -> MutexGuard<'_, Machines> {
    machines.lock().unwrap_or_else(PoisonError::into_inner)
}

fn kept<H: Host>(machines: &Machines, domain: DomainId) -> Result<Option<H>, DriverError> {
    let Some(machine) = machines.get(&domain) else { return Ok(None) };
    let machine = machine.downcast_ref::<H>().cloned();
    machine.map(Some).ok_or_else(|| {
        DriverError::new(ErrorClass::Permanent, Code::Drift, "the machine in memory is of another kind")
    })
}
