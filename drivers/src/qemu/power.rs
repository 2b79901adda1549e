//! Starting and ending machines that Snaptree may start and end.

use snaptree_engine::domain::RunState;
use snaptree_engine::event::SnapshotRevertRequested;
use snaptree_engine::operation::{Code, Failure, Poison, Reversal};
use snaptree_engine::tree::SnapshotState;

use super::plan::Planner;
use super::runs::Runs;
use super::step::{Power, QemuStep};

impl Planner<'_> {
    /// What the machine shall be once it is reverted.
    ///
    /// A managed machine gets the snapshot's state; of one that was taken of the disks alone the machine's own, for
    /// such a snapshot has none. Commands put it back to what it was.
    pub(super) fn run_state_after(
        &self,
        request: &SnapshotRevertRequested,
        state: SnapshotState,
    ) -> Result<RunState, Failure> {
        let runs = self.machine()?.map_or(RunState::Off, |machine| machine.run.state());
        let wished = match (&self.config.runs, request.run_state, state) {
            (_, Some(wished), _) => wished,
            (Runs::Managed { .. }, None, SnapshotState::Shutoff) => RunState::Off,
            (Runs::Managed { .. }, None, SnapshotState::Running) => RunState::Running,
            (Runs::Managed { .. }, None, SnapshotState::Paused) => RunState::Paused,
            _ => runs,
        };
        let name = &self.domain.name;
        match &self.config.runs {
            Runs::Managed { .. } => Ok(wished),
            Runs::Commands { .. } if wished == RunState::Paused => Err(Failure::new(
                Code::Unsupported,
                format!("the start command of domain '{name}' cannot leave it paused"),
            )
            .hint("revert with --running, or without")),
            Runs::Commands { .. } => Ok(wished),
            Runs::Apart | Runs::Attached { .. } if runs != RunState::Off => Err(Failure::new(
                Code::InUse,
                format!("domain '{name}' runs, and a revert exchanges its disks"),
            )
            .hint("shut it down and try again; a domain that is registered with --start and --stop, or with --launch, \
                   is ended and started by Snaptree")),
            Runs::Apart | Runs::Attached { .. } if wished == RunState::Off => Ok(RunState::Off),
            Runs::Apart | Runs::Attached { .. } => Err(Failure::new(
                Code::Unsupported,
                format!("domain '{name}' is started by someone else, so it stays off after a revert"),
            )),
        }
    }

    /// Ends the machine, if it runs.
    pub(super) fn end_machine(&mut self) -> Result<(), Failure> {
        let Some(was) = self.machine()?.map(|machine| machine.run.state()) else { return Ok(()) };
        let step = QemuStep::Power(Power { wish: RunState::Off, was });
        self.push("end the machine", Reversal::Undoable, Poison::Nothing, &step)
    }

    /// Starts the machine again, if it shall run.
    pub(super) fn start_machine(&mut self, wish: RunState) -> Result<(), Failure> {
        if wish == RunState::Off {
            return Ok(());
        }
        let step = QemuStep::Power(Power { wish, was: RunState::Off });
        self.push("start the machine", Reversal::ForwardOnly, Poison::Nothing, &step)
    }
}
