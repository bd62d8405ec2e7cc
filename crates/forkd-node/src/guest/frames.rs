//! Frames, one direction each.

use std::io;

use bytes::{Bytes, BytesMut};
use forkd_proto::agent::Response;
use forkd_proto::frame::{Frame, FrameError, HEADER_LEN, Header, Kind, MAX_PAYLOAD};
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use super::error::{GuestError, unexpected};

/// Bytes in one frame of a stream: few enough that what is on its way is little.
const CHUNK: usize = 64 << 10;

const _: () = assert!(CHUNK <= MAX_PAYLOAD);

/// Receives frames.
#[derive(Debug)]
pub(super) struct FrameReader {
    stream: OwnedReadHalf,
    buffer: BytesMut,
}

impl FrameReader {
    pub(super) fn new(stream: OwnedReadHalf) -> Self {
        Self { stream, buffer: BytesMut::new() }
    }

    /// The next frame; [`FrameError::Closed`] at a clean end. Cancel safe: bytes that have come are kept.
    pub(super) async fn next(&mut self) -> Result<(Kind, Bytes), FrameError> {
        loop {
            let mut wanted = HEADER_LEN;
            if let Some(header) = self.buffer.first_chunk::<HEADER_LEN>() {
                let header = Header::decode(*header)?;
                wanted += header.len;
                if self.buffer.len() >= wanted {
                    let mut frame = self.buffer.split_to(wanted).freeze();
                    return Ok((header.kind, frame.split_off(HEADER_LEN)));
                }
            }
            self.buffer.reserve((wanted - self.buffer.len()).max(CHUNK));
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Err(if self.buffer.is_empty() {
                    FrameError::Closed
                } else {
                    io::Error::from(io::ErrorKind::UnexpectedEof).into()
                });
            }
        }
    }

    /// The next frame, which must be an answer; one that says no is an error.
    pub(super) async fn response(&mut self) -> Result<Response, GuestError> {
        let (kind, payload) = self.next().await?;
        answer(kind, &payload)
    }

    /// The next piece of a file, a tar stream or a tunnel; none at its end. An error amid them is one.
    pub(super) async fn data(&mut self) -> Result<Option<Bytes>, GuestError> {
        let (kind, payload) = self.next().await?;
        match kind {
            Kind::Data => Ok((!payload.is_empty()).then_some(payload)),
            Kind::Response => Err(unexpected("data", &answer(kind, &payload)?)),
            got => Err(FrameError::Unexpected { expected: Kind::Data, got }.into()),
        }
    }
}

/// The answer that a frame is; one that says no is an error.
pub(super) fn answer(kind: Kind, payload: &[u8]) -> Result<Response, GuestError> {
    match Frame::bytes(kind, payload).parse(Kind::Response)? {
        Response::Error(failure) => Err(GuestError::Refused(failure)),
        response => Ok(response),
    }
}

/// Sends frames. Dropping it ends the direction, which tells the agent that its client has gone.
#[derive(Debug)]
pub(super) struct FrameWriter {
    stream: OwnedWriteHalf,
}

impl FrameWriter {
    pub(super) fn new(stream: OwnedWriteHalf) -> Self {
        Self { stream }
    }

    /// Sends a message of the side that asks.
    pub(super) async fn message(&mut self, message: &impl Serialize) -> Result<(), GuestError> {
        let frame = Frame::json(Kind::Request, message)?;
        Ok(self.stream.write_all(&frame.encode()).await.map_err(FrameError::from)?)
    }

    /// Sends bytes, as many frames as they take; none for none.
    pub(super) async fn bytes(&mut self, kind: Kind, bytes: &[u8]) -> Result<(), GuestError> {
        for piece in bytes.chunks(CHUNK) {
            self.frame(kind, piece).await?;
        }
        Ok(())
    }

    /// Sends the empty frame that ends a stream.
    pub(super) async fn end(&mut self, kind: Kind) -> Result<(), GuestError> {
        self.frame(kind, &[]).await
    }

    async fn frame(&mut self, kind: Kind, payload: &[u8]) -> Result<(), GuestError> {
        let header = Header { len: payload.len(), kind }.encode();
        let sending = async {
            self.stream.write_all(&header).await?;
            self.stream.write_all(payload).await
        };
        Ok(sending.await.map_err(FrameError::from)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixStream;

    #[tokio::test]
    async fn frames_come_whole_however_they_were_cut_and_whoever_stopped_waiting() {
        let (near, mut far) = UnixStream::pair().expect("pair");
        let (read, _write) = near.into_split();
        let mut reader = FrameReader::new(read);
        let big = vec![7; 300_000];
        let mut wire = Frame::bytes(Kind::Stdout, *b"ab").encode();
        wire.extend(Frame::bytes(Kind::Data, big.clone()).encode());
        let sending = tokio::spawn(async move {
            for piece in wire.chunks(1013) {
                far.write_all(piece).await.expect("open");
                tokio::task::yield_now().await;
            }
            far
        });
        let mut got = Vec::new();
        while got.len() < 2 {
            // Giving up time and again loses nothing.
            if let Ok(frame) = tokio::time::timeout(std::time::Duration::from_micros(50), reader.next()).await {
                got.push(frame.expect("sound"));
            }
        }
        assert_eq!(got[0], (Kind::Stdout, Bytes::from_static(b"ab")));
        assert!(got[1].0 == Kind::Data && got[1].1 == big);
        drop(sending.await.expect("no panic"));
        assert!(matches!(reader.next().await, Err(FrameError::Closed)));
    }
}
