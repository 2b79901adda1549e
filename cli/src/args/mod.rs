//! The command line: what can be written, and its help.

pub mod domain;
pub mod host;
pub mod inspect;
pub mod operation;
pub mod policy;
pub mod serve;
pub mod snapshot;
pub mod suggest;
pub mod value;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use self::value::duration;

const ABOUT: &str = "Snapshots of virtual machines, kept in a log that forgets nothing";
const LONG_ABOUT: &str = "Snaptree takes, reverts, deletes and merges snapshots of virtual machines.\n\
    Every request and every step is in an append-only log before it happens, so an operation that was cut short\n\
    is finished or taken back by `snaptree recover`, and `snaptree log` tells who did what, and when.";
const EXAMPLES: &str = "Examples:
  snaptree demo                                            see it work, in a directory of its own
  snaptree domain add web --driver qemu --disk vda=web.qcow2
  snaptree create web before-upgrade
  snaptree tree web
  snaptree revert web before-upgrade
  snaptree recover                                         after a crash

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not found, 4 refused, 5 needs attention.";

/// The whole command line.
#[derive(Debug, Parser)]
#[command(name = "snaptree", version, about = ABOUT, long_about = LONG_ABOUT, after_help = EXAMPLES)]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub struct Cli {
    /// What every command takes.
    #[command(flatten)]
    pub global: Global,
    /// Which command.
    #[command(subcommand)]
    pub command: Command,
}

/// What every command takes.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// Print one JSON document (`log`: one a line)
    #[arg(long, global = true)]
    pub json: bool,
    /// The state directory [default: $SNAPTREE_STATE, else that of the daemon at /run/snaptree/snaptree.sock, else /var/lib/snaptree for root and $XDG_STATE_HOME/snaptree for others]
    #[arg(long, global = true, value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// Tell on stderr what is going on; -vv and -vvv tell more
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

/// What every command that writes takes.
#[derive(Clone, Debug, Args)]
pub struct WriterArgs {
    /// How long to wait while another process writes
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = duration)]
    pub lock_timeout: Duration,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Register machines, list them, change them, let them go
    #[command(subcommand)]
    Domain(domain::DomainCommand),
    /// Register ESXi hosts and vCenters, see what they have
    #[command(subcommand)]
    Host(host::HostCommand),
    /// Take a snapshot
    #[command(after_help = snapshot::CREATE_EXAMPLES)]
    Create(snapshot::CreateArgs),
    /// List a domain's snapshots
    #[command(after_help = inspect::LIST_EXAMPLES)]
    List(inspect::ListArgs),
    /// Draw a domain's snapshots as a tree
    #[command(after_help = inspect::TREE_EXAMPLES)]
    Tree(inspect::TreeArgs),
    /// Show all that is known of a snapshot
    #[command(after_help = inspect::SHOW_EXAMPLES)]
    Show(inspect::ShowArgs),
    /// Print a snapshot as libvirt's snapshot XML
    #[command(after_help = inspect::XML_EXAMPLES)]
    Xml(inspect::ShowArgs),
    /// Print the name of the current snapshot
    #[command(after_help = inspect::CURRENT_EXAMPLES)]
    Current(inspect::CurrentArgs),
    /// Go back to a snapshot; what was written since the last one is lost
    #[command(after_help = snapshot::REVERT_EXAMPLES)]
    Revert(snapshot::RevertArgs),
    /// Delete snapshots; their changes merge into their children
    #[command(after_help = snapshot::DELETE_EXAMPLES)]
    Delete(snapshot::DeleteArgs),
    /// Change a snapshot's name, description or labels
    #[command(after_help = snapshot::EDIT_EXAMPLES)]
    Edit(snapshot::EditArgs),
    /// Forbid a snapshot's deletion
    #[command(after_help = snapshot::HOLD_EXAMPLES)]
    Hold(snapshot::HoldArgs),
    /// Allow a snapshot's deletion again
    #[command(after_help = snapshot::RELEASE_EXAMPLES)]
    Release(snapshot::ReleaseArgs),
    /// Who did what, and when
    #[command(after_help = inspect::LOG_EXAMPLES)]
    Log(inspect::LogArgs),
    /// List operations, tell the story of one, let one try again
    #[command(subcommand)]
    Op(operation::OpCommand),
    /// Check that the log is what was written
    #[command(subcommand)]
    Audit(inspect::AuditCommand),
    /// Finish, forward or back, what was cut short
    #[command(after_help = inspect::RECOVER_EXAMPLES)]
    Recover(inspect::RecoverArgs),
    /// Merge what deleted snapshots left behind, as far as possible
    #[command(after_help = inspect::RECONCILE_EXAMPLES)]
    Reconcile(inspect::ReconcileArgs),
    /// Compare the hypervisors with the log, and write down what differs
    #[command(after_help = inspect::DRIFT_EXAMPLES)]
    Drift(inspect::DriftArgs),
    /// Take snapshots on a schedule, and keep what the rules say
    #[command(subcommand)]
    Policy(policy::PolicyCommand),
    /// Be the daemon: work on what is open, and take requests over a socket
    #[command(after_help = serve::SERVE_EXAMPLES)]
    Serve(serve::ServeArgs),
    /// Show or check the settings
    #[command(subcommand)]
    Config(inspect::ConfigCommand),
    /// Print the completions for a shell
    #[command(after_help = inspect::COMPLETIONS_EXAMPLES)]
    Completions(inspect::CompletionsArgs),
    /// See it work: snapshots, a branch, merges, and two reverts that are killed halfway
    #[command(after_help = inspect::DEMO_EXAMPLES)]
    Demo(inspect::DemoArgs),
    /// A part of the demo: a request that stops at a named place
    #[command(hide = true)]
    DemoCut(inspect::DemoCutArgs),
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_grammar_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_visible_command_has_an_example() {
        fn check(command: &clap::Command, path: &str) {
            let mut leaf = true;
            for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set() && sub.get_name() != "help")
            {
                leaf = false;
                check(sub, &format!("{path} {}", sub.get_name()));
            }
            let example = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(!leaf || example.contains(path), "`{path}` has no example of itself");
            assert!(!leaf || command.get_about().is_some(), "`{path}` says nothing of itself");
        }
        check(&Cli::command(), "snaptree");
    }
}
