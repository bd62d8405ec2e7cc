//! The KVM calls that a monitor uses.
//!
//! - [`system`]: `/dev/kvm` itself and what it can do, read once.
//! - [`vm`]: a virtual machine, always set up in the one order that is fast.
//! - [`vcpu`]: a vCPU: running it, getting it out of the guest, leaving it whole.
//! - [`state`]: everything that makes a vCPU and the interrupt chips what they are, as plain data.
//! - [`cpuid`]: what a guest is told about its processors.
//!
//! The crate knows no devices and no memory layout.
#![allow(unsafe_code)]

pub mod cpuid;
pub mod state;
pub mod system;
pub mod vcpu;
pub mod vm;

pub use state::{ChipState, VcpuState};
pub use system::Kvm;
pub use vcpu::{Kicker, Vcpu};
pub use vm::{SetupTimes, Vm};

pub use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
pub use kvm_ioctls::VcpuExit;

use std::io;

/// How guest memory is handed to KVM.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;

/// A KVM call that failed.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// The device cannot be opened.
    #[error("cannot open /dev/kvm")]
    Open(#[source] io::Error),
    /// The kernel's KVM lacks something without which no guest runs.
    #[error("this kernel's KVM has no {0}")]
    Missing(&'static str),
    /// A call failed.
    #[error("{call} failed")]
    Call {
        /// Name of the ioctl.
        call: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A saved state cannot be put into this host's KVM.
    #[error("this host cannot take the saved state: {0}")]
    Incompatible(String),
}

/// Names the call that failed.
fn failed(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |error| KvmError::Call { call, source: io::Error::from_raw_os_error(error.errno()) }
}
