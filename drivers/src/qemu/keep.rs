//! The end of a snapshot with memory: what a switch began to take is waited for, and only then the snapshot is there.
//!
//! ```text
//!   (switch)   generation n: the layers, and the snapshot as a tombstone; the guest runs on, QEMU writes
//!   keep       completed ─ synced ─ looked through ─ write bits off ─ generation n+1: the snapshot with its memory
//!              came to nothing ─ the file is removed; the operation fails, and the tombstone is merged away
//! ```

use snaptree_engine::driver::{DriverError, ErrorClass, Learnt, StepReport};
use snaptree_engine::layer::{LayerChange, MemoryFile, MemoryWay};
use snaptree_engine::operation::{Code, Failure};

use super::adopt::Work;
use super::files::{WRITE_BITS, folder_of, remove, set_mode, stamp_of, sync};
use super::generation::Stand;
use super::live::{self, Monitor, Run, check_stream};
use super::manifest::{Effect, links};
use super::step::KeepMemory;

impl KeepMemory {
    /// Does it, or what is left of it.
    pub(super) async fn execute(&self, work: Work<'_>) -> Result<StepReport, DriverError> {
        work.reached("qemu.keep.begin");
        let mut machine = live::machine(work.context.state).await?;
        let stand = self.turn.stand_now()?;
        // How it was taken is QEMU's to say, and does not matter for one that is gone since.
        let way = match &mut machine {
            Some(monitor) => monitor.memory_way().await?,
            None => MemoryWay::Background,
        };
        if stand == Stand::Before {
            if let Some(failure) = self.written(work, machine.as_mut()).await? {
                self.clear(machine.as_mut()).await?;
                return Ok(failed(failure));
            }
            work.reached("qemu.keep.written");
            match self.whole().await {
                Ok(()) => {}
                Err(error) if error.class == ErrorClass::Permanent => {
                    self.clear(machine.as_mut()).await?;
                    return Ok(failed(error.failure));
                }
                Err(error) => return Err(error),
            }
            work.reached("qemu.keep.whole");
            let memory = MemoryFile { file: self.file.clone(), stamp: stamp_of(&self.file)?, way };
            let mut after = work.context.state.layers.clone();
            self.changes(memory).iter().for_each(|change: &LayerChange| after.apply(change));
            self.turn.prepare(&links(&after), &work.manifest(&after, Effect::Request)?).await?;
            work.reached("qemu.keep.prepared");
            self.turn.switch()?;
        }
        work.reached("qemu.keep.switched");
        self.turn.finish().await?;
        if let Some(monitor) = &mut machine {
            monitor.end_memory().await?;
        }
        let memory = MemoryFile { file: self.file.clone(), stamp: stamp_of(&self.file)?, way };
        work.reached("qemu.keep.done");
        Ok(StepReport { changes: self.changes(memory), learnt: serde_json::Value::Null })
    }

    /// Waits until QEMU has written it all; why not, if it comes to nothing.
    async fn written(
        &self,
        work: Work<'_>,
        machine: Option<&mut Monitor>,
    ) -> Result<Option<Failure>, DriverError> {
        let known = work.context.state.operation(work.context.operation);
        if let Some(failure) = known.and_then(|operation| operation.learnt.failed.clone()) {
            return Ok(Some(failure));
        }
        match machine {
            Some(monitor) => monitor.until_written(work).await,
            None => Ok(Some(
                Failure::new(Code::Io, "the machine ended before its memory was kept")
                    .hint("its disks were taken without it, and are folded away again"),
            )),
        }
    }

    /// On disk, and all of it. Nobody writes it any more.
    async fn whole(&self) -> Result<(), DriverError> {
        sync(&self.file).await?;
        check_stream(&self.file)?;
        set_mode(&self.file, self.mode & !WRITE_BITS)?;
        sync(&self.file).await?;
        sync(&folder_of(&self.file)).await
    }

    /// Nothing of it stays.
    async fn clear(&self, machine: Option<&mut Monitor>) -> Result<(), DriverError> {
        if let Some(monitor) = machine {
            // QEMU 7.2 is known to leave a guest stopped when what it writes to is gone.
            if self.live.was == Run::Running && monitor.waits().await? {
                monitor.cont().await?;
            }
            monitor.end_memory().await?;
        }
        remove(&self.file)?;
        self.turn.discard()?;
        sync(&self.turn.layers).await
    }
}

fn failed(failure: Failure) -> StepReport {
    let learnt = Learnt { failed: Some(failure), ..Learnt::default() };
    StepReport { changes: Vec::new(), learnt: serde_json::to_value(learnt).unwrap_or_default() }
}
