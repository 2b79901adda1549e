//! Disks that come to a registered machine, and go from it.
//!
//! A disk that goes with its layers kept leaves them where they are: snapshots go on holding it, its registered path goes
//! on leading to what it was last, and it can be put back. A revert leaves alone what is not in both, the snapshot and
//! the domain.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use snaptree_engine::domain::{Disk, Domain};
use snaptree_engine::driver::DriverError;
use snaptree_engine::operation::{Code, Failure};
use snaptree_engine::project::DomainState;
use snaptree_engine::{DiskName, DomainName, SnapshotId};

use super::config::{DiskPaths, QemuConfig, RawWish, RepairWish};
use super::files::{self, Doing};
use super::img::QemuImg;
use super::internal::is_internal;
use super::probe::{Owned, check_file, check_own_bases, check_place, disk, existing_part, invalid, resolve};

/// Which disks a registered machine has from now on; what is not named stays.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DisksWish {
    /// Those that come, with their images.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub add: BTreeMap<DiskName, PathBuf>,
    /// Those that go.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub remove: BTreeMap<DiskName, KeptLayers>,
    /// Files of all domains, with their names: none of them can come.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub taken: BTreeMap<PathBuf, DomainName>,
    /// Files that domains are built upon, with their names: none of them can come.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub bases: BTreeMap<PathBuf, DomainName>,
}

/// What becomes of the layers of a disk that goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeptLayers {
    /// It may have none.
    #[default]
    None,
    /// They stay.
    All,
}

impl DisksWish {
    /// Whether nothing is wished.
    pub fn is_none(&self) -> bool {
        self.add.is_empty() && self.remove.is_empty()
    }
}

fn refused(code: Code, message: String, hint: impl Into<String>) -> DriverError {
    Failure::new(code, message).hint(hint).refused().into()
}

impl QemuConfig {
    /// With other disks; all of them, if any changed.
    pub(super) async fn with_disks(
        mut self,
        img: &QemuImg,
        state: &DomainState,
        domain: &Domain,
        wish: &DisksWish,
    ) -> Result<(Self, Option<Vec<Disk>>), DriverError> {
        if wish.is_none() {
            return Ok((self, None));
        }
        check_no_internal(state, domain)?;
        let mut disks = domain.disks.clone();
        for (name, kept) in &wish.remove {
            self.take_away(state, domain, name, *kept)?;
            disks.retain(|disk| disk.name != *name);
        }
        if disks.is_empty() && wish.add.is_empty() {
            let hint = format!("snaptree domain remove {} lets go of the whole domain", domain.name);
            return Err(refused(Code::Invalid, "a domain needs at least one disk".to_owned(), hint));
        }
        for (name, given) in &wish.add {
            disks.push(self.put_in(img, state, (name, given), wish).await?);
        }
        check_own_bases(&self)?;
        Ok((self, Some(disks)))
    }

    fn take_away(
        &mut self,
        state: &DomainState,
        domain: &Domain,
        name: &DiskName,
        kept: KeptLayers,
    ) -> Result<(), DriverError> {
        let paths = self.disks.remove(name).ok_or_else(|| {
            let all: Vec<&str> = domain.disks.iter().map(|disk| disk.name.as_str()).collect();
            let message = format!("domain '{}' has no disk '{name}'", domain.name);
            refused(Code::NotFound, message, format!("it has {}", all.join(", ")))
        })?;
        let has_layers = state.layers.disks.get(name).is_some_and(|layers| layers.active_layer().is_some());
        match (has_layers, kept) {
            (false, _) => Ok(()),
            (true, KeptLayers::All) => {
                self.removed.insert(name.clone(), paths);
                Ok(())
            }
            (true, KeptLayers::None) => Err(refused(
                Code::Invalid,
                format!("disk '{name}' of domain '{}' has layers, and snapshots may need them", domain.name),
                "--keep-layers leaves every file as it is: snapshots go on holding the disk, and it can be put back",
            )),
        }
    }

    async fn put_in(
        &mut self,
        img: &QemuImg,
        state: &DomainState,
        (name, given): (&DiskName, &Path),
        wish: &DisksWish,
    ) -> Result<Disk, DriverError> {
        if self.disks.contains_key(name) {
            return Err(refused(
                Code::Exists,
                format!("the domain has a disk '{name}' already"),
                "choose another name",
            ));
        }
        if given.is_relative() {
            return Err(
                invalid(format!("the path {} is relative", given.display())).hint("give an absolute path")
            );
        }
        if let Some(paths) = self.removed.remove(name) {
            return self.put_back(state, name, given, paths);
        }
        let (given, resolved) = resolve(given)?;
        let metadata = check_file(&resolved)?;
        let owned = [Owned::new(&wish.taken), Owned::new(&wish.bases)];
        if let Some(owner) = owned.iter().find_map(|owned| owned.owner(&resolved, &metadata)) {
            return Err(invalid(format!("image {} already belongs to domain '{owner}'", resolved.display())));
        }
        let (existing, _) = existing_part(&self.layers)?;
        if fs::metadata(&existing).doing("look at", &existing)?.dev() != metadata.dev() {
            return Err(invalid(format!(
                "disk '{name}' ({}) is not on the file system of the layers folder {}",
                resolved.display(),
                self.layers.display()
            )));
        }
        let image = (name, given, resolved);
        let mut notes = Vec::new();
        let (found, paths) =
            disk(img, image, (RawWish::Refuse, RepairWish::Leave, &owned[0]), &mut notes).await?;
        notes.iter().for_each(|note| tracing::warn!("{note}"));
        check_place(&self.layers, self.keep_path, name, &paths)?;
        self.disks.insert(name.clone(), paths);
        Ok(found)
    }

    /// A disk that was taken away with its layers kept.
    fn put_back(
        &mut self,
        state: &DomainState,
        name: &DiskName,
        given: &Path,
        paths: DiskPaths,
    ) -> Result<Disk, DriverError> {
        if given != paths.given && given != paths.resolved {
            return Err(refused(
                Code::Exists,
                format!("layers of an earlier disk '{name}' are still there"),
                format!("choose another name, or put that one back: {name}={}", paths.given.display()),
            ));
        }
        self.disks.insert(name.clone(), paths.clone());
        let file = self.written(name, state).unwrap_or_default();
        let (_, _, header) = files::facts(&file).map_err(|error| {
            DriverError::from(
                Failure::new(Code::BadImage, format!("layer {} cannot be used: {error}", file.display()))
                    .refused(),
            )
        })?;
        let virtual_size_bytes = header.virtual_size_bytes;
        Ok(Disk::new(name.clone(), Some(paths.given), virtual_size_bytes))
    }
}

/// A snapshot inside the images is in all of them or in none.
fn check_no_internal(state: &DomainState, domain: &Domain) -> Result<(), DriverError> {
    let is_inside = |id: SnapshotId| is_internal(state, id);
    match state.tree.iter().find(|snapshot| is_inside(snapshot.id)) {
        None => Ok(()),
        Some(snapshot) => Err(refused(
            Code::Unsupported,
            format!(
                "snapshot '{}' of domain '{}' is inside its images, and in all of them",
                snapshot.name, domain.name
            ),
            "delete the internal snapshots first",
        )),
    }
}
