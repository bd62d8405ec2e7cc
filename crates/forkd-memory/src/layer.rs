//! The layer file: runs of 4 KiB pages, for guest memory and for disks.
//!
//! ```text
//! 0        header: magic, version, page size, number of pages, where the index is, digests
//! 2 MiB    data: page p of the guest at 2 MiB + p × 4 KiB; a page that is not stored is a hole
//! …        index: the runs that are stored, and the runs that are zero
//! ```
//!
//! Data lies at its logical offset in a sparse file, so that a whole base is *one* private mapping:
//! a fork then copies one area descriptor instead of thousands. Zero pages take no space. In a base
//! everything outside the stored runs is zero; in a layer over a parent, everything outside the
//! stored and zero runs is the parent's.
//!
//! The digest covers the format version, the index and the stored bytes. It is computed while a
//! layer is written and by [`verify`]; opening checks the header and the index only, because
//! reading a base of gigabytes has no place on the way to a running copy.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use forkd_types::{Digest, PAGE_SIZE, PageCount, PageRun, PageRunError};
use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// First bytes of every layer file.
pub const MAGIC: [u8; 8] = *b"FORKDLYR";
/// The version that is written, and the only one that is read.
pub const CURRENT: u32 = 1;
/// Where page 0 lies in the file; the alignment of a huge page.
pub const DATA_OFFSET: u64 = 2 << 20;
/// The largest index, in bytes: 2²⁴ runs.
const INDEX_LIMIT: u64 = 16 << 24;
/// The most pages a layer describes: 1 TiB.
const PAGES_LIMIT: u64 = 1 << 28;
const HEADER_LEN: usize = 8 + 4 + 4 + 8 + 8 + 8 + 8 + 32 + 32 + 32;

/// Why a layer cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// Reading or writing failed.
    #[error("cannot {attempt} the layer file")]
    Io {
        /// What was attempted.
        attempt: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The file does not start with [`MAGIC`].
    #[error("not a layer file")]
    NotALayer,
    /// The file is of another version.
    #[error("layer format version {found}; this program reads version {CURRENT}")]
    Version {
        /// The version in the file.
        found: u32,
    },
    /// The header or the index does not have the digest it claims, or a field is out of bounds.
    #[error("the layer's {part} is damaged")]
    Damaged {
        /// Which part.
        part: &'static str,
    },
    /// The index lists runs that overlap or lie outside.
    #[error("the layer's index is damaged")]
    Runs(#[from] PageRunError),
    /// The layer describes another number of pages than asked for.
    #[error("the layer describes {found} pages where {expected} were expected")]
    Size {
        /// Pages in the file.
        found: u64,
        /// Pages expected.
        expected: u64,
    },
    /// The file goes on behind its index.
    #[error("the layer file has {found} bytes where {expected} were written")]
    Length {
        /// Bytes it has.
        found: u64,
        /// Bytes up to the end of the index.
        expected: u64,
    },
    /// There is something where nothing was stored. Where a base has nothing the guest has zeros, and sees this
    /// instead.
    #[error("the layer file holds data at byte {offset}, where nothing was stored")]
    Stray {
        /// Where in the file.
        offset: u64,
    },
    /// The stored bytes do not have the digest that the header claims.
    #[error("the layer's contents are damaged: digest {found}, recorded {recorded}")]
    Contents {
        /// Digest of the bytes.
        found: Digest,
        /// Digest in the header.
        recorded: Digest,
    },
}

fn io_error(attempt: &'static str) -> impl FnOnce(io::Error) -> LayerError {
    move |source| LayerError::Io { attempt, source }
}

/// What a finished layer holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LayerSummary {
    /// Digest of the whole layer.
    pub digest: Digest,
    /// Pages stored.
    pub pages: PageCount,
    /// Pages recorded as zero although the parent's are not.
    pub zero_pages: PageCount,
}

/// The header as numbers.
struct Header {
    pages: u64,
    index_offset: u64,
    data_runs: u64,
    zero_runs: u64,
    index_digest: [u8; 32],
    data_digest: [u8; 32],
}

impl Header {
    fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = Vec::with_capacity(HEADER_LEN);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&CURRENT.to_le_bytes());
        bytes.extend_from_slice(&(PAGE_SIZE as u32).to_le_bytes());
        for number in [self.pages, self.index_offset, self.data_runs, self.zero_runs] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&self.index_digest);
        bytes.extend_from_slice(&self.data_digest);
        let own = blake3::hash(&bytes);
        bytes.extend_from_slice(own.as_bytes());
        bytes.try_into().expect("the fields above add up to HEADER_LEN")
    }

    fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, LayerError> {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let digest = |at: usize| -> [u8; 32] { bytes[at..at + 32].try_into().expect("32 bytes") };
        if bytes[..8] != MAGIC {
            return Err(LayerError::NotALayer);
        }
        if word(8) != CURRENT {
            return Err(LayerError::Version { found: word(8) });
        }
        let own = HEADER_LEN - 32;
        if blake3::hash(&bytes[..own]).as_bytes() != &digest(own) {
            return Err(LayerError::Damaged { part: "header" });
        }
        let header = Self {
            pages: number(16),
            index_offset: number(24),
            data_runs: number(32),
            zero_runs: number(40),
            index_digest: digest(48),
            data_digest: digest(80),
        };
        let runs = header.data_runs.checked_add(header.zero_runs).filter(|runs| *runs <= INDEX_LIMIT / 16);
        let sound = u64::from(word(12)) == PAGE_SIZE
            && header.pages <= PAGES_LIMIT
            && header.index_offset == DATA_OFFSET + header.pages * PAGE_SIZE
            && runs.is_some();
        if sound { Ok(header) } else { Err(LayerError::Damaged { part: "header" }) }
    }

    /// The digest of the whole layer: its header determines everything else.
    fn layer_digest(&self) -> Digest {
        Digest::from_bytes(*blake3::hash(&self.encode()).as_bytes())
    }
}

/// Writes a layer, runs in ascending order.
#[derive(Debug)]
pub struct LayerWriter {
    file: File,
    pages: u64,
    data: Vec<PageRun>,
    zero: Vec<PageRun>,
    hasher: blake3::Hasher,
}

impl LayerWriter {
    /// Begins a layer of `pages` pages in `file`, which must be empty.
    pub fn new(file: File, pages: PageCount) -> Result<Self, LayerError> {
        file.set_len(DATA_OFFSET + pages.bytes()).map_err(io_error("size"))?;
        Ok(Self { file, pages: pages.0, data: Vec::new(), zero: Vec::new(), hasher: blake3::Hasher::new() })
    }

    /// Stores `bytes`, whole pages, from page `first` on; past all pages stored before.
    pub fn store(&mut self, first: u64, bytes: &[u8]) -> Result<(), LayerError> {
        assert!((bytes.len() as u64).is_multiple_of(PAGE_SIZE), "a run is whole pages");
        self.file.write_all_at(bytes, DATA_OFFSET + first * PAGE_SIZE).map_err(io_error("write"))?;
        self.hasher.update(bytes);
        extend(&mut self.data, PageRun { first, count: bytes.len() as u64 / PAGE_SIZE });
        Ok(())
    }

    /// Records that `run` is zero here although the parent's is not.
    pub fn mark_zero(&mut self, run: PageRun) {
        extend(&mut self.zero, run);
    }

    /// Stores what of `bytes`, whole pages from page `first` on, differs from `below`, what the layers
    /// underneath say about the same pages (`None`: that they are zero). Pages that became zero are
    /// marked and not stored.
    pub fn store_changes(&mut self, first: u64, bytes: &[u8], below: Option<&[u8]>) -> Result<(), LayerError> {
        const PAGE: usize = PAGE_SIZE as usize;
        assert!(below.is_none_or(|below| below.len() == bytes.len()), "the same pages are compared");
        let mut unstored = 0..0;
        for start in (0..bytes.len()).step_by(PAGE) {
            let page = &bytes[start..start + PAGE];
            let below = below.map(|below| &below[start..start + PAGE]);
            let zero = is_zero(page);
            let changed = match below {
                Some(below) => page != below,
                None => !zero,
            };
            if changed && zero {
                self.mark_zero(PageRun { first: first + (start / PAGE) as u64, count: 1 });
            }
            if changed && !zero && unstored.end == start {
                unstored.end = start + PAGE;
            } else if changed && !zero {
                self.store_part(first, bytes, unstored)?;
                unstored = start..start + PAGE;
            }
        }
        self.store_part(first, bytes, unstored)
    }

    fn store_part(&mut self, first: u64, bytes: &[u8], part: std::ops::Range<usize>) -> Result<(), LayerError> {
        if part.is_empty() { Ok(()) } else { self.store(first + part.start as u64 / PAGE_SIZE, &bytes[part]) }
    }

    /// Writes index and header and syncs the file.
    pub fn finish(self) -> Result<LayerSummary, LayerError> {
        PageRun::check(&self.data, PageCount(self.pages))?;
        PageRun::check(&self.zero, PageCount(self.pages))?;
        let index: Vec<u8> = self
            .data
            .iter()
            .chain(&self.zero)
            .flat_map(|run| [run.first.to_le_bytes(), run.count.to_le_bytes()].concat())
            .collect();
        let header = Header {
            pages: self.pages,
            index_offset: DATA_OFFSET + self.pages * PAGE_SIZE,
            data_runs: self.data.len() as u64,
            zero_runs: self.zero.len() as u64,
            index_digest: *blake3::hash(&index).as_bytes(),
            data_digest: *self.hasher.finalize().as_bytes(),
        };
        self.file.write_all_at(&index, header.index_offset).map_err(io_error("write"))?;
        self.file.write_all_at(&header.encode(), 0).map_err(io_error("write"))?;
        self.file.sync_all().map_err(io_error("sync"))?;
        Ok(LayerSummary {
            digest: header.layer_digest(),
            pages: PageRun::total(&self.data),
            zero_pages: PageRun::total(&self.zero),
        })
    }
}

/// Whether a page is all zero; most are told from their first word.
fn is_zero(page: &[u8]) -> bool {
    page.chunks_exact(32).all(|chunk| chunk == [0; 32])
}

/// Appends `run`, joining it to the last where it is adjacent.
fn extend(runs: &mut Vec<PageRun>, run: PageRun) {
    match runs.last_mut() {
        Some(last) if last.end() == run.first => last.count += run.count,
        _ => runs.push(run),
    }
}

/// An opened layer: its file and its index.
#[derive(Debug)]
pub struct Layer {
    file: File,
    pages: PageCount,
    data: Vec<PageRun>,
    zero: Vec<PageRun>,
    digest: Digest,
    data_digest: [u8; 32],
}

impl Layer {
    /// Reads header and index of `file` and checks both; the stored bytes are not read.
    pub fn open(file: File) -> Result<Self, LayerError> {
        let mut bytes = [0; HEADER_LEN];
        file.read_exact_at(&mut bytes, 0).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => LayerError::NotALayer,
            _ => io_error("read")(error),
        })?;
        let header = Header::decode(&bytes)?;
        let mut index = vec![0; ((header.data_runs + header.zero_runs) * 16) as usize];
        file.read_exact_at(&mut index, header.index_offset).map_err(io_error("read the index of"))?;
        if blake3::hash(&index).as_bytes() != &header.index_digest {
            return Err(LayerError::Damaged { part: "index" });
        }
        let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
        let mut data: Vec<PageRun> = index
            .chunks_exact(16)
            .map(|entry| PageRun { first: number(&entry[..8]), count: number(&entry[8..]) })
            .collect();
        let zero = data.split_off(header.data_runs as usize);
        let pages = PageCount(header.pages);
        PageRun::check(&data, pages)?;
        PageRun::check(&zero, pages)?;
        Ok(Self { file, pages, data, zero, digest: header.layer_digest(), data_digest: header.data_digest })
    }

    /// The file, for mapping and reading.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Gives the index up and keeps the file.
    pub fn into_file(self) -> File {
        self.file
    }

    /// How many pages the layer describes, stored or not.
    pub fn pages(&self) -> PageCount {
        self.pages
    }

    /// The runs that are stored.
    pub fn data(&self) -> &[PageRun] {
        &self.data
    }

    /// The runs that are zero here although the parent's are not.
    pub fn zero(&self) -> &[PageRun] {
        &self.zero
    }

    /// The digest that the header claims.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Refuses a layer of another size than `expected`.
    pub fn expect_pages(&self, expected: PageCount) -> Result<(), LayerError> {
        if self.pages == expected {
            Ok(())
        } else {
            Err(LayerError::Size { found: self.pages.0, expected: expected.0 })
        }
    }

    /// Reads every stored byte and compares with the recorded digest, and makes sure that there is nothing
    /// else; `progress` hears of each piece read, in bytes.
    pub fn verify(&self, mut progress: impl FnMut(u64)) -> Result<(), LayerError> {
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; 1 << 20];
        for run in &self.data {
            let mut offset = run.offset();
            let end = offset + run.bytes();
            while offset < end {
                let piece = buffer.len().min((end - offset) as usize);
                self.file.read_exact_at(&mut buffer[..piece], DATA_OFFSET + offset).map_err(io_error("read"))?;
                hasher.update(&buffer[..piece]);
                offset += piece as u64;
                progress(piece as u64);
            }
        }
        let found = *hasher.finalize().as_bytes();
        if found != self.data_digest {
            let recorded = Digest::from_bytes(self.data_digest);
            return Err(LayerError::Contents { found: Digest::from_bytes(found), recorded });
        }
        self.verify_rest(&mut buffer)
    }

    /// Makes sure that header, stored runs and index are all there is.
    fn verify_rest(&self, buffer: &mut [u8]) -> Result<(), LayerError> {
        let index = DATA_OFFSET + self.pages.bytes();
        let expected = index + 16 * (self.data.len() + self.zero.len()) as u64;
        let found = self.file.metadata().map_err(io_error("measure"))?.len();
        if found != expected {
            return Err(LayerError::Length { found, expected });
        }
        let starts = self.data.iter().map(|run| DATA_OFFSET + run.offset()).chain([index]);
        let ends = self.data.iter().map(|run| DATA_OFFSET + run.offset() + run.bytes());
        for (end, start) in [HEADER_LEN as u64].into_iter().chain(ends).zip(starts) {
            if let Some(offset) = self.first_data(end, start, buffer).map_err(io_error("read"))? {
                return Err(LayerError::Stray { offset });
            }
        }
        Ok(())
    }

    /// Where the first byte that is not zero lies between `at` and `end`; holes are not read.
    fn first_data(&self, mut at: u64, end: u64, buffer: &mut [u8]) -> io::Result<Option<u64>> {
        while at < end {
            at = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
                Ok(data) => data,
                Err(Errno::NXIO) => end,
                // A file system without holes.
                Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
                Err(error) => return Err(error.into()),
            };
            let piece = end.saturating_sub(at).min(buffer.len() as u64) as usize;
            self.file.read_exact_at(&mut buffer[..piece], at)?;
            if let Some(first) = buffer[..piece].iter().position(|byte| *byte != 0) {
                return Ok(Some(at + first as u64));
            }
            at += piece as u64;
        }
        Ok(None)
    }
}

/// Opens the layer at `path`, reads all of it, and returns its digest if every part is sound.
pub fn verify(path: &std::path::Path, progress: impl FnMut(u64)) -> Result<Digest, LayerError> {
    let layer = Layer::open(File::open(path).map_err(io_error("open"))?)?;
    layer.verify(progress)?;
    Ok(layer.digest())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use std::os::unix::fs::MetadataExt;

    fn page(fill: u8) -> Vec<u8> {
        vec![fill; PAGE_SIZE as usize]
    }

    fn write(pages: u64, stored: &BTreeMap<u64, u8>) -> (File, LayerSummary) {
        let file = tempfile::tempfile().expect("scratch");
        let mut writer = LayerWriter::new(file.try_clone().expect("dup"), PageCount(pages)).expect("begin");
        for (&first, &fill) in stored {
            writer.store(first, &page(fill)).expect("store");
        }
        (file, writer.finish().expect("finish"))
    }

    proptest! {
        #[test]
        fn what_is_stored_is_read_back(stored in prop::collection::btree_map(0u64..500, 1u8.., 0..40)) {
            let (file, summary) = write(500, &stored);
            let layer = Layer::open(file).expect("open");
            layer.verify(|_| ()).expect("verify");
            prop_assert_eq!(layer.digest(), summary.digest);
            prop_assert_eq!(summary.pages.0, stored.len() as u64);
            let mut read = page(0);
            for number in 0..500 {
                layer.file().read_exact_at(&mut read, DATA_OFFSET + number * PAGE_SIZE).expect("read");
                prop_assert_eq!(&read, &page(stored.get(&number).copied().unwrap_or(0)));
            }
        }

        #[test]
        fn a_flipped_bit_anywhere_is_noticed(
            stored in prop::collection::btree_map(0u64..50, 1u8.., 1..10), at: prop::sample::Index, bit in 0u8..8
        ) {
            let (file, summary) = write(50, &stored);
            let end = file.metadata().expect("stat").len();
            let mut places: Vec<u64> = (0..HEADER_LEN as u64).chain(DATA_OFFSET + 50 * PAGE_SIZE..end).collect();
            // Pages that are stored, those that are not, and what is no page.
            places.extend((0..50).map(|page| DATA_OFFSET + page * PAGE_SIZE + 77));
            places.extend([HEADER_LEN as u64, 4095, 4096, DATA_OFFSET - 1, end]);
            let place = places[at.index(places.len())];
            let mut byte = [0];
            file.read_at(&mut byte, place).expect("read");
            file.write_all_at(&[byte[0] ^ (1 << bit)], place).expect("write");
            let outcome = Layer::open(file).and_then(|layer| layer.verify(|_| ()).map(|()| layer.digest()));
            prop_assert!(!matches!(outcome, Ok(digest) if digest == summary.digest), "bit {bit} at {place} went unnoticed");
        }

        #[test]
        fn any_bytes_are_opened_without_panic(bytes: Vec<u8>) {
            let file = tempfile::tempfile().expect("scratch");
            file.write_all_at(&bytes, 0).expect("write");
            let _ = Layer::open(file);
        }
    }

    #[test]
    fn pages_that_are_not_stored_take_no_space() {
        let (file, _) = write(1 << 18, &BTreeMap::from([(0, 1), (1 << 17, 2)]));
        let used = file.metadata().expect("stat").blocks() * 512;
        assert!(used < 1 << 20, "1 GiB with two pages stored occupies {used} bytes");
    }

    #[test]
    fn the_same_contents_have_the_same_digest_and_other_contents_another() {
        let one = BTreeMap::from([(3, 7), (4, 8)]);
        assert_eq!(write(10, &one).1.digest, write(10, &one).1.digest);
        for other in [BTreeMap::from([(3, 7), (4, 9)]), BTreeMap::from([(3, 7), (5, 8)]), BTreeMap::from([(3, 7)])] {
            assert_ne!(write(10, &one).1.digest, write(10, &other).1.digest);
        }
        assert_ne!(write(10, &one).1.digest, write(11, &one).1.digest);
    }

    #[test]
    fn overlapping_runs_are_refused() {
        let mut writer = LayerWriter::new(tempfile::tempfile().expect("scratch"), PageCount(9)).expect("begin");
        writer.store(5, &page(1)).expect("store");
        writer.store(4, &page(1)).expect("store");
        assert!(matches!(writer.finish(), Err(LayerError::Runs(_))));
    }
}
