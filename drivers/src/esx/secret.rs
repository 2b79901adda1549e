//! Where a host's password comes from. The log keeps that, and never the password.

use std::convert::Infallible;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use snaptree_engine::driver::DriverError;
use snaptree_engine::operation::Code;
use tokio::io::AsyncReadExt as _;

use crate::child::{self, Bound};

/// Longest password, in bytes.
const PASSWORD_BYTES_MAX: u64 = 4_096;
/// How long a command that prints the password may take.
const COMMAND_TIME_MAX: Duration = Duration::from_secs(30);

/// Where a password comes from. It is read whenever somebody logs in, so it may change there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum PasswordSource {
    /// The first line of a file.
    File(PathBuf),
    /// An environment variable of the process that does the work.
    Environment(String),
    /// The first line that a command prints; it is run by `sh -c`.
    Command(String),
}

impl fmt::Display for PasswordSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Environment(name) => write!(f, "environment variable {name}"),
            Self::Command(_) => f.write_str("a command"),
        }
    }
}

/// A password. It is not printed.
pub struct Secret(String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

impl Secret {
    /// The password itself.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// `text` without the password, should a host repeat it.
    pub fn cut_from(&self, text: &str) -> String {
        if self.0.is_empty() { text.to_owned() } else { text.replace(&self.0, "...") }
    }
}

impl PasswordSource {
    /// Reads the password.
    ///
    /// # Errors
    /// It cannot be read, or is empty. What was read is not told.
    pub async fn read(&self) -> Result<Secret, DriverError> {
        let text = match self {
            Self::File(path) => {
                let unreadable =
                    |error: std::io::Error| self.unusable(format!("cannot read {}: {error}", path.display()));
                let read = async { limited(tokio::fs::File::open(path).await?).await };
                // It may be a pipe that nobody writes.
                let read = tokio::time::timeout(COMMAND_TIME_MAX, read).await;
                read.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into())).map_err(unreadable)?
            }
            Self::Environment(name) => std::env::var(name)
                .map_err(|_| self.unusable(format!("environment variable {name} is not set, or no text")))?,
            Self::Command(command) => self.printed_by(command).await?,
        };
        let first = text.lines().next().unwrap_or_default();
        if first.is_empty() {
            return Err(self.unusable(format!("{self} holds no password")));
        }
        Ok(Secret(first.to_owned()))
    }

    async fn printed_by(&self, command: &str) -> Result<String, DriverError> {
        let arguments = ["-c", command].map(OsString::from);
        let mut child = child::spawn(Path::new("sh"), &arguments, &[], Bound::ToUs)
            .map_err(|error| self.unusable(format!("cannot run sh: {error}")))?;
        let (output, said) = child.streams();
        // What it says otherwise is read, so that it never waits for us, and not told: it may be about the password.
        let heard = async {
            if let Some(mut said) = said {
                let _ = tokio::io::copy(&mut said, &mut tokio::io::sink()).await;
            }
            std::future::pending::<Infallible>().await
        };
        let printed = async {
            let text = match output {
                Some(output) => limited(output).await?,
                None => String::new(),
            };
            Ok::<_, std::io::Error>((text, child.wait().await?))
        };
        let work = async {
            tokio::select! {
                printed = printed => printed,
                never = heard => match never {},
            }
        };
        match tokio::time::timeout(COMMAND_TIME_MAX, work).await {
            Ok(Ok((text, status))) if status.success() => Ok(text),
            Ok(Ok((_, status))) => Err(self.unusable(format!("the password's command ended with {status}"))),
            Ok(Err(error)) => Err(self.unusable(format!("the password's command failed: {error}"))),
            Err(_) => {
                let seconds = COMMAND_TIME_MAX.as_secs();
                Err(self.unusable(format!("the password's command did not end within {seconds} s")))
            }
        }
    }

    fn unusable(&self, message: String) -> DriverError {
        DriverError::permanent(Code::Permission, message)
            .hint("`snaptree host show` tells where the password comes from; `host add --replace` changes it")
    }
}

async fn limited(source: impl tokio::io::AsyncRead + Unpin) -> std::io::Result<String> {
    let mut text = String::new();
    source.take(PASSWORD_BYTES_MAX).read_to_string(&mut text).await?;
    Ok(text)
}
