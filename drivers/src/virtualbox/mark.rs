//! Our mark: the last line of a snapshot's description, by which a snapshot whose reply was lost is found again.
//!
//! ```text
//! what the user wrote
//!
//! [snaptree <snapshot id> <operation id>]
//! ```

use snaptree_engine::{OperationId, SnapshotId};

/// A description as VirtualBox keeps it, taken apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Marked {
    /// What the user wrote.
    pub text: String,
    /// The snapshot, and the operation that took it.
    pub mark: Option<(SnapshotId, OperationId)>,
}

impl Marked {
    pub(super) fn parse(description: &str) -> Self {
        let (before, last) = match description.rsplit_once('\n') {
            Some((before, last)) => (before, last),
            None => ("", description),
        };
        let mark = last.strip_prefix("[snaptree ").and_then(|rest| rest.strip_suffix(']'));
        let mark = mark.and_then(|ids| ids.split_once(' '));
        let mark =
            mark.and_then(|(snapshot, operation)| Some((snapshot.parse().ok()?, operation.parse().ok()?)));
        match mark {
            Some(mark) => {
                let text = before.strip_suffix('\n').unwrap_or(before).to_owned();
                Self { text, mark: Some(mark) }
            }
            None => Self { text: description.to_owned(), mark: None },
        }
    }

    /// The description for VirtualBox.
    pub(super) fn write(&self) -> String {
        match &self.mark {
            Some((snapshot, operation)) if self.text.is_empty() => {
                format!("[snaptree {snapshot} {operation}]")
            }
            Some((snapshot, operation)) => format!("{}\n\n[snaptree {snapshot} {operation}]", self.text),
            None => self.text.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    #[test]
    fn a_mark_is_found_again_behind_whatever_the_user_wrote() {
        let mark = (SnapshotId::from_uuid(Uuid::now_v7()), OperationId::from_uuid(Uuid::now_v7()));
        for text in ["", "a", "a\n", "\n\n", "[snaptree x y]", "a\n\n[snaptree", "=\"'<&>\t\u{1f600}"] {
            let marked = Marked { text: text.to_owned(), mark: Some(mark) };
            assert_eq!(Marked::parse(&marked.write()), marked, "{text:?}");
            let plain = Marked { text: text.to_owned(), mark: None };
            assert_eq!(Marked::parse(&plain.write()), plain, "{text:?}");
        }
    }
}
