//! The thread that runs one vCPU.

use std::io;
use std::sync::Arc;

use forkd_kvm::vcpu::RunOutcome;
use forkd_kvm::{Kvm, Vcpu, VcpuExit, VcpuState};
use forkd_proto::monitor::StopReason;

use crate::bus::Bus;
use crate::gate::Gate;
use crate::wake::Wake;

/// The stack of a vCPU thread; it serves exits and nothing else.
const STACK_BYTES: usize = 256 << 10;

/// What every vCPU thread of a machine shares.
#[derive(Clone)]
pub struct VcpuContext {
    /// For reading state.
    pub kvm: Arc<Kvm>,
    /// Devices.
    pub bus: Arc<Bus>,
    /// Where to stand still.
    pub gate: Arc<Gate>,
    /// Where to say that the machine stopped.
    pub wake: Arc<Wake>,
    /// CPUID of each vCPU, for its state.
    pub cpuids: Arc<Vec<Vec<kvm_bindings::kvm_cpuid_entry2>>>,
}

/// What serving an exit leads to.
enum Next {
    Run,
    Stop(StopReason),
}

/// Starts the thread. It ends only with the process.
pub fn start(vcpu: Vcpu, context: VcpuContext) -> io::Result<()> {
    std::thread::Builder::new()
        .name(format!("vcpu-{}", vcpu.index()))
        .stack_size(STACK_BYTES)
        .spawn(move || run(vcpu, &context))
        .map(drop)
}

fn run(mut vcpu: Vcpu, context: &VcpuContext) -> ! {
    let index = usize::from(vcpu.index());
    context.gate.kicker(index).attach_current_thread();
    loop {
        let next = match vcpu.run() {
            Ok(RunOutcome::Kicked) => {
                context.gate.visit(index, || save(&vcpu, context));
                Next::Run
            }
            Ok(RunOutcome::Exit(exit)) => match serve(exit, &context.bus) {
                Ok(next) => next,
                Err(what) => Next::Stop(StopReason::Crashed { detail: vcpu.describe_failure(&what) }),
            },
            Err(error) => {
                let detail = vcpu.describe_failure(&chain(&error));
                Next::Stop(StopReason::Crashed { detail })
            }
        };
        if let Next::Stop(reason) = next {
            context.wake.stop(reason);
            context.gate.retire();
        }
    }
}

fn save(vcpu: &Vcpu, context: &VcpuContext) -> Result<VcpuState, forkd_kvm::KvmError> {
    vcpu.save(&context.kvm, &context.cpuids[usize::from(vcpu.index())])
}

/// An error with its causes on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// Serves one exit; an error names an exit that no guest of ours should cause.
fn serve(exit: VcpuExit<'_>, bus: &Bus) -> Result<Next, String> {
    match exit {
        VcpuExit::MmioRead(address, data) => bus.memory_read(address, data),
        VcpuExit::MmioWrite(address, data) => bus.memory_write(address, data),
        VcpuExit::IoIn(port, data) => bus.port_read(port, data),
        VcpuExit::IoOut(port, data) => {
            if let Some(reason) = bus.port_write(port, data) {
                return Ok(Next::Stop(reason));
            }
        }
        VcpuExit::Hlt | VcpuExit::IrqWindowOpen | VcpuExit::Intr => {}
        // A triple fault: how a kernel with reboot=t resets the machine, and how a broken one ends.
        VcpuExit::Shutdown => return Ok(Next::Stop(StopReason::Rebooted)),
        VcpuExit::FailEntry(reason, cpu) => {
            return Err(format!("entering the guest failed on CPU {cpu}, hardware reason {reason:#x}"));
        }
        VcpuExit::InternalError => return Err("KVM internal error".to_owned()),
        other => return Err(format!("unexpected exit {other:?}")),
    }
    Ok(Next::Run)
}
