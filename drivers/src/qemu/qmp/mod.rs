//! A QMP client: one connection to QEMU's monitor, with one owner.
//!
//! # Guarantees
//! * Every command carries an id; an answer that comes after its time is thrown away, and the connection stays usable.
//! * What came is never lost by a dropped future: a line that is not complete yet is kept.
//! * Events are kept in order, the newest `events_max` of them.
//!
//! # Assumptions
//! * QEMU serves one client at a time: a second one is accepted, and greeted when the first is gone.
//!
//! The crate `qapi` (0.15) was looked at first. It reads lines of any length, knows no time limits, and ends the
//! connection when the answer to a command arrives that was given up; a hung QEMU is an everyday thing here.

mod silence;

use std::collections::VecDeque;
use std::fs::File;
use std::io::{ErrorKind, IoSlice};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub(super) use silence::Silence;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout_at};

/// Ids are no other client's, lest the answer to one of its commands is taken for ours.
static NEXT_ID: AtomicU64 = AtomicU64::new(0);
/// How many commands of one process have ids of their own.
const ID_BITS: u32 = 32;
/// Most messages before the greeting.
const STRAYS_MAX: usize = 64;

/// How much is read at once.
const CHUNK_BYTES: usize = 16 << 10;

/// Bounds of a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// For the connection.
    pub(super) connect_ms: u64,
    /// For the greeting.
    pub(super) greeting_ms: u64,
    /// For an answer.
    pub(super) reply_ms: u64,
    /// Longest line.
    pub(super) line_bytes_max: usize,
    /// Most events that are kept.
    pub(super) events_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect_ms: 1_000,
            greeting_ms: 2_000,
            reply_ms: 10_000,
            line_bytes_max: 4 << 20,
            events_max: 10_000,
        }
    }
}

/// Why QEMU did not do as it was told, or nobody knows whether it did.
#[derive(Debug, thiserror::Error)]
pub(super) enum QmpError {
    /// No socket, or nobody behind it.
    #[error("nobody answers at QMP socket {}", .socket.display())]
    Absent {
        /// The socket.
        socket: PathBuf,
    },
    /// It does not greet.
    #[error("QEMU at {} does not greet: {why}", .socket.display())]
    Silent {
        /// The socket.
        socket: PathBuf,
        /// As far as the kernel knows.
        why: Silence,
    },
    /// It hangs or is busy; the command may take effect later.
    #[error("QEMU has not answered {command} after {waited_ms} ms")]
    TimedOut {
        /// The command.
        command: &'static str,
        /// How long it was given.
        waited_ms: u64,
    },
    /// QEMU's own error: the command had no effect.
    #[error("QEMU refuses {command}: {description}")]
    Refused {
        /// The command.
        command: &'static str,
        /// QEMU's words.
        description: String,
    },
    /// The connection ended in the middle.
    #[error("QEMU at {} closed the connection", .socket.display())]
    Closed {
        /// The socket.
        socket: PathBuf,
    },
    /// It does not speak QMP.
    #[error("what answers at {} does not speak QMP: {reason}", .socket.display())]
    Malformed {
        /// The socket.
        socket: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The operating system failed.
    #[error("QMP socket {} cannot be used: {source}", .socket.display())]
    Io {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// A connection.
#[derive(Debug)]
pub(super) struct Qmp {
    socket: PathBuf,
    stream: UnixStream,
    limits: Limits,
    partial: Vec<u8>,
    events: VecDeque<Value>,
    version: Version,
}

/// QEMU's version: major, minor.
pub(super) type Version = (u64, u64);

impl Qmp {
    /// Connects, waits for the greeting, and leaves the negotiation behind.
    pub(super) async fn connect(socket: &Path, limits: Limits) -> Result<Self, QmpError> {
        let path = || socket.to_path_buf();
        let until = Instant::now() + Duration::from_millis(limits.connect_ms);
        let stream = match timeout_at(until, UnixStream::connect(socket)).await {
            Err(_) => return Err(QmpError::Silent { socket: path(), why: Silence::of(socket) }),
            Ok(Ok(stream)) => stream,
            Ok(Err(source)) => {
                return Err(match source.kind() {
                    ErrorKind::NotFound | ErrorKind::ConnectionRefused => QmpError::Absent { socket: path() },
                    _ => QmpError::Io { socket: path(), source },
                });
            }
        };
        let mut qmp = Self {
            socket: path(),
            stream,
            limits,
            partial: Vec::new(),
            events: VecDeque::new(),
            version: (0, 0),
        };
        let until = Instant::now() + Duration::from_millis(limits.greeting_ms);
        match timeout_at(until, qmp.greeting()).await {
            Err(_) => return Err(QmpError::Silent { socket: path(), why: Silence::of(socket) }),
            Ok(greeting) => greeting?,
        }
        qmp.execute("qmp_capabilities", Value::Null).await?;
        Ok(qmp)
    }

    /// Reads up to the greeting. The answer to a command of the client before may come first.
    async fn greeting(&mut self) -> Result<(), QmpError> {
        for _ in 0..STRAYS_MAX {
            let message = self.read().await?;
            if message.get("QMP").is_some() {
                let part = |name: &str| {
                    message.pointer(&format!("/QMP/version/qemu/{name}")).and_then(Value::as_u64)
                };
                self.version = (part("major").unwrap_or(0), part("minor").unwrap_or(0));
                return Ok(());
            }
            if !["return", "error", "event"].iter().any(|key| message.get(key).is_some()) {
                break;
            }
            tracing::debug!(%message, "meant for the client before");
        }
        Err(self.malformed("no greeting"))
    }

    /// Executes a command within the usual time; `Null` arguments are none.
    pub(super) async fn execute(
        &mut self,
        command: &'static str,
        arguments: Value,
    ) -> Result<Value, QmpError> {
        self.execute_within(command, arguments, self.limits.reply_ms).await
    }

    /// QEMU's version, as it greeted.
    pub(super) const fn version(&self) -> Version {
        self.version
    }

    /// The process that listens at the socket; none where the kernel does not say, as for one of another namespace.
    pub(super) fn peer(&self) -> Option<u32> {
        let pid = self.stream.peer_cred().ok()?.pid()?;
        u32::try_from(pid).ok().filter(|pid| *pid != 0)
    }

    /// Executes a command.
    pub(super) async fn execute_within(
        &mut self,
        command: &'static str,
        arguments: Value,
        wait_ms: u64,
    ) -> Result<Value, QmpError> {
        self.send(command, arguments, wait_ms, None).await
    }

    /// Executes a command that an open file goes with: QEMU needs no right of its own to open it.
    pub(super) async fn execute_with(
        &mut self,
        command: &'static str,
        arguments: Value,
        file: &File,
    ) -> Result<Value, QmpError> {
        self.send(command, arguments, self.limits.reply_ms, Some(file)).await
    }

    async fn send(
        &mut self,
        command: &'static str,
        arguments: Value,
        wait_ms: u64,
        file: Option<&File>,
    ) -> Result<Value, QmpError> {
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed) + (u64::from(std::process::id()) << ID_BITS);
        let mut message = json!({ "execute": command, "id": id });
        if !arguments.is_null() {
            message["arguments"] = arguments;
        }
        let until = Instant::now() + Duration::from_millis(wait_ms);
        match timeout_at(until, self.exchange(command, id, message.to_string(), file)).await {
            Ok(answer) => answer,
            Err(_) => Err(QmpError::TimedOut { command, waited_ms: wait_ms }),
        }
    }

    async fn exchange(
        &mut self,
        command: &'static str,
        id: u64,
        mut line: String,
        file: Option<&File>,
    ) -> Result<Value, QmpError> {
        line.push('\n');
        let sent = match file {
            Some(file) => self.write_with(line.as_bytes(), file).await?,
            None => 0,
        };
        self.stream.write_all(&line.as_bytes()[sent..]).await.map_err(|source| self.io(source))?;
        loop {
            let mut message = self.read().await?;
            if message.get("event").is_some() {
                self.keep(message);
            } else if message.get("id").and_then(Value::as_u64) != Some(id) {
                // The answer to a command that was given up, or an error about a line that was no command.
                tracing::debug!(%message, "an answer that nobody waits for");
            } else if let Some(answer) = message.get_mut("return") {
                return Ok(answer.take());
            } else {
                let said = message.pointer("/error/desc").and_then(Value::as_str);
                let description = said.unwrap_or("without saying why").to_owned();
                return Err(QmpError::Refused { command, description });
            }
        }
    }

    /// Writes what goes at once, with an open file beside it.
    async fn write_with(&mut self, bytes: &[u8], file: &File) -> Result<usize, QmpError> {
        let files = [file.as_raw_fd()];
        loop {
            self.stream.writable().await.map_err(|source| self.io(source))?;
            let sent = self.stream.try_io(Interest::WRITABLE, || {
                let beside = [ControlMessage::ScmRights(&files)];
                let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
                Ok(sendmsg::<()>(self.stream.as_raw_fd(), &[IoSlice::new(bytes)], &beside, flags, None)?)
            });
            match sent {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                sent => return sent.map_err(|source| self.io(source)),
            }
        }
    }

    /// The oldest event that was not asked for yet; none if none comes in time.
    pub(super) async fn event(&mut self, wait_ms: u64) -> Result<Option<Value>, QmpError> {
        let until = Instant::now() + Duration::from_millis(wait_ms);
        while self.events.is_empty() {
            match timeout_at(until, self.read()).await {
                Err(_) => return Ok(None),
                Ok(message) => {
                    let message = message?;
                    if message.get("event").is_some() {
                        self.keep(message);
                    }
                }
            }
        }
        Ok(self.events.pop_front())
    }

    fn keep(&mut self, event: Value) {
        if self.events.len() >= self.limits.events_max {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    /// The next line. Nothing that came is lost when the future is dropped.
    async fn read(&mut self) -> Result<Value, QmpError> {
        loop {
            if let Some(end) = self.partial.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.partial.drain(..=end).collect();
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return serde_json::from_slice(&line).map_err(|error| self.malformed(&error.to_string()));
            }
            if self.partial.len() > self.limits.line_bytes_max {
                return Err(
                    self.malformed(&format!("a line of more than {} bytes", self.limits.line_bytes_max))
                );
            }
            let mut chunk = [0; CHUNK_BYTES];
            match self.stream.read(&mut chunk).await {
                Ok(0) => return Err(QmpError::Closed { socket: self.socket.clone() }),
                Ok(count) => self.partial.extend_from_slice(&chunk[..count]),
                Err(source) => return Err(self.io(source)),
            }
        }
    }

    fn malformed(&self, reason: &str) -> QmpError {
        QmpError::Malformed { socket: self.socket.clone(), reason: reason.to_owned() }
    }

    fn io(&self, source: std::io::Error) -> QmpError {
        match source.kind() {
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => {
                QmpError::Closed { socket: self.socket.clone() }
            }
            _ => QmpError::Io { socket: self.socket.clone(), source },
        }
    }
}

#[cfg(test)]
mod tests;
