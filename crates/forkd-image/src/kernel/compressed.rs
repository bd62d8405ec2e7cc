//! Telling compressed formats apart and undoing them.

use std::io::{self, Read};

/// The most that anything may decompress to; a kernel with debug information is near half of this.
const LIMIT: u64 = 2 << 30;

/// How bytes are compressed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Compression {
    None,
    Gzip,
    Xz,
    Zstd,
    /// Known, but not decoded here.
    Other(&'static str),
}

/// How far to decode.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Streams {
    /// To the end of the first stream; what follows is something else.
    First,
    /// To the end of the input, which is one stream after another.
    All,
}

impl Compression {
    /// Tells by the first bytes.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        const MAGIC: [(&[u8], Compression); 8] = [
            (b"\x1f\x8b", Compression::Gzip),
            (b"\xfd7zXZ\0", Compression::Xz),
            (b"\x28\xb5\x2f\xfd", Compression::Zstd),
            (b"BZh", Compression::Other("bzip2")),
            (b"\x5d\0\0", Compression::Other("lzma")),
            (b"\x02\x21\x4c\x18", Compression::Other("lz4")),
            (b"\x04\x22\x4d\x18", Compression::Other("lz4")),
            (b"\x89LZO", Compression::Other("lzo")),
        ];
        MAGIC.iter().find(|(magic, _)| bytes.starts_with(magic)).map_or(Self::None, |&(_, found)| found)
    }

    /// Decodes `reader` from its beginning.
    pub(crate) fn reader<'a>(self, reader: impl Read + 'a, streams: Streams) -> io::Result<Box<dyn Read + 'a>> {
        Ok(match (self, streams) {
            (Self::None, _) => Box::new(reader),
            (Self::Gzip, Streams::First) => Box::new(flate2::read::GzDecoder::new(reader)),
            (Self::Gzip, Streams::All) => Box::new(flate2::read::MultiGzDecoder::new(reader)),
            (Self::Xz, streams) => Box::new(lzma_rust2::XzReader::new(reader, streams == Streams::All)),
            (Self::Zstd, Streams::First) => Box::new(zstd::Decoder::new(reader)?.single_frame()),
            (Self::Zstd, Streams::All) => Box::new(zstd::Decoder::new(reader)?),
            (Self::Other(name), _) => {
                return Err(io::Error::new(
                    io::ErrorKind::Unsupported,
                    format!("it is compressed with {name}; gzip, xz and zstd are understood"),
                ));
            }
        })
    }
}

/// Decodes all of `bytes`; bytes that are not compressed come back as they are.
pub(crate) fn decode(bytes: &[u8]) -> Result<Vec<u8>, String> {
    let mut decoded = Vec::new();
    let compression = Compression::of(bytes);
    compression
        .reader(bytes, Streams::First)
        .and_then(|reader| reader.take(LIMIT + 1).read_to_end(&mut decoded))
        .map_err(|error| match compression {
            Compression::Other(_) => error.to_string(),
            _ => format!("its {compression:?} stream is damaged or cut off: {error}"),
        })?;
    if decoded.len() as u64 > LIMIT {
        return Err(format!("it decompresses to more than {} GiB", LIMIT >> 30));
    }
    Ok(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).expect("memory");
        encoder.finish().expect("memory")
    }

    #[test]
    fn every_format_is_undone_and_trailing_bytes_ignored() {
        let text = b"a kernel, let us say ".repeat(1000);
        // `printf '%s' 'a module' | xz -9`, kept as bytes so that no xz program is needed.
        let xz: &[u8] = &[
            0xfd, 0x37, 0x7a, 0x58, 0x5a, 0x00, 0x00, 0x04, 0xe6, 0xd6, 0xb4, 0x46, 0x02, 0x00, 0x21, 0x01, 0x1c, 0x00,
            0x00, 0x00, 0x10, 0xcf, 0x58, 0xcc, 0x01, 0x00, 0x07, 0x61, 0x20, 0x6d, 0x6f, 0x64, 0x75, 0x6c, 0x65, 0x00,
            0x75, 0xac, 0xe2, 0x58, 0xf7, 0xa0, 0xfc, 0xe4, 0x00, 0x01, 0x20, 0x08, 0xbb, 0x19, 0xd9, 0xbb, 0x1f, 0xb6,
            0xf3, 0x7d, 0x01, 0x00, 0x00, 0x00, 0x00, 0x04, 0x59, 0x5a,
        ];
        assert_eq!(decode(xz).expect("whole"), b"a module");
        assert_eq!(decode(&[xz, b"tail"].concat()).expect("with a tail"), b"a module");
        assert!(decode(&xz[..40]).is_err());
        for compressed in [gzip(&text), zstd::encode_all(text.as_slice(), 1).expect("memory")] {
            let with_size = [compressed.as_slice(), &(text.len() as u32).to_le_bytes()].concat();
            assert!(decode(&with_size).expect("whole") == text);
            let cut = decode(&compressed[..compressed.len() / 2]).expect_err("cut");
            assert!(cut.contains("damaged or cut off"), "{cut}");
        }
        assert_eq!(decode(b"plain").expect("plain"), b"plain");
        let error = decode(b"\x02\x21\x4c\x18rest").expect_err("lz4");
        assert!(error.contains("lz4"), "{error}");
    }
}
