//! Processes that a test leaves behind.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What the tests start.
const OURS: [&str; 6] = ["qemu", "snaptree", "VBox", "vcsim", "sleep", "sh"];
/// How long a process that was killed in this moment may take to be gone.
const DYING: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(20);

/// A process, as a test tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// Its name.
    pub name: String,
}

/// The processes of the tests that work in a folder: they have something in it open, or it is in their command line.
pub fn left_in(folder: &Path) -> Vec<Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| *pid != std::process::id()).filter_map(|pid| works_in(pid, folder)).collect()
}

fn works_in(pid: u32, folder: &Path) -> Option<Process> {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?.trim().to_owned();
    if !OURS.iter().any(|ours| name.starts_with(ours)) || is_ended(pid) {
        return None;
    }
    let named = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    // With the slash: `machine` is not `machine-1`.
    let wanted = [folder.as_os_str().as_bytes(), b"/"].concat();
    let is_named = named.windows(wanted.len()).any(|window| window == wanted);
    let opens = || {
        let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        open.filter_map(|entry| fs::read_link(entry.path()).ok()).any(|file| file.starts_with(folder))
    };
    (is_named || opens()).then_some(Process { pid, name })
}

/// A process that was not waited for is gone for our purposes, once its threads are.
fn is_ended(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let threads = fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['Z', 'X']) && threads < 2)
}

/// Fails the test whose processes outlive it, when dropped. It has to be dropped behind what ends them.
#[derive(Debug)]
pub struct Left(PathBuf);

impl Left {
    /// A guard over a folder of a test.
    pub fn in_folder(folder: &Path) -> Self {
        Self(folder.to_owned())
    }
}

impl Drop for Left {
    fn drop(&mut self) {
        let until = Instant::now() + DYING;
        let mut left = left_in(&self.0);
        while !left.is_empty() && Instant::now() < until {
            std::thread::sleep(LOOK);
            left = left_in(&self.0);
        }
        for process in &left {
            std::process::Command::new("kill").args(["-KILL", &process.pid.to_string()]).status().ok();
        }
        if !left.is_empty() && !std::thread::panicking() {
            panic!("these outlive the test: {left:?}");
        }
    }
}
