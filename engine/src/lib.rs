//! What a snapshot tree is, and how an operation on it is carried through.
//!
//! The modules follow the path of a request: [`command`] (what can be asked), [`decide`](mod@decide) (may it be?),
//! [`event`] (what happened), [`project`] (what is true now), [`operation`] (one request's life),
//! [`driver`], [`log`] and [`around`](mod@around) (the ports), [`reconcile`] (driving the hypervisors there), [`engine`] (the facade).
//!
//! Architecture Invariant: this crate knows no SQL, no hypervisor and no terminal. `decide`, `project` and the
//! planners are pure: no clock, no randomness, no environment.

pub mod around;
pub mod claim;
pub mod command;
pub mod decide;
pub mod domain;
pub mod driver;
pub mod engine;
pub mod error;
pub mod event;
pub mod hosts;
pub mod ids;
pub mod layer;
mod loaded;
pub mod log;
pub mod near;
pub mod operation;
pub mod project;
pub mod reconcile;
pub mod settings;
pub mod together;
pub mod tree;
pub mod xml;

pub use ids::{
    DiskName, DomainId, DomainName, EventId, HostName, LabelKey, LayerId, NameError, OperationId, PolicyName,
    SnapshotId, SnapshotName, StreamId,
};
