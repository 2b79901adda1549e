//! The commands on operations.

use clap::{Args, Subcommand};
use snaptree_engine::operation::Verdict;

use super::WriterArgs;

const OP_LIST_EXAMPLES: &str = "Examples:
  snaptree op list
  snaptree op list web --open";
const OP_SHOW_EXAMPLES: &str = "Example:
  snaptree op show 3f2a91bc                    the end of an id is enough";
const OP_CANCEL_EXAMPLES: &str = "Example:
  snaptree op cancel 3f2a91bc                  taken back; refused (4) where it could only be carried through";
const OP_RESOLVE_EXAMPLES: &str = "Examples:
  snaptree op resolve 3f2a91bc --not-done --reason 'the file was never made'
  snaptree op resolve 3f2a91bc --abandon --reason 'restored from a backup'";
const OP_RETRY_EXAMPLES: &str = "Example:
  snaptree op retry 3f2a91bc                   after the reason was removed";

/// The commands on operations.
#[derive(Debug, Subcommand)]
pub enum OpCommand {
    /// List operations, the newest last
    #[command(after_help = OP_LIST_EXAMPLES)]
    List {
        /// Only this domain, by name or id
        domain: Option<String>,
        /// Only those that are not over
        #[arg(long)]
        open: bool,
        /// At most so many
        #[arg(long, value_name = "N", default_value_t = 100)]
        limit: usize,
    },
    /// Tell the whole story of an operation
    #[command(after_help = OP_SHOW_EXAMPLES)]
    Show {
        /// Its id, or the end of it
        id: String,
    },
    /// Take back an operation that is not over
    #[command(after_help = OP_CANCEL_EXAMPLES)]
    Cancel {
        /// Its id, or the end of it
        id: String,
        /// Waiting for the state.
        #[command(flatten)]
        writer: WriterArgs,
    },
    /// Say what became of the step that Snaptree could not make out, and go on from there
    #[command(after_help = OP_RESOLVE_EXAMPLES)]
    Resolve(ResolveArgs),
    /// Let an operation that needs attention try again
    #[command(after_help = OP_RETRY_EXAMPLES)]
    Retry {
        /// Its id, or the end of it
        id: String,
        /// Waiting for the state.
        #[command(flatten)]
        writer: WriterArgs,
    },
}

/// `op resolve`
#[derive(Debug, Args)]
pub struct ResolveArgs {
    /// Its id, or the end of it
    pub id: String,
    /// What became of the step.
    #[command(flatten)]
    pub verdict: VerdictArgs,
    /// Why that is known; it goes into the log
    #[arg(long, value_name = "TEXT")]
    pub reason: String,
    /// Waiting for the state.
    #[command(flatten)]
    pub writer: WriterArgs,
}

/// Exactly one of the three.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct VerdictArgs {
    /// The step is done (or undone, if it was being taken back): go on behind it
    #[arg(long)]
    done: bool,
    /// It is not: do it again
    #[arg(long)]
    not_done: bool,
    /// Let the operation end here, as failed; everything stays as it is
    #[arg(long)]
    abandon: bool,
}

impl VerdictArgs {
    /// What is said.
    pub fn verdict(&self) -> Verdict {
        match (self.done, self.not_done) {
            (true, _) => Verdict::Done,
            (false, true) => Verdict::NotDone,
            (false, false) => Verdict::Abandon,
        }
    }
}
