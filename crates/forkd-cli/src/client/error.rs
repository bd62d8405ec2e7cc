//! What can go wrong between this program and a daemon or an agent.

use std::io;

use forkd_proto::agent::Failure;
use forkd_proto::frame::FrameError;
use forkd_types::rest::ErrorBody;
use http::StatusCode;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    /// Nobody listens there.
    #[error("could not connect to the daemon at {address}")]
    Unreachable {
        /// The daemon's address.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// It listens but says nothing.
    #[error("the daemon at {address} did not answer within {seconds} s")]
    Silent {
        /// The daemon's address.
        address: String,
        /// How long was waited.
        seconds: u64,
    },
    /// The daemon answered with an error.
    #[error("{message} (HTTP {})", status.as_u16())]
    Refused {
        /// Status of the answer.
        status: StatusCode,
        /// Stable code, if it gave one.
        code: Option<String>,
        /// What it said.
        message: String,
    },
    /// The connection broke.
    #[error("the connection to the daemon broke during {path}")]
    Broken {
        /// What was called.
        path: String,
        /// Why.
        source: hyper::Error,
    },
    /// The answer is not what it should be.
    #[error("the daemon's answer to {path} makes no sense; are `forkd` and the daemon of the same version?")]
    Malformed {
        /// What was called.
        path: String,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A request could not be put together.
    #[error("could not build the request {path}")]
    Request {
        /// What was to be called.
        path: String,
        /// What is wrong with it.
        source: http::Error,
    },
    /// A file to be sent could not be read.
    #[error("could not read {path}")]
    File {
        /// The file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// Bytes to or from the agent went wrong.
    #[error("talking to the sandbox's agent failed: {0}")]
    Frame(#[from] FrameError),
    /// The agent said no.
    #[error("{0}")]
    Agent(#[from] Failure),
    /// The agent answered something else than what was asked.
    #[error("the sandbox's agent answered {got} where {expected} was due")]
    OutOfTurn {
        /// What was due.
        expected: &'static str,
        /// What came.
        got: String,
    },
    /// The sandbox's agent says nothing.
    #[error("the sandbox's agent did not {what} within {seconds} s")]
    Late {
        /// What was waited for, as a verb phrase.
        what: &'static str,
        /// How long was waited.
        seconds: u64,
    },
    /// A long operation of the daemon ended in an error.
    #[error("{0}")]
    Failed(String),
}

impl ClientError {
    /// An error answer, from its status and body.
    pub(crate) fn refused(status: StatusCode, body: &[u8]) -> Self {
        match serde_json::from_slice::<ErrorBody>(body) {
            Ok(body) => Self::Refused { status, code: body.code, message: body.error },
            Err(_) => {
                let text = String::from_utf8_lossy(body);
                let reason = status.canonical_reason().unwrap_or("an error").to_lowercase();
                let message = if text.trim().is_empty() { reason } else { text.trim().to_owned() };
                Self::Refused { status, code: None, message }
            }
        }
    }

    /// The status, when the daemon answered with one.
    pub(crate) fn status(&self) -> Option<StatusCode> {
        match self {
            Self::Refused { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// The stable code, when the daemon answered with one.
    pub(crate) fn code(&self) -> Option<&str> {
        match self {
            Self::Refused { code, .. } => code.as_deref(),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_bodies_of_every_kind_become_one_sentence() {
        let text = |body: &str| ClientError::refused(StatusCode::NOT_FOUND, body.as_bytes()).to_string();
        assert_eq!(text(r#"{"error":"sandbox sb-1 not found"}"#), "sandbox sb-1 not found (HTTP 404)");
        assert_eq!(text("plain\n"), "plain (HTTP 404)");
        assert_eq!(text(""), "not found (HTTP 404)");
    }
}
