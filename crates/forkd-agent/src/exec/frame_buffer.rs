//! Frames out of a stream that delivers bytes in pieces.

use forkd_proto::frame::{Frame, FrameError, HEADER_LEN, Header};

/// Bytes received and not yet taken as frames.
#[derive(Debug, Default)]
pub(super) struct FrameBuffer {
    bytes: Vec<u8>,
    /// Bytes at the start that were taken already.
    taken: usize,
}

impl FrameBuffer {
    /// Adds received bytes.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        if self.taken == self.bytes.len() {
            self.bytes.clear();
            self.taken = 0;
        } else if self.taken > 1 << 16 {
            self.bytes.drain(..self.taken);
            self.taken = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// Takes the next whole frame.
    pub(super) fn next(&mut self) -> Result<Option<Frame>, FrameError> {
        let waiting = &self.bytes[self.taken..];
        let Some((header, rest)) = waiting.split_first_chunk::<HEADER_LEN>() else { return Ok(None) };
        let header = Header::decode(*header)?;
        let Some(payload) = rest.get(..header.len) else { return Ok(None) };
        let frame = Frame::bytes(header.kind, payload);
        self.taken += HEADER_LEN + header.len;
        Ok(Some(frame))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forkd_proto::frame::Kind;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn frames_survive_any_cutting(payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..12), cuts in prop::collection::vec(1usize..400, 1..20)) {
            let frames: Vec<_> = payloads.into_iter().map(|payload| Frame::bytes(Kind::Stdin, payload)).collect();
            let wire: Vec<u8> = frames.iter().flat_map(Frame::encode).collect();
            let (mut buffer, mut got, mut at) = (FrameBuffer::default(), Vec::new(), 0);
            for cut in cuts.iter().cycle() {
                if at == wire.len() {
                    break;
                }
                let end = wire.len().min(at + cut);
                buffer.push(&wire[at..end]);
                at = end;
                while let Some(frame) = buffer.next().expect("own encoding") {
                    got.push(frame);
                }
            }
            prop_assert_eq!(got, frames);
        }

        #[test]
        fn any_bytes_are_taken_without_panic(bytes: Vec<u8>) {
            let mut buffer = FrameBuffer::default();
            buffer.push(&bytes);
            while let Ok(Some(_)) = buffer.next() {}
        }
    }
}
