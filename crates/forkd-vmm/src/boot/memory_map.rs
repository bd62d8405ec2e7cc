//! The map of physical memory that the kernel is told.

use forkd_memory::MemoryLayout;

use crate::address_map::{CONVENTIONAL_END, HIGH_MEMORY};

/// Usable memory (`E820_TYPE_RAM`).
pub(super) const RAM: u32 = 1;
/// Not to be touched.
pub(super) const RESERVED: u32 = 2;

/// `(address, bytes, type)` of every range, ascending.
pub(super) fn ranges(layout: MemoryLayout) -> Vec<(u64, u64, u32)> {
    let mut ranges = vec![(0, CONVENTIONAL_END, RAM), (CONVENTIONAL_END, HIGH_MEMORY - CONVENTIONAL_END, RESERVED)];
    for region in layout.regions() {
        let start = region.guest_address.max(HIGH_MEMORY);
        ranges.push((start, region.guest_address + region.bytes - start, RAM));
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_disjoint_and_hold_all_memory_but_the_reserved_piece() {
        for mib in [128, 3072, 4096, 16384] {
            let layout = MemoryLayout::new(mib << 20).expect("legal");
            let ranges = ranges(layout);
            assert!(ranges.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "{ranges:x?}");
            let usable: u64 = ranges.iter().filter(|range| range.2 == RAM).map(|range| range.1).sum();
            assert_eq!(usable, layout.bytes() - (HIGH_MEMORY - CONVENTIONAL_END), "{mib} MiB");
        }
    }
}
