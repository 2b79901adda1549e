//! What can be asked.

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::domain::RunState;
use crate::event::{DeleteScope, DeleteWhat, MergeWish, Place, UnregisterWish};
use crate::ids::{DiskName, DomainName, SnapshotId, SnapshotName};
use crate::operation::{Code, Failure};
use crate::tree::{Labels, Snapshot, Tree};

/// Which snapshot is meant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SnapshotRef {
    /// The one of that name.
    Name(SnapshotName),
    /// The one that the hypervisor has under a name that cannot be one here.
    There(String),
    /// The one with that id.
    Id(SnapshotId),
    /// The current one, when the request is decided.
    Current,
}

impl SnapshotRef {
    /// Reads an id, a name, or what can only be a name at the hypervisor; they cannot be mistaken, as no name looks like a
    /// UUID.
    ///
    /// # Errors
    /// There is nothing to read.
    pub fn parse(text: &str) -> Result<Self, crate::ids::NameError> {
        match (text.parse(), SnapshotName::new(text)) {
            (Ok(id), _) => Ok(Self::Id(id)),
            (_, Ok(name)) => Ok(Self::Name(name)),
            (_, Err(_)) if !text.trim().is_empty() => Ok(Self::There(text.to_owned())),
            (_, Err(error)) => Err(error),
        }
    }

    /// The snapshot that is meant.
    ///
    /// # Errors
    /// There is none, or several could be meant.
    pub fn find<'a>(&self, tree: &'a Tree) -> Result<&'a Snapshot, Unclear> {
        let there =
            |name: &str| tree.iter().filter(|known| known.real_name.as_deref() == Some(name)).collect();
        let found: Vec<&Snapshot> = match self {
            Self::Id(id) => tree.get(*id).into_iter().collect(),
            Self::Current => tree.current().into_iter().collect(),
            Self::There(name) => there(name),
            Self::Name(name) => match tree.by_name(name) {
                // It is called otherwise there, and another one so.
                Some(found) if found.real_name.is_some() => {
                    std::iter::once(found).chain(there(name.as_str())).collect()
                }
                found => found.into_iter().collect(),
            },
        };
        match found.as_slice() {
            [found] => Ok(*found),
            [] => {
                let alike = match self {
                    Self::Name(name) => there(name.as_str()),
                    Self::There(_) | Self::Id(_) | Self::Current => Vec::new(),
                };
                Err(Unclear::Missing { alike: alike.into_iter().map(|known| known.name.clone()).collect() })
            }
            several => {
                Err(Unclear::Several(several.iter().map(|known| (known.name.clone(), known.id)).collect()))
            }
        }
    }
}

/// Why no one snapshot is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unclear {
    /// There is none.
    Missing {
        /// Those that the hypervisor has under that name.
        alike: Vec<SnapshotName>,
    },
    /// There are several.
    Several(Vec<(SnapshotName, SnapshotId)>),
}

impl Unclear {
    /// What can be done about it, where that is known.
    pub fn hint(&self) -> Option<String> {
        let quoted = |name: &SnapshotName| format!("'{name}'");
        match self {
            Self::Missing { alike } if alike.is_empty() => None,
            Self::Missing { alike } => {
                let names: Vec<String> = alike.iter().map(quoted).collect();
                Some(format!("the hypervisor has {} under that name", names.join(" and ")))
            }
            Self::Several(several) => {
                let names: Vec<String> =
                    several.iter().map(|(name, id)| format!("'{name}' ({id})")).collect();
                Some(format!("say which one by its id: {}", names.join(" or ")))
            }
        }
    }
}

/// What a snapshot is to hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Content {
    /// The disks; and the memory where the machine has any and the driver can.
    #[default]
    Auto,
    /// The disks alone.
    DisksOnly,
    /// The disks and the memory.
    WithMemory,
}

/// Asks for a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Create {
    /// Its name; left out, the seconds since the epoch.
    pub name: Option<SnapshotName>,
    /// What the user writes about it.
    pub description: Option<String>,
    /// Labels.
    pub labels: Labels,
    /// Whether the memory belongs to it.
    pub content: Content,
    /// Where it is to be kept.
    #[serde(skip_serializing_if = "Place::is_usual")]
    pub place: Place,
    /// The disks that it is to hold; none for all.
    pub disks: Option<BTreeSet<DiskName>>,
    /// Whether the guest is to bring its file systems to rest first (libvirt's `VIR_DOMAIN_SNAPSHOT_CREATE_QUIESCE`); of
    /// the disks alone.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub quiesce: bool,
}

/// Asks for a delete.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Delete {
    /// Which ones.
    pub snapshots: Vec<SnapshotRef>,
    /// And what of their descendants.
    #[serde(default)]
    pub scope: DeleteScope,
    /// Whether the data goes too.
    #[serde(default)]
    pub what: DeleteWhat,
    /// When the data is to be folded away.
    #[serde(default)]
    pub merge: MergeWish,
    /// Why; a policy's reasons.
    #[serde(default)]
    pub reasons: Vec<String>,
}

/// What can be asked of a domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum Command {
    /// Take a snapshot.
    Create(Create),
    /// Go back to one.
    Revert {
        /// Where to.
        snapshot: SnapshotRef,
        /// The run state asked for; none for the snapshot's.
        run_state: Option<RunState>,
        /// Whether what would be lost is kept as a snapshot of its own first.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        keep: bool,
    },
    /// Delete snapshots.
    Delete(Delete),
    /// Change what is written about a snapshot.
    Edit {
        /// Which one.
        snapshot: SnapshotRef,
        /// Its new name.
        name: Option<SnapshotName>,
        /// Its new description; empty for none.
        description: Option<String>,
        /// Labels to set; an empty value removes the label.
        #[serde(default)]
        labels: Labels,
    },
    /// Forbid a snapshot's deletion.
    Hold {
        /// Which one.
        snapshot: SnapshotRef,
        /// Why.
        reason: String,
        /// When the hold ends by itself.
        until: Option<Timestamp>,
    },
    /// Allow a snapshot's deletion again.
    Release {
        /// Which one.
        snapshot: SnapshotRef,
    },
    /// Change the domain's name, its labels, or how its machine is reached.
    Set {
        /// Its new name.
        name: Option<DomainName>,
        /// Labels to set; an empty value removes the label.
        #[serde(default)]
        labels: Labels,
        /// How its machine is reached from now on, in the driver's words; see [`Driver::access`](crate::driver::Driver).
        #[serde(default, skip_serializing_if = "Option::is_none")]
        access: Option<serde_json::Value>,
    },
    /// Let go of the domain.
    #[serde(with = "as_wish")]
    Unregister(UnregisterWish),
    /// A request for which something is given up that somebody else keeps inside the images, and that would else be
    /// refused for it.
    GivingUp {
        /// The names that it has there.
        names: BTreeSet<String>,
        /// The request.
        request: Box<Command>,
    },
    /// Let an operation that needs attention try again.
    #[serde(with = "as_operation")]
    Retry(crate::ids::OperationId),
    /// Say what became of the step in hand of an operation that needs attention.
    Resolve {
        /// The operation.
        operation: crate::ids::OperationId,
        /// What became of it.
        verdict: crate::operation::Verdict,
        /// Why that is known.
        reason: String,
    },
}

/// Writes a variant's only value as a field, beside the tag that says which variant it is.
macro_rules! as_field {
    ($module:ident, $field:ident: $type:ty) => {
        mod $module {
            use serde::{Deserialize, Deserializer, Serialize, Serializer};

            #[derive(Serialize, Deserialize)]
            #[serde(deny_unknown_fields)]
            struct Object {
                $field: $type,
            }

            pub(super) fn serialize<S: Serializer>(value: &$type, to: S) -> Result<S::Ok, S::Error> {
                Object { $field: *value }.serialize(to)
            }

            pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<$type, D::Error> {
                Object::deserialize(from).map(|object| object.$field)
            }
        }
    };
}

as_field!(as_wish, wish: crate::event::UnregisterWish);
as_field!(as_operation, operation: crate::ids::OperationId);

/// A request that was turned down; nothing was written.
pub type Rejection = Failure;

/// A rejection with its code.
pub(crate) fn reject(code: Code, message: impl Into<String>) -> Rejection {
    Failure::new(code, message).refused()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::OperationId;

    #[test]
    fn every_command_is_written_as_json_and_read_again() {
        let operation = OperationId::from_uuid(uuid::Uuid::nil());
        let snapshot = SnapshotRef::Current;
        let delete = Delete {
            snapshots: vec![snapshot.clone()],
            scope: DeleteScope::Named,
            what: DeleteWhat::Snapshot,
            merge: MergeWish::Auto,
            reasons: Vec::new(),
        };
        for (command, text) in [
            (Command::Create(Create::default()), r#"{"command":"create"}"#),
            (
                Command::Revert { snapshot: snapshot.clone(), run_state: None, keep: false },
                r#"{"command":"revert","snapshot":"current"}"#,
            ),
            (Command::Delete(delete), r#"{"command":"delete","snapshots":["current"]}"#),
            (Command::Release { snapshot }, r#"{"command":"release","snapshot":"current"}"#),
            (Command::Unregister(UnregisterWish::Flatten), r#"{"command":"unregister","wish":"flatten"}"#),
            (
                Command::GivingUp {
                    names: BTreeSet::from(["b0".to_owned()]),
                    request: Box::new(Command::Create(Create::default())),
                },
                r#"{"command":"giving-up","names":["b0"],"request":{"command":"create"}}"#,
            ),
            (
                Command::Retry(operation),
                r#"{"command":"retry","operation":"00000000-0000-0000-0000-000000000000"}"#,
            ),
        ] {
            assert_eq!(serde_json::from_str::<Command>(text).unwrap(), command);
            let written = serde_json::to_string(&command).unwrap();
            assert_eq!(serde_json::from_str::<Command>(&written).unwrap(), command, "{written}");
        }
        assert!(serde_json::from_str::<Command>(r#"{"command":"create","nmae":"x"}"#).is_err());
    }
}
