//! What a network device saves. Packets under way are lost, as on any network.

use serde::{Deserialize, Serialize};

/// The saved state of a [`Net`](super::Net).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NetState {
    /// Ethernet address.
    pub mac: [u8; 6],
    /// What the driver accepted, or `None` before it was ready; decides the tap's offloads.
    pub features: Option<u64>,
}
