//! Deleting an internal snapshot: by QEMU where the machine runs, else by qemu-img. Any number of times.

use snaptree_engine::SnapshotId;
use snaptree_engine::driver::{DriverError, ErrorClass, StepReport};
use snaptree_engine::operation::Code;

use super::save::nodes;
use super::{Erase, Image, Job, busy, entries, job_id, tag};
use crate::qemu::adopt::Work;
use crate::qemu::files::sync;
use crate::qemu::live::{self, Monitor};

impl Erase {
    /// Does it.
    pub(in crate::qemu) async fn execute(&self, work: Work<'_>) -> Result<StepReport, DriverError> {
        work.reached("qemu.erase.begin");
        erase(work, &self.images, self.snapshot, 0).await?;
        for image in &self.images {
            sync(&image.file).await?;
        }
        work.reached("qemu.erase.done");
        Ok(StepReport::default())
    }
}

/// Takes a tag out of every image that has it.
pub(super) async fn erase(
    work: Work<'_>,
    images: &[Image],
    snapshot: SnapshotId,
    ram_bytes: u64,
) -> Result<(), DriverError> {
    if entries(images, snapshot)?.is_empty() {
        return Ok(());
    }
    let machine =
        live::machine_within(work.context.state, busy(ram_bytes)).await.map_err(|error| {
            match error.failure.code {
                Code::InUse => DriverError { class: ErrorClass::Busy, ..error },
                _ => error,
            }
        })?;
    match machine {
        Some(monitor) => erase_under(work, monitor, images, snapshot).await,
        None => {
            for image in images {
                if image.entry(snapshot)?.is_some() {
                    work.img.snapshot(work.lock, "-d", &tag(snapshot), &image.file).await?;
                    work.reached("qemu.erase.one");
                }
            }
            Ok(())
        }
    }
}

async fn erase_under(
    work: Work<'_>,
    mut monitor: Monitor,
    images: &[Image],
    snapshot: SnapshotId,
) -> Result<(), DriverError> {
    let job = job_id(work.context, Job::Delete);
    if monitor.job(&job).await?.is_none() {
        monitor.dismiss_concluded().await?;
        let nodes = nodes(&mut monitor, images).await?;
        let nodes: Vec<&str> = nodes.iter().map(String::as_str).collect();
        monitor.snapshot_job("snapshot-delete", &job, &tag(snapshot), None, &nodes).await?;
    }
    work.reached("qemu.erase.started");
    let erased = monitor.snapshot_job_ended(&job, busy(1)).await?;
    // Whoever tries again needs a job of his own.
    monitor.dismiss_concluded().await?;
    erased.map_err(|error| {
        DriverError::new(
            ErrorClass::Transient,
            Code::Io,
            format!("QEMU could not delete the snapshot: {error}"),
        )
    })
}
