//! What a guest is told about its processors.
//!
//! Everything that the host's KVM supports, with these exceptions: virtualisation extensions are
//! left out (a sandbox runs no machines of its own, and so has no nested state to save); AMX is left
//! out (its registers do not fit the 4 KiB XSAVE area); performance counters are left out (they
//! leak across tenants and do not survive a move). Leaf numbers and bits are from Intel's SDM vol. 2A
//! (CPUID) and AMD's APM vol. 3 appendix E.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use crate::{Kvm, KvmError};

/// Leaf 1 ECX: VMX.
const VMX: u32 = 1 << 5;
/// Leaf 1 ECX: TSC-deadline timer.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1 ECX: running under a hypervisor.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX: hyper-threading (more than one logical processor).
const HTT: u32 = 1 << 28;
/// Leaf 7.0 EDX: AMX-BF16, AMX-TILE, AMX-INT8.
const AMX: u32 = 1 << 22 | 1 << 24 | 1 << 25;
/// Leaf 7.1 EAX: AMX-FP16.
const AMX_FP16: u32 = 1 << 21;
/// Leaf 0xd.0 EAX: XTILECFG and XTILEDATA.
const XTILE: u32 = 1 << 17 | 1 << 18;
/// Leaf 0xd.1 EAX: XFD.
const XFD: u32 = 1 << 4;
/// Leaf 0x8000_0001 ECX: SVM.
const SVM: u32 = 1 << 2;

/// The CPUID of vCPU `index` of `count`.
pub fn for_vcpu(kvm: &Kvm, index: u8, count: u8) -> Vec<kvm_cpuid_entry2> {
    let mut entries: Vec<_> = kvm.supported_cpuid().iter().filter(|entry| !left_out(entry)).copied().collect();
    for entry in &mut entries {
        adapt(entry, index, count, kvm.tsc_deadline());
    }
    entries
}

/// Whole leaves that guests do not get.
fn left_out(entry: &kvm_cpuid_entry2) -> bool {
    let amx_state = entry.function == 0xd && matches!(entry.index, 17 | 18);
    matches!(entry.function, 0x1d | 0x1e | 0x8000_000a) || amx_state
}

fn adapt(entry: &mut kvm_cpuid_entry2, index: u8, count: u8, tsc_deadline: bool) {
    let id = u32::from(index);
    match (entry.function, entry.index) {
        (1, _) => {
            entry.ebx = (entry.ebx & 0xff00) | u32::from(count) << 16 | id << 24;
            entry.ecx = (entry.ecx & !(VMX | TSC_DEADLINE)) | HYPERVISOR;
            if tsc_deadline {
                entry.ecx |= TSC_DEADLINE;
            }
            entry.edx = if count > 1 { entry.edx | HTT } else { entry.edx & !HTT };
        }
        // Deterministic cache parameters: no cache is shared, one core per package each.
        (4, _) => entry.eax &= 0x3ff,
        (7, 0) => entry.edx &= !AMX,
        (7, 1) => entry.eax &= !AMX_FP16,
        // Performance monitoring.
        (0xa, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        // Extended topology: one thread a core, `count` cores in the package.
        (0xb | 0x1f, level) => {
            (entry.eax, entry.ebx, entry.ecx) = match level {
                0 => (0, 1, 1 << 8),
                1 => (u32::from(count).next_power_of_two().ilog2(), count.into(), 1 | 2 << 8),
                level => (0, 0, level),
            };
            entry.edx = id;
        }
        (0xd, 0) => entry.eax &= !XTILE,
        (0xd, 1) => entry.eax &= !XFD,
        (0x8000_0001, _) => entry.ecx &= !SVM,
        // AMD core count and extended APIC id.
        (0x8000_0008, _) => entry.ecx = (entry.ecx & !0xf0ff) | u32::from(count - 1),
        (0x8000_001e, _) => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
        _ => {}
    }
}

/// Names the feature words of `wanted` that this host's KVM does not fully support.
pub fn missing_features(kvm: &Kvm, wanted: &[kvm_cpuid_entry2]) -> Vec<String> {
    let mut missing = Vec::new();
    for (function, index, register, ignored) in FEATURE_WORDS {
        let word = |entries: &[kvm_cpuid_entry2]| {
            entries.iter().find(|e| e.function == function && e.index == index).map_or(0, |e| match register {
                'a' => e.eax,
                'b' => e.ebx,
                'c' => e.ecx,
                _ => e.edx,
            })
        };
        let lacking = word(wanted) & !word(kvm.supported_cpuid()) & !ignored;
        if lacking != 0 {
            missing.push(format!("CPUID {function:#x}.{index} e{register}x bits {lacking:#x}"));
        }
    }
    missing
}

/// Leaf, subleaf, register, and the bits that are ours and not the host's.
const FEATURE_WORDS: [(u32, u32, char, u32); 9] = [
    (1, 0, 'c', TSC_DEADLINE | HYPERVISOR),
    (1, 0, 'd', HTT),
    (7, 0, 'b', 0),
    (7, 0, 'c', 0),
    (7, 0, 'd', 0),
    (7, 1, 'a', 0),
    (0xd, 0, 'a', 0),
    (0x8000_0001, 0, 'c', 0),
    (0x8000_0001, 0, 'd', 0),
];

/// Wraps entries in KVM's own container.
pub(crate) fn container(entries: &[kvm_cpuid_entry2]) -> Result<CpuId, KvmError> {
    CpuId::from_entries(entries)
        .map_err(|_| KvmError::Incompatible(format!("{} CPUID entries are too many", entries.len())))
}
