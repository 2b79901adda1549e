//! The commands that change snapshots.

use clap::Args;
use snaptree_engine::SnapshotName;
use snaptree_engine::command::SnapshotRef;

use super::WriterArgs;
use super::value::{Label, label, new_label};

/// See `snaptree create --help`.
pub const CREATE_EXAMPLES: &str = "Examples:
  snaptree create web before-upgrade
  snaptree create web                          named by the seconds since the epoch
  snaptree create web nightly --description 'before the batch run' --label made-by=cron
  snaptree create web before-upgrade --memory  with the memory: a revert goes on where the machine was
  snaptree create web before-upgrade --internal    inside the images, with the memory if it runs
  snaptree create web nightly --detach         do not wait: `snaptree op show` tells how it went
  snaptree create web nightly --quiesce        the guest's file systems are frozen meanwhile (domain add --agent)
  snaptree create web --key 2026-11-23         the same key and command again is answered with the first result
  virsh snapshot-dumpxml other s1 | snaptree create web --xml -";
/// See `snaptree revert --help`.
pub const REVERT_EXAMPLES: &str = "Examples:
  snaptree revert web before-upgrade
  snaptree revert web --current                throw away what was written since the last snapshot
  snaptree revert web before-upgrade --keep    what is there now is a snapshot first: a revert can be undone by a revert
  snaptree revert web before-upgrade --dry-run";
/// See `snaptree delete --help`.
pub const DELETE_EXAMPLES: &str = "Examples:
  snaptree delete web before-upgrade           its changes merge into its children
  snaptree delete web a b c                    one operation, judged as a whole
  snaptree delete web experiment --children    and everything below it
  snaptree delete web big --defer              merge later: snaptree reconcile web
  snaptree delete web big --dry-run            which way it would merge, and what that costs";
/// See `snaptree edit --help`.
pub const EDIT_EXAMPLES: &str = "Examples:
  snaptree edit web 1795401658 --name before-upgrade
  snaptree edit web before-upgrade --description 'known good' --label keep=yes --label old=";
/// See `snaptree hold --help`.
pub const HOLD_EXAMPLES: &str = "Examples:
  snaptree hold web before-upgrade --reason 'until the audit is over'
  snaptree hold web before-upgrade --reason 'release week' --until 2w";
/// See `snaptree release --help`.
pub const RELEASE_EXAMPLES: &str = "Example:
  snaptree release web before-upgrade";

/// Asks what would be done.
#[derive(Clone, Copy, Debug, Args)]
pub struct DryRunArg {
    /// Say what would be done, what it costs and what would be lost; write and touch nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// Whether a request's outcome is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// It is.
    ToTheEnd,
    /// It is enough that the request is in the log; the daemon goes on with it.
    Detached,
}

/// Asks not to wait.
#[derive(Clone, Copy, Debug, Args)]
pub struct WaitArg {
    /// Return as soon as the request is in the log; the daemon carries it out (needs `snaptree serve`)
    #[arg(long, conflicts_with = "dry_run")]
    detach: bool,
}

impl WaitArg {
    /// Whether the outcome is waited for.
    pub const fn wait(self) -> Wait {
        if self.detach { Wait::Detached } else { Wait::ToTheEnd }
    }
}

/// `create`
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// The domain's name or id
    pub domain: String,
    /// The snapshot's name [default: the seconds since the epoch]
    pub name: Option<SnapshotName>,
    /// What it is
    #[arg(long, value_name = "TEXT")]
    pub description: Option<String>,
    /// A label; may be given several times
    #[arg(long, value_name = "K=V", value_parser = new_label)]
    pub label: Vec<Label>,
    /// With the machine's memory
    #[arg(long, conflicts_with = "disk_only")]
    pub memory: bool,
    /// The disks alone
    #[arg(long)]
    pub disk_only: bool,
    /// Inside the disk images, where the driver usually keeps it elsewhere
    #[arg(long)]
    pub internal: bool,
    /// Ask the guest to bring its file systems to rest first; needs --disk-only where memory would be kept
    #[arg(long, conflicts_with = "memory")]
    pub quiesce: bool,
    /// Read libvirt snapshot XML from FILE, or from standard input with '-'
    #[arg(long, value_name = "FILE")]
    pub xml: Option<String>,
    /// Give up what somebody else keeps inside the images under this name (a snapshot of libvirt's or qemu-img's), where
    /// the create is refused for it; may be given several times
    #[arg(long, value_name = "NAME")]
    pub give_up: Vec<String>,
    /// Makes the request idempotent: given again with the same command, the first result is the answer
    #[arg(long)]
    pub key: Option<String>,
    /// Dry run.
    #[command(flatten)]
    pub dry_run: DryRunArg,
    /// Waiting for the outcome.
    #[command(flatten)]
    pub wait: WaitArg,
    /// Waiting for the state.
    #[command(flatten)]
    pub writer: WriterArgs,
}

/// `revert`
#[derive(Debug, Args)]
pub struct RevertArgs {
    /// The domain's name or id
    pub domain: String,
    /// The snapshot's name or id
    #[arg(required_unless_present = "current", conflicts_with = "current", value_parser = SnapshotRef::parse)]
    pub name: Option<SnapshotRef>,
    /// The current snapshot
    #[arg(long)]
    pub current: bool,
    /// Let the machine run afterwards
    #[arg(long, conflicts_with = "paused")]
    pub running: bool,
    /// Let the machine stand paused afterwards
    #[arg(long)]
    pub paused: bool,
    /// Keep what would be lost as a snapshot of its own first, before-revert-SECONDS; without it nothing is reverted
    #[arg(long)]
    pub keep: bool,
    /// Do not ask
    #[arg(short, long)]
    pub yes: bool,
    /// Dry run.
    #[command(flatten)]
    pub dry_run: DryRunArg,
    /// Waiting for the outcome.
    #[command(flatten)]
    pub wait: WaitArg,
    /// Waiting for the state.
    #[command(flatten)]
    pub writer: WriterArgs,
}

/// `delete`
#[derive(Debug, Args)]
pub struct DeleteArgs {
    /// The domain's name or id
    pub domain: String,
    /// The snapshots' names or ids
    #[arg(required_unless_present = "current", conflicts_with = "current", value_parser = SnapshotRef::parse)]
    pub name: Vec<SnapshotRef>,
    /// The current snapshot
    #[arg(long)]
    pub current: bool,
    /// And everything below; where nobody can be asked, with --yes only
    #[arg(long, conflicts_with = "children_only")]
    pub children: bool,
    /// Everything below, but not the named ones; where nobody can be asked, with --yes only
    #[arg(long)]
    pub children_only: bool,
    /// Only forget the snapshots; their data stays
    #[arg(long, conflicts_with_all = ["now", "defer"])]
    pub metadata: bool,
    /// Merge now, whatever has to be copied; refused where there is no room for it
    #[arg(long, conflicts_with = "defer")]
    pub now: bool,
    /// Merge later
    #[arg(long)]
    pub defer: bool,
    /// Give up a dirty bitmap of this name that a merge would drop; may be given several times
    #[arg(long, value_name = "NAME")]
    pub give_up: Vec<String>,
    /// Do not ask
    #[arg(short, long)]
    pub yes: bool,
    /// Dry run.
    #[command(flatten)]
    pub dry_run: DryRunArg,
    /// Waiting for the outcome.
    #[command(flatten)]
    pub wait: WaitArg,
    /// Waiting for the state.
    #[command(flatten)]
    pub writer: WriterArgs,
}

/// `edit`
#[derive(Debug, Args)]
pub struct EditArgs {
    /// The domain's name or id
    pub domain: String,
    /// The snapshot's name or id
    #[arg(value_name = "NAME", value_parser = SnapshotRef::parse)]
    pub snapshot: SnapshotRef,
    /// Its new name
    #[arg(long)]
    pub name: Option<SnapshotName>,
    /// Its new description; an empty one removes it
    #[arg(long, value_name = "TEXT")]
    pub description: Option<String>,
    /// A label to set; with an empty value, to take away
    #[arg(long, value_name = "K=V", value_parser = label)]
    pub label: Vec<Label>,
    /// Waiting for the state.
    #[command(flatten)]
    pub writer: WriterArgs,
}

/// `hold`
#[derive(Debug, Args)]
pub struct HoldArgs {
    /// The domain's name or id
    pub domain: String,
    /// The snapshot's name or id
    #[arg(value_parser = SnapshotRef::parse)]
    pub name: SnapshotRef,
    /// Why
    #[arg(long, value_name = "TEXT")]
    pub reason: String,
    /// When the hold ends by itself: a time, or a duration such as 2w
    #[arg(long, value_name = "WHEN")]
    pub until: Option<String>,
    /// Waiting for the state.
    #[command(flatten)]
    pub writer: WriterArgs,
}

/// `release`
#[derive(Debug, Args)]
pub struct ReleaseArgs {
    /// The domain's name or id
    pub domain: String,
    /// The snapshot's name or id
    #[arg(value_parser = SnapshotRef::parse)]
    pub name: SnapshotRef,
    /// Waiting for the state.
    #[command(flatten)]
    pub writer: WriterArgs,
}
