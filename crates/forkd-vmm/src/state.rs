//! The state of a whole machine, in memory and on disk (`vmstate`).
//!
//! A copy made by `fork(2)` restores from [`MachineState`] as it lies in memory. On disk it is
//!
//! ```text
//! magic (8)  version (4)  payload length (4)  BLAKE3 of the payload (32)  payload (postcard)
//! ```
//!
//! The payload's layout *is* the structs below and those they hold: whoever changes one of them
//! raises [`CURRENT`]. A test pins the bytes of a known state.

use forkd_devices::mmio::TransportState;
use forkd_devices::serial::SerialState;
use forkd_kvm::{ChipState, VcpuState};
use forkd_types::Digest;
use serde::{Deserialize, Serialize};

/// First bytes of every `vmstate` file.
pub const MAGIC: [u8; 8] = *b"FORKDVMS";
/// The version that is written, and the only one that is read.
pub const CURRENT: u32 = 1;
/// The largest payload; eight vCPUs and eight devices take less than 200 KiB.
pub const PAYLOAD_LIMIT: usize = 4 << 20;
/// Bytes before the payload.
const HEADER_LEN: usize = 8 + 4 + 4 + 32;

/// What a machine was built as; the same for every copy of it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MachineConfig {
    /// vCPUs, 1 to 8.
    pub vcpus: u8,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// Logical size of each disk in bytes.
    pub disks: Vec<u64>,
    /// Ethernet address of the network interface, if there is one.
    pub mac: Option<[u8; 6]>,
    /// Context id of the vsock device.
    pub guest_cid: u32,
}

/// Everything about a machine but its memory and its disks.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MachineState {
    /// What it was built as.
    pub config: MachineConfig,
    /// One a vCPU, in order.
    pub vcpus: Vec<VcpuState>,
    /// Interrupt chips and clock.
    pub chips: ChipState,
    /// One a device slot; absent where the slot is empty.
    pub devices: Vec<Option<TransportState>>,
    /// COM1.
    pub serial: SerialState,
}

/// Why a `vmstate` cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// It does not start with [`MAGIC`].
    #[error("not a vmstate file")]
    NotAState,
    /// It is of another version.
    #[error("vmstate version {found}; this program reads version {CURRENT}. Bake the snapshot again")]
    Version {
        /// The version in the file.
        found: u32,
    },
    /// The payload is missing, too long, or not what its digest says.
    #[error("the vmstate is damaged")]
    Damaged,
    /// The payload does not decode.
    #[error("the vmstate does not decode")]
    Payload(#[source] postcard::Error),
}

impl MachineState {
    /// The bytes of a `vmstate` file and their digest.
    pub fn encode(&self) -> (Vec<u8>, Digest) {
        let payload = postcard::to_stdvec(self).expect("plain data always encodes");
        let mut bytes = Vec::with_capacity(HEADER_LEN + payload.len());
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&CURRENT.to_le_bytes());
        bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
        bytes.extend_from_slice(blake3::hash(&payload).as_bytes());
        bytes.extend_from_slice(&payload);
        let digest = Digest::from_bytes(*blake3::hash(&bytes).as_bytes());
        (bytes, digest)
    }

    /// Decodes a `vmstate` file.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        if bytes.len() < HEADER_LEN || bytes[..8] != MAGIC {
            return Err(StateError::NotAState);
        }
        if word(8) != CURRENT {
            return Err(StateError::Version { found: word(8) });
        }
        let payload = &bytes[HEADER_LEN..];
        let sound = payload.len() <= PAYLOAD_LIMIT
            && payload.len() == word(12) as usize
            && blake3::hash(payload).as_bytes() == &bytes[16..HEADER_LEN];
        if !sound {
            return Err(StateError::Damaged);
        }
        postcard::from_bytes(payload).map_err(StateError::Payload)
    }
}
