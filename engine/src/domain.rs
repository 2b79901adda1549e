//! What a registered domain is, and what its driver can do with it.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::ids::{DiskName, DomainId, DomainName};
use crate::tree::Labels;

/// How a machine is reached, as its driver remembers it: what of a [`Domain`] may change after its registration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Access {
    /// What the driver wants to remember, all of it.
    pub config: serde_json::Value,
    /// What can be done with the machine then.
    pub capabilities: Capabilities,
    /// The disks that it has then; none if they are the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<Disk>>,
}

/// Whether the machine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// No process runs it.
    Off,
    /// It runs.
    Running,
    /// It is there, and stopped.
    Paused,
}

/// The hypervisors that a domain can be on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DriverKind {
    /// QEMU/KVM on disk images of this host.
    Qemu,
    /// VirtualBox on this host.
    Virtualbox,
    /// A machine of an ESXi or a vCenter.
    Esx,
    /// The built-in simulated hypervisor.
    Sim,
}

impl DriverKind {
    /// The word used in `--driver`, in JSON and in the log.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Virtualbox => "virtualbox",
            Self::Esx => "esx",
            Self::Sim => "sim",
        }
    }
}

impl fmt::Display for DriverKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A driver's name that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown driver '{0}': expected qemu, virtualbox, esx or sim")]
pub struct DriverKindError(String);

impl FromStr for DriverKind {
    type Err = DriverKindError;
    fn from_str(text: &str) -> Result<Self, DriverKindError> {
        match text {
            "qemu" => Ok(Self::Qemu),
            "virtualbox" => Ok(Self::Virtualbox),
            "esx" => Ok(Self::Esx),
            "sim" => Ok(Self::Sim),
            other => Err(DriverKindError(other.chars().take(40).collect())),
        }
    }
}

/// One disk of a domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Its target name, such as `vda`.
    pub name: DiskName,
    /// The path that the user registered, made absolute; none where the hypervisor has no files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// What the guest sees as its size when it was registered, or attached.
    pub virtual_size_bytes: u64,
    /// Where the machine has it, in the hypervisor's own words; it keeps its name while it keeps its place. None where
    /// the user named it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub place: Option<String>,
    /// Why it is no part of the machine's snapshots; none for a disk that is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left_out: Option<String>,
}

impl Disk {
    /// A disk that snapshots hold.
    pub fn new(name: DiskName, path: Option<PathBuf>, virtual_size_bytes: u64) -> Self {
        Self { name, path, virtual_size_bytes, place: None, left_out: None }
    }
}

/// What a driver can do with a domain. Kept in the log, so `decide` needs no hypervisor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// Snapshots that include the machine's memory: taken with it wherever nothing else is said.
    pub memory: bool,
    /// Snapshots that keep the machine's memory in a file of its own: taken with it where that is asked for.
    #[serde(default)]
    pub memory_external: bool,
    /// Snapshots of the disks alone of a machine that is not off.
    pub disk_only: bool,
    /// Asking the guest to quiesce its file systems.
    pub quiesce: bool,
    /// Snapshots kept inside the image.
    pub internal: bool,
    /// Taking a snapshot of some of the disks.
    pub disk_selection: bool,
    /// Deleting all descendants but not the snapshot itself.
    pub children_only: bool,
    /// Forgetting a snapshot without touching its data.
    pub metadata_only: bool,
    /// Whether deleting merges in the same call, so Snaptree plans no merges of its own.
    pub merges_itself: bool,
    /// Whether the hypervisor keeps names and descriptions, so that an edit has to reach it, and one that was made there
    /// is followed.
    #[serde(default)]
    pub keeps_names: bool,
    /// Longest snapshot name in bytes.
    pub name_bytes_max: usize,
    /// Deepest chain of snapshots.
    pub depth_max: usize,
}

impl Domain {
    /// The disks that its snapshots hold.
    pub fn snapshotted(&self) -> impl Iterator<Item = &Disk> {
        self.disks.iter().filter(|disk| disk.left_out.is_none())
    }

    /// The disks that its hypervisor leaves out of them, in words.
    pub fn left_out(&self) -> Vec<String> {
        let words = |disk: &Disk| Some(format!("disk '{}' ({})", disk.name, disk.left_out.as_ref()?));
        self.disks.iter().filter_map(words).collect()
    }
}

/// Everything that the log says of a registered domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Domain {
    /// Its id.
    pub id: DomainId,
    /// Its name, unique among the registered domains.
    pub name: DomainName,
    /// Who runs it.
    pub driver: DriverKind,
    /// Its disks, in the order of registration.
    pub disks: Vec<Disk>,
    /// What the driver wants to remember; only the driver reads it.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub config: serde_json::Value,
    /// Labels, for policies.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// What its driver can do.
    pub capabilities: Capabilities,
}
