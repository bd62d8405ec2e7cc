//! virtio-blk over a copy-on-write disk.
//!
//! [`BlockDisk`] owns the bytes: an immutable base file, sealed layers over it, and a private
//! overlay. [`Block`] owns the protocol. What a guest writes lives in the overlay until the disk is
//! sealed at a fork; then the overlay is a layer that both sides share, and each side goes on with a
//! fresh, empty one. Nothing is copied.

mod budget;
mod device;
mod disk;
mod index;
mod layer;
mod parse;
mod state;
#[cfg(test)]
mod tests;

pub use budget::Budget;
pub use device::{Block, BlockCounters, SharedDisk};
pub use disk::{BlockDisk, DiskError, DiskImage};
pub use layer::{LayerExtent, SealedLayer};
pub use parse::{Request, RequestError, Segment, parse_header, parse_segments};
pub use state::BlockState;
