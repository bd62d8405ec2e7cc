//! Putting a kernel into memory and a vCPU at its entry.
//!
//! An uncompressed `vmlinux` is entered through its PVH note, a bzImage through the 32-bit entry of
//! the Linux boot protocol. Both begin in flat 32-bit protected mode without paging, so that the
//! only difference is the structure that one register points to.

mod acpi;
mod command_line;
mod image;
mod memory_map;
mod registers;

use std::fs::File;

use forkd_kvm::Vcpu;
use forkd_memory::{GuestRam, MemoryLayout};
use vm_memory::{Bytes, GuestAddress};

pub use image::BootError;
pub(crate) use registers::{CODE_SELECTOR, enter_protected_mode};

use crate::address_map::{COMMAND_LINE, COMMAND_LINE_BYTES};

/// What is booted.
#[derive(Debug)]
pub struct BootSource {
    /// ELF `vmlinux` or bzImage.
    pub kernel: File,
    /// Initial RAM file system.
    pub initramfs: Option<File>,
    /// Added to what the machine itself needs.
    pub kernel_args: String,
}

/// Loads everything and points `vcpu`, the first, at the kernel's entry. `slots` are the occupied
/// device slots.
pub fn load(
    source: BootSource,
    ram: &GuestRam,
    slots: &[usize],
    vcpus: u8,
    has_disk: bool,
    vcpu: &Vcpu,
) -> Result<(), BootError> {
    let layout: MemoryLayout = ram.layout();
    let memory = ram.memory();
    let root_pointer = acpi::write(memory, slots, vcpus)?;
    let command_line = command_line::compose(&source.kernel_args, has_disk);
    if command_line.len() >= COMMAND_LINE_BYTES {
        return Err(BootError::CommandLine { bytes: command_line.len(), limit: COMMAND_LINE_BYTES - 1 });
    }
    memory.write_slice(&[command_line.as_bytes(), &[0]].concat(), GuestAddress(COMMAND_LINE))?;
    let initramfs = source.initramfs.map(|file| image::load_initramfs(memory, layout, file)).transpose()?;
    let entry = image::load_kernel(memory, layout, source.kernel, root_pointer, initramfs)?;
    registers::point_at(memory, vcpu, &entry)?;
    Ok(())
}
