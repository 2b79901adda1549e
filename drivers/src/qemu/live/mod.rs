//! Machines that run: what QEMU says of them, and what is done to their disks under them.
//!
//! ```text
//!   device ─▶ overlay ─▶ layer ─▶ layer ─▶ (what the image was built upon when it was registered)
//!             active     frozen   frozen
//! ```
//!
//! A disk's *chain* is what QEMU has open for it, topmost first. Whether a layer is worked on under the running machine
//! (its node is in a chain) or by qemu-img (it is not) follows from the chain alone.
//!
//! `graph` reads the block graph, `options` how each disk is written, `seen` compares it with the log, `monitor` is every word that is said to QEMU,
//! `exchange` puts new layers under the guest, `quiesce` has its file systems rest meanwhile, `memory` keeps its memory of
//! the same instant, `load` brings it back, `jobs` merges under it.
//!
//! Architecture Invariant: the order is stop, transaction, the frozen layer by its own path, switch, cont. QEMU
//! reopens images by the name that it was given, so a switch before the rest would make it open another file.

mod exchange;
mod graph;
mod jobs;
mod load;
mod memory;
mod monitor;
mod options;
mod ours;
mod process;
mod quiesce;
mod seen;

use std::time::{Duration, Instant};

use snaptree_engine::DomainName;
use snaptree_engine::driver::{DriverError, ErrorClass};
use snaptree_engine::operation::{Code, Failure};
use snaptree_engine::project::DomainState;

use super::config::QemuConfig;
use super::lock::{DYING, in_use, until_let_go};
use super::observe::in_use as users;
use super::qmp::QmpError;
use super::step::{QemuStep, Switch};

pub(super) use exchange::Beside;
pub(super) use memory::check_stream;
pub(super) use monitor::{Monitor, failed};
pub(super) use ours::{forget_machine, living};
pub(super) use process::{Ending, end, start};
pub(super) use seen::{LiveMachine, Machine, Run};

use seen::LiveNode;

const POLL: Duration = Duration::from_millis(20);

/// The machine, as far as it can be asked.
pub(super) async fn look(state: &DomainState) -> Result<Machine, DriverError> {
    let (_, config) = QemuConfig::of(state)?;
    let Some(socket) = config.runs.qmp() else { return Ok(Machine::Silent) };
    let mut monitor = match Monitor::connect(socket).await {
        Ok(monitor) => monitor,
        Err(QmpError::Absent { .. }) => return Ok(Machine::Silent),
        Err(error) => {
            let is_connected = !matches!(error, QmpError::Closed { .. } | QmpError::Io { .. });
            return Ok(Machine::Mute { why: failed(error).failure.message, is_connected });
        }
    };
    Ok(match monitor.look().await {
        Ok(machine) => Machine::Live(machine),
        // It has ended in this moment.
        Err(error) if error.failure.code == Code::Io => {
            Machine::Mute { why: error.failure.message, is_connected: false }
        }
        Err(error) => Machine::Mute { why: error.failure.message, is_connected: true },
    })
}

/// The machine at this moment; none if nobody answers for it and nobody has its disks.
///
/// # Errors
/// It runs, and cannot be asked.
pub(super) async fn machine(state: &DomainState) -> Result<Option<Monitor>, DriverError> {
    machine_within(state, Duration::ZERO).await
}

/// The same of a machine whose QEMU may hear nothing for so long.
pub(super) async fn machine_within(
    state: &DomainState,
    patience: Duration,
) -> Result<Option<Monitor>, DriverError> {
    let begun = Instant::now();
    let (_, config) = QemuConfig::of(state)?;
    let until = Instant::now() + DYING;
    loop {
        let holder = users(state, &config)?.into_iter().next();
        let Some(socket) = config.runs.qmp() else {
            return holder.map_or(Ok(None), |holder| Err(in_use(&holder).into()));
        };
        let error = match Monitor::connect(socket).await {
            // One that answers is at work, whatever the locks of the images say.
            Ok(monitor) => return Ok(Some(monitor)),
            Err(error) => error,
        };
        match (error, holder) {
            (QmpError::Absent { .. } | QmpError::Closed { .. }, None) => return Ok(None),
            // One that was killed lets go of its files a moment after it looks dead, and of its socket before that.
            (QmpError::Absent { .. } | QmpError::Closed { .. }, Some(holder)) if Instant::now() < until => {
                until_let_go(&holder, POLL).await;
            }
            (QmpError::Silent { .. } | QmpError::TimedOut { .. }, _) if begun.elapsed() < patience => {}
            (QmpError::Absent { .. }, Some(holder)) => {
                return Err(DriverError::from(
                    in_use(&holder)
                        .hint("nobody answers at its QMP socket: was the machine started without it?"),
                ));
            }
            (error, _) => return Err(failed(error)),
        }
    }
}

/// Returns once nothing hinders asking the machine what became of a step that was done under it.
///
/// # Errors
/// It runs and does not answer: it may have exchanged its disks, and only QEMU knows.
pub(super) async fn settle(state: &DomainState, patience: Duration) -> Result<(), DriverError> {
    resume_migrated(state).await?;
    match machine_within(state, patience).await {
        Ok(_) => Ok(()),
        Err(error) => Err(DriverError { class: ErrorClass::Busy, ..error }.hint(
            "what became of the operation can only be told by the machine itself: free its QMP socket, or end it",
        )),
    }
}

/// A QEMU that has written its machine's memory while the guest was stopped holds none of its images until the guest
/// goes on, and would be taken for one that is off.
async fn resume_migrated(state: &DomainState) -> Result<(), DriverError> {
    let (_, config) = QemuConfig::of(state)?;
    let steps = state.open.iter().flat_map(|open| &open.steps);
    let takes_memory =
        |step| matches!(QemuStep::of(step), Ok(QemuStep::Switch(Switch { memory: Some(_), .. })));
    let (true, Some(socket)) = (steps.into_iter().any(takes_memory), config.runs.qmp()) else {
        return Ok(());
    };
    let Ok(mut monitor) = Monitor::connect(socket).await else { return Ok(()) };
    if monitor.status().await? == "postmigrate" {
        monitor.cont().await?;
    }
    Ok(())
}

/// Why a guest cannot be asked to quiesce.
pub(super) fn no_agent(domain: &DomainName) -> Failure {
    Failure::new(
        Code::Unsupported,
        format!("domain '{domain}' is registered without its guest agent's socket, so it cannot be quiesced"),
    )
    .hint("register it with --agent SOCKET, or leave out --quiesce")
}

/// A node that Snaptree adds, or a job: QEMU allows 31 bytes.
pub(super) fn node_name(operation: snaptree_engine::OperationId, index: usize, disk: usize) -> String {
    let id = operation.to_string();
    let random: String = id.chars().rev().filter(char::is_ascii_hexdigit).take(12).collect();
    format!("st-{random}-{index}-{disk}")
}

/// A layer that is written under the guest must be known to QEMU by its own path: QEMU opens it again by that name,
/// and a name that leads elsewhere since would make it write another file.
fn check_name(node: &LiveNode, file: &std::path::Path) -> Result<(), DriverError> {
    if node.named == file {
        return Ok(());
    }
    Err(DriverError::permanent(
        Code::Unsupported,
        format!(
            "QEMU knows layer {} as {}, and would open that again to write it",
            file.display(),
            node.named.display()
        ),
    )
    .hint("it is merged once the machine was shut down, or started again"))
}
