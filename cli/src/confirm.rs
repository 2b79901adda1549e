//! Asking before something is discarded.

use std::io::{BufRead, IsTerminal, Write};

use anyhow::Result;

use crate::exit::{Exit, Trouble};
use crate::render::text::safe;

/// Asks on a terminal; elsewhere there is nobody to ask, and whoever wrote the command meant it.
///
/// # Errors
/// The answer was no.
pub fn confirm(question: &str, yes: bool) -> Result<()> {
    if yes || !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
        return Ok(());
    }
    eprint!("{} [y/N] ", safe(question));
    std::io::stderr().flush()?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    if matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes") {
        return Ok(());
    }
    Err(Trouble::new(Exit::Failed, "cancelled", "called off; nothing was done").into())
}
