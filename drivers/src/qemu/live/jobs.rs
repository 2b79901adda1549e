//! Merges under a running machine: QEMU's own block jobs, which outlive Snaptree and are found again by their ids.
//!
//! ```text
//!   running ─▶ pending ─▶ flush ─▶ finalize ─▶ concluded ─▶ flush ─▶ dismiss         stream, commit of a frozen layer
//!   running ─▶ ready ─▶ (guest stopped) complete ─▶ pending ─▶ flush ─▶ finalize ─▶ …     commit of the active layer
//! ```
//!
//! QEMU writes headers when a job is finalized, and keeps the tables of what it copied in mind until they are flushed.
//! So no job is finalized by QEMU itself: the flush comes first, and a header that was written tells the truth.

use std::path::{Path, PathBuf};

use snaptree_engine::driver::{DriverError, StepProgress, StepReport};
use snaptree_engine::operation::Code;

use super::monitor::{Job, Monitor};
use super::seen::{LiveMachine, LiveNode};
use super::{check_name, node_name};
use crate::qemu::adopt::{Work, backing_name};
use crate::qemu::files::{WRITE_BITS, folder_of, set_mode, stamp_of, sync};
use crate::qemu::step::{Pull, Push, Under, Writer};

/// How often a job is looked at while nothing is heard of it.
const LOOK_MS: u64 = 200;

/// A job of a step.
#[derive(Clone, Debug)]
pub(in crate::qemu) struct JobWork {
    /// Its id at QEMU.
    pub(in crate::qemu) id: String,
}

impl JobWork {
    /// The step's job of that number.
    pub(in crate::qemu) fn new(work: Work<'_>, number: usize) -> Self {
        Self { id: node_name(work.context.operation, work.context.index, number) }
    }

    /// Waits until the job is in that state.
    pub(in crate::qemu) async fn until(
        &self,
        monitor: &mut Monitor,
        work: Work<'_>,
        status: &str,
    ) -> Result<(), DriverError> {
        loop {
            let job = monitor.job(&self.id).await?.ok_or_else(|| self.gone())?;
            let progress = StepProgress::Bytes { done: job.done, total: job.total.max(1) };
            work.context.progress.step_progress(progress);
            if work.context.call_off.is_asked() {
                return Err(DriverError::permanent(Code::Cancelled, "it was called off while QEMU merged"));
            }
            match job.status.as_str() {
                "concluded" => return self.concluded(monitor, &job).await,
                found if found == status => return Ok(()),
                // Whoever was here before had it completed already.
                "pending" | "waiting" if status == "ready" => return Ok(()),
                _ => monitor.pause(LOOK_MS).await?,
            }
        }
    }

    /// It came to its end without us: if it failed, it had no effect.
    async fn concluded(&self, monitor: &mut Monitor, job: &Job) -> Result<(), DriverError> {
        monitor.tell_job("job-dismiss", &self.id).await?;
        match &job.error {
            None => Ok(()),
            Some(error) => {
                let full = error.contains("No space left");
                let code = if full { Code::NoSpace } else { Code::Io };
                Err(DriverError::permanent(code, format!("QEMU could not merge the layers: {error}"))
                    .hint("the layers are as they were; see the file system, and try again"))
            }
        }
    }

    fn gone(&self) -> DriverError {
        DriverError::unknown(Code::Io, format!("QEMU does not know block job {} any more", self.id))
    }

    /// From `pending` to the end, with what it wrote on disk before any header says so and again after it.
    pub(in crate::qemu) async fn finish(
        &self,
        monitor: &mut Monitor,
        work: Work<'_>,
        written: &[&str],
    ) -> Result<(), DriverError> {
        self.until(monitor, work, "pending").await?;
        work.reached("qemu.live.job.pending");
        if monitor.job(&self.id).await?.is_some_and(|job| job.status == "pending") {
            for node in written {
                monitor.flush(node).await?;
            }
            work.reached("qemu.live.job.flushed");
            monitor.tell_job("job-finalize", &self.id).await?;
            self.until(monitor, work, "concluded").await?;
        }
        work.reached("qemu.live.job.concluded");
        for node in written {
            monitor.flush(node).await?;
        }
        Ok(())
    }

    /// A commit of what the machine writes, the guest being stopped: from `ready` to the end.
    pub(in crate::qemu) async fn complete(
        &self,
        monitor: &mut Monitor,
        into: &Path,
    ) -> Result<(), DriverError> {
        let mut told = false;
        while let Some(job) = monitor.job(&self.id).await? {
            match job.status.as_str() {
                // It takes a moment until the job has heard it, and one that was told by a predecessor refuses.
                "ready" if !told => {
                    told = true;
                    if let Err(error) = monitor.tell_job("job-complete", &self.id).await
                        && monitor.job(&self.id).await?.is_some_and(|job| job.status == "ready")
                    {
                        return Err(error);
                    }
                }
                "pending" => {
                    super::exchange::flush_file(monitor, into).await?;
                    monitor.tell_job("job-finalize", &self.id).await?;
                }
                "concluded" => return self.concluded(monitor, &job).await,
                _ => monitor.pause(LOOK_MS).await?,
            }
        }
        Ok(())
    }

    /// Ends it, if it is there, without effect.
    pub(in crate::qemu) async fn cancel(&self, monitor: &mut Monitor) -> Result<(), DriverError> {
        while let Some(job) = monitor.job(&self.id).await? {
            match job.status.as_str() {
                "concluded" => monitor.tell_job("job-dismiss", &self.id).await?,
                "aborting" | "null" => monitor.pause(LOOK_MS).await?,
                _ => {
                    // One that ended in this very moment does not take the word any more.
                    let told = monitor.tell_job("job-cancel", &self.id).await;
                    if told.is_err() {
                        monitor.pause(LOOK_MS).await?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// The chain that has `file` open, with the place of it.
fn place<'a>(machine: &'a LiveMachine, file: &Path) -> Option<(&'a [LiveNode], usize)> {
    machine.chains.iter().find_map(|chain| {
        let at = chain.nodes.iter().position(|node| node.file == file)?;
        Some((chain.nodes.as_slice(), at))
    })
}

fn not_open(file: &Path) -> DriverError {
    DriverError::permanent(Code::Drift, format!("QEMU does not have layer {} open any more", file.display()))
        .hint("was the machine started again meanwhile? Try again")
}

impl Pull {
    /// Does it by block-stream. None: the machine does not have the layer open.
    pub(in crate::qemu) async fn execute_under(
        &self,
        work: Work<'_>,
        monitor: &mut Monitor,
    ) -> Result<Option<StepReport>, DriverError> {
        let machine = monitor.look().await?;
        let Some((nodes, at)) = place(&machine, &self.file) else { return Ok(None) };
        let node = &nodes[at];
        let job = JobWork::new(work, 0);
        let known = monitor.job(&job.id).await?.is_some();
        let stands_on = nodes.get(at + 1).map(|below| below.file.as_path());
        if known || stands_on != Some(&self.onto_file) {
            if !known {
                // What the machine writes is open for writing already.
                if at > 0 {
                    check_name(node, &self.file)?;
                }
                let onto = nodes[at..].iter().find(|below| below.file == self.onto_file);
                let onto = onto.ok_or_else(|| not_open(&self.onto_file))?;
                set_mode(&self.file, self.mode)?;
                let base = (onto.node.as_str(), self.onto_file.as_path());
                monitor.stream(&job.id, &node.node, base, work.img.speed_bytes).await?;
            }
            work.reached("qemu.live.pull.started");
            job.finish(monitor, work, &[&node.node]).await?;
        } else {
            monitor.flush(&node.node).await?;
        }
        self.close()?;
        if backing_name(&self.file)?.as_ref() != Some(&self.onto_file) {
            return Err(DriverError::permanent(
                Code::BadImage,
                format!("QEMU did not put {} upon {}", self.file.display(), self.onto_file.display()),
            ));
        }
        sync(&self.file).await?;
        sync(&folder_of(&self.file)).await?;
        work.reached("qemu.live.pull.done");
        Ok(Some(self.report(&self.onto, stamp_of(&self.file)?)))
    }

    /// Ends the job. What was pulled to its end stays so: the layer reads the same on either parent.
    pub(in crate::qemu) async fn undo_under(
        &self,
        work: Work<'_>,
        monitor: &mut Monitor,
    ) -> Result<Option<StepReport>, DriverError> {
        JobWork::new(work, 0).cancel(monitor).await?;
        let machine = monitor.look().await?;
        let Some((nodes, at)) = place(&machine, &self.file) else { return Ok(None) };
        monitor.flush(&nodes[at].node).await?;
        self.close()?;
        sync(&self.file).await?;
        let on_onto = nodes.get(at + 1).is_some_and(|below| below.file == self.onto_file);
        let parent = if on_onto { &self.onto } else { &self.from };
        Ok(Some(self.report(parent, stamp_of(&self.file)?)))
    }
}

impl Push {
    /// Does it by block-commit, for a frozen layer. None: the machine does not have the layers open.
    pub(in crate::qemu) async fn execute_under(
        &self,
        work: Work<'_>,
        monitor: &mut Monitor,
    ) -> Result<Option<StepReport>, DriverError> {
        debug_assert_eq!(self.writer, Writer::Nobody);
        let machine = monitor.look().await?;
        let Some((nodes, into)) = place(&machine, &self.into_file) else { return Ok(None) };
        let base = &nodes[into];
        let job = JobWork::new(work, 0);
        let known = monitor.job(&job.id).await?.is_some();
        let above = self.above(work, nodes)?;
        let from = nodes.iter().find(|node| node.file == self.from_file);
        match from {
            Some(from) => {
                if !known {
                    self.check(work, Under::Guest)?;
                    check_name(base, &self.into_file)?;
                    self.open_for_headers(work, Under::Guest)?;
                    set_mode(&self.into_file, self.into_mode)?;
                    let base = (base.node.as_str(), self.into_file.as_path());
                    monitor
                        .commit(&job.id, &nodes[0].node, Some(&from.node), base, work.img.speed_bytes)
                        .await?;
                }
                work.reached("qemu.live.push.started");
                job.finish(monitor, work, &[&base.node, &above]).await?;
            }
            None => {
                if known {
                    job.cancel(monitor).await?;
                }
                monitor.flush(&base.node).await?;
                monitor.flush(&above).await?;
            }
        }
        work.reached("qemu.live.push.done");
        // QEMU has put the layer above onto the other file: only forward.
        self.finish_under(work).await.map(Some).map_err(super::exchange::in_effect)
    }

    async fn finish_under(&self, work: Work<'_>) -> Result<StepReport, DriverError> {
        self.open_for_headers(work, Under::Nobody)?;
        self.close()?;
        sync(&self.into_file).await?;
        sync(&folder_of(&self.into_file)).await?;
        Ok(self.report()?)
    }

    /// Ends the job before it had an effect.
    pub(in crate::qemu) async fn undo_under(
        &self,
        work: Work<'_>,
        monitor: &mut Monitor,
    ) -> Result<(), DriverError> {
        JobWork::new(work, 0).cancel(monitor).await?;
        self.open_for_headers(work, Under::Nobody)
    }

    /// The node whose header says what it is built upon: the one above `from`, or above `into` afterwards.
    fn above(&self, work: Work<'_>, nodes: &[LiveNode]) -> Result<String, DriverError> {
        let at = nodes.iter().position(|node| node.file == self.from_file);
        let at = at.or_else(|| nodes.iter().position(|node| node.file == self.into_file));
        let above = at.and_then(|at| at.checked_sub(1)).and_then(|at| nodes.get(at));
        let known = self.stacked(work);
        match above {
            Some(above) if known.iter().any(|(file, _)| *file == above.file) => Ok(above.node.clone()),
            _ => Err(not_open(&self.from_file)),
        }
    }

    /// The layers that stand upon `from` by the log, with their modes.
    pub(in crate::qemu) fn stacked(&self, work: Work<'_>) -> Vec<(PathBuf, u32)> {
        let layers = work.context.state.layers.disks.get(&self.disk);
        let Some(layers) = layers else { return Vec::new() };
        let dependants = layers.dependants(&self.from).filter_map(|id| layers.layers.get(id));
        dependants.map(|layer| (layer.file.clone(), layer.mode)).collect()
    }

    /// QEMU rewrites the header of the layer above, which may be frozen: it is writable as long as QEMU needs it.
    fn open_for_headers(&self, work: Work<'_>, under: Under) -> Result<(), DriverError> {
        let active = work.context.state.layers.disks.get(&self.disk).and_then(|disk| disk.active_layer());
        let active = active.map(|(_, layer)| layer.file.clone());
        for (file, mode) in self.stacked(work) {
            if Some(&file) != active.as_ref() {
                let mode = if under == Under::Guest { mode } else { mode & !WRITE_BITS };
                set_mode(&file, mode)?;
            }
        }
        Ok(())
    }
}
