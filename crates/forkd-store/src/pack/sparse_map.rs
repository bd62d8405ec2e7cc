//! Which parts of a file are data: found from its content, written and read as GNU tar does.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use forkd_types::{Digest, PAGE_SIZE};

use super::member::{BLOCK, padded};
use crate::sparse::{is_zero, next_extent};

/// Data begins and holes end at multiples of this.
pub(super) const GRANULE: u64 = PAGE_SIZE;
/// The most runs of one file. Guests have at most 2²² pages; every second one of those is half of this.
pub(super) const RUNS_LIMIT: u64 = 1 << 22;

/// A stretch of data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Run {
    pub(super) offset: u64,
    pub(super) len: u64,
}

impl Run {
    pub(super) fn end(&self) -> u64 {
        self.offset + self.len
    }
}

/// The runs of data of a file in ascending order; everything between is zero.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct SparseMap {
    pub(super) bytes: u64,
    pub(super) runs: Vec<Run>,
}

impl SparseMap {
    /// Finds the runs of `file` and computes their digest, telling `progress` how far it has come.
    ///
    /// A granule is data if it has a byte that is not zero, whether or not the file system has blocks there. Of
    /// a file with too many runs, larger granules are taken.
    pub(super) fn of(file: &File, progress: impl FnMut(u64)) -> io::Result<(Self, Digest)> {
        Self::with_at_most(RUNS_LIMIT, file, progress)
    }

    fn with_at_most(limit: u64, file: &File, mut progress: impl FnMut(u64)) -> io::Result<(Self, Digest)> {
        let bytes = file.metadata()?.len();
        let mut granule = GRANULE;
        loop {
            let (runs, hasher) = scan(file, bytes, granule, &mut progress)?;
            if runs.len() as u64 <= limit {
                let map = Self { bytes, runs };
                let digest = digest(&map.to_text(), &hasher);
                return Ok((map, digest));
            }
            granule *= 2;
        }
    }

    /// Bytes that are data.
    pub(super) fn data_bytes(&self) -> u64 {
        self.runs.iter().map(|run| run.len).sum()
    }

    /// The map as it stands in the archive: decimal lines, padded. A file that ends in a hole has a last run of
    /// no bytes, which tells a reader how long it is.
    pub(super) fn to_text(&self) -> Vec<u8> {
        use std::io::Write;
        let end = self.runs.last().map_or(0, Run::end);
        let last = (end < self.bytes || self.runs.is_empty()).then_some(Run { offset: self.bytes, len: 0 });
        let mut text = format!("{}\n", self.runs.len() + usize::from(last.is_some())).into_bytes();
        for run in self.runs.iter().chain(&last) {
            writeln!(text, "{}\n{}", run.offset, run.len).expect("a vector takes what it is given");
        }
        text.resize(padded(text.len() as u64) as usize, 0);
        text
    }

    /// Reads the map of a file of `bytes` bytes, `data_bytes` of them data; `block` gives the archive's next
    /// block. Also returns the text. The error is a predicate of the member.
    pub(super) fn read<E: From<String>>(
        bytes: u64,
        data_bytes: u64,
        mut block: impl FnMut() -> Result<[u8; BLOCK], E>,
    ) -> Result<(Self, Vec<u8>), E> {
        let mut numbers = Numbers { text: Vec::new(), at: 0 };
        let count = numbers.next(&mut block)?;
        // Every run but the last is whole granules.
        if count == 0 || count > RUNS_LIMIT + 1 || count > data_bytes.div_ceil(GRANULE) + 1 {
            return Err(format!("has a map of {count} parts for {data_bytes} bytes of data").into());
        }
        let mut map = Self { bytes, runs: Vec::with_capacity(count as usize) };
        for index in 0..count {
            let run = Run { offset: numbers.next(&mut block)?, len: numbers.next(&mut block)? };
            if index + 1 == count && run.len == 0 && run.offset == bytes {
                break;
            }
            map.push(run)?;
        }
        let rest_is_padding = numbers.text[numbers.at..].iter().all(|&byte| byte == 0);
        // One map has one text: leading zeros or a superfluous last run make another.
        if map.data_bytes() != data_bytes || !rest_is_padding || map.to_text() != numbers.text {
            return Err(format!("has a map that does not describe {data_bytes} bytes of data in {bytes}").into());
        }
        Ok((map, numbers.text))
    }

    fn push(&mut self, run: Run) -> Result<(), String> {
        let end = run.offset.checked_add(run.len).filter(|&end| end <= self.bytes);
        let whole = run.offset.is_multiple_of(GRANULE)
            && (run.len.is_multiple_of(GRANULE) || end == Some(self.bytes))
            && run.len > 0;
        let after = self.runs.last().is_none_or(|last| last.end() < run.offset);
        if end.is_none() || !whole || !after {
            return Err(format!("has a map with an impossible part: {} bytes at {}", run.len, run.offset));
        }
        self.runs.push(run);
        Ok(())
    }
}

/// What the manifest records of a sparse member: its map and its data, hashed each by itself because the map is
/// known only when all data has been seen and stands before it in the archive.
pub(super) fn digest(map_text: &[u8], data: &blake3::Hasher) -> Digest {
    let both = [*blake3::hash(map_text).as_bytes(), *data.finalize().as_bytes()].concat();
    Digest::from_bytes(*blake3::hash(&both).as_bytes())
}

/// The numbers of a map, read block by block.
struct Numbers {
    text: Vec<u8>,
    at: usize,
}

impl Numbers {
    fn next<E: From<String>>(&mut self, block: &mut impl FnMut() -> Result<[u8; BLOCK], E>) -> Result<u64, E> {
        let mut value = 0u64;
        // No number has more digits, whatever they are.
        for _ in 0..21 {
            if self.at == self.text.len() {
                self.text.extend_from_slice(&block()?);
            }
            let byte = self.text[self.at];
            self.at += 1;
            let next = match byte {
                b'\n' => return Ok(value),
                b'0'..=b'9' => value.checked_mul(10).and_then(|value| value.checked_add(u64::from(byte - b'0'))),
                _ => None,
            };
            value = next.ok_or_else(|| "has a map that is not made of numbers".to_owned())?;
        }
        Err("has a map that is not made of numbers".to_owned().into())
    }
}

/// The runs of `file` in whole granules, and the hash of what they hold.
fn scan(
    file: &File,
    bytes: u64,
    granule: u64,
    progress: &mut impl FnMut(u64),
) -> io::Result<(Vec<Run>, blake3::Hasher)> {
    let mut runs: Vec<Run> = Vec::new();
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; granule.max(1 << 20) as usize];
    let mut at = 0;
    while at < bytes {
        let extent = next_extent(file, at, bytes)?;
        // Holes need not begin or end with a granule, though on all common file systems they do.
        at = at.max(extent.start - extent.start % granule);
        let end = extent.end.next_multiple_of(granule).min(bytes);
        while at < end {
            let piece = &mut buffer[..(end - at).min(granule.max(1 << 20)) as usize];
            file.read_exact_at(piece, at)?;
            let granules: Vec<&[u8]> = piece.chunks(granule as usize).collect();
            for same in granules.chunk_by(|one, next| is_zero(one) == is_zero(next)) {
                let len: usize = same.iter().map(|granule| granule.len()).sum();
                if !is_zero(same[0]) {
                    let start = same[0].as_ptr() as usize - piece.as_ptr() as usize;
                    hasher.update(&piece[start..start + len]);
                    match runs.last_mut() {
                        Some(last) if last.end() == at => last.len += len as u64,
                        _ => runs.push(Run { offset: at, len: len as u64 }),
                    }
                }
                at += len as u64;
            }
            progress(at);
        }
    }
    Ok((runs, hasher))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(text: &[u8], bytes: u64, data_bytes: u64) -> Result<SparseMap, String> {
        let mut blocks = text.chunks_exact(BLOCK);
        let block =
            || blocks.next().map(|block| block.try_into().expect("a block")).ok_or_else(|| "it ends".to_owned());
        SparseMap::read(bytes, data_bytes, block).map(|(map, _)| map)
    }

    fn file(len: u64, pages: &[(u64, u8)]) -> File {
        let file = tempfile::tempfile().expect("scratch");
        file.set_len(len).expect("size");
        for &(page, byte) in pages {
            let offset = page * GRANULE;
            if offset < len {
                file.write_all_at(&vec![byte; GRANULE.min(len - offset) as usize], offset).expect("write");
            }
        }
        file
    }

    proptest! {
        #[test]
        fn a_map_is_of_the_content_and_not_of_the_blocks(
            len in 0u64..600_000, pages in prop::collection::vec((0u64..160, 0u8..3), 0..40)
        ) {
            let sparse = file(len, &pages);
            let mut content = vec![0; len as usize];
            sparse.read_exact_at(&mut content, 0).expect("read");
            let dense = tempfile::tempfile().expect("scratch");
            dense.write_all_at(&content, 0).expect("write");

            let (map, digest) = SparseMap::of(&sparse, |_| ()).expect("scan");
            prop_assert_eq!(&SparseMap::of(&dense, |_| ()).expect("scan"), &(map.clone(), digest));
            let mut rebuilt = vec![0; len as usize];
            for run in &map.runs {
                let range = run.offset as usize..run.end() as usize;
                rebuilt[range.clone()].copy_from_slice(&content[range]);
            }
            prop_assert!(rebuilt == content, "a run is missing");
            let zero_pages = content.chunks(GRANULE as usize).filter(|page| is_zero(page)).map(|page| page.len() as u64);
            prop_assert_eq!(map.data_bytes() + zero_pages.sum::<u64>(), len);
            prop_assert_eq!(read(&map.to_text(), len, map.data_bytes()), Ok(map));
        }

        #[test]
        fn a_map_has_one_text(
            pages in prop::collection::btree_set(0u64..60, 1..20), at: prop::sample::Index, byte: u8
        ) {
            let pages: Vec<_> = pages.into_iter().map(|page| (page, 1)).collect();
            let (map, _) = SparseMap::of(&file(64 * GRANULE, &pages), |_| ()).expect("scan");
            let mut text = map.to_text();
            let at = at.index(text.len());
            prop_assume!(text[at] != byte);
            text[at] = byte;
            if let Ok(other) = read(&text, map.bytes, map.data_bytes()) {
                prop_assert_ne!(&other, &map);
                prop_assert_eq!(other.to_text(), text);
            }
        }
    }

    #[test]
    fn impossible_maps_are_refused() {
        let text = |numbers: &str| {
            let mut text = numbers.replace(' ', "\n").into_bytes();
            text.push(b'\n');
            text.resize(padded(text.len() as u64) as usize, 0);
            text
        };
        assert!(read(&text("2 0 4096 8192 0"), 8192, 4096).is_ok());
        for (numbers, why) in [
            ("0", "no parts"),
            ("9 0 4096", "more parts than data"),
            ("2 4096 4096 0 4096", "not ascending"),
            ("2 0 4096 4096 4096", "two that touch"),
            ("1 1 4096", "not aligned"),
            ("1 4096 8192", "past the end"),
            ("2 8192 0 0 8192", "an empty part in the middle"),
            ("1 0 8192", "more data than declared"),
            ("2 0 4096 08192 0", "a leading zero"),
            ("1 18446744073709551615 4096", "an overflow"),
            ("1 99999999999999999999999 4096", "too large a number"),
            ("1 x 4096", "no number"),
            ("1 -1 4096", "a negative number"),
        ] {
            assert!(read(&text(numbers), 8192, 4096).is_err(), "{why}");
        }
        assert!(read(&[b'0'; 1 << 16], 8192, 4096).is_err(), "a number without end");
    }

    #[test]
    fn too_many_runs_become_fewer_larger_ones() {
        let every_other: Vec<_> = (0..8).map(|page| (2 * page, 1)).collect();
        let file = file(16 * GRANULE, &every_other);
        let runs = |limit| SparseMap::with_at_most(limit, &file, |_| ()).expect("scan").0.runs;
        assert_eq!(runs(8).len(), 8);
        assert_eq!(runs(7), [Run { offset: 0, len: 16 * GRANULE }]);
    }
}
