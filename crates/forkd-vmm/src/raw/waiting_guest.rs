//! The guest that runs while it is copied: it waits for an interrupt, as an idle Linux does.
//!
//! What wakes it is what tells Linux that it was copied: the event device, whose line a copy's monitor
//! raises after it has renewed the generation id. The source, which nobody tells anything, sleeps on; so a
//! newline on a console says that a *copy's* guest has run.

use forkd_kvm::{Vcpu, kvm_regs};
use forkd_memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use super::guest::Failure;
use crate::address_map::{BOOT_STACK, EVENT_GSI, IO_APIC, LOCAL_APIC};
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
const REDIRECTION: u32 = 0x10 + 2 * EVENT_GSI;

/// 32-bit code: route the event device's line to [`VECTOR`], print a newline on COM1, sleep for ever.
fn program() -> Vec<u8> {
    [
        &[0xb0, 0xff][..],                     // mov al, 0xff
        &[0xe6, 0x21, 0xe6, 0xa1],             // out 0x21, al; out 0xa1, al: mask both 8259s
        &store(LOCAL_APIC + 0xf0, 0x1ff),      // switch the local APIC on
        &store(IO_APIC, REDIRECTION + 1),      // select the entry's upper half:
        &store(IO_APIC + 0x10, 0),             // to the first vCPU
        &store(IO_APIC, REDIRECTION),          // and its lower half:
        &store(IO_APIC + 0x10, VECTOR.into()), // fixed, edge, not masked
        &PRINT_NEWLINE,
        &SLEEP,
    ]
    .concat()
}

/// Increment the byte at 0x3000 (a write fault on a shared page), print a newline, end the interrupt, and
/// sleep for ever. It does not return: there is nothing to go back to, and KVM's instruction emulator, which
/// runs all of this where there is no hardware support, has no `iret` for protected mode.
fn handler() -> Vec<u8> {
    [
        &[0xfe, 0x05, 0x00, 0x30, 0x00, 0x00][..], // inc byte [0x3000]
        &PRINT_NEWLINE,
        &store(LOCAL_APIC + 0xb0, 0),    // end of interrupt
        &[0xbc, 0xf0, 0x8f, 0x00, 0x00], // mov esp, 0x8ff0
        &SLEEP,
    ]
    .concat()
}

/// `mov edx, 0x3f8; mov al, '\n'; out dx, al`
pub(super) const PRINT_NEWLINE: [u8; 8] = [0xba, 0xf8, 0x03, 0x00, 0x00, 0xb0, 0x0a, 0xee];
/// `sti; hlt; jmp` back to `sti`
const SLEEP: [u8; 4] = [0xfb, 0xf4, 0xeb, 0xfc];

/// `mov dword [address], value`
fn store(address: u32, value: u32) -> [u8; 10] {
    let mut code = [0xc7, 0x05, 0, 0, 0, 0, 0, 0, 0, 0];
    code[2..6].copy_from_slice(&address.to_le_bytes());
    code[6..].copy_from_slice(&value.to_le_bytes());
    code
}

/// Writes the guest into `memory` and points `vcpu`, which has not run yet, at it.
pub(super) fn load(memory: &GuestMemory, vcpu: &Vcpu) -> Result<(), Failure> {
    memory.write_slice(&program(), GuestAddress(CODE))?;
    memory.write_slice(&handler(), GuestAddress(HANDLER))?;
    memory.write_obj(gate(HANDLER as u32), GuestAddress(INTERRUPT_TABLE + u64::from(VECTOR) * 8))?;
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
    }

    #[test]
    fn nothing_overlaps_and_the_stack_is_the_one_it_began_with() {
        assert!(CODE + program().len() as u64 <= HANDLER);
        assert!(HANDLER + handler().len() as u64 <= INTERRUPT_TABLE);
        let reset_stack = [&[0xbc][..], &(BOOT_STACK as u32).to_le_bytes()].concat();
        assert!(handler().windows(5).any(|code| code == reset_stack), "{:x?}", handler());
    }
}
