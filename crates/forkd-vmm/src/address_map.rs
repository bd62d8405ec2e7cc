//! Where everything is: guest-physical addresses, interrupt lines and I/O ports.
//!
//! These numbers are part of every snapshot: a restored guest expects its devices where it found
//! them. They change only together with [`crate::state::CURRENT`]; slots may be added behind the last.

/// How many virtio devices there can be.
pub const DEVICE_SLOTS: usize = 29;
/// How many of them, the first, have an interrupt line of their own.
pub const OWN_LINES: usize = 8;
/// Queues a device can have.
pub const QUEUES_PER_DEVICE: usize = 8;

/// Register window of the device in slot 0; the others follow.
pub const MMIO_BASE: u64 = 0xd000_0000;
/// Distance between register windows.
pub const MMIO_STRIDE: u64 = 0x1000;
/// Size of a register window.
pub const MMIO_SIZE: u64 = 0x200;

/// Interrupt line of the device in slot 0; those of the next [`OWN_LINES`] follow.
pub const DEVICE_GSI: u32 = 5;
/// Interrupt line of COM1, fixed by the PC.
pub const SERIAL_GSI: u32 = 4;
/// Interrupt line of the generic event device, which announces a new generation.
pub const EVENT_GSI: u32 = 16;
/// The first of the lines that the devices in the other slots share, up to the I/O APIC's last.
const SHARED_GSI: u32 = 17;
/// How many lines the I/O APIC has.
const LINES: u32 = 24;

/// First port of COM1.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Number of ports of COM1.
pub const SERIAL_PORTS: u16 = 8;
/// pvpanic.
pub const PANIC_PORT: u16 = 0x505;
/// ACPI sleep control register.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI sleep status register.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// ACPI reset register.
pub const RESET_PORT: u16 = 0x602;
/// Value the guest writes there.
pub const RESET_VALUE: u8 = 1;
/// The 8042's command port; its "pulse reset" command is how older kernels reboot.
pub const I8042_COMMAND_PORT: u16 = 0x64;
/// "Pulse reset line".
pub const I8042_RESET: u8 = 0xfe;

/// Global descriptor table of the boot protocol.
pub const GDT: u64 = 0x500;
/// PVH start information.
pub const START_INFO: u64 = 0x6000;
/// PVH memory map.
pub const MEMORY_MAP: u64 = 0x6100;
/// PVH module list (the initramfs).
pub const MODULE_LIST: u64 = 0x6800;
/// Boot parameters of the Linux boot protocol.
pub const BOOT_PARAMS: u64 = 0x7000;
/// Initial stack of the Linux boot protocol.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Kernel command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// The longest command line, its end marker included.
pub const COMMAND_LINE_BYTES: usize = 2048;
/// End of conventional memory.
pub const CONVENTIONAL_END: u64 = 0x9_fc00;
/// ACPI tables, root pointer first.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// End of the room for ACPI tables.
pub const ACPI_TABLES_END: u64 = 0xf_0000;
/// Page that holds the generation id.
pub const GENERATION_ID: u64 = 0xf_0000;
/// First address that is ordinary memory again.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// Local APICs.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// I/O APIC.
pub const IO_APIC: u32 = 0xfec0_0000;

/// Register window of slot `slot`.
pub const fn mmio_window(slot: usize) -> u64 {
    MMIO_BASE + slot as u64 * MMIO_STRIDE
}

/// Interrupt line of slot `slot`.
///
/// Devices on a shared line lose none of each other's interrupts although it is edge triggered: one thread serves
/// all of them and pulses their lines, and a guest asks every device on a line at each edge.
pub const fn device_gsi(slot: usize) -> u32 {
    match slot < OWN_LINES {
        true => DEVICE_GSI + slot as u32,
        false => SHARED_GSI + (slot - OWN_LINES) as u32 % (LINES - SHARED_GSI),
    }
}

/// Slot and offset of a guest-physical address within the register windows.
pub fn mmio_slot(address: u64) -> Option<(usize, u64)> {
    let distance = address.checked_sub(MMIO_BASE)?;
    let (slot, offset) = ((distance / MMIO_STRIDE) as usize, distance % MMIO_STRIDE);
    (slot < DEVICE_SLOTS && offset < MMIO_SIZE).then_some((slot, offset))
}

const _: () = {
    // Lines of devices must not reach the event device's, and all must be on the one I/O APIC.
    assert!(device_gsi(OWN_LINES - 1) < EVENT_GSI && EVENT_GSI < SHARED_GSI && SHARED_GSI < LINES);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_window_is_found_and_nothing_beside_them() {
        assert_eq!(mmio_slot(MMIO_BASE - 1), None);
        assert_eq!(mmio_slot(mmio_window(0)), Some((0, 0)));
        assert_eq!(mmio_slot(mmio_window(3) + 0x1ff), Some((3, 0x1ff)));
        assert_eq!(mmio_slot(mmio_window(3) + 0x200), None);
        assert_eq!(mmio_slot(mmio_window(DEVICE_SLOTS)), None);
        assert_eq!(mmio_slot(u64::MAX), None);
    }

    #[test]
    fn slots_of_earlier_snapshots_have_the_lines_they_had_and_others_share_those_beyond() {
        let first: Vec<_> = (0..OWN_LINES).map(device_gsi).collect();
        assert_eq!(first, [5, 6, 7, 8, 9, 10, 11, 12]);
        for slot in OWN_LINES..DEVICE_SLOTS {
            assert!((17..24).contains(&device_gsi(slot)), "slot {slot} has line {}", device_gsi(slot));
        }
    }
}
