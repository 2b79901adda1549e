//! Shows what happens, and runs the commands as processes of their own.

use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::render::text::Paint;

/// How long a request that is to be cut short may take to come to the place.
const REACH_MAX: Duration = Duration::from_secs(30);

/// Where the demo is shown.
pub struct Stage {
    program: PathBuf,
    dir: PathBuf,
    state: PathBuf,
    paint: Paint,
    /// Nothing is shown: somebody wants the JSON document alone.
    silent: bool,
}

impl Stage {
    /// A stage in `dir`, with a state directory of its own.
    ///
    /// # Errors
    /// This program cannot be found again.
    pub fn new(dir: &Path, silent: bool) -> Result<Self> {
        Ok(Self {
            program: std::env::current_exe().context("cannot find this program")?,
            dir: dir.to_owned(),
            state: dir.join("state"),
            paint: Paint::of_stdout(),
            silent,
        })
    }

    /// The state directory.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Shows a line.
    ///
    /// # Errors
    /// Standard output cannot be written.
    pub fn say(&self, text: &str) -> Result<()> {
        if self.silent {
            return Ok(());
        }
        let mut out = std::io::stdout().lock();
        writeln!(out, "{text}")?;
        Ok(out.flush()?)
    }

    /// Begins a chapter.
    ///
    /// # Errors
    /// Standard output cannot be written.
    pub fn chapter(&self, title: &str) -> Result<()> {
        self.say(&format!("\n{}", self.paint.bold(format!("== {title}"))))
    }

    /// Shows what was found to be well.
    ///
    /// # Errors
    /// Standard output cannot be written.
    pub fn well(&self, text: &str) -> Result<()> {
        self.say(&format!("  {} {text}", self.paint.good("✓")))
    }

    /// Shows a command as it would be typed.
    ///
    /// # Errors
    /// Standard output cannot be written.
    pub fn typed(&self, command: &str) -> Result<()> {
        self.say(&format!("{} {}", self.paint.dim("$"), self.paint.bold(command)))
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(args).arg("--state").arg(&self.state).current_dir(&self.dir).stdin(Stdio::null());
        // The viewer's own settings are for the viewer's own machines.
        command.env("XDG_CONFIG_HOME", self.dir.join("config")).env_remove("SNAPTREE_FAULT");
        command
    }

    /// Runs a command of this program, shown with what it prints.
    ///
    /// # Errors
    /// It failed.
    pub fn run(&self, args: &[&str]) -> Result<()> {
        let shown: Vec<String> = args.iter().map(|arg| quoted(arg)).collect();
        self.typed(&format!("snaptree {}", shown.join(" ")))?;
        let mut command = self.command(args);
        if self.silent {
            command.stdout(Stdio::null());
        }
        let status = command.status().context("cannot start this program again")?;
        if !status.success() {
            bail!("`snaptree {}` ended with {status}", shown.join(" "));
        }
        Ok(())
    }

    /// Starts a request that stops at `place`, and kills it there with SIGKILL.
    ///
    /// # Errors
    /// It did not come there.
    pub fn cut(&self, request: &str, name: &str, place: &str) -> Result<()> {
        let mut child = self
            .command(&["demo-cut", request, "web", name, "--stop-at", place])
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start this program again")?;
        self.typed(&format!("snaptree {request} web {name} &"))?;
        let pid = child.id();
        let out = child.stdout.take().context("the child has no output")?;
        let (sender, line) = mpsc::channel();
        // Ends with the child, whose end closes the pipe.
        std::thread::spawn(move || {
            let mut text = String::new();
            let read = BufReader::new(out).read_line(&mut text);
            let _ = sender.send(read.map(|_| text));
        });
        let reached = line.recv_timeout(REACH_MAX);
        child.kill().context("cannot kill the child")?;
        child.wait().context("cannot wait for the child")?;
        match reached {
            Ok(Ok(text)) if text.trim_end() == format!("reached {place}") => {}
            _ => bail!("the {request} did not come to {place}"),
        }
        self.say(&format!("  process {pid} is at work, right at {place}"))?;
        self.typed(&format!("kill -9 {pid}"))
    }
}

fn quoted(arg: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,".contains(c);
    if !arg.is_empty() && arg.chars().all(plain) {
        arg.to_owned()
    } else {
        format!("'{}'", arg.replace('\'', r"'\''"))
    }
}

/// Whether somebody watches: short pauses let a person read, and cost a pipe nothing.
pub fn is_watched() -> bool {
    std::io::stdout().is_terminal()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_shown_as_a_shell_would_take_them() {
        for (arg, shown) in
            [("vda=web.qcow2", "vda=web.qcow2"), ("a b", "'a b'"), ("it's", r"'it'\''s'"), ("", "''")]
        {
            assert_eq!(quoted(arg), shown);
        }
    }
}
