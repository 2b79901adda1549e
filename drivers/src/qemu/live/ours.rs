//! The processes that Snaptree started for a managed machine.
//!
//! Each is noted beside the pid file when it is started, and again by what answers at the socket: a launch command may
//! start QEMU through others. What is noted and lives is in the way of another QEMU whatever it has open or locked.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use snaptree_engine::driver::DriverError;
use snaptree_engine::project::DomainState;

use super::process::{said_path, start_words};
use crate::operation_lock::has_one_of;
use crate::process::Process;
use crate::qemu::config::QemuConfig;
use crate::qemu::files::{Doing, remove};
use crate::qemu::runs::Runs;

/// Where they are noted.
pub(super) fn record_path(pid_file: &Path) -> PathBuf {
    pid_file.with_extension("process")
}

fn noted(pid_file: &Path) -> Vec<Process> {
    let text = fs::read_to_string(record_path(pid_file)).unwrap_or_default();
    text.lines().filter_map(Process::parse).filter(Process::is_alive).collect()
}

/// Notes one, and forgets those that have ended. A power cut ends them all, so nothing is synced.
pub(super) fn note(pid_file: &Path, process: &Process) -> Result<(), DriverError> {
    let mut known = noted(pid_file);
    if !known.contains(process) {
        known.push(process.clone());
    }
    let path = record_path(pid_file);
    let draft = path.with_extension("process.new");
    let text: String = known.iter().map(Process::line).collect();
    fs::write(&draft, text).doing("write", &draft)?;
    fs::rename(&draft, &path).doing("write", &path)
}

/// Those of a machine that live.
pub(in crate::qemu) fn living(pid_file: &Path, state: &DomainState, config: &QemuConfig) -> Vec<Process> {
    let layers = state.layers.files();
    let files = layers.chain(config.disks.values().map(|paths| &paths.resolved));
    living_with(pid_file, files.map(PathBuf::as_path))
}

/// Those that are noted and live, and the one of the pid file, if it has one of these files open: a number alone may be
/// anybody's by now.
pub(super) fn living_with<'a>(pid_file: &Path, files: impl Iterator<Item = &'a Path>) -> Vec<Process> {
    let mut found = noted(pid_file);
    let named = fs::read_to_string(pid_file).ok().and_then(|text| Process::of(text.trim().parse().ok()?));
    if let Some(named) = named
        && !found.contains(&named)
        && has_open(&named, files)
        && named.is_alive()
    {
        found.push(named);
    }
    found
}

/// Whether a process has one of these files open, for whatever.
pub(super) fn has_open<'a>(process: &Process, files: impl Iterator<Item = &'a Path>) -> bool {
    let inodes = files.filter_map(|file| fs::metadata(file).ok()).map(|file| (file.dev(), file.ino()));
    has_one_of(process.pid(), &inodes.collect::<Vec<_>>())
}

/// Removes what a machine that is off left beside its pid file.
pub(super) fn forget(qmp: &Path, pid_file: &Path) -> Result<(), DriverError> {
    for path in [qmp, pid_file, &said_path(pid_file), &record_path(pid_file)] {
        remove(path)?;
    }
    Ok(())
}

/// The same of a domain that is registered no more, unless its machine lives on.
pub(in crate::qemu) fn forget_machine(state: &DomainState) {
    let Ok((domain, config)) = QemuConfig::of(state) else { return };
    let forgotten = match &config.runs {
        Runs::Managed { qmp, pid_file, .. } if living(pid_file, state, &config).is_empty() => {
            forget(qmp, pid_file)
        }
        Runs::Commands { .. } => remove(&start_words(domain.id)).map(|_| ()),
        _ => Ok(()),
    };
    if let Err(error) = forgotten {
        tracing::warn!(%error, "a file of a removed domain stays");
    }
}
