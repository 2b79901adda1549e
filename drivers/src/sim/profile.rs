//! How a simulated machine is registered, and whose limits it has.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use snaptree_engine::domain::Capabilities;
use snaptree_engine::ids::NAME_BYTES_MAX;
use snaptree_engine::operation::{Code, Failure};

/// Deepest chain where no hypervisor sets a limit: each snapshot holds a copy of the disks.
const DEPTH_MAX: usize = 1000;

/// Whose limits the simulated hypervisor has.
///
/// Architecture Invariant: a profile only sets [`Capabilities`], and how a snapshot is deleted. Where deleting does not merge, the machine keeps
/// layers, as QEMU does; else each snapshot holds a copy. What is within the capabilities works alike in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Profile {
    /// No limits but the simulation's own.
    #[default]
    Default,
    /// QEMU/KVM's.
    Qemu,
    /// VirtualBox's.
    Virtualbox,
    /// ESX's.
    Esx,
    /// Those of libvirt's test driver, which can do everything.
    LibvirtTest,
}

impl Profile {
    /// What can be done with a machine of that profile.
    pub const fn capabilities(self) -> Capabilities {
        let all = Capabilities {
            memory: true,
            memory_external: false,
            disk_only: true,
            quiesce: true,
            internal: true,
            disk_selection: true,
            children_only: true,
            metadata_only: true,
            merges_itself: true,
            keeps_names: true,
            name_bytes_max: NAME_BYTES_MAX,
            depth_max: DEPTH_MAX,
        };
        match self {
            Self::Default | Self::LibvirtTest => all,
            Self::Qemu => Capabilities {
                metadata_only: false,
                merges_itself: false,
                keeps_names: false,
                depth_max: 200,
                ..all
            },
            Self::Virtualbox => Capabilities {
                disk_only: false,
                quiesce: false,
                internal: false,
                disk_selection: false,
                children_only: false,
                depth_max: 250,
                ..all
            },
            Self::Esx => Capabilities {
                internal: false,
                disk_selection: false,
                children_only: false,
                name_bytes_max: 80,
                depth_max: 32,
                ..all
            },
        }
    }
}

/// How a hypervisor that keeps a list deletes a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Deleting {
    /// As a whole, in one call.
    AtOnce,
    /// One call merges its data, which is no snapshot's any more once that has begun.
    Merging {
        /// Most children that it may have; none for any number.
        children_max: Option<usize>,
    },
}

impl Deleting {
    /// Why a snapshot with so many children cannot be merged now.
    pub(super) fn forbids(self, children: usize) -> Option<String> {
        match self {
            Self::Merging { children_max: Some(most) } if children > most => {
                Some(format!("it has {children} children; it is merged once {most} is left"))
            }
            _ => None,
        }
    }
}

impl Profile {
    pub(super) const fn deleting(self) -> Deleting {
        match self {
            Self::Virtualbox => Deleting::Merging { children_max: Some(1) },
            Self::Esx => Deleting::Merging { children_max: None },
            Self::Default | Self::Qemu | Self::LibvirtTest => Deleting::AtOnce,
        }
    }
}

/// What `Registration.options` says of a simulated machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SimOptions {
    /// Whose limits it has.
    #[serde(default)]
    pub profile: Profile,
}

impl SimOptions {
    /// Reads options; none at all are the default ones.
    pub(super) fn read(options: &Value) -> Result<Self, Failure> {
        match options {
            Value::Null => Ok(Self::default()),
            given => Self::deserialize(given).map_err(|error| {
                let message = format!("these are no options of a simulated machine: {error}");
                Failure::new(Code::Invalid, message).refused()
            }),
        }
    }
}
