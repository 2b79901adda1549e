//! `snaptree audit ...`: whether the log is what was written.

use anyhow::Result;
use serde::Serialize;
use snaptree_engine::driver::Head;
use snaptree_engine::event::Hash;
use snaptree_store::Verification;

use crate::args::inspect::AuditCommand;
use crate::context::Context;
use crate::exit::{Exit, Trouble};
use crate::render;
use crate::render::text::{Look, safe};

/// The last event of the log.
#[derive(Serialize)]
struct HeadView {
    seq: u64,
    hash: String,
}

impl From<Head> for HeadView {
    fn from(head: Head) -> Self {
        Self { seq: head.seq, hash: head.hash.to_string() }
    }
}

/// The document of `audit verify`.
#[derive(Serialize)]
struct VerifyView {
    ok: bool,
    events: u64,
    head: Option<HeadView>,
    problem: Option<String>,
    differences: Vec<String>,
}

/// Carries out a command on the log as evidence.
///
/// # Errors
/// The log cannot be read.
pub async fn run(context: &Context, command: AuditCommand) -> Result<Exit> {
    match command {
        AuditCommand::Verify { head } => verify(context, head.as_deref()).await,
        AuditCommand::Head => head(context).await,
    }
}

async fn head(context: &Context) -> Result<Exit> {
    let head = context.reader().await?.engine.log().head().await?;
    if context.json {
        render::json(&HeadView::from(head))?;
    } else {
        render::print(&format!("{}:{}\n", head.seq, head.hash))?;
    }
    Ok(Exit::Done)
}

async fn verify(context: &Context, expected: Option<&str>) -> Result<Exit> {
    let expected = expected.map(head_of).transpose()?;
    let reader = context.planner().await?;
    let view = match reader.files()?.verify(expected)? {
        Verification::Sound(sound) => {
            let mut differences = reader.files()?.differences()?;
            differences.extend(reader.engine.contradictions().await?);
            VerifyView {
                ok: differences.is_empty(),
                events: sound.events,
                head: Some(sound.head.into()),
                problem: None,
                differences,
            }
        }
        Verification::Broken(problem) => VerifyView {
            ok: false,
            events: problem.seq.saturating_sub(1),
            head: None,
            problem: Some(problem.to_string()),
            differences: Vec::new(),
        },
    };
    let exit = if view.ok { Exit::Done } else { Exit::Failed };
    if context.json {
        render::json(&view)?;
        return Ok(exit);
    }
    let look = Look::of_stdout();
    match (&view.problem, &view.head) {
        (Some(problem), _) => {
            let found = format!("{}: {}", look.paint.bad("broken"), safe(problem));
            render::print(&format!("{found}\n{} events before it are sound\n", view.events))?;
        }
        (None, Some(head)) => {
            let found = look.paint.good("sound");
            render::print(&format!("{found}: {} events\nhead {}:{}\n", view.events, head.seq, head.hash))?;
            for difference in &view.differences {
                let told = format!("{}: {}\n", look.paint.bad("differs"), safe(difference));
                render::print(&told)?;
            }
            if !view.differences.is_empty() {
                render::note(
                    "the log itself is what was written, and everything that is decided goes by it; \
                     rows that differ are made again after: sqlite3 snaptree.db 'DELETE FROM read_model; \
                     DELETE FROM checkpoints'",
                );
            }
        }
        (None, None) => {}
    }
    Ok(exit)
}

/// Reads a head as `audit head` prints it.
fn head_of(text: &str) -> Result<Head, Trouble> {
    let parsed = text.trim().split_once(':').and_then(|(seq, hash)| {
        let digits = hash.as_bytes();
        if digits.len() != 64 || !digits.is_ascii() {
            return None;
        }
        let mut bytes = [0; 32];
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(hash.get(2 * index..2 * index + 2)?, 16).ok()?;
        }
        Some(Head { seq: seq.parse().ok()?, hash: Hash(bytes) })
    });
    parsed.ok_or_else(|| {
        Trouble::usage("a head is written SEQ:HASH").hint("as `snaptree audit head` prints it")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_read_back() {
        let text = format!("12:{}", "0f".repeat(32));
        let head = head_of(&text).unwrap();
        assert_eq!((head.seq, head.hash), (12, Hash([15; 32])));
        for bad in
            ["", "12", "12:", "x:00", &format!("12:{}", "é".repeat(32)), &format!("-1:{}", "0f".repeat(32))]
        {
            assert!(head_of(bad).is_err(), "{bad}");
        }
    }
}
