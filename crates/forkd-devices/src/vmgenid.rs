//! The VM generation id: 16 bytes in guest memory whose change tells the kernel that it was copied.
//!
//! The guest finds the address in the ACPI device `QEMUVGID`/`VM_GEN_COUNTER`; after the bytes were
//! changed the VMM raises that device's event, upon which Linux (≥ 5.18) reseeds its random number
//! generator. Specification: Microsoft, "Virtual Machine Generation ID".

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::GuestMemory;

/// Bytes of a generation id.
pub const VMGENID_LEN: usize = 16;

/// Where the generation id is. The address is a multiple of 8, in memory the guest leaves alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VmGenId {
    /// Guest physical address of the 16 bytes.
    pub address: u64,
}

/// The generation id could not be written.
#[derive(Debug, thiserror::Error)]
#[error("writing the VM generation id to guest address {address:#x} failed")]
pub struct VmGenIdError {
    /// Where it should have gone.
    pub address: u64,
    /// What guest memory answered.
    pub source: GuestMemoryError,
}

impl VmGenId {
    /// Writes a new id. vCPUs stand still, or have not run yet.
    ///
    /// # Errors
    /// The address is not in guest memory.
    pub fn set(&self, memory: &GuestMemory, id: [u8; VMGENID_LEN]) -> Result<(), VmGenIdError> {
        memory
            .write_slice(&id, GuestAddress(self.address))
            .map_err(|source| VmGenIdError { address: self.address, source })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn the_id_is_written_whole_or_refused() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let id: [u8; VMGENID_LEN] = std::array::from_fn(|index| index as u8 + 1);
        VmGenId { address: 0x800 }.set(&memory, id).unwrap();
        assert_eq!(memory.read_obj::<[u8; 16]>(GuestAddress(0x800)).unwrap(), id);
        let error = VmGenId { address: 0xff8 }.set(&memory, id).unwrap_err();
        assert!(error.to_string().contains("0xff8"));
    }
}
