//! What a request may wish for.

use serde::{Deserialize, Serialize};

/// Whether and where a snapshot keeps the machine's memory (libvirt's `memory/@snapshot`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryKind {
    /// Not kept.
    No,
    /// Inside the image.
    Internal,
    /// In a file of its own.
    External,
}

/// Where a snapshot keeps what it holds (libvirt's `disk/@snapshot`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// Where the driver usually does.
    #[default]
    Usual,
    /// Inside the disk images.
    Internal,
}

impl Place {
    /// For what is not written down.
    pub fn is_usual(&self) -> bool {
        *self == Self::Usual
    }
}

/// What a delete takes besides, or instead of, the snapshots named.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeleteScope {
    /// The snapshots named; their changes merge into the children.
    #[default]
    Named,
    /// And all their descendants.
    Children,
    /// All their descendants, but not themselves.
    ChildrenOnly,
}

/// When the data of a deleted snapshot is to be folded away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MergeWish {
    /// As the settings say.
    #[default]
    Auto,
    /// Now, whatever has to be copied.
    Now,
    /// Later.
    Defer,
}

/// Whether a delete touches the data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeleteWhat {
    /// The snapshot and its data.
    #[default]
    Snapshot,
    /// Only what Snaptree knows of it.
    Metadata,
}

/// What becomes of the data of a domain that is unregistered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UnregisterWish {
    /// Nothing was made that would have to be put back.
    Untouched,
    /// One plain image is put back at the registered path; the snapshots end.
    Flatten,
    /// Only what Snaptree knows of it is let go: nobody is asked, nothing is touched, and what is open is abandoned.
    Forget,
    /// All files stay as they are.
    KeepLayers,
}
