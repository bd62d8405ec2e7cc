//! Whether this host's `/dev/kvm` runs guests in hardware: decided by timing guest code.
//!
//! The device node alone says nothing. Some cloud hosts offer a KVM that opens, passes every
//! capability check and then interprets guest code at about 0.4 million instructions a second,
//! a thousand times too slow to boot Linux. So the probe runs a counted loop in a guest of seven
//! bytes and looks at the clock.

use std::time::{Duration, Instant};

use kvm_bindings::{kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// What `/dev/kvm` of this host is good for.
#[derive(Clone, PartialEq, Debug)]
pub enum KvmVerdict {
    /// Guest code runs on the processor.
    Hardware {
        /// Guest instructions per second of a tight loop.
        ips: f64,
    },
    /// Guest code is interpreted: tiny guests only.
    Emulated {
        /// Guest instructions per second of a tight loop.
        ips: f64,
    },
    /// There is no KVM that this process can use.
    Missing {
        /// Why, and what to do about it.
        reason: String,
    },
}

impl KvmVerdict {
    /// Whether Linux guests can run directly on this host.
    pub fn is_hardware(&self) -> bool {
        matches!(self, Self::Hardware { .. })
    }
}

/// Below this many instructions a second no Linux guest boots in useful time. Hardware does more
/// than 10⁸, a KVM nested in a translating QEMU still about 10⁸, an interpreter about 4·10⁵.
const HARDWARE_FLOOR_IPS: f64 = 2e7;

/// Loop counts of the attempts. The first is small enough to end within 50 ms under an interpreter,
/// which settles the matter; the later ones are large enough to hide the cost of entry and exit.
const COUNTS: [u32; 4] = [5_000, 5_000, 100_000, 400_000];

/// No attempt is started once this much time has passed.
const BUDGET: Duration = Duration::from_millis(600);

/// Two instructions per turn of the loop.
const INSTRUCTIONS_PER_TURN: f64 = 2.0;

/// 16-bit code: `dec ecx; jnz -5; hlt`, padded with a second `hlt`.
const GUEST: [u8; 7] = [0x66, 0x49, 0x75, 0xfc, 0xf4, 0xf4, 0xf4];

/// Where the guest's code lies.
const GUEST_START: GuestAddress = GuestAddress(0x1000);

/// Times guest code on this host's KVM. Takes a few milliseconds on hardware and at most about
/// half a second on an interpreter.
pub fn kvm() -> KvmVerdict {
    match Probe::new().and_then(|mut probe| probe.best_rate()) {
        Ok(ips) if ips >= HARDWARE_FLOOR_IPS => KvmVerdict::Hardware { ips },
        Ok(ips) => KvmVerdict::Emulated { ips },
        Err(reason) => KvmVerdict::Missing { reason },
    }
}

/// A VM of one vCPU that holds [`GUEST`]. Fields drop in order: vCPU, VM, then the memory it maps.
struct Probe {
    vcpu: VcpuFd,
    _vm: VmFd,
    _memory: GuestMemoryMmap,
}

impl Probe {
    fn new() -> Result<Self, String> {
        let kvm = Kvm::new().map_err(explain_open)?;
        let vm = kvm.create_vm().map_err(|error| format!("/dev/kvm refuses to create a VM: {error}"))?;
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x4000)])
            .map_err(|error| format!("cannot map 16 KiB of guest memory: {error}"))?;
        memory
            .write_slice(&GUEST, GUEST_START)
            .map_err(|error| format!("cannot write the probe's guest code: {error}"))?;
        map_into_guest(&vm, &memory)?;
        let vcpu = vm.create_vcpu(0).map_err(|error| format!("/dev/kvm refuses to create a vCPU: {error}"))?;
        let mut sregs = vcpu.get_sregs().map_err(|error| format!("cannot read the probe's registers: {error}"))?;
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        vcpu.set_sregs(&sregs).map_err(|error| format!("cannot set the probe's registers: {error}"))?;
        Ok(Self { vcpu, _vm: vm, _memory: memory })
    }

    /// The best of a few attempts, in instructions per second; noise only ever slows one down.
    fn best_rate(&mut self) -> Result<f64, String> {
        let started = Instant::now();
        let mut best: f64 = 0.0;
        for (attempt, turns) in COUNTS.into_iter().enumerate() {
            if started.elapsed() > BUDGET {
                break;
            }
            let seconds = self.time_loop(turns)?.as_secs_f64().max(1e-9);
            best = best.max(f64::from(turns) * INSTRUCTIONS_PER_TURN / seconds);
            // Entry, exit and first page faults cost well under a millisecond on hardware, so two
            // small loops far below the floor cannot be hardware having a bad moment.
            if attempt == 1 && best < HARDWARE_FLOOR_IPS / 10.0 {
                break;
            }
        }
        Ok(best)
    }

    fn time_loop(&mut self, turns: u32) -> Result<Duration, String> {
        let regs = kvm_regs { rip: GUEST_START.0, rcx: turns.into(), rflags: 2, ..Default::default() };
        self.vcpu.set_regs(&regs).map_err(|error| format!("cannot set the probe's registers: {error}"))?;
        let started = Instant::now();
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::Hlt) => return Ok(started.elapsed()),
                Ok(VcpuExit::Intr) => {}
                Err(error) if error.errno() == rustix::io::Errno::INTR.raw_os_error() => {}
                Ok(other) => return Err(format!("the probe's guest stopped with {other:?} instead of a halt")),
                Err(error) => return Err(format!("/dev/kvm cannot run a guest: {error}")),
            }
        }
    }
}

/// Gives the VM its only memory slot.
#[allow(unsafe_code)]
fn map_into_guest(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), String> {
    let region = memory.iter().next().expect("created with one range");
    let slot = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: region.start_addr().0,
        memory_size: region.len(),
        userspace_addr: memory
            .get_host_address(region.start_addr())
            .map_err(|error| format!("the probe's guest memory has no host address: {error}"))?
            as u64,
    };
    // SAFETY: the slot covers exactly one mapping, which the caller keeps alive as long as the VM
    // (see the field order of `Probe`) and which nothing else in this process reads or writes while
    // the vCPU runs. kvm-ioctls has no safe form of this call.
    unsafe { vm.set_user_memory_region(slot) }
        .map_err(|error| format!("/dev/kvm refuses 16 KiB of guest memory: {error}"))
}

fn explain_open(error: kvm_ioctls::Error) -> String {
    use rustix::io::Errno;
    match Errno::from_raw_os_error(error.errno()) {
        Errno::NOENT => "there is no /dev/kvm: the processor's virtualisation is off, absent or taken by another \
                         hypervisor, or the kvm_intel/kvm_amd module is not loaded"
            .to_owned(),
        Errno::ACCESS | Errno::PERM => {
            "this user may not open /dev/kvm; add it to the group kvm (usermod -aG kvm USER) and log in again"
                .to_owned()
        }
        Errno::NODEV | Errno::NXIO => "/dev/kvm exists but no KVM module answers it".to_owned(),
        _ => format!("cannot open /dev/kvm: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_decides_well_within_its_promise() {
        let started = Instant::now();
        let verdict = kvm();
        assert!(started.elapsed() < Duration::from_millis(1500), "{:?} for {verdict:?}", started.elapsed());
        match verdict {
            KvmVerdict::Hardware { ips } => assert!(ips >= HARDWARE_FLOOR_IPS),
            KvmVerdict::Emulated { ips } => assert!(ips > 0.0 && ips < HARDWARE_FLOOR_IPS),
            KvmVerdict::Missing { reason } => {
                assert!(std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err(), "{reason}");
            }
        }
    }

    #[test]
    fn a_refused_open_says_what_to_do() {
        assert!(explain_open(kvm_ioctls::Error::new(13)).contains("usermod -aG kvm"));
        assert!(explain_open(kvm_ioctls::Error::new(2)).contains("no /dev/kvm"));
    }
}
