//! A machine whose folder was moved: headers, links and manifest name its files where they are now.
//!
//! Until the log says so too, each of it is looked at first and changed only where it still names the old place, so that
//! a relocation that was cut off is simply carried out again.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use snaptree_engine::DiskName;
use snaptree_engine::claim::Claim;
use snaptree_engine::driver::{DriverError, Mending, Relocated};
use snaptree_engine::layer::{Layer, LayerGraph};
use snaptree_engine::operation::{Code, Failure};
use snaptree_engine::project::DomainState;

use super::config::{DiskPaths, PathWish, QemuConfig, active};
use super::files::{Doing, WRITE_BITS, facts, if_there, remove, set_mode, stamp_of, sync};
use super::folder::FolderLock;
use super::generation::{self, MANIFEST};
use super::img::QemuImg;
use super::kept;
use super::link;
use super::lock::check_unused;
use super::manifest::{Manifest, links};
use super::observe::{Entry, entry};
use super::probe::claims_with;
use super::qcow2::Backing;
use crate::operation_lock::OperationLock;

/// A move that was found to be one.
pub(super) struct Move {
    from: PathBuf,
    to: PathBuf,
    config: QemuConfig,
    /// With the files where they are now, and the stamps of before.
    layers: LayerGraph,
    headers: Vec<Header>,
    manifest: Option<Manifest>,
    claims: Vec<Claim>,
}

/// A layer's header that names what it is built upon.
struct Header {
    file: PathBuf,
    onto: PathBuf,
    format: String,
}

fn refused(message: String, hint: &str) -> DriverError {
    DriverError::from(Failure::new(Code::Drift, message).hint(hint).refused())
}

impl Move {
    /// Looks whether the machine's files are all there, as the log says that they were.
    pub(super) fn of(state: &DomainState, from: &Path, to: &Path) -> Result<Self, DriverError> {
        let (domain, config) = QemuConfig::of(state)?;
        let from = std::path::absolute(from).doing("make absolute", from)?;
        let to = fs::canonicalize(to).doing("resolve", to)?;
        let moved = |path: &Path| moved(path, &from, &to);
        if !config.layers.starts_with(&from) {
            let message = format!("the layers of '{}' are not in {}", domain.name, from.display());
            let hint =
                format!("they are in {}: give the folder above that was moved", config.layers.display());
            return Err(refused(message, &hint));
        }
        let switch = active(&config.layers);
        if if_there(fs::symlink_metadata(&switch)).doing("look at", &switch)?.is_some() {
            let message = format!("the machine is still in {}", config.layers.display());
            let hint = "a copy becomes a machine of its own by qemu-img convert -O qcow2, registered as a plain image";
            return Err(refused(message, hint));
        }
        let place = |(name, paths): (DiskName, DiskPaths)| {
            let bases = paths.bases.iter().map(|base| moved(base)).collect();
            let (given, resolved) = (moved(&paths.given), moved(&paths.resolved));
            (name, DiskPaths { given, resolved, bases, ..paths })
        };
        let disks = config.disks.into_iter().map(place).collect();
        let removed = config.removed.into_iter().map(place).collect();
        let config = QemuConfig { layers: moved(&config.layers), disks, removed, ..config };
        let mut layers = state.layers.clone();
        let files =
            layers.disks.values_mut().flat_map(|disk| disk.layers.values_mut()).map(|layer| &mut layer.file);
        for file in files.chain(layers.memory.values_mut().map(|memory| &mut memory.file)) {
            *file = moved(file);
        }
        let (headers, claims) = (Vec::new(), Vec::new());
        let mut this = Self { from, to, config, layers, headers, manifest: None, claims };
        this.check_generation(state)?;
        this.check_layers(state)?;
        this.claims = claims_with(&this.config, |disk, paths| this.opens(disk, paths))?;
        Ok(this)
    }

    /// The file that a disk opens: the link that leads there may still be the one of the old place.
    fn opens(&self, disk: &DiskName, paths: &DiskPaths) -> PathBuf {
        let layers = self.layers.disks.get(disk);
        let active = layers.and_then(|layers| layers.active_layer()).map(|(_, layer)| layer.file.clone());
        active.unwrap_or_else(|| paths.resolved.clone())
    }

    /// What will be done.
    pub(super) fn told(&self) -> Mending {
        let what = vec![format!(
            "look after the machine in {} instead of {}: its {} layers name one another there, and so do links, manifest \
             and log",
            self.to.display(),
            self.from.display(),
            self.layers.files().count()
        )];
        Mending { what, claims: self.claims.clone() }
    }

    fn check_generation(&mut self, state: &DomainState) -> Result<(), DriverError> {
        let layers = &self.config.layers;
        let current = generation::current(layers)?;
        if current != state.layers.generation {
            return Err(generation::elsewhere(
                layers,
                current.as_deref(),
                state.layers.generation.as_deref(),
            ));
        }
        self.manifest = kept::read(layers)?.map(|(_, manifest)| manifest);
        Ok(())
    }

    /// Each layer is there, unwritten, and built upon what the log says: by its old name, or already by its new one.
    fn check_layers(&mut self, state: &DomainState) -> Result<(), DriverError> {
        let mut headers = Vec::new();
        for (disk, layers) in &self.layers.disks {
            for (id, layer) in &layers.layers {
                check_unused(&layer.file)?;
                let parent = layer.parent.as_ref().and_then(|parent| layers.layers.get(parent));
                let was = state.layers.disks.get(disk).and_then(|known| known.layers.get(id));
                headers.extend(self.header(layer, parent, was)?);
            }
        }
        self.headers = headers;
        Ok(())
    }

    fn header(
        &self,
        layer: &Layer,
        parent: Option<&Layer>,
        was: Option<&Layer>,
    ) -> Result<Option<Header>, DriverError> {
        let file = &layer.file;
        let (found, _, header) = facts(file).map_err(|error| {
            let message = format!("layer {} cannot be used: {error}", file.display());
            refused(message, "move all of the machine's files, and none but those")
        })?;
        let named = header.backing.map(|Backing { name, format, .. }| (name, format));
        let new = match (&named, parent) {
            (Some(_), Some(parent)) => Some(parent.file.clone()),
            (Some((name, _)), None) => Some(moved(name, &self.from, &self.to)),
            (None, _) => None,
        };
        let is_new = named.as_ref().map(|(name, _)| name) == new.as_ref();
        let is_old = named
            .as_ref()
            .zip(new.as_ref())
            .is_some_and(|((name, _), new)| moved(name, &self.from, &self.to) == *new);
        if !(is_new || is_old) || (parent.is_some() && named.is_none()) {
            let message = format!("layer {} is not built upon what the log says", file.display());
            return Err(refused(message, "put it back as it was, from a backup"));
        }
        // A header that was rewritten has another time, and another file system other inodes.
        let stamp = was.and_then(|was| was.stamp);
        let same = |stamp: snaptree_engine::layer::FileStamp| {
            stamp.size_bytes == found.stamp.size_bytes
                && (stamp.mtime_ns == found.stamp.mtime_ns || (is_new && named.is_some()))
        };
        if !stamp.is_none_or(same) {
            let message = format!("frozen layer {} was written since", file.display());
            return Err(refused(
                message,
                "put it back as it was, from a backup; cp -a and mv keep the times",
            ));
        }
        let Some(((_, format), onto)) = named.zip(new).filter(|_| !is_new) else { return Ok(None) };
        let format = format.unwrap_or_else(|| "qcow2".to_owned());
        Ok(Some(Header { file: file.clone(), onto, format }))
    }

    /// Does it, or what is left of it.
    pub(super) async fn carry_out(
        mut self,
        img: &QemuImg,
        lock: &OperationLock,
        keeper: Option<&Path>,
    ) -> Result<Relocated, DriverError> {
        let folder = FolderLock::take(&self.config.layers)?;
        for header in &self.headers {
            let mode = facts(&header.file).map(|(found, _, _)| found.mode);
            let mode = mode.map_err(|error| super::adopt::unreadable(&header.file, &error))?;
            set_mode(&header.file, mode | (WRITE_BITS & 0o200))?;
            let rebased = img.rebase_header(lock, &header.file, &header.onto, &header.format).await;
            set_mode(&header.file, mode)?;
            rebased?;
            sync(&header.file).await?;
        }
        for layer in self.layers.disks.values_mut().flat_map(|disk| disk.layers.values_mut()) {
            if layer.stamp.is_some() {
                layer.stamp = Some(stamp_of(&layer.file)?);
            }
        }
        for memory in self.layers.memory.values_mut() {
            memory.stamp = stamp_of(&memory.file)?;
        }
        self.write_generation(keeper).await?;
        self.put_links().await?;
        drop(folder);
        let disks =
            self.config.disks.iter().map(|(name, paths)| (name.clone(), paths.given.clone())).collect();
        Ok(Relocated { config: self.config.to_value()?, disks, layers: self.layers, claims: self.claims })
    }

    /// Links and manifest of the generation that is switched on. Each is replaced by one that means the same file.
    async fn write_generation(&mut self, keeper: Option<&Path>) -> Result<(), DriverError> {
        let (Some(name), Some(manifest)) = (&self.layers.generation, &mut self.manifest) else {
            return Ok(());
        };
        let folder = self.config.layers.join(name);
        for (disk, file) in links(&self.layers) {
            let (path, text) = (folder.join(disk.as_str()), link::in_generation(&self.config.layers, &file));
            if fs::read_link(&path).is_ok_and(|there| there == text) {
                continue;
            }
            let draft = folder.join(format!("{disk}.new"));
            remove(&draft)?;
            symlink(text, &draft).doing("make the link", &draft)?;
            fs::rename(&draft, &path).doing("put a link at", &path)?;
        }
        manifest.layers.clone_from(&self.layers);
        manifest.disks = links(&self.layers);
        manifest.keeper = keeper.map(Path::to_path_buf);
        for file in manifest.snapshots.iter_mut().flat_map(|snapshot| snapshot.files.values_mut()) {
            *file = moved(file, &self.from, &self.to);
        }
        let (path, draft) = (folder.join(MANIFEST), folder.join("manifest.json.new"));
        let text = serde_json::to_vec_pretty(manifest).map_err(io::Error::from).doing("write", &draft)?;
        remove(&draft)?;
        let mut file =
            fs::OpenOptions::new().write(true).create_new(true).open(&draft).doing("make", &draft)?;
        file.write_all(&text).doing("write", &draft)?;
        drop(file);
        set_mode(&draft, 0o644)?;
        sync(&draft).await?;
        fs::rename(&draft, &path).doing("put the manifest at", &path)?;
        sync(&folder).await
    }

    async fn put_links(&self) -> Result<(), DriverError> {
        for (disk, paths) in self.config.disks.iter().filter(|_| self.config.keep_path == PathWish::Follow) {
            if self.layers.disks.get(disk).is_some_and(|layers| layers.active_layer().is_some()) {
                self.put_link(disk, &paths.resolved).await?;
            }
        }
        Ok(())
    }

    async fn put_link(&self, disk: &DiskName, path: &Path) -> Result<(), DriverError> {
        match entry(path)? {
            Entry::Link { target } if target == link::registered(path, &self.config.layers, disk) => Ok(()),
            Entry::Link { .. } | Entry::Missing => {
                link::put(path, &self.config.layers, disk, &format!(".snaptree-mend-{disk}")).await
            }
            Entry::File { .. } | Entry::Other => Err(refused(
                format!("{} is not the link that was moved with the machine", path.display()),
                "move what is there away, and try again",
            )),
        }
    }
}

/// Where a path leads after the move.
fn moved(path: &Path, from: &Path, to: &Path) -> PathBuf {
    match path.strip_prefix(from) {
        Ok(rest) if rest.as_os_str().is_empty() => to.to_owned(),
        Ok(rest) => to.join(rest),
        Err(_) => path.to_owned(),
    }
}
