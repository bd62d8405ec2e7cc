//! Which guest pages are present or private, read from the kernel's page tables.
//!
//! `/proc/self/pagemap` has 64 bits a page: bit 63 says present, bit 62 swapped out, bit 61 that it
//! belongs to a file (kernel documentation, `admin-guide/mm/pagemap.rst`). In a private file
//! mapping, a page that differs from the file is therefore one with bit 61 clear and bit 63 or 62
//! set. Nothing is armed or counted beforehand, so knowing costs nothing until one asks.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use forkd_types::{PAGE_SIZE, PageRun};

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FILE_PAGE: u64 = 1 << 61;
/// Entries read at a time: 64 KiB, 32 MiB of guest memory.
const CHUNK: usize = 8192;

/// The pages of one range of this process, as runs relative to its start.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct PageMap {
    /// Pages that the process has in its page tables or in swap.
    pub present: Vec<PageRun>,
    /// Pages that are its own: written, and so no longer the file's.
    pub private: Vec<PageRun>,
}

/// Reads the state of `pages` pages from the page-aligned host address `start` on.
pub fn read(start: usize, pages: u64) -> io::Result<PageMap> {
    let file = File::open("/proc/self/pagemap")?;
    let mut map = PageMap::default();
    let mut bytes = vec![0; CHUNK * 8];
    let first_entry = start as u64 / PAGE_SIZE;
    let mut page = 0;
    while page < pages {
        let count = (pages - page).min(CHUNK as u64);
        let wanted = &mut bytes[..count as usize * 8];
        file.read_exact_at(wanted, (first_entry + page) * 8)?;
        for (number, entry) in (page..).zip(wanted.chunks_exact(8)) {
            let entry = u64::from_ne_bytes(entry.try_into().expect("eight bytes"));
            if entry & (PRESENT | SWAPPED) != 0 {
                PageRun::push(&mut map.present, number);
                if entry & FILE_PAGE == 0 {
                    PageRun::push(&mut map.private, number);
                }
            }
        }
        page += count;
    }
    Ok(map)
}
