//! A client of QEMU's guest agent: it has the guest freeze and thaw its file systems.
//!
//! # Guarantees
//! * An answer is never taken for another command's: whatever went wrong before, the next command begins with
//!   `guest-sync-delimited` and a fresh number, and all that comes before its answer is skipped. The byte 0xFF goes
//!   first, so that half a command that was left in the guest is thrown away, too.
//! * A freeze is only sent to an agent that has just answered: it never waits in a guest for an agent to come.
//! * A thaw is sent without waiting for anything, so that an agent which hangs finds it when it goes on.
//!
//! # Assumptions
//! * The agent answers in the order of the commands, and nothing at all while the machine is stopped.
//! * It serves one client at a time: a second one is accepted and hears nothing.
//!
//! The protocol is that of QEMU's `docs/interop/qemu-ga-ref`; what comes from a guest is nobody's friend.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

/// How much is read at once.
const CHUNK_BYTES: usize = 16 << 10;
/// What the agent sends before the answer to a `guest-sync-delimited`.
const DELIMITER: u8 = 0xff;
/// How much of what an agent says of an error is passed on.
const SAID_CHARS_MAX: usize = 200;

/// Bounds of a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// For the connection.
    pub(super) connect_ms: u64,
    /// For the answer by which both sides are in step.
    pub(super) sync_ms: u64,
    /// For an answer that takes the guest no time.
    pub(super) reply_ms: u64,
    /// Longest answer.
    pub(super) line_bytes_max: usize,
    /// Most that is skipped on the way into step: a client before may have left long answers.
    pub(super) skipped_bytes_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect_ms: 1_000,
            sync_ms: 3_000,
            reply_ms: 3_000,
            line_bytes_max: 64 << 10,
            skipped_bytes_max: 64 << 20,
        }
    }
}

/// Why the agent did not do as it was told, or nobody knows whether it did.
#[derive(Debug, thiserror::Error)]
pub(super) enum AgentError {
    /// No socket, or nobody behind it.
    #[error("nobody answers at the guest agent's socket {}", .socket.display())]
    Absent {
        /// The socket.
        socket: PathBuf,
    },
    /// There is a socket, and no agent that answers. No other command was sent.
    #[error("no guest agent answers at {} within {waited_ms} ms: it does not run in the guest, or another client has its socket", .socket.display())]
    Silent {
        /// The socket.
        socket: PathBuf,
        /// How long it was given.
        waited_ms: u64,
    },
    /// It hangs; the command may take effect later.
    #[error("the guest agent has not answered {command} after {waited_ms} ms")]
    TimedOut {
        /// The command.
        command: &'static str,
        /// How long it was given.
        waited_ms: u64,
    },
    /// The agent's own error.
    #[error("the guest agent refuses {command}: {description}")]
    Refused {
        /// The command.
        command: &'static str,
        /// The agent's words.
        description: String,
    },
    /// The connection ended in the middle.
    #[error("the connection to the guest agent at {} ended", .socket.display())]
    Closed {
        /// The socket.
        socket: PathBuf,
    },
    /// It does not speak the agent's language.
    #[error("what answers at {} is no guest agent: {reason}", .socket.display())]
    Malformed {
        /// The socket.
        socket: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The operating system failed.
    #[error("the guest agent's socket {} cannot be used: {source}", .socket.display())]
    Io {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// What the agent believes of the guest's file systems.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    /// Nobody froze them by the agent.
    Thawed,
    /// Somebody did.
    Frozen,
}

/// Whether the next answer is the next command's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    In,
    Out,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Agent {
    socket: PathBuf,
    stream: UnixStream,
    limits: Limits,
    partial: Vec<u8>,
    step: Step,
}

impl Agent {
    /// Connects; whether an agent is there shows at the first command.
    pub(super) async fn connect(socket: &Path, limits: Limits) -> Result<Self, AgentError> {
        let path = || socket.to_path_buf();
        let until = Instant::now() + Duration::from_millis(limits.connect_ms);
        match timeout_at(until, UnixStream::connect(socket)).await {
            Err(_) => Err(AgentError::Silent { socket: path(), waited_ms: limits.connect_ms }),
            Ok(Ok(stream)) => {
                Ok(Self { socket: path(), stream, limits, partial: Vec::new(), step: Step::Out })
            }
            Ok(Err(source)) => Err(match source.kind() {
                ErrorKind::NotFound | ErrorKind::ConnectionRefused => AgentError::Absent { socket: path() },
                _ => AgentError::Io { socket: path(), source },
            }),
        }
    }

    /// Whether the guest's file systems are frozen.
    pub(super) async fn status(&mut self) -> Result<Status, AgentError> {
        let wait = Duration::from_millis(self.limits.reply_ms);
        match self.ask("guest-fsfreeze-status", wait).await?.as_str() {
            Some("thawed") => Ok(Status::Thawed),
            Some("frozen") => Ok(Status::Frozen),
            _ => Err(self.malformed("its answer to guest-fsfreeze-status is neither frozen nor thawed")),
        }
    }

    /// Freezes all file systems of the guest that can be frozen, and says how many.
    ///
    /// # Errors
    /// With [`AgentError::Absent`] and [`AgentError::Silent`] nothing was sent that could freeze them later.
    pub(super) async fn freeze(&mut self, wait: Duration) -> Result<u64, AgentError> {
        let answer = self.ask("guest-fsfreeze-freeze", wait).await?;
        self.number("guest-fsfreeze-freeze", &answer)
    }

    /// Thaws them, and says how many were frozen: none where they are thawed, which is no error.
    pub(super) async fn thaw(&mut self, wait: Duration) -> Result<u64, AgentError> {
        const COMMAND: &str = "guest-fsfreeze-thaw";
        let id = fresh_id();
        let mut words = sync_words(id);
        words.extend(words_of(COMMAND));
        let until = Instant::now() + wait;
        self.step = Step::Out;
        let answer = match timeout_at(until, self.thaw_now(COMMAND, &words, id)).await {
            Ok(answer) => answer?,
            Err(_) => return Err(AgentError::TimedOut { command: COMMAND, waited_ms: millis(wait) }),
        };
        self.step = Step::In;
        self.number(COMMAND, &answer)
    }

    async fn thaw_now(&mut self, command: &'static str, words: &[u8], id: u64) -> Result<Value, AgentError> {
        self.write(words).await?;
        self.skip_to(id).await?;
        self.answer(command).await
    }

    /// A command that is only sent to an agent that answers.
    async fn ask(&mut self, command: &'static str, wait: Duration) -> Result<Value, AgentError> {
        if self.step == Step::Out {
            self.sync().await?;
        }
        self.step = Step::Out;
        let until = Instant::now() + wait;
        let asked = async {
            self.write(&words_of(command)).await?;
            self.answer(command).await
        };
        let answer = match timeout_at(until, asked).await {
            Ok(answer) => answer,
            Err(_) => return Err(AgentError::TimedOut { command, waited_ms: millis(wait) }),
        };
        if matches!(answer, Ok(_) | Err(AgentError::Refused { .. })) {
            self.step = Step::In;
        }
        answer
    }

    /// Brings both sides into step.
    async fn sync(&mut self) -> Result<(), AgentError> {
        let id = fresh_id();
        let until = Instant::now() + Duration::from_millis(self.limits.sync_ms);
        let synced = async {
            self.write(&sync_words(id)).await?;
            self.skip_to(id).await
        };
        match timeout_at(until, synced).await {
            Ok(synced) => synced?,
            Err(_) => {
                let waited_ms = self.limits.sync_ms;
                return Err(AgentError::Silent { socket: self.socket.clone(), waited_ms });
            }
        }
        self.step = Step::In;
        Ok(())
    }

    async fn write(&mut self, words: &[u8]) -> Result<(), AgentError> {
        self.stream.write_all(words).await.map_err(|source| self.io(source))
    }

    /// Skips all that comes before the delimited answer with that number.
    async fn skip_to(&mut self, id: u64) -> Result<(), AgentError> {
        let mut skipped = 0;
        loop {
            let delimited = self.partial.iter().position(|byte| *byte == DELIMITER);
            // What stands before a delimiter, or without one, is nobody's answer.
            let junk_bytes = delimited.map_or(self.partial.len(), |at| at + 1);
            self.partial.drain(..junk_bytes);
            skipped += junk_bytes;
            if delimited.is_some() {
                let line = self.line().await?;
                // Half an answer may stand before it, if the agent was ended in the middle of one.
                let last = line.rsplit(|byte| *byte == DELIMITER).next().unwrap_or_default();
                let said = serde_json::from_slice::<Value>(last).ok();
                if said.and_then(|said| said.get("return")?.as_u64()) == Some(id) {
                    return Ok(());
                }
                skipped += line.len();
            } else {
                self.read().await?;
            }
            if skipped > self.limits.skipped_bytes_max {
                let most = self.limits.skipped_bytes_max;
                return Err(self.malformed(&format!("more than {most} bytes, and no answer among them")));
            }
        }
    }

    /// The answer to the last command.
    async fn answer(&mut self, command: &'static str) -> Result<Value, AgentError> {
        let line = self.line().await?;
        let mut said: Value =
            serde_json::from_slice(&line).map_err(|error| self.malformed(&error.to_string()))?;
        if let Some(answer) = said.get_mut("return") {
            return Ok(answer.take());
        }
        let Some(error) = said.get("error") else {
            return Err(self.malformed("an answer that is neither a return nor an error"));
        };
        let description = error.get("desc").and_then(Value::as_str).unwrap_or("without saying why");
        Err(AgentError::Refused { command, description: shown(description) })
    }

    /// The next line that is not empty.
    async fn line(&mut self) -> Result<Vec<u8>, AgentError> {
        loop {
            if let Some(end) = self.partial.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.partial.drain(..=end).collect();
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return Ok(line);
            }
            if self.partial.len() > self.limits.line_bytes_max {
                let most = self.limits.line_bytes_max;
                return Err(self.malformed(&format!("a line of more than {most} bytes")));
            }
            self.read().await?;
        }
    }

    /// Adds what came to what is kept. Nothing is lost when the future is dropped.
    async fn read(&mut self) -> Result<(), AgentError> {
        let mut chunk = [0; CHUNK_BYTES];
        match self.stream.read(&mut chunk).await {
            Ok(0) => Err(AgentError::Closed { socket: self.socket.clone() }),
            Ok(count) => {
                self.partial.extend_from_slice(&chunk[..count]);
                Ok(())
            }
            Err(source) => Err(self.io(source)),
        }
    }

    fn number(&self, command: &str, answer: &Value) -> Result<u64, AgentError> {
        answer.as_u64().ok_or_else(|| self.malformed(&format!("its answer to {command} is no number")))
    }

    fn malformed(&self, reason: &str) -> AgentError {
        AgentError::Malformed { socket: self.socket.clone(), reason: reason.to_owned() }
    }

    fn io(&self, source: std::io::Error) -> AgentError {
        match source.kind() {
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => {
                AgentError::Closed { socket: self.socket.clone() }
            }
            _ => AgentError::Io { socket: self.socket.clone(), source },
        }
    }
}

/// A number that no answer before can have; the agent's numbers are signed.
fn fresh_id() -> u64 {
    Uuid::now_v7().as_u64_pair().1 & 0xffff_ffff_ffff
}

fn sync_words(id: u64) -> Vec<u8> {
    let sync = json!({ "execute": "guest-sync-delimited", "arguments": { "id": id } });
    let mut words = vec![DELIMITER];
    words.extend(format!("{sync}\n").bytes());
    words
}

fn words_of(command: &str) -> Vec<u8> {
    format!("{}\n", json!({ "execute": command })).into_bytes()
}

fn millis(wait: Duration) -> u64 {
    u64::try_from(wait.as_millis()).unwrap_or(u64::MAX)
}

/// A cut of a guest's text that is fit for an error text.
fn shown(text: &str) -> String {
    let plain = |c: char| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c };
    text.chars().take(SAID_CHARS_MAX).map(plain).collect()
}

#[cfg(test)]
mod tests;
