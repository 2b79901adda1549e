//! Folding tombstones away: pull, push, and the unlinking of what is left.
//!
//! A header never proves a merge. A pull that was cut off is put back upon its old parent, which still stands, and
//! run again; a push is run again, since what it writes is masked by the layer that it copies from.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use snaptree_engine::driver::{DriverError, StepReport};
use snaptree_engine::layer::{FileStamp, LayerChange};
use snaptree_engine::operation::Code;

use super::adopt::{Work, backing_name, unreadable};
use super::bitmaps;
use super::config::QemuConfig;
use super::files::{self, Doing, WRITE_BITS, folder_of, if_there, remove, set_mode, stamp_of, sync};
use super::img::IsThere;
use super::live::{self, Monitor};
use super::lock::{check_unused, check_unused_soon};
use super::observe::scan_folders;
use super::step::{DropLayers, Dropped, Pull, Push, Under, Writer};

impl Under {
    /// The machine, where it may have the layers open.
    async fn machine(self, work: Work<'_>) -> Result<Option<Monitor>, DriverError> {
        match self {
            Self::Nobody => Ok(None),
            Self::Guest => live::machine(work.context.state).await,
        }
    }
}

impl Pull {
    /// Does it; after an interruption it begins anew.
    pub(super) async fn execute(&self, work: Work<'_>) -> Result<StepReport, DriverError> {
        work.reached("qemu.pull.begin");
        if let Some(mut monitor) = self.under.machine(work).await?
            && let Some(report) = self.execute_under(work, &mut monitor).await?
        {
            return Ok(report);
        }
        check_unused(&self.file)?;
        for (file, planned) in &self.below {
            if stamp_of(file)? != *planned {
                return Err(DriverError::permanent(
                    Code::Drift,
                    format!("layer {} was changed since this was planned", file.display()),
                ));
            }
        }
        set_mode(&self.file, self.mode)?;
        let pulled = self.run(work).await;
        self.close()?;
        pulled?;
        sync(&self.file).await?;
        sync(&folder_of(&self.file)).await?;
        work.reached("qemu.pull.done");
        Ok(self.report(&self.onto, stamp_of(&self.file)?))
    }

    async fn run(&self, work: Work<'_>) -> Result<(), DriverError> {
        self.to_old_parent(work).await?;
        work.reached("qemu.pull.started");
        work.img.pull(work.lock, &self.file, &self.onto_file, work.context.into()).await?;
        sync(&self.file).await?;
        work.reached("qemu.pull.copied");
        work.img.rebase_header(work.lock, &self.file, &self.onto_file, "qcow2").await?;
        if backing_name(&self.file)?.as_ref() != Some(&self.onto_file) {
            return Err(DriverError::permanent(
                Code::BadImage,
                format!("qemu-img did not put {} upon {}", self.file.display(), self.onto_file.display()),
            ));
        }
        work.reached("qemu.pull.pulled");
        Ok(())
    }

    /// The header back to the old parent: the layer then reads as before, however far the pull had come.
    async fn to_old_parent(&self, work: Work<'_>) -> Result<(), DriverError> {
        let name = backing_name(&self.file)?;
        if name.as_ref() == Some(&self.from_file) {
            return Ok(());
        }
        if name.as_ref() != Some(&self.onto_file) {
            return Err(DriverError::permanent(
                Code::Drift,
                format!("{} is built upon a file that Snaptree did not put it upon", self.file.display()),
            ));
        }
        if if_there(fs::metadata(&self.from_file)).doing("look at", &self.from_file)?.is_none() {
            return Err(DriverError::permanent(
                Code::Drift,
                format!("{} is missing", self.from_file.display()),
            ));
        }
        work.img.rebase_header(work.lock, &self.file, &self.from_file, "qcow2").await
    }

    pub(super) fn close(&self) -> Result<(), DriverError> {
        match self.writer {
            Writer::Machine => Ok(()),
            Writer::Nobody => set_mode(&self.file, self.mode & !WRITE_BITS),
        }
    }

    pub(super) fn report(&self, parent: &snaptree_engine::LayerId, stamp: FileStamp) -> StepReport {
        StepReport { changes: vec![self.rebased(parent, stamp)], learnt: serde_json::Value::Null }
    }

    /// Puts the layer back; the data that it took already masks the same data below.
    pub(super) async fn undo(&self, work: Work<'_>) -> Result<StepReport, DriverError> {
        if let Some(mut monitor) = self.under.machine(work).await?
            && let Some(report) = self.undo_under(work, &mut monitor).await?
        {
            return Ok(report);
        }
        check_unused(&self.file)?;
        set_mode(&self.file, self.mode)?;
        let put_back = self.to_old_parent(work).await;
        self.close()?;
        put_back?;
        sync(&self.file).await?;
        Ok(self.report(&self.from, stamp_of(&self.file)?))
    }
}

impl Push {
    /// Does it as a step of its own: `from` is frozen.
    pub(super) async fn execute(&self, work: Work<'_>) -> Result<StepReport, DriverError> {
        if let Some(mut monitor) = self.under.machine(work).await?
            && let Some(report) = self.execute_under(work, &mut monitor).await?
        {
            return Ok(report);
        }
        self.run(work).await?;
        Ok(self.report()?)
    }

    pub(super) fn report(&self) -> Result<StepReport, snaptree_engine::operation::Failure> {
        let changes = self.stamped(&|path| stamp_of(path).ok())?;
        Ok(StepReport { changes, learnt: serde_json::Value::Null })
    }

    /// Copies `from` and what is between down into `into`, and syncs it.
    pub(super) async fn run(&self, work: Work<'_>) -> Result<(), DriverError> {
        work.reached("qemu.push.begin");
        self.check(work, Under::Nobody)?;
        set_mode(&self.into_file, self.into_mode)?;
        set_mode(&self.from_file, self.from_mode)?;
        let pushed = self.commit(work).await;
        self.close()?;
        pushed?;
        self.check_grown()?;
        work.reached("qemu.push.pushed");
        sync(&self.into_file).await?;
        sync(&folder_of(&self.into_file)).await?;
        work.reached("qemu.push.done");
        Ok(())
    }

    /// What is written down into `into` is marked in its own bitmaps by that; those of the layers that go are merged into
    /// it. Done again it comes to the same.
    async fn commit(&self, work: Work<'_>) -> Result<(), DriverError> {
        mend(work, &self.into_file).await?;
        work.img.commit(work.lock, &self.from_file, &self.into_file, work.context.into()).await?;
        for file in self.between.iter().chain([&self.from_file]) {
            let read = |path: &Path| bitmaps::read(path).map_err(|error| unreadable(path, &error));
            for bitmap in read(file)? {
                let there = read(&self.into_file)?.into_iter().find(|there| there.name == bitmap.name);
                if bitmap.in_use || there.as_ref().is_some_and(|there| there.in_use) {
                    tracing::warn!(file = %file.display(), bitmap.name, "QEMU uses this dirty bitmap no more");
                    continue;
                }
                let is_there = if there.is_some() { IsThere::Yes } else { IsThere::No };
                let from = (file.as_path(), &bitmap);
                work.img.merge_bitmap(work.lock, from, &self.into_file, is_there).await?;
                work.reached("qemu.push.bitmap");
            }
        }
        Ok(())
    }

    /// Whether all of `from` is in `into`, though `from` was written since a stamp of it was taken: QEMU marks the dirty
    /// bitmaps of a layer that it opens.
    pub(super) async fn is_copied(&self, work: Work<'_>) -> Result<bool, DriverError> {
        let bitmaps = bitmaps::read(&self.from_file).map_err(|error| unreadable(&self.from_file, &error))?;
        if bitmaps.is_empty() {
            return Ok(false);
        }
        let (from, into) = ((self.from_file.as_path(), "qcow2"), (self.into_file.as_path(), "qcow2"));
        Ok(work.img.compare(Some(work.lock), from, into).await.is_ok())
    }

    /// `into` is what the disk was until now only if it has its size, too.
    pub(super) fn check_grown(&self) -> Result<(), DriverError> {
        let (facts, _, _) =
            files::facts(&self.into_file).map_err(|error| unreadable(&self.into_file, &error))?;
        if facts.virtual_size_bytes == self.virtual_size_bytes {
            return Ok(());
        }
        Err(DriverError::permanent(
            Code::BadImage,
            format!("{} was not grown to the size of what was pushed into it", self.into_file.display()),
        ))
    }

    /// What must be so at the last moment before a file with a dependant is written.
    pub(super) fn check(&self, work: Work<'_>, under: Under) -> Result<(), DriverError> {
        if under == Under::Nobody {
            check_unused(&self.from_file)?;
            check_unused(&self.into_file)?;
        }
        for file in [&self.into_file, &self.from_file].into_iter().chain(&self.between) {
            let (facts, _, header) = files::facts(file).map_err(|error| unreadable(file, &error))?;
            if under == Under::Guest && *file == self.into_file && header.is_dirty {
                return Err(DriverError::permanent(
                    Code::Unsupported,
                    format!("{} was not closed by who wrote it last, and QEMU would write into what is in use of it", file.display()),
                )
                .hint("it is merged once the machine is off"));
            }
            // One that is smaller is grown by the push, or was by one that was cut off; a larger one would keep a tail
            // that nobody wrote.
            let is_as_planned = match file == &self.from_file {
                true => facts.virtual_size_bytes == self.virtual_size_bytes,
                false => facts.virtual_size_bytes <= self.virtual_size_bytes,
            };
            if !is_as_planned {
                return Err(DriverError::permanent(
                    Code::Drift,
                    format!("{} was resized since this was planned", file.display()),
                ));
            }
        }
        // The chain from `from` down to `into` must be the planned one, and the only one.
        let dependants = dependants(work, self.between.iter().chain([&self.into_file]))?;
        let mut below = &self.into_file;
        // A push under the running machine that was cut off may have put these upon `into` already.
        let stacked = self.stacked(work);
        for above in self.between.iter().chain([&self.from_file]) {
            let found = dependants.get(below).map(Vec::as_slice).unwrap_or_default();
            let others = found.iter().filter(|file| *file != above);
            let mut strangers = others.filter(|file| stacked.iter().all(|(known, _)| known != *file));
            let stranger = strangers.next();
            if stranger.is_some() || !found.contains(above) {
                let other = stranger.unwrap_or(above);
                return Err(DriverError::permanent(
                    Code::Drift,
                    format!(
                        "{} is to be pushed into {}, and {} stands in the way",
                        above.display(),
                        below.display(),
                        other.display()
                    ),
                )
                .hint("a file that Snaptree does not know must not be built upon a layer"));
            }
            below = above;
        }
        Ok(())
    }

    pub(super) fn close(&self) -> Result<(), DriverError> {
        set_mode(&self.into_file, self.into_mode & !WRITE_BITS)?;
        match self.writer {
            Writer::Machine => Ok(()),
            Writer::Nobody => set_mode(&self.from_file, self.from_mode & !WRITE_BITS),
        }
    }

    /// There is nothing to copy back: what was written is masked by `from`, its only reader.
    pub(super) async fn take_back(&self) -> Result<Vec<LayerChange>, DriverError> {
        self.close()?;
        sync(&self.into_file).await?;
        Ok(self.stamped(&|path| stamp_of(path).ok())?)
    }

    /// The same, as a step's undo.
    pub(super) async fn undo(&self, work: Work<'_>) -> Result<StepReport, DriverError> {
        if let Some(mut monitor) = self.under.machine(work).await? {
            self.undo_under(work, &mut monitor).await?;
        }
        Ok(StepReport { changes: self.take_back().await?, learnt: serde_json::Value::Null })
    }
}

impl DropLayers {
    /// Unlinks; what is gone already is fine.
    pub(super) async fn execute(&self, work: Work<'_>) -> Result<StepReport, DriverError> {
        work.reached("qemu.drop.begin");
        self.close_nodes(work).await;
        for dropped in &self.drop {
            self.check(work, dropped).await?;
        }
        let leaving: Vec<&PathBuf> = self.drop.iter().map(|dropped| &dropped.file).collect();
        let dependants = dependants(work, leaving.iter().copied())?;
        if let Some((file, above)) = dependants
            .iter()
            .find_map(|(file, above)| Some((file, above.iter().find(|path| !leaving.contains(path))?)))
        {
            return Err(DriverError::permanent(
                Code::Drift,
                format!("{} is built upon {}, which is to be removed", above.display(), file.display()),
            ));
        }
        work.reached("qemu.drop.checked");
        for file in self.files() {
            remove(file)?;
            work.reached("qemu.drop.unlinked");
        }
        sync(&self.layers).await?;
        work.reached("qemu.drop.done");
        Ok(StepReport { changes: self.changes(), learnt: serde_json::Value::Null })
    }

    /// A running machine may still have open what it does not need any more. It does no harm but to the space that
    /// the files take, so what stands in the way is no reason to stop.
    async fn close_nodes(&self, work: Work<'_>) {
        let Ok(Some(mut monitor)) = live::machine(work.context.state).await else { return };
        // A machine that was started on its registered paths knows what it wrote by those, until it is merged away.
        let Ok((_, config)) = QemuConfig::of(work.context.state) else { return };
        let files = |file: &Path| {
            self.drop.iter().any(|dropped| dropped.file == file)
                || config.disks.values().any(|disk| disk.given == file || disk.resolved == file)
        };
        if let Err(error) = monitor.close_files(files).await {
            tracing::warn!(%error, "QEMU keeps a removed layer open");
        }
    }

    /// Only a layer of the log that is not the registered image, and only the very file, is ever unlinked.
    async fn check(&self, work: Work<'_>, dropped: &Dropped) -> Result<(), DriverError> {
        let layers = work.context.state.layers.disks.get(&dropped.disk);
        let layer = layers.and_then(|disk| disk.layers.get(&dropped.layer));
        let wrong = |why: &str| {
            DriverError::permanent(Code::Drift, format!("{} is not removed: {why}", dropped.file.display()))
        };
        if let Some(layer) = layer {
            if layer.registered || layer.file != dropped.file {
                return Err(wrong("it is the registered image"));
            }
            if layers.and_then(|disk| disk.active.as_ref()) == Some(&dropped.layer) {
                return Err(wrong("the machine's current disk is in it"));
            }
        }
        match if_there(fs::symlink_metadata(&dropped.file)).doing("look at", &dropped.file)? {
            Some(found) if found.ino() != dropped.inode => Err(wrong("it is another file than it was")),
            Some(_) => check_unused_soon(&dropped.file).await,
            None => Ok(()),
        }
    }
}

/// Mends an image that nobody closed, before it is written as what something else is built upon: QEMU mends only what it
/// opens for writing from the start (seen).
pub(super) async fn mend(work: Work<'_>, file: &Path) -> Result<(), DriverError> {
    let (_, _, header) = files::facts(file).map_err(|error| unreadable(file, &error))?;
    if header.is_dirty { work.img.mend(Some(work.lock), file).await } else { Ok(()) }
}

/// The files that are built directly upon `files`, by the headers in the layers folder and beside the registered
/// images.
fn dependants<'a>(
    work: Work<'_>,
    files: impl Iterator<Item = &'a PathBuf>,
) -> Result<BTreeMap<PathBuf, Vec<PathBuf>>, DriverError> {
    let (_, config) = QemuConfig::of(work.context.state)?;
    let files: Vec<&Path> = files.map(PathBuf::as_path).collect();
    let known = work.context.state.layers.disks.values().flat_map(|disk| disk.layers.values());
    let known: Vec<&Path> = known.map(|layer| layer.file.as_path()).collect();
    scan_folders(&config, &files, &known)
}
