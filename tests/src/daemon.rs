//! `snaptree serve` as a process that can be stopped, let go on, and killed.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Stdio};

use serde_json::Value;

use crate::images::tool;
use crate::program::{Program, wait_until_stopped};

/// A daemon that listens; killed when it is dropped.
#[derive(Debug)]
pub struct Daemon(Child);

impl Daemon {
    /// Starts one, and returns when it listens. What it says is read by nobody.
    ///
    /// # Panics
    /// It ends before that.
    pub fn start(program: &Program) -> Self {
        let mut child = program
            .command(&["serve"])
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("it starts");
        let mut log = BufReader::new(child.stderr.take().expect("a pipe"));
        let (mut line, mut said) = (String::new(), String::new());
        while !line.contains("listening") {
            line.clear();
            assert_ne!(log.read_line(&mut line).expect("its log"), 0, "it ended before it listened: {said}");
            said.push_str(&line);
        }
        // A pipe that nobody empties would block it.
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
        Self(child)
    }

    /// The most memory that it has held so far, in bytes (`VmHWM`).
    ///
    /// # Panics
    /// It has ended.
    pub fn memory_peak_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id())).expect("it lives");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
        let kib = line.trim().trim_end_matches("kB").trim().parse::<u64>().expect("a number");
        kib << 10
    }

    /// Runs `act` while the daemon stands still. Its children do not.
    ///
    /// # Panics
    /// It has ended.
    pub fn while_stopped<T>(&self, act: impl FnOnce() -> T) -> T {
        self.signal("STOP");
        wait_until_stopped(self.0.id());
        let answer = act();
        self.signal("CONT");
        answer
    }

    /// Kills it, as a power cut would.
    ///
    /// # Panics
    /// It had ended by itself.
    pub fn kill(mut self) {
        assert!(self.0.try_wait().expect("its state").is_none(), "it ended by itself");
        self.0.kill().expect("it is killed");
        self.0.wait().expect("it ends");
    }

    /// Waits until a fault that it was started with has killed it.
    ///
    /// # Panics
    /// It ends otherwise.
    pub fn dies(mut self) {
        let status = self.0.wait().expect("it ends");
        assert_eq!(status.code(), None, "it was not killed: {status}");
    }

    /// Tells it to end, and waits until it has.
    ///
    /// # Panics
    /// It fails.
    pub fn end(self) {
        self.tell_to_end();
        self.ends();
    }

    /// Tells it to end.
    ///
    /// # Panics
    /// It has ended.
    pub fn tell_to_end(&self) {
        self.signal("TERM");
    }

    /// Waits until it has ended as it was told to.
    ///
    /// # Panics
    /// It fails.
    pub fn ends(mut self) {
        assert!(self.0.wait().expect("it ends").success(), "it failed");
    }

    fn signal(&self, name: &str) {
        tool("kill", &[&format!("-{name}"), &self.0.id().to_string()]);
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Asks the daemon that listens on `socket`, as any program may that speaks HTTP. The status, and the body if it is JSON.
///
/// # Panics
/// Nobody listens, or what answers is no HTTP.
pub fn post(socket: &Path, path: &str, body: &Value) -> (u16, Value) {
    let body = body.to_string();
    let mut stream = UnixStream::connect(socket).expect("it listens");
    let length = body.len();
    let head =
        format!("POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n");
    // A server that has seen enough closes without reading the rest.
    let _ = stream.write_all(&[head.as_bytes(), body.as_bytes()].concat());
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok());
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    (status.expect("a status"), serde_json::from_str(body).unwrap_or(Value::Null))
}
