//! The streams of one running program.
//!
//! Both directions wait for the other side: output that is not taken holds the program up, and so does the
//! program those who write to it. Dropping either half tells the agent that its client has gone, and it kills
//! the process group, unless the program was started with `detach`.

use bytes::Bytes;
use forkd_proto::agent::{Exec, ExecControl, Exited, Request, Response};
use forkd_proto::frame::{FrameError, Kind};

use super::connection::GuestConnection;
use super::error::{GuestError, unexpected};
use super::frames::{FrameReader, FrameWriter, answer};

/// What a program does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ProgramEvent {
    /// It runs.
    Started {
        /// Process id in the guest.
        pid: u32,
    },
    /// It wrote to standard output, or to its terminal.
    Stdout(Bytes),
    /// It wrote to standard error.
    Stderr(Bytes),
    /// It ended; nothing follows.
    Exited(Exited),
}

/// What a program does, as it does it.
#[derive(Debug)]
pub struct ProgramOutput(FrameReader);

/// What a program is given.
#[derive(Debug)]
pub struct ProgramInput(FrameWriter);

/// Both streams of a program.
pub type Program = (ProgramOutput, ProgramInput);

impl GuestConnection {
    /// Asks for a program. That it runs, or why it does not, is the first thing that its output says.
    pub async fn start(self, exec: Exec) -> Result<Program, GuestError> {
        let (reader, writer) = self.begin(&Request::Exec(exec)).await?;
        Ok((ProgramOutput(reader), ProgramInput(writer)))
    }
}

impl ProgramOutput {
    /// What comes next. Cancel safe.
    pub async fn next(&mut self) -> Result<ProgramEvent, GuestError> {
        let (kind, payload) = self.0.next().await?;
        match kind {
            Kind::Stdout => Ok(ProgramEvent::Stdout(payload)),
            Kind::Stderr => Ok(ProgramEvent::Stderr(payload)),
            Kind::Response => match answer(kind, &payload)? {
                Response::Started { pid } => Ok(ProgramEvent::Started { pid }),
                Response::Exited(exited) => Ok(ProgramEvent::Exited(exited)),
                other => Err(unexpected("Exited", &other)),
            },
            got => Err(FrameError::Unexpected { expected: Kind::Response, got }.into()),
        }
    }
}

impl ProgramInput {
    /// Gives it input.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<(), GuestError> {
        self.0.bytes(Kind::Stdin, bytes).await
    }

    /// Ends its input.
    pub async fn close(&mut self) -> Result<(), GuestError> {
        self.0.end(Kind::Stdin).await
    }

    /// Sends a signal, or changes the size of its terminal.
    pub async fn control(&mut self, control: ExecControl) -> Result<(), GuestError> {
        self.0.message(&control).await
    }
}
