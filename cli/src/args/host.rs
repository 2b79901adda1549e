//! `snaptree host ...`

use std::path::PathBuf;

use clap::{ArgGroup, Args, Subcommand};
use snaptree_drivers::esx::Thumbprint;
use snaptree_engine::HostName;
use snaptree_engine::domain::DriverKind;
use snaptree_policies::file::DomainGlob;

use super::WriterArgs;
use super::value::{Label, new_label};

const ADD_EXAMPLES: &str = "Examples:
  snaptree host add esx1 --url https://esx1.example.com/sdk --user root --password-file /etc/snaptree/esx1.password \\
      --thumbprint AB:CD:...               the SHA-256 of the host's own certificate; a wrong one is told with the right one
  snaptree host add vc --url https://vc.example.com/sdk --user snaptree@vsphere.local --password-command 'pass show vc' \\
      --ca /etc/ssl/vc.pem
  snaptree host add esx1 ... --replace     when the certificate, the user or the password's source has changed

Without --thumbprint and --ca the system's roots have to vouch for the host. The password is read whenever somebody logs
in, by whoever does the work (the daemon, where there is one), and is kept nowhere. The host is logged in to once before
anything is written.

With --json: {\"host\", \"driver\", \"url\", \"user\", \"password\", \"trust\", \"product\", \"api_version\", \"vcenter\"}";
const LIST_EXAMPLES: &str = "Example:
  snaptree host list

With --json: {\"hosts\": [{\"host\", \"driver\", \"url\", \"user\", \"password\", \"trust\", \"domains\": []}]}";
const SHOW_EXAMPLES: &str = "Example:
  snaptree host show esx1

With --json: {\"host\", \"driver\", \"url\", \"user\", \"password\", \"trust\", \"domains\": []}";
const REMOVE_EXAMPLES: &str = "Example:
  snaptree host remove esx1                    once no domain is on it";
const DISCOVER_EXAMPLES: &str = "Examples:
  snaptree host discover vc                                  every machine there, and which are registered
  snaptree host discover vc --match 'web-*' --label tier=prod --add    registers those that are not, under their names

With --json: {\"host\", \"machines\": [{\"name\", \"path\", \"uuid\", \"vm\", \"power\", \"template\", \"domain\"}], \"added\": [],
\"failed\": [{\"name\", \"error\"}]}; `domain` is the one that it is registered as.";

/// The commands on hosts.
#[derive(Debug, Subcommand)]
pub enum HostCommand {
    /// Register an ESXi or a vCenter
    #[command(after_help = ADD_EXAMPLES)]
    Add(Box<AddArgs>),
    /// List the registered hosts
    #[command(after_help = LIST_EXAMPLES)]
    List,
    /// Show what is kept of a host, and the domains on it
    #[command(after_help = SHOW_EXAMPLES)]
    Show {
        /// Its name
        host: HostName,
    },
    /// Forget a host
    #[command(after_help = REMOVE_EXAMPLES)]
    Remove {
        /// Its name
        host: HostName,
        /// Waiting for the state.
        #[command(flatten)]
        writer: WriterArgs,
    },
    /// List the machines of a host, and register them
    #[command(after_help = DISCOVER_EXAMPLES)]
    Discover(DiscoverArgs),
}

/// `host add`
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("password").required(true).args(["password_file", "password_env", "password_command"])))]
pub struct AddArgs {
    /// The name that it gets
    pub host: HostName,
    /// Who speaks to it: esx, for ESXi and vCenter alike
    #[arg(long, default_value_t = DriverKind::Esx)]
    pub driver: DriverKind,
    /// Where its SDK is: https://HOST/sdk
    #[arg(long)]
    pub url: String,
    /// Who logs in
    #[arg(long)]
    pub user: String,
    /// The password is the first line of this file
    #[arg(long, value_name = "FILE")]
    pub password_file: Option<PathBuf>,
    /// The password is in this environment variable of whoever does the work
    #[arg(long, value_name = "VAR")]
    pub password_env: Option<String>,
    /// The password is the first line that this command prints, run by sh -c
    #[arg(long, value_name = "CMD")]
    pub password_command: Option<String>,
    /// The SHA-256 of its certificate, which then is believed whatever its name and dates say
    #[arg(long, value_name = "SHA256", conflicts_with = "ca")]
    pub thumbprint: Option<Thumbprint>,
    /// Certificates (PEM), one of which has to vouch for it, or be its own
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// Change what is kept of a host that is registered already
    #[arg(long)]
    pub replace: bool,
    /// Waiting for the state.
    #[command(flatten)]
    pub writer: WriterArgs,
}

/// `host discover`
#[derive(Debug, Args)]
pub struct DiscoverArgs {
    /// Its name
    pub host: HostName,
    /// Only machines whose names match: *, ?, [a-z], {a,b}
    #[arg(long = "match", value_name = "GLOB")]
    pub names: Option<DomainGlob>,
    /// Register those that are not registered yet, under their names there
    #[arg(long)]
    pub add: bool,
    /// A label for those that are registered; may be given several times
    #[arg(long, value_name = "K=V", value_parser = new_label, requires = "add")]
    pub label: Vec<Label>,
    /// Waiting for the state.
    #[command(flatten)]
    pub writer: WriterArgs,
}
