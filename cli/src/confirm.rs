//! Asking before something is discarded.

use std::io::{BufRead, IsTerminal, Write};

use anyhow::Result;

use crate::exit::{Exit, Trouble};
use crate::render::text::safe;

/// Whether somebody is asked: `yes` is the answer given before.
pub fn is_asked(yes: bool) -> bool {
    !yes && is_answered()
}

/// Whether somebody can be asked.
fn is_answered() -> bool {
    std::io::stdin().is_terminal() && std::io::stderr().is_terminal()
}

/// Asks before more is discarded than what was named; where nobody can be asked, that needs `--yes`.
///
/// # Errors
/// The answer was no, or nobody can give one.
pub fn confirm_unnamed(what: &str, question: &str, yes: bool) -> Result<()> {
    if !yes && !is_answered() {
        let message =
            format!("{}, which the command does not name, and nobody can be asked here", safe(what));
        return Err(Trouble::new(Exit::Refused, "unconfirmed", message)
            .hint("say --yes if that is meant; --dry-run shows what would be done")
            .into());
    }
    confirm(question, yes)
}

/// Asks on a terminal; elsewhere there is nobody to ask, and whoever wrote the command meant it.
///
/// # Errors
/// The answer was no.
pub fn confirm(question: &str, yes: bool) -> Result<()> {
    if !is_asked(yes) {
        return Ok(());
    }
    eprint!("{} [y/N] ", question.lines().map(safe).collect::<Vec<_>>().join("\n"));
    std::io::stderr().flush()?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    if matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes") {
        return Ok(());
    }
    Err(Trouble::new(Exit::Failed, "cancelled", "called off; nothing was done").into())
}
