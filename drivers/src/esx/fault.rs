//! What a failure of a host means: one classification for calls and for tasks.

use std::error::Error as _;

use snaptree_engine::HostName;
use snaptree_engine::driver::{DriverError, ErrorClass};
use snaptree_engine::operation::{Code, Failure};

use super::client::Effect;
use super::secret::Secret;
use super::soap::{Fault, SoapError};
use super::tls::Thumbprint;

/// Why a call came to nothing.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum CallError {
    /// It was never sent: there is no connection.
    #[error("cannot connect: {0}")]
    NotSent(String),
    /// It was sent, and no whole answer came.
    #[error("the connection broke: {0}")]
    Lost(String),
    /// It took too long.
    #[error("it did not answer in time")]
    TimedOut,
    /// Somebody answered who speaks HTTP and no SOAP.
    #[error("HTTP status {0}")]
    Status(u16),
    /// The answer cannot be read.
    #[error(transparent)]
    Reply(#[from] SoapError),
    /// The host said no.
    #[error("{0}")]
    Fault(Fault),
    /// Again, in a session that is new.
    #[error("{0}")]
    NotAllowed(Fault),
    /// It failed before the host was asked.
    #[error("{0}")]
    Ours(Failure),
}

impl CallError {
    pub(super) fn sending(error: &reqwest::Error) -> Self {
        if error.is_connect() {
            return Self::NotSent(innermost(error));
        }
        if error.is_builder() {
            return Self::Ours(Failure::new(Code::Invalid, innermost(error)));
        }
        Self::reading(error)
    }

    pub(super) fn reading(error: &reqwest::Error) -> Self {
        if error.is_timeout() { Self::TimedOut } else { Self::Lost(innermost(error)) }
    }

    /// Whether a call that changes something may have done so.
    pub fn may_have_had_effect(&self) -> bool {
        match self {
            Self::Lost(_) | Self::TimedOut | Self::Reply(_) => true,
            Self::Status(status) => *status >= 500,
            // "General system error": nobody knows what of it was done.
            Self::Fault(fault) => meaning(fault).class == ErrorClass::Unknown,
            Self::NotSent(_) | Self::NotAllowed(_) | Self::Ours(_) => false,
        }
    }

    /// Whether to make the same call a little later may help, and cannot make it twice.
    ///
    /// 429 and 503 are "later" in HTTP's own words (RFC 6585, RFC 9110); 502 and 504 are a gateway's whose host is away.
    pub(super) fn is_busy(&self, effect: Effect) -> bool {
        match (self, effect) {
            // A certificate that nobody vouches for is the same the next time.
            (Self::NotSent(text), _) => !text.contains("certificate"),
            (Self::Status(429), _) => true,
            (Self::Status(502..=504), Effect::None) => true,
            _ => false,
        }
    }

    /// The same without the password, should the host repeat it.
    #[must_use]
    pub fn without(self, password: &Secret) -> Self {
        match self {
            Self::Fault(mut fault) => {
                fault.message = password.cut_from(&fault.message);
                Self::Fault(fault)
            }
            Self::Lost(text) => Self::Lost(password.cut_from(&text)),
            other => other,
        }
    }

    /// Whether the object that was asked about is gone.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Fault(fault) if fault.kind == "ManagedObjectNotFound")
    }

    /// Whether the host does not know the method.
    pub fn is_unknown_method(&self) -> bool {
        matches!(self, Self::Fault(fault) if fault.kind == "MethodNotFound")
    }

    /// As the engine and a user read it.
    pub(super) fn told(self, host: &HostName, effect: Effect, shown: Option<Thumbprint>) -> DriverError {
        let lost = match effect {
            Effect::None => ErrorClass::Transient,
            Effect::Some => ErrorClass::Unknown,
        };
        let says = format!("host '{host}': {self}");
        match self {
            Self::NotSent(text) => {
                let error = DriverError::new(ErrorClass::Transient, Code::Io, says);
                match shown.filter(|_| text.contains("certificate")) {
                    Some(shown) => error.hint(format!(
                        "the certificate that it showed has the SHA-256 thumbprint {shown}; compare it at the host's own \
                         console, then give it with --thumbprint, or the certificate's issuer with --ca"
                    )),
                    None => error.hint("is the host up, and the URL right? `snaptree host show` tells it"),
                }
            }
            Self::Lost(_) => DriverError::new(lost, Code::Io, says),
            Self::TimedOut => DriverError::new(lost, Code::Timeout, says),
            Self::Reply(SoapError::CutOff) => DriverError::new(lost, Code::Io, says),
            Self::Reply(_) if effect == Effect::Some => DriverError::unknown(Code::Io, says),
            Self::Reply(_) => {
                DriverError::permanent(Code::Io, says).hint("is the URL that of an ESXi or vCenter?")
            }
            Self::Status(429) => DriverError::new(ErrorClass::Transient, Code::Io, says),
            Self::Status(status) if status >= 500 => DriverError::new(lost, Code::Io, says),
            Self::Status(_) => DriverError::permanent(Code::Io, says).hint("the URL usually ends in /sdk"),
            Self::Fault(fault) => told(&fault, host, effect),
            Self::NotAllowed(fault) => {
                DriverError::permanent(Code::Permission, format!("host '{host}': {fault}")).hint(
                    "the user may not do this: its role needs System.View and those of VirtualMachine.State",
                )
            }
            Self::Ours(failure) => failure.into(),
        }
    }
}

/// reqwest's own words name the URL, and say little; those of what lies below tell why.
fn innermost(error: &reqwest::Error) -> String {
    let mut source = error.source();
    let mut told = None;
    while let Some(below) = source {
        told = Some(below.to_string());
        source = below.source();
    }
    let text = told.unwrap_or_else(|| "no reason is known".to_owned());
    text.chars().take(300).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// What a fault means.
pub struct Meaning {
    /// What the engine does about it.
    pub class: ErrorClass,
    /// The kind of trouble.
    pub code: Code,
    /// What to do.
    pub hint: Option<&'static str>,
}

/// A fault of a task that has ended: what it did is to be seen, so it is never unknown.
pub fn of_task(fault: &Fault, host: &HostName) -> DriverError {
    let mut error = told(fault, host, Effect::Some);
    if error.class == ErrorClass::Unknown {
        error.class = ErrorClass::Transient;
    }
    error
}

fn told(fault: &Fault, host: &HostName, effect: Effect) -> DriverError {
    let meaning = meaning(fault);
    let class = match (meaning.class, effect) {
        (ErrorClass::Unknown, Effect::None) => ErrorClass::Transient,
        (class, _) => class,
    };
    let error = DriverError::new(class, meaning.code, format!("host '{host}': {fault}"));
    match meaning.hint {
        Some(hint) => error.hint(hint),
        None => error,
    }
}

/// Classifies by the fault's type; the types are those of the vSphere API reference.
pub fn meaning(fault: &Fault) -> Meaning {
    let mean = |class, code| Meaning { class, code, hint: None };
    let hinted = |class, code, hint| Meaning { class, code, hint: Some(hint) };
    use ErrorClass::{Busy, Permanent, Transient, Unknown};
    match fault.kind.as_str() {
        "TaskInProgress" | "VAppTaskInProgress" | "ConcurrentAccess" => hinted(
            Busy,
            Code::InUse,
            "another task of the host works on the machine; vSphere's own list of tasks shows it",
        ),
        "FileLocked" | "ResourceInUse" => {
            hinted(Transient, Code::InUse, "a file of the machine is in use, perhaps by a backup")
        }
        "HostCommunication"
        | "HostNotConnected"
        | "HostNotReachable"
        | "Timedout"
        | "NetworkDisruptedAndConfigRolledBack" => {
            hinted(Transient, Code::Io, "the vCenter does not reach the machine's host")
        }
        "NotAuthenticated" => mean(Transient, Code::Permission),
        "InsufficientResourcesFault"
        | "InsufficientMemoryResourcesFault"
        | "InsufficientCpuResourcesFault" => mean(Transient, Code::NoSpace),
        "NoDiskSpace" | "InsufficientStorageSpace" => {
            hinted(Permanent, Code::NoSpace, "the datastore is full: make room there, and ask again")
        }
        "InvalidLogin" => hinted(
            Permanent,
            Code::Permission,
            "is the user right, and what the password's source holds? `snaptree host show` tells both",
        ),
        "NoPermission" => hinted(
            Permanent,
            Code::Permission,
            "the user's role lacks a right: snapshots need those of VirtualMachine.State, reverts Interact.PowerOn",
        ),
        "RestrictedVersion" | "NotEnoughLicenses" | "LicenseRestricted" | "FeatureRequirementsNotMet" => {
            hinted(
                Permanent,
                Code::Unsupported,
                "the host's licence does not allow changes through its API, as that of the free ESXi does not: it can be \
             watched, and snapshots be made by hand are adopted; for more it needs a licence",
            )
        }
        "ApplicationQuiesceFault" | "FilesystemQuiesceFault" => hinted(
            Permanent,
            Code::Unsupported,
            "the guest could not be brought to rest: see to VMware Tools in it, or leave out --quiesce",
        ),
        "ToolsUnavailable" => hinted(
            Permanent,
            Code::Unsupported,
            "VMware Tools do not run in the guest, so it cannot be asked to shut down: --force ends it at once",
        ),
        "MemorySnapshotOnIndependentDisk" => {
            hinted(Permanent, Code::Unsupported, "a disk of it is independent: use --disk-only")
        }
        "TooManySnapshotLevels" => hinted(
            Permanent,
            Code::Unsupported,
            "delete some snapshots of the chain; their changes are merged",
        ),
        "SnapshotLocked" => {
            hinted(Permanent, Code::InUse, "vSphere keeps the snapshot locked; a backup may be using it")
        }
        "InvalidName" | "InvalidArgument" | "InvalidRequest" | "InvalidType" | "DuplicateName" => {
            mean(Permanent, Code::Invalid)
        }
        "ManagedObjectNotFound" | "NotFound" => mean(Permanent, Code::NotFound),
        "InvalidPowerState" | "InvalidState" | "InvalidVmState" => mean(Permanent, Code::InUse),
        "MultipleSnapshotsNotSupported"
        | "SnapshotDisabled"
        | "SnapshotIncompatibleDeviceInVm"
        | "SnapshotNoChange"
        | "SnapshotFault"
        | "NotSupported"
        | "MethodNotFound"
        | "NotImplemented"
        | "MethodDisabled"
        | "DisallowedOperationOnFailoverHost" => mean(Permanent, Code::Unsupported),
        "VmConfigFault"
        | "GenericVmConfigFault"
        | "InvalidDiskFormat"
        | "InvalidSnapshotFormat"
        | "FileFault"
        | "FileNotFound"
        | "CannotAccessFile"
        | "FileAlreadyExists"
        | "FileTooLarge"
        | "FileNotWritable"
        | "SecurityError" => mean(Permanent, Code::Io),
        "RequestCanceled" => mean(Permanent, Code::Cancelled),
        // SystemError, RuntimeFault, and whatever is newer than this.
        _ => mean(Unknown, Code::Io),
    }
}
