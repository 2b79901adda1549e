//! The hash chain: what makes a changed, removed or inserted event visible.
//!
//! # Definition
//! The hash of an event is `SHA-256(previous || field(seq) || field(id) || ... || field(data))`, over the 14 columns
//! of `events` in the order of the table, all but `hash`:
//! `seq, id, stream, version, kind, schema, at, actor, origin, epoch, operation, cause, key, data`.
//!
//! * `previous` is the 32 bytes of the hash of the event before; before the first event, the installation id
//!   (`meta.installation`, which the payload of the first event, `System.Opened`, repeats in hex).
//! * `field(x)` is the length of `x` in bytes as an unsigned 64-bit big-endian number, and then those bytes.
//! * An integer's bytes are its decimal digits in ASCII, with a leading `-` if it is negative.
//! * A text's bytes are its UTF-8, exactly as stored.
//! * NULL is the length `0xFFFFFFFFFFFFFFFF` and no bytes.
//!
//! Hashes are over what is stored, so old payloads are never upcast before they are verified. A verifier:
//!
//! ```python
//! import hashlib, sqlite3, sys
//! def field(x):
//!     if x is None: return b"\xff" * 8
//!     x = str(x).encode()
//!     return len(x).to_bytes(8, "big") + x
//! db = sqlite3.connect(sys.argv[1])
//! previous = db.execute("SELECT installation FROM meta").fetchone()[0]
//! for seq, *row in db.execute("""SELECT seq, hash, id, stream, version, kind, schema, at, actor, origin, epoch,
//!         operation, cause, key, data FROM events ORDER BY seq"""):
//!     stored = row.pop(0)
//!     previous = hashlib.sha256(previous + b"".join(map(field, [seq, *row]))).digest()
//!     if previous != stored: sys.exit(f"event {seq} is not what was written")
//! print(seq, previous.hex())
//! ```
//!
//! # Caveats
//! A log whose newest events were cut off is a sound, shorter log. Only a head that was kept elsewhere shows it:
//! give one to [`Store::verify`](crate::Store::verify). Whoever can write the file can also make a new chain; again
//! only a head kept elsewhere tells the two apart.

use sha2::{Digest, Sha256};
use snaptree_engine::event::Hash;

/// How many columns are hashed.
pub const COLUMNS: usize = 14;

/// A stored value, as it is hashed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field<'a> {
    /// NULL.
    Null,
    /// An INTEGER.
    Integer(i64),
    /// A TEXT's bytes.
    Text(&'a [u8]),
}

impl<'a> From<&'a str> for Field<'a> {
    fn from(text: &'a str) -> Self {
        Self::Text(text.as_bytes())
    }
}

impl<'a, T: Into<Field<'a>>> From<Option<T>> for Field<'a> {
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::Null, Into::into)
    }
}

impl From<i64> for Field<'_> {
    fn from(value: i64) -> Self {
        Self::Integer(value)
    }
}

/// The hash of the event with these columns that follows the event with the hash `previous`.
///
/// ```
/// use snaptree_engine::event::Hash;
/// use snaptree_store::chain::{Field, link};
/// let first = link(&Hash([0; 32]), &[Field::Null; 14]);
/// assert_ne!(first, link(&Hash([0; 32]), &[Field::Text(b""); 14]));
/// ```
pub fn link(previous: &Hash, fields: &[Field<'_>; COLUMNS]) -> Hash {
    let mut digest = Sha256::new();
    digest.update(previous.0);
    for field in fields {
        match field {
            Field::Null => digest.update(u64::MAX.to_be_bytes()),
            Field::Integer(value) => update(&mut digest, value.to_string().as_bytes()),
            Field::Text(bytes) => update(&mut digest, bytes),
        }
    }
    Hash(digest.finalize().into())
}

fn update(digest: &mut Sha256, bytes: &[u8]) {
    digest.update((bytes.len() as u64).to_be_bytes());
    digest.update(bytes);
}
