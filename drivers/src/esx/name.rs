//! Names and descriptions on a host: what has to be escaped in them, and the mark by which a snapshot is known as ours.

use snaptree_engine::SnapshotId;

/// What stands before the id in the mark.
const MARK: &str = "snaptree:";

/// How names of snapshots begin that backup programs and the host itself make for a while, and remove themselves.
const HELPERS: [(&str, &str); 6] = [
    ("Consolidate Helper", "vSphere's, for consolidating disks"),
    ("_VCB-BACKUP_", "a backup's (VADP)"),
    ("VEEAM BACKUP TEMPORARY SNAPSHOT", "a backup's (Veeam)"),
    ("__GX_BACKUP__", "a backup's (Commvault)"),
    ("NBU_SNAPSHOT", "a backup's (NetBackup)"),
    ("NAKIVO Backup", "a backup's (NAKIVO)"),
];

/// Whose helper a foreign snapshot is, if its name tells.
pub fn helper(name: &str) -> Option<&'static str> {
    HELPERS.iter().find(|(prefix, _)| name.starts_with(prefix)).map(|(_, whose)| *whose)
}

/// A name as it is sent: `%` begins an escape there, and paths are built of `/` and `\`.
pub fn escaped(name: &str) -> String {
    name.replace('%', "%25").replace('/', "%2f").replace('\\', "%5c")
}

/// A name as it is meant. What is no escape stays as it is.
pub fn unescaped(name: &str) -> String {
    let bytes = name.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let digit = |offset: usize| bytes.get(at + offset).and_then(|byte| char::from(*byte).to_digit(16));
        match (byte, digit(1), digit(2)) {
            (b'%', Some(high), Some(low)) => {
                plain.push(u8::try_from(high * 16 + low).unwrap_or(b'?'));
                at += 3;
            }
            _ => {
                plain.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8(plain).unwrap_or_else(|_| name.to_owned())
}

/// A description with the mark: its last line.
pub fn marked(description: Option<&str>, snapshot: SnapshotId) -> String {
    match description.filter(|text| !text.is_empty()) {
        Some(text) => format!("{text}\n\n{MARK}{snapshot}"),
        None => format!("{MARK}{snapshot}"),
    }
}

/// A description without the mark, and the snapshot that the mark names.
pub fn unmarked(description: &str) -> (Option<String>, Option<SnapshotId>) {
    let text = description.trim_end();
    let (before, last) = text.rsplit_once('\n').unwrap_or(("", text));
    let id = last.trim().strip_prefix(MARK).and_then(|id| id.parse::<SnapshotId>().ok());
    let plain = if id.is_some() { before.strip_suffix('\n').unwrap_or(before) } else { description };
    (Some(plain.to_owned()).filter(|text| !text.is_empty()), id)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;

    proptest! {
        #[test]
        fn a_name_comes_back_as_it_was_sent(name in "\\PC{0,90}") {
            prop_assert_eq!(unescaped(&escaped(&name)), name);
        }

        #[test]
        fn what_is_no_escape_is_left_alone(name in "\\PC{0,20}") {
            // Total: it never panics, also where an escape is cut off.
            let _ = unescaped(&name);
            let _ = unescaped(&format!("{name}%"));
            let _ = unescaped(&format!("{name}%2"));
        }

        #[test]
        fn a_mark_is_found_again_whatever_stands_before_it(text in "(\\PC|\n){0,80}", id in any::<u128>()) {
            let id = SnapshotId::from_uuid(Uuid::from_u128(id));
            let plain = Some(text.clone()).filter(|text| !text.is_empty());
            prop_assert_eq!(unmarked(&marked(Some(&text), id)), (plain, Some(id)));
        }
    }

    #[test]
    fn what_only_looks_like_a_mark_is_none() {
        for text in ["", "snaptree:", "snaptree:1", "about snaptree:0190f7a4-9d4e-7cc0-8f3e-2b5f1c7a9d10"] {
            assert_eq!(unmarked(text).1, None, "{text}");
        }
    }

    #[test]
    fn helpers_are_known_by_how_their_names_begin() {
        assert!(helper("Consolidate Helper- 0").is_some());
        assert!(helper("_VCB-BACKUP_").is_some());
        assert!(helper("before VEEAM BACKUP TEMPORARY SNAPSHOT").is_none());
    }
}
