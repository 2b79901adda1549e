//! Letting go of a domain: plain images come back to the registered paths, and all that Snaptree made goes.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use snaptree_engine::driver::{DriverError, ErrorClass, Learnt, StepReport};
use snaptree_engine::operation::Code;

use super::adopt::{Work, backing_name, remove_if_empty, unreadable};
use super::config::active;
use super::files::{self, Doing, folder_of, if_there, remove, set_mode, stamp_of, sync};
use super::generation::{is_name, remove_folder};
use super::lock::{QemuLocks, check_unused, writer};
use super::merge::mend;
use super::observe::names;
use super::qcow2::Backing;
use super::step::{Clean, Flatten, Fold, Place, Placed};
use super::switch::written_meanwhile;

impl Flatten {
    /// Makes the plain image, anew if one was begun.
    pub(super) async fn execute(&self, work: Work<'_>) -> Result<StepReport, DriverError> {
        work.reached("qemu.flatten.begin");
        self.check_source()?;
        remove(&self.into)?;
        files::make_private(&self.into)?;
        match &self.own_backing {
            None => self.copy(work).await?,
            Some(_) => self.copy_upon_base(work).await?,
        }
        work.reached("qemu.flatten.copied");
        work.img.compare(Some(work.lock), (&self.from, "qcow2"), (&self.into, "qcow2")).await?;
        self.check_source()?;
        files::dress(&self.into, &self.from, self.mode)?;
        sync(&self.into).await?;
        sync(&folder_of(&self.into)).await?;
        work.reached("qemu.flatten.done");
        Ok(StepReport::default())
    }

    fn check_source(&self) -> Result<(), DriverError> {
        check_unused(&self.from)?;
        if stamp_of(&self.from)? == self.stamp { Ok(()) } else { Err(written_meanwhile(&self.from).into()) }
    }

    async fn copy(&self, work: Work<'_>) -> Result<(), DriverError> {
        let from = (self.from.as_path(), "qcow2");
        work.img.convert(Some(work.lock), from, &self.into, self.format, work.context.into()).await
    }

    /// Takes only what differs from the registered image's own base. `convert -B` would not do: it looks at the
    /// highest layer alone and leaves out those between (seen).
    async fn copy_upon_base(&self, work: Work<'_>) -> Result<(), DriverError> {
        let Some(base) = &self.own_backing else { return Ok(()) };
        let format = base.format.as_deref().unwrap_or("qcow2");
        work.img.create(work.lock, &self.into, &self.from, self.virtual_size_bytes, self.format).await?;
        // Nobody reads the copy before it is whole.
        work.img.rebase(work.lock, &self.into, (&base.name, format), None, work.context.into()).await
    }

    /// Removes the copy.
    pub(super) async fn undo(&self) -> Result<StepReport, DriverError> {
        if remove(&self.into)? {
            sync(&folder_of(&self.into)).await?;
        }
        Ok(StepReport::default())
    }
}

impl Fold {
    /// Does it, as often as it is asked: what is written is masked by the layer that it comes from.
    pub(super) async fn execute(&self, work: Work<'_>) -> Result<StepReport, DriverError> {
        work.reached("qemu.fold.begin");
        check_unused(&self.from)?;
        check_unused(&self.into)?;
        set_mode(&self.into, self.mode)?;
        set_mode(&self.from, self.mode)?;
        mend(work, &self.into).await?;
        work.img.commit(work.lock, &self.from, &self.into, work.context.into()).await?;
        work.reached("qemu.fold.copied");
        sync(&self.into).await?;
        self.compare(work).await?;
        work.reached("qemu.fold.done");
        Ok(StepReport::default())
    }

    async fn compare(&self, work: Work<'_>) -> Result<(), DriverError> {
        work.img.compare(Some(work.lock), (&self.from, "qcow2"), (&self.into, "qcow2")).await
    }
}

impl Placed {
    /// Whether nobody wrote the active layer since its content was copied. One that is put there itself has all that was
    /// written into it, and is written by a step before this one where it has snapshots inside.
    async fn is_current(&self, work: Work<'_>) -> Result<bool, DriverError> {
        if self.active == self.file || stamp_of(&self.active)? == self.stamp {
            return Ok(true);
        }
        // QEMU marks dirty bitmaps in a layer that it opens.
        match &self.folded {
            Some(fold) => Ok(fold.compare(work).await.is_ok()),
            None => Ok(false),
        }
    }
}

impl Place {
    /// Puts the plain images at the registered paths. From the first one on the step is only finished.
    pub(super) async fn execute(&self, work: Work<'_>) -> Result<StepReport, DriverError> {
        work.reached("qemu.place.begin");
        let waiting: Vec<&Placed> = self.waiting()?;
        let begun = waiting.len() < self.disks.len();
        let placed = self.place(work, &waiting).await;
        // Taken back it cannot be any more: some paths open plain images already.
        placed
            .map_err(|error| if begun { DriverError { class: ErrorClass::Unknown, ..error } } else { error })
    }

    async fn place(&self, work: Work<'_>, waiting: &[&Placed]) -> Result<StepReport, DriverError> {
        for placed in waiting {
            // A machine that was started since has written where all is masked from: it is brought down once more.
            if let (Some(fold), false) = (&placed.folded, placed.is_current(work).await?) {
                fold.execute(work).await?;
            }
        }
        let locks = QemuLocks::take(waiting.iter().map(|placed| placed.active.as_path()))?;
        for placed in waiting {
            if !placed.is_current(work).await? {
                return Err(written_meanwhile(&placed.active).into());
            }
            let (facts, _, _) =
                files::facts(&placed.file).map_err(|error| unreadable(&placed.file, &error))?;
            if placed.inode.is_some_and(|inode| inode != facts.stamp.inode) {
                return Err(written_meanwhile(&placed.file).into());
            }
        }
        work.reached("qemu.place.locked");
        for placed in waiting {
            set_mode(&placed.file, placed.mode)?;
            fs::rename(&placed.file, &placed.resolved).doing("put the image back to", &placed.resolved)?;
            work.reached("qemu.place.renamed");
            sync(&folder_of(&placed.resolved)).await?;
        }
        drop(locks);
        work.reached("qemu.place.done");
        Ok(StepReport::default())
    }

    /// The disks whose image is not in its place yet.
    fn waiting(&self) -> Result<Vec<&Placed>, DriverError> {
        let mut waiting = Vec::new();
        for placed in &self.disks {
            if if_there(fs::symlink_metadata(&placed.file)).doing("look at", &placed.file)?.is_some() {
                waiting.push(placed);
            }
        }
        Ok(waiting)
    }

    /// Nothing was placed yet, or it cannot be taken back.
    pub(super) fn undo(&self) -> Result<StepReport, DriverError> {
        if self.waiting()?.len() == self.disks.len() {
            return Ok(StepReport::default());
        }
        Err(DriverError::permanent(
            Code::Invalid,
            "plain images are in place already, and it can only be finished",
        ))
    }
}

impl Clean {
    /// Removes links, generations and layers; what is gone already is fine.
    pub(super) async fn execute(&self, work: Work<'_>) -> Result<StepReport, DriverError> {
        work.reached("qemu.clean.begin");
        remove(&active(&self.layers))?;
        for name in names(&self.layers)?.iter().filter(|name| is_name(name)) {
            remove_folder(&self.layers, name)?;
        }
        for (_, _, file) in &self.drop {
            if !self.keep.contains(file) {
                remove(file)?;
                work.reached("qemu.clean.unlinked");
            }
        }
        for (_, file) in &self.memory {
            remove(file)?;
            work.reached("qemu.clean.unlinked");
        }
        let mut left = BTreeSet::new();
        if self.layers.is_dir() {
            sync(&self.layers).await?;
            remove_if_empty(&self.layers)?;
            left.extend(names(&self.layers)?.into_iter().map(|name| self.layers.join(name)));
        }
        for (image, backing) in &self.relative {
            name_relative(work, image, backing).await?;
        }
        work.reached("qemu.clean.done");
        let learnt = serde_json::to_value(Learnt { left, ..Learnt::default() }).unwrap_or_default();
        Ok(StepReport { changes: self.changes(), learnt })
    }
}

/// The image names what it is built upon as it did before it was adopted. While a machine has it open the absolute name
/// stays: it means the same.
async fn name_relative(work: Work<'_>, image: &Path, backing: &Backing) -> Result<(), DriverError> {
    let unused = writer(image).doing("ask for the locks of", image)?.is_none();
    let format = backing.format.as_deref().unwrap_or("qcow2");
    if unused && backing_name(image)? == Some(backing.file(image)) {
        work.img.rebase_header(work.lock, image, &backing.name, format).await?;
        sync(image).await?;
    }
    Ok(())
}
