//! The commands that look, and those on the whole installation.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use snaptree_engine::SnapshotName;
use snaptree_engine::command::SnapshotRef;
use snaptree_engine::domain::DriverKind;

use super::WriterArgs;
use super::value::{Label, new_label};

/// See `snaptree list --help`.
pub const LIST_EXAMPLES: &str = "Examples:
  snaptree list web
  snaptree list web --leaves --label tier=prod
  snaptree list web --all                      also deleted ones whose data is still there, and why
  snaptree list web --at 2d                    as it was two days ago
  snaptree list web --names
  snaptree list web --sort size                the largest last

SIZE is what a snapshot's layers occupy. FREES is what deleting it would free once its data is merged: exactly, where
nothing is built upon it; else an estimate, from the least to the most. `--json` has both as `allocated` and `frees`.";
/// See `snaptree tree --help`.
pub const TREE_EXAMPLES: &str = "Examples:
  snaptree tree web
  snaptree tree web --full                     also what is folded on a terminal
  snaptree tree web --at '2026-11-23 04:25'
  snaptree tree web --at seq:120";
/// See `snaptree show --help`.
pub const SHOW_EXAMPLES: &str = "Example:
  snaptree show web before-upgrade

Frees is what deleting it would free once its data is merged. Where it may take space instead, since its data is copied
into several children, that is said.";
/// See `snaptree xml --help`.
pub const XML_EXAMPLES: &str = "Example:
  snaptree xml web before-upgrade > before-upgrade.xml";
/// See `snaptree current --help`.
pub const CURRENT_EXAMPLES: &str = "Examples:
  snaptree current web
  snaptree current web --at 1h";
/// See `snaptree log --help`.
pub const LOG_EXAMPLES: &str = "Examples:
  snaptree log web
  snaptree log web --snapshot before-upgrade
  snaptree log --since 1d --actor user:alice --kind Snapshot.
  snaptree log --operation 3f2a91bc --json
  snaptree log --follow";
/// See `snaptree recover --help`.
pub const RECOVER_EXAMPLES: &str = "Example:
  snaptree recover                             exit code 0 when nothing is left open, else 5";
/// See `snaptree reconcile --help`.
pub const RECONCILE_EXAMPLES: &str = "Examples:
  snaptree reconcile
  snaptree reconcile web                       also what was put off with --defer";
/// See `snaptree drift --help`.
pub const DRIFT_EXAMPLES: &str = "Examples:
  snaptree drift                               every domain; exit code 0 where all agree, else 5
  snaptree drift web --json";
/// See `snaptree completions --help`.
pub const COMPLETIONS_EXAMPLES: &str = "Examples:
  snaptree completions bash > /etc/bash_completion.d/snaptree
  snaptree completions fish > ~/.config/fish/completions/snaptree.fish";
/// See `snaptree demo --help`.
pub const DEMO_EXAMPLES: &str = "Examples:
  snaptree demo
  snaptree demo --driver sim
  snaptree demo --dir /tmp/snaptree-demo --keep

It works in a temporary directory and touches nothing else. With qemu-img and qemu-io in the PATH it uses real QEMU
images, else the simulated hypervisor.";

/// The moment that is asked about.
#[derive(Clone, Debug, Args)]
pub struct AtArg {
    /// As it was then: a time, 2h, 3d, or seq:N
    #[arg(long, value_name = "WHEN")]
    pub at: Option<String>,
}

/// `list`
#[derive(Debug, Args)]
pub struct ListArgs {
    /// The domain's name or id
    pub domain: String,
    /// Only those without a parent
    #[arg(long)]
    pub roots: bool,
    /// Only those without children
    #[arg(long, conflicts_with = "no_leaves")]
    pub leaves: bool,
    /// Only those with children
    #[arg(long)]
    pub no_leaves: bool,
    /// Only those with this label; may be given several times
    #[arg(long, value_name = "K=V", value_parser = new_label)]
    pub label: Vec<Label>,
    /// Only those that are held
    #[arg(long)]
    pub held: bool,
    /// Print names alone, one a line
    #[arg(long, visible_alias = "name-only")]
    pub names: bool,
    /// In which order
    #[arg(long, value_name = "BY", default_value = "created")]
    pub sort: SortBy,
    /// Also deleted ones whose data is still there
    #[arg(long)]
    pub all: bool,
    /// When.
    #[command(flatten)]
    pub at: AtArg,
}

/// The order of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SortBy {
    /// The oldest first
    Created,
    /// By name
    Name,
    /// The smallest first
    Size,
}

/// `tree`
#[derive(Debug, Args)]
pub struct TreeArgs {
    /// The domain's name or id
    pub domain: String,
    /// Draw every snapshot, also on a terminal, where long runs are folded otherwise
    #[arg(long, conflicts_with = "fold")]
    pub full: bool,
    /// Fold long runs of snapshots into one line, also where the output is no terminal
    #[arg(long)]
    pub fold: bool,
    /// Also deleted ones whose data is still there
    #[arg(long)]
    pub all: bool,
    /// When.
    #[command(flatten)]
    pub at: AtArg,
}

/// `show` and `xml`
#[derive(Debug, Args)]
pub struct ShowArgs {
    /// The domain's name or id
    pub domain: String,
    /// The snapshot's name or id
    #[arg(value_parser = SnapshotRef::parse)]
    pub name: SnapshotRef,
    /// When.
    #[command(flatten)]
    pub at: AtArg,
}

/// `current`
#[derive(Debug, Args)]
pub struct CurrentArgs {
    /// The domain's name or id
    pub domain: String,
    /// When.
    #[command(flatten)]
    pub at: AtArg,
}

/// `log`
#[derive(Debug, Args)]
pub struct LogArgs {
    /// Only this domain, by name or id; also one that was removed, by id
    pub domain: Option<String>,
    /// Only what is about this snapshot, alive or deleted
    #[arg(long, value_name = "NAME", requires = "domain")]
    pub snapshot: Option<String>,
    /// Not before
    #[arg(long, value_name = "WHEN")]
    pub since: Option<String>,
    /// Not after
    #[arg(long, value_name = "WHEN")]
    pub until: Option<String>,
    /// Only what this actor did: user:NAME, policy:NAME or engine
    #[arg(long)]
    pub actor: Option<String>,
    /// Only this kind of event, such as Snapshot.Created, or Snapshot. for all that begin so
    #[arg(long)]
    pub kind: Option<String>,
    /// Only this operation, by its id or the end of it
    #[arg(long, value_name = "ID")]
    pub operation: Option<String>,
    /// Go on printing what happens, until Ctrl-C
    #[arg(short, long)]
    pub follow: bool,
}

const VERIFY_EXAMPLES: &str = "Examples:
  snaptree audit verify
  snaptree audit verify --head 120:9f8e...     also that nothing was cut off since that head was kept";
const HEAD_EXAMPLES: &str = "Example:
  snaptree audit head                          keep it elsewhere; `audit verify --head` compares";

/// The commands on the log as evidence.
#[derive(Debug, Subcommand)]
pub enum AuditCommand {
    /// Walk the whole log and check every hash
    #[command(after_help = VERIFY_EXAMPLES)]
    Verify {
        /// A head that was kept elsewhere, as `audit head` prints it
        #[arg(long, value_name = "SEQ:HASH")]
        head: Option<String>,
    },
    /// Print the last event's place and hash
    #[command(after_help = HEAD_EXAMPLES)]
    Head,
}

/// `recover`
#[derive(Debug, Args)]
pub struct RecoverArgs {
    /// Waiting for the state.
    #[command(flatten)]
    pub writer: WriterArgs,
}

/// `reconcile`
#[derive(Debug, Args)]
pub struct ReconcileArgs {
    /// Only this domain, by name or id
    pub domain: Option<String>,
    /// Waiting for the state.
    #[command(flatten)]
    pub writer: WriterArgs,
}

/// `drift`
#[derive(Debug, Args)]
pub struct DriftArgs {
    /// Only this domain, by name or id
    pub domain: Option<String>,
    /// Waiting for the state.
    #[command(flatten)]
    pub writer: WriterArgs,
}

const CONFIG_SHOW_EXAMPLES: &str = "Example:
  snaptree config show";
const CONFIG_CHECK_EXAMPLES: &str = "Examples:
  snaptree config check
  snaptree config check draft.toml";

/// The commands on the settings.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Print the settings in force, and the files that they come from
    #[command(after_help = CONFIG_SHOW_EXAMPLES)]
    Show,
    /// Check the settings files
    #[command(after_help = CONFIG_CHECK_EXAMPLES)]
    Check {
        /// Check this file instead
        file: Option<PathBuf>,
    },
}

/// `completions`
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell
    pub shell: clap_complete::Shell,
}

/// `demo`
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// The hypervisor: qemu or sim [default: qemu if its tools are there]
    #[arg(long)]
    pub driver: Option<DriverKind>,
    /// Work in this directory, which must be empty or not there yet
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Leave everything there to look around
    #[arg(long)]
    pub keep: bool,
}

/// What is cut short in the demo.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DemoRequest {
    /// A snapshot that is taken.
    Create,
    /// A revert.
    Revert,
}

/// `demo-cut`
#[derive(Debug, Args)]
pub struct DemoCutArgs {
    /// What to do
    pub request: DemoRequest,
    /// The domain
    pub domain: String,
    /// The snapshot
    pub name: SnapshotName,
    /// The place at which to stop and wait to be killed
    #[arg(long)]
    pub stop_at: String,
}
