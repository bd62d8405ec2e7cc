//! Page numbers and ranges from the guest.

use forkd_types::{PAGE_SIZE, PageRun};

/// Bytes of one page number.
pub const PAGE_NUMBER_LEN: usize = 4;

/// The pages that a list of little-endian 32-bit page numbers names, neighbours joined, in the order
/// of the list. An incomplete number at the end is ignored.
pub fn parse_page_numbers(list: &[u8]) -> Vec<PageRun> {
    let mut runs: Vec<PageRun> = Vec::new();
    for bytes in list.chunks_exact(PAGE_NUMBER_LEN) {
        let page = u64::from(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
        match runs.last_mut() {
            Some(run) if run.end() == page => run.count += 1,
            // Linux fills the list from the top of its free list, often downwards.
            Some(run) if run.first == page + 1 => {
                run.first = page;
                run.count += 1;
            }
            _ => runs.push(PageRun { first: page, count: 1 }),
        }
    }
    runs
}

/// The whole pages inside `len` bytes at `address`.
pub fn whole_pages(address: u64, len: u64) -> Option<PageRun> {
    let first = address.checked_next_multiple_of(PAGE_SIZE)? / PAGE_SIZE;
    let end = address.checked_add(len)? / PAGE_SIZE;
    (first < end).then(|| PageRun { first, count: end - first })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn every_named_page_is_in_a_run_and_no_other(pages: Vec<u32>) {
            let list: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
            let covered: BTreeSet<u64> =
                parse_page_numbers(&list).into_iter().flat_map(|run| run.first..run.end()).collect();
            let named: BTreeSet<u64> = pages.iter().map(|&page| page.into()).collect();
            prop_assert_eq!(covered, named);
        }

        #[test]
        fn whole_pages_never_leave_the_range(address: u64, len: u64) {
            if let Some(run) = whole_pages(address, len) {
                prop_assert!(run.first * PAGE_SIZE >= address);
                prop_assert!(run.end() * PAGE_SIZE <= address + len);
            }
        }
    }

    #[test]
    fn neighbours_join_in_both_directions() {
        let list: Vec<u8> = [5_u32, 6, 7, 9, 8, 7].iter().flat_map(|page| page.to_le_bytes()).collect();
        let runs = parse_page_numbers(&list);
        assert_eq!(runs, [PageRun { first: 5, count: 3 }, PageRun { first: 7, count: 3 }]);
        assert_eq!(whole_pages(1, PAGE_SIZE), None);
        assert_eq!(whole_pages(1, 2 * PAGE_SIZE), Some(PageRun { first: 1, count: 1 }));
    }
}
