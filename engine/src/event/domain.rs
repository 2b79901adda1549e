//! What happens to a domain.

use serde::{Deserialize, Serialize};

use super::{RequestTerms, UnregisterWish};
use crate::claim::Claim;
use crate::domain::{Access, Disk, Domain};
use crate::ids::DomainName;
use crate::tree::Labels;

/// Payload: a domain was registered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DomainRegistered {
    /// All of it.
    pub domain: Domain,
    /// What it has for itself beside its name and the paths of its disks, as its driver says.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub claims: Vec<Claim>,
}

/// Payload: what of a domain changed; what is left out stayed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DomainChanged {
    /// The new name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<DomainName>,
    /// All labels that it has from now on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<Labels>,
    /// How its machine is reached from now on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access: Option<Access>,
    /// All disks that its machine has from now on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<Disk>>,
    /// All that it has for itself from now on beside its name, the paths of its disks included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claims: Option<Vec<Claim>>,
}

/// Payload: something that the hypervisor had left broken was put right.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DomainRepaired {
    /// What was broken, and what was done about it, in words.
    pub what: String,
}

/// Payload: a domain's end was asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DomainUnregisterRequested {
    /// What becomes of its data.
    pub wish: UnregisterWish,
    /// Idempotency.
    #[serde(flatten)]
    pub request: RequestTerms,
}

/// Payload: a domain is no longer registered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DomainUnregistered {
    /// What became of its data.
    pub wish: UnregisterWish,
    /// Files of Snaptree's that stay, and are nobody's from now on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left: Vec<std::path::PathBuf>,
}
