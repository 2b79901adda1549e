//! How the program ends: exit codes, and errors in words or in JSON.

use std::fmt;

use anyhow::Error;
use serde::{Deserialize, Serialize};
use snaptree_engine::engine::EngineError;
use snaptree_engine::log::LogError;
use snaptree_engine::operation::{Code, Failure};
use snaptree_store::StoreError;

use crate::render::text::safe;
use crate::wire::WireError;

/// How the program ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// What was asked for is done.
    Done,
    /// It failed.
    Failed,
    /// It was asked wrongly.
    Usage,
    /// What was named is not there.
    NotFound,
    /// It was refused: rejected, held, unsupported, in use.
    Refused,
    /// Someone has to look at it, or it is not over yet.
    Attention,
}

impl Exit {
    /// The process's exit code.
    pub const fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::NotFound => 3,
            Self::Refused => 4,
            Self::Attention => 5,
        }
    }

    /// The way of ending that an exit code stands for.
    pub const fn of_code(code: u8) -> Self {
        match code {
            0 => Self::Done,
            2 => Self::Usage,
            3 => Self::NotFound,
            4 => Self::Refused,
            5 => Self::Attention,
            _ => Self::Failed,
        }
    }
}

/// A failure that the program itself names; what lies below goes into the `anyhow` chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// How the program ends with it.
    pub exit: Exit,
    /// The word for programs.
    pub code: &'static str,
    /// What happened, and why.
    pub message: String,
    /// What can be done about it.
    pub hint: Option<String>,
}

impl Trouble {
    /// A failure of that kind.
    pub fn new(exit: Exit, code: &'static str, message: impl Into<String>) -> Self {
        Self { exit, code, message: message.into(), hint: None }
    }

    /// What was named is not there.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Exit::NotFound, "not-found", message)
    }

    /// It was asked wrongly, in a way that the command line's grammar does not show.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, "usage", message)
    }

    /// Adds what can be done about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Trouble {}

/// A failure that a daemon told.
#[derive(Clone, Debug)]
pub struct FromDaemon(pub WireError);

impl fmt::Display for FromDaemon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl std::error::Error for FromDaemon {}

/// The `error` of every JSON document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorView {
    /// The word for programs.
    pub code: String,
    /// What happened, and why.
    pub message: String,
    /// What can be done about it.
    pub hint: Option<String>,
}

impl From<&Failure> for ErrorView {
    fn from(failure: &Failure) -> Self {
        Self {
            code: failure.code.as_str().to_owned(),
            message: failure.message.clone(),
            hint: failure.hint.clone(),
        }
    }
}

/// The JSON document that takes the place of a result.
#[derive(Serialize)]
struct ErrorDocument {
    error: ErrorView,
}

/// An error, ready to be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// How the program ends with it.
    pub exit: Exit,
    /// The error.
    pub error: ErrorView,
    /// What lies below, outermost first.
    pub causes: Vec<String>,
}

/// How the program ends when a failure was found before anything was touched.
pub const fn exit_of(failure: &Failure) -> Exit {
    match (failure.code, failure.refused) {
        (Code::NotFound, _) => Exit::NotFound,
        (Code::InUse | Code::Unsupported | Code::Held | Code::Exists | Code::Invalid, _) | (_, true) => {
            Exit::Refused
        }
        _ => Exit::Failed,
    }
}

/// Whether an error is about the domain that was asked about, so that others can still be asked.
pub fn is_of_one_domain(error: &Error) -> bool {
    let of_engine = |cause: &(dyn std::error::Error + 'static)| {
        cause.downcast_ref::<EngineError>().map(EngineError::spares_others)
    };
    let of_daemon = |cause: &(dyn std::error::Error + 'static)| {
        // A daemon that ends tells everybody the same.
        cause.downcast_ref::<FromDaemon>().map(|told| told.0.code != "stopping")
    };
    error.chain().find_map(|cause| of_engine(cause).or_else(|| of_daemon(cause))).unwrap_or(false)
}

/// Finds the words and the exit code of an error.
pub fn told(error: &Error) -> Told {
    let (exit, code, hint) = error
        .chain()
        .find_map(classified)
        .unwrap_or_else(|| (Exit::Failed, fallback_code(error).to_owned(), None));
    let mut causes: Vec<String> = error.chain().map(ToString::to_string).collect();
    causes.dedup();
    let message = causes.remove(0);
    Told { exit, error: ErrorView { code, message, hint }, causes }
}

fn classified(cause: &(dyn std::error::Error + 'static)) -> Option<(Exit, String, Option<String>)> {
    if let Some(trouble) = cause.downcast_ref::<Trouble>() {
        return Some((trouble.exit, trouble.code.to_owned(), trouble.hint.clone()));
    }
    if let Some(FromDaemon(error)) = cause.downcast_ref::<FromDaemon>() {
        return Some((Exit::of_code(error.exit), error.code.clone(), error.hint.clone()));
    }
    if let Some(failure) = cause.downcast_ref::<EngineError>().and_then(EngineError::failure) {
        return Some((exit_of(failure), failure.code.as_str().to_owned(), failure.hint.clone()));
    }
    if let Some(failure) = cause.downcast_ref::<Failure>() {
        return Some((exit_of(failure), failure.code.as_str().to_owned(), failure.hint.clone()));
    }
    if let Some(error) = cause.downcast_ref::<StoreError>() {
        return of_store(error);
    }
    of_log(cause.downcast_ref::<LogError>()?)
}

fn of_log(error: &LogError) -> Option<(Exit, String, Option<String>)> {
    match error {
        LogError::Full => Some((
            Exit::Failed,
            Code::NoSpace.as_str().to_owned(),
            Some("free some space and try again; `snaptree recover` finishes what was begun".to_owned()),
        )),
        LogError::Damaged(_) => Some((
            Exit::Failed,
            "damaged".to_owned(),
            Some("`snaptree audit verify` tells where; restore the state from a backup".to_owned()),
        )),
        LogError::ReadOnly(_) => Some((Exit::Failed, "permission".to_owned(), None)),
        LogError::Claimed { .. } => Some((Exit::Refused, Code::Exists.as_str().to_owned(), None)),
        LogError::Fenced { .. } => Some((Exit::Failed, "fenced".to_owned(), None)),
        LogError::Conflict { .. } | LogError::KeyUsed { .. } => {
            Some((Exit::Failed, "conflict".to_owned(), Some("try again".to_owned())))
        }
        LogError::Backend { .. } => Some((Exit::Failed, "io".to_owned(), None)),
    }
}

fn of_store(error: &StoreError) -> Option<(Exit, String, Option<String>)> {
    let told = match error {
        StoreError::Missing { .. } => (Exit::NotFound, "not-found", Some(NO_STATE_HINT)),
        StoreError::Locked { .. } => (
            Exit::Refused,
            "in-use",
            Some("wait for it, or give a longer --lock-timeout; readers never wait"),
        ),
        StoreError::NotWritable { .. } => (
            Exit::Failed,
            "permission",
            Some("reading works; to write, make it writable or choose another with --state"),
        ),
        StoreError::Untrusted(error) => {
            return Some((Exit::Refused, Code::Permission.as_str().to_owned(), error.mend()));
        }
        StoreError::NotReadable { .. } => (
            Exit::Failed,
            "permission",
            Some(
                "run it as one of them; or have a daemon run on the state (`snaptree serve`), which answers \
                 members of the group snaptree",
            ),
        ),
        StoreError::Foreign { .. } => {
            (Exit::Failed, "foreign", Some("choose another directory with --state"))
        }
        StoreError::Newer { .. } | StoreError::Older { .. } => (Exit::Failed, "version", None),
        StoreError::Log(error) => return of_log(error),
        StoreError::UnreadableWal { .. } | StoreError::Io { .. } | StoreError::Database { .. } => {
            (Exit::Failed, "io", None)
        }
    };
    Some((told.0, told.1.to_owned(), told.2.map(str::to_owned)))
}

/// What to do where there is no state yet.
pub const NO_STATE_HINT: &str = "`snaptree domain add` makes it; --state DIR or SNAPTREE_STATE name another, `snaptree demo` shows how it works";

fn fallback_code(error: &Error) -> &'static str {
    if error.chain().any(|cause| cause.is::<std::io::Error>()) { "io" } else { "failed" }
}

/// Whether whoever read our output went away: no failure of ours.
pub fn is_broken_pipe(error: &Error) -> bool {
    error.chain().any(|cause| {
        cause.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
    })
}

/// The error for people, on several lines.
pub fn in_words(told: &Told) -> String {
    let mut text = format!("error: {}\n", safe(&told.error.message));
    for cause in &told.causes {
        text.push_str(&format!("  because: {}\n", safe(cause)));
    }
    if let Some(hint) = &told.error.hint {
        text.push_str(&format!("hint: {}\n", safe(hint)));
    }
    text
}

/// The error as the JSON document that takes the place of a result.
pub fn in_json(told: &Told) -> String {
    // Three strings always serialize.
    serde_json::to_string(&ErrorDocument { error: whole(told) }).unwrap_or_default()
}

/// The error with what lies below it in its message.
pub fn whole(told: &Told) -> ErrorView {
    let mut error = told.error.clone();
    for cause in &told.causes {
        error.message.push_str(": ");
        error.message.push_str(cause);
    }
    error
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn failures_have_exit_codes_words_and_hints() {
        let rejection = |code| EngineError::Rejected(Failure::new(code, "no").hint("do").refused());
        for (error, exit, code) in [
            (Error::from(rejection(Code::NotFound)), Exit::NotFound, "not-found"),
            (rejection(Code::Held).into(), Exit::Refused, "held"),
            (rejection(Code::Exists).into(), Exit::Refused, "exists"),
            (rejection(Code::NoSpace).into(), Exit::Refused, "no-space"),
            (Failure::new(Code::Io, "x").into(), Exit::Failed, "io"),
            (Failure::new(Code::InUse, "x").into(), Exit::Refused, "in-use"),
            (StoreError::Missing { dir: "/x".into() }.into(), Exit::NotFound, "not-found"),
            (Trouble::usage("x").into(), Exit::Usage, "usage"),
            (std::io::Error::other("x").into(), Exit::Failed, "io"),
            (anyhow::anyhow!("x"), Exit::Failed, "failed"),
        ] {
            let told = told(&error);
            assert_eq!((told.exit, told.error.code.as_str()), (exit, code), "{error:?}");
        }
    }

    #[test]
    fn a_chain_is_told_once_per_sentence_and_safely() {
        let error = Err::<(), _>(std::io::Error::other("disk\u{1b}[31m")).context("cannot read").unwrap_err();
        let told = told(&error);
        assert_eq!(in_words(&told), "error: cannot read\n  because: disk\\u{1b}[31m\n");
        assert_eq!(
            in_json(&told),
            r#"{"error":{"code":"io","message":"cannot read: disk\u001b[31m","hint":null}}"#
        );
    }
}
