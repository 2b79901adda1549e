//! The steps: what their data says, what each does, and what became of one.
//!
//! Every one looks first whether it is done, so that it can be repeated once it was resolved. A delete that was cut short
//! may have left the machine in a state that VirtualBox itself cannot open; it is [repaired](super::repair) first.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use snaptree_engine::SnapshotId;
use snaptree_engine::domain::RunState;
use snaptree_engine::driver::{
    DriverError, ErrorClass, Learnt, Observation, Remedy, Resolution, StepContext, StepReport,
};
use snaptree_engine::operation::{Code, Failure, Step};
use snaptree_engine::tree::SnapshotState;
use uuid::Uuid;

use super::manage::Call;
use super::mark::Marked;
use super::notes::Notes;
use super::observe::{self, Detail, Found};
use super::plan::HIDDEN;
use super::settings::{Settings, Snap};
use super::{Machine, VirtualboxDriver, repair};
use crate::operation_lock::OperationLock;

/// What is written about a snapshot at VirtualBox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Words {
    pub name: String,
    /// With our mark.
    pub description: String,
}

impl Words {
    fn are_of(&self, snap: &Snap) -> bool {
        self.name == snap.name && self.description == snap.description
    }
}

/// A step's data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "action", rename_all = "kebab-case", deny_unknown_fields)]
pub(super) enum Action {
    /// Puts the settings file in its place.
    Repair,
    Take {
        snapshot: SnapshotId,
        name: String,
        description: String,
        live: bool,
    },
    /// `images` are those of the current state before, which a restore gives up for new ones.
    Restore {
        native: Uuid,
        images: Vec<Uuid>,
    },
    Delete {
        native: Uuid,
    },
    Hide {
        native: Uuid,
        name: String,
    },
    Edit {
        native: Uuid,
        before: Words,
        after: Words,
    },
    /// The guest's memory is lost.
    PowerOff,
    Start,
}

impl Action {
    pub(super) fn of(step: &Step) -> Result<Self, Failure> {
        Self::deserialize(&step.data).map_err(|error| {
            Failure::new(Code::Invalid, format!("step '{}' is none of this driver's: {error}", step.name))
        })
    }

    /// The word in the names of hooks.
    pub(super) const fn word(&self) -> &'static str {
        match self {
            Self::Repair => "repair",
            Self::Take { .. } => "take",
            Self::Restore { .. } => "restore",
            Self::Delete { .. } => "delete",
            Self::Hide { .. } => "hide",
            Self::Edit { .. } => "edit",
            Self::PowerOff => "poweroff",
            Self::Start => "start",
        }
    }

    /// Images that it gave up and that were left behind, if it is done.
    fn left(&self, settings: &Settings) -> Vec<Uuid> {
        match self {
            Self::Restore { images, .. } if self.is_done(settings) => settings.left(images),
            _ => Vec::new(),
        }
    }

    /// Images that may be of a try that was cut off, if it is done.
    fn made(&self, settings: &Settings) -> Vec<Uuid> {
        match self {
            Self::Restore { images, .. } if self.is_done(settings) => {
                settings.unused().into_iter().filter(|image| !images.contains(image)).collect()
            }
            _ => Vec::new(),
        }
    }

    /// Whether the settings say that it is done.
    fn is_done(&self, settings: &Settings) -> bool {
        match self {
            Self::Repair => true,
            Self::Take { snapshot, .. } => taken(settings, *snapshot).is_some(),
            Self::Restore { native, images } => {
                let renewed = settings.images.values().all(|image| !images.contains(image));
                settings.current == Some(*native)
                    && renewed
                    && !images.is_empty()
                    && !self.was_cut_off(settings)
            }
            Self::Delete { native } => settings.snapshot(*native).is_none(),
            Self::Hide { native, .. } => {
                settings.snapshot(*native).is_none_or(|snap| snap.name.starts_with(HIDDEN))
            }
            Self::Edit { native, after, .. } => {
                settings.snapshot(*native).is_some_and(|snap| after.are_of(snap))
            }
            // Told by whether it runs, which no settings say.
            Self::PowerOff | Self::Start => false,
        }
    }

    /// Whether VBoxManage was killed in a restore at the moment that leaves the machine without its disks.
    fn was_cut_off(&self, settings: &Settings) -> bool {
        let Self::Restore { native, .. } = self else { return false };
        let snap = settings.snapshot(*native);
        settings.current == Some(*native)
            && snap.is_some_and(|snap| !snap.images.keys().eq(settings.images.keys()))
    }

    /// Whether it is done where the machine is in that state; for what changes nothing else.
    fn is_done_in(&self, state: RunState) -> bool {
        match self {
            Self::PowerOff => state == RunState::Off,
            Self::Start => state != RunState::Off,
            _ => false,
        }
    }

    /// What a done step brought.
    fn report(&self, settings: &Settings, repairs: Vec<String>) -> Result<StepReport, Failure> {
        let mut learnt = Learnt { repairs, ..Learnt::default() };
        if let Self::Take { snapshot, .. } = self
            && let Some(snap) = taken(settings, *snapshot)
        {
            learnt.taken = snap.taken;
            learnt.native = Some(snap.uuid.to_string());
            learnt.state = Some(if snap.online { SnapshotState::Running } else { SnapshotState::Shutoff });
        }
        let learnt = serde_json::to_value(learnt).map_err(|e| Failure::new(Code::Invalid, e.to_string()))?;
        Ok(StepReport { changes: Vec::new(), learnt })
    }

    /// The arguments of `VBoxManage` that do it.
    fn args(&self, machine: &str) -> Vec<String> {
        let snapshot = |rest: &[&str]| {
            let all = ["snapshot", machine].into_iter().chain(rest.iter().copied());
            all.map(str::to_owned).collect::<Vec<_>>()
        };
        match self {
            Self::Repair => Vec::new(),
            Self::Take { name, description, live, .. } => {
                let mut args = snapshot(&["take", name, "--description", description]);
                if *live {
                    args.push("--live".to_owned());
                }
                args
            }
            Self::Restore { native, .. } => snapshot(&["restore", &native.to_string()]),
            Self::Delete { native } => snapshot(&["delete", &native.to_string()]),
            Self::Hide { native, name } => snapshot(&["edit", &native.to_string(), "--name", name]),
            Self::Edit { native, after, .. } => edit(machine, *native, after),
            Self::PowerOff => ["controlvm", machine, "poweroff"].map(str::to_owned).to_vec(),
            Self::Start => ["startvm", machine, "--type", "headless"].map(str::to_owned).to_vec(),
        }
    }
}

fn edit(machine: &str, native: Uuid, words: &Words) -> Vec<String> {
    let native = native.to_string();
    let args =
        ["snapshot", machine, "edit", &native, "--name", &words.name, "--description", &words.description];
    args.map(str::to_owned).to_vec()
}

/// The snapshot that carries the mark.
fn taken(settings: &Settings, wanted: SnapshotId) -> Option<&Snap> {
    settings
        .snapshots
        .iter()
        .find(|snap| Marked::parse(&snap.description).mark.is_some_and(|(snapshot, _)| snapshot == wanted))
}

/// Tells from an observation what became of a step.
pub(super) fn resolve(step: &Step, seen: &Observation) -> Resolution {
    let found = Action::of(step).and_then(|action| Ok((action, Detail::of(seen)?)));
    let (action, detail) = match found {
        Ok(found) => found,
        Err(failure) => return Resolution::HalfDone(Remedy::AskSomeone(failure)),
    };
    if detail.found == Found::BeforeRename || !detail.missing.is_empty() {
        return Resolution::HalfDone(Remedy::Finish);
    }
    if action.is_done_in(seen.run_state) {
        return Resolution::Done(StepReport::default());
    }
    if action.is_done(&detail.settings) {
        if !action.left(&detail.settings).is_empty() {
            return Resolution::HalfDone(Remedy::Finish);
        }
        return match action.report(&detail.settings, detail.repairs) {
            Ok(report) => Resolution::Done(report),
            Err(failure) => Resolution::HalfDone(Remedy::AskSomeone(failure)),
        };
    }
    match action {
        // Its data may be half merged: it only goes forward.
        Action::Delete { .. } => Resolution::HalfDone(Remedy::Finish),
        _ => Resolution::NotDone,
    }
}

impl VirtualboxDriver {
    pub(super) async fn perform(
        &self,
        context: &StepContext<'_>,
        step: &Step,
    ) -> Result<StepReport, DriverError> {
        let action = Action::of(step)?;
        let machine = Machine::of(context.state)?;
        let lock = OperationLock::take(&self.run_dir, context.operation)?;
        let done = self.perform_locked(context, &action, &machine, &lock).await;
        // What became of it is not known: whoever settles it waits for the lock.
        if !matches!(&done, Err(error) if error.class == ErrorClass::Unknown) {
            lock.release();
        }
        done
    }

    async fn perform_locked(
        &self,
        context: &StepContext<'_>,
        action: &Action,
        machine: &Machine,
        lock: &OperationLock,
    ) -> Result<StepReport, DriverError> {
        context.hooks.reached(&format!("virtualbox.{}.before", action.word()));
        let notes = Notes::of(&self.run_dir, machine.uuid, context.operation);
        let mut detail = self.settings(machine).await?;
        if detail.found == Found::BeforeRename {
            repair::settings(&detail, &notes).await?;
            context.hooks.reached("virtualbox.repaired");
            detail = self.settings(machine).await?;
        }
        if let (Action::Delete { native }, false) = (action, detail.missing.is_empty()) {
            repair::media(&detail, *native, &notes).await?;
            context.hooks.reached("virtualbox.repaired");
            detail = self.settings(machine).await?;
        }
        if matches!(action, Action::PowerOff | Action::Start)
            && action.is_done_in(observe::run_state(&self.manage, machine.uuid).await?)
        {
            return Ok(action.report(&detail.settings, notes.untold(context.state, context.operation)?)?);
        }
        let since = SystemTime::now();
        if !action.is_done(&detail.settings) {
            if action.was_cut_off(&detail.settings)
                && let Err(error) = repair::service_gone().await
            {
                tracing::warn!(%error, "what the restore that was cut off has made may stay behind");
            }
            let args = action.args(&machine.uuid.to_string());
            let call = Call::quick(args.iter().map(String::as_str)).moving();
            self.manage.run(call.working(lock, context.progress)).await?;
            context.hooks.reached(&format!("virtualbox.{}.after", action.word()));
            detail = self.settings(machine).await?;
            if matches!(action, Action::Take { .. } | Action::Restore { .. }) {
                repair::orphans(&detail.settings, since, &notes)?;
            }
        }
        self.close_left(action, &detail, since, &notes).await?;
        // A restore to where a machine without disks stands already leaves nothing that would show it.
        let tells = !matches!(action, Action::PowerOff | Action::Start | Action::Restore { .. });
        if tells && !action.is_done(&detail.settings) || action.was_cut_off(&detail.settings) {
            let message =
                format!("VBoxManage says that the {} is done, and the settings do not", action.word());
            return Err(DriverError::new(ErrorClass::Unknown, Code::Drift, message));
        }
        Ok(action.report(&detail.settings, notes.untold(context.state, context.operation)?)?)
    }

    /// Closes what a restore that was cut off left behind.
    async fn close_left(
        &self,
        action: &Action,
        detail: &Detail,
        since: SystemTime,
        notes: &Notes,
    ) -> Result<(), DriverError> {
        let close = async |image: Uuid| {
            self.manage.run(Call::quick(["closemedium", "disk", &image.to_string(), "--delete"])).await
        };
        for image in action.left(&detail.settings) {
            notes.add(&format!("the restore left image {image} behind, which it gave up: closed it"))?;
            // The restore itself is done: this is tried until it works.
            close(image).await.map_err(|error| match error.class {
                ErrorClass::Permanent => DriverError { class: ErrorClass::Transient, ..error },
                _ => error,
            })?;
        }
        for image in repair::empty(&detail.settings, action.made(&detail.settings), since) {
            notes.add(&format!("the restore left image {image} behind, which holds nothing: closed it"))?;
            // No reason to stop. A VBoxSVC that was there all the time may still count on it.
            if let Err(error) = close(image).await {
                tracing::warn!(%error, %image, "an empty image stays behind");
            }
        }
        Ok(())
    }

    pub(super) async fn take_back(
        &self,
        context: &StepContext<'_>,
        step: &Step,
    ) -> Result<StepReport, DriverError> {
        let action = Action::of(step)?;
        let machine = Machine::of(context.state)?;
        let detail = self.settings(&machine).await?;
        let notes = Notes::of(&self.run_dir, machine.uuid, context.operation);
        if detail.found == Found::BeforeRename {
            repair::settings(&detail, &notes).await?;
        }
        let uuid = machine.uuid.to_string();
        let args = match &action {
            Action::Take { snapshot, .. } => taken(&detail.settings, *snapshot).map(|snap| {
                ["snapshot", &uuid, "delete", &snap.uuid.to_string()].map(str::to_owned).to_vec()
            }),
            Action::Edit { native, before, .. } => {
                let changed = detail.settings.snapshot(*native).is_some_and(|snap| !before.are_of(snap));
                changed.then(|| edit(&uuid, *native, before))
            }
            // What is deleted stays so: the engine merges it as soon as it can be.
            Action::Delete { .. } | Action::Repair | Action::PowerOff | Action::Start => None,
            Action::Hide { .. } | Action::Restore { .. } if !action.is_done(&detail.settings) => None,
            Action::Hide { .. } | Action::Restore { .. } => {
                let message = format!("a {} cannot be taken back", action.word());
                return Err(DriverError::permanent(Code::Invalid, message));
            }
        };
        if let Some(args) = args {
            let lock = OperationLock::take(&self.run_dir, context.operation)?;
            let call = Call::quick(args.iter().map(String::as_str)).moving();
            self.manage.run(call.working(&lock, context.progress)).await?;
            lock.release();
        }
        let learnt = Learnt { repairs: notes.untold(context.state, context.operation)?, ..Learnt::default() };
        let learnt = serde_json::to_value(learnt).map_err(|e| Failure::new(Code::Invalid, e.to_string()))?;
        Ok(StepReport { changes: Vec::new(), learnt })
    }

    /// The settings as they are now.
    pub(super) async fn settings(&self, machine: &Machine) -> Result<Detail, DriverError> {
        match observe::read(&machine.file).await {
            Err(error) if error.failure.code == Code::Drift => {
                // A machine that was renamed has its settings elsewhere.
                let call = Call::quick(["showvminfo", &machine.uuid.to_string(), "--machinereadable"]);
                let moved = self.manage.run(call).await.ok();
                let moved = moved.and_then(|info| observe::value(&info, "CfgFile"));
                match moved.filter(|file| machine.file.as_os_str() != file.as_str()) {
                    Some(file) => observe::read(file.as_ref()).await,
                    None => Err(error),
                }
            }
            found => found,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restore_that_left_the_machine_without_its_disks_is_not_done() {
        let [snapshot, held, before, after] = [1, 2, 3, 4].map(Uuid::from_u128);
        let restore = Action::Restore { native: snapshot, images: vec![before] };
        let place = "sata 0 0".to_owned();
        let snap = Snap {
            uuid: snapshot,
            parent: None,
            name: "root".to_owned(),
            description: String::new(),
            taken: None,
            online: false,
            images: [(place.clone(), held)].into(),
        };
        let settings = |images: &[Uuid]| Settings {
            current: Some(snapshot),
            snapshots: vec![snap.clone()],
            images: images.iter().map(|image| (place.clone(), *image)).collect(),
            ..Settings::default()
        };
        let told = |images: &[Uuid]| {
            let settings = settings(images);
            (restore.is_done(&settings), restore.was_cut_off(&settings))
        };
        assert_eq!(told(&[after]), (true, false));
        assert_eq!(told(&[]), (false, true));
        assert_eq!(told(&[before]), (false, false));
    }
}
