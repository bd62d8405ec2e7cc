//! One connection to an agent.

use std::io;
use std::path::Path;
use std::time::Duration;

use forkd_proto::agent::{AGENT_PORT, Request, Response};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::error::GuestError;
use super::frames::{FrameReader, FrameWriter};

/// How long the monitor and the guest's kernel may take to set a connection up.
pub(super) const CONNECT_LIMIT: Duration = Duration::from_secs(20);

/// How long the agent may take to begin a request that goes on for long.
const BEGIN_LIMIT: Duration = Duration::from_secs(30);

/// A connection to an agent, before its one request.
#[derive(Debug)]
pub struct GuestConnection {
    stream: UnixStream,
}

impl GuestConnection {
    /// Connects to the agent behind the vsock socket at `path`.
    pub(crate) async fn open(path: &Path) -> Result<Self, GuestError> {
        let connecting = async {
            let stream = UnixStream::connect(path)
                .await
                .map_err(|source| GuestError::Monitor { path: path.to_owned(), source })?;
            Self::greet(stream).await
        };
        let late = |_| GuestError::TimedOut { what: "accept a connection", limit: CONNECT_LIMIT };
        tokio::time::timeout(CONNECT_LIMIT, connecting).await.map_err(late)?
    }

    async fn greet(mut stream: UnixStream) -> Result<Self, GuestError> {
        let broken = |error: io::Error| GuestError::Connection(error.into());
        stream.write_all(format!("CONNECT {AGENT_PORT}\n").as_bytes()).await.map_err(broken)?;
        // Byte by byte: what follows the line is already the agent's.
        let mut line = Vec::with_capacity(32);
        while line.last() != Some(&b'\n') && line.len() < 64 {
            match stream.read_u8().await {
                Ok(byte) => line.push(byte),
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
                Err(error) => return Err(broken(error)),
            }
        }
        let line = String::from_utf8_lossy(&line);
        match line.strip_suffix('\n').and_then(|line| line.strip_prefix("OK ")) {
            Some(port) if port.parse::<u32>().is_ok() => Ok(Self { stream }),
            _ => Err(GuestError::NotListening { answer: line.trim_end().to_owned() }),
        }
    }

    /// Takes a stream that ends at an agent already.
    pub fn over(stream: UnixStream) -> Self {
        Self { stream }
    }

    /// The bare stream, for a client that speaks the agent's protocol itself.
    pub fn into_stream(self) -> UnixStream {
        self.stream
    }

    /// Sends the request and hands out both directions for what follows.
    pub(super) async fn begin(self, request: &Request) -> Result<(FrameReader, FrameWriter), GuestError> {
        let (reader, writer) = self.stream.into_split();
        let mut writer = FrameWriter::new(writer);
        writer.message(request).await?;
        Ok((FrameReader::new(reader), writer))
    }

    /// Sends a request that has one answer. It is not waited for longer than `limit`; `what` is the request as a
    /// verb phrase.
    pub async fn ask(self, request: &Request, what: &'static str, limit: Duration) -> Result<Response, GuestError> {
        tokio::time::timeout(limit, self.ask_unbounded(request))
            .await
            .map_err(|_| GuestError::TimedOut { what, limit })?
    }

    /// Sends a request that has one answer. The caller sets the deadline.
    pub(super) async fn ask_unbounded(self, request: &Request) -> Result<Response, GuestError> {
        let (mut reader, _writer) = self.begin(request).await?;
        reader.response().await
    }

    /// Sends a request whose first answer says that it is under way, and hands out both directions.
    pub(super) async fn begin_stream(
        self,
        request: &Request,
    ) -> Result<(Response, FrameReader, FrameWriter), GuestError> {
        let beginning = async {
            let (mut reader, writer) = self.begin(request).await?;
            Ok((reader.response().await?, reader, writer))
        };
        let late = |_| GuestError::TimedOut { what: "begin what it was asked", limit: BEGIN_LIMIT };
        tokio::time::timeout(BEGIN_LIMIT, beginning).await.map_err(late)?
    }
}
