//! What was seen of a machine that runs. Data; what follows from it is pure.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use snaptree_engine::DiskName;
use snaptree_engine::domain::RunState;
use snaptree_engine::driver::Observation;
use snaptree_engine::operation::{Code, Failure};
use snaptree_engine::project::DomainState;

use super::graph::Access;
use crate::qemu::config::{DiskPaths, QemuConfig};
use crate::qemu::qmp::Version;

/// How the ids of Snaptree's own jobs begin.
const OWN_JOBS: &str = "st-";

/// Whether a machine runs, and whether it is reached.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "machine", rename_all = "kebab-case")]
pub(in crate::qemu) enum Machine {
    /// Nothing answers, and nothing has to: by the locks of the images it is off, or not to be reached.
    #[default]
    Silent,
    /// It should answer and does not; the reason.
    Mute {
        /// In words.
        why: String,
        /// Whether somebody is there behind its socket: then it is at work, whatever the locks say.
        #[serde(default)]
        is_connected: bool,
    },
    /// It answers.
    Live(LiveMachine),
}

/// A machine that answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::qemu) struct LiveMachine {
    /// QEMU's QMP socket.
    pub(in crate::qemu) qmp: PathBuf,
    /// Whether the guest runs.
    pub(in crate::qemu) run: Run,
    /// What it has open.
    pub(in crate::qemu) chains: Vec<Chain>,
    /// The ids of its jobs.
    pub(in crate::qemu) jobs: Vec<String>,
    /// QEMU's version.
    #[serde(default)]
    pub(in crate::qemu) version: Version,
    /// The size of its memory; 0 where QEMU does not say.
    #[serde(default)]
    pub(in crate::qemu) ram_bytes: u64,
    /// QEMU's process; none where it is in another namespace.
    #[serde(default)]
    pub(in crate::qemu) pid: Option<u32>,
}

/// Whether the guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(in crate::qemu) enum Run {
    /// It runs.
    Running,
    /// It is stopped, by whomever.
    Paused,
    /// It is stopped and cannot simply go on: an I/O error, a failed load, an incoming migration, a guest that is off.
    Stuck,
}

impl Run {
    /// In the engine's words.
    pub(in crate::qemu) const fn state(self) -> RunState {
        match self {
            Self::Running => RunState::Running,
            Self::Paused | Self::Stuck => RunState::Paused,
        }
    }
}

/// What is open for one device, topmost first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::qemu) struct Chain {
    /// The nodes.
    pub(in crate::qemu) nodes: Vec<LiveNode>,
    /// The device, by QEMU's name of it.
    #[serde(default)]
    pub(in crate::qemu) device: String,
    /// Whether it writes the medium.
    #[serde(default = "writes")]
    pub(in crate::qemu) access: Access,
    /// What is in it, as QEMU names it.
    #[serde(default)]
    pub(in crate::qemu) medium: String,
    /// The block jobs that work on it.
    #[serde(default)]
    pub(in crate::qemu) jobs: Vec<String>,
}

fn writes() -> Access {
    Access::Writes
}

/// One open image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::qemu) struct LiveNode {
    /// QEMU's name of it.
    pub(in crate::qemu) node: String,
    /// Its file as QEMU names it, and would open it again.
    pub(in crate::qemu) named: PathBuf,
    /// Where that leads now.
    pub(in crate::qemu) file: PathBuf,
    /// Whether it is open for reading alone.
    #[serde(default)]
    pub(in crate::qemu) read_only: bool,
    /// Whether it has dirty bitmaps.
    #[serde(default)]
    pub(in crate::qemu) has_bitmaps: bool,
}

impl Chain {
    /// Refuses a disk on which somebody else's block job works: what it copies or merges would be exchanged under it.
    fn check_jobs(&self, disk: &DiskName) -> Result<(), Failure> {
        match self.jobs.iter().find(|job| !job.starts_with(OWN_JOBS)) {
            None => Ok(()),
            Some(job) => Err(Failure::new(
                Code::InUse,
                format!("block job '{job}', which is not Snaptree's, works on disk '{disk}'"),
            )
            .hint(format!(
                "wait for its end and try again, or end it: block-job-cancel with device '{job}' (QMP),                  block_job_cancel {job} (HMP)"
            ))),
        }
    }
}

impl LiveMachine {
    /// The chain of a disk: the one that has a file of the disk's open.
    pub(in crate::qemu) fn chain(
        &self,
        disk: &DiskName,
        state: &DomainState,
        config: &QemuConfig,
    ) -> Option<&Chain> {
        let layers = state.layers.disks.get(disk);
        let known = |file: &Path| {
            layers.is_some_and(|layers| layers.layers.values().any(|layer| layer.file == file))
                || config.disks.get(disk).is_some_and(|paths| paths.resolved == file)
        };
        self.chains.iter().find(|chain| chain.nodes.iter().any(|node| known(&node.file)))
    }

    /// The node that has a file open, in whatever chain.
    pub(in crate::qemu) fn node_of(&self, file: &Path) -> Option<&LiveNode> {
        self.chains.iter().flat_map(|chain| &chain.nodes).find(|node| node.file == file)
    }

    /// The node of a file that a device stands on directly: what the machine writes.
    pub(in crate::qemu) fn root_of(&self, file: &Path) -> Option<&LiveNode> {
        self.chains.iter().filter_map(|chain| chain.nodes.first()).find(|node| node.file == file)
    }

    /// The refusal of a machine that has a disk no more, or never had any.
    fn without(
        &self,
        disk: &DiskName,
        paths: &DiskPaths,
        (state, config): (&DomainState, &QemuConfig),
    ) -> Failure {
        let name = state.domain.as_ref().map_or("NAME", |domain| domain.name.as_str());
        let is_it = config.disks.keys().any(|other| self.chain(other, state, config).is_some());
        let socket = self.qmp.display();
        let message = format!(
            "the machine behind QMP socket {socket} does not have disk '{disk}' ({}) open",
            paths.given.display()
        );
        Failure::new(Code::Drift, message).hint(if is_it {
            format!(
                "if it was taken from the machine: snaptree domain disk remove {name} {disk}; if not, start the machine \
                 from the registered path"
            )
        } else {
            format!(
                "it has none of the domain's disks: if it is another machine, snaptree domain set {name} --qmp SOCKET; \
                 if not, start it from the registered paths"
            )
        })
    }

    /// What else the machine writes than such images, in words.
    pub(in crate::qemu) fn writes_beside(&self, is_ours: impl Fn(&Path) -> bool) -> Vec<String> {
        writes_beside(&self.chains, is_ours)
    }

    /// Refuses a machine that has other files open than the log says.
    pub(in crate::qemu) fn check(&self, state: &DomainState, config: &QemuConfig) -> Result<(), Failure> {
        for (disk, paths) in &config.disks {
            let open =
                self.chain(disk, state, config).ok_or_else(|| self.without(disk, paths, (state, config)))?;
            open.check_jobs(disk)?;
            let layers = state.layers.disks.get(disk);
            let expected: Vec<&Path> = match layers.and_then(|layers| Some((layers, layers.active.as_ref()?)))
            {
                Some((layers, active)) => {
                    let chain = layers.chain(active).into_iter();
                    chain.filter_map(|id| layers.layers.get(id)).map(|layer| layer.file.as_path()).collect()
                }
                None => vec![paths.resolved.as_path()],
            };
            let mut open = open.nodes.iter();
            for expected in expected {
                let found = open.next();
                if found.is_none_or(|node| node.file != expected) {
                    return Err(Failure::new(
                        Code::Drift,
                        format!(
                            "QEMU has {} open for disk '{disk}' where the log says {}",
                            found
                                .map_or_else(|| "nothing".to_owned(), |node| node.file.display().to_string()),
                            expected.display()
                        ),
                    )
                    .hint("shut the machine down and start it from the registered path"));
                }
            }
        }
        Ok(())
    }
}

/// What else such a machine writes than such images, in words: a disk that is not registered, a floppy, the firmware's
/// variables.
pub(super) fn writes_beside(chains: &[Chain], is_ours: impl Fn(&Path) -> bool) -> Vec<String> {
    let beside = chains.iter().filter(|chain| {
        chain.access == Access::Writes && !chain.nodes.first().is_some_and(|node| is_ours(&node.file))
    });
    let medium = |chain: &Chain| match chain.nodes.first() {
        Some(node) => node.file.display().to_string(),
        None => chain.medium.clone(),
    };
    beside.map(|chain| format!("{} ({})", medium(chain), chain.device)).collect()
}

impl Machine {
    /// That there is a process behind the socket, and which one, as far as that is known. A QEMU that answers is at work
    /// though it holds no locks: with `file.locking=off`, or waiting behind an incoming migration (QEMU 10).
    pub(in crate::qemu) const fn process(&self) -> Option<Option<u32>> {
        match self {
            Self::Silent | Self::Mute { is_connected: false, .. } => None,
            Self::Mute { .. } => Some(None),
            Self::Live(machine) => Some(machine.pid),
        }
    }

    /// What the machine does, where somebody has its disks.
    pub(in crate::qemu) const fn run_state(&self, is_in_use: bool) -> RunState {
        match self {
            _ if !is_in_use => RunState::Off,
            Self::Live(machine) => machine.run.state(),
            Self::Mute { .. } | Self::Silent => RunState::Running,
        }
    }

    /// The machine, if it answers and has the domain's disks open; none if it is off. Pure.
    ///
    /// # Errors
    /// It runs and cannot be worked with: it does not answer, or it is none of Snaptree's business how to reach it.
    pub(in crate::qemu) fn at_work<'a>(
        &'a self,
        seen: &Observation,
        config: &QemuConfig,
    ) -> Result<Option<&'a LiveMachine>, Failure> {
        let Some(holder) = seen.in_use.first() else { return Ok(None) };
        match self {
            Self::Live(machine) => Ok(Some(machine)),
            Self::Mute { why, .. } => Err(Failure::new(
                Code::InUse,
                format!("{}, and QEMU cannot be asked: {why}", crate::qemu::lock::in_use(holder).message),
            )
            .hint("end what has or stops it, or shut the machine down, and try again")),
            Self::Silent if config.runs.qmp().is_some() => Err(crate::qemu::lock::in_use(holder)
                .hint("nobody answers at its QMP socket: was the machine started without it?")),
            Self::Silent => Err(crate::qemu::lock::in_use(holder)),
        }
    }
}
