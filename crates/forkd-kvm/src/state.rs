//! Everything that makes a vCPU and the interrupt chips what they are, as plain data.
//!
//! A copy made by `fork(2)` restores from these structs directly; a snapshot serialises them.

use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use serde::{Deserialize, Serialize};

use crate::{Kvm, KvmError, Vcpu, Vm, cpuid, failed};

/// Time-stamp counter.
const MSR_TSC: u32 = 0x10;
/// Arms the local APIC's timer; must follow the LAPIC, whose restore clears it (an idle vCPU would
/// then sleep for ever).
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// The most registers that one call reads or writes (`MAX_IO_MSRS` in the kernel).
const MSR_BATCH: usize = 256;

/// The state of one vCPU.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VcpuState {
    /// What the guest was told about its processor.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// General registers.
    pub regs: kvm_regs,
    /// Segment and control registers.
    pub sregs: kvm_sregs,
    /// Floating-point and vector registers: the 1024 words of the XSAVE area.
    pub xsave: Vec<u32>,
    /// Extended control registers; absent on a processor without XSAVE.
    pub xcrs: Option<kvm_xcrs>,
    /// Debug registers.
    pub debug_regs: kvm_debugregs,
    /// Local APIC.
    pub lapic: kvm_lapic_state,
    /// Model-specific registers, in restore order.
    pub msrs: Vec<kvm_msr_entry>,
    /// Pending exceptions and interrupts.
    pub events: kvm_vcpu_events,
    /// Running, halted, or waiting to be started.
    pub mp_state: kvm_mp_state,
    /// Frequency of the time-stamp counter in kHz; 0 where KVM cannot tell.
    pub tsc_khz: u32,
}

/// The state of the chips that all vCPUs share.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ChipState {
    /// First 8259.
    pub pic_primary: kvm_irqchip,
    /// Second 8259.
    pub pic_secondary: kvm_irqchip,
    /// I/O APIC.
    pub ioapic: kvm_irqchip,
    /// kvm-clock in nanoseconds.
    pub clock_ns: u64,
}

/// Sorts register numbers into restore order: the counter first, its deadline last.
pub(crate) fn restore_order(all: &[u32]) -> Vec<u32> {
    let mut indices = all.to_vec();
    indices.sort_by_key(|index| match *index {
        MSR_TSC => 0,
        MSR_TSC_DEADLINE => 2,
        _ => 1,
    });
    indices
}

/// The fixed-size area that KVM takes; a state from a file may claim any length.
fn xsave_area(words: &[u32]) -> Result<[u32; 1024], KvmError> {
    words
        .try_into()
        .map_err(|_| KvmError::Incompatible(format!("its XSAVE area has {} words instead of 1024", words.len())))
}

impl Vcpu {
    /// Gives a fresh vCPU its CPUID.
    pub fn set_cpuid(&self, entries: &[kvm_cpuid_entry2]) -> Result<(), KvmError> {
        self.fd.set_cpuid2(&cpuid::container(entries)?).map_err(failed("KVM_SET_CPUID2"))
    }

    /// Reads the general registers.
    pub fn regs(&self) -> Result<kvm_regs, KvmError> {
        self.fd.get_regs().map_err(failed("KVM_GET_REGS"))
    }

    /// Sets the general registers.
    pub fn set_regs(&self, regs: &kvm_regs) -> Result<(), KvmError> {
        self.fd.set_regs(regs).map_err(failed("KVM_SET_REGS"))
    }

    /// Reads the segment and control registers.
    pub fn sregs(&self) -> Result<kvm_sregs, KvmError> {
        self.fd.get_sregs().map_err(failed("KVM_GET_SREGS"))
    }

    /// Sets the segment and control registers.
    pub fn set_sregs(&self, sregs: &kvm_sregs) -> Result<(), KvmError> {
        self.fd.set_sregs(sregs).map_err(failed("KVM_SET_SREGS"))
    }

    /// Reads everything. The vCPU must have left the guest by a kick, so that its registers are
    /// whole.
    pub fn save(&self, kvm: &Kvm, cpuid: &[kvm_cpuid_entry2]) -> Result<VcpuState, KvmError> {
        // The order is the kernel's: the MP state first, because reading it may move pending INIT
        // and SIPI events into it, and events after registers that reading may change.
        let mp_state = self.fd.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?;
        Ok(VcpuState {
            cpuid: cpuid.to_vec(),
            mp_state,
            regs: self.regs()?,
            sregs: self.sregs()?,
            xsave: self.fd.get_xsave().map_err(failed("KVM_GET_XSAVE"))?.region.to_vec(),
            xcrs: kvm.xcrs.then(|| self.fd.get_xcrs()).transpose().map_err(failed("KVM_GET_XCRS"))?,
            debug_regs: self.fd.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?,
            lapic: self.fd.get_lapic().map_err(failed("KVM_GET_LAPIC"))?,
            msrs: self.read_msrs(&kvm.msr_indices)?,
            events: self.fd.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?,
            tsc_khz: self.fd.get_tsc_khz().unwrap_or(0),
        })
    }

    /// Puts `state` into a fresh vCPU.
    pub fn restore(&self, state: &VcpuState) -> Result<(), KvmError> {
        self.set_cpuid(&state.cpuid)?;
        self.match_tsc(state.tsc_khz)?;
        self.fd.set_mp_state(state.mp_state).map_err(failed("KVM_SET_MP_STATE"))?;
        self.set_regs(&state.regs)?;
        self.set_sregs(&state.sregs)?;
        let xsave = kvm_xsave { region: xsave_area(&state.xsave)?, ..Default::default() };
        // SAFETY: AMX is masked from every guest's CPUID, so the state fits the 4 KiB area.
        unsafe { self.fd.set_xsave(&xsave) }.map_err(failed("KVM_SET_XSAVE"))?;
        if let Some(xcrs) = &state.xcrs {
            self.fd.set_xcrs(xcrs).map_err(failed("KVM_SET_XCRS"))?;
        }
        self.fd.set_debug_regs(&state.debug_regs).map_err(failed("KVM_SET_DEBUGREGS"))?;
        self.fd.set_lapic(&state.lapic).map_err(failed("KVM_SET_LAPIC"))?;
        self.write_msrs(&state.msrs)?;
        self.fd.set_vcpu_events(&state.events).map_err(failed("KVM_SET_VCPU_EVENTS"))
    }

    /// Tells the guest's kvm-clock that it was stopped, so that its watchdogs do not fire. A guest
    /// that uses no kvm-clock has nothing to be told.
    pub fn notify_clock_stopped(&self) {
        let _ = self.fd.kvmclock_ctrl();
    }

    /// Refuses a counter frequency that this host cannot give.
    fn match_tsc(&self, khz: u32) -> Result<(), KvmError> {
        let host = self.fd.get_tsc_khz().unwrap_or(0);
        // KVM itself takes frequencies within 250 ppm for the same.
        if khz == 0 || host == 0 || u64::from(khz.abs_diff(host)) * 1_000_000 <= u64::from(host) * 250 {
            return Ok(());
        }
        self.fd.set_tsc_khz(khz).map_err(|_| {
            KvmError::Incompatible(format!(
                "its time-stamp counter runs at {khz} kHz, this host's at {host} kHz, and the processor cannot scale it"
            ))
        })
    }

    /// Reads those of `indices` that exist; KVM lists some that it then refuses to read.
    fn read_msrs(&self, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, KvmError> {
        let mut values = Vec::with_capacity(indices.len());
        let mut rest = indices;
        while !rest.is_empty() {
            let wanted: Vec<_> =
                rest.iter().take(MSR_BATCH).map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
            let mut msrs = Msrs::from_entries(&wanted).expect("a batch is within the limit");
            let read = self.fd.get_msrs(&mut msrs).map_err(failed("KVM_GET_MSRS"))?;
            values.extend_from_slice(&msrs.as_slice()[..read]);
            // The register at which it stopped short is skipped.
            rest = &rest[(read + usize::from(read < wanted.len())).min(rest.len())..];
        }
        Ok(values)
    }

    /// Writes `msrs`. Some registers can be read but not written (or only with the value they
    /// have); one that is refused is an error only if it does not hold the wanted value already.
    fn write_msrs(&self, msrs: &[kvm_msr_entry]) -> Result<(), KvmError> {
        let mut rest = msrs;
        while !rest.is_empty() {
            let batch = &rest[..rest.len().min(MSR_BATCH)];
            let entries = Msrs::from_entries(batch).expect("a batch is within the limit");
            let written = self.fd.set_msrs(&entries).map_err(failed("KVM_SET_MSRS"))?;
            if written < batch.len() {
                let refused = batch[written];
                let present = self.read_msrs(&[refused.index])?;
                if present.first().is_none_or(|msr| msr.data != refused.data) {
                    return Err(KvmError::Incompatible(format!(
                        "model-specific register {:#x} does not take the value {:#x}",
                        refused.index, refused.data
                    )));
                }
            }
            rest = &rest[(written + usize::from(written < batch.len())).min(rest.len())..];
        }
        Ok(())
    }
}

impl VcpuState {
    /// Drops registers that a fresh vCPU with the same CPUID already holds with the same value.
    ///
    /// A zygote does this once, so that each of its children writes tens instead of hundreds.
    pub fn drop_default_msrs(&mut self, kvm: &Kvm, vm: &Vm, index: u8) -> Result<(), KvmError> {
        let fresh = Vcpu::new(kvm, vm, index)?;
        fresh.set_cpuid(&self.cpuid)?;
        let defaults = fresh.read_msrs(&kvm.msr_indices)?;
        self.msrs
            .retain(|msr| msr.index == MSR_TSC || !defaults.iter().any(|d| d.index == msr.index && d.data == msr.data));
        Ok(())
    }

    /// The first vCPU of a machine that starts at `regs` and `sregs`, everything else as after reset.
    pub fn is_runnable(&self) -> bool {
        self.mp_state.mp_state == KVM_MP_STATE_RUNNABLE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counter_is_restored_first_and_its_deadline_last() {
        assert_eq!(
            restore_order(&[0x174, MSR_TSC_DEADLINE, MSR_TSC, 0x175]),
            [MSR_TSC, 0x174, 0x175, MSR_TSC_DEADLINE]
        );
    }
}
