//! What one monitor costs its host, and huge pages the host has left.

use std::io;

/// Sizes of one process, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct ProcessMemory {
    /// Proportional set size.
    pub(crate) pss: u64,
    /// Pages that it has written and nobody else maps. Clean pages of a file are not among them, even where
    /// nobody else maps them: they are the page cache's, and so the image's.
    pub(crate) private: u64,
    /// Page tables.
    pub(crate) page_tables: u64,
}

/// Reads the sizes of process `pid`.
pub(crate) fn of_process(pid: i32) -> io::Result<ProcessMemory> {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    parse(&rollup, &status).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/smaps_rollup or status lacks a size"))
    })
}

/// Bytes in reserved 2 MiB pages that nobody uses or was promised; none where the kernel has no such pages.
pub(crate) fn free_huge_page_bytes() -> u64 {
    let count = |name: &str| -> Option<u64> {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}");
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    };
    let free = count("free_hugepages").unwrap_or(0);
    free.saturating_sub(count("resv_hugepages").unwrap_or(0)) << 21
}

fn parse(rollup: &str, status: &str) -> Option<ProcessMemory> {
    Some(ProcessMemory {
        pss: kib(rollup, "Pss:")?,
        private: kib(rollup, "Private_Dirty:")? + kib(rollup, "Private_Hugetlb:")?,
        page_tables: kib(status, "VmPTE:")?,
    })
}

/// The value in bytes of the line that starts with `key` and ends in `kB`.
fn kib(text: &str, key: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(key))?;
    let number: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(number * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_found_by_their_whole_key() {
        let rollup = "5-7 ---p 0 0:0 0 [rollup]\nRss: 9 kB\nPss:       20 kB\nPss_Dirty: 1 kB\n\
                      Private_Clean:  3 kB\nPrivate_Dirty: 4 kB\nPrivate_Hugetlb: 2 kB\n";
        let got = parse(rollup, "Name:\tx\nVmPTE:\t     60 kB\n");
        assert_eq!(got, Some(ProcessMemory { pss: 20 << 10, private: 6 << 10, page_tables: 60 << 10 }));
        assert_eq!(parse(rollup, ""), None);
    }

    #[test]
    fn this_process_has_sizes() {
        let own = of_process(std::process::id() as i32).expect("own sizes");
        assert!(own.pss > 0 && own.page_tables > 0);
    }
}
