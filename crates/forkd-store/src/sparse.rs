//! Writing a file once, front to back, leaving zeros out.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use blake3::Hasher;
use forkd_types::{Digest, PAGE_SIZE};
use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// How much is gathered before it is written. A multiple of the granule.
const CHUNK: usize = 1 << 20;
/// Zero blocks of this size, aligned to it, become holes.
const GRANULE: usize = PAGE_SIZE as usize;

static ZEROS: [u8; CHUNK] = [0; CHUNK];

/// Writes to an empty file. The digest covers the logical content: holes count as the zeros they
/// read as.
pub(crate) struct SparseWriter {
    file: File,
    hasher: Hasher,
    /// Bytes not yet written; the file offset they belong to is `offset`, a multiple of `CHUNK`.
    pending: Vec<u8>,
    offset: u64,
}

impl SparseWriter {
    pub(crate) fn new(file: File) -> Self {
        Self { file, hasher: Hasher::new(), pending: Vec::with_capacity(CHUNK), offset: 0 }
    }

    /// Logical bytes so far.
    pub(crate) fn len(&self) -> u64 {
        self.offset + self.pending.len() as u64
    }

    /// Appends `count` zeros without looking at them.
    pub(crate) fn zeros(&mut self, mut count: u64) -> io::Result<()> {
        while count > 0 {
            let step = count.min((CHUNK - self.pending.len()) as u64) as usize;
            if step == CHUNK {
                self.hasher.update(&ZEROS);
                self.offset += CHUNK as u64;
            } else {
                self.write_all(&ZEROS[..step])?;
            }
            count -= step as u64;
        }
        Ok(())
    }

    /// Writes what is left, gives the file its length and returns it with the digest.
    pub(crate) fn finish(mut self) -> io::Result<(File, Digest, u64)> {
        self.write_pending()?;
        self.file.set_len(self.offset)?;
        Ok((self.file, Digest::from_bytes(*self.hasher.finalize().as_bytes()), self.offset))
    }

    fn write_pending(&mut self) -> io::Result<()> {
        let blocks: Vec<&[u8]> = self.pending.chunks(GRANULE).collect();
        let mut at = self.offset;
        for run in blocks.chunk_by(|one, next| is_zero(one) == is_zero(next)) {
            let len: usize = run.iter().map(|block| block.len()).sum();
            if !is_zero(run[0]) {
                let start = (at - self.offset) as usize;
                self.file.write_all_at(&self.pending[start..start + len], at)?;
            }
            at += len as u64;
        }
        self.offset = at;
        self.pending.clear();
        Ok(())
    }
}

impl Write for SparseWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(CHUNK - self.pending.len());
        self.hasher.update(&bytes[..taken]);
        self.pending.extend_from_slice(&bytes[..taken]);
        if self.pending.len() == CHUNK {
            self.write_pending()?;
        }
        Ok(taken)
    }

    /// Does nothing: bytes reach the file in whole chunks and at the end.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Where `file`, `end` bytes long, next has data at or after `at`; an empty range at its end when only a hole is
/// left. A file system that knows no holes has one stretch of data.
pub(crate) fn next_extent(file: &File, at: u64, end: u64) -> io::Result<Range<u64>> {
    let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(data) => data.min(end),
        Err(Errno::NXIO) => end,
        Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
        Err(error) => return Err(error.into()),
    };
    if data == end {
        return Ok(end..end);
    }
    let hole = match rustix::fs::seek(file, SeekFrom::Hole(data)) {
        Ok(hole) => hole.min(end),
        Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NXIO) => end,
        Err(error) => return Err(error.into()),
    };
    Ok(data..hole)
}

/// Whether a block is all zeros.
pub(crate) fn is_zero(block: &[u8]) -> bool {
    // A slice comparison is one memcmp, quick in unoptimised builds too.
    block.chunks(CHUNK).all(|part| *part == ZEROS[..part.len()])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk_usage;
    use proptest::prelude::*;
    use std::fs;

    #[derive(Clone, Debug)]
    enum Piece {
        Data(Vec<u8>),
        Zeros(u64),
    }

    fn pieces() -> impl Strategy<Value = Vec<Piece>> {
        let piece = prop_oneof![
            (1usize..40_000, any::<u8>()).prop_map(|(len, byte)| Piece::Data(vec![byte; len])),
            (0u64..3 * CHUNK as u64).prop_map(Piece::Zeros),
        ];
        prop::collection::vec(piece, 0..8)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn the_file_reads_as_what_was_written(pieces in pieces()) {
            let dir = tempfile::tempdir().expect("tempdir");
            let path = dir.path().join("f");
            let mut writer = SparseWriter::new(File::create(&path).expect("create"));
            let mut expected = Vec::new();
            for piece in &pieces {
                match piece {
                    Piece::Data(bytes) => { writer.write_all(bytes).expect("write"); expected.extend_from_slice(bytes); }
                    Piece::Zeros(count) => { writer.zeros(*count).expect("zeros"); expected.resize(expected.len() + *count as usize, 0); }
                }
                prop_assert_eq!(writer.len(), expected.len() as u64);
            }
            let (_, digest, len) = writer.finish().expect("finish");
            prop_assert_eq!(len, expected.len() as u64);
            prop_assert_eq!(digest, Digest::from_bytes(*blake3::hash(&expected).as_bytes()));
            prop_assert!(fs::read(&path).expect("read") == expected, "content differs");
        }
    }

    #[test]
    fn zeros_take_no_room() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("f");
        let mut writer = SparseWriter::new(File::create(&path).expect("create"));
        writer.write_all(&vec![0; 3 * CHUNK + 5]).expect("write");
        writer.write_all(b"x").expect("write");
        writer.zeros(64 << 20).expect("zeros");
        writer.finish().expect("finish");
        let metadata = fs::metadata(&path).expect("stat");
        assert_eq!(metadata.len(), (3 * CHUNK + 6 + (64 << 20)) as u64);
        assert!(disk_usage::of_file(&metadata) <= 64 << 10, "{} bytes on disk", disk_usage::of_file(&metadata));
    }
}
