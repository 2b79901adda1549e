//! VirtualBox, by `VBoxManage`; what is there is read from the machine's own settings file.
//!
//! VirtualBox keeps the list of its snapshots, with names and descriptions, and merges a snapshot's data in the call that
//! deletes it. It cannot where more than one child stands upon it: such a snapshot is *hidden* (it gets another name
//! there), and merged when one is left. Snapshots are addressed by their UUID alone: an empty name would be the root, and
//! of several of one name the oldest would be meant.
//!
//! # Who is at work
//! ```text
//!   snaptree ── VBoxManage (its stdin: the operation's lock) ── VBoxSVC ── images, settings file
//! ```
//! `VBoxSVC` goes on when its client is gone, and the next call of anyone waits for it. So before anything is resolved
//! the operation's lock is waited for, and then a call is made that answers when `VBoxSVC` is idle.
//!
//! # What a delete that was cut short leaves
//! ```text
//!   as it was | the snapshot half merged | an image gone | the settings file gone | done
//! ```
//! Nothing but the last two tells what became of the snapshot's own data. So a delete poisons it when it begins, and only
//! goes forward; the two states in between are repaired (`repair`), as is what a take or a restore leaves behind.
//!
//! Code Map: `manage` (the program, and its errors), `settings` (the file), `mark` (how ours are known again), `observe`,
//! `plan`, `step` (do, resolve, take back), `repair`, `notes` (of repairs, until the log has them).

mod disks;
mod manage;
mod mark;
mod notes;
mod observe;
mod plan;
mod repair;
mod settings;
mod step;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use snaptree_engine::OperationId;
use snaptree_engine::claim::{Claim, ClaimKind};
use snaptree_engine::domain::{Capabilities, Disk};
use snaptree_engine::driver::{
    Driver, DriverError, ErrorClass, Observation, Plan, PowerWish, Probe, Registration, Resolution,
    StepContext, StepReport,
};
use snaptree_engine::ids::NAME_BYTES_MAX;
use snaptree_engine::operation::{Code, Failure, Request, Step};
use snaptree_engine::project::DomainState;
use uuid::Uuid;

use crate::disks::left_out_notes;
use crate::operation_lock::OperationLock;
use manage::{Call, MOVING, Manage, QUICK};
use notes::Notes;

/// The program that is called if neither the settings nor the environment name another.
pub const PROGRAM: &str = "VBoxManage";
/// How long a VBoxManage that outlived its Snaptree may go on before it is ended; VBoxSVC goes on all the same.
const GRACE: Duration = Duration::from_secs(60);
/// How often a machine is looked at that something is done to.
const POLL: Duration = Duration::from_millis(200);
/// How long a guest may take to shut down.
const SHUTDOWN: Duration = Duration::from_secs(120);

/// What helps where a machine is gone for good.
const FORGET: &str = "if it is gone for good, let go of the domain with `snaptree domain remove --metadata`";

/// What `Registration.options` says of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtualboxOptions {
    /// Its name or UUID at VirtualBox.
    pub vm: String,
}

/// What is remembered of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Machine {
    /// Its UUID.
    uuid: Uuid,
    /// Its settings file.
    file: PathBuf,
}

impl Machine {
    fn of(state: &DomainState) -> Result<Self, Failure> {
        let config = state.domain.as_ref().map(|domain| &domain.config);
        let config = config.ok_or_else(|| Failure::new(Code::NotFound, "the domain is not registered"))?;
        Self::deserialize(config).map_err(|error| {
            Failure::new(Code::Invalid, format!("the domain is none of this driver's: {error}"))
        })
    }

    /// Why it is none of VirtualBox's any more.
    fn gone(&self) -> Option<Failure> {
        if repair::is_listed(self.uuid) != Some(false) {
            return None;
        }
        let file = self.file.display();
        let gone = format!("the machine {} is not registered at VirtualBox any more", self.uuid);
        let same = observe::read_text(&self.file).ok().flatten();
        let hint = match same.is_some_and(|text| text.contains(&self.uuid.to_string())) {
            true => format!("`VBoxManage registervm '{file}'` puts it back; else {FORGET}"),
            false => FORGET.to_owned(),
        };
        Some(Failure::new(Code::NotFound, gone).hint(hint))
    }
}

/// Why a registered machine is none of VirtualBox's any more, and what helps; none if it is, or that cannot be seen.
pub fn gone(state: &DomainState) -> Option<Failure> {
    Machine::of(state).ok()?.gone()
}

/// The disks that a machine has now, as far as its settings tell; none where they cannot be read.
pub fn disks_now(state: &DomainState) -> Option<Vec<Disk>> {
    let machine = Machine::of(state).ok()?;
    let text = observe::read_text(&machine.file).ok()??;
    let settings = settings::read(&text, machine.file.parent()?).ok()?;
    let known = &state.domain.as_ref()?.disks;
    (settings.uuid == machine.uuid).then(|| disks::disks(known, &settings))
}

/// The file that stands for a machine among those of the registered domains; none of another driver's domain.
pub fn file_of(state: &DomainState) -> Option<PathBuf> {
    Machine::of(state).ok().map(|machine| machine.file)
}

/// VirtualBox.
#[derive(Clone, Debug)]
pub struct VirtualboxDriver {
    manage: Manage,
    /// Where the locks of operations are.
    run_dir: PathBuf,
}

impl VirtualboxDriver {
    /// VirtualBox by `program`; `run_dir` is where locks are kept while an operation is under way.
    pub fn new(program: PathBuf, run_dir: PathBuf) -> Self {
        Self { manage: Manage::new(program), run_dir }
    }

    async fn info(&self, vm: &str) -> Result<String, DriverError> {
        self.manage.ask(&["showvminfo", vm, "--machinereadable"], QUICK).await
    }

    /// Its disks. How large one is that is no VDI has to be asked for.
    async fn disks(&self, known: &[Disk], settings: &settings::Settings) -> Result<Vec<Disk>, DriverError> {
        let mut disks = disks::disks(known, settings);
        for disk in disks.iter_mut().filter(|disk| disk.virtual_size_bytes == 0) {
            let image = disk.place.as_ref().and_then(|place| settings.images.get(place));
            let Some(image) = image.map(Uuid::to_string) else { continue };
            let info = self.manage.run(Call::quick(["showmediuminfo", "disk", &image])).await?;
            let megabytes =
                info.lines().find_map(|line| line.strip_prefix("Capacity:")?.trim().strip_suffix(" MBytes"));
            let megabytes: u64 = megabytes.and_then(|number| number.parse().ok()).unwrap_or(0);
            disk.virtual_size_bytes = megabytes << 20;
        }
        Ok(disks)
    }
}

/// What VirtualBox can do with a machine.
const CAPABILITIES: Capabilities = Capabilities {
    memory: true,
    memory_external: false,
    disk_only: false,
    quiesce: false,
    internal: false,
    disk_selection: false,
    children_only: true,
    metadata_only: true,
    merges_itself: true,
    keeps_names: true,
    name_bytes_max: NAME_BYTES_MAX,
    depth_max: plan::DEPTH_MAX,
};

#[async_trait]
impl Driver for VirtualboxDriver {
    async fn probe(&self, registration: &Registration) -> Result<Probe, DriverError> {
        let options = VirtualboxOptions::deserialize(&registration.options)
            .map_err(|error| Failure::new(Code::Invalid, error.to_string()).refused())?;
        let vm = options.vm.as_str();
        if vm.is_empty() || vm.starts_with('-') || vm.chars().any(char::is_control) {
            let message = "a machine is named by its name or its UUID at VirtualBox";
            return Err(Failure::new(Code::Invalid, message).refused().into());
        }
        let info = self.info(vm).await.map_err(|error| {
            let hint = "`VBoxManage list vms` shows the machines of this user";
            if error.failure.hint.is_some() { error } else { error.hint(hint) }
        })?;
        let (uuid, file) = (observe::value(&info, "UUID"), observe::value(&info, "CfgFile"));
        let uuid = uuid.and_then(|uuid| uuid.parse().ok());
        let (Some(uuid), Some(file)) = (uuid, file.map(PathBuf::from)) else {
            return Err(DriverError::permanent(
                Code::Io,
                "VBoxManage does not say where the machine is kept",
            ));
        };
        if let Some(owner) = registration.taken.get(&file) {
            let message = format!("this machine is registered already, as domain '{owner}'");
            return Err(Failure::new(Code::Exists, message).refused().into());
        }
        let detail = observe::read(&file).await?;
        let claims = vec![Claim::new(ClaimKind::Machine, format!("virtualbox {uuid}"))];
        let machine = Machine { uuid, file };
        let config = serde_json::to_value(&machine);
        let config = config.map_err(|error| Failure::new(Code::Invalid, error.to_string()))?;
        let disks = self.disks(&[], &detail.settings).await?;
        let notes = left_out_notes(&disks);
        Ok(Probe { disks, config, capabilities: CAPABILITIES, claims, notes })
    }

    async fn observe(&self, state: &DomainState) -> Result<Observation, DriverError> {
        let machine = Machine::of(state)?;
        let run_state = observe::run_state(&self.manage, machine.uuid).await?;
        if let Some(gone) = machine.gone() {
            return Err(gone.into());
        }
        let mut detail = self.settings(&machine).await?;
        if detail.settings.uuid != machine.uuid {
            let message = format!("{} is another machine's by now", machine.file.display());
            return Err(Failure::new(Code::NotFound, message).hint(FORGET).into());
        }
        Notes::sweep(&self.run_dir, machine.uuid, state);
        for operation in &state.open {
            let notes = Notes::of(&self.run_dir, machine.uuid, operation.id);
            detail.repairs.extend(notes.untold(state, operation.id)?);
        }
        let known = state.domain.as_ref().map_or(&[][..], |domain| domain.disks.as_slice());
        let disks = Some(self.disks(known, &detail.settings).await?);
        Ok(Observation { disks, ..observe::observation(state, run_state, &detail)? })
    }

    fn plan(
        &self,
        operation: OperationId,
        request: &Request,
        state: &DomainState,
        observation: &Observation,
    ) -> Result<Plan, Failure> {
        plan::plan(operation, request, state, observation).map_err(Failure::refused)
    }

    async fn execute(&self, context: &StepContext<'_>, step: &Step) -> Result<StepReport, DriverError> {
        self.perform(context, step).await
    }

    fn resolve(&self, _context: &StepContext<'_>, step: &Step, observation: &Observation) -> Resolution {
        step::resolve(step, observation)
    }

    async fn undo(&self, context: &StepContext<'_>, step: &Step) -> Result<StepReport, DriverError> {
        self.take_back(context, step).await
    }

    async fn power(&self, state: &DomainState, wish: PowerWish) -> Result<(), DriverError> {
        let machine = Machine::of(state)?.uuid;
        let runs = observe::run_state(&self.manage, machine).await? != snaptree_engine::domain::RunState::Off;
        if runs == (wish == PowerWish::Start) {
            return Ok(());
        }
        let uuid = machine.to_string();
        let args = match wish {
            PowerWish::Start => vec!["startvm", uuid.as_str(), "--type", "headless"],
            PowerWish::Shutdown => vec!["controlvm", uuid.as_str(), "acpipowerbutton"],
            PowerWish::End => vec!["controlvm", uuid.as_str(), "poweroff"],
        };
        self.manage.run(Call::quick(args)).await?;
        let until = Instant::now() + SHUTDOWN;
        while wish == PowerWish::Shutdown
            && observe::run_state(&self.manage, machine).await? != snaptree_engine::domain::RunState::Off
        {
            if Instant::now() >= until {
                let message = format!("the guest did not shut down within {} s", SHUTDOWN.as_secs());
                return Err(DriverError::permanent(Code::Timeout, message).hint("--force ends it"));
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    async fn settle(&self, state: &DomainState, operation: OperationId) -> Result<(), DriverError> {
        OperationLock::settle(&self.run_dir, operation, GRACE).await?;
        let machine = Machine::of(state)?.uuid;
        repair::machines(Some(&Notes::of(&self.run_dir, machine, operation))).await?;
        let machine = machine.to_string();
        let until = Instant::now() + MOVING;
        loop {
            // It is answered when VBoxSVC is idle; a machine that it cannot open has nobody at work on it.
            let doing = match self.manage.ask(&["showvminfo", &machine, "--machinereadable"], MOVING).await {
                Ok(info) => observe::value(&info, "VMState").unwrap_or_default(),
                Err(error) if error.class == ErrorClass::Transient => return Err(error),
                Err(_) => return Ok(()),
            };
            if !doing.contains("snapshot") || Instant::now() >= until {
                return Ok(());
            }
            tokio::time::sleep(POLL).await;
        }
    }
}
