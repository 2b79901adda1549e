//! What a machine writes is exchanged under it: by new layers (a snapshot), or by the end of an active commit.

use std::collections::BTreeSet;
use std::path::PathBuf;

use snaptree_engine::driver::{DriverError, ErrorClass};
use snaptree_engine::operation::Code;

use tokio::time::Instant;

use super::jobs::JobWork;
use super::memory::{Ready, Taken};
use super::monitor::Monitor;
use super::options::Options;
use super::quiesce::{Quiesced, Rest};
use super::seen::{LiveMachine, Run, writes_beside};
use super::{check_name, node_name};
use crate::qemu::adopt::Work;
use crate::qemu::config::{LeftOut, QemuConfig};
use crate::qemu::files::{set_mode, sync};
use crate::qemu::plan::not_whole;
use crate::qemu::step::{Fresh, Live, Push, Switch, Writer};

/// What went with a switch.
#[derive(Default)]
pub(in crate::qemu) struct Beside {
    /// How the guest was quiesced, if it was.
    pub(in crate::qemu) quiesced: Option<Quiesced>,
    /// How its memory was taken, if it was.
    pub(in crate::qemu) memory: Option<Taken>,
    /// What the machine wrote besides at that moment, in words; none if it was not looked at.
    pub(in crate::qemu) left_out: Option<Vec<String>>,
}

/// What waits for the switch.
struct Exchanged {
    rest: Option<Rest>,
    memory: Option<Ready>,
    /// When the guest was told to stop.
    stopped: Instant,
    left_out: Option<Vec<String>>,
}

/// The guest is stopped, and writes the new layers from now on.
struct AtRest {
    rest: Option<Rest>,
    left_out: Vec<String>,
}

impl Exchanged {
    fn now() -> Self {
        Self { rest: None, memory: None, stopped: Instant::now(), left_out: None }
    }
}

impl Switch {
    /// The switch under a running machine, up to the guest that runs again; what came of what went with it.
    pub(in crate::qemu) async fn switch_under(
        &self,
        work: Work<'_>,
        live: Live,
        mut monitor: Monitor,
    ) -> Result<Beside, DriverError> {
        let machine = monitor.look().await?;
        let exchanged = if self.fresh.is_empty() {
            self.pivot(work, &mut monitor, &machine, live).await?;
            Exchanged::now()
        } else {
            self.exchange(work, &mut monitor, &machine, live).await?
        };
        // From here on the guest is stopped, and what it writes next is in the new files: only forward.
        self.turn.switch().map_err(in_effect)?;
        let memory = match exchanged.memory {
            Some(ready) => Some(
                self.with_memory(work, &mut monitor, live, (ready, exchanged.stopped))
                    .await
                    .map_err(in_effect)?,
            ),
            None => {
                sync(&self.turn.layers).await.map_err(in_effect)?;
                work.reached("qemu.live.switched");
                self.go_on(work, &mut monitor, live).await.map_err(in_effect)?;
                None
            }
        };
        work.reached("qemu.live.resumed");
        let quiesced = match exchanged.rest {
            Some(rest) => Some(rest.end(work, &self.turn).await.map_err(in_effect)?),
            None => None,
        };
        Ok(Beside { quiesced, memory, left_out: exchanged.left_out })
    }

    /// QEMU saves the machine, whose disks were exchanged; then the guest goes on. What it writes must not be lost to a
    /// power cut, so the switch is on disk by then.
    async fn with_memory(
        &self,
        work: Work<'_>,
        monitor: &mut Monitor,
        live: Live,
        (ready, stopped): (Ready, Instant),
    ) -> Result<Taken, DriverError> {
        let synced = sync(&self.turn.layers);
        let mut taken = if monitor.lets_guest_go_on() {
            synced.await?;
            work.reached("qemu.live.switched");
            ready.take(work, monitor, stopped).await?
        } else {
            work.reached("qemu.live.switched");
            let (synced, taken) = tokio::join!(synced, ready.take(work, monitor, stopped));
            synced?;
            taken?
        };
        if live.was == Run::Running {
            monitor.cont().await?;
        }
        taken.resumed(stopped);
        Ok(taken)
    }

    /// Lets the guest go on as it was; any number of times.
    pub(in crate::qemu) async fn go_on(
        &self,
        work: Work<'_>,
        monitor: &mut Monitor,
        live: Live,
    ) -> Result<(), DriverError> {
        if self.memory.is_some() {
            let way = monitor.memory_way().await?;
            monitor.until_taken(work, way).await?;
        }
        if live.was == Run::Running && monitor.waits().await? {
            monitor.cont().await?;
        }
        Ok(())
    }

    /// New layers under the guest. It returns with the guest stopped (its file systems at rest, if that was asked for),
    /// and does not take them back.
    async fn exchange(
        &self,
        work: Work<'_>,
        monitor: &mut Monitor,
        machine: &LiveMachine,
        live: Live,
    ) -> Result<Exchanged, DriverError> {
        let done = self.fresh.iter().any(|fresh| machine.node_of(&fresh.file).is_some());
        let mut known = Vec::new();
        let exchanged = if done {
            self.write_generation(work).await.map_err(in_effect)?;
            monitor.stop().await.map_err(in_effect)?;
            Exchanged::now()
        } else {
            let (pairs, options) = self.open_fresh(work, monitor, machine).await?;
            known = options;
            self.write_generation(work).await?;
            let mut memory = match &self.memory {
                Some(memory) => Some(memory.prepare(work, monitor, live).await?),
                None => None,
            };
            // QEMU flushes its disks when the guest is stopped, which would wait for all that was written until then.
            for fresh in &self.fresh {
                sync(&fresh.on_file).await?;
            }
            work.reached("qemu.live.prepared");
            let rest = self.freeze(work, live).await?;
            let stopped = Instant::now();
            let AtRest { rest, left_out } =
                self.exchange_at_rest(work, (monitor, live), (&pairs, rest), &mut memory).await?;
            Exchanged { rest, memory, stopped, left_out: Some(left_out) }
        };
        work.reached("qemu.live.exchanged");
        for (index, fresh) in self.fresh.iter().enumerate() {
            // By its own name a layer was known before, and is after it.
            if done || machine.root_of(&fresh.on_file).is_none_or(|node| node.named != fresh.on_file) {
                let layer = (fresh, index, known.get(index));
                self.name_frozen(work, monitor, layer).await.map_err(in_effect)?;
            }
        }
        work.reached("qemu.live.named");
        Ok(exchanged)
    }

    /// Stops the guest and exchanges what it writes. A failure before that takes effect lets it go on.
    async fn exchange_at_rest(
        &self,
        work: Work<'_>,
        (monitor, live): (&mut Monitor, Live),
        (pairs, rest): (&[(String, String)], Option<Rest>),
        memory: &mut Option<Ready>,
    ) -> Result<AtRest, DriverError> {
        if let Err(error) = self.stop_in_time(work, monitor, live, rest.as_ref()).await {
            return Err(match rest {
                Some(rest) => rest.give_up(self, work, (monitor, live), error).await,
                None => error,
            });
        }
        match (self.exchange_stopped(work, monitor, pairs, memory).await, rest) {
            (Ok(left_out), rest) => Ok(AtRest { rest, left_out }),
            (Err(error), Some(rest)) if error.class == ErrorClass::Permanent => {
                Err(rest.give_up(self, work, (monitor, live), error).await)
            }
            (Err(error), _) if error.class == ErrorClass::Permanent => {
                self.go_on(work, monitor, live).await?;
                Err(error)
            }
            (Err(error), _) => Err(error),
        }
    }

    /// The exchange itself; what else the machine writes.
    async fn exchange_stopped(
        &self,
        work: Work<'_>,
        monitor: &mut Monitor,
        pairs: &[(String, String)],
        memory: &mut Option<Ready>,
    ) -> Result<Vec<String>, DriverError> {
        // A disk may have been plugged in since this was planned.
        let left_out = self.left_out_now(work, monitor).await?;
        if let Some(ready) = memory {
            ready.begin(work, monitor).await?;
        }
        monitor.exchange(pairs).await?;
        Ok(left_out)
    }

    async fn left_out_now(&self, work: Work<'_>, monitor: &mut Monitor) -> Result<Vec<String>, DriverError> {
        let (domain, config) = QemuConfig::of(work.context.state)?;
        let written = config.disks.keys().filter_map(|disk| config.written(disk, work.context.state));
        let mut ours: BTreeSet<PathBuf> = written.collect();
        ours.extend(self.fresh.iter().map(|fresh| fresh.on_file.clone()));
        let left_out = writes_beside(&monitor.chains().await?, |file| ours.contains(file));
        if self.beside == LeftOut::Refuse && !left_out.is_empty() {
            return Err(not_whole(&domain.name, &left_out, self.not_held()).into());
        }
        Ok(left_out)
    }

    async fn stop_in_time(
        &self,
        work: Work<'_>,
        monitor: &mut Monitor,
        live: Live,
        rest: Option<&Rest>,
    ) -> Result<(), DriverError> {
        rest.map_or(Ok(()), Rest::check)?;
        match (live.was, rest) {
            (Run::Running, Some(rest)) => monitor.stop_within(rest.left()).await?,
            (Run::Running, None) => monitor.stop().await?,
            _ => {}
        }
        work.reached("qemu.live.stopped");
        rest.map_or(Ok(()), Rest::check)
    }

    /// Makes the new layers and opens them: what writes each disk now, and what shall, and how.
    async fn open_fresh(
        &self,
        work: Work<'_>,
        monitor: &mut Monitor,
        machine: &LiveMachine,
    ) -> Result<(Vec<(String, String)>, Vec<Options>), DriverError> {
        let (mut pairs, mut known) = (Vec::new(), Vec::new());
        // A removed layer that is still open could stand upon one of these, which then could not be built upon.
        monitor.close_files(|file| !file.exists()).await?;
        for (index, fresh) in self.fresh.iter().enumerate() {
            monitor.close_file(&fresh.file).await?;
            fresh.make(work).await?;
            let root = machine.root_of(&fresh.on_file).ok_or_else(|| not_written(&fresh.on_file))?;
            let overlay = node_name(work.context.operation, work.context.index, 2 * index);
            // To be asked how it writes the layer, QEMU brings it to its file first, and the guest waits for that.
            sync(&fresh.on_file).await?;
            let graph = monitor.graph().await?;
            let image = graph.node(&root.node).ok_or_else(|| not_written(&fresh.on_file))?;
            let options = monitor.options_of(&graph, image).await?;
            monitor.add_overlay(&overlay, &fresh.file, &options).await?;
            pairs.push((root.node.clone(), overlay));
            known.push(options);
        }
        Ok((pairs, known))
    }

    /// QEMU may know the layer that is frozen now by the registered path, which leads elsewhere in a moment. A layer
    /// whose name stays wrong is not written under the guest, so this is no reason to stop.
    async fn name_frozen(
        &self,
        work: Work<'_>,
        monitor: &mut Monitor,
        (fresh, index, known): (&Fresh, usize, Option<&Options>),
    ) -> Result<(), DriverError> {
        let graph = monitor.graph().await?;
        let Some(overlay) = graph.of_file(&fresh.file).find(|node| node.file_node.is_some()) else {
            return Err(not_written(&fresh.file));
        };
        let below = graph.below(&overlay.name);
        let Some(below) = below.filter(|below| below.named != fresh.on_file) else { return Ok(()) };
        let frozen = node_name(work.context.operation, work.context.index, 2 * index + 1);
        monitor.close_file(&fresh.on_file).await?;
        let options = match known {
            Some(options) => options.clone(),
            None => monitor.options_of(&graph, overlay).await?,
        };
        let named = match monitor.add_frozen(&frozen, &fresh.on_file, &options).await {
            Ok(()) => monitor.put_upon(overlay, &frozen, &options).await,
            Err(error) => Err(error),
        };
        match named {
            Ok(()) if below.name.starts_with('#') => Ok(()),
            Ok(()) => monitor.close(&below.name).await,
            Err(error) if error.class == ErrorClass::Permanent => {
                tracing::warn!(%error, layer = %fresh.on_file.display(), "QEMU keeps the registered path as its name");
                monitor.close_file(&fresh.on_file).await
            }
            Err(error) => Err(error),
        }
    }

    /// The end of active commits: the machine writes the lower files afterwards.
    async fn pivot(
        &self,
        work: Work<'_>,
        monitor: &mut Monitor,
        machine: &LiveMachine,
        live: Live,
    ) -> Result<(), DriverError> {
        let mut jobs = Vec::new();
        for (index, push) in self.push.iter().filter(|push| push.writer == Writer::Machine).enumerate() {
            // Without its upper layer in the chain the machine writes the lower one already.
            if machine.node_of(&push.from_file).is_some() {
                jobs.push((push, self.commit_active(work, monitor, machine, push, index).await?));
            }
        }
        self.write_generation(work).await?;
        work.reached("qemu.live.ready");
        monitor.stop().await?;
        work.reached("qemu.live.stopped");
        for (index, (push, job)) in jobs.iter().enumerate() {
            if let Err(error) = job.complete(monitor, &push.into_file).await {
                if index > 0 {
                    return Err(in_effect(error));
                }
                if error.class == ErrorClass::Permanent {
                    self.go_on(work, monitor, live).await?;
                }
                return Err(error);
            }
            work.reached("qemu.live.pivoted");
        }
        for push in self.push.iter().filter(|push| push.writer == Writer::Machine) {
            flush_file(monitor, &push.into_file).await.map_err(in_effect)?;
        }
        work.reached("qemu.live.flushed");
        Ok(())
    }

    /// Brings a commit of what the machine writes to where both layers are the same.
    async fn commit_active(
        &self,
        work: Work<'_>,
        monitor: &mut Monitor,
        machine: &LiveMachine,
        push: &Push,
        index: usize,
    ) -> Result<JobWork, DriverError> {
        let job = JobWork::new(work, index);
        if monitor.job(&job.id).await?.is_none() {
            push.check(work, crate::qemu::step::Under::Guest)?;
            let root = machine.root_of(&push.from_file).ok_or_else(|| not_written(&push.from_file))?;
            let base = machine.node_of(&push.into_file).ok_or_else(|| not_written(&push.into_file))?;
            check_name(base, &push.into_file)?;
            set_mode(&push.into_file, push.into_mode)?;
            monitor.write_like(&base.node, &root.node).await?;
            monitor
                .commit(&job.id, &root.node, None, (&base.node, &push.into_file), work.img.speed_bytes)
                .await?;
            work.reached("qemu.live.commit.started");
        }
        job.until(monitor, work, "ready").await?;
        Ok(job)
    }

    /// Takes back what was prepared under the machine, before anything was exchanged.
    pub(in crate::qemu) async fn undo_under(
        &self,
        work: Work<'_>,
        live: Live,
        mut monitor: Monitor,
    ) -> Result<(), DriverError> {
        let machine = monitor.look().await?;
        let pushed = self.push.iter().filter(|push| push.writer == Writer::Machine);
        if self.fresh.iter().any(|fresh| machine.node_of(&fresh.file).is_some())
            || pushed.clone().any(|push| machine.node_of(&push.from_file).is_none())
        {
            return Err(DriverError::permanent(
                Code::Invalid,
                "the machine has exchanged its disks, and the switch can only be finished",
            ));
        }
        for (index, _) in pushed.enumerate() {
            JobWork::new(work, index).cancel(&mut monitor).await?;
        }
        self.go_on(work, &mut monitor, live).await?;
        if self.memory.is_some() {
            monitor.end_memory().await?;
        }
        self.thaw_left(work).await?;
        for fresh in &self.fresh {
            monitor.close_file(&fresh.file).await?;
        }
        Ok(())
    }
}

pub(super) async fn flush_file(monitor: &mut Monitor, file: &std::path::Path) -> Result<(), DriverError> {
    let machine = monitor.look().await?;
    let node = machine.node_of(file).ok_or_else(|| not_written(file))?;
    monitor.flush(&node.node).await
}

fn not_written(file: &std::path::Path) -> DriverError {
    DriverError::permanent(
        Code::Drift,
        format!("the machine does not have {} open as the log says", file.display()),
    )
    .hint("was it started again meanwhile? Try again")
}

/// The disks are exchanged: whatever fails after it, the step is not to be taken back but finished.
pub(super) fn in_effect(error: DriverError) -> DriverError {
    DriverError { class: ErrorClass::Unknown, ..error }
}
