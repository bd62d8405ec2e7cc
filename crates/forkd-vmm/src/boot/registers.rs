//! The registers of the first vCPU at a kernel's entry: flat 32-bit protected mode, no paging, as
//! both the PVH and the 32-bit Linux boot protocol demand.

use forkd_kvm::{Vcpu, kvm_regs, kvm_segment};
use forkd_memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use super::image::{Entry, Protocol};
use crate::address_map::{BOOT_PARAMS, BOOT_STACK, GDT, START_INFO};

/// Selectors that the Linux boot protocol fixes (`__BOOT_CS`, `__BOOT_DS`).
pub(crate) const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;
/// Protection enable, and the bit that is always set.
const CR0_PROTECTED: u64 = 1 | 1 << 4;

/// A segment from 0 to 4 GiB (a task segment: one byte less than a page of ports).
fn segment(selector: u16, kind: u8, code_or_data: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: if code_or_data { 0xffff_ffff } else { 0x67 },
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(code_or_data),
        s: u8::from(code_or_data),
        l: 0,
        g: u8::from(code_or_data),
        ..Default::default()
    }
}

/// The descriptor-table form of a segment (Intel SDM vol. 3, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = if segment.g == 1 { segment.limit >> 12 } else { segment.limit };
    let flags = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7
        | u64::from(segment.db) << 14
        | u64::from(segment.g) << 15;
    u64::from(limit & 0xffff)
        | (segment.base & 0xff_ffff) << 16
        | flags << 40
        | u64::from(limit >> 16 & 0xf) << 48
        | (segment.base >> 24 & 0xff) << 56
}

/// Points `vcpu` at `entry`.
pub(super) fn point_at(memory: &GuestMemory, vcpu: &Vcpu, entry: &Entry) -> Result<(), BootError> {
    enter_protected_mode(memory, vcpu)?;
    let mut regs = kvm_regs { rflags: 2, rip: entry.address, rsp: BOOT_STACK, rbp: BOOT_STACK, ..Default::default() };
    match entry.protocol {
        Protocol::Pvh => regs.rbx = START_INFO,
        Protocol::Linux32 => regs.rsi = BOOT_PARAMS,
    }
    vcpu.set_regs(&regs)?;
    Ok(())
}

/// Writes a descriptor table and puts `vcpu` into flat 32-bit protected mode; it has no interrupt table.
pub(crate) fn enter_protected_mode(memory: &GuestMemory, vcpu: &Vcpu) -> Result<(), BootError> {
    let code = segment(CODE_SELECTOR, 0xb, true);
    let data = segment(DATA_SELECTOR, 0x3, true);
    let task = segment(TASK_SELECTOR, 0xb, false);
    let table = [0, 0, descriptor(&code), descriptor(&data), descriptor(&task)];
    for (index, entry) in table.iter().enumerate() {
        memory.write_obj(*entry, GuestAddress(GDT + index as u64 * 8))?;
    }
    let mut sregs = vcpu.sregs()?;
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = task;
    sregs.gdt.base = GDT;
    sregs.gdt.limit = (table.len() * 8 - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PROTECTED;
    sregs.cr3 = 0;
    sregs.cr4 = 0;
    sregs.efer = 0;
    vcpu.set_sregs(&sregs)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flat_segments_have_the_well_known_descriptors() {
        assert_eq!(descriptor(&segment(CODE_SELECTOR, 0xb, true)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(DATA_SELECTOR, 0x3, true)), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&segment(TASK_SELECTOR, 0xb, false)), 0x0000_8b00_0000_0067);
    }
}
