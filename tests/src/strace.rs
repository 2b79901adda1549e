//! Killing a process at its N-th call of a system call, by strace's injection.
//!
//! strace counts for each thread on its own, and the thread that reaches the number first ends the process. So what one
//! thread calls is met exactly, and of what several threads call, as many as the busiest of them makes. The call at
//! which the signal comes is not carried out.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::images::text;

/// The calls by which Snaptree changes folders, modes and children, and syncs; each entry is one kind.
pub const STRUCTURE: [&str; 10] = [
    "rename,renameat,renameat2",
    "link,linkat",
    "symlink,symlinkat",
    "unlink,unlinkat",
    "chmod,fchmod,fchmodat",
    "mkdir,mkdirat",
    "rmdir",
    "fsync,fdatasync",
    "clone,clone3,vfork",
    "ftruncate",
];
/// The calls by which it writes into files, the database above all.
pub const WRITES: [&str; 2] = ["pwrite64", "write"];
/// The calls by which qemu-img changes an image.
const TOOL: &str = "pwrite64,pwritev,pwritev2,fsync,fdatasync,ftruncate,fallocate";

/// A call at which something happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// The names of the call, as strace takes them.
    pub calls: &'static str,
    /// Which one of a thread, from 1.
    pub at: usize,
}

/// The same command under strace, with its threads and without its children, killed at the point if there is one.
pub fn under(command: &Command, trace: &Path, kinds: &[&'static str], kill: Option<Point>) -> Command {
    let mut traced = Command::new("strace");
    traced.args(["-f", "-b", "execve", "-o", text(trace), "-e", "signal=none", "-e"]);
    traced.arg(format!("trace={}", kill.map_or_else(|| kinds.join(","), |point| point.calls.to_owned())));
    if let Some(point) = kill {
        traced.args(["-e", &format!("inject={}:signal=SIGKILL:when={}", point.calls, point.at)]);
    }
    traced.arg(command.get_program()).args(command.get_args()).stdin(Stdio::null());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => traced.env(name, value),
            None => traced.env_remove(name),
        };
    }
    traced
}

/// Whether a trace ends with the death that was asked for.
pub fn was_killed(trace: &Path) -> bool {
    std::fs::read_to_string(trace).is_ok_and(|trace| trace.contains("+++ killed by SIGKILL +++"))
}

/// Every point of these kinds that a trace of an undisturbed run shows.
///
/// # Panics
/// There is no such trace.
pub fn points(trace: &Path, kinds: &[&'static str]) -> Vec<Point> {
    let trace = std::fs::read_to_string(trace).expect("a trace");
    let mut calls: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    for line in trace.lines() {
        let Some((thread, rest)) = line.split_once(' ') else { continue };
        // The line of a call that was interrupted by another thread's goes on later, as "<... name resumed>".
        if let Some((name, _)) = rest.trim_start().split_once('(') {
            *calls.entry((thread, name)).or_default() += 1;
        }
    }
    let most = |kind: &str| {
        let of_kind = calls.iter().filter(|((_, name), _)| kind.split(',').any(|one| one == *name));
        of_kind.map(|(_, count)| *count).max().unwrap_or(0)
    };
    kinds.iter().flat_map(|kind| (1..=most(kind)).map(|at| Point { calls: kind, at })).collect()
}

/// What becomes of qemu-img, and of Snaptree, which waits for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Its calls are counted, and nothing else happens.
    Counted,
    /// qemu-img is killed, in this one run.
    Killed,
    /// qemu-img is killed, in this run and all that come later.
    KilledAgainAndAgain,
    /// Both are killed.
    BothKilled,
    /// Snaptree is killed; qemu-img lives on, and is stopped.
    Orphaned,
}

impl Fate {
    fn word(self) -> &'static str {
        match self {
            Self::Counted => "counted",
            Self::Killed | Self::KilledAgainAndAgain => "killed",
            Self::BothKilled => "both",
            Self::Orphaned => "orphaned",
        }
    }
}

/// A moment in one of qemu-img's runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ToolPoint {
    /// Which run of qemu-img, from 1.
    pub run: usize,
    /// After which of its calls, whatever thread makes it; 0 is before it begins.
    pub after: usize,
}

/// A qemu-img that is first in the path, and brings the real one to its fate.
#[derive(Debug)]
pub struct Tool {
    folder: PathBuf,
}

/// qemu-img spreads its calls over threads, and which of them makes a call is another one in each run. So it is
/// stopped after every call, and each stop is counted and ended here: that is one order for all threads.
///
/// Snaptree starts this as its child, so its parent is Snaptree. Where both shall die qemu-img goes first, to its end:
/// Snaptree cannot see that while this lives, and whoever sees Snaptree's end finds no qemu-img. A command in the background would lose its stdin, and
/// with it the operation's lock; hence descriptor 3.
const SCRIPT: &str = r#"#!/bin/sh
PATH=${PATH#*:}
run=$(($(cat "$TOOL_FOLDER/runs" 2>/dev/null || echo 0) + 1))
echo $run > "$TOOL_FOLDER/runs"
if [ $run -lt $TOOL_FIRST ] || [ $run -gt $TOOL_LAST ]; then exec qemu-img "$@"; fi

fate() {
    echo $1 > "$TOOL_FOLDER/hit"
    case $TOOL_FATE in
        counted) kill -CONT $1 ;;
        killed|both) kill -9 $1 ;;
        orphaned) kill -9 $PPID ;;
    esac
}

if [ $TOOL_AFTER = 0 ]; then
    if [ $TOOL_FATE = both ]; then kill -9 $PPID; fi
    fate $$
fi
pipe="$TOOL_FOLDER/pipe.$run"
mkfifo "$pipe"
exec 3<&0
strace -f -o "$pipe" -e trace=$TOOL_CALLS -e inject=$TOOL_CALLS:signal=SIGSTOP qemu-img "$@" <&3 &
calls=0
while read -r pid rest; do
    case $rest in
        "--- SIGSTOP "*)
            calls=$((calls + 1))
            echo $calls > "$TOOL_FOLDER/calls.$run"
            if [ $calls = $TOOL_AFTER ]; then fate $pid; else kill -CONT $pid; fi ;;
    esac
done < "$pipe"
wait $!
code=$?
if [ $code -lt 128 ]; then exit $code; fi
if [ $TOOL_FATE = both ]; then kill -9 $PPID; fi
kill -9 $$
"#;

impl Tool {
    /// Puts it into `folder`, which it makes.
    ///
    /// # Panics
    /// It cannot.
    pub fn new(folder: PathBuf) -> Self {
        let bin = folder.join("bin");
        std::fs::create_dir_all(&bin).expect("a folder");
        let script = bin.join("qemu-img");
        std::fs::write(&script, SCRIPT).expect("the script");
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).expect("the script");
        Self { folder }
    }

    /// Makes a command use it.
    ///
    /// # Panics
    /// What an earlier command left cannot be removed.
    pub fn inject(&self, command: &mut Command, fate: Fate, at: Option<ToolPoint>) {
        for entry in std::fs::read_dir(&self.folder).expect("the folder") {
            let path = entry.expect("an entry").path();
            if !path.is_dir() {
                std::fs::remove_file(path).expect("what an earlier command left");
            }
        }
        let path = std::env::var("PATH").unwrap_or_default();
        let last = match (fate, at) {
            (Fate::Counted | Fate::KilledAgainAndAgain, _) | (_, None) => usize::MAX >> 1,
            (_, Some(at)) => at.run,
        };
        command
            .env("PATH", format!("{}:{path}", text(&self.folder.join("bin"))))
            .env("TOOL_FOLDER", &self.folder)
            .env("TOOL_FATE", fate.word())
            .env("TOOL_FIRST", at.map_or(1, |at| at.run).to_string())
            .env("TOOL_LAST", last.to_string())
            .env("TOOL_CALLS", TOOL)
            .env("TOOL_AFTER", at.map_or(usize::MAX >> 1, |at| at.after).to_string());
    }

    /// Every point of the command that ran with it last.
    pub fn points(&self) -> Vec<ToolPoint> {
        let runs = self.number("runs");
        (1..=runs)
            .flat_map(|run| {
                (0..=self.number(&format!("calls.{run}"))).map(move |after| ToolPoint { run, after })
            })
            .collect()
    }

    /// The process that met its fate, if any did.
    pub fn hit(&self) -> Option<usize> {
        Some(self.number("hit")).filter(|pid| *pid > 0)
    }

    fn number(&self, name: &str) -> usize {
        let text = std::fs::read_to_string(self.folder.join(name)).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    }
}
