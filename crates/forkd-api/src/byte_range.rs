//! The part of a file that a client asks for by the `Range` header (RFC 9110, section 14).

use axum::http::{HeaderMap, header};
use forkd_node::ByteRange;

/// One range of bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum RequestedRange {
    /// From the first, to the last if one is named.
    From {
        /// Position of the first byte.
        first: u64,
        /// Position of the last byte, not before the first.
        last: Option<u64>,
    },
    /// So many at the end.
    Last(u64),
}

impl RequestedRange {
    /// The range of a request. One that is malformed, of another unit or of several parts asks for nothing that
    /// has to be granted: the whole file is the answer.
    pub(crate) fn of(headers: &HeaderMap) -> Option<Self> {
        let value = headers.get(header::RANGE)?.to_str().ok()?;
        let (first, last) = value.strip_prefix("bytes=")?.trim().split_once('-')?;
        let number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse::<u64>().ok())?;
        match (first, last) {
            ("", last) => number(last).map(Self::Last),
            (first, "") => number(first).map(|first| Self::From { first, last: None }),
            (first, last) => {
                let (first, last) = (number(first)?, number(last)?);
                (first <= last).then_some(Self::From { first, last: Some(last) })
            }
        }
    }

    /// What to ask the guest for, before the size is known.
    pub(crate) fn for_guest(self) -> ByteRange {
        let signed = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        match self {
            Self::From { first, last } => {
                ByteRange { offset: signed(first), length: last.map(|last| (last - first).saturating_add(1)) }
            }
            Self::Last(count) => ByteRange { offset: -signed(count), length: Some(count) },
        }
    }

    /// First byte and count within a file of `size` bytes; none when it has no byte of the range.
    pub(crate) fn within(self, size: u64) -> Option<(u64, u64)> {
        let (first, count) = match self {
            Self::From { first, last } => {
                let end = last.map_or(size, |last| last.saturating_add(1).min(size));
                (first, end.checked_sub(first)?)
            }
            Self::Last(count) => (size.saturating_sub(count), count.min(size)),
        };
        (count > 0).then_some((first, count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(text: &str) -> Option<RequestedRange> {
        let mut headers = HeaderMap::new();
        headers.insert(header::RANGE, text.parse().expect("header"));
        RequestedRange::of(&headers)
    }

    #[test]
    fn ranges_are_cut_to_the_file() {
        for (text, size, expected) in [
            ("bytes=0-0", 10, Some((0, 1))),
            ("bytes=2-5", 10, Some((2, 4))),
            ("bytes=5-", 10, Some((5, 5))),
            ("bytes=5-99", 10, Some((5, 5))),
            ("bytes=-3", 10, Some((7, 3))),
            ("bytes=-99", 10, Some((0, 10))),
            ("bytes=10-", 10, None),
            ("bytes=11-20", 10, None),
            ("bytes=-0", 10, None),
            ("bytes=0-18446744073709551615", 10, Some((0, 10))),
        ] {
            assert_eq!(range(text).expect(text).within(size), expected, "{text}");
        }
    }

    #[test]
    fn what_is_no_single_range_of_bytes_is_ignored() {
        for text in ["bytes=", "bytes=5-2", "bytes=a-b", "items=0-1", "bytes=0-1,5-6", "bytes=+1-2", "bytes=-", "bytes"]
        {
            assert_eq!(range(text), None, "{text}");
        }
    }

    #[test]
    fn the_end_is_counted_from_the_end() {
        assert_eq!(range("bytes=-3").expect("legal").for_guest(), ByteRange { offset: -3, length: Some(3) });
        assert_eq!(range("bytes=2-5").expect("legal").for_guest(), ByteRange { offset: 2, length: Some(4) });
    }
}
