//! `snaptree serve`

use std::path::PathBuf;

use clap::Args;

use super::WriterArgs;

/// See `snaptree serve --help`.
pub const SERVE_EXAMPLES: &str = "Examples:
  snaptree serve                               until Ctrl-C or SIGTERM
  snaptree serve --state /srv/vm/state
  curl -s --unix-socket /run/snaptree/snaptree.sock http://snaptree/v1/status

While it runs, every command that writes goes through its socket, with the same results; reading needs no daemon.
The socket is PATH, else serve.socket of the settings, else /run/snaptree/snaptree.sock for /var/lib/snaptree where
that folder is there, else snaptree.sock in the state directory. Its owner and the group snaptree may use it.
On SIGTERM steps in hand are finished and no other begins; what is open then goes on with the next one.";

/// `serve`
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Listen here
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Waiting for the state.
    #[command(flatten)]
    pub writer: WriterArgs,
}
