//! `snaptree policy ...`

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::WriterArgs;

const SET_EXAMPLES: &str = "Examples:
  snaptree policy set hourly.toml --dry-run    what would change, and what would become of the snapshots there are
  snaptree policy set hourly.toml

A policy file:
  name = \"hourly\"
  domains = [\"web-*\"]          # globs on names; or labels = { tier = \"prod\" }
  schedule = \"hourly\"          # OnCalendar, cron, or \"every 15m\"
  timezone = \"Europe/Vienna\"
  [keep]
  last = 3
  hourly = 24
  daily = 7
  [hooks.before]                # also [hooks.after]: a program around each snapshot
  program = [\"/usr/local/bin/freeze\"]
  [notify]                      # failure, recovery, needs attention
  command = [\"/usr/local/bin/page\"]

With --json: {\"name\", \"change\": \"new\"|\"changed\"|\"same\", \"changes\": [{\"key\",\"old\",\"new\"}], \"dry_run\", \"plan\"}; `plan` as
`policy plan` has it.";
const LIST_EXAMPLES: &str = "Example:
  snaptree policy list

With --json: {\"policies\": [{\"name\", \"schedule\", \"timezone\", \"domains\": [], \"suspended\", \"last\", \"next\", \"error\"}]}";
const SHOW_EXAMPLES: &str = "Example:
  snaptree policy show hourly

With --json: {\"name\", \"defined\", \"suspended\": {\"reason\",\"by\",\"at\"}, \"domains\": [], \"policy\", \"source\", \"long_run\"}";
const PLAN_EXAMPLES: &str = "Examples:
  snaptree policy plan hourly                  every snapshot that it made: keep or delete, and why
  snaptree policy plan hourly web-1

With --json: {\"policy\", \"clock\": {\"from\",\"to\",\"until\",\"message\"}, \"notes\": [], \"max_depth\", \"long_run\": {\"how\": \"levels\"|\"more-than\"|\"grows\", \"snapshots\"}, \"domains\": [{\"domain\",
\"depth\", \"snapshots\": [{\"snapshot\",\"created\",\"verdict\",\"reasons\":[],\"bytes_moved\",\"bytes_freed\"}]}]}; a verdict is `keep`,
`delete`, or `delete-later` where the run deletes no more than it may.";
const RUN_EXAMPLES: &str = "Examples:
  snaptree policy run hourly                   now, on all its domains
  snaptree policy run hourly web-1

With --json: {\"policy\", \"planned\", \"runs\": [{\"domain\",\"snapshot\",\"operation\",\"outcome\",\"error\",\"hooks\":
[{\"hook\": \"before\"|\"after\",\"outcome\": \"done\"|\"failed\",\"error\"}], \"deletes\": [{\"snapshot\",\"operation\",\"outcome\",\"reasons\":[],\"error\"}]}], \"suspended\"}; the last says why the policy was suspended, if its failures in a row
are too many now (a daemon does that a little later).";
const RUNS_EXAMPLES: &str = "Examples:
  snaptree policy runs                         what ran, how it ended, and what was skipped
  snaptree policy runs hourly --count 100

With --json: {\"runs\": [...], \"clock\", \"notes\": []}, the newest first; each has \"policy\", \"domain\", \"at\" and \"what\". Where `what` is `ran` it is like
one of `policy run` with \"planned\" and \"asked_by\", where it is `skipped` it has \"first\", \"last\", \"count\", \"more\" and \"why\".";
const NEXT_EXAMPLES: &str = "Example:
  snaptree policy next --count 20

With --json: {\"runs\": [{\"at\", \"planned\", \"policy\", \"domain\"}]}; `at` is `planned` and the jitter of that domain.";
const SUSPEND_EXAMPLES: &str = "Example:
  snaptree policy suspend hourly --reason 'storage is being moved'";
const RESUME_EXAMPLES: &str = "Example:
  snaptree policy resume hourly";
const CONFIRM_CLOCK_EXAMPLES: &str = "Example:
  snaptree policy confirm-clock

After a leap of the clock, forward or back, policies take their snapshots and hold back their deletes: until somebody says
that the clock is right, or until it has gone on for as long as it leapt, a day at most. `snaptree policy plan` tells whether
it is so. Check `date` first: what a policy lets go by its age is gone for good.";
const REMOVE_EXAMPLES: &str = "Example:
  snaptree policy remove hourly                its snapshots stay";

/// The commands on policies.
#[derive(Debug, Subcommand)]
pub enum PolicyCommand {
    /// Define a policy from a file, or change it
    #[command(after_help = SET_EXAMPLES)]
    Set(SetArgs),
    /// List the policies
    #[command(after_help = LIST_EXAMPLES)]
    List,
    /// Show a policy
    #[command(after_help = SHOW_EXAMPLES)]
    Show {
        /// Its name
        name: String,
    },
    /// Tell what retention would do now, snapshot by snapshot, and why
    #[command(after_help = PLAN_EXAMPLES)]
    Plan {
        /// Its name
        name: String,
        /// A domain's name or id [default: all that the policy is for]
        domain: Option<String>,
    },
    /// Run a policy now: take its snapshots, then delete what it does not keep
    #[command(after_help = RUN_EXAMPLES)]
    Run(RunArgs),
    /// List what ran and what was skipped, the newest first
    #[command(after_help = RUNS_EXAMPLES)]
    Runs {
        /// A policy's name [default: all]
        name: Option<String>,
        /// How many
        #[arg(long, default_value_t = 50, value_name = "N")]
        count: usize,
    },
    /// List what will run, and when
    #[command(after_help = NEXT_EXAMPLES)]
    Next {
        /// How many
        #[arg(long, default_value_t = 10, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
        count: u16,
    },
    /// Keep a policy from running
    #[command(after_help = SUSPEND_EXAMPLES)]
    Suspend(SuspendArgs),
    /// Let a suspended policy run again; what it missed does not run
    #[command(after_help = RESUME_EXAMPLES)]
    Resume(NameArgs),
    /// Say that the machine's clock is right, after it leapt: policies delete again
    #[command(after_help = CONFIRM_CLOCK_EXAMPLES)]
    ConfirmClock(ConfirmClockArgs),
    /// End a policy; its snapshots stay
    #[command(after_help = REMOVE_EXAMPLES)]
    Remove(RemoveArgs),
}

/// `policy set`
#[derive(Debug, Args)]
pub struct SetArgs {
    /// The policy file; - for standard input
    pub file: PathBuf,
    /// Only tell what would change
    #[arg(long)]
    pub dry_run: bool,
    /// Do not ask
    #[arg(short, long)]
    pub yes: bool,
    /// Waiting for the state.
    #[command(flatten)]
    pub writer: WriterArgs,
}

/// `policy run`
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Its name
    pub name: String,
    /// A domain's name or id [default: all that the policy is for]
    pub domain: Option<String>,
    /// Waiting for the state.
    #[command(flatten)]
    pub writer: WriterArgs,
}

/// `policy suspend`
#[derive(Debug, Args)]
pub struct SuspendArgs {
    /// Its name
    pub name: String,
    /// Why
    #[arg(long, value_name = "T")]
    pub reason: String,
    /// Waiting for the state.
    #[command(flatten)]
    pub writer: WriterArgs,
}

/// `policy resume`
#[derive(Debug, Args)]
pub struct NameArgs {
    /// Its name
    pub name: String,
    /// Waiting for the state.
    #[command(flatten)]
    pub writer: WriterArgs,
}

/// `policy confirm-clock`
#[derive(Debug, Args)]
pub struct ConfirmClockArgs {
    /// Waiting for the state.
    #[command(flatten)]
    pub writer: WriterArgs,
}

/// `policy remove`
#[derive(Debug, Args)]
pub struct RemoveArgs {
    /// Its name
    pub name: String,
    /// Do not ask
    #[arg(short, long)]
    pub yes: bool,
    /// Waiting for the state.
    #[command(flatten)]
    pub writer: WriterArgs,
}
