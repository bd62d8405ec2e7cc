//! The private mapping that is a guest's memory.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::RawFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use forkd_types::{PAGE_SIZE, PageCount, PageRun};
use rustix::fs::MemfdFlags;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use std::os::unix::fs::FileExt;
use vm_memory::mmap::{GuestRegionMmap, MmapRegionBuilder};
use vm_memory::{GuestAddress, GuestRegionCollection};

use crate::GuestMemory;
use crate::areas::{self, Area, Source};
use crate::chain::{Held, LayerChain, union};
use crate::layer::{DATA_OFFSET, Layer, LayerError};
use crate::layout::{GRANULE, MemoryLayout};
use crate::page_map::{self, PageMap};

/// Bytes that are read from a layer in one call.
const COPIED_AT_ONCE: u64 = 1 << 20;

/// How guest memory is backed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Backing {
    /// The layers' files, mapped privately: nothing is copied and forks share the page cache.
    #[default]
    File,
    /// Copied once into memory that the kernel may back with 2 MiB pages (`MADV_HUGEPAGE`).
    TransparentHugePages,
    /// Copied once into pages of the reserved 2 MiB pool (`MAP_HUGETLB`).
    ReservedHugePages,
}

/// Why guest memory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// The kernel refused the mapping.
    #[error("cannot map {bytes} bytes of guest memory")]
    Map {
        /// How much was asked for.
        bytes: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// A layer cannot be used.
    #[error("memory layer {index} cannot be used")]
    Layer {
        /// Position, base first.
        index: usize,
        /// Why.
        source: LayerError,
    },
    /// A snapshot without layers.
    #[error("no memory layer was given")]
    NoLayers,
    /// A layer of this memory cannot be written.
    #[error("cannot write guest memory as a layer")]
    Write {
        /// Why.
        source: LayerError,
    },
    /// Pages could not be read from a layer or the page tables.
    #[error("cannot {attempt}")]
    Io {
        /// What was attempted.
        attempt: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// Too few free pages in the reserved pool.
    #[error(
        "{needed} free 2 MiB pages are needed and {free} are reserved and free; reserve more with \
         `sysctl vm.nr_hugepages={}` (what copies write comes from there too)",
        2 * needed
    )]
    PoolTooSmall {
        /// Pages that this guest needs.
        needed: u64,
        /// Pages that are free.
        free: u64,
    },
}

/// The memory of one guest: a private mapping that lives as long as the process.
///
/// It is never unmapped. A monitor has exactly one, its virtual machine and its devices hold
/// addresses into it, and `fork(2)` copies it; giving it an end would buy nothing and cost a proof
/// that nobody uses it any more.
#[derive(Debug, Clone)]
pub struct GuestRam {
    layout: MemoryLayout,
    base: NonNull<u8>,
    memory: GuestMemory,
    chain: LayerChain,
    /// Runs whose contents were copied in, so that nothing is mapped there; none where layers are mapped.
    copied: Arc<[PageRun]>,
}

// SAFETY: `base` is the start of a mapping that lives as long as the process and is only reached
// through volatile accesses (`GuestMemory`) or from a process in which no vCPU runs (`contents`).
unsafe impl Send for GuestRam {}
// SAFETY: as above; no public method hands out references into the mapping.
unsafe impl Sync for GuestRam {}

impl GuestRam {
    /// Zeroed memory for a machine that boots.
    pub fn anonymous(layout: MemoryLayout) -> Result<Self, RamError> {
        let base = reserve(layout.bytes())?;
        Self::assemble(layout, base, LayerChain::none(), Vec::new())
    }

    /// The memory that `layers` describe, base first. Their files stay open, for [`write_changes`].
    ///
    /// [`write_changes`]: Self::write_changes
    pub fn from_layers(
        layout: MemoryLayout,
        layers: impl Into<Arc<[Layer]>>,
        backing: Backing,
    ) -> Result<Self, RamError> {
        let chain = LayerChain::new(layers.into(), layout.pages())?;
        let base_layer = chain.layers().first().ok_or(RamError::NoLayers)?;
        let bytes = layout.bytes();
        let (base, copied) = match backing {
            Backing::File => {
                let base = reserve(bytes)?;
                map_file(base, base_layer, PageRun { first: 0, count: layout.pages().0 })?;
                map_upper(base, &chain, layout.pages())?;
                (base, Vec::new())
            }
            Backing::TransparentHugePages => {
                let base = reserve(bytes)?;
                advise(base, bytes, libc::MADV_HUGEPAGE)?;
                (base, copy_all(base, &chain)?)
            }
            Backing::ReservedHugePages => {
                let base = reserve_huge(bytes)?;
                (base, copy_all(base, &chain)?)
            }
        };
        Self::assemble(layout, base, chain, copied)
    }

    fn assemble(
        layout: MemoryLayout,
        base: NonNull<u8>,
        chain: LayerChain,
        copied: Vec<PageRun>,
    ) -> Result<Self, RamError> {
        let regions = layout.regions().map(|region| {
            // SAFETY: the range lies within the mapping made for `layout`, which is never unmapped.
            let mapping = unsafe {
                MmapRegionBuilder::new(region.bytes as usize)
                    .with_raw_mmap_pointer(base.as_ptr().add(region.offset as usize))
                    .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                    .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
            }
            .build()
            .expect("a page-aligned range of a live mapping");
            GuestRegionMmap::new(mapping, GuestAddress(region.guest_address)).expect("regions end below 2⁶⁴")
        });
        let memory = GuestRegionCollection::from_regions(regions.collect())
            .expect("the layout's regions ascend and are disjoint");
        Ok(Self { layout, base, memory, chain, copied: copied.into() })
    }

    /// Size and place of the memory.
    pub fn layout(&self) -> MemoryLayout {
        self.layout
    }

    /// The memory as devices and boot code use it.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The descriptors of the layers this memory was made from, to keep open across a fork.
    pub fn raw_fds(&self) -> Vec<RawFd> {
        self.chain.raw_fds().collect()
    }

    pub(crate) fn base(&self) -> *const u8 {
        self.base.as_ptr()
    }

    pub(crate) fn chain(&self) -> &LayerChain {
        &self.chain
    }

    pub(crate) fn copied(&self) -> &[PageRun] {
        &self.copied
    }

    /// Which pages are present and which are private, as runs in mapping order.
    pub fn page_map(&self) -> Result<PageMap, RamError> {
        page_map::read(self.base.as_ptr() as usize, self.layout.pages().0)
            .map_err(|source| RamError::Io { attempt: "read /proc/self/pagemap", source })
    }

    /// Gives the pages that lie wholly in `guest_address .. + bytes` back to the host.
    ///
    /// A guest that reports pages as free expects no contents of them. They become what the layers say, or
    /// zero where those were copied in; what that means for a layer says [`contents`](crate::contents).
    ///
    /// A range that is not RAM is ignored.
    pub fn release(&self, guest_address: u64, bytes: u64) {
        let Some(offset) = self.layout.offset_of(guest_address, bytes) else { return };
        let first = offset.next_multiple_of(PAGE_SIZE);
        let end = (offset + bytes) / PAGE_SIZE * PAGE_SIZE;
        if first < end {
            // SAFETY: the range lies within the mapping. Contents of released pages are the guest's
            // to lose; nothing in this process holds references into guest memory.
            let address = unsafe { self.base.as_ptr().add(first as usize) };
            // A refusal (locked or huge pages) leaves the pages where they are: nothing is lost.
            // SAFETY: as above.
            let _ = unsafe { rustix::mm::madvise(address.cast(), (end - first) as usize, Advice::LinuxDontNeed) };
        }
    }

    /// Asks the kernel to read `runs` of the backing file ahead; a hint, so failures are ignored.
    pub fn prefetch(&self, runs: &[PageRun]) {
        for run in runs.iter().filter(|run| run.end() <= self.layout.pages().0) {
            // SAFETY: the range lies within the mapping; the advice changes no contents.
            let _ = unsafe {
                let address = self.base.as_ptr().add(run.offset() as usize);
                rustix::mm::madvise(address.cast(), run.bytes() as usize, Advice::WillNeed)
            };
        }
    }
}

fn map_error(bytes: u64) -> impl FnOnce(rustix::io::Errno) -> RamError {
    move |error| RamError::Map { bytes, source: error.into() }
}

/// Maps `bytes` of zeroed private memory, aligned to a huge page.
fn reserve(bytes: u64) -> Result<NonNull<u8>, RamError> {
    let padded = (bytes + GRANULE) as usize;
    // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches nothing.
    let start = unsafe {
        rustix::mm::mmap_anonymous(
            ptr::null_mut(),
            padded,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )
    }
    .map_err(map_error(bytes))?;
    let address = start as usize;
    let aligned = address.next_multiple_of(GRANULE as usize);
    let tail = aligned + bytes as usize;
    for (from, to) in [(address, aligned), (tail, address + padded)] {
        if from < to {
            // SAFETY: the padding on either side of the aligned range was mapped just above and
            // nobody knows of it.
            let _ = unsafe { rustix::mm::munmap(from as *mut c_void, to - from) };
        }
    }
    Ok(NonNull::new(aligned as *mut u8).expect("a mapping is never at address 0"))
}

/// Maps `bytes` from the reserved pool of 2 MiB pages.
///
/// Pages are taken when they are first written, not set aside now: what is set aside only this process could
/// use, not the copies forked from it, and a copy that writes while the pool has nothing free is ended by SIGBUS.
fn reserve_huge(bytes: u64) -> Result<NonNull<u8>, RamError> {
    let needed = bytes / GRANULE;
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0);
    if free < needed {
        return Err(RamError::PoolTooSmall { needed, free });
    }
    // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches nothing.
    let start = unsafe {
        rustix::mm::mmap_anonymous(
            ptr::null_mut(),
            bytes as usize,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::HUGETLB | MapFlags::HUGE_2MB,
        )
    }
    .map_err(map_error(bytes))?;
    Ok(NonNull::new(start.cast()).expect("a mapping is never at address 0"))
}

fn advise(base: NonNull<u8>, bytes: u64, advice: libc::c_int) -> Result<(), RamError> {
    // SAFETY: the range is one mapping that was just made; the advice changes no contents.
    if unsafe { libc::madvise(base.as_ptr().cast(), bytes as usize, advice) } != 0 {
        return Err(RamError::Io { attempt: "advise the kernel about huge pages", source: io::Error::last_os_error() });
    }
    Ok(())
}

/// Maps `run` of `layer` privately over the guest memory at `base`.
fn map_file(base: NonNull<u8>, layer: &Layer, run: PageRun) -> Result<(), RamError> {
    map(base, layer.file(), run, DATA_OFFSET + run.offset())
}

/// Maps what `file` has from `offset` on privately over `run` of the guest memory at `base`.
fn map(base: NonNull<u8>, file: &File, run: PageRun, offset: u64) -> Result<(), RamError> {
    let length = NonZeroUsize::new(run.bytes() as usize).expect("runs are not empty");
    // SAFETY: runs lie within the mapping at `base` (layers have its size, checked by the caller), so the
    // fixed range replaces only pages of that mapping, to which nobody holds references.
    unsafe {
        rustix::mm::mmap(
            base.as_ptr().add(run.offset() as usize).cast(),
            length.get(),
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED,
            file,
            offset,
        )
    }
    .map(drop)
    .map_err(map_error(run.bytes()))
}

/// Maps fresh zeros privately over the guest memory at `base`; they take no memory until written.
fn map_zeros(base: NonNull<u8>, run: PageRun) -> Result<(), RamError> {
    // SAFETY: the run lies within the mapping at `base` (layers have its size), which is being set up:
    // the fixed range replaces only pages to which nobody holds references.
    unsafe {
        rustix::mm::mmap_anonymous(
            base.as_ptr().add(run.offset() as usize).cast(),
            run.bytes() as usize,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED,
        )
    }
    .map(drop)
    .map_err(map_error(run.bytes()))
}

/// Maps what the layers over the base say over the base, which is mapped at `base` already.
fn map_upper(base: NonNull<u8>, chain: &LayerChain, pages: PageCount) -> Result<(), RamError> {
    let held = chain.held();
    let mut scratch = None;
    for Area { run, source } in areas::divide(chain, &held, pages, areas::MOST_AREAS) {
        match source {
            Source::Layer(0) => {}
            Source::Layer(layer) => map_file(base, &chain.layers()[layer], run)?,
            Source::Zero => map_zeros(base, run)?,
            Source::Gathered => {
                let file = match &scratch {
                    Some(file) => file,
                    None => scratch.insert(gathering_file(pages)?),
                };
                gather(chain, &held, run, file)?;
                map(base, file, run, run.offset())?;
            }
        }
    }
    Ok(())
}

/// An empty file in memory as large as a guest's.
fn gathering_file(pages: PageCount) -> Result<File, RamError> {
    let failed = |error: io::Error| RamError::Io { attempt: "make a file in memory", source: error };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::NOEXEC_SEAL;
    // Kernels before 6.3 do not know the second flag.
    let file = rustix::fs::memfd_create(c"forkd-layers", flags)
        .or_else(|_| rustix::fs::memfd_create(c"forkd-layers", MemfdFlags::CLOEXEC))
        .map_err(|error| failed(error.into()))?;
    let file = File::from(file);
    file.set_len(pages.bytes()).map_err(failed)?;
    Ok(file)
}

/// Reads what the layers hold of `run` into the same place of `file`.
fn gather(chain: &LayerChain, held: &[Held], run: PageRun, file: &File) -> Result<(), RamError> {
    let failed = |attempt| move |source| RamError::Io { attempt, source };
    let mut buffer = vec![0; COPIED_AT_ONCE as usize];
    let begin = held.partition_point(|held| held.run.end() <= run.first);
    for held in held[begin..].iter().take_while(|held| held.run.first < run.end()) {
        let layer = chain.layers()[held.layer].file();
        let mut at = held.run.first.max(run.first) * PAGE_SIZE;
        let end = held.run.end().min(run.end()) * PAGE_SIZE;
        while at < end {
            let bytes = &mut buffer[..(end - at).min(COPIED_AT_ONCE) as usize];
            layer.read_exact_at(bytes, DATA_OFFSET + at).map_err(failed("read a memory layer"))?;
            file.write_all_at(bytes, at).map_err(failed("gather the runs of memory layers"))?;
            at += bytes.len() as u64;
        }
    }
    Ok(())
}

/// Reads all layers into the memory at `base`; returns the runs that they speak of.
fn copy_all(base: NonNull<u8>, chain: &LayerChain) -> Result<Vec<PageRun>, RamError> {
    for Held { run, layer } in chain.held() {
        // SAFETY: the run lies within the mapping at `base`, which is being set up: no other
        // reference to it exists.
        let target =
            unsafe { std::slice::from_raw_parts_mut(base.as_ptr().add(run.offset() as usize), run.bytes() as usize) };
        let file = chain.layers()[layer].file();
        file.read_exact_at(target, DATA_OFFSET + run.offset())
            .map_err(|source| RamError::Io { attempt: "read a memory layer", source })?;
    }
    Ok(union(chain.layers().iter().map(Layer::data)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LayerWriter;
    use vm_memory::{Bytes, GuestMemoryBackend};

    fn layout(mib: u64) -> MemoryLayout {
        MemoryLayout::new(mib << 20).expect("legal")
    }

    /// A base layer in which page `p` of each listed pair is filled with a byte.
    fn layer(mib: u64, pages: &[(u64, u8)]) -> Layer {
        let file = tempfile::tempfile().expect("scratch");
        let mut writer = LayerWriter::new(file.try_clone().expect("dup"), layout(mib).pages()).expect("begin");
        for &(first, fill) in pages {
            writer.store(first, &[fill; PAGE_SIZE as usize]).expect("store");
        }
        writer.finish().expect("finish");
        Layer::open(file).expect("open")
    }

    fn byte(ram: &GuestRam, page: u64) -> u8 {
        ram.memory().read_obj(GuestAddress(page * PAGE_SIZE + 5)).expect("inside RAM")
    }

    #[test]
    fn exactly_the_written_pages_of_a_file_mapping_are_private() {
        let ram = GuestRam::from_layers(layout(128), [layer(128, &[(7, 1), (8, 2)])], Backing::File).expect("map");
        assert_eq!((byte(&ram, 7), byte(&ram, 8), byte(&ram, 9)), (1, 2, 0));
        assert_eq!(ram.page_map().expect("pagemap").private, []);
        for page in [8, 300, 301] {
            ram.memory().write_obj(0xeeu8, GuestAddress(page * PAGE_SIZE + 5)).expect("inside RAM");
        }
        let runs = [PageRun { first: 8, count: 1 }, PageRun { first: 300, count: 2 }];
        assert_eq!(ram.page_map().expect("pagemap").private, runs);
    }

    #[test]
    fn a_base_written_from_memory_is_that_memory_without_its_zero_pages() {
        let ram = GuestRam::from_layers(layout(128), [layer(128, &[(7, 1), (8, 2)])], Backing::File).expect("map");
        ram.memory().write_obj(3u8, GuestAddress(9 * PAGE_SIZE + 5)).expect("inside RAM");
        ram.memory().write_slice(&[0; PAGE_SIZE as usize], GuestAddress(8 * PAGE_SIZE)).expect("inside RAM");
        let file = tempfile::tempfile().expect("scratch");
        ram.write_base(file.try_clone().expect("dup")).expect("write");
        let written = Layer::open(file).expect("open");
        written.verify(|_| ()).expect("verify");
        assert_eq!(written.data(), [PageRun { first: 7, count: 1 }, PageRun { first: 9, count: 1 }]);
        let copy = GuestRam::from_layers(layout(128), [written], Backing::File).expect("map");
        assert_eq!((byte(&copy, 7), byte(&copy, 8), byte(&copy, 9)), (1, 0, 3));
    }

    /// Pages here and there, so many that they are gathered.
    #[test]
    fn scattered_pages_of_layers_are_shared_and_leave_nothing_to_copy() {
        let scattered = |offset: u64, fill| (0..300).map(|index| (index * 100 + offset, fill)).collect::<Vec<_>>();
        let base: Vec<_> = (0..30_000).map(|page| (page, 1)).collect();
        let layers = [layer(128, &base), layer(128, &scattered(7, 2)), layer(128, &scattered(8, 3))];
        let ram = GuestRam::from_layers(layout(128), layers, Backing::File).expect("map");
        assert_eq!([6, 7, 8, 9, 29_907, 29_908].map(|page| byte(&ram, page)), [1, 2, 3, 1, 2, 3]);
        assert_eq!(ram.page_map().expect("pagemap").private, []);
        ram.memory().write_obj(9u8, GuestAddress(107 * PAGE_SIZE + 5)).expect("inside RAM");
        assert_eq!(ram.page_map().expect("pagemap").private, [PageRun { first: 107, count: 1 }]);
        ram.release(107 * PAGE_SIZE, PAGE_SIZE);
        assert_eq!(byte(&ram, 107), 2, "a released page is the chain's again");
    }

    #[test]
    fn upper_layers_win_whether_they_are_mapped_or_copied() {
        const MAP_AT_LEAST: u64 = 64;
        for backing in [Backing::File, Backing::TransparentHugePages] {
            let base = layer(128, &[(0, 1), (200, 1), (400, 1)]);
            let long: Vec<_> = (200..200 + MAP_AT_LEAST).map(|page| (page, 2)).collect();
            let ram = GuestRam::from_layers(layout(128), [base, layer(128, &long), layer(128, &[(201, 3)])], backing)
                .expect("map");
            assert_eq!([0, 200, 201, 202, 400].map(|page| byte(&ram, page)), [1, 2, 3, 2, 1], "{backing:?}");
        }
    }

    #[test]
    fn a_layer_of_another_size_is_refused() {
        let error = GuestRam::from_layers(layout(256), [layer(128, &[])], Backing::File).expect_err("wrong size");
        assert!(matches!(error, RamError::Layer { index: 0, source: LayerError::Size { .. } }), "{error:?}");
    }

    #[test]
    fn released_pages_are_private_no_more_and_ranges_outside_ram_are_ignored() {
        let ram = GuestRam::anonymous(layout(128)).expect("map");
        ram.memory().write_slice(&[1; 3 * PAGE_SIZE as usize], GuestAddress(0)).expect("inside RAM");
        ram.release(10, 2 * PAGE_SIZE);
        assert_eq!(
            ram.page_map().expect("pagemap").private,
            [PageRun { first: 0, count: 1 }, PageRun { first: 2, count: 1 }]
        );
        ram.release(127 << 20, 2 << 20);
        ram.release(u64::MAX - 5, 4096);
        assert_eq!(byte(&ram, 2), 1);
    }

    #[test]
    fn memory_above_the_hole_is_the_second_part_of_the_mapping() {
        let ram = GuestRam::anonymous(layout(3 * 1024 + 128)).expect("map");
        ram.memory().write_obj(9u8, GuestAddress(4 << 30)).expect("inside RAM");
        assert!(ram.memory().write_obj(9u8, GuestAddress(3 << 30)).is_err());
        assert_eq!(ram.memory().num_regions(), 2);
        assert_eq!(ram.page_map().expect("pagemap").private, [PageRun { first: (3 << 30) / PAGE_SIZE, count: 1 }]);
    }
}
