//! A TCP port of the guest as a stream of bytes.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use forkd_proto::agent::{Request, Response};
use forkd_proto::frame::Kind;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf};
use tokio::task::JoinHandle;

use super::connection::GuestConnection;
use super::error::{GuestError, unexpected};
use super::frames::{FrameReader, FrameWriter};

/// Bytes on their way in each direction, besides those in sockets.
const BUFFER: usize = 64 << 10;

/// A connection to a server in the guest. Each direction ends by itself; dropped, the connection is cut.
#[derive(Debug)]
pub struct Tunnel {
    near: DuplexStream,
    /// The guest's side ended without an end of its own.
    broke: Arc<AtomicBool>,
    carrying: JoinHandle<()>,
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.carrying.abort();
    }
}

impl GuestConnection {
    /// Connects to a TCP port of the guest.
    pub async fn tunnel(self, port: u16) -> Result<Tunnel, GuestError> {
        let (response, reader, writer) = self.begin_stream(&Request::Tunnel { port }).await?;
        if response != Response::Done {
            return Err(unexpected("Done", &response));
        }
        let (near, far) = tokio::io::duplex(BUFFER);
        let broke = Arc::new(AtomicBool::new(false));
        let carrying = tokio::spawn(carry(far, reader, writer, Arc::clone(&broke)));
        Ok(Tunnel { near, broke, carrying })
    }
}

async fn carry(far: DuplexStream, mut reader: FrameReader, mut writer: FrameWriter, broke: Arc<AtomicBool>) {
    let (mut from_client, mut to_client) = tokio::io::split(far);
    let outward = async {
        let mut buffer = vec![0; BUFFER];
        loop {
            match from_client.read(&mut buffer).await {
                Ok(0) => return writer.end(Kind::Data).await,
                Ok(got) => writer.bytes(Kind::Data, &buffer[..got]).await?,
                // Only the near end can go, and then nobody listens.
                Err(_) => return Ok(()),
            }
        }
    };
    let inward = async {
        while let Some(bytes) = reader.data().await? {
            if to_client.write_all(&bytes).await.is_err() {
                break;
            }
        }
        let _ = to_client.shutdown().await;
        Ok::<(), GuestError>(())
    };
    if let Err(error) = tokio::try_join!(outward, inward) {
        tracing::debug!(%error, "a tunnel broke");
        broke.store(true, Ordering::Release);
    }
}

impl AsyncRead for Tunnel {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let (room, filled) = (buffer.remaining(), buffer.filled().len());
        ready!(Pin::new(&mut self.near).poll_read(context, buffer))?;
        if room > 0 && buffer.filled().len() == filled && self.broke.load(Ordering::Acquire) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Tunnel {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.near).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.near).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.near).poll_shutdown(context)
    }
}
