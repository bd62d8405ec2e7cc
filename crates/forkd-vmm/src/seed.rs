//! What a copy grows from: everything of a machine that `fork(2)` lets a child inherit.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use forkd_devices::block::DiskImage;
use forkd_kvm::Kvm;
use forkd_memory::GuestRam;

use crate::state::MachineState;

/// The inheritance of a copy. A zygote has one for ever; a running machine makes one each time it is
/// branched.
#[derive(Debug)]
pub struct Seed {
    /// `/dev/kvm`.
    pub kvm: Arc<Kvm>,
    /// Guest memory; in a child, its own copy-on-write copy.
    pub ram: GuestRam,
    /// Everything else about the machine.
    pub state: MachineState,
    /// The immutable parts of its disks.
    pub disks: Vec<DiskImage>,
}

impl Seed {
    /// The descriptors that a child goes on using.
    pub fn raw_fds(&self) -> Vec<RawFd> {
        let mut fds = vec![self.kvm.as_raw_fd()];
        fds.extend(self.ram.raw_fds());
        fds.extend(self.disks.iter().flat_map(DiskImage::raw_fds));
        fds
    }
}
