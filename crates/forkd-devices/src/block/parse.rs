//! The bytes of a virtio-blk request, taken apart.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::disk::SECTOR;

/// Length of a request header.
pub(super) const HEADER_LEN: usize = 16;
/// Length of one range of a discard or write-zeroes request.
pub(super) const SEGMENT_LEN: usize = 16;
/// The most ranges that one discard or write-zeroes request names.
pub(super) const MOST_SEGMENTS: usize = 16;
/// The most sectors in one such range.
pub(super) const MOST_SECTORS: u32 = 1 << 31;

/// What the driver asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Request {
    /// Read into the writable buffers from this byte offset.
    Read(u64),
    /// Write the readable buffers at this byte offset.
    Write(u64),
    /// Complete earlier writes.
    Flush,
    /// The serial number.
    GetId,
    /// Give ranges up.
    Discard,
    /// Make ranges read as zeros.
    WriteZeroes,
}

/// Why a request is refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RequestError {
    /// The type of request is not known.
    #[error("unknown request type {0}")]
    Unsupported(u32),
    /// The sector is past what a byte offset can say.
    #[error("sector {0} is past any disk")]
    Sector(u64),
    /// A list of ranges is empty, too long or cut short.
    #[error("a list of ranges takes {0} bytes; it must be 1 to {MOST_SEGMENTS} times {SEGMENT_LEN}")]
    SegmentList(usize),
    /// A range is longer than announced, or has unknown flags.
    #[error("a range of {sectors} sectors with flags {flags:#x} is not allowed")]
    Segment {
        /// Its length.
        sectors: u32,
        /// Its flags.
        flags: u32,
    },
}

/// One range of a discard or write-zeroes request, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment {
    /// Start.
    pub offset: u64,
    /// Length.
    pub len: u64,
}

/// Decodes a request header.
///
/// # Errors
/// The request type is unknown, or the sector impossible.
pub fn parse_header(bytes: &[u8; HEADER_LEN]) -> Result<Request, RequestError> {
    let kind = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    let sector =
        u64::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11], bytes[12], bytes[13], bytes[14], bytes[15]]);
    let offset = || sector.checked_mul(SECTOR).ok_or(RequestError::Sector(sector));
    match kind {
        VIRTIO_BLK_T_IN => Ok(Request::Read(offset()?)),
        VIRTIO_BLK_T_OUT => Ok(Request::Write(offset()?)),
        VIRTIO_BLK_T_FLUSH => Ok(Request::Flush),
        VIRTIO_BLK_T_GET_ID => Ok(Request::GetId),
        VIRTIO_BLK_T_DISCARD => Ok(Request::Discard),
        VIRTIO_BLK_T_WRITE_ZEROES => Ok(Request::WriteZeroes),
        other => Err(RequestError::Unsupported(other)),
    }
}

/// Decodes the ranges of a discard (`unmap_allowed` false) or write-zeroes request.
///
/// # Errors
/// The list or one of its ranges is not allowed.
pub fn parse_segments(bytes: &[u8], unmap_allowed: bool) -> Result<Vec<Segment>, RequestError> {
    if bytes.is_empty() || !bytes.len().is_multiple_of(SEGMENT_LEN) || bytes.len() / SEGMENT_LEN > MOST_SEGMENTS {
        return Err(RequestError::SegmentList(bytes.len()));
    }
    let known_flags = if unmap_allowed { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP } else { 0 };
    let field = |part: &[u8], at: usize| u32::from_le_bytes([part[at], part[at + 1], part[at + 2], part[at + 3]]);
    bytes
        .chunks_exact(SEGMENT_LEN)
        .map(|part| {
            let sector = u64::from(field(part, 0)) | u64::from(field(part, 4)) << 32;
            let (sectors, flags) = (field(part, 8), field(part, 12));
            if sectors > MOST_SECTORS || flags & !known_flags != 0 {
                return Err(RequestError::Segment { sectors, flags });
            }
            let offset = sector.checked_mul(SECTOR).ok_or(RequestError::Sector(sector))?;
            Ok(Segment { offset, len: u64::from(sectors) * SECTOR })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn requests_are_told_apart() {
        let header = |kind: u32, sector: u64| {
            let mut bytes = [0; HEADER_LEN];
            bytes[..4].copy_from_slice(&kind.to_le_bytes());
            bytes[8..].copy_from_slice(&sector.to_le_bytes());
            parse_header(&bytes)
        };
        assert_eq!(header(0, 3), Ok(Request::Read(1536)));
        assert_eq!(header(1, 3), Ok(Request::Write(1536)));
        assert_eq!(header(4, u64::MAX), Ok(Request::Flush));
        assert_eq!(header(8, 0), Ok(Request::GetId));
        assert_eq!(header(14, 0), Err(RequestError::Unsupported(14)));
        assert_eq!(header(0, 1 << 55), Err(RequestError::Sector(1 << 55)));
    }

    proptest! {
        #[test]
        fn ranges_never_overflow(bytes: Vec<u8>, unmap: bool) {
            if let Ok(segments) = parse_segments(&bytes, unmap) {
                prop_assert_eq!(segments.len() * SEGMENT_LEN, bytes.len());
                prop_assert!(segments.iter().all(|segment| segment.len <= u64::from(MOST_SECTORS) * SECTOR));
            }
        }
    }

    #[test]
    fn unknown_flags_are_refused() {
        let mut bytes = [0; SEGMENT_LEN];
        bytes[8] = 8;
        bytes[12] = 1;
        assert_eq!(parse_segments(&bytes, false), Err(RequestError::Segment { sectors: 8, flags: 1 }));
        assert_eq!(parse_segments(&bytes, true), Ok(vec![Segment { offset: 0, len: 4096 }]));
    }
}
