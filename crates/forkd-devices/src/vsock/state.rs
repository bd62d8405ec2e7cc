//! What a vsock device saves. Connections are not part of it; see the module header.

use serde::{Deserialize, Serialize};

/// The saved state of a [`Vsock`](super::Vsock).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VsockState {
    /// Whether a driver was running, which then has connections to forget.
    pub active: bool,
    /// The host port of the next connection. Copies go on from here, so that no port is used again
    /// while the guest may still remember it.
    pub next_host_port: u32,
    /// Reset events that were delivered and whose buffers the driver had not given back.
    pub unhandled_resets: u16,
}
