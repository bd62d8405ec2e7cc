//! The bytes of vsock packets, and of the greeting on the unix socket.
//!
//! The packet types of the virtio-vsock crate accept a header and one data buffer at most; Linux ≥ 6.7
//! sends more (`MSG_ZEROCOPY`, non-linear socket buffers). So the header is decoded here and the data
//! stays scattered.

/// Length of a packet header.
pub const HEADER_LEN: usize = 44;
/// The context id of the host.
pub(super) const HOST_CID: u64 = 2;
/// The only socket type offered.
pub(super) const TYPE_STREAM: u16 = 1;
/// The longest greeting: `CONNECT 4294967295\n`, with room for a carriage return.
pub(super) const GREETING_LIMIT: usize = 32;

/// What a packet is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub enum Operation {
    /// Open a connection.
    Request = 1,
    /// Accept it.
    Response = 2,
    /// Refuse or end it at once.
    Reset = 3,
    /// One or both directions end.
    Shutdown = 4,
    /// Data.
    Data = 5,
    /// Tells how much may be sent.
    CreditUpdate = 6,
    /// Asks for a credit update.
    CreditRequest = 7,
}

impl Operation {
    /// The operation with this number.
    pub fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// Which directions a [`Operation::Shutdown`] ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ShutdownFlags {
    /// The sender receives no more.
    pub receive: bool,
    /// The sender sends no more.
    pub send: bool,
}

impl ShutdownFlags {
    /// The flags in a header.
    pub fn from_bits(bits: u32) -> Self {
        Self { receive: bits & 1 != 0, send: bits & 2 != 0 }
    }

    /// The header field.
    pub fn bits(self) -> u32 {
        u32::from(self.receive) | u32::from(self.send) << 1
    }

    /// Whether nothing flows any more.
    pub fn is_both(self) -> bool {
        self.receive && self.send
    }
}

/// `struct virtio_vsock_hdr`. Numbers the device does not know are kept as they are.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PacketHeader {
    /// Context id of the sender.
    pub src_cid: u64,
    /// Context id of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes of data after the header.
    pub len: u32,
    /// Socket type.
    pub socket_type: u16,
    /// An [`Operation`].
    pub operation: u16,
    /// [`ShutdownFlags`], or zero.
    pub flags: u32,
    /// Size of the sender's receive buffer.
    pub buf_alloc: u32,
    /// Bytes the sender's receive buffer has passed on since the connection began, modulo 2³².
    pub fwd_cnt: u32,
}

impl PacketHeader {
    /// Decodes a header; every value is possible.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            socket_type: u16_at(28),
            operation: u16_at(30),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    /// Encodes the header.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &self.src_cid.to_le_bytes());
        put(8, &self.dst_cid.to_le_bytes());
        put(16, &self.src_port.to_le_bytes());
        put(20, &self.dst_port.to_le_bytes());
        put(24, &self.len.to_le_bytes());
        put(28, &self.socket_type.to_le_bytes());
        put(30, &self.operation.to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.buf_alloc.to_le_bytes());
        put(40, &self.fwd_cnt.to_le_bytes());
        bytes
    }
}

/// The port that a greeting line, without its newline, asks for.
pub fn parse_connect(line: &[u8]) -> Option<u32> {
    let digits = line.strip_suffix(b"\r").unwrap_or(line).strip_prefix(b"CONNECT ")?;
    if digits.is_empty() || digits.len() > 10 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn headers_round_trip(low: [u8; 32], high: [u8; 12]) {
            let mut bytes = [0; HEADER_LEN];
            bytes[..32].copy_from_slice(&low);
            bytes[32..].copy_from_slice(&high);
            prop_assert_eq!(PacketHeader::decode(&bytes).encode(), bytes);
        }

        #[test]
        fn every_port_can_be_asked_for(port: u32) {
            prop_assert_eq!(parse_connect(format!("CONNECT {port}").as_bytes()), Some(port));
            prop_assert_eq!(parse_connect(format!("CONNECT {port}\r").as_bytes()), Some(port));
        }

        #[test]
        fn greetings_never_panic(line: Vec<u8>) {
            let _ = parse_connect(&line);
        }
    }

    #[test]
    fn other_greetings_are_refused() {
        for bad in ["", "CONNECT", "CONNECT ", "connect 1", "CONNECT +1", "CONNECT 4294967296", "CONNECT 1 2"] {
            assert_eq!(parse_connect(bad.as_bytes()), None, "{bad:?}");
        }
    }

    #[test]
    fn the_layout_is_that_of_the_specification() {
        let header = PacketHeader {
            src_cid: 3,
            dst_cid: HOST_CID,
            src_port: 0x1122,
            dst_port: 0x3344,
            len: 5,
            socket_type: TYPE_STREAM,
            operation: Operation::Data as u16,
            flags: 0,
            buf_alloc: 0x1_0000,
            fwd_cnt: 9,
        };
        let bytes = header.encode();
        assert_eq!(bytes[16..20], [0x22, 0x11, 0, 0]);
        assert_eq!(bytes[28..32], [1, 0, 5, 0]);
        assert_eq!(bytes[36..40], [0, 0, 1, 0]);
    }
}
