//! What a guest is told about its processors.
//!
//! Everything that the host's KVM supports, with these exceptions: virtualisation extensions are
//! left out (a sandbox runs no machines of its own, and so has no nested state to save); AMX is left
//! out (its registers do not fit the 4 KiB XSAVE area); performance counters are left out (they
//! leak across tenants and do not survive a move). How many processors there are and how they are
//! arranged is told of the guest's own, never of the host's. Leaf numbers and bits are from Intel's
//! SDM vol. 2A (CPUID) and AMD's APM vol. 3 appendix E.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use crate::{Kvm, KvmError};

/// Leaf 1 ECX: VMX.
const VMX: u32 = 1 << 5;
/// Leaf 1 ECX: TSC-deadline timer.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1 ECX: running under a hypervisor.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX: more than one logical processor in the package.
const HTT: u32 = 1 << 28;
/// Leaf 7.0 EDX: AMX-BF16, AMX-TILE, AMX-INT8.
const AMX: u32 = 1 << 22 | 1 << 24 | 1 << 25;
/// Leaf 7.1 EAX: AMX-FP16.
const AMX_FP16: u32 = 1 << 21;
/// Leaf 0xd.0 EAX: XTILECFG and XTILEDATA.
const XTILE: u32 = 1 << 17 | 1 << 18;
/// Leaf 0xd.1 EAX: XFD.
const XFD: u32 = 1 << 4;
/// Leaf 0x8000_0001 ECX: AMD's [`HTT`] means cores, not threads.
const CMP_LEGACY: u32 = 1 << 1;
/// Leaf 0x8000_0001 ECX: SVM.
const SVM: u32 = 1 << 2;
/// Leaf 0 EBX of `AuthenticAMD` and `HygonGenuine`, the vendors whose processors have [`CMP_LEGACY`].
const AMD_VENDORS: [u32; 2] = [u32::from_le_bytes(*b"Auth"), u32::from_le_bytes(*b"Hygo")];

/// What a guest is told about itself and not about the host.
#[derive(Clone, Copy)]
struct Own {
    /// Which vCPU.
    index: u8,
    /// How many there are.
    count: u8,
    /// Whether KVM emulates the timer.
    tsc_deadline: bool,
    /// Whether the processor is one of [`AMD_VENDORS`].
    amd: bool,
}

/// The CPUID of vCPU `index` of `count`.
pub fn for_vcpu(kvm: &Kvm, index: u8, count: u8) -> Vec<kvm_cpuid_entry2> {
    adapted(kvm.supported_cpuid(), index, count, kvm.tsc_deadline())
}

/// What a vCPU is told where KVM supports `supported`.
fn adapted(supported: &[kvm_cpuid_entry2], index: u8, count: u8, tsc_deadline: bool) -> Vec<kvm_cpuid_entry2> {
    let amd = supported.iter().any(|entry| entry.function == 0 && AMD_VENDORS.contains(&entry.ebx));
    let own = Own { index, count, tsc_deadline, amd };
    let mut entries: Vec<_> = supported.iter().filter(|entry| !left_out(entry)).copied().collect();
    for entry in &mut entries {
        adapt(entry, own);
    }
    entries
}

/// `word` with `bit` set or cleared.
fn with_bit(word: u32, bit: u32, set: bool) -> u32 {
    if set { word | bit } else { word & !bit }
}

/// Whole leaves that guests do not get.
fn left_out(entry: &kvm_cpuid_entry2) -> bool {
    let amx_state = entry.function == 0xd && matches!(entry.index, 17 | 18);
    matches!(entry.function, 0x1d | 0x1e | 0x8000_000a) || amx_state
}

fn adapt(entry: &mut kvm_cpuid_entry2, own: Own) {
    let Own { index, count, tsc_deadline, amd } = own;
    let id = u32::from(index);
    match (entry.function, entry.index) {
        (1, _) => {
            entry.ebx = (entry.ebx & 0xff00) | u32::from(count) << 16 | id << 24;
            entry.ecx = with_bit(entry.ecx & !VMX, TSC_DEADLINE, tsc_deadline) | HYPERVISOR;
            entry.edx = with_bit(entry.edx, HTT, count > 1);
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
        (0x8000_0001, _) => entry.ecx = with_bit(entry.ecx & !SVM, CMP_LEGACY, amd && count > 1),
        // AMD core count and extended APIC id.
        (0x8000_0008, _) => entry.ecx = (entry.ecx & !0xf0ff) | u32::from(count - 1),
        (0x8000_001e, _) => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
        _ => {}
    }
}

/// Names the feature words of `wanted` that this host's KVM does not fully support.
pub fn missing_features(kvm: &Kvm, wanted: &[kvm_cpuid_entry2]) -> Vec<String> {
    lacking(kvm.supported_cpuid(), wanted)
}

fn lacking(supported: &[kvm_cpuid_entry2], wanted: &[kvm_cpuid_entry2]) -> Vec<String> {
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
        let bits = word(wanted) & !word(supported) & !ignored;
        if bits != 0 {
            missing.push(format!("CPUID {function:#x}.{index} e{register}x bits {bits:#x}"));
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
    (0x8000_0001, 0, 'c', CMP_LEGACY),
    (0x8000_0001, 0, 'd', 0),
];

/// Wraps entries in KVM's own container.
pub(crate) fn container(entries: &[kvm_cpuid_entry2]) -> Result<CpuId, KvmError> {
    CpuId::from_entries(entries)
        .map_err(|_| KvmError::Incompatible(format!("{} CPUID entries are too many", entries.len())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, ecx: u32, edx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, ecx, edx, ..Default::default() }
    }

    /// A host with as many processors as its topology bits say.
    fn host(vendor: &[u8; 4], edx: u32, extended_ecx: u32) -> Vec<kvm_cpuid_entry2> {
        let vendor = kvm_cpuid_entry2 { ebx: u32::from_le_bytes(*vendor), ..Default::default() };
        vec![vendor, entry(1, 0, edx), entry(0x8000_0001, extended_ecx, 0)]
    }

    fn topology(entries: &[kvm_cpuid_entry2]) -> (bool, bool) {
        (entries[1].edx & HTT != 0, entries[2].ecx & CMP_LEGACY != 0)
    }

    #[test]
    fn topology_bits_are_the_guests_own_whatever_the_host_has() {
        for (edx, ecx) in [(0, 0), (HTT, CMP_LEGACY)] {
            assert_eq!(topology(&adapted(&host(b"Auth", edx, ecx), 0, 1, false)), (false, false));
            assert_eq!(topology(&adapted(&host(b"Auth", edx, ecx), 0, 2, false)), (true, true));
            assert_eq!(topology(&adapted(&host(b"Hygo", edx, ecx), 1, 8, false)), (true, true));
            assert_eq!(topology(&adapted(&host(b"Genu", edx, ecx), 0, 2, false)), (true, false));
        }
    }

    #[test]
    fn a_host_with_fewer_processors_lacks_nothing_but_one_without_a_feature_does() {
        const SSE2: u32 = 1 << 26;
        let many = host(b"Auth", HTT | SSE2, CMP_LEGACY | 1);
        assert_eq!(lacking(&host(b"Auth", SSE2, 1), &many), Vec::<String>::new());
        assert_eq!(
            lacking(&host(b"Auth", 0, 0), &many),
            ["CPUID 0x1.0 edx bits 0x4000000", "CPUID 0x80000001.0 ecx bits 0x1"]
        );
    }
}
