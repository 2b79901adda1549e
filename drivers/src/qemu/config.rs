//! What a user says of a QEMU domain, and what the driver remembers of it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use snaptree_engine::domain::{Capabilities, Domain, RunState};
use snaptree_engine::driver::DriverError;
use snaptree_engine::operation::{Code, Failure};
use snaptree_engine::project::DomainState;
use snaptree_engine::{DiskName, DomainName, LayerId, OperationId};

use super::disks::DisksWish;
use super::observe::in_use;
use super::probe::check_agent;
use super::runs::{Runs, RunsWish};

/// Deepest chain: QEMU opens one file per layer, and slows down with their number.
pub(super) const DEPTH_MAX: usize = 200;
/// QEMU's limit on the name of a backing file.
pub(super) const BACKING_PATH_BYTES_MAX: usize = 1023;

/// What becomes of the path that the user registered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PathWish {
    /// It becomes a symlink that always opens the machine's current disk.
    #[default]
    Follow,
    /// It stays the image itself; whoever starts the machine must use `active/<disk>` in the layers folder.
    Keep,
}

/// What becomes of a raw image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RawWish {
    /// It is refused.
    #[default]
    Refuse,
    /// It is converted to qcow2, in its place.
    Convert,
}

/// What a snapshot does where the machine writes media that are no disks of its domain: the setting
/// `qemu.left-out-disks`. One with the machine's memory refuses, whatever is set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LeftOut {
    /// It is taken, and says what it does not hold.
    #[default]
    Warn,
    /// It is refused.
    Refuse,
}

impl LeftOut {
    /// For what is not written down.
    pub(super) fn is_told(&self) -> bool {
        *self == Self::Warn
    }
}

/// What becomes of an image that was not closed by who wrote it last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RepairWish {
    /// It is left to QEMU, which mends it when the machine is next started.
    #[default]
    Leave,
    /// It is mended now (`qemu-img check -r all`), if no machine has it.
    Mend,
}

/// The options of a registration: [`Registration::options`](snaptree_engine::driver::Registration::options).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QemuOptions {
    /// The layers go to `<this>/<domain uuid>/`; by default to `.snaptree/<domain uuid>/` beside the first disk.
    pub layers_dir: Option<PathBuf>,
    /// What becomes of the registered paths.
    pub keep_path: PathWish,
    /// What becomes of raw images.
    pub raw: RawWish,
    /// What becomes of images that were not closed.
    pub repair: RepairWish,
    /// Files that other domains are built upon and only read (see [`bases_of`]), with the domain's name. Such a file
    /// cannot be registered as a disk, but a disk may be built upon it.
    pub bases: BTreeMap<PathBuf, DomainName>,
    /// Who runs the machine.
    pub runs: RunsWish,
    /// The guest agent's socket.
    pub agent: Option<PathBuf>,
}

/// How the machine of a registered domain is reached from now on; what is left out stays, and an empty value takes away:
/// [`Command::Set`](snaptree_engine::command::Command::Set).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AccessWish {
    /// Who runs the machine.
    pub runs: RunsWish,
    /// The guest agent's socket.
    pub agent: Option<PathBuf>,
    /// Which disks it has.
    #[serde(skip_serializing_if = "DisksWish::is_none")]
    pub disks: DisksWish,
}

/// What the driver remembers of a domain: [`Domain::config`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QemuConfig {
    /// The layers folder: absolute, its existing part resolved.
    pub layers: PathBuf,
    /// What becomes of the registered paths.
    pub keep_path: PathWish,
    /// The registered images.
    pub disks: BTreeMap<DiskName, DiskPaths>,
    /// Those that were taken from the domain with their layers kept: their registered paths lead to these.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub removed: BTreeMap<DiskName, DiskPaths>,
    /// Who runs the machine.
    #[serde(default, skip_serializing_if = "Runs::is_apart")]
    pub runs: Runs,
    /// The guest agent's socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<PathBuf>,
}

/// A registered image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DiskPaths {
    /// As given, made absolute.
    pub given: PathBuf,
    /// Where it led: the image itself.
    pub resolved: PathBuf,
    /// What the image was built upon when it was registered, nearest first. Snaptree only reads these files.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bases: Vec<PathBuf>,
    /// The name of what it was built upon, as it stood in its header, where that was a relative one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relative_base: Option<PathBuf>,
    /// The snapshots that somebody else had made inside it by then, which the user was told of; none where nobody looked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inside: Option<BTreeSet<String>>,
}

impl QemuConfig {
    /// The configuration in a domain's state.
    pub(super) fn of(state: &DomainState) -> Result<(&Domain, Self), Failure> {
        let domain = state
            .domain
            .as_ref()
            .ok_or_else(|| Failure::new(Code::NotFound, "the domain is not registered"))?;
        let config = Self::deserialize(&domain.config).map_err(|error| {
            Failure::new(
                Code::Invalid,
                format!("the configuration of domain '{}' is no QEMU one: {error}", domain.name),
            )
        })?;
        Ok((domain, config))
    }

    /// With another way to the machine.
    pub(super) fn reached(
        self,
        wish: AccessWish,
        domain: &Domain,
        run_dir: &Path,
    ) -> Result<Self, DriverError> {
        let names: Vec<&DiskName> = self.disks.keys().collect();
        let runs = Runs::of(&wish.runs.over(&self.runs), &names, &run_dir.join(domain.id.to_string()))?;
        let agent = wish.agent.or(self.agent).filter(|socket| !socket.as_os_str().is_empty());
        let config = Self { runs, agent, ..self };
        check_agent(&config)?;
        Ok(config)
    }

    /// The file that the machine writes of a disk; none if there is no such disk.
    pub(super) fn written(&self, disk: &DiskName, state: &DomainState) -> Option<PathBuf> {
        let active = state.layers.disks.get(disk).and_then(|layers| layers.active_layer());
        let registered = || self.disks.get(disk).map(|paths| paths.resolved.clone());
        active.map(|(_, layer)| layer.file.clone()).or_else(registered)
    }

    /// As the log keeps it.
    pub(super) fn to_value(&self) -> Result<serde_json::Value, Failure> {
        serde_json::to_value(self).map_err(|_| {
            Failure::new(Code::Invalid, "a path is no UTF-8 text, which the log cannot hold").refused()
        })
    }

    /// The file of a layer that Snaptree makes.
    pub(super) fn file(&self, layer: &LayerId) -> PathBuf {
        self.layers.join(format!("{layer}.qcow2"))
    }
}

/// The file for the memory of a snapshot that an operation takes.
pub(super) fn memory_file(layers: &Path, operation: OperationId) -> PathBuf {
    layers.join(format!("memory-{operation}.vmstate"))
}

/// The symlink in a layers folder that names the generation that is switched on.
pub(super) fn active(layers: &Path) -> PathBuf {
    layers.join("active")
}

/// What can be done with a machine; `agent` is whether its guest can be asked to quiesce.
pub(super) const fn capabilities(agent: Option<&PathBuf>, runs: &Runs) -> Capabilities {
    Capabilities {
        memory: false,
        // Who starts it must be able to start it with its memory.
        memory_external: matches!(runs, Runs::Managed { .. }),
        disk_only: true,
        quiesce: agent.is_some(),
        internal: true,
        disk_selection: true,
        children_only: true,
        metadata_only: true,
        merges_itself: false,
        keeps_names: false,
        name_bytes_max: 255,
        depth_max: DEPTH_MAX,
    }
}

/// Who runs a domain's machine, and whether it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineFacts {
    /// Who runs it.
    pub runs: Runs,
    /// The guest agent's socket.
    pub agent: Option<PathBuf>,
    /// What it does; none if that cannot be seen.
    pub now: Option<RunState>,
}

/// Looks who has a domain's images, and asks its QEMU, if it answers; none for a domain of another driver.
pub async fn machine_of(state: &DomainState) -> Option<MachineFacts> {
    let (_, config) = QemuConfig::of(state).ok()?;
    let now = match (super::live::look(state).await, in_use(state, &config)) {
        (Ok(machine), Ok(holders)) => {
            Some(machine.run_state(machine.process().is_some() || !holders.is_empty()))
        }
        _ => None,
    };
    Some(MachineFacts { runs: config.runs, agent: config.agent, now })
}

/// Every file of a domain, for [`Registration::taken`](snaptree_engine::driver::Registration::taken): its layers,
/// and its registered paths as given and as resolved.
pub fn files_of(state: &DomainState) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = state.layers.files().cloned().collect();
    if let Ok((_, config)) = QemuConfig::of(state) {
        let disks = config.disks.into_values().chain(config.removed.into_values());
        files.extend(disks.flat_map(|disk| [disk.given, disk.resolved]));
    }
    files.sort();
    files.dedup();
    files
}

/// Every file that a domain is built upon and that is not its own, for [`QemuOptions::bases`].
pub fn bases_of(state: &DomainState) -> Vec<PathBuf> {
    QemuConfig::of(state)
        .map(|(_, config)| {
            let disks = config.disks.into_values().chain(config.removed.into_values());
            disks.flat_map(|disk| disk.bases).collect()
        })
        .unwrap_or_default()
}
