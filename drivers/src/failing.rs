//! What the operating system's failures mean to the engine.

use std::io::{self, ErrorKind};
use std::path::Path;

use snaptree_engine::driver::{DriverError, ErrorClass};
use snaptree_engine::operation::Code;

/// Something at a path failed.
pub(crate) fn io_error(doing: &str, path: &Path, error: io::Error) -> DriverError {
    let (class, code) = match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => (ErrorClass::Permanent, Code::NoSpace),
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            (ErrorClass::Permanent, Code::Permission)
        }
        ErrorKind::Interrupted => (ErrorClass::Transient, Code::Io),
        ErrorKind::NotFound => (ErrorClass::Permanent, Code::NotFound),
        _ => (ErrorClass::Permanent, Code::Io),
    };
    DriverError::new(class, code, format!("cannot {doing} {}: {error}", path.display()))
}

/// Adds what was being done to an error of the operating system.
pub(crate) trait Doing<T> {
    /// `doing` is a verb: `rename`, `open`.
    fn doing(self, doing: &str, path: &Path) -> Result<T, DriverError>;
}

impl<T> Doing<T> for io::Result<T> {
    fn doing(self, doing: &str, path: &Path) -> Result<T, DriverError> {
        self.map_err(|error| io_error(doing, path, error))
    }
}

impl<T> Doing<T> for Result<T, rustix::io::Errno> {
    fn doing(self, doing: &str, path: &Path) -> Result<T, DriverError> {
        self.map_err(|error| io_error(doing, path, error.into()))
    }
}

/// Turns "not there" into `None`.
pub(crate) fn if_there<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(error),
    }
}
