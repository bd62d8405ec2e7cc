//! Bodies of any length, handed piece by piece between the network and threads that may block.

use std::io::{self, Read, Write};
use std::time::Duration;

use axum::body::{Body, BodyDataStream};
use bytes::{Buf, Bytes};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;

use crate::error::{ApiError, ApiResult};

/// Pieces of a body that wait for the other side.
pub(crate) const QUEUED_PIECES: usize = 64;

/// How long a client that sends on is given to see that it was answered.
const LINGER: Duration = Duration::from_secs(10);

/// How much is gathered before it is handed to the network.
const PIECE: usize = 64 << 10;

/// Hands the body on piece by piece, until its end or until nobody takes them any more.
pub(crate) async fn forward(body: Body, pieces: mpsc::Sender<Bytes>) -> ApiResult<()> {
    let mut stream = body.into_data_stream();
    while let Some(piece) = stream.next().await {
        let piece = piece.map_err(|error| ApiError::broken_body(format!("the body broke off: {error}")))?;
        if pieces.send(piece).await.is_err() {
            linger(stream);
            break;
        }
    }
    Ok(())
}

/// Reads on for a while what nobody wants. A connection that is closed while the client still sends is reset, and
/// with it goes the answer that says why.
pub(crate) fn linger(mut rest: BodyDataStream) {
    tokio::spawn(tokio::time::timeout(LINGER, async move { while let Some(Ok(_)) = rest.next().await {} }));
}

/// The pieces of a body as something to read. It blocks.
pub(crate) struct PieceReader {
    pieces: mpsc::Receiver<Bytes>,
    current: Bytes,
}

impl PieceReader {
    /// Reads what comes through `pieces`.
    pub(crate) fn new(pieces: mpsc::Receiver<Bytes>) -> Self {
        Self { pieces, current: Bytes::new() }
    }
}

impl Read for PieceReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.pieces.blocking_recv() {
                Some(piece) => self.current = piece,
                None => return Ok(0),
            }
        }
        let len = buffer.len().min(self.current.len());
        self.current.copy_to_slice(&mut buffer[..len]);
        Ok(len)
    }
}

/// The body of an answer as something to write. It blocks, and fails when the client has gone away.
pub(crate) struct PieceWriter {
    pieces: mpsc::Sender<io::Result<Bytes>>,
    pending: Vec<u8>,
}

impl PieceWriter {
    /// Sends what is written through `pieces`.
    pub(crate) fn new(pieces: mpsc::Sender<io::Result<Bytes>>) -> Self {
        Self { pieces, pending: Vec::with_capacity(PIECE) }
    }
}

impl Write for PieceWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(PIECE - self.pending.len());
        self.pending.extend_from_slice(&bytes[..taken]);
        if self.pending.len() == PIECE {
            self.flush()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let piece = std::mem::replace(&mut self.pending, Vec::with_capacity(PIECE));
        self.pieces.blocking_send(Ok(piece.into())).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}
