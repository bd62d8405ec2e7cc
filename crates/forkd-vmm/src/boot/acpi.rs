//! The ACPI tables: how a stock kernel learns of processors and devices.
//!
//! The platform is hardware-reduced: no PM timer, no SCI, no legacy devices besides COM1. virtio-mmio
//! devices are `LNRO0005`, the panic port is `QEMU0001`, the generation id is found by its `_CID`
//! `VM_Gen_Counter` and announced through a generic event device.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, Package, Path,
    ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use forkd_memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use crate::address_map::{
    ACPI_TABLES, ACPI_TABLES_END, EVENT_GSI, GENERATION_ID, IO_APIC, LOCAL_APIC, MMIO_SIZE, OWN_LINES, PANIC_PORT,
    RESET_PORT, RESET_VALUE, SERIAL_GSI, SERIAL_PORT, SERIAL_PORTS, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT, device_gsi,
    mmio_window,
};

const OEM: [u8; 6] = *b"FORKD ";
const OEM_TABLE: [u8; 8] = *b"FORKDVM ";
const OEM_REVISION: u32 = 1;
/// Room for the root pointer, which comes first.
const ROOT_POINTER_BYTES: u64 = 64;
/// Revision of the DSDT from which integers are 64 bits wide.
const DSDT_REVISION: u8 = 2;
/// Length of a table header, with which every DSDT starts.
const HEADER_BYTES: u32 = 36;

/// Writes all tables and returns the address of the root pointer.
pub(super) fn write(memory: &GuestMemory, slots: &[usize], vcpus: u8) -> Result<u64, BootError> {
    let mut next = ACPI_TABLES + ROOT_POINTER_BYTES;
    let mut place = |table: &dyn Aml| -> Result<u64, BootError> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let address = next;
        next = (address + bytes.len() as u64).next_multiple_of(16);
        if next > ACPI_TABLES_END {
            return Err(BootError::Tables { bytes: next - ACPI_TABLES, limit: ACPI_TABLES_END - ACPI_TABLES });
        }
        memory.write_slice(&bytes, GuestAddress(address))?;
        Ok(address)
    };
    let dsdt = place(&description(slots, vcpus))?;
    let fadt = place(&fixed_description(dsdt))?;
    let madt = place(&interrupt_description(vcpus))?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(&xsdt)?;
    let mut root_pointer = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut root_pointer);
    memory.write_slice(&root_pointer, GuestAddress(ACPI_TABLES))?;
    Ok(ACPI_TABLES)
}

/// An 8-bit I/O port.
fn port(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into())
}

fn fixed_description(dsdt: u64) -> impl Aml {
    let mut table = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    table.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    table.sleep_status_reg = port(SLEEP_STATUS_PORT);
    table.reset_reg = port(RESET_PORT);
    table.reset_value = RESET_VALUE;
    table.finalize()
}

fn interrupt_description(vcpus: u8) -> impl Aml {
    let mut table = MADT::new(OEM, OEM_TABLE, OEM_REVISION, LocalInterruptController::Address(LOCAL_APIC));
    for id in 0..vcpus {
        table.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    table.add_structure(IoApic::new(0, IO_APIC, 0));
    table
}

/// The DSDT.
fn description(slots: &[usize], vcpus: u8) -> impl Aml {
    let mut body = Vec::new();
    for id in 0..vcpus {
        processor(id, &mut body);
    }
    for &slot in slots {
        virtio(slot, &mut body);
    }
    serial(&mut body);
    panic_port(&mut body);
    generation_id(&mut body);
    event_device(&mut body);
    let mut scope = Scope::raw(Path::new("\\_SB_"), body);
    // Soft-off: the value that goes into the sleep control register.
    let (five, zero) = (5u8, 0u8);
    Name::new(Path::new("\\_S5_"), &Package::new(vec![&five, &zero, &zero, &zero])).to_aml_bytes(&mut scope);
    let mut table = Sdt::new(*b"DSDT", HEADER_BYTES, DSDT_REVISION, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&scope);
    table.update_checksum();
    table
}

fn processor(id: u8, body: &mut Vec<u8>) {
    Device::new(
        format!("C{id:03}").as_str().into(),
        vec![&Name::new("_HID".into(), &"ACPI0007"), &Name::new("_UID".into(), &id)],
    )
    .to_aml_bytes(body);
}

fn virtio(slot: usize, body: &mut Vec<u8>) {
    Device::new(
        format!("V{slot:03}").as_str().into(),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &(slot as u8)),
            &Name::new("_CCA".into(), &1u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, mmio_window(slot) as u32, MMIO_SIZE as u32),
                    &Interrupt::new(true, true, false, slot >= OWN_LINES, device_gsi(slot)),
                ]),
            ),
        ],
    )
    .to_aml_bytes(body);
}

fn serial(body: &mut Vec<u8>) {
    Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &0u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Interrupt::new(true, true, false, false, SERIAL_GSI),
                    &IO::new(SERIAL_PORT, SERIAL_PORT, 0, SERIAL_PORTS as u8),
                ]),
            ),
        ],
    )
    .to_aml_bytes(body);
}

fn panic_port(body: &mut Vec<u8>) {
    Device::new(
        "PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&IO::new(PANIC_PORT, PANIC_PORT, 1, 1)])),
        ],
    )
    .to_aml_bytes(body);
}

fn generation_id(body: &mut Vec<u8>) {
    let (low, high) = (GENERATION_ID as u32, (GENERATION_ID >> 32) as u32);
    Device::new(
        "VGEN".into(),
        vec![
            &Name::new("_HID".into(), &"FORK0001"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("ADDR".into(), &Package::new(vec![&low, &high])),
        ],
    )
    .to_aml_bytes(body);
}

/// Interrupts the guest when its generation changes.
fn event_device(body: &mut Vec<u8>) {
    let changed = 0x80u8;
    let generation = Path::new("\\_SB_.VGEN");
    let line = EVENT_GSI as u8;
    Device::new(
        "GEDV".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &0u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Interrupt::new(true, true, false, false, EVENT_GSI)]),
            ),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![&If::new(&Equal::new(&Arg(0), &line), vec![&Notify::new(&generation, &changed)])],
            ),
        ],
    )
    .to_aml_bytes(body);
}
