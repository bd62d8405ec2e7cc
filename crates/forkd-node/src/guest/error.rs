//! Why a guest's agent did not do what it was asked.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use forkd_proto::agent::{Failure, Response};
use forkd_proto::frame::FrameError;

/// Why a request to an agent brought no answer of the expected kind.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The monitor's socket cannot be reached.
    #[error("cannot reach the monitor through {}: {source}", path.display())]
    Monitor {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The monitor has no agent to connect to: it does not listen yet, or has gone.
    #[error("the guest's agent does not accept connections{}", detail(answer))]
    NotListening {
        /// What the monitor said instead of `OK`, if anything.
        answer: String,
    },
    /// The connection broke.
    #[error("the connection to the guest's agent failed: {0}")]
    Connection(#[from] FrameError),
    /// No answer in time.
    #[error("the guest's agent did not {what} within {} s", limit.as_secs_f32())]
    TimedOut {
        /// What was waited for, as a verb phrase.
        what: &'static str,
        /// How long.
        limit: Duration,
    },
    /// The agent refused or failed.
    #[error("{0}")]
    Refused(Failure),
    /// The agent answered something else than the request calls for.
    #[error("the guest's agent answered {got} where {wanted} was expected")]
    Unexpected {
        /// What the request calls for.
        wanted: &'static str,
        /// What came.
        got: String,
    },
    /// A program wrote more than is collected in memory.
    #[error(
        "the program wrote more than {limit} bytes, the most that is collected; stream its output, or send it to a file and read that"
    )]
    OutputTooLarge {
        /// The limit.
        limit: usize,
    },
}

fn detail(answer: &str) -> String {
    if answer.is_empty() { String::new() } else { format!(": the monitor answered {answer:?}") }
}

impl GuestError {
    /// Whether a new connection may succeed where this one failed.
    pub(crate) fn is_transient(&self) -> bool {
        matches!(self, Self::NotListening { .. } | Self::Connection(FrameError::Closed | FrameError::Io(_)))
    }

    /// Whether it may have come from the end of the machine.
    pub(crate) fn is_loss(&self) -> bool {
        self.is_transient() || matches!(self, Self::Monitor { .. })
    }
}

/// The error for an answer that the request does not call for.
pub(super) fn unexpected(wanted: &'static str, got: &Response) -> GuestError {
    GuestError::Unexpected { wanted, got: format!("{got:?}") }
}
