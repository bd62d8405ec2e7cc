//! The guest that runs while it is copied: it waits for an interrupt, as an idle Linux does.
//!
//! What wakes it is what tells Linux that it was copied: the event device, whose line a copy's monitor
//! raises after it has renewed the generation id. The source, which nobody tells anything, sleeps on; so a
//! newline on a console says that a *copy's* guest has run.

use forkd_kvm::{Vcpu, kvm_regs};
use forkd_memory::{GuestMemory, GuestRam};
use forkd_types::PAGE_SIZE;
use vm_memory::{Bytes, GuestAddress};

use super::guest::Failure;
use crate::address_map::{BOOT_STACK, EVENT_GSI, HIGH_MEMORY};
use crate::boot::{CODE_SELECTOR, enter_protected_mode};

/// Where the code is.
const CODE: u64 = 0x1000;
/// Where the interrupt table is.
const INTERRUPT_TABLE: u64 = 0x2000;
/// Where the interrupt handler is.
const HANDLER: u64 = 0x1100;
/// The vector of the event device.
const VECTOR: u8 = 0x30;
/// The I/O APIC register that holds the lower half of the event device's entry.
const REDIRECTION: u8 = 0x10 + 2 * EVENT_GSI as u8;

/// 32-bit code: route the event device's line to [`VECTOR`], print a newline on COM1, sleep for ever.
const PROGRAM: [u8; 72] = [
    0xb0, 0xff, //                                       mov  al, 0xff
    0xe6, 0x21, //                                       out  0x21, al           ; mask both 8259s
    0xe6, 0xa1, //                                       out  0xa1, al
    0xc7, 0x05, 0xf0, 0x00, 0xe0, 0xfe, 0xff, 1, 0, 0, // mov [0xfee000f0], 0x1ff ; switch the local APIC on
    0xc7, 0x05, 0x00, 0x00, 0xc0, 0xfe, REDIRECTION + 1, 0, 0, 0, // mov [0xfec00000], …
    0xc7, 0x05, 0x10, 0x00, 0xc0, 0xfe, 0, 0, 0, 0, //   mov  [0xfec00010], 0    ; to the first vCPU
    0xc7, 0x05, 0x00, 0x00, 0xc0, 0xfe, REDIRECTION, 0, 0, 0, // mov [0xfec00000], …
    0xc7, 0x05, 0x10, 0x00, 0xc0, 0xfe, VECTOR, 0, 0, 0, // mov [0xfec00010], …   ; fixed, edge, unmasked
    0xba, 0xf8, 0x03, 0x00, 0x00, //                     mov  edx, 0x3f8
    0xb0, 0x0a, //                                       mov  al, '\n'
    0xee, //                                             out  dx, al
    0xfb, //                                             sti
    0xf4, //                                             hlt
    0xeb, 0xfc, //                                       jmp  back to sti
    0x90, 0x90, 0x90, 0x90, //                           nop
];
/// Increment the byte at 0x3000 (a write fault on a shared page), print a newline, end the interrupt.
const HANDLER_PROGRAM: [u8; 25] = [
    0xfe, 0x05, 0x00, 0x30, 0x00, 0x00, //             inc  byte [0x3000]
    0xba, 0xf8, 0x03, 0x00, 0x00, //                   mov  edx, 0x3f8
    0xb0, 0x0a, //                                     mov  al, '\n'
    0xee, //                                           out  dx, al
    0xc7, 0x05, 0xb0, 0x00, 0xe0, 0xfe, 0, 0, 0, 0, // mov  [0xfee000b0], 0
    0xcf, //                                           iret
];

/// Writes the guest into `ram`, and a word into every page from 1 MiB up to the offset `private_bytes`, so
/// that those pages are private.
pub(super) fn fill(ram: &GuestRam, private_bytes: u64) -> Result<(), Failure> {
    let memory = ram.memory();
    memory.write_slice(&PROGRAM, GuestAddress(CODE))?;
    memory.write_slice(&HANDLER_PROGRAM, GuestAddress(HANDLER))?;
    memory.write_obj(gate(HANDLER as u32), GuestAddress(INTERRUPT_TABLE + u64::from(VECTOR) * 8))?;
    for region in ram.layout().regions() {
        let end = private_bytes.min(region.offset + region.bytes);
        for offset in (region.offset.max(HIGH_MEMORY)..end).step_by(PAGE_SIZE as usize) {
            memory.write_obj(offset / PAGE_SIZE, GuestAddress(region.guest_address + offset - region.offset))?;
        }
    }
    Ok(())
}

/// Points `vcpu`, which has not run yet, at the program.
pub(super) fn point_at(memory: &GuestMemory, vcpu: &Vcpu) -> Result<(), Failure> {
    enter_protected_mode(memory, vcpu)?;
    let mut sregs = vcpu.sregs()?;
    sregs.idt.base = INTERRUPT_TABLE;
    sregs.idt.limit = u16::from(VECTOR) * 8 + 7;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs { rip: CODE, rsp: BOOT_STACK, rflags: 2, ..Default::default() })?;
    Ok(())
}

/// A 32-bit interrupt gate (Intel SDM vol. 3, 6.11).
const fn gate(handler: u32) -> u64 {
    let (low, high) = (handler as u64 & 0xffff, handler as u64 >> 16);
    low | (CODE_SELECTOR as u64) << 16 | 0x8e00 << 32 | high << 48
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gate_names_its_handler_and_the_code_segment() {
        assert_eq!(gate(0x1234_5678), 0x1234_8e00_0010_5678);
        assert!(CODE + PROGRAM.len() as u64 <= HANDLER);
    }
}
