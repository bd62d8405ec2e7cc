//! The devices a guest sees; every guest-fed parser is small, pure and fuzzed.
//!
//! virtio devices sit behind [`mmio::MmioTransport`] and work synchronously on the VMM's event-loop
//! thread; the port devices ([`serial`], [`mod@panic`]) answer on vCPU threads. Nothing here knows KVM:
//! interrupts leave through [`InterruptLine`], freed memory through [`balloon::PageRelease`].
//!
//! Every virtio device is a folder with the same files: `device.rs` (the device), `state.rs` (what
//! is saved), and `parse.rs` where bytes from the guest are taken apart.

pub mod balloon;
pub mod block;
mod config_space;
mod device;
mod guest_buffers;
pub mod mmio;
pub mod net;
pub mod panic;
mod queue;
mod requeue;
pub mod rng;
pub mod serial;
mod signals;
#[cfg(test)]
mod test_driver;
#[cfg(test)]
mod test_poll;
pub mod vmgenid;
pub mod vsock;

pub use config_space::ConfigSpace;
pub use device::{DeviceState, VirtioDevice};
pub use guest_buffers::GuestBuffers;
pub use mmio::{MmioTransport, RestoreError, TransportState};
pub use queue::{Chain, Drained, QueueSet, QueueState};
pub use requeue::DescriptorError;
pub use signals::{InterruptLine, Signals};

/// Guest RAM; cheap to clone.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
