//! The real program, built once and run as a process.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde_json::Value;

/// The path of the `snaptree` binary with fault points, built on first use.
pub fn snaptree() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| build(&["--features", "fault-points"]))
}

/// The path of the `snaptree` binary as users have it, built on first use.
pub fn snaptree_release() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| build(&["--release"]))
}

fn build(args: &[&str]) -> PathBuf {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // What cargo tells a test of its package makes build scripts run again that look at it (ring's), and all that is
    // built upon them is then built anew, each time that it is built from here and then from outside.
    let of_package = |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_str().is_some_and(of_package)) {
        cargo.env_remove(name);
    }
    let output = cargo
        .args(["build", "-p", "snaptree", "--message-format=json"])
        .args(args)
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .stderr(Stdio::inherit())
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "the program does not build");
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["target"]["name"] == "snaptree")
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .expect("cargo names the executable")
}

/// What a run of the program gave.
#[derive(Debug)]
pub struct Ran {
    /// The exit code; none if a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Ran {
    /// What a process that ended gave.
    pub fn of(output: &Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Standard output as JSON.
    ///
    /// # Panics
    /// It is none.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("no JSON ({error}): {self:?}"))
    }
}

/// A state directory, and the program on it.
#[derive(Clone, Debug)]
pub struct Program {
    /// The state directory.
    pub state: PathBuf,
    /// What `SNAPTREE_FAULT` is set to.
    pub fault: Option<String>,
    /// What else is set in its environment.
    pub environment: Vec<(&'static str, String)>,
    binary: &'static Path,
}

impl Program {
    /// The program, with fault points, on that state directory.
    pub fn new(state: impl Into<PathBuf>) -> Self {
        Self { state: state.into(), fault: None, environment: Vec::new(), binary: snaptree() }
    }

    /// The program as users have it, on that state directory.
    pub fn release(state: impl Into<PathBuf>) -> Self {
        Self { state: state.into(), fault: None, environment: Vec::new(), binary: snaptree_release() }
    }

    /// The same, stopped, killed or aborted at a fault point.
    #[must_use]
    pub fn with_fault(&self, fault: &str) -> Self {
        Self { fault: Some(fault.to_owned()), ..self.clone() }
    }

    /// The same with this in its environment.
    #[must_use]
    pub fn with_env(&self, name: &'static str, value: &str) -> Self {
        let mut program = self.clone();
        program.environment.push((name, value.to_owned()));
        program
    }

    /// The same with these settings, which are kept in `folder`.
    ///
    /// # Panics
    /// They cannot be written.
    #[must_use]
    pub fn with_settings(&self, folder: &Path, settings: &str) -> Self {
        std::fs::create_dir_all(folder.join("snaptree")).expect("a folder");
        std::fs::write(folder.join("snaptree/config.toml"), settings).expect("the settings");
        self.with_env("XDG_CONFIG_HOME", folder.to_str().expect("a path of the tests"))
    }

    /// The command, ready to be run.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.binary);
        command
            .args(args)
            .env("SNAPTREE_STATE", &self.state)
            .env_remove("SNAPTREE_FAULT")
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null());
        if let Some(fault) = &self.fault {
            command.env("SNAPTREE_FAULT", fault);
        }
        command
    }

    /// Runs it to its end.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn run(&self, args: &[&str]) -> Ran {
        Ran::of(&self.command(args).output().expect("the program starts"))
    }

    /// Runs it with `--json`, and expects this exit code.
    ///
    /// # Panics
    /// Another exit code, or no JSON.
    pub fn json(&self, code: i32, args: &[&str]) -> Value {
        let mut args = args.to_vec();
        args.push("--json");
        let ran = self.run(&args);
        assert_eq!(ran.code, Some(code), "{args:?}: {ran:?}");
        ran.json()
    }

    /// How long the longest step of `web` since then took, from its announcement in the log to its end: the one that
    /// moves the data.
    ///
    /// # Panics
    /// The log cannot be read.
    pub fn longest_step(&self, since: Timestamp) -> Duration {
        let log = self.run(&["log", "web", "--kind", "Operation.", "--json"]).stdout;
        let events = log.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        let mut began = BTreeMap::new();
        let mut longest = Duration::ZERO;
        for event in events {
            let time: Timestamp = event["at"].as_str().and_then(|time| time.parse().ok()).expect("a time");
            let step = (event["operation"].to_string(), event["data"]["step"].to_string());
            match event["kind"].as_str() {
                Some("Operation.StepStarted") if time >= since => {
                    began.insert(step, time);
                }
                Some("Operation.StepFinished") => {
                    let took = began.remove(&step).map(|began| time.duration_since(began).unsigned_abs());
                    longest = longest.max(took.unwrap_or_default());
                }
                _ => {}
            }
        }
        longest
    }

    /// Runs it with `--json` and this standard input, and expects success.
    ///
    /// # Panics
    /// Anything else.
    pub fn json_with_stdin(&self, args: &[&str], stdin: &str) -> Value {
        let mut args = args.to_vec();
        args.push("--json");
        let mut child = self
            .command(&args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        child.stdin.take().expect("a pipe").write_all(stdin.as_bytes()).expect("it reads");
        let ran = Ran::of(&child.wait_with_output().expect("it ends"));
        assert_eq!(ran.code, Some(0), "{args:?}: {ran:?}");
        ran.json()
    }
}

/// Returns when a process was stopped by SIGSTOP. The kernel tells no one, so its state is asked for.
///
/// # Panics
/// It ends, or is not stopped within a minute.
pub fn wait_until_stopped(pid: u32) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process lives");
        let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
        assert_ne!(state, Some('Z'), "it ended before it was stopped");
        if state == Some('T') {
            return;
        }
        assert!(Instant::now() < deadline, "it was never stopped");
        std::thread::yield_now();
    }
}
