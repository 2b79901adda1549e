//! How a machine of a host is registered, and what is kept of it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use snaptree_engine::domain::{Capabilities, Domain};
use snaptree_engine::operation::{Code, Failure};
use snaptree_engine::project::DomainState;
use snaptree_engine::{DomainName, HostName};

use super::soap::Moref;

/// Longest name of a snapshot. No limit is documented; this is what vSphere's own clients allow.
const NAME_BYTES_MAX: usize = 80;
/// Deepest chain: vSphere's documented maximum.
const DEPTH_MAX: usize = 32;

/// What `Registration.options` says of a machine of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct EsxOptions {
    /// The host.
    pub host: HostName,
    /// The machine: its inventory path, its UUID or its name.
    pub vm: String,
    /// The machines of this host that are registered already, by their objects.
    #[serde(default)]
    pub taken: BTreeMap<String, DomainName>,
}

/// What the log keeps of a registered machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct EsxConfig {
    /// The host.
    pub host: HostName,
    /// The machine's object there.
    pub vm: String,
    /// Its UUID: tells whether the object is still the same machine, and finds it where it is registered anew there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// Its name there, when it was registered here.
    pub name: String,
}

impl EsxConfig {
    /// Of a registered domain.
    ///
    /// # Errors
    /// It is none of this driver's.
    pub fn of(domain: &Domain) -> Result<Self, Failure> {
        Self::deserialize(&domain.config).map_err(|error| {
            Failure::new(Code::Invalid, format!("domain '{}' is on no esx host: {error}", domain.name))
        })
    }

    /// Of the domain that a log tells of.
    ///
    /// # Errors
    /// As [`EsxConfig::of`], or it is not registered.
    pub(super) fn of_state(state: &DomainState) -> Result<Self, Failure> {
        Self::of(domain(state)?)
    }

    /// The machine's object.
    pub fn machine(&self) -> Moref {
        Moref::new("VirtualMachine", self.vm.as_str())
    }
}

pub(super) fn domain(state: &DomainState) -> Result<&Domain, Failure> {
    state.domain.as_ref().ok_or_else(|| Failure::new(Code::NotFound, "the domain is not registered"))
}

/// What can be done with a machine of a host.
pub(super) const fn capabilities() -> Capabilities {
    Capabilities {
        memory: true,
        memory_external: false,
        disk_only: true,
        quiesce: true,
        internal: false,
        disk_selection: false,
        children_only: true,
        metadata_only: true,
        merges_itself: true,
        keeps_names: true,
        name_bytes_max: NAME_BYTES_MAX,
        depth_max: DEPTH_MAX,
    }
}
