//! Framing: `u32` payload length (little endian), `u8` kind, payload.
//!
//! One frame holds at most [`MAX_PAYLOAD`] bytes. The length is checked before anything is
//! allocated, so a hostile peer costs at most one buffer of that size.

use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// The largest payload of one frame.
pub const MAX_PAYLOAD: usize = 1 << 20;

/// Bytes before the payload.
pub const HEADER_LEN: usize = 5;

/// What a frame's payload is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Kind {
    /// JSON: a request, or a message from the side that asked.
    Request = 1,
    /// JSON: an answer.
    Response = 2,
    /// Bytes for the program's standard input; empty means end of input.
    Stdin = 3,
    /// Bytes of standard output.
    Stdout = 4,
    /// Bytes of standard error.
    Stderr = 5,
    /// Bytes of a file or tunnel; empty means end.
    Data = 6,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Stdin,
            4 => Self::Stdout,
            5 => Self::Stderr,
            6 => Self::Data,
            _ => return None,
        })
    }
}

/// One frame.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Frame {
    /// What the payload is.
    pub kind: Kind,
    /// At most [`MAX_PAYLOAD`] bytes.
    pub payload: Vec<u8>,
}

/// Why bytes are not a frame, or a frame not the message that was expected.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The length field exceeds the limit.
    #[error("frame of {len} bytes exceeds the limit of {MAX_PAYLOAD}")]
    TooLong {
        /// The announced length.
        len: usize,
    },
    /// The kind byte is not one of [`Kind`].
    #[error("unknown frame kind {0}")]
    UnknownKind(u8),
    /// A frame of another kind was expected.
    #[error("expected a {expected:?} frame, got {got:?}")]
    Unexpected {
        /// The kind that the protocol calls for here.
        expected: Kind,
        /// The kind that came.
        got: Kind,
    },
    /// The payload is not the JSON message that was expected.
    #[error("malformed message: {0}")]
    Json(#[from] serde_json::Error),
    /// The peer closed the connection between frames.
    #[error("the peer closed the connection")]
    Closed,
    /// Reading or writing failed, or the peer closed within a frame.
    #[error("connection failed: {0}")]
    Io(#[from] io::Error),
}

/// The decoded header of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// Payload length, within [`MAX_PAYLOAD`].
    pub len: usize,
    /// What the payload is.
    pub kind: Kind,
}

impl Header {
    /// Decodes a header; the length is checked here.
    pub fn decode(bytes: [u8; HEADER_LEN]) -> Result<Self, FrameError> {
        let len = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize;
        if len > MAX_PAYLOAD {
            return Err(FrameError::TooLong { len });
        }
        let kind = Kind::from_byte(bytes[4]).ok_or(FrameError::UnknownKind(bytes[4]))?;
        Ok(Self { len, kind })
    }

    /// Encodes the header.
    pub fn encode(self) -> [u8; HEADER_LEN] {
        let len = (self.len as u32).to_le_bytes();
        [len[0], len[1], len[2], len[3], self.kind as u8]
    }
}

impl Frame {
    /// A frame of raw bytes; the caller keeps within [`MAX_PAYLOAD`].
    pub fn bytes(kind: Kind, payload: impl Into<Vec<u8>>) -> Self {
        Self { kind, payload: payload.into() }
    }

    /// A frame that holds `message` as JSON.
    pub fn json(kind: Kind, message: &impl Serialize) -> Result<Self, FrameError> {
        let payload = serde_json::to_vec(message)?;
        if payload.len() > MAX_PAYLOAD {
            return Err(FrameError::TooLong { len: payload.len() });
        }
        Ok(Self { kind, payload })
    }

    /// The JSON message of a frame that must be of kind `expected`.
    pub fn parse<T: DeserializeOwned>(&self, expected: Kind) -> Result<T, FrameError> {
        if self.kind != expected {
            return Err(FrameError::Unexpected { expected, got: self.kind });
        }
        Ok(serde_json::from_slice(&self.payload)?)
    }

    /// The frame's bytes on the wire.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_LEN + self.payload.len());
        bytes.extend_from_slice(&Header { len: self.payload.len(), kind: self.kind }.encode());
        bytes.extend_from_slice(&self.payload);
        bytes
    }

    /// Writes the frame in one call.
    pub fn write_to(&self, writer: &mut impl Write) -> Result<(), FrameError> {
        writer.write_all(&self.encode())?;
        Ok(writer.flush()?)
    }

    /// Reads one frame; [`FrameError::Closed`] at a clean end of the stream.
    pub fn read_from(reader: &mut impl Read) -> Result<Self, FrameError> {
        let mut header = [0; HEADER_LEN];
        let mut filled = 0;
        while filled < HEADER_LEN {
            match reader.read(&mut header[filled..]) {
                Ok(0) if filled == 0 => return Err(FrameError::Closed),
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(n) => filled += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        let header = Header::decode(header)?;
        let mut payload = vec![0; header.len];
        reader.read_exact(&mut payload)?;
        Ok(Self { kind: header.kind, payload })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn frames_round_trip(kind in 1u8..=6, payload: Vec<u8>) {
            let frame = Frame::bytes(Kind::from_byte(kind).expect("1 to 6 are kinds"), payload);
            let wire = frame.encode();
            prop_assert_eq!(Frame::read_from(&mut wire.as_slice()).expect("own encoding"), frame);
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes: Vec<u8>) {
            let _ = Frame::read_from(&mut bytes.as_slice());
        }
    }

    #[test]
    fn a_length_past_the_limit_is_refused_before_it_is_allocated() {
        let wire = [0xff, 0xff, 0xff, 0xff, 1];
        assert!(matches!(Frame::read_from(&mut wire.as_slice()), Err(FrameError::TooLong { len: 0xffff_ffff })));
    }

    #[test]
    fn a_clean_end_and_a_torn_frame_are_told_apart() {
        assert!(matches!(Frame::read_from(&mut [].as_slice()), Err(FrameError::Closed)));
        assert!(matches!(Frame::read_from(&mut [1, 0].as_slice()), Err(FrameError::Io(_))));
        assert!(matches!(Frame::read_from(&mut [9, 0, 0, 0, 1, 2].as_slice()), Err(FrameError::Io(_))));
    }
}
