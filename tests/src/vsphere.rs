//! A vSphere simulator as a process, and VMware's own client to see with what is there.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use serde_json::Value;

use crate::images::{text, tool};
use crate::program::Program;

/// The password of a simulator, if nothing else is said.
pub const PASSWORD: &str = "Xq7-never-to-be-seen-0b1d";
/// Its user.
pub const USER: &str = "root";

/// Which kind of host is simulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Model {
    /// One ESXi.
    Esx,
    /// A vCenter.
    Vcenter,
}

impl Model {
    const fn word(self) -> &'static str {
        match self {
            Self::Esx => "esx",
            Self::Vcenter => "vpx",
        }
    }
}

/// A simulator that listens with TLS; killed when it is dropped. What it keeps survives it.
#[derive(Debug)]
pub struct Simulator {
    child: Child,
    arguments: Vec<String>,
    /// `https://127.0.0.1:PORT/sdk`
    pub url: String,
    /// The SHA-256 of its certificate.
    pub thumbprint: String,
    /// Its machines.
    pub machines: Vec<String>,
    password: String,
}

fn made_by(script: &str) -> PathBuf {
    let place = Path::new(env!("CARGO_MANIFEST_DIR")).join("lab").join(script);
    let output = Command::new(&place).stderr(Stdio::inherit()).output().expect("the script runs");
    assert!(output.status.success(), "{} cannot make its part of the lab", place.display());
    PathBuf::from(String::from_utf8(output.stdout).expect("a path").trim())
}

fn simulator() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| made_by("vcsim/build"))
}

fn python() -> &'static Path {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    MADE.get_or_init(|| made_by("pyvmomi"))
}

impl Simulator {
    /// Starts one whose machines are kept in `folder`. A task takes `task_ms`.
    ///
    /// # Panics
    /// It does not start.
    pub fn start(folder: &Path, model: Model, machines: usize, task_ms: u32) -> Self {
        Self::start_with(folder, model, machines, task_ms, PASSWORD)
    }

    /// The same with another password.
    ///
    /// # Panics
    /// It does not start.
    pub fn start_with(folder: &Path, model: Model, machines: usize, task_ms: u32, password: &str) -> Self {
        let arguments = vec![
            "-tls".to_owned(),
            "-tools".to_owned(),
            "-model".to_owned(),
            model.word().to_owned(),
            "-vms".to_owned(),
            machines.to_string(),
            "-user".to_owned(),
            USER.to_owned(),
            "-pass".to_owned(),
            password.to_owned(),
            "-task-ms".to_owned(),
            task_ms.to_string(),
            "-state".to_owned(),
            folder.join("vcsim.json").display().to_string(),
        ];
        Self::spawn(arguments, "127.0.0.1:0", password)
    }

    fn spawn(arguments: Vec<String>, listen: &str, password: &str) -> Self {
        let mut child = Command::new(simulator())
            .args(&arguments)
            .args(["-l", listen])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the simulator starts");
        let mut said = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        let (mut url, mut thumbprint, mut machines) = (String::new(), String::new(), Vec::new());
        loop {
            let line = said.next().expect("it says that it is ready").expect("a line");
            match line.split_once(' ') {
                Some(("url", value)) => value.clone_into(&mut url),
                Some(("thumbprint-sha256", value)) => value.clone_into(&mut thumbprint),
                Some(("vm", value)) => machines.extend(value.splitn(3, ' ').nth(2).map(str::to_owned)),
                _ if line == "ready" => break,
                _ => {}
            }
        }
        machines.sort();
        // It says no more; the pipe stays open in the thread.
        std::thread::spawn(move || said.for_each(drop));
        Self { child, arguments, url, thumbprint, machines, password: password.to_owned() }
    }

    /// Waits until it has ended by itself, and starts it again where it was.
    ///
    /// # Panics
    /// It does not end, or does not start.
    pub fn ends_and_returns(&mut self) {
        self.child.wait().expect("it ends");
        self.returns();
    }

    /// Kills it, and starts it again where it was.
    ///
    /// # Panics
    /// It does not start.
    pub fn dies_and_returns(&mut self) {
        self.child.kill().expect("it is killed");
        self.child.wait().expect("it ends");
        self.returns();
    }

    fn returns(&mut self) {
        let listen = self.url.trim_start_matches("https://").trim_end_matches("/sdk").to_owned();
        let password = self.password.clone();
        *self = Self::spawn(self.arguments.clone(), &listen, &password);
    }

    /// Pulls one of its levers: `inject?method=...&action=...`, `reset`, `expire`, `release`, `calls`.
    ///
    /// # Panics
    /// It does not answer.
    pub fn lab(&self, lever: &str) -> Value {
        let url = format!("{}/_lab/{lever}", self.url.trim_end_matches("/sdk"));
        serde_json::from_slice(&tool("curl", &["-sk", "--max-time", "30", &url]).stdout).expect("JSON")
    }

    /// Every machine, as VMware's own client sees it: `power`, `current` and `snapshots` by the machine's name.
    ///
    /// # Panics
    /// It cannot be read.
    pub fn seen(&self) -> Value {
        serde_json::from_str(&self.by_hand(&["see"])).expect("JSON")
    }

    /// Does something at the host, past Snaptree: `take`, `revert` or `remove`, a machine, and a snapshot's name.
    ///
    /// # Panics
    /// It fails.
    pub fn by_hand(&self, act: &[&str]) -> String {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/lab/vcsim/by_hand.py");
        let mut arguments = vec![script, &self.url, USER, &self.password];
        arguments.extend(act);
        let said = tool(text(python()), &arguments).stdout;
        String::from_utf8(said).expect("text")
    }

    /// Registers it as the host `lab`, with the password in a file in `folder`.
    ///
    /// # Panics
    /// It is not registered.
    pub fn add_to(&self, program: &Program, folder: &Path) {
        let file = folder.join("password");
        std::fs::write(&file, format!("{}\n", self.password)).expect("the password's file");
        let file = file.to_str().expect("a path");
        let add = ["host", "add", "lab", "--url", &self.url, "--user", USER, "--password-file", file];
        program.json(0, &[&add[..], &["--thumbprint", &self.thumbprint]].concat());
    }
}

impl Drop for Simulator {
    fn drop(&mut self) {
        // It may have ended.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
