//! Putting the registered paths right: each becomes the link to the machine's current disk again, and what is in its
//! place is kept.

use std::fs;
use std::path::{Path, PathBuf};

use snaptree_engine::DiskName;
use snaptree_engine::driver::DriverError;
use snaptree_engine::operation::{Code, Failure};
use snaptree_engine::project::DomainState;

use super::config::{PathWish, QemuConfig, active};
use super::files::{Doing, facts, folder_of, sync};
use super::folder::FolderLock;
use super::generation;
use super::link;
use super::lock::{in_use, writer};
use super::observe::{Entry, entry};

/// Most names that are tried for what is kept.
const NAMES_MAX: usize = 1000;

/// A registered path that does not lead to the machine's current disk.
#[derive(Debug)]
pub(super) struct WrongPath {
    disk: DiskName,
    path: PathBuf,
    there: There,
}

/// What is there instead.
#[derive(Debug)]
enum There {
    Nothing,
    Link(PathBuf),
    /// A file, which is kept under this name.
    File(PathBuf),
}

impl WrongPath {
    pub(super) fn words(&self) -> String {
        let path = self.path.display();
        match &self.there {
            There::Nothing => format!("make {path} a link to the machine's current disk again"),
            There::Link(target) => format!(
                "make {path} a link to the machine's current disk again, in place of the one to {}",
                target.display()
            ),
            There::File(aside) => format!(
                "keep the file that is at {path} as {}, and make {path} a link to the machine's current disk again",
                aside.display()
            ),
        }
    }
}

fn refused(message: String, hint: &str) -> DriverError {
    DriverError::from(Failure::new(Code::Drift, message).hint(hint).refused())
}

/// The registered paths that are to be put right.
pub(super) fn paths(state: &DomainState) -> Result<Vec<WrongPath>, DriverError> {
    let (_, config) = QemuConfig::of(state)?;
    let mut wrong = Vec::new();
    for (disk, paths) in config.disks.iter().filter(|_| config.keep_path == PathWish::Follow) {
        let layers = state.layers.disks.get(disk);
        let Some((_, layer)) = layers.and_then(|layers| layers.active_layer()) else { continue };
        let path = &paths.resolved;
        let there = match entry(path)? {
            Entry::Link { target } if link::is_ours(path, &target, &config.layers, disk) => continue,
            Entry::Link { target } => There::Link(target),
            Entry::Missing => There::Nothing,
            Entry::File { .. } => {
                if let Some(holder) = writer(path).doing("ask for the locks of", path)? {
                    return Err(in_use(&holder).refused().into());
                }
                There::File(aside(path)?)
            }
            Entry::Other => {
                let message = format!("{} is neither a file nor a link", path.display());
                return Err(refused(message, "move it away, and try again"));
            }
        };
        check_leads(state, &config, &layer.file)?;
        wrong.push(WrongPath { disk: disk.clone(), path: path.clone(), there });
    }
    Ok(wrong)
}

/// What the link will lead to is there, and is what the log says.
fn check_leads(state: &DomainState, config: &QemuConfig, layer: &Path) -> Result<(), DriverError> {
    let current = generation::current(&config.layers)?;
    if current != state.layers.generation {
        return Err(generation::elsewhere(
            &config.layers,
            current.as_deref(),
            state.layers.generation.as_deref(),
        ));
    }
    match facts(layer) {
        Ok(_) => Ok(()),
        Err(error) => {
            let message = format!("the machine's current disk {} cannot be used: {error}", layer.display());
            Err(refused(message, "snaptree drift tells of all that differs"))
        }
    }
}

/// A name beside `path` that is free.
fn aside(path: &Path) -> Result<PathBuf, DriverError> {
    let name = |number: usize| {
        let mut name = path.as_os_str().to_os_string();
        name.push(if number == 0 { ".found".to_owned() } else { format!(".found-{number}") });
        PathBuf::from(name)
    };
    (0..NAMES_MAX).map(name).find(|name| fs::symlink_metadata(name).is_err()).ok_or_else(|| {
        refused(format!("there are {NAMES_MAX} files beside {} already", path.display()), "move some away")
    })
}

/// Puts them right.
pub(super) async fn put_right(state: &DomainState) -> Result<(), DriverError> {
    let (_, config) = QemuConfig::of(state)?;
    let lock = FolderLock::take(&config.layers)?;
    for wrong in paths(state)? {
        if let There::File(aside) = &wrong.there {
            // A second name first: a rename of the link over the path then loses nothing.
            fs::hard_link(&wrong.path, aside).doing("keep the file as", aside)?;
            sync(&folder_of(&wrong.path)).await?;
        }
        link::put(&wrong.path, &config.layers, &wrong.disk, &format!(".snaptree-mend-{}", wrong.disk))
            .await?;
    }
    drop(lock);
    let target = active(&config.layers);
    fs::metadata(&target).doing("look at", &target).map(|_| ())
}
