//! From what is known to what is printed. Nothing here reads the log or asks a hypervisor.

pub mod list;
pub mod operation;
pub mod policy;
pub mod table;
#[cfg(test)]
mod tests;
pub mod text;
pub mod tree;
pub mod view;
pub mod words;

use anyhow::Result;
use serde::Serialize;

/// Prints one JSON document on standard output.
///
/// # Errors
/// Standard output cannot be written.
pub fn json(document: &impl Serialize) -> Result<()> {
    print(&format!("{}\n", serde_json::to_string(document)?))
}

/// Prints a line on stderr. Whoever closed it does not want it.
pub fn note(text: &str) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stderr(), "{}", text.trim_end());
}

/// Prints text on standard output as it is.
///
/// # Errors
/// Standard output cannot be written.
pub fn print(text: &str) -> Result<()> {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}
