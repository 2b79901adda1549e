//! The switch: new layers are made and synced, then one rename changes what every disk opens.

use std::fs;
use std::path::Path;

use snaptree_engine::driver::{DriverError, ErrorClass, Learnt, StepContext, StepReport};
use snaptree_engine::layer::{FileStamp, LayerChange, LayerGraph};
use snaptree_engine::operation::{Code, Failure, Request};
use snaptree_engine::tree::SnapshotState;

use super::adopt::{Work, backing_name, unreadable};
use super::files::{self, Doing, WRITE_BITS, if_there, remove, set_mode, stamp_of, sync};
use super::generation::{self, Stand};
use super::live::{self, Beside, Run};
use super::lock::QemuLocks;
use super::manifest::{Effect, links};
use super::record::StampOf;
use super::step::{Fresh, Live, Push, Restack, Switch, Writer};

/// How often a layer is pushed again because the machine ran in between.
const PUSHES_MAX: usize = 3;

impl Switch {
    /// Does it, or what is left of it.
    pub(super) async fn execute(&self, work: Work<'_>) -> Result<StepReport, DriverError> {
        work.reached("qemu.switch.begin");
        let machine = match self.live {
            Some(live) => live::machine(work.context.state).await?.map(|monitor| (live, monitor)),
            None => None,
        };
        let stand = self.turn.stand_now()?;
        let mut beside = Beside::default();
        if let (Stand::Before, Some((live, monitor))) = (stand, machine) {
            beside = self.switch_under(work, live, monitor).await?;
        } else if let (Stand::Before, Some(_)) = (stand, &self.memory) {
            return Err(DriverError::from(no_memory()));
        } else if stand == Stand::Before {
            for fresh in &self.fresh {
                fresh.make(work).await?;
            }
            work.reached("qemu.switch.prepared");
            // Before it has taken effect there is no waiting for a machine that was started: it goes back.
            let locks = self.prepare_and_lock(work).await.map_err(|error| match error.class {
                ErrorClass::Busy => DriverError { class: ErrorClass::Permanent, ..error },
                _ => error,
            })?;
            match &self.next {
                None => self.write_generation(work).await?,
                // Starting takes longer than all the rest, and does not need the generation.
                Some(next) => {
                    let (started, written) =
                        tokio::join!(next.start_beside(work), self.write_generation(work));
                    started.and(written)?;
                }
            }
            work.reached("qemu.switch.locked");
            self.turn.switch()?;
            // A machine that starts before the rename is on disk could lose to a power cut what it wrote.
            let synced = sync(&self.turn.layers).await;
            drop(locks);
            synced.map_err(in_effect)?;
        }
        work.reached("qemu.switch.renamed");
        let mut report = self.finish(work).await.map_err(in_effect)?;
        if let Some(learnt) = report.learnt.as_object_mut() {
            if let Some(quiesced) = beside.quiesced {
                learnt.insert("quiesced".to_owned(), serde_json::json!(quiesced));
            }
            if let Some(left_out) = beside.left_out {
                learnt.insert("left_out".to_owned(), serde_json::json!(left_out));
            }
            if let Some(memory) = beside.memory {
                learnt.insert("memory".to_owned(), serde_json::json!(memory));
                if let Some(failed) = memory.failed {
                    learnt.insert("failed".to_owned(), serde_json::json!(failed));
                }
            }
        }
        Ok(report)
    }

    /// What comes after the rename; it may be done any number of times.
    async fn finish(&self, work: Work<'_>) -> Result<StepReport, DriverError> {
        for frozen in &self.freeze {
            set_mode(&frozen.file, frozen.mode & !WRITE_BITS)?;
        }
        for push in self.push.iter().filter(|push| push.writer == Writer::Machine) {
            set_mode(&push.into_file, push.into_mode)?;
        }
        self.turn.finish().await?;
        if let Some(live) = self.live
            && let Some(mut monitor) = live::machine(work.context.state).await?
        {
            self.go_on(work, &mut monitor, live).await?;
            self.thaw_left(work).await?;
        }
        self.turn.unmark_frozen()?;
        work.reached("qemu.switch.done");
        Ok(self.report(work.context, &|path| stamp_of(path).ok())?)
    }

    /// What the log records when it is done.
    pub(super) fn report(
        &self,
        context: &StepContext<'_>,
        stamp_of: StampOf<'_>,
    ) -> Result<StepReport, Failure> {
        let learnt = match context.request {
            Request::Create(_) => {
                let learnt = Learnt {
                    taken: Some(context.now),
                    state: Some(match self.live {
                        Some(Live { was: Run::Running, .. }) if self.memory.is_some() => {
                            SnapshotState::Running
                        }
                        Some(_) if self.memory.is_some() => SnapshotState::Paused,
                        Some(_) => SnapshotState::DiskSnapshot,
                        None => SnapshotState::Shutoff,
                    }),
                    left_out: self.left_out.clone(),
                    ..Learnt::default()
                };
                serde_json::to_value(learnt)
                    .map_err(|error| Failure::new(Code::Io, format!("a time cannot be written: {error}")))?
            }
            _ => serde_json::Value::Null,
        };
        Ok(StepReport { changes: self.changes(stamp_of)?, learnt })
    }

    /// Why a snapshot is refused that would not hold all that the machine writes.
    pub(super) const fn not_held(&self) -> &'static str {
        match self.memory {
            Some(_) => "a snapshot with memory has to hold all of it",
            None => "the snapshot would not hold it, and qemu.left-out-disks says to refuse it then",
        }
    }

    /// Brings all content to where it shall be, and ends with locks on what nobody may write until the rename.
    async fn prepare_and_lock(&self, work: Work<'_>) -> Result<QemuLocks, DriverError> {
        for restack in &self.restack {
            restack.to(work, &restack.onto_file).await?;
        }
        let active: Vec<&Push> = self.push.iter().filter(|push| push.writer == Writer::Machine).collect();
        for _ in 0..PUSHES_MAX {
            let mut before = Vec::new();
            for push in &active {
                before.push((*push, stamp_of(&push.from_file)?));
                push.run(work).await?;
            }
            // qemu-img cannot work on a file that is locked, so the locks come after it, and tell whether the
            // machine ran in between.
            let locks = QemuLocks::take(self.guarded())?;
            let mut all_copied = true;
            for (push, stamp) in before {
                let untouched = stamp_of(&push.from_file)? == stamp;
                all_copied &= untouched || push.is_copied(work).await?;
            }
            if all_copied {
                self.check_guards(&locks)?;
                return Ok(locks);
            }
        }
        Err(DriverError::permanent(
            Code::InUse,
            "the machine was started again and again while its layer was pushed",
        ))
    }

    /// What nobody may write until the rename. For a machine that was off when its time came there was no guard planned.
    fn guarded(&self) -> impl Iterator<Item = &Path> {
        let frozen = self.freeze.iter().map(|frozen| &frozen.file);
        let pushed =
            self.push.iter().filter(|push| push.writer == Writer::Machine).map(|push| &push.from_file);
        let written = frozen.chain(pushed).filter(|_| self.live.is_some());
        self.guard.iter().map(|guard| &guard.file).chain(written).map(|file| file.as_path())
    }

    fn check_guards(&self, locks: &QemuLocks) -> Result<(), DriverError> {
        debug_assert_eq!(locks.files().count(), self.guarded().count());
        for guard in &self.guard {
            if !guard.expect.holds(stamp_of(&guard.file)?) {
                return Err(written_meanwhile(&guard.file).into());
            }
        }
        Ok(())
    }

    pub(super) async fn write_generation(&self, work: Work<'_>) -> Result<(), DriverError> {
        let after = self.graph_after(&work.context.state.layers)?;
        let effect = match work.context.request {
            Request::Create(_) if self.memory.is_some() => Effect::Remains,
            Request::Create(_) | Request::Revert(_) | Request::Delete(_) => Effect::Request,
            Request::Edit(_) | Request::Merge(_) | Request::Unregister(_) => Effect::None,
        };
        self.turn.prepare(&links(&after), &work.manifest(&after, effect)?).await
    }

    /// The layer graph once it is switched and what the operation gives up is unlinked.
    fn graph_after(&self, now: &LayerGraph) -> Result<LayerGraph, Failure> {
        // Stamps play no part in a manifest.
        let no_stamp = |_: &Path| Some(FileStamp { inode: 0, size_bytes: 0, mtime_ns: 0 });
        let mut after = now.clone();
        self.changes(&no_stamp)?.iter().for_each(|change| after.apply(change));
        for (disk, layer) in &self.gone {
            after.apply(&LayerChange::Dropped { disk: disk.clone(), layer: layer.clone() });
        }
        Ok(after)
    }

    /// Takes back what was prepared.
    pub(super) async fn undo(&self, work: Work<'_>) -> Result<StepReport, DriverError> {
        let current = generation::current(&self.turn.layers)?;
        match self.turn.stand(current.as_deref()) {
            Stand::Before => {}
            Stand::Switched => {
                return Err(DriverError::permanent(
                    Code::Invalid,
                    "the switch has taken effect, and can only be finished",
                ));
            }
            // Another operation went on beside this one while it was stuck before its switch.
            Stand::Elsewhere if current == work.context.state.layers.generation => {}
            Stand::Elsewhere => return Err(self.turn.elsewhere(current.as_deref())),
        }
        if let Some(live) = self.live
            && let Some(monitor) = live::machine(work.context.state).await?
        {
            self.undo_under(work, live, monitor).await?;
        }
        if let Some(next) = &self.next {
            next.end().await?;
        }
        if let Some(memory) = &self.memory {
            remove(&memory.file)?;
        }
        for fresh in &self.fresh {
            remove(&fresh.draft())?;
            if !fresh.is_known(&work.context.state.layers) {
                remove(&fresh.file)?;
            }
        }
        work.reached("qemu.switch.undo.removed");
        let mut changes = Vec::new();
        for restack in &self.restack {
            restack.to(work, &restack.old_file).await?;
            if restack.writer == Writer::Nobody {
                changes.push(LayerChange::Stamped {
                    disk: restack.disk.clone(),
                    layer: restack.layer.clone(),
                    stamp: stamp_of(&restack.file)?,
                });
            }
        }
        for push in self.push.iter().filter(|push| push.writer == Writer::Machine) {
            changes.extend(push.take_back().await?);
        }
        work.reached("qemu.switch.undo.restacked");
        self.turn.discard()?;
        if self.turn.layers.is_dir() {
            sync(&self.turn.layers).await?;
        }
        Ok(StepReport { changes, learnt: serde_json::Value::Null })
    }
}

/// The switch has taken effect: whatever fails after it, the step is not to be taken back but finished.
fn in_effect(error: DriverError) -> DriverError {
    DriverError { class: ErrorClass::Unknown, ..error }
}

/// The refusal of memory of a machine that has none.
pub(super) fn no_memory() -> Failure {
    Failure::new(Code::Invalid, "the machine is off, and has no memory to keep").hint("leave out --memory")
}

/// The refusal of an image that was written between planning and switch.
pub(super) fn written_meanwhile(file: &Path) -> Failure {
    Failure::new(
        Code::InUse,
        format!("image {} was written since this was planned: the machine ran meanwhile", file.display()),
    )
    .hint("shut the machine down and try again")
}

impl Fresh {
    fn is_known(&self, graph: &LayerGraph) -> bool {
        graph.disks.get(&self.disk).is_some_and(|disk| disk.layers.contains_key(&self.layer))
    }

    /// Makes the overlay. One that is there was begun by this very step: its name carries the operation, and nothing
    /// uses it before the switch.
    pub(super) async fn make(&self, work: Work<'_>) -> Result<(), DriverError> {
        if self.is_known(&work.context.state.layers) {
            return Err(DriverError::permanent(
                Code::Exists,
                format!("layer {} is already in the log", self.layer),
            ));
        }
        let draft = self.draft();
        remove(&draft)?;
        remove(&self.file)?;
        // qemu-img would wipe whatever is there; so the file is ours before qemu-img sees its name.
        files::make_private(&draft)?;
        work.img.create(work.lock, &draft, &self.on_file, self.virtual_size_bytes, None).await?;
        let (facts, _, _) = files::facts(&draft).map_err(|error| unreadable(&draft, &error))?;
        if facts.backing.as_ref() != Some(&self.on_file)
            || facts.virtual_size_bytes != self.virtual_size_bytes
        {
            return Err(DriverError::permanent(
                Code::BadImage,
                format!("qemu-img made {} otherwise than it was told to", draft.display()),
            ));
        }
        files::dress(&draft, &self.on_file, self.mode)?;
        sync(&draft).await?;
        // A rename could replace a file, a link cannot.
        fs::hard_link(&draft, &self.file).doing("make", &self.file)?;
        remove(&draft)?;
        Ok(())
    }
}

impl Restack {
    /// Puts the layer upon `parent` by its header alone; both parents read the same.
    async fn to(&self, work: Work<'_>, parent: &Path) -> Result<(), DriverError> {
        let name = backing_name(&self.file)?;
        if name.as_deref() != Some(parent) {
            if ![&self.old_file, &self.onto_file].iter().any(|known| name.as_ref() == Some(known)) {
                return Err(DriverError::permanent(
                    Code::Drift,
                    format!("{} is not built upon {} any more", self.file.display(), self.old_file.display()),
                ));
            }
            if if_there(fs::metadata(parent)).doing("look at", parent)?.is_none() {
                return Err(DriverError::permanent(Code::Drift, format!("{} is missing", parent.display())));
            }
            set_mode(&self.file, self.mode)?;
            let rebased = work.img.rebase_header(work.lock, &self.file, parent, "qcow2").await;
            self.close()?;
            rebased?;
            sync(&self.file).await?;
        }
        self.close()
    }

    /// Takes the write bits away again from a layer that nobody writes.
    fn close(&self) -> Result<(), DriverError> {
        match self.writer {
            Writer::Machine => Ok(()),
            Writer::Nobody => set_mode(&self.file, self.mode & !WRITE_BITS),
        }
    }
}
