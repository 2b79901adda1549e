//! VBoxManage, `VBoxSVC` or Snaptree killed at one chosen moment of a command.
//!
//! A wrapper in the place of VBoxManage counts its calls, and kills before one begins, after it ended, or while it talks
//! to `VBoxSVC`. `VBoxSVC` itself is killed by strace at a system call of its own.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{Vbox, programs};
use crate::program::{Program, Ran};
use crate::strace::{Point, points, was_killed};

/// How long strace may take to end.
const STRACE_ENDS: Duration = Duration::from_secs(10);

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Victim {
    /// Snaptree; the VBoxManage that it called goes on.
    Snaptree,
    /// VBoxManage; `VBoxSVC` goes on.
    Manage,
    /// `VBoxSVC`, which does the work.
    Service,
}

impl Victim {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Snaptree, Self::Manage, Self::Service];

    /// Its program.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Snaptree => "snaptree",
            Self::Manage => "VBoxManage",
            Self::Service => "VBoxSVC",
        }
    }
}

/// When somebody is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kill {
    /// Just before that call of VBoxManage begins, counted from 1.
    Before(Victim, usize),
    /// Just after it ended, and before anyone knows.
    After(Victim, usize),
    /// VBoxManage, when one of its threads is about to send something for the n-th time in that call.
    Sending {
        /// Which call.
        call: usize,
        /// What it would have sent.
        nth: usize,
    },
    /// `VBoxSVC`, and that call of VBoxManage does not notice, and never ends.
    Unnoticed(usize),
    /// `VBoxSVC`, when one of its threads is about to make a system call for the n-th time.
    Syscall(Point),
    /// The same, and then Snaptree before it hears of it.
    SyscallAndSnaptree(Point),
}

impl Kill {
    /// Who, in words.
    pub const fn whom(self) -> &'static str {
        match self {
            Self::Before(victim, _) | Self::After(victim, _) => victim.name(),
            Self::Sending { .. } => Victim::Manage.name(),
            Self::Unnoticed(_) | Self::Syscall(_) => Victim::Service.name(),
            Self::SyscallAndSnaptree(_) => "VBoxSVC and snaptree",
        }
    }

    /// When, in words.
    pub fn moment(self) -> String {
        match self {
            Self::Before(..) => "before a call of VBoxManage".to_owned(),
            Self::After(..) => "after a call, before its reply".to_owned(),
            Self::Sending { .. } => "while it talks to VBoxSVC".to_owned(),
            Self::Unnoticed(_) => "and VBoxManage hangs".to_owned(),
            Self::Syscall(point) | Self::SyscallAndSnaptree(point) => format!("at {}", point.calls),
        }
    }
}

const SCRIPT: &str = r#"#!/bin/sh
call=$(($(cat "$KILL_FOLDER/calls" 2>/dev/null || echo 0) + 1))
echo $call >"$KILL_FOLDER/calls"
echo "$1" >>"$KILL_FOLDER/said"
[ "$KILL_CALL" = $call ] || [ "$KILL_CALL" = any ] || exec "$KILL_REAL" "$@"
kill_it() {
    case $KILL_VICTIM in
        snaptree) kill -9 $PPID ;;
        VBoxManage) kill -9 $$ ;;
        VBoxSVC) kill -9 "$(tr -d '\0' <"$KILL_SERVICE")" ;;
    esac
}
case $KILL_WHEN in
    before) kill_it; exec "$KILL_REAL" "$@" ;;
    after) "$KILL_REAL" "$@"; code=$?; kill_it; exit $code ;;
    unnoticed) kill_it; exec sleep 3600 ;;
    failed) "$KILL_REAL" "$@"; code=$?; [ $code = 0 ] || kill_it; exit $code ;;
    sending)
        exec strace -f -q -o "$KILL_FOLDER/sending" -e trace=sendto,write \
            ${KILL_AT:+-e inject=sendto,write:signal=KILL:when=$KILL_AT} "$KILL_REAL" "$@" ;;
esac
exec "$KILL_REAL" "$@"
"#;

/// The calls by which `VBoxSVC` changes what is there.
pub const CHANGING: [&str; 5] = ["rename", "unlink", "ftruncate", "fsync", "pwrite64"];
const SENDING: &str = "sendto,write";

/// VBoxManage with the wrapper in its place.
#[derive(Debug)]
pub struct Wrapper<'v> {
    vbox: &'v Vbox,
    folder: PathBuf,
    /// strace at `VBoxSVC`, for as long as the command runs.
    strace: Option<Child>,
    environment: Vec<(&'static str, String)>,
}

impl<'v> Wrapper<'v> {
    /// For one command.
    ///
    /// # Panics
    /// It cannot be put there, or strace does not get hold of `VBoxSVC`.
    pub fn new(vbox: &'v Vbox, kill: Option<Kill>) -> Self {
        let folder = vbox.path().join("kill");
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).expect("a folder");
        let script = folder.join("VBoxManage");
        fs::write(&script, SCRIPT).expect("a script");
        fs::set_permissions(&script, Permissions::from_mode(0o755)).expect("a script");
        let (call, victim, when) = match kill {
            None => ("none".to_owned(), Victim::Manage, "sending"),
            Some(Kill::Before(victim, call)) => (call.to_string(), victim, "before"),
            Some(Kill::After(victim, call)) => (call.to_string(), victim, "after"),
            Some(Kill::Sending { call, .. }) => (call.to_string(), Victim::Manage, "sending"),
            Some(Kill::Unnoticed(call)) => (call.to_string(), Victim::Service, "unnoticed"),
            Some(Kill::Syscall(_)) => ("none".to_owned(), Victim::Service, "never"),
            Some(Kill::SyscallAndSnaptree(_)) => ("any".to_owned(), Victim::Snaptree, "failed"),
        };
        let path = |path: &Path| path.display().to_string();
        let mut environment = vec![
            ("VBOXMANAGE", path(&script)),
            ("KILL_FOLDER", path(&folder)),
            ("KILL_REAL", path(&programs().join("VBoxManage"))),
            ("KILL_SERVICE", path(&vbox.lock())),
            ("KILL_CALL", call),
            ("KILL_VICTIM", victim.name().to_owned()),
            ("KILL_WHEN", when.to_owned()),
        ];
        if let Some(Kill::Sending { nth, .. }) = kill {
            environment.push(("KILL_AT", nth.to_string()));
        }
        let mut wrapper = Self { vbox, folder, strace: None, environment };
        match kill {
            Some(Kill::Syscall(point) | Kill::SyscallAndSnaptree(point)) => wrapper.attach(Some(point)),
            None => wrapper.attach(None),
            Some(_) => {}
        }
        wrapper
    }

    fn attach(&mut self, kill: Option<Point>) {
        let pid = self.vbox.service().to_string();
        let calls = kill.map_or_else(|| CHANGING.join(","), |point| point.calls.to_owned());
        let mut strace = Command::new("strace");
        strace.args(["-f", "-q", "-p", &pid, "-e", &format!("trace={calls}")]);
        if let Some(point) = kill {
            strace.args(["-e", &format!("inject={}:signal=KILL:when={}", point.calls, point.at)]);
        }
        strace.arg("-o").arg(self.folder.join("service"));
        let child = strace.stdin(Stdio::null()).stderr(Stdio::null()).spawn().expect("strace starts");
        self.strace = Some(child);
        let traced = || {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            !status.contains("TracerPid:\t0\n")
        };
        let until = Instant::now() + Duration::from_secs(30);
        while !traced() {
            assert!(Instant::now() < until, "strace does not get hold of VBoxSVC");
            std::thread::yield_now();
        }
    }

    /// Runs Snaptree to its end with it.
    pub fn snaptree(&mut self, program: &Program, args: &[&str]) -> Ran {
        let mut program = program.clone();
        program.environment.extend(self.environment.iter().cloned());
        let ran = program.run(args);
        self.detach();
        ran
    }

    /// Runs bare VBoxManage to its end with it.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn bare(&mut self, args: &[&str]) -> Ran {
        let mut command = Command::new(self.folder.join("VBoxManage"));
        command.args(args).envs(self.vbox.environment()).envs(self.environment.iter().cloned());
        let output = command.stdin(Stdio::null()).output().expect("the wrapper starts");
        self.detach();
        Ran {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// strace ends by itself with the process that it killed; else it is asked to, so that it writes all that it saw.
    fn detach(&mut self) {
        if let Some(mut strace) = self.strace.take() {
            let _ = Command::new("kill").arg(strace.id().to_string()).stderr(Stdio::null()).status();
            // One whose process died in its hands may wait for it for ever, deaf to that.
            let until = Instant::now() + STRACE_ENDS;
            while strace.try_wait().expect("strace is ours").is_none() {
                if Instant::now() >= until {
                    strace.kill().expect("strace is ours");
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }

    /// The words that VBoxManage was called with first, call by call.
    pub fn calls(&self) -> Vec<String> {
        let said = fs::read_to_string(self.folder.join("said")).unwrap_or_default();
        said.lines().map(str::to_owned).collect()
    }

    /// Whether somebody was killed.
    pub fn was_hit(&self, kill: Kill) -> bool {
        match kill {
            Kill::Before(_, call) | Kill::After(_, call) | Kill::Unnoticed(call) => {
                self.calls().len() >= call
            }
            Kill::Sending { .. } => was_killed(&self.folder.join("sending")),
            Kill::Syscall(_) | Kill::SyscallAndSnaptree(_) => was_killed(&self.folder.join("service")),
        }
    }

    /// The system calls that `VBoxSVC` made in a command in which nobody was killed.
    ///
    /// # Panics
    /// There was no such command.
    pub fn syscalls(&self) -> Vec<Point> {
        points(&self.folder.join("service"), &CHANGING)
    }

    /// How often the busiest thread of VBoxManage sends something in a command that is not disturbed.
    ///
    /// # Panics
    /// It fails.
    pub fn sends(vbox: &'v Vbox, args: &[&str]) -> usize {
        let mut wrapper = Self::new(vbox, Some(Kill::Sending { call: 1, nth: 0 }));
        wrapper.environment.retain(|(key, _)| *key != "KILL_AT");
        let ran = wrapper.bare(args);
        assert_eq!(ran.code, Some(0), "{args:?}: {ran:?}");
        points(&wrapper.folder.join("sending"), &[SENDING]).iter().map(|point| point.at).max().unwrap_or(0)
    }
}

impl Drop for Wrapper<'_> {
    fn drop(&mut self) {
        self.detach();
    }
}

/// What became of a machine after a kill and a plain retry with VBoxManage alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Plain {
    /// As it should be.
    Fine,
    /// What was asked for was done twice.
    Twice,
    /// What was asked for fails for ever, or no snapshot can be taken any more, or deleted.
    Wedged,
    /// VirtualBox no longer knows the machine.
    Forgotten,
}

/// A machine that nothing but VBoxManage looks after.
#[derive(Debug)]
pub struct Bare {
    /// Where it is.
    pub vbox: Vbox,
    disks: usize,
    blocks: usize,
    broken: bool,
}

/// Its name.
const NAME: &str = "bare";

impl Bare {
    /// One with so many disks of so many blocks, and a snapshot `root`.
    ///
    /// # Panics
    /// It cannot be made.
    pub fn new(disks: usize, blocks: usize) -> Self {
        let vbox = Vbox::new();
        vbox.machine(NAME, disks, blocks);
        vbox.must(&["snapshot", NAME, "take", "root"]);
        Self { vbox, disks, blocks, broken: false }
    }

    /// Prepares what `args` is to be done to: for a delete a snapshot `going` with `below` blocks, below one with `above`.
    /// A machine that was broken is replaced.
    ///
    /// # Panics
    /// It fails.
    pub fn prepare(&mut self, verb: &str, below: usize, above: usize) -> Vec<&'static str> {
        if self.broken {
            *self = Self::new(self.disks, self.blocks);
        }
        let write =
            |blocks: usize| (0..self.disks).for_each(|disk| self.vbox.write(NAME, disk, 0..blocks, 9));
        write(1);
        match verb {
            "create" => vec!["snapshot", NAME, "take", "going"],
            "revert" => vec!["snapshot", NAME, "restore", "root"],
            _ => {
                write(below);
                self.vbox.must(&["snapshot", NAME, "take", "going"]);
                write(above);
                self.vbox.must(&["snapshot", NAME, "take", "stays"]);
                vec!["snapshot", NAME, "delete", "going"]
            }
        }
    }

    /// Tries again what was cut off, as anyone would, and says what came of it. Leaves the machine as it was.
    pub fn retry(&mut self, args: &[&str], cut_off: &Ran) -> Plain {
        let retried = if cut_off.code == Some(0) { Some(0) } else { self.vbox.manage(args).code };
        let plain = self.judge(args, retried);
        self.broken = !matches!(plain, Plain::Fine | Plain::Twice);
        plain
    }

    fn judge(&self, args: &[&str], retried: Option<i32>) -> Plain {
        let manage = |args: &[&str]| self.vbox.manage(args).code == Some(0);
        if !self.vbox.manage(&["list", "vms"]).stdout.contains(NAME) {
            return Plain::Forgotten;
        }
        let list = self.vbox.manage(&["snapshot", NAME, "list"]).stdout;
        let going = list.matches("Name: going ").count();
        let is_done = match args[2] {
            "take" => going > 0,
            "delete" => going == 0,
            // What a restore left behind may keep the snapshot from being merged ever after.
            _ => {
                retried == Some(0)
                    && manage(&["snapshot", NAME, "delete", "root"])
                    && manage(&["snapshot", NAME, "take", "root"])
            }
        };
        let usable =
            manage(&["snapshot", NAME, "take", "probe"]) && manage(&["snapshot", NAME, "delete", "probe"]);
        let mut cleaned = true;
        for name in
            std::iter::repeat_n("going", going).chain(list.contains("Name: stays ").then_some("stays"))
        {
            cleaned &= manage(&["snapshot", NAME, "delete", name]);
        }
        match (is_done && usable && cleaned, going) {
            (false, _) => Plain::Wedged,
            (true, 2..) => Plain::Twice,
            (true, _) => Plain::Fine,
        }
    }
}
