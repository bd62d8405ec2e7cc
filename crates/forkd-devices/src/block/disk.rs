//! The bytes of one disk: base file, sealed layers, private overlay.
//!
//! ```text
//!   overlay   private, sparse, block n at n × 4096        writes go here
//!   layer k   shared, immutable                            ▲ newest
//!   …                                                      │ reads take the newest source
//!   layer 0   shared, immutable                            │ that holds the block
//!   base      shared, immutable, raw                       ▼ oldest
//! ```
//!
//! A disk that several machines share has a base and nothing else, and cannot be written.
//!
//! Flushes reach no disk: an overlay is scratch space whose index lives in this process, so it is
//! lost with the process whether or not its pages were written out. Durability begins with a
//! snapshot, which syncs what it writes.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use forkd_types::{ByteSize, PAGE_SIZE, PageCount, PageRun, PageRunError};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};

use super::budget::Budget;
use super::index::{BlockIndex, Source};
use super::layer::SealedLayer;
use crate::guest_buffers::{GuestBuffers, WriteFrom};

/// The unit in which a driver addresses a disk.
pub(super) const SECTOR: u64 = 512;

/// Why a disk cannot be made or a range of it cannot be accessed.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The size is not a whole number of sectors, or zero.
    #[error("a disk of {size} bytes was asked for; the size must be a positive multiple of {SECTOR}")]
    Size {
        /// The size asked for.
        size: u64,
    },
    /// The runs of a layer are not in order, or go past the end of the disk.
    #[error("the block runs of a layer do not fit the disk")]
    Layer {
        /// What is wrong with the runs.
        source: PageRunError,
    },
    /// The overlay holds blocks, which a copy must not share.
    #[error("a copy of a disk was asked for while its overlay holds blocks; seal it first")]
    Unsealed,
    /// A disk that cannot be written was to be.
    #[error("a write of {len} bytes at {offset} was tried on a disk that is shared and read-only")]
    ReadOnly {
        /// Start of the range.
        offset: u64,
        /// Its length.
        len: u64,
    },
    /// The machine may hold no more blocks.
    #[error("writing {len} bytes at {offset} would take more than the {limit} that the machine's disks may grow by")]
    OverBudget {
        /// Start of the range.
        offset: u64,
        /// Its length.
        len: u64,
        /// How much there is room for in all.
        limit: ByteSize,
    },
    /// A range does not lie on the disk.
    #[error("{len} bytes at {offset} do not lie on a disk of {size} bytes")]
    OutOfBounds {
        /// Start of the range.
        offset: u64,
        /// Its length.
        len: u64,
        /// The size of the disk.
        size: u64,
    },
    /// A file of the disk could not be read or written.
    #[error("{action} {len} bytes at offset {offset} of the disk's {file} failed")]
    File {
        /// What was tried.
        action: &'static str,
        /// Which file.
        file: &'static str,
        /// Offset in the file.
        offset: u64,
        /// Number of bytes.
        len: u64,
        /// The system's answer.
        source: io::Error,
    },
}

impl DiskError {
    /// Whether the host has no room for the overlay, or gives none.
    pub fn is_out_of_space(&self) -> bool {
        match self {
            Self::File { source, .. } => {
                matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
            }
            Self::OverBudget { .. } => true,
            _ => false,
        }
    }
}

/// The immutable part of a disk, with its index built: what a zygote holds ready. Clones share all.
#[derive(Clone, Debug)]
pub struct DiskImage {
    base: Arc<File>,
    size: u64,
    layers: Vec<Arc<SealedLayer>>,
    index: BlockIndex,
    origin: Origin,
    read_only: bool,
}

/// Where a disk began: the layers it was put together from, and its index then.
#[derive(Clone, Debug)]
struct Origin {
    layers: usize,
    index: BlockIndex,
}

impl DiskImage {
    /// A disk of `size` bytes: `base` (zeros past its end) under `layers`, oldest first, which are the
    /// disk's [`origin`](Self::origin).
    ///
    /// # Errors
    /// The size is not a whole number of sectors, or a layer goes past it.
    pub fn new(base: File, size: u64, layers: Vec<Arc<SealedLayer>>) -> Result<Self, DiskError> {
        if size == 0 || !size.is_multiple_of(SECTOR) {
            return Err(DiskError::Size { size });
        }
        let blocks = PageCount::covering(size);
        let mut index = BlockIndex::new(blocks.0);
        for (number, layer) in layers.iter().enumerate() {
            PageRun::check(&layer.runs(), blocks).map_err(|source| DiskError::Layer { source })?;
            let own = Source::layer(number);
            layer.for_each_run(|run, zeros| index.set(run, if zeros { Source::ZERO } else { own }));
        }
        let origin = Origin { layers: layers.len(), index: index.clone() };
        Ok(Self { base: Arc::new(base), size, layers, index, origin, read_only: false })
    }

    /// A disk of `size` bytes that cannot be written: `base` (zeros past its end) and nothing over it.
    ///
    /// # Errors
    /// The size is not a whole number of sectors.
    pub fn shared(base: File, size: u64) -> Result<Self, DiskError> {
        Ok(Self { read_only: true, ..Self::new(base, size, Vec::new())? })
    }

    /// A disk that writes to `overlay`, which must be empty.
    pub fn with_overlay(self, overlay: File) -> BlockDisk {
        BlockDisk { image: self, overlay: Some(overlay), overlay_dirty: false, budget: None }
    }

    /// A disk that writes nowhere, because it cannot be written.
    pub fn without_overlay(self) -> BlockDisk {
        BlockDisk { image: Self { read_only: true, ..self }, overlay: None, overlay_dirty: false, budget: None }
    }

    /// Whether disks over this image cannot be written, and need no overlay.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Logical size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The layers, oldest first.
    pub fn layers(&self) -> &[Arc<SealedLayer>] {
        &self.layers
    }

    /// The descriptors of base and layers, to keep open across a fork.
    pub fn raw_fds(&self) -> Vec<RawFd> {
        std::iter::once(self.base.as_raw_fd()).chain(self.layers.iter().map(|layer| layer.raw_fd())).collect()
    }

    /// This disk as it was put together, without what was sealed since.
    pub fn origin(&self) -> Self {
        let layers = self.layers[..self.origin.layers].to_vec();
        Self {
            base: Arc::clone(&self.base),
            size: self.size,
            layers,
            index: self.origin.index.clone(),
            origin: self.origin.clone(),
            read_only: self.read_only,
        }
    }

    /// This disk without any layers.
    pub fn bare(&self) -> Self {
        let index = BlockIndex::new(PageCount::covering(self.size).0);
        let origin = Origin { layers: 0, index: index.clone() };
        let (base, size, read_only) = (Arc::clone(&self.base), self.size, self.read_only);
        Self { base, size, layers: Vec::new(), index, origin, read_only }
    }

    /// The blocks that may differ from `below`, which is this disk's [`origin`](Self::origin) or
    /// [`bare`](Self::bare): those that were written or discarded over it, to whatever contents.
    pub fn runs_over(&self, below: &Self) -> Vec<PageRun> {
        self.index.differing(&below.index)
    }

    /// Reads whole blocks from block `first` on; bytes past the end of the disk are zeros.
    ///
    /// # Errors
    /// A block is past the end, or a file cannot be read.
    pub fn read_blocks(&self, first: u64, content: &mut [u8]) -> Result<(), DiskError> {
        let offset = first.saturating_mul(PAGE_SIZE);
        let wanted = content.len() as u64;
        let len = self.size.saturating_sub(offset).min(wanted);
        if len == 0 || wanted.next_multiple_of(PAGE_SIZE) > len.next_multiple_of(PAGE_SIZE) {
            return Err(DiskError::OutOfBounds { offset, len: wanted, size: self.size });
        }
        content[len as usize..].fill(0);
        self.read(None, offset, GuestBuffers::from_host(&mut content[..len as usize]))
    }

    /// Reads from the layers and, for blocks that no layer has, from `overlay`.
    fn read(&self, overlay: Option<&File>, offset: u64, mut buffers: GuestBuffers<'_>) -> Result<(), DiskError> {
        check(self.size, offset, buffers.len() as u64)?;
        let mut position = offset;
        while !buffers.is_empty() {
            let block = position / PAGE_SIZE;
            let inside = position % PAGE_SIZE;
            let blocks = PageCount::covering(inside + buffers.len() as u64).0;
            let (source, same) = self.index.run_at(block, blocks);
            let (file, place, count) = self.place(overlay, source, block, same);
            let part = buffers.split_front((count * PAGE_SIZE - inside) as usize);
            let len = part.len() as u64;
            match file {
                Some(file) => read_part(file, place + inside, part)?,
                None => part.fill_zero(),
            }
            position += len;
        }
        Ok(())
    }

    /// The file (`None` for zeros) and the offset in it of `block`, and for how many of `limit`
    /// blocks that goes on.
    fn place<'d>(
        &'d self,
        overlay: Option<&'d File>,
        source: Source,
        block: u64,
        limit: u64,
    ) -> (Option<DiskFile<'d>>, u64, u64) {
        if source == Source::ZERO {
            return (None, 0, limit);
        }
        let Some(number) = source.layer_number() else {
            return (Some(DiskFile::Base(&self.base)), block * PAGE_SIZE, limit);
        };
        match self.layers.get(number) {
            None => {
                let overlay = overlay.expect("an image's index names only its layers");
                (Some(DiskFile::Overlay(overlay)), block * PAGE_SIZE, limit)
            }
            Some(layer) => {
                let (place, count) =
                    layer.locate(block, limit).expect("the index names a layer only for blocks the layer holds");
                (Some(DiskFile::Layer(layer.file())), place, count)
            }
        }
    }
}

/// Refuses a range that does not lie on a disk of `size` bytes.
fn check(size: u64, offset: u64, len: u64) -> Result<(), DiskError> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(DiskError::OutOfBounds { offset, len, size }),
    }
}

/// One disk of one machine.
#[derive(Debug)]
pub struct BlockDisk {
    image: DiskImage,
    /// None where it cannot be written.
    overlay: Option<File>,
    /// Whether the index changed since the overlay was put on.
    overlay_dirty: bool,
    /// What its overlays may grow to, those that were sealed too.
    budget: Option<Arc<Budget>>,
}

impl BlockDisk {
    /// A disk of `size` bytes over `base` (raw, read only; zeros past its end) and `layers` (oldest
    /// first). `overlay` must be empty and private to this disk.
    ///
    /// # Errors
    /// The size is not a whole number of sectors, or a layer goes past it.
    pub fn new(base: File, size: u64, layers: Vec<Arc<SealedLayer>>, overlay: File) -> Result<Self, DiskError> {
        Ok(DiskImage::new(base, size, layers)?.with_overlay(overlay))
    }

    /// Lets it grow no further than `budget`, from which it takes the blocks of every write from now on.
    pub fn limit_to(&mut self, budget: Arc<Budget>) {
        self.budget = Some(budget);
    }

    /// Logical size in bytes.
    pub fn size(&self) -> u64 {
        self.image.size
    }

    /// The sealed layers, oldest first.
    pub fn layers(&self) -> &[Arc<SealedLayer>] {
        &self.image.layers
    }

    /// The descriptors of base and layers, to keep open across a fork.
    pub fn raw_fds(&self) -> Vec<RawFd> {
        self.image.raw_fds()
    }

    /// Makes the overlay an immutable layer and goes on with `fresh_overlay`, which must be empty.
    ///
    /// An overlay that nothing was written to adds no layer, so branching an idle disk again and
    /// again does not deepen it.
    ///
    /// # Panics
    /// The disk [cannot be written](Self::is_read_only).
    pub fn seal(&mut self, fresh_overlay: File) -> Arc<SealedLayer> {
        let overlay = self.overlay.replace(fresh_overlay).expect("only a disk that can be written is sealed");
        let layer = Arc::new(SealedLayer::overlay(overlay, self.image.index.clone(), self.overlay_source()));
        if std::mem::take(&mut self.overlay_dirty) {
            self.image.layers.push(Arc::clone(&layer));
        }
        layer
    }

    /// Whether it cannot be written.
    pub fn is_read_only(&self) -> bool {
        self.image.read_only
    }

    /// The immutable part of this disk, to make copies from.
    ///
    /// # Errors
    /// The disk was written since it was sealed last.
    pub fn image(&self) -> Result<DiskImage, DiskError> {
        if self.overlay_dirty { Err(DiskError::Unsealed) } else { Ok(self.image.clone()) }
    }

    /// Reads `bytes.len()` bytes at `offset`.
    ///
    /// # Errors
    /// The range is not on the disk, or a file cannot be read.
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<(), DiskError> {
        self.read_buffers(offset, GuestBuffers::from_host(bytes))
    }

    /// Writes `bytes` at `offset`.
    ///
    /// # Errors
    /// The range is not on the disk, or the overlay cannot be written; earlier blocks of the range
    /// may have been written then.
    pub fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        let mut content = WriteFrom::default();
        content.push_bytes(bytes);
        self.write(offset, content)
    }

    /// Reads into guest memory.
    ///
    /// # Errors
    /// As [`read_at`](Self::read_at).
    pub fn read_buffers(&self, offset: u64, buffers: GuestBuffers<'_>) -> Result<(), DiskError> {
        self.image.read(self.overlay.as_ref(), offset, buffers)
    }

    /// Writes from guest memory.
    ///
    /// # Errors
    /// As [`write_at`](Self::write_at).
    pub fn write_buffers(&mut self, offset: u64, buffers: &GuestBuffers<'_>) -> Result<(), DiskError> {
        let mut content = WriteFrom::default();
        content.push_buffers(buffers);
        self.write(offset, content)
    }

    /// Gives the whole blocks of a range up; they read as zeros. Blocks that the range only touches
    /// keep their content.
    ///
    /// # Errors
    /// The range is not on the disk.
    pub fn discard(&mut self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.check(offset, len)?;
        self.writable(offset, len)?;
        if let Some(run) = self.whole_blocks(offset, len) {
            self.zero_blocks(run);
        }
        Ok(())
    }

    /// Makes a range read as zeros, to the byte.
    ///
    /// # Errors
    /// The range is not on the disk, or the overlay cannot be written.
    pub fn write_zeroes(&mut self, offset: u64, len: u64) -> Result<(), DiskError> {
        const ZEROS: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];
        self.check(offset, len)?;
        self.writable(offset, len)?;
        let end = offset + len;
        let (whole_start, whole_end) = match self.whole_blocks(offset, len) {
            Some(run) => {
                self.zero_blocks(run);
                (run.offset(), (run.offset() + run.bytes()).min(end))
            }
            None => (end, end),
        };
        for (start, stop) in [(offset, whole_start), (whole_end, end)] {
            let mut position = start;
            while position < stop {
                let count = (PAGE_SIZE - position % PAGE_SIZE).min(stop - position);
                self.write_at(position, &ZEROS[..count as usize])?;
                position += count;
            }
        }
        Ok(())
    }

    /// Completes earlier writes. See the module header for why this costs nothing.
    pub fn flush(&self) {}

    fn overlay_source(&self) -> Source {
        Source::layer(self.image.layers.len())
    }

    pub(super) fn check(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        check(self.image.size, offset, len)
    }

    /// Where writes to a range go, if they may.
    fn writable(&self, offset: u64, len: u64) -> Result<&File, DiskError> {
        self.overlay.as_ref().ok_or(DiskError::ReadOnly { offset, len })
    }

    /// The blocks that lie wholly in the range; a block cut short by the end of the disk counts.
    fn whole_blocks(&self, offset: u64, len: u64) -> Option<PageRun> {
        let end = offset + len;
        let first = offset.div_ceil(PAGE_SIZE);
        let stop = if end == self.image.size { end.div_ceil(PAGE_SIZE) } else { end / PAGE_SIZE };
        (first < stop).then(|| PageRun { first, count: stop - first })
    }

    /// Writes `content` as whole blocks: what a partial first or last block had beside it is copied up
    /// in the same call.
    fn write(&mut self, offset: u64, content: WriteFrom<'_>) -> Result<(), DiskError> {
        let len = content.len() as u64;
        self.check(offset, len)?;
        let overlay = self.writable(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let end = offset + len;
        let run = PageRun { first: offset / PAGE_SIZE, count: end.div_ceil(PAGE_SIZE) - offset / PAGE_SIZE };
        let last = run.end() - 1;
        let mut start = offset;
        let (mut before, mut after) = ([0; PAGE_SIZE as usize], [0; PAGE_SIZE as usize]);
        let (mut head, mut tail) = (0, 0);
        if !offset.is_multiple_of(PAGE_SIZE) && self.needs_copy_up(run.first) {
            self.read_block(run.first, &mut before)?;
            head = (offset % PAGE_SIZE) as usize;
            start = run.offset();
        }
        if !end.is_multiple_of(PAGE_SIZE) && self.needs_copy_up(last) {
            self.read_block(last, &mut after)?;
            tail = (end % PAGE_SIZE) as usize;
        }
        let mut pieces = WriteFrom::default();
        pieces.push_bytes(&before[..head]);
        pieces.append(content);
        if tail > 0 {
            pieces.push_bytes(&after[tail..]);
        }
        self.take_room(run).map_err(|limit| DiskError::OverBudget { offset, len, limit })?;
        pieces.write_to_file(overlay, start).map_err(|source| DiskError::File {
            action: "writing",
            file: "overlay",
            offset: start,
            len,
            source,
        })?;
        let own = self.overlay_source();
        if self.image.index.run_at(run.first, run.count) != (own, run.count) {
            self.image.index.set(run, own);
            self.overlay_dirty = true;
        }
        Ok(())
    }

    /// Reads block `block`, which is on the disk; bytes past the end of the disk are zeros.
    fn read_block(&self, block: u64, content: &mut [u8; PAGE_SIZE as usize]) -> Result<(), DiskError> {
        let len = (self.image.size - block * PAGE_SIZE).min(PAGE_SIZE) as usize;
        content[len..].fill(0);
        self.read_at(block * PAGE_SIZE, &mut content[..len])
    }

    /// Takes room for the blocks of `run` that the overlay does not hold yet; the error is how much there is in all.
    fn take_room(&self, run: PageRun) -> Result<(), ByteSize> {
        let Some(budget) = &self.budget else { return Ok(()) };
        let (mut block, mut fresh) = (run.first, 0);
        while block < run.end() {
            let (source, count) = self.image.index.run_at(block, run.end() - block);
            if source != self.overlay_source() {
                fresh += count;
            }
            block += count;
        }
        if budget.take(fresh) { Ok(()) } else { Err(budget.size()) }
    }

    fn needs_copy_up(&self, block: u64) -> bool {
        self.image.index.get(block) != self.overlay_source()
    }

    fn zero_blocks(&mut self, run: PageRun) {
        let mut block = run.first;
        while block < run.end() {
            let (source, count) = self.image.index.run_at(block, run.end() - block);
            let part = PageRun { first: block, count };
            if let Some(overlay) = self.overlay.as_ref().filter(|_| source == self.overlay_source()) {
                // Where the file system cannot punch holes the space is lost, not the zeros.
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                let _ = fallocate(overlay, flags, part.offset(), part.bytes());
                if let Some(budget) = &self.budget {
                    budget.give_back(count);
                }
            }
            // Free space of a sparse base is zeros already; noting it would make every fstrim a change.
            let unchanged = source == Source::ZERO || source == Source::BASE && self.base_is_hole(part);
            if !unchanged {
                self.image.index.set(part, Source::ZERO);
                self.overlay_dirty = true;
            }
            block += count;
        }
    }

    /// Whether the base holds no data in `run`. Moves the file position, which nothing uses.
    fn base_is_hole(&self, run: PageRun) -> bool {
        match seek(&*self.image.base, SeekFrom::Data(run.offset())) {
            Ok(data) => data >= run.offset() + run.bytes(),
            Err(error) => error == rustix::io::Errno::NXIO,
        }
    }
}

/// A file of a disk, and what its end means.
#[derive(Clone, Copy)]
enum DiskFile<'d> {
    Base(&'d File),
    Layer(&'d File),
    Overlay(&'d File),
}

fn read_part(file: DiskFile<'_>, offset: u64, mut part: GuestBuffers<'_>) -> Result<(), DiskError> {
    let (name, file, zeros_past_end) = match file {
        DiskFile::Base(file) => ("base", file, true),
        DiskFile::Layer(file) => ("layer", file, false),
        DiskFile::Overlay(file) => ("overlay", file, false),
    };
    let len = part.len() as u64;
    let failed = |source| DiskError::File { action: "reading", file: name, offset, len, source };
    let done = part.read_from_file(file, offset).map_err(failed)?;
    let _ = part.split_front(done);
    if !part.is_empty() {
        if !zeros_past_end {
            return Err(failed(io::ErrorKind::UnexpectedEof.into()));
        }
        part.fill_zero();
    }
    Ok(())
}
