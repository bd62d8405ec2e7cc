//! The devices of a machine and the slots they are in.
//!
//! | slot | device |
//! |---|---|
//! | 0 | vsock |
//! | 1 | entropy |
//! | 2 | balloon |
//! | 3 – 6 | disks |
//! | 7 | network |
//! | 8 – 28 | more disks |

use std::sync::Arc;

use forkd_devices::balloon::{Balloon, PageRelease};
use forkd_devices::block::{Block, SharedDisk};
use forkd_devices::mmio::MmioTransport;
use forkd_devices::net::Net;
use forkd_devices::rng::Rng;
use forkd_devices::serial::SerialPort;
use forkd_devices::vsock::Vsock;
use forkd_devices::{DeviceState, InterruptLine, VirtioDevice};
use forkd_memory::GuestRam;

use crate::address_map::{DEVICE_SLOTS, SERIAL_GSI, device_gsi};
use crate::machine::{MachineError, Resources};
use crate::state::{MachineConfig, MachineState};

const VSOCK_SLOT: usize = 0;
const ENTROPY_SLOT: usize = 1;
const BALLOON_SLOT: usize = 2;
const FIRST_DISK_SLOT: usize = 3;
const NETWORK_SLOT: usize = 7;
const MORE_DISKS_SLOT: usize = 8;
/// How many disks come before the network's slot.
const FIRST_DISKS: usize = NETWORK_SLOT - FIRST_DISK_SLOT;
/// The most disks: a root disk and as many volumes as there can be.
pub const DISK_LIMIT: usize = FIRST_DISKS + DEVICE_SLOTS - MORE_DISKS_SLOT;

const _: () = assert!(DISK_LIMIT == 1 + forkd_types::VOLUME_LIMIT);

/// What [`create`] and [`restore`] make.
pub(crate) struct DeviceSet {
    pub(crate) slots: [Option<Arc<MmioTransport>>; DEVICE_SLOTS],
    pub(crate) serial: SerialPort,
    pub(crate) disks: Vec<SharedDisk>,
}

/// Makes the interrupt line with a number.
pub(crate) type Lines<'a> = &'a dyn Fn(u32) -> Arc<dyn InterruptLine>;

/// Gives pages that the guest reports as free back to the host.
struct Release(GuestRam);

impl PageRelease for Release {
    fn release(&self, guest_addr: u64, len: u64) {
        self.0.release(guest_addr, len);
    }
}

fn device_error(device: &'static str) -> impl Fn(&dyn std::error::Error) -> MachineError {
    move |error| MachineError::Device { device, reason: crate::vcpu_thread::chain(error) }
}

/// The devices of a machine that boots.
pub(crate) fn create(
    config: &MachineConfig,
    resources: Resources,
    ram: &GuestRam,
    lines: Lines<'_>,
) -> Result<DeviceSet, MachineError> {
    if resources.disks.len() > DISK_LIMIT {
        return Err(MachineError::Disks(resources.disks.len()));
    }
    let mut slots = [const { None }; DEVICE_SLOTS];
    let mut place = |slot: usize, device: Box<dyn VirtioDevice>| {
        slots[slot] = Some(Arc::new(MmioTransport::new(device, ram.memory().clone(), lines(device_gsi(slot)))));
    };
    let vsock = Vsock::new(config.guest_cid.into(), resources.vsock).map_err(|e| device_error("vsock")(&e))?;
    place(VSOCK_SLOT, Box::new(vsock));
    place(ENTROPY_SLOT, Box::new(Rng::new()));
    place(BALLOON_SLOT, Box::new(Balloon::new(Box::new(Release(ram.clone())))));
    let mut disks = Vec::new();
    for (index, disk) in resources.disks.into_iter().enumerate() {
        let block = Block::new(disk, &disk_serial(index));
        disks.push(block.disk());
        place(disk_slot(index), Box::new(block));
    }
    if let (Some(mac), Some(tap)) = (config.mac, resources.tap) {
        let net = Net::new(mac, tap).map_err(|e| device_error("network")(&e))?;
        place(NETWORK_SLOT, Box::new(net));
    }
    Ok(DeviceSet { slots, serial: SerialPort::new(resources.console, lines(SERIAL_GSI)), disks })
}

/// The slot of disk `index`. Slots ascend with disks, so that a guest finds them in their order.
const fn disk_slot(index: usize) -> usize {
    match index < FIRST_DISKS {
        true => FIRST_DISK_SLOT + index,
        false => MORE_DISKS_SLOT + index - FIRST_DISKS,
    }
}

/// What a guest reads as the serial number of disk `index`.
fn disk_serial(index: usize) -> String {
    format!("forkd-disk-{index}")
}

/// The devices of a machine that goes on from `state`.
pub(crate) fn restore(
    state: &MachineState,
    resources: Resources,
    ram: &GuestRam,
    lines: Lines<'_>,
) -> Result<DeviceSet, MachineError> {
    let mut vsock_socket = Some(resources.vsock);
    let mut tap = resources.tap;
    let mut disks = Vec::new();
    let mut waiting = resources.disks.into_iter();
    let mut slots = [const { None }; DEVICE_SLOTS];
    for (slot, saved) in state.devices.iter().enumerate().take(DEVICE_SLOTS) {
        let Some(saved) = saved else { continue };
        let missing = |device: &'static str, what: &str| MachineError::Device { device, reason: format!("no {what}") };
        let device: Box<dyn VirtioDevice> = match &saved.device {
            DeviceState::Vsock(device) => {
                let socket = vsock_socket.take().ok_or_else(|| missing("vsock", "socket"))?;
                let cid = state.config.guest_cid.into();
                Box::new(Vsock::restore(device, cid, socket).map_err(|e| device_error("vsock")(&e))?)
            }
            DeviceState::Rng(device) => Box::new(Rng::restore(device)),
            DeviceState::Balloon(device) => Box::new(Balloon::restore(device, Box::new(Release(ram.clone())))),
            DeviceState::Block(device) => {
                let disk = waiting.next().ok_or_else(|| missing("block", "disk"))?;
                let block = Block::restore(device, disk);
                disks.push(block.disk());
                Box::new(block)
            }
            DeviceState::Net(device) => {
                // Where there are no networks a machine that had one goes on with its cable unplugged.
                Box::new(Net::restore(device, tap.take()).map_err(|e| device_error("network")(&e))?)
            }
        };
        let transport = MmioTransport::restore(device, ram.memory().clone(), lines(device_gsi(slot)), saved)
            .map_err(|e| device_error("virtio")(&e))?;
        slots[slot] = Some(Arc::new(transport));
    }
    let serial = SerialPort::restore(&state.serial, resources.console, lines(SERIAL_GSI))
        .map_err(|e| device_error("serial")(&e))?;
    Ok(DeviceSet { slots, serial, disks })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_disk_has_a_slot_of_its_own_in_ascending_order() {
        let slots: Vec<_> = (0..DISK_LIMIT).map(disk_slot).collect();
        assert_eq!(slots[..6], [3, 4, 5, 6, 8, 9]);
        assert!(slots.is_sorted_by(|one, next| one < next));
        assert_eq!(slots.last(), Some(&(DEVICE_SLOTS - 1)));
    }
}
