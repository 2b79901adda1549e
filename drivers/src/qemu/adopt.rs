//! Adoption: a registered image becomes the first layer, and its path a link to what the machine shall open.
//!
//! ```text
//!  /vm/web.qcow2 (the image)
//!     link        .snaptree/<domain>/vda-<op>-base.qcow2   the same inode
//!     switch      .snaptree/<domain>/active -> gen-<op>-0/vda -> that file
//!     rename      /vm/web.qcow2 -> .snaptree/<domain>/active/vda
//! ```
//!
//! At every moment in between the path opens the same inode. Each action looks first whether it is done already.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use snaptree_engine::driver::{DriverError, ErrorClass, StepContext, StepReport};
use snaptree_engine::layer::{FileStamp, LayerChange};
use snaptree_engine::operation::Code;

use super::config::{PathWish, active};
use super::files::{self, Doing, beside, folder_of, if_there, remove, stamp, stamp_of, sync};
use super::generation::Stand;
use super::img::QemuImg;
use super::lock::{QemuLocks, check_unused, writer};
use super::manifest::{Effect, Manifest, links};
use super::step::{Adopt, OwnBacking, Turn, Under};
use crate::operation_lock::OperationLock;

/// What a step works with.
#[derive(Clone, Copy)]
pub(super) struct Work<'a> {
    pub(super) context: &'a StepContext<'a>,
    pub(super) img: &'a QemuImg,
    pub(super) lock: &'a OperationLock,
}

impl Work<'_> {
    pub(super) fn reached(&self, name: &str) {
        self.context.hooks.reached(name);
    }

    /// The manifest of the generation that this step makes.
    pub(super) fn manifest(
        &self,
        after: &snaptree_engine::layer::LayerGraph,
        effect: Effect,
    ) -> Result<Manifest, DriverError> {
        let Some(domain) = &self.context.state.domain else {
            return Err(DriverError::permanent(Code::NotFound, "the domain is not registered"));
        };
        Ok(Manifest::new(self.context, (domain.id, domain.name.clone()), after, effect))
    }
}

/// What is at a registered path.
enum AtPath {
    /// The image itself.
    Image,
    /// The link that adoption puts there.
    OurLink,
}

impl Adopt {
    /// Where the registered path leads once the image is adopted.
    pub(super) fn target(&self) -> PathBuf {
        active(&self.turn.layers).join(self.disk.as_str())
    }

    fn draft_link(&self, work: Work<'_>) -> PathBuf {
        beside(&self.resolved, &format!(".snaptree-{}-{}", work.context.operation, work.context.index))
    }

    fn at_path(&self) -> Result<AtPath, DriverError> {
        let path = &self.resolved;
        let metadata = fs::symlink_metadata(path).doing("look at", path)?;
        if metadata.is_file() && metadata.ino() == self.stamp.inode {
            return Ok(AtPath::Image);
        }
        if metadata.is_symlink() && fs::read_link(path).doing("read the link", path)? == self.target() {
            return Ok(AtPath::OurLink);
        }
        Err(DriverError::permanent(
            Code::Drift,
            format!(
                "{} is neither the image that was to be adopted nor a link of Snaptree's",
                path.display()
            ),
        ))
    }

    /// Does it, or what is left of it.
    pub(super) async fn execute(&self, work: Work<'_>) -> Result<StepReport, DriverError> {
        work.reached("qemu.adopt.begin");
        let mut locks = QemuLocks::default();
        if self.turn.stand_now()? == Stand::Before {
            self.mend(work).await?;
            self.make_own_backing_absolute(work).await?;
            self.link().await?;
            work.reached("qemu.adopt.linked");
            locks = self.lock()?;
            self.check_untouched(stamp_of(&self.file)?)?;
            self.prepare(work).await?;
            work.reached("qemu.adopt.locked");
            self.turn.switch()?;
            work.reached("qemu.adopt.switched");
        }
        if self.keep_path == PathWish::Follow {
            if let AtPath::Image = self.at_path()? {
                if locks.files().next().is_none() {
                    locks = self.lock()?;
                }
                self.check_same_inode()?;
                let draft = self.draft_link(work);
                remove(&draft)?;
                symlink(self.target(), &draft).doing("make the link", &draft)?;
                sync(&self.turn.layers).await?;
                fs::rename(&draft, &self.resolved).doing("put a link at", &self.resolved)?;
            }
            work.reached("qemu.adopt.renamed");
            sync(&folder_of(&self.resolved)).await?;
        }
        self.turn.finish().await?;
        drop(locks);
        work.reached("qemu.adopt.done");
        Ok(StepReport { changes: self.changes(), learnt: serde_json::Value::Null })
    }

    /// Keeps a machine from being started, unless one runs.
    fn lock(&self) -> Result<QemuLocks, DriverError> {
        match self.under {
            Under::Nobody => QemuLocks::take([self.file.as_path()]),
            Under::Guest => Ok(QemuLocks::default()),
        }
    }

    async fn mend(&self, work: Work<'_>) -> Result<(), DriverError> {
        if !self.unclosed {
            return Ok(());
        }
        check_unused(&self.resolved)?;
        work.img.mend(Some(work.lock), &self.resolved).await?;
        sync(&self.resolved).await
    }

    /// A relative backing name would be looked for in the layers folder.
    async fn make_own_backing_absolute(&self, work: Work<'_>) -> Result<(), DriverError> {
        let Some(own) = &self.own_backing else { return Ok(()) };
        check_unused(&self.resolved)?;
        let name = backing_name(&self.resolved)?;
        if name.as_ref() == Some(&own.old.name) {
            work.img.rebase_header(work.lock, &self.resolved, &own.absolute, own.format()).await?;
            sync(&self.resolved).await?;
        } else if name.as_ref() != Some(&own.absolute) {
            return Err(self.changed("it is built upon something else"));
        }
        Ok(())
    }

    async fn link(&self) -> Result<(), DriverError> {
        self.check_untouched(stamp_of(&self.resolved)?)?;
        files::make_folder(&self.turn.layers).await?;
        if self.file == self.resolved {
            return Ok(());
        }
        if if_there(fs::symlink_metadata(&self.file)).doing("look at", &self.file)?.is_none() {
            fs::hard_link(&self.resolved, &self.file).doing("link the image to", &self.file)?;
        }
        self.check_same_inode()?;
        sync(&self.turn.layers).await
    }

    fn check_same_inode(&self) -> Result<(), DriverError> {
        self.check_same_inode_as(stamp_of(&self.file)?)
    }

    fn check_same_inode_as(&self, found: FileStamp) -> Result<(), DriverError> {
        if found.inode == self.stamp.inode {
            return Ok(());
        }
        Err(DriverError::permanent(
            Code::Drift,
            format!("{} is not the image that was to be adopted", self.file.display()),
        ))
    }

    /// The image is as it was at planning; a rewritten header changes the time alone.
    fn check_untouched(&self, found: FileStamp) -> Result<(), DriverError> {
        if self.under == Under::Guest || self.unclosed {
            return self.check_same_inode_as(found);
        }
        let expected = FileStamp {
            mtime_ns: if self.own_backing.is_some() { found.mtime_ns } else { self.stamp.mtime_ns },
            ..self.stamp
        };
        if found == expected { Ok(()) } else { Err(self.changed("somebody wrote it")) }
    }

    fn changed(&self, how: &str) -> DriverError {
        DriverError::permanent(
            Code::InUse,
            format!("image {} is not as it was when this was planned: {how}", self.resolved.display()),
        )
        .hint("was the machine started meanwhile? Shut it down and try again")
    }

    async fn prepare(&self, work: Work<'_>) -> Result<(), DriverError> {
        let mut after = work.context.state.layers.clone();
        self.changes().iter().for_each(|change| after.apply(change));
        self.turn.prepare(&links(&after), &work.manifest(&after, Effect::None)?).await
    }

    /// Puts the image back at its path. Renaming does no harm to a machine that was started meanwhile: the inode
    /// that it has open is the one that the path names afterwards.
    pub(super) async fn undo(&self, work: Work<'_>) -> Result<StepReport, DriverError> {
        if self.keep_path == PathWish::Follow {
            self.put_back(work).await?;
        }
        work.reached("qemu.adopt.undo.back");
        self.restore_own_backing(work).await?;
        let mut before = work.context.state.layers.clone();
        let dropped = LayerChange::Dropped { disk: self.disk.clone(), layer: self.layer.clone() };
        before.apply(&dropped);
        if self.turn.stand_now()? == Stand::Switched {
            match &self.turn.previous {
                Some(previous) => {
                    let back = Turn {
                        layers: self.turn.layers.clone(),
                        previous: Some(self.turn.generation.clone()),
                        generation: previous.clone(),
                    };
                    back.prepare(&links(&before), &work.manifest(&before, Effect::None)?).await?;
                    back.switch()?;
                }
                None => {
                    remove(&active(&self.turn.layers))?;
                }
            }
            work.reached("qemu.adopt.undo.switched");
            sync(&self.turn.layers).await?;
        }
        self.turn.discard()?;
        work.reached("qemu.adopt.undo.discarded");
        remove_empty_folder(&self.turn.layers, self.turn.previous.as_deref())?;
        let known = work.context.state.layers.disks.get(&self.disk);
        let changes = if known.is_some_and(|disk| disk.layers.contains_key(&self.layer)) {
            vec![dropped, LayerChange::Switched { generation: self.turn.previous.clone() }]
        } else {
            Vec::new()
        };
        Ok(StepReport { changes, learnt: serde_json::Value::Null })
    }

    async fn put_back(&self, work: Work<'_>) -> Result<(), DriverError> {
        remove(&self.draft_link(work))?;
        match self.at_path()? {
            AtPath::OurLink => {
                self.check_same_inode()?;
                fs::rename(&self.file, &self.resolved).doing("put the image back to", &self.resolved)?;
            }
            // Both names are the same inode, and then a rename does nothing.
            AtPath::Image => {
                let linked = if_there(fs::symlink_metadata(&self.file)).doing("look at", &self.file)?;
                if linked.is_some_and(|linked| stamp(&linked).inode == self.stamp.inode) {
                    remove(&self.file)?;
                }
            }
        }
        sync(&folder_of(&self.resolved)).await?;
        if self.turn.layers.is_dir() { sync(&self.turn.layers).await } else { Ok(()) }
    }

    /// While a machine has the image open the absolute name stays: it means the same.
    async fn restore_own_backing(&self, work: Work<'_>) -> Result<(), DriverError> {
        let Some(own) = &self.own_backing else { return Ok(()) };
        let unused = writer(&self.resolved).doing("ask for the locks of", &self.resolved)?.is_none();
        if unused && backing_name(&self.resolved)?.as_ref() == Some(&own.absolute) {
            work.img.rebase_header(work.lock, &self.resolved, &own.old.name, own.format()).await?;
            sync(&self.resolved).await?;
        }
        Ok(())
    }
}

impl OwnBacking {
    fn format(&self) -> &str {
        self.old.format.as_deref().unwrap_or("qcow2")
    }
}

/// The backing name in an image's header, word for word.
pub(super) fn backing_name(path: &Path) -> Result<Option<PathBuf>, DriverError> {
    let (_, _, header) = files::facts(path).map_err(|error| unreadable(path, &error))?;
    Ok(header.backing.map(|backing| backing.name))
}

/// An image of ours that cannot be read.
pub(super) fn unreadable(path: &Path, error: &super::qcow2::ReadError) -> DriverError {
    DriverError::new(
        ErrorClass::Permanent,
        Code::BadImage,
        format!("image {} cannot be used: {error}", path.display()),
    )
}

/// Removes the layers folder if nothing was ever switched on in it and nothing is left.
fn remove_empty_folder(layers: &Path, previous: Option<&str>) -> Result<(), DriverError> {
    if previous.is_none() {
        remove_if_empty(layers)?;
    }
    Ok(())
}

/// Removes a layers folder that is empty, and the `.snaptree` around it if that is empty as well.
pub(super) fn remove_if_empty(layers: &Path) -> Result<(), DriverError> {
    let around = layers.parent().filter(|parent| parent.ends_with(files::LAYERS_FOLDER));
    for folder in [Some(layers), around].into_iter().flatten() {
        match if_there(fs::remove_dir(folder)) {
            Err(error) if error.kind() == std::io::ErrorKind::DirectoryNotEmpty => return Ok(()),
            removed => removed.doing("remove the folder", folder).map(|_| ())?,
        }
    }
    Ok(())
}
