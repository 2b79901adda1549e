//! Going back to an internal snapshot.

use snaptree_engine::domain::RunState;
use snaptree_engine::driver::{DriverError, ErrorClass, StepReport};
use snaptree_engine::operation::Code;

use super::save::{bring_to, nodes};
use super::{Job, Load, Memory, busy, entries, job_id, tag};
use crate::qemu::adopt::Work;
use crate::qemu::config::QemuConfig;
use crate::qemu::files::{stamp_of, sync};
use crate::qemu::live::{self, Monitor, Run};
use crate::qemu::lock::check_unused_soon;
use crate::qemu::switch::written_meanwhile;

/// What QEMU says of a load before it touches a disk.
const TOUCHED_NOTHING: [&str; 4] = [
    "does not exist in one or more devices",
    "does not support snapshots",
    "This is a disk-only snapshot",
    "No block device node",
];

/// What became of a load in a process.
enum Loaded {
    /// All of it.
    Whole,
    /// Nothing was touched, for this reason of QEMU's.
    Refused(String),
    /// The disks may be reverted, and the memory is not.
    Torn(String),
}

impl Load {
    /// Does it, or what is left of it.
    pub(in crate::qemu) async fn execute(&self, work: Work<'_>) -> Result<StepReport, DriverError> {
        work.reached("qemu.load.begin");
        match self.memory {
            None => self.apply(work).await?,
            Some(memory) => self.load_memory(work, memory).await?,
        }
        work.reached("qemu.load.done");
        Ok(StepReport::default())
    }

    /// The disks alone, of a machine that is off. Once the first is at the snapshot, all of them have to be.
    async fn apply(&self, work: Work<'_>) -> Result<(), DriverError> {
        let is_begun = entries(&self.images, self.snapshot)?.iter().any(|entry| entry.is_active);
        for image in &self.images {
            check_unused_soon(&image.file).await?;
            if !is_begun && !image.expect.holds(stamp_of(&image.file)?) {
                return Err(written_meanwhile(&image.file).into());
            }
        }
        for image in &self.images {
            if image.entry(self.snapshot)?.is_some_and(|entry| entry.is_active) {
                continue;
            }
            work.img.snapshot(work.lock, "-a", &tag(self.snapshot), &image.file).await.map_err(in_effect)?;
            work.reached("qemu.load.one");
        }
        for image in &self.images {
            sync(&image.file).await.map_err(in_effect)?;
        }
        Ok(())
    }

    async fn load_memory(&self, work: Work<'_>, memory: Memory) -> Result<(), DriverError> {
        if let Some(mut monitor) = live::machine_within(work.context.state, busy(memory.bytes)).await? {
            match self.load_into(work, &mut monitor, memory, Job::First).await? {
                Loaded::Whole => return bring_to(&mut monitor, memory.wish).await,
                Loaded::Refused(why) => {
                    // QEMU leaves the guest stopped.
                    bring_to(&mut monitor, memory.was).await?;
                    return Err(DriverError::permanent(
                        Code::Io,
                        format!("QEMU refuses to load the snapshot: {why}"),
                    )
                    .hint("the machine is as it was; snaptree op retry tries again"));
                }
                Loaded::Torn(why) => self.end_torn(work, monitor, &why).await?,
            }
        }
        self.load_afresh(work, memory).await
    }

    /// Ends a process whose memory and disks are of two instants.
    async fn end_torn(&self, work: Work<'_>, mut monitor: Monitor, why: &str) -> Result<(), DriverError> {
        tracing::warn!(why, "a snapshot was not loaded whole, and the machine is ended");
        monitor.quit().await?;
        drop(monitor);
        for image in &self.images {
            check_unused_soon(&image.file).await.map_err(in_effect)?;
        }
        work.reached("qemu.load.ended");
        Ok(())
    }

    /// Loads it into a process that did nothing before, where Snaptree may start one. Else the disks alone are brought
    /// to the snapshot, so that they are of one instant.
    async fn load_afresh(&self, work: Work<'_>, memory: Memory) -> Result<(), DriverError> {
        let state = work.context.state;
        let (domain, config) = QemuConfig::of(state)?;
        let why = if config.runs.can_start() {
            live::start(state, RunState::Paused, work.img.times.start).await?;
            work.reached("qemu.load.waits");
            let Some(mut monitor) = live::machine_within(state, busy(memory.bytes)).await? else {
                return Err(DriverError::new(
                    ErrorClass::Transient,
                    Code::Io,
                    "the machine ended before its memory was loaded",
                ));
            };
            match self.load_into(work, &mut monitor, memory, Job::Afresh).await? {
                Loaded::Whole => return bring_to(&mut monitor, memory.wish).await,
                Loaded::Refused(why) | Loaded::Torn(why) => {
                    self.end_torn(work, monitor, &why).await?;
                    why
                }
            }
        } else {
            "the machine has ended meanwhile, or had to be ended".to_owned()
        };
        self.apply(work).await?;
        Err(DriverError::permanent(
            Code::Io,
            format!(
                "the memory of the snapshot could not be loaded ({why}); the disks of domain '{}' are at the snapshot, and \
                 the machine is off",
                domain.name
            ),
        )
        .hint(format!(
            "start it with -loadvm {} and run snaptree op resolve --done, or try again with snaptree op retry",
            tag(self.snapshot)
        )))
    }

    /// Loads it into the process that the monitor is of; one in which that was done already is not asked again.
    async fn load_into(
        &self,
        work: Work<'_>,
        monitor: &mut Monitor,
        memory: Memory,
        which: Job,
    ) -> Result<Loaded, DriverError> {
        let mut known = None;
        // Which of the two it is depends on how the process came to be, and that may be forgotten.
        for which in [Job::First, Job::Afresh] {
            if monitor.job(&job_id(work.context, which)).await?.is_some() {
                known = Some(job_id(work.context, which));
            }
        }
        let job = match known {
            Some(job) => job,
            None => {
                let job = job_id(work.context, which);
                monitor.dismiss_concluded().await?;
                let nodes = nodes(monitor, &self.images).await?;
                let nodes: Vec<&str> = nodes.iter().map(String::as_str).collect();
                let memory = nodes.first().copied();
                monitor.snapshot_job("snapshot-load", &job, &tag(self.snapshot), memory, &nodes).await?;
                job
            }
        };
        work.reached("qemu.load.started");
        let loaded = monitor.snapshot_job_ended(&job, busy(memory.bytes)).await?;
        work.reached("qemu.load.loaded");
        Ok(match loaded {
            Ok(()) => Loaded::Whole,
            Err(why) if TOUCHED_NOTHING.iter().any(|text| why.contains(text)) => {
                monitor.dismiss_concluded().await?;
                Loaded::Refused(why)
            }
            Err(why) => Loaded::Torn(why),
        })
    }

    /// Only a load that touched nothing is taken back: a process that was started for it goes.
    pub(in crate::qemu) async fn undo(&self, work: Work<'_>) -> Result<StepReport, DriverError> {
        let state = work.context.state;
        if self.memory.is_some_and(|memory| memory.was == RunState::Off)
            && let Some(mut monitor) = live::machine(state).await?
            && monitor.run_state().await? == Run::Paused
        {
            drop(monitor);
            live::end(state, live::Ending::AtOnce).await?;
        }
        Ok(StepReport::default())
    }
}

/// It may have taken effect on one of the disks.
fn in_effect(error: DriverError) -> DriverError {
    DriverError { class: ErrorClass::Unknown, ..error }
}
