//! Turning what went wrong into the protocol's [`Failure`].

use std::error::Error;
use std::io;

use forkd_proto::agent::{Failure, FailureCode};

/// The failure kind that a client should see for `error`.
pub fn code_of(error: &io::Error) -> FailureCode {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => FailureCode::NotFound,
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => FailureCode::Denied,
        io::ErrorKind::InvalidInput | io::ErrorKind::InvalidFilename => FailureCode::Invalid,
        io::ErrorKind::NotADirectory
        | io::ErrorKind::IsADirectory
        | io::ErrorKind::DirectoryNotEmpty
        | io::ErrorKind::AlreadyExists
        | io::ErrorKind::ResourceBusy
        | io::ErrorKind::ExecutableFileBusy
        | io::ErrorKind::CrossesDevices => FailureCode::Conflict,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => FailureCode::NoSpace,
        io::ErrorKind::TimedOut => FailureCode::TimedOut,
        _ => FailureCode::Internal,
    }
}

/// `attempted` failed because of `error`.
pub fn from_io(attempted: impl std::fmt::Display, error: &io::Error) -> Failure {
    Failure { code: code_of(error), message: format!("{attempted}: {error}") }
}

/// The text of `error` and of everything that caused it.
pub fn with_causes(error: &dyn Error) -> String {
    let causes = std::iter::successors(error.source(), |&cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// The request itself is wrong.
pub fn invalid(message: impl Into<String>) -> Failure {
    Failure { code: FailureCode::Invalid, message: message.into() }
}

/// Something that was asked for does not exist.
pub fn not_found(message: impl Into<String>) -> Failure {
    Failure { code: FailureCode::NotFound, message: message.into() }
}

/// Anything else.
pub fn internal(message: impl Into<String>) -> Failure {
    Failure { code: FailureCode::Internal, message: message.into() }
}
