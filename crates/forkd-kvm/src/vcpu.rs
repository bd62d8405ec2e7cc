//! A vCPU: running it, getting it out of the guest, leaving it whole.

use std::io;
use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};

use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::{Kvm, KvmError, Vm, failed};

/// The signal that interrupts a vCPU thread. Its handler does nothing.
const KICK_SIGNAL: i32 = libc::SIGUSR1;

/// A vCPU of a [`Vm`]. Its kernel object lives as long as the process: the monitor dies with its
/// machine, so there is no earlier moment at which it could go.
#[derive(Debug)]
pub struct Vcpu {
    pub(crate) fd: ManuallyDrop<VcpuFd>,
    index: u8,
}

/// What became of an attempt to run.
#[derive(Debug)]
pub enum RunOutcome<'a> {
    /// The guest left for this reason; it must be served before the next run.
    Exit(VcpuExit<'a>),
    /// The vCPU was kicked. Whatever it left for before is complete: its registers are whole.
    Kicked,
}

/// Gets one vCPU out of the guest from another thread.
#[derive(Debug)]
pub struct Kicker {
    /// `immediate_exit` in the vCPU's shared page.
    immediate_exit: *const AtomicU8,
    /// Thread that runs the vCPU; 0 before it has started.
    thread: AtomicI32,
}

// SAFETY: the pointer targets a byte of the vCPU's shared page, which is mapped as long as the
// process lives (the vCPU is never dropped), and is only used atomically.
unsafe impl Send for Kicker {}
// SAFETY: as above.
unsafe impl Sync for Kicker {}

impl Vcpu {
    /// Creates vCPU `index` of `vm`.
    ///
    /// The page it shares with the kernel is excluded from `fork(2)`: a copy of it would keep the
    /// parent's machine alive in every child.
    pub fn new(kvm: &Kvm, vm: &Vm, index: u8) -> Result<Self, KvmError> {
        let mut fd = vm.fd.create_vcpu(index.into()).map_err(failed("KVM_CREATE_VCPU"))?;
        let page: *mut kvm_bindings::kvm_run = fd.get_kvm_run();
        // SAFETY: the range is exactly the mapping of this vCPU; the advice changes no contents.
        if unsafe { libc::madvise(page.cast(), kvm.run_bytes, libc::MADV_DONTFORK) } != 0 {
            return Err(KvmError::Call { call: "madvise(MADV_DONTFORK)", source: io::Error::last_os_error() });
        }
        Ok(Self { fd: ManuallyDrop::new(fd), index })
    }

    /// Its number, which is also its local APIC's.
    pub fn index(&self) -> u8 {
        self.index
    }

    /// A handle that gets this vCPU out of the guest.
    pub fn kicker(&mut self) -> Kicker {
        let flag: *mut u8 = &raw mut self.fd.get_kvm_run().immediate_exit;
        Kicker { immediate_exit: flag.cast_const().cast(), thread: AtomicI32::new(0) }
    }

    /// Runs the guest until it leaves for something that must be served, or is kicked.
    ///
    /// KVM completes a port or memory access that the guest left for when it is entered again, and
    /// does so before it looks at `immediate_exit`: after [`RunOutcome::Kicked`] the registers are
    /// whole even on processors that advance the instruction pointer late.
    pub fn run(&mut self) -> Result<RunOutcome<'_>, KvmError> {
        match self.fd.run() {
            Ok(exit) => Ok(RunOutcome::Exit(exit)),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Ok(RunOutcome::Kicked),
            Err(error) => Err(failed("KVM_RUN")(error)),
        }
    }

    /// What `KVM_EXIT_INTERNAL_ERROR` or a failed entry left behind, in words: the kernel's suberror,
    /// the instruction pointer and, where known, the instruction bytes.
    pub fn describe_failure(&mut self, what: &str) -> String {
        let run = self.fd.get_kvm_run();
        // SAFETY: `internal` is plain data of the union; every bit pattern of it is valid.
        let internal = unsafe { run.__bindgen_anon_1.internal };
        let pointer = match self.fd.get_regs() {
            Ok(regs) => format!("rip {:#x}", regs.rip),
            Err(error) => format!("rip unknown ({error})"),
        };
        let data: Vec<String> = internal.data[..(internal.ndata as usize).min(internal.data.len())]
            .iter()
            .map(|word| format!("{word:#x}"))
            .collect();
        let detail = if data.is_empty() { String::new() } else { format!(", data [{}]", data.join(", ")) };
        format!("vCPU {}: {what}, suberror {}, {pointer}{detail}", self.index, internal.suberror)
    }
}

impl Kicker {
    /// Tells the kicker that the calling thread runs the vCPU from now on.
    pub fn attach_current_thread(&self) {
        // SAFETY: gettid has no preconditions.
        self.thread.store(unsafe { libc::gettid() }, Ordering::Release);
    }

    /// Makes the vCPU leave the guest, now or when it next would enter.
    ///
    /// The flag comes first: a signal that arrives just before `KVM_RUN` is then not lost.
    pub fn kick(&self) {
        self.flag().store(1, Ordering::SeqCst);
        let thread = self.thread.load(Ordering::Acquire);
        if thread != 0 {
            // SAFETY: tgkill of a thread of this process; the handler does nothing.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, KICK_SIGNAL) };
        }
    }

    /// Lets the vCPU enter the guest again.
    pub fn clear(&self) {
        self.flag().store(0, Ordering::SeqCst);
    }

    fn flag(&self) -> &AtomicU8 {
        // SAFETY: see `Send`; a byte has no alignment.
        unsafe { &*self.immediate_exit }
    }
}

/// Installs the kick signal's empty handler; once per process, inherited by forks.
pub fn install_kick_handler() -> io::Result<()> {
    extern "C" fn ignore(_: i32) {}
    // SAFETY: a zeroed sigaction is valid; the handler is async-signal-safe because it does nothing.
    // SA_RESTART is left out so that KVM_RUN returns.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = ignore as extern "C" fn(i32) as usize;
        libc::sigaction(KICK_SIGNAL, &raw const action, std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
