//! What the facade fails with.

use crate::command::Rejection;
use crate::driver::DriverError;
use crate::ids::DomainId;
use crate::log::LogError;
use crate::operation::{Failure, IllegalHistory};

/// A failure of the engine.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The request was turned down; nothing was written.
    #[error("{0}")]
    Rejected(Rejection),
    /// The store failed.
    #[error("the log could not be read or written")]
    Log(#[from] LogError),
    /// The hypervisor could not be asked.
    #[error("{}", .0.failure)]
    Driver(#[source] DriverError),
    /// The log contradicts itself.
    #[error("the log of domain {domain} cannot be followed")]
    Illegal {
        /// Whose log.
        domain: DomainId,
        /// Where.
        #[source]
        source: IllegalHistory,
    },
    /// A payload that could not be written as JSON.
    #[error("what was asked cannot be written as JSON")]
    Json(#[from] serde_json::Error),
}

impl From<Rejection> for EngineError {
    fn from(rejection: Rejection) -> Self {
        Self::Rejected(rejection)
    }
}

impl EngineError {
    /// Whether it is about one domain, so that others can still be looked at. An event that cannot be read is; a store
    /// that cannot be read or written at all is not.
    pub fn spares_others(&self) -> bool {
        match self {
            Self::Rejected(_) | Self::Driver(_) | Self::Illegal { .. } | Self::Json(_) => true,
            Self::Log(error) => {
                matches!(error, LogError::Conflict { .. } | LogError::KeyUsed { .. } | LogError::Damaged(_))
            }
        }
    }

    /// The failure in words, where there is one.
    pub fn failure(&self) -> Option<&Failure> {
        match self {
            Self::Rejected(failure) => Some(failure),
            Self::Driver(error) => Some(&error.failure),
            Self::Log(_) | Self::Illegal { .. } | Self::Json(_) => None,
        }
    }
}
