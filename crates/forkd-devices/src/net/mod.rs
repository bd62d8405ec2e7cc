//! virtio-net over a tap device.
//!
//! One receive and one transmit queue. Checksums and segmentation are left to the host where both
//! sides can: a packet then crosses as one of up to 64 KiB with a `virtio_net_hdr_v1` before it, which
//! the tap understands too, so the device passes it on unread.

mod device;
mod parse;
mod state;
mod tap;
#[cfg(test)]
mod tests;

pub use device::{Net, NetCounters};
pub use parse::{LARGEST_PACKET, NET_HEADER_LEN, is_plausible_length};
pub use state::NetState;
