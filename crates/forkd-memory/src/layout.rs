//! Where RAM lies in the guest's physical address space.
//!
//! ```text
//! 0 ────────── 3 GiB ─────────── 4 GiB ──────────────
//! │ low RAM     │ devices, APICs  │ the rest of RAM
//! ```
//!
//! In the host and in files, RAM is one contiguous range: low RAM first, the rest right behind it.

use forkd_types::{ByteSize, PAGE_SIZE, PageCount};

/// Start of the hole that devices, IOAPIC and local APICs occupy.
pub const HOLE_START: u64 = 3 << 30;
/// First address after the hole.
pub const HOLE_END: u64 = 4 << 30;
/// Guest memory is sized in steps of this, the size of a huge page.
pub const GRANULE: u64 = 2 << 20;
/// The least memory a Linux guest gets.
pub const SMALLEST: ByteSize = ByteSize::mib(128);
/// The most memory a guest gets.
pub const LARGEST: ByteSize = ByteSize::gib(16);

/// The layout of a guest with a given amount of memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemoryLayout {
    bytes: u64,
}

/// A contiguous piece of guest RAM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Region {
    /// Guest-physical address.
    pub guest_address: u64,
    /// Offset in the host mapping and in memory layers.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// A size of guest memory that cannot be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("guest memory of {bytes} bytes; it must be a multiple of 2 MiB between {SMALLEST} and {LARGEST}")]
pub struct MemorySizeError {
    bytes: u64,
}

impl MemoryLayout {
    /// The layout for `bytes` of RAM: a multiple of [`GRANULE`] from [`SMALLEST`] to [`LARGEST`].
    pub fn new(bytes: u64) -> Result<Self, MemorySizeError> {
        if !(SMALLEST.0..=LARGEST.0).contains(&bytes) || !bytes.is_multiple_of(GRANULE) {
            return Err(MemorySizeError { bytes });
        }
        Ok(Self { bytes })
    }

    /// Size of RAM in bytes.
    pub const fn bytes(self) -> u64 {
        self.bytes
    }

    /// Size of RAM in pages.
    pub const fn pages(self) -> PageCount {
        PageCount(self.bytes / PAGE_SIZE)
    }

    /// The one or two pieces of RAM, in address order.
    pub fn regions(self) -> impl Iterator<Item = Region> {
        let low = self.bytes.min(HOLE_START);
        let high = self.bytes - low;
        [
            Region { guest_address: 0, offset: 0, bytes: low },
            Region { guest_address: HOLE_END, offset: low, bytes: high },
        ]
        .into_iter()
        .filter(|region| region.bytes > 0)
    }

    /// Offset in the host mapping of the range at `guest_address`, if all of it is RAM and lies in
    /// one region.
    pub fn offset_of(self, guest_address: u64, bytes: u64) -> Option<u64> {
        self.regions().find_map(|region| {
            let within = guest_address.checked_sub(region.guest_address)?;
            (within.checked_add(bytes)? <= region.bytes).then_some(region.offset + within)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn small_guests_have_one_region_and_large_ones_skip_the_hole() {
        let small: Vec<_> = MemoryLayout::new(512 << 20).expect("legal").regions().collect();
        assert_eq!(small, [Region { guest_address: 0, offset: 0, bytes: 512 << 20 }]);
        let large: Vec<_> = MemoryLayout::new(4 << 30).expect("legal").regions().collect();
        assert_eq!(
            large,
            [
                Region { guest_address: 0, offset: 0, bytes: 3 << 30 },
                Region { guest_address: 4 << 30, offset: 3 << 30, bytes: 1 << 30 }
            ]
        );
    }

    #[test]
    fn sizes_outside_the_limits_are_refused() {
        for bytes in [0, 127 << 20, (128 << 20) + 4096, (16 << 30) + GRANULE] {
            assert!(MemoryLayout::new(bytes).is_err(), "{bytes}");
        }
        assert!(MemoryLayout::new(16 << 30).is_ok());
    }

    proptest! {
        #[test]
        fn an_offset_is_found_exactly_for_ranges_within_one_region(
            granules in 64u64..8192, address in 0u64..(18 << 30), bytes in 0u64..(2 << 30)
        ) {
            let layout = MemoryLayout::new(granules * GRANULE).expect("within limits");
            let inside = layout.regions().find(|r| {
                address >= r.guest_address && address + bytes <= r.guest_address + r.bytes
            });
            prop_assert_eq!(layout.offset_of(address, bytes), inside.map(|r| r.offset + address - r.guest_address));
        }
    }
}
