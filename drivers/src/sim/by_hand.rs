//! What a person does at the hypervisor, past Snaptree. Only where it keeps the list of its snapshots by itself.

use snaptree_engine::driver::DriverError;
use snaptree_engine::operation::{Code, Failure};
use snaptree_engine::project::DomainState;

use super::machine::Machine;
use super::{SimDriver, is_layered};

impl SimDriver {
    /// Takes a snapshot that carries no mark of ours, as `name`; returns the hypervisor's id of it.
    ///
    /// # Errors
    /// The machine has layers and no list, or its file cannot be read or written.
    pub fn take_by_hand(&self, state: &DomainState, name: &str) -> Result<String, DriverError> {
        self.by_hand(state, |machine| Ok(machine.take_unmarked(name)))
    }

    /// Reverts the machine to the snapshot with that id of the hypervisor's.
    ///
    /// # Errors
    /// There is none, the machine has layers and no list, or its file cannot be read or written.
    pub fn revert_by_hand(&self, state: &DomainState, native: &str) -> Result<(), DriverError> {
        self.by_hand(state, |machine| machine.revert_unasked(native))
    }

    /// Deletes the snapshot with that id of the hypervisor's.
    ///
    /// # Errors
    /// There is none, the machine has layers and no list, or its file cannot be read or written.
    pub fn delete_by_hand(&self, state: &DomainState, native: &str) -> Result<(), DriverError> {
        self.by_hand(state, |machine| machine.remove_unasked(native))
    }

    fn by_hand<T>(
        &self,
        state: &DomainState,
        act: impl FnOnce(&mut Machine) -> Result<T, Failure>,
    ) -> Result<T, DriverError> {
        if is_layered(state) {
            return Err(DriverError::permanent(Code::Unsupported, "this machine keeps no list of snapshots"));
        }
        self.change(state, |machine: &mut Machine, _| act(machine))
    }
}
