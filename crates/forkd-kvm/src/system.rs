//! `/dev/kvm` itself and what it can do.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Cap;

use crate::{KvmError, failed};

/// An open `/dev/kvm` with what a monitor needs to know of it, read once and inherited by forks.
#[derive(Debug)]
pub struct Kvm {
    pub(crate) fd: kvm_ioctls::Kvm,
    pub(crate) run_bytes: usize,
    supported_cpuid: Vec<kvm_cpuid_entry2>,
    /// Registers that make up a vCPU's state, in the order in which they must be restored.
    pub(crate) msr_indices: Vec<u32>,
    tsc_deadline: bool,
    /// Whether guests have XSAVE and with it extended control registers.
    pub(crate) xcrs: bool,
}

impl Kvm {
    /// Opens `/dev/kvm`.
    pub fn open() -> Result<Self, KvmError> {
        let file = std::fs::File::options().read(true).write(true).open("/dev/kvm").map_err(KvmError::Open)?;
        Self::from_fd(file.into())
    }

    /// Takes over an open `/dev/kvm`.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, KvmError> {
        // SAFETY: the descriptor is owned and open; that it is KVM's is checked by the first call.
        let fd = unsafe { kvm_ioctls::Kvm::from_raw_fd(fd.into_raw_fd()) };
        if fd.get_api_version() != 12 {
            return Err(KvmError::Open(io::Error::other("it does not speak KVM API version 12")));
        }
        for (cap, name) in [
            (Cap::Irqchip, "in-kernel interrupt controllers"),
            (Cap::UserMemory, "user memory slots"),
            (Cap::ImmediateExit, "immediate exit"),
            (Cap::Xsave, "XSAVE state"),
            (Cap::AdjustClock, "adjustable clock"),
        ] {
            if !fd.check_extension(cap) {
                return Err(KvmError::Missing(name));
            }
        }
        let run_bytes = fd.get_vcpu_mmap_size().map_err(failed("KVM_GET_VCPU_MMAP_SIZE"))?;
        let supported_cpuid = fd
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("KVM_GET_SUPPORTED_CPUID"))?
            .as_slice()
            .to_vec();
        let all = fd.get_msr_index_list().map_err(failed("KVM_GET_MSR_INDEX_LIST"))?;
        let msr_indices = crate::state::restore_order(all.as_slice());
        let tsc_deadline = fd.check_extension(Cap::TscDeadlineTimer);
        let xcrs = fd.check_extension(Cap::Xcrs);
        Ok(Self { fd, run_bytes, supported_cpuid, msr_indices, tsc_deadline, xcrs })
    }

    /// CPUID leaves that this host's KVM can give a guest.
    pub fn supported_cpuid(&self) -> &[kvm_cpuid_entry2] {
        &self.supported_cpuid
    }

    /// Whether the local APIC's timer has TSC-deadline mode.
    pub fn tsc_deadline(&self) -> bool {
        self.tsc_deadline
    }
}

impl AsRawFd for Kvm {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}
