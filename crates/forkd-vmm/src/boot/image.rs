//! Loading the kernel and the initramfs.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use forkd_kvm::KvmError;
use forkd_memory::layout::HOLE_START;
use forkd_memory::{GuestMemory, MemoryLayout};
use forkd_types::PAGE_SIZE;
use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::memory_map;
use crate::address_map::{
    BOOT_PARAMS, COMMAND_LINE, COMMAND_LINE_BYTES, HIGH_MEMORY, MEMORY_MAP, MODULE_LIST, START_INFO,
};

/// `XEN_HVM_START_MAGIC_VALUE`.
const START_MAGIC: u32 = 0x336e_c578;
/// Bootloader id "undefined" of the Linux boot protocol.
const LOADER_TYPE: u8 = 0xff;
/// `LOADED_HIGH`: the protected-mode kernel is at 1 MiB.
const LOADED_HIGH: u8 = 1;
/// Offset and value of the signature that a bzImage has in its setup header.
const SETUP_SIGNATURE: (u64, &[u8; 4]) = (0x202, b"HdrS");

/// Why a kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Neither an ELF image nor a bzImage.
    #[error("the kernel is neither an ELF vmlinux nor a bzImage; `forkd kernel install` fetches one that works")]
    UnknownFormat,
    /// An ELF kernel without a PVH entry.
    #[error("the ELF kernel has no PVH entry; it was built without CONFIG_PVH")]
    NoPvhEntry,
    /// The image is damaged or does not fit into memory.
    #[error("cannot load the kernel: {0}")]
    Kernel(#[source] linux_loader::loader::Error),
    /// The initramfs does not fit.
    #[error("the initramfs of {bytes} bytes does not fit into {available} bytes of guest memory; give the guest more")]
    InitramfsSize {
        /// Size of the initramfs.
        bytes: u64,
        /// Room for it.
        available: u64,
    },
    /// The command line is too long.
    #[error("the kernel command line has {bytes} bytes; {limit} is the most")]
    CommandLine {
        /// Its length.
        bytes: usize,
        /// The most.
        limit: usize,
    },
    /// A file cannot be read.
    #[error("cannot read the {what}")]
    Read {
        /// Which file.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Guest memory cannot be written.
    #[error("cannot write to guest memory")]
    Memory(#[from] GuestMemoryError),
    /// A KVM call failed.
    #[error("cannot set the boot registers")]
    Kvm(#[from] KvmError),
    /// The ACPI tables outgrew their room.
    #[error("the ACPI tables take {bytes} bytes; {limit} is the most")]
    Tables {
        /// Their size.
        bytes: u64,
        /// The most.
        limit: u64,
    },
}

/// How the kernel is entered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Protocol {
    /// `ebx` points to the PVH start information.
    Pvh,
    /// `esi` points to the boot parameters.
    Linux32,
}

/// Where the kernel is entered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Entry {
    pub(super) protocol: Protocol,
    pub(super) address: u64,
}

/// Address and size of the loaded initramfs.
pub(super) type Initramfs = (u64, u64);

/// Reads the initramfs to the end of low memory.
pub(super) fn load_initramfs(
    memory: &GuestMemory,
    layout: MemoryLayout,
    mut file: File,
) -> Result<Initramfs, BootError> {
    let read = |source| BootError::Read { what: "initramfs", source };
    let bytes = file.metadata().map_err(read)?.len();
    let low_end = layout.bytes().min(HOLE_START);
    // The kernel itself needs the first part; 64 MiB is more than any distribution's takes.
    let available = low_end - (64 << 20);
    if bytes > available {
        return Err(BootError::InitramfsSize { bytes, available });
    }
    let address = (low_end - bytes) / PAGE_SIZE * PAGE_SIZE;
    memory.read_exact_volatile_from(GuestAddress(address), &mut file, bytes as usize)?;
    Ok((address, bytes))
}

/// Loads the kernel and writes what its boot protocol wants to be told.
pub(super) fn load_kernel(
    memory: &GuestMemory,
    layout: MemoryLayout,
    mut kernel: File,
    root_pointer: u64,
    initramfs: Option<Initramfs>,
) -> Result<Entry, BootError> {
    match format(&kernel)? {
        Format::Elf => {
            let loaded =
                Elf::load(memory, None, &mut kernel, Some(GuestAddress(HIGH_MEMORY))).map_err(BootError::Kernel)?;
            let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
                return Err(BootError::NoPvhEntry);
            };
            write_start_info(memory, layout, root_pointer, initramfs)?;
            Ok(Entry { protocol: Protocol::Pvh, address: entry.0 })
        }
        Format::BzImage => {
            let loaded =
                BzImage::load(memory, None, &mut kernel, Some(GuestAddress(HIGH_MEMORY))).map_err(BootError::Kernel)?;
            let header = loaded.setup_header.ok_or(BootError::UnknownFormat)?;
            write_boot_params(memory, layout, header, root_pointer, initramfs)?;
            Ok(Entry { protocol: Protocol::Linux32, address: loaded.kernel_load.0 })
        }
    }
}

enum Format {
    Elf,
    BzImage,
}

fn format(kernel: &File) -> Result<Format, BootError> {
    let mut magic = [0; 4];
    let mut holds = |offset, expected: &[u8]| kernel.read_exact_at(&mut magic, offset).is_ok() && magic == expected;
    if holds(0, b"\x7fELF") {
        Ok(Format::Elf)
    } else if holds(SETUP_SIGNATURE.0, SETUP_SIGNATURE.1) {
        Ok(Format::BzImage)
    } else {
        Err(BootError::UnknownFormat)
    }
}

fn write_start_info(
    memory: &GuestMemory,
    layout: MemoryLayout,
    root_pointer: u64,
    initramfs: Option<Initramfs>,
) -> Result<(), BootError> {
    let ranges = memory_map::ranges(layout);
    for (index, &(addr, size, type_)) in ranges.iter().enumerate() {
        let entry = hvm_memmap_table_entry { addr, size, type_, reserved: 0 };
        memory.write_obj(entry, GuestAddress(MEMORY_MAP + (index * size_of_val(&entry)) as u64))?;
    }
    if let Some((paddr, size)) = initramfs {
        let entry = hvm_modlist_entry { paddr, size, cmdline_paddr: 0, reserved: 0 };
        memory.write_obj(entry, GuestAddress(MODULE_LIST))?;
    }
    let info = hvm_start_info {
        magic: START_MAGIC,
        version: 1,
        flags: 0,
        nr_modules: u32::from(initramfs.is_some()),
        modlist_paddr: MODULE_LIST,
        cmdline_paddr: COMMAND_LINE,
        rsdp_paddr: root_pointer,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: ranges.len() as u32,
        reserved: 0,
    };
    Ok(memory.write_obj(info, GuestAddress(START_INFO))?)
}

fn write_boot_params(
    memory: &GuestMemory,
    layout: MemoryLayout,
    header: setup_header,
    root_pointer: u64,
    initramfs: Option<Initramfs>,
) -> Result<(), BootError> {
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: root_pointer, ..Default::default() };
    params.hdr.type_of_loader = LOADER_TYPE;
    params.hdr.loadflags |= LOADED_HIGH;
    params.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    params.hdr.cmdline_size = COMMAND_LINE_BYTES as u32 - 1;
    if let Some((address, bytes)) = initramfs {
        params.hdr.ramdisk_image = address as u32;
        params.hdr.ramdisk_size = bytes as u32;
    }
    let ranges = memory_map::ranges(layout);
    params.e820_entries = ranges.len() as u8;
    for (entry, (addr, size, kind)) in params.e820_table.iter_mut().zip(ranges) {
        *entry = boot_e820_entry { addr, size, r#type: kind };
    }
    Ok(memory.write_obj(params, GuestAddress(BOOT_PARAMS))?)
}
