//! Holds two idle vCPUs open inside the machine for as long as the machine runs.
//!
//! Linux patches its own code when a static key flips. KVM flips several when the first vCPU of
//! the system appears and when the last one goes: preempt notifiers, software-disabled local APICs,
//! vCPUs without an in-kernel APIC. QEMU before 8.1 can translate the half-patched instruction on another
//! thread while it is written, and the machine then hangs or panics in code that is correct. One idle
//! vCPU of a VM with an interrupt controller and one of a VM without keep every one of those counts
//! above zero, so the keys flip once, at boot, while nothing else runs. KVM also stays enabled on
//! every processor, which makes creating a VM 1 ms instead of 20.

use std::io::Write;

use kvm_ioctls::{Kvm, VcpuFd, VmFd};

/// Printed on standard output once both vCPUs are held.
pub const HELD: &str = "keep-alive: holding two idle vCPUs";

/// Why the vCPUs could not be held.
#[derive(Debug, thiserror::Error)]
#[error("cannot {attempt} to keep this machine's KVM alive: {source}")]
pub struct KeepAliveError {
    attempt: &'static str,
    source: kvm_ioctls::Error,
}

/// Creates the two vCPUs, says so on standard output and waits for ever; returns only on failure.
pub fn run() -> Result<std::convert::Infallible, KeepAliveError> {
    let _with_irqchip = idle_vcpu(true)?;
    let _without_irqchip = idle_vcpu(false)?;
    let mut stdout = std::io::stdout();
    // Nobody may be listening; that is no reason to let go.
    let _ = writeln!(stdout, "{HELD}").and_then(|()| stdout.flush());
    loop {
        std::thread::park();
    }
}

fn idle_vcpu(irqchip: bool) -> Result<(VmFd, VcpuFd), KeepAliveError> {
    let failed = |attempt| move |source| KeepAliveError { attempt, source };
    let vm = Kvm::new().map_err(failed("open /dev/kvm"))?.create_vm().map_err(failed("create a VM"))?;
    if irqchip {
        vm.create_irq_chip().map_err(failed("create an interrupt controller"))?;
    }
    let vcpu = vm.create_vcpu(0).map_err(failed("create a vCPU"))?;
    Ok((vm, vcpu))
}
