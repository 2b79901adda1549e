//! Taking an internal snapshot.

use snaptree_engine::domain::RunState;
use snaptree_engine::driver::{DriverError, ErrorClass, Learnt, StepReport};
use snaptree_engine::operation::{Code, Failure};
use snaptree_engine::tree::SnapshotState;

use super::erase::erase;
use super::plan::NOT_HELD;
use super::table::Entry;
use super::{Image, Job, Runs, Save, busy, entries, job_id, tag};
use crate::qemu::adopt::Work;
use crate::qemu::files::{stamp_of, sync};
use crate::qemu::live::{self, Monitor, Run};
use crate::qemu::lock::check_unused;
use crate::qemu::plan::not_whole;
use crate::qemu::switch::written_meanwhile;

/// Why a snapshot that was cut off is not taken later: it would be of another instant.
pub(super) fn cut_short() -> Failure {
    Failure::new(Code::Expired, "it was cut off before the snapshot was whole").hint("ask for it again")
}

impl Save {
    /// Does it, or what is left of it.
    pub(in crate::qemu) async fn execute(&self, work: Work<'_>) -> Result<StepReport, DriverError> {
        work.reached("qemu.save.begin");
        match self.live {
            None => self.save_off(work).await?,
            Some(runs) => match live::machine_within(work.context.state, busy(runs.ram_bytes)).await? {
                Some(monitor) => self.save_under(work, monitor, runs).await?,
                // It may have ended after all was written.
                None if entries(&self.images, self.snapshot)?.len() == self.images.len() => {}
                None => return Err(cut_short().into()),
            },
        }
        work.reached("qemu.save.saved");
        for image in &self.images {
            sync(&image.file).await?;
        }
        let report = self.report(&entries(&self.images, self.snapshot)?)?;
        work.reached("qemu.save.done");
        Ok(report)
    }

    /// What the log records when every image has its entry.
    fn report(&self, found: &[Entry]) -> Result<StepReport, DriverError> {
        if found.len() < self.images.len() {
            return Err(cut_short().into());
        }
        let state = match self.live {
            None => SnapshotState::Shutoff,
            Some(runs) => runs.was.state().into(),
        };
        let taken = found.first().and_then(|entry| entry.taken);
        let learnt = Learnt { taken, state: Some(state), ..Learnt::default() };
        let learnt = serde_json::to_value(learnt)
            .map_err(|error| DriverError::permanent(Code::Io, "a time cannot be written").source(error))?;
        Ok(StepReport { changes: Vec::new(), learnt })
    }

    /// Disk by disk, while nobody writes them. A failure in between leads back.
    async fn save_off(&self, work: Work<'_>) -> Result<(), DriverError> {
        let tag = tag(self.snapshot);
        for image in &self.images {
            // qemu-img would make a second one of the same name.
            if image.entry(self.snapshot)?.is_some() {
                continue;
            }
            check_unused(&image.file)?;
            if !image.expect.holds(stamp_of(&image.file)?) {
                return Err(written_meanwhile(&image.file).into());
            }
            work.img.snapshot(work.lock, "-c", &tag, &image.file).await?;
            work.reached("qemu.save.one");
        }
        Ok(())
    }

    async fn save_under(&self, work: Work<'_>, mut monitor: Monitor, runs: Runs) -> Result<(), DriverError> {
        let job = job_id(work.context, Job::First);
        let known = monitor.job(&job).await?.is_some();
        let saved = if !known && entries(&self.images, self.snapshot)?.len() == self.images.len() {
            Ok(())
        } else {
            if !known {
                monitor.dismiss_concluded().await?;
                check_whole(work, &mut monitor, &self.images).await?;
                let nodes = nodes(&mut monitor, &self.images).await?;
                let nodes: Vec<&str> = nodes.iter().map(String::as_str).collect();
                let memory = nodes.first().copied();
                monitor.snapshot_job("snapshot-save", &job, &tag(self.snapshot), memory, &nodes).await?;
            }
            work.reached("qemu.save.started");
            monitor.snapshot_job_ended(&job, busy(runs.ram_bytes)).await?
        };
        let after = monitor.run_state().await?;
        // QEMU lets the guest go on by itself, unless the file system was full.
        if runs.was == Run::Running && after != Run::Running {
            monitor.cont().await?;
        }
        saved.map_err(|error| {
            let code = if after == Run::Stuck { Code::NoSpace } else { Code::Io };
            DriverError::permanent(code, format!("QEMU could not take the snapshot: {error}"))
                .hint("the machine is as it was; see the file system, and try again")
        })
    }

    /// Takes it back, however far it came.
    pub(in crate::qemu) async fn undo(&self, work: Work<'_>) -> Result<StepReport, DriverError> {
        let ram_bytes = self.live.map_or(0, |runs| runs.ram_bytes);
        let machine = live::machine_within(work.context.state, busy(ram_bytes)).await;
        if let (Some(runs), Ok(Some(mut monitor))) = (self.live, machine) {
            if monitor.job(&job_id(work.context, Job::First)).await?.is_some()
                && let Err(error) =
                    monitor.snapshot_job_ended(&job_id(work.context, Job::First), busy(ram_bytes)).await?
            {
                tracing::debug!(error, "the job that is taken back had failed");
            }
            if runs.was == Run::Running && monitor.run_state().await? != Run::Running {
                monitor.cont().await?;
            }
        }
        work.reached("qemu.save.undo.ended");
        erase(work, &self.images, self.snapshot, ram_bytes).await?;
        Ok(StepReport::default())
    }
}

/// A disk may have been plugged in since the snapshot was planned.
async fn check_whole(work: Work<'_>, monitor: &mut Monitor, images: &[Image]) -> Result<(), DriverError> {
    let machine = monitor.look().await?;
    let beside = machine.writes_beside(|file| images.iter().any(|image| image.file == file));
    match (&work.context.state.domain, beside.is_empty()) {
        (Some(domain), false) => Err(not_whole(&domain.name, &beside, NOT_HELD).into()),
        _ => Ok(()),
    }
}

/// The nodes by which QEMU writes the images.
pub(super) async fn nodes(monitor: &mut Monitor, images: &[Image]) -> Result<Vec<String>, DriverError> {
    let machine = monitor.look().await?;
    let node = |image: &Image| match machine.root_of(&image.file) {
        Some(root) => Ok(root.node.clone()),
        None => Err(DriverError::permanent(
            Code::Drift,
            format!("QEMU does not write {} any more", image.file.display()),
        )
        .hint("was the machine started again meanwhile? Try again")),
    };
    images.iter().map(node).collect()
}

/// What a machine's state is called in the end.
pub(super) async fn bring_to(monitor: &mut Monitor, wish: RunState) -> Result<(), DriverError> {
    match (wish, monitor.run_state().await?) {
        (RunState::Running, Run::Running) | (RunState::Paused, Run::Paused) | (RunState::Off, _) => Ok(()),
        (RunState::Running, _) => monitor.cont().await,
        (RunState::Paused, _) => monitor.stop().await,
    }?;
    if wish == RunState::Running && monitor.run_state().await? != Run::Running {
        return Err(DriverError::new(ErrorClass::Unknown, Code::Io, "QEMU does not let the guest go on"));
    }
    Ok(())
}
