//! `snaptree domain ...`

use std::path::PathBuf;

use clap::{Args, Subcommand};
use snaptree_engine::domain::DriverKind;
use snaptree_engine::{DiskName, DomainName, HostName};

use super::WriterArgs;
use super::value::{DiskArg, Label, disk, label, new_label, path_or_none};

const ADD_EXAMPLES: &str = "Examples:
  snaptree domain add web --driver qemu --disk vda=/vm/web.qcow2
  snaptree domain add db --driver qemu --disk vda=db.qcow2 --disk vdb=data.qcow2 --label tier=prod
  snaptree domain add toy --driver sim
  snaptree domain add web --host vc --vm DC0/vm/prod/web
  snaptree domain add lab --driver virtualbox --vm 'Debian 12'
  snaptree domain add web --driver qemu --disk vda=/vm/web.qcow2 --qmp /run/web.qmp
  snaptree domain add web --driver qemu --disk vda=/vm/web.qcow2 --start 'systemctl start web' \
      --stop 'systemctl stop web' --qmp /run/web.qmp
  snaptree domain add web --driver qemu --disk vda=/vm/web.qcow2 --launch 'qemu-system-x86_64 -m 2G \
      -drive file={vda},format={vda.format} -qmp unix:{qmp},server=on,wait=off -pidfile {pidfile} {incoming}'
  snaptree domain add web --driver qemu --disk vda=/vm/web.qcow2 --qmp /run/web.qmp --agent /run/web.agent

--agent is the socket behind which QEMU has the guest's agent, for create --quiesce: QEMU is started with -device
virtio-serial -chardev socket,id=ga,path=/run/web.agent,server=on,wait=off -device
virtserialport,chardev=ga,name=org.qemu.guest_agent.0, and qemu-ga runs in the guest. Nobody else may hold the socket.
A machine that Snaptree cannot reach is left alone while it runs: with --qmp its snapshots are taken and merged under the
running guest, with --start and --stop or --launch it can be reverted, too. The commands are kept in the log.
A VirtualBox machine is found where VBoxManage finds it: by this user, with VBOX_USER_HOME where it is set. The
snapshots that it has are taken over.
With the qemu driver the registered path becomes a symlink that always opens the machine's current disk, so whatever
starts the machine needs no change. --keep-path leaves it as it is.";
const LIST_EXAMPLES: &str = "Example:
  snaptree domain list";
const SHOW_EXAMPLES: &str = "Example:
  snaptree domain show web";
const SET_EXAMPLES: &str = "Examples:
  snaptree domain set web --name web-1
  snaptree domain set web --label tier=prod --label old=       (the second takes a label away)
  snaptree domain set web --qmp /run/web.qmp --agent /run/web.agent
  snaptree domain set web --agent ''                           (it has no agent any more)

--qmp, --start, --stop, --launch and --agent are those of `domain add`: what is not given stays, but a launch command and
the other three exclude each other. They hold for what is done from now on; no operation may be open.";
const START_EXAMPLES: &str = "Example:
  snaptree domain start web";
const STOP_EXAMPLES: &str = "Examples:
  snaptree domain stop web
  snaptree domain stop web --force";
const DISK_ADD_EXAMPLES: &str = "Examples:
  snaptree domain disk add web vdb=/vm/data.qcow2
  snaptree domain disk add ci vdb=data.qcow2 --launch 'qemu-system-x86_64 ... -drive file={vdb},format={vdb.format}'

Snapshots that were taken before do not hold the disk: a revert to one leaves it as it is, and says so. No operation may
be open.";
const DISK_REMOVE_EXAMPLES: &str = "Examples:
  snaptree domain disk remove web vdb                   a disk that was in no snapshot
  snaptree domain disk remove web vdb --keep-layers     leave every file as it is; snapshots go on holding the disk

A revert leaves alone what the domain has no more. `domain disk add` with the same name and path puts it back.";
const REMOVE_EXAMPLES: &str = "Examples:
  snaptree domain remove web                   a domain without snapshots
  snaptree domain remove web --flatten         end its snapshots and put one plain image back
  snaptree domain remove web --keep-layers     leave every file as it is, and say which they are";

/// The commands on domains.
#[derive(Debug, Subcommand)]
pub enum DomainCommand {
    /// Register a machine
    #[command(after_help = ADD_EXAMPLES)]
    Add(Box<AddArgs>),
    /// List the registered machines
    #[command(after_help = LIST_EXAMPLES)]
    List,
    /// Show all that is known of a machine
    #[command(after_help = SHOW_EXAMPLES)]
    Show {
        /// Its name or id
        #[arg(value_name = "NAME")]
        domain: String,
    },
    /// Change a machine's name, its labels, or how it is reached
    #[command(after_help = SET_EXAMPLES)]
    Set(SetArgs),
    /// Start a machine that Snaptree may start
    #[command(after_help = START_EXAMPLES)]
    Start {
        /// Its name or id
        #[arg(value_name = "NAME")]
        domain: String,
        /// Waiting for the state.
        #[command(flatten)]
        writer: WriterArgs,
    },
    /// Shut down a machine that Snaptree may end
    #[command(after_help = STOP_EXAMPLES)]
    Stop {
        /// Its name or id
        #[arg(value_name = "NAME")]
        domain: String,
        /// End it at once; what the guest has in its memory is lost
        #[arg(long)]
        force: bool,
        /// Waiting for the state.
        #[command(flatten)]
        writer: WriterArgs,
    },
    /// Disks that come to a machine, or go from it
    #[command(subcommand)]
    Disk(DiskCommand),
    /// Let go of a machine
    #[command(after_help = REMOVE_EXAMPLES)]
    Remove(RemoveArgs),
}

/// `domain disk`
#[derive(Debug, Subcommand)]
pub enum DiskCommand {
    /// Register a disk that the machine has, too
    #[command(after_help = DISK_ADD_EXAMPLES)]
    Add {
        /// The domain's name or id
        #[arg(value_name = "NAME")]
        domain: String,
        /// The disk and its image, as vdb=FILE
        #[arg(value_name = "DISK=FILE", value_parser = disk)]
        disk: DiskArg,
        /// The launch command that has it
        #[arg(long, value_name = "CMD")]
        launch: Option<String>,
        /// Waiting for the state.
        #[command(flatten)]
        writer: WriterArgs,
    },
    /// Forget a disk that the machine has no more
    #[command(after_help = DISK_REMOVE_EXAMPLES)]
    Remove {
        /// The domain's name or id
        #[arg(value_name = "NAME")]
        domain: String,
        /// The disk
        disk: DiskName,
        /// Leave its layers as they are, where it has any
        #[arg(long)]
        keep_layers: bool,
        /// The launch command that has it no more
        #[arg(long, value_name = "CMD")]
        launch: Option<String>,
        /// Waiting for the state.
        #[command(flatten)]
        writer: WriterArgs,
    },
}

/// `domain add`
#[derive(Debug, Args)]
pub struct AddArgs {
    /// Its name
    pub name: DomainName,
    /// The hypervisor: qemu, virtualbox, esx or sim
    #[arg(long, required_unless_present = "host")]
    pub driver: Option<DriverKind>,
    /// The host that it is on, an ESXi or a vCenter; see `snaptree host`
    #[arg(long, requires = "vm")]
    pub host: Option<HostName>,
    /// Which machine it is there: its inventory path (on a host), its UUID or its name
    #[arg(long, value_name = "PATH|UUID|NAME")]
    pub vm: Option<String>,
    /// A disk and its image, as vda=FILE; may be given several times
    #[arg(long, value_name = "NAME=FILE", value_parser = disk)]
    pub disk: Vec<DiskArg>,
    /// Where the layers go: to DIR/UUID/ of the domain [default: .snaptree/ beside the first disk]
    #[arg(long, value_name = "DIR")]
    pub layers: Option<PathBuf>,
    /// Leave the registered path as it is; the machine must then be started from active/DISK in the layers folder
    #[arg(long)]
    pub keep_path: bool,
    /// Convert a raw image to qcow2, in its place
    #[arg(long)]
    pub convert: bool,
    /// Mend an image whose machine was killed (lazy_refcounts) now, as QEMU would when it is next started
    #[arg(long)]
    pub repair: bool,
    /// QEMU's QMP socket, by which the machine is reached while it runs
    #[arg(long, value_name = "SOCKET")]
    pub qmp: Option<PathBuf>,
    /// A command that starts the machine, run by sh -c
    #[arg(long, value_name = "CMD", requires = "stop")]
    pub start: Option<String>,
    /// A command that ends the machine, run by sh -c
    #[arg(long, value_name = "CMD", requires = "start")]
    pub stop: Option<String>,
    /// QEMU's command line, so that Snaptree starts and ends the machine; {vda} stands for the file of disk vda,
    /// {vda.format}, {qmp}, {pidfile} and {incoming} for what they say
    #[arg(long, value_name = "CMD", conflicts_with_all = ["qmp", "start", "stop"])]
    pub launch: Option<String>,
    /// The socket of the guest's agent, for create --quiesce; needs --qmp or --launch
    #[arg(long, value_name = "SOCKET")]
    pub agent: Option<PathBuf>,
    /// Whose limits the simulated machine has: default, qemu, virtualbox, esx or libvirt-test
    #[arg(long, value_name = "P")]
    pub profile: Option<String>,
    /// A label; may be given several times
    #[arg(long, value_name = "K=V", value_parser = new_label)]
    pub label: Vec<Label>,
    /// Waiting for the state.
    #[command(flatten)]
    pub writer: WriterArgs,
}

/// `domain set`
#[derive(Debug, Args)]
pub struct SetArgs {
    /// Its name or id
    #[arg(value_name = "NAME")]
    pub domain: String,
    /// Its new name
    #[arg(long)]
    pub name: Option<DomainName>,
    /// A label to set; with an empty value, to take away
    #[arg(long, value_name = "K=V", value_parser = label)]
    pub label: Vec<Label>,
    /// How a qemu machine is reached from now on.
    #[command(flatten)]
    pub access: AccessArgs,
    /// Waiting for the state.
    #[command(flatten)]
    pub writer: WriterArgs,
}

/// How a qemu machine is reached from now on: the options of `domain add`, an empty value takes away.
#[derive(Debug, Args)]
pub struct AccessArgs {
    /// QEMU's QMP socket
    #[arg(long, value_name = "SOCKET", value_parser = path_or_none())]
    pub qmp: Option<PathBuf>,
    /// A command that starts the machine, run by sh -c
    #[arg(long, value_name = "CMD")]
    pub start: Option<String>,
    /// A command that ends the machine, run by sh -c
    #[arg(long, value_name = "CMD")]
    pub stop: Option<String>,
    /// QEMU's command line, so that Snaptree starts and ends the machine
    #[arg(long, value_name = "CMD", conflicts_with_all = ["qmp", "start", "stop"])]
    pub launch: Option<String>,
    /// The socket of the guest's agent
    #[arg(long, value_name = "SOCKET", value_parser = path_or_none())]
    pub agent: Option<PathBuf>,
}

/// `domain remove`
#[derive(Debug, Args)]
pub struct RemoveArgs {
    /// Its name or id
    #[arg(value_name = "NAME")]
    pub domain: String,
    /// End its snapshots and put one plain image back at the registered path
    #[arg(long, conflicts_with_all = ["keep_layers", "metadata"])]
    pub flatten: bool,
    /// With --flatten: give up what somebody else keeps inside the layers under this name (a snapshot of libvirt's or
    /// qemu-img's, a dirty bitmap), where it is refused for it; may be given several times
    #[arg(long, value_name = "NAME", requires = "flatten")]
    pub give_up: Vec<String>,
    /// Leave every file as it is
    #[arg(long, conflicts_with = "metadata")]
    pub keep_layers: bool,
    /// Forget the domain without asking its hypervisor, also where the machine is gone, and abandon what is open
    #[arg(long)]
    pub metadata: bool,
    /// Do not ask
    #[arg(short, long)]
    pub yes: bool,
    /// Waiting for the state.
    #[command(flatten)]
    pub writer: WriterArgs,
}
