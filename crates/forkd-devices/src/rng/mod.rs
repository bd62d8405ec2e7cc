//! virtio-rng: entropy for the guest from the host's kernel.

mod device;
mod state;

pub use device::Rng;
pub use state::RngState;
