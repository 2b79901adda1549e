//! The real program, built once and run as a process.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use serde_json::Value;

/// The path of the `snaptree` binary with fault points, built on first use.
pub fn snaptree() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let output = Command::new(cargo)
            .args(["build", "-p", "snaptree", "--features", "fault-points", "--message-format=json"])
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
    })
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
    fn of(output: &Output) -> Self {
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
}

impl Program {
    /// The program on that state directory.
    pub fn new(state: impl Into<PathBuf>) -> Self {
        Self { state: state.into(), fault: None }
    }

    /// The same, stopped, killed or aborted at a fault point.
    #[must_use]
    pub fn with_fault(&self, fault: &str) -> Self {
        Self { state: self.state.clone(), fault: Some(fault.to_owned()) }
    }

    /// The command, ready to be run.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(snaptree());
        command
            .args(args)
            .env("SNAPTREE_STATE", &self.state)
            .env_remove("SNAPTREE_FAULT")
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
