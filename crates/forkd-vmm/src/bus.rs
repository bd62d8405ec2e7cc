//! Where a guest's port and memory accesses go.

use std::sync::Arc;

use forkd_devices::mmio::MmioTransport;
use forkd_devices::panic::{GuestPanic, PanicPort};
use forkd_devices::serial::SerialPort;
use forkd_proto::monitor::StopReason;

use crate::address_map::{
    DEVICE_SLOTS, I8042_COMMAND_PORT, I8042_RESET, PANIC_PORT, RESET_PORT, RESET_VALUE, SERIAL_PORT, SERIAL_PORTS,
    SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT, mmio_slot,
};
use crate::wake::Wake;

/// Sleep control register: `SLP_EN`, with the type for soft-off in bits 2 to 4.
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_OFF: u8 = 5 << 2;

/// Everything a vCPU can reach besides memory.
pub struct Bus {
    /// virtio devices by slot.
    pub slots: [Option<Arc<MmioTransport>>; DEVICE_SLOTS],
    /// COM1.
    pub serial: SerialPort,
    panic: PanicPort,
    wake: Arc<Wake>,
}

impl Bus {
    /// A bus with these devices on it.
    pub fn new(slots: [Option<Arc<MmioTransport>>; DEVICE_SLOTS], serial: SerialPort, wake: Arc<Wake>) -> Self {
        Self { slots, serial, panic: PanicPort, wake }
    }

    /// The guest reads memory that is not RAM; what nobody answers reads as all ones.
    pub fn memory_read(&self, address: u64, data: &mut [u8]) {
        match mmio_slot(address).and_then(|(slot, offset)| Some((self.slots[slot].as_ref()?, offset))) {
            Some((transport, offset)) => transport.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// The guest writes memory that is not RAM.
    pub fn memory_write(&self, address: u64, data: &[u8]) {
        let Some((slot, offset)) = mmio_slot(address) else { return };
        if let Some(queue) = self.slots[slot].as_ref().and_then(|transport| transport.write(offset, data)) {
            self.wake.notify(slot, queue);
        }
    }

    /// The guest reads a port.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        let value = match port {
            SERIAL_PORT.. if port < SERIAL_PORT + SERIAL_PORTS => self.serial.read((port - SERIAL_PORT) as u8),
            PANIC_PORT => self.panic.read(),
            SLEEP_STATUS_PORT | SLEEP_CONTROL_PORT => 0,
            _ => return,
        };
        data[0] = value;
    }

    /// The guest writes a port; `Some` when that ends the machine.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Option<StopReason> {
        let value = *data.first()?;
        match port {
            SERIAL_PORT.. if port < SERIAL_PORT + SERIAL_PORTS => {
                self.serial.write((port - SERIAL_PORT) as u8, value);
                None
            }
            PANIC_PORT => matches!(self.panic.write(value), Some(GuestPanic::Panicked)).then_some(StopReason::Panicked),
            SLEEP_CONTROL_PORT if value == SLEEP_ENABLE | SLEEP_TYPE_OFF => Some(StopReason::PoweredOff),
            RESET_PORT if value == RESET_VALUE => Some(StopReason::Rebooted),
            I8042_COMMAND_PORT if value == I8042_RESET => Some(StopReason::Rebooted),
            _ => None,
        }
    }
}
