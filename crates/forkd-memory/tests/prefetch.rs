//! Reading guest memory ahead, on a real file that the page cache was made to forget.
//!
//! On a file system that keeps what it has (tmpfs), the test is counted as ignored and the reason is printed.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Write};
use std::time::{Duration, Instant};

use forkd_memory::layer::DATA_OFFSET;
use forkd_memory::{Backing, GuestRam, Layer, LayerWriter, MemoryLayout};
use forkd_types::{PAGE_SIZE, PageRun};
use libtest_mimic::{Arguments, Failed, Trial};
use rustix::fs::Advice;
use rustix::mm::{MapFlags, ProtFlags};

/// Guest memory, 128 MiB; the first of its pages hold data.
const PAGES: u64 = 32_768;
const STORED: u64 = 4096;
const DIRECTORY: &str = env!("CARGO_TARGET_TMPDIR");

fn main() -> io::Result<()> {
    let arguments = Arguments::from_args();
    let layer = forgotten_layer()?;
    let forgets = layer.is_some();
    if !forgets {
        writeln!(io::stderr(), "SKIPPED, every test of this file: files in {DIRECTORY} cannot be forgotten")?;
    }
    let test = move || runs_are_read_and_nothing_else(&layer.ok_or("ignored tests do not run")?);
    let trial = Trial::test("runs_are_read_and_nothing_else", test).with_ignored_flag(!forgets);
    libtest_mimic::run(&arguments, vec![trial]).exit()
}

/// A layer none of whose pages are in the page cache; none where the file system keeps
/// what it has anyway.
fn forgotten_layer() -> io::Result<Option<File>> {
    let file = tempfile::tempfile_in(DIRECTORY)?;
    let layout = MemoryLayout::new(PAGES * PAGE_SIZE).expect("a legal size");
    let mut writer = LayerWriter::new(file.try_clone()?, layout.pages()).expect("a writer");
    for page in 0..STORED {
        writer.store(page, &[page as u8 | 1; PAGE_SIZE as usize]).expect("stored");
    }
    writer.finish().expect("finished");
    file.sync_all()?;
    rustix::fs::fadvise(&file, 0, None, Advice::DontNeed)?;
    Ok((!is_cached(&file, 0)? && !is_cached(&file, STORED / 2)?).then_some(file))
}

/// Whether page `page` of the layer is in the page cache. Looking does not bring it there, as reading would.
fn is_cached(file: &File, page: u64) -> io::Result<bool> {
    let length = PAGE_SIZE as usize;
    // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing.
    let mapped = unsafe {
        rustix::mm::mmap(
            std::ptr::null_mut(),
            length,
            ProtFlags::READ,
            MapFlags::SHARED,
            file,
            DATA_OFFSET + page * PAGE_SIZE,
        )
    }?;
    let mut answer = 0;
    // SAFETY: the range is the mapping just made, one page, for which one byte is written.
    let asked = match unsafe { libc::mincore(mapped, length, &raw mut answer) } {
        0 => Ok(answer & 1 == 1),
        _ => Err(io::Error::last_os_error()),
    };
    // SAFETY: the mapping was made above and nobody else knows of it.
    unsafe { rustix::mm::munmap(mapped, length) }?;
    asked
}

fn runs_are_read_and_nothing_else(file: &File) -> Result<(), Failed> {
    let layout = MemoryLayout::new(PAGES * PAGE_SIZE).expect("a legal size");
    let layer = Layer::open(file.try_clone()?).expect("a whole layer");
    let ram = GuestRam::from_layers(layout, [layer], Backing::File).expect("mapped");
    let runs = [PageRun { first: 100, count: 600 }, PageRun { first: 3000, count: 1 }];
    let beyond = PageRun { first: PAGES - 1, count: 2 };
    ram.prefetch(&[runs[0], runs[1], beyond]);
    let end = Instant::now() + Duration::from_secs(20);
    for page in runs.iter().flat_map(|run| run.first..run.end()) {
        while !is_cached(file, page)? {
            assert!(Instant::now() < end, "page {page} was not read");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    for page in [0, 1000, 2000, 3500] {
        assert!(!is_cached(file, page)?, "page {page} was read");
    }
    Ok(())
}
