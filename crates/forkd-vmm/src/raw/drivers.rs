//! Brings a virtio device to where a driver leaves it: features accepted, queues placed, live.

use forkd_devices::mmio::MmioTransport;

use super::guest::Failure;

/// Register offsets of virtio-mmio version 2 (virtio 1.2, 4.2.2).
mod register {
    pub(super) const DEVICE_FEATURES: u64 = 0x10;
    pub(super) const DEVICE_FEATURES_SELECT: u64 = 0x14;
    pub(super) const DRIVER_FEATURES: u64 = 0x20;
    pub(super) const DRIVER_FEATURES_SELECT: u64 = 0x24;
    pub(super) const QUEUE_SELECT: u64 = 0x30;
    pub(super) const QUEUE_SIZE_MAX: u64 = 0x34;
    pub(super) const QUEUE_SIZE: u64 = 0x38;
    pub(super) const QUEUE_READY: u64 = 0x44;
    pub(super) const STATUS: u64 = 0x70;
    pub(super) const QUEUE_DESCRIPTORS: u64 = 0x80;
    pub(super) const QUEUE_AVAILABLE: u64 = 0x90;
    pub(super) const QUEUE_USED: u64 = 0xa0;
}

/// ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK (virtio 1.2, 2.1).
const STATUS_STEPS: [u32; 4] = [1, 1 | 2, 1 | 2 | 8, 1 | 2 | 8 | 4];
/// Room for rings in memory that the tiny guest does not use; they all lie in the same zeroed pages,
/// because nothing ever moves on them.
const RINGS: u64 = 0x4_0000;

/// Drives one device to DRIVER_OK with all of its queues ready and empty.
pub(super) fn drive(transport: &MmioTransport) -> Result<(), Failure> {
    let write = |register: u64, value: u32| {
        transport.write(register, &value.to_le_bytes());
    };
    let read = |register: u64| {
        let mut value = [0; 4];
        transport.read(register, &mut value);
        u32::from_le_bytes(value)
    };
    write(register::STATUS, STATUS_STEPS[0]);
    write(register::STATUS, STATUS_STEPS[1]);
    for half in 0..2 {
        write(register::DEVICE_FEATURES_SELECT, half);
        let offered = read(register::DEVICE_FEATURES);
        write(register::DRIVER_FEATURES_SELECT, half);
        write(register::DRIVER_FEATURES, offered);
    }
    write(register::STATUS, STATUS_STEPS[2]);
    for queue in 0.. {
        write(register::QUEUE_SELECT, queue);
        let size = read(register::QUEUE_SIZE_MAX);
        if size == 0 {
            break;
        }
        write(register::QUEUE_SIZE, size);
        for (low, address) in [
            (register::QUEUE_DESCRIPTORS, RINGS),
            (register::QUEUE_AVAILABLE, RINGS + 0x1_0000),
            (register::QUEUE_USED, RINGS + 0x2_0000),
        ] {
            write(low, address as u32);
            write(low + 4, (address >> 32) as u32);
        }
        write(register::QUEUE_READY, 1);
    }
    write(register::STATUS, STATUS_STEPS[3]);
    let status = read(register::STATUS);
    if status == STATUS_STEPS[3] {
        Ok(())
    } else {
        Err(format!("a device refused its driver: status {status:#x}").into())
    }
}
