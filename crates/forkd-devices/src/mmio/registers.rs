//! The registers of virtio-mmio version 2, apart from those that are answered without a lock, and
//! the device status machine.
//!
//! ```text
//! 0 ─► ACKNOWLEDGE ─► DRIVER ─► FEATURES_OK ─► DRIVER_OK      FAILED from anywhere;
//! ▲        features are written │  queues are set up │        NEEDS_RESET by the device
//! └───────────────────── status written 0 ◄──────────┴──────────────────────────────────
//! ```
//!
//! A step out of order, a feature that was not offered, a queue register written at the wrong time:
//! the write is ignored, and the driver sees that when it reads back.

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as offset;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::GuestMemory;
use crate::queue::QueueState;

/// "virt", little endian.
pub(super) const MAGIC: u32 = 0x7472_6976;
/// The version of the register layout.
pub(super) const VERSION: u32 = 2;
/// Reported as the vendor; "fork".
pub(super) const VENDOR: u32 = 0x6b72_6f66;

/// Features of every device here. `RING_RESET` is not among them: no driver for virtio-mmio uses it;
/// a queue is stopped by writing zero to its ready register.
pub(super) const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// What the transport must do after a register write, with the register lock still held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Effect {
    /// Nothing.
    None,
    /// Give the queues to the device and set DRIVER_OK.
    Activate,
    /// Take the device back to its initial state and clear all registers.
    Reset,
    /// Take the queue from the device.
    StopQueue(usize),
    /// Add these bits to the status.
    SetStatus(u32),
}

/// The registers that only vCPU threads touch.
#[derive(Clone, Debug)]
pub(super) struct Registers {
    pub(super) device_features: u64,
    pub(super) device_features_select: u32,
    pub(super) driver_features_select: u32,
    pub(super) driver_features: u64,
    pub(super) queue_select: u32,
    pub(super) queues: Vec<QueueState>,
    pub(super) max_sizes: &'static [u16],
}

impl Registers {
    pub(super) fn new(features: u64, max_sizes: &'static [u16]) -> Self {
        let mut registers = Self {
            device_features: features | TRANSPORT_FEATURES,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: Vec::new(),
            max_sizes,
        };
        registers.clear();
        registers
    }

    /// The state after a device reset.
    pub(super) fn clear(&mut self) {
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        self.queues = self.max_sizes.iter().map(|&size| QueueState { size, ..QueueState::default() }).collect();
    }

    /// Whether the driver accepted `VIRTIO_RING_F_EVENT_IDX`.
    pub(super) fn event_idx(&self) -> bool {
        self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0
    }

    /// Features that the driver accepted and that were not offered.
    pub(super) fn unknown_features(&self) -> u64 {
        self.driver_features & !self.device_features
    }

    pub(super) fn read(&self, register: u32) -> u32 {
        match register {
            offset::VIRTIO_MMIO_DEVICE_FEATURES => half(self.device_features, self.device_features_select),
            offset::VIRTIO_MMIO_QUEUE_NUM_MAX => {
                self.max_sizes.get(self.queue_select as usize).copied().unwrap_or(0).into()
            }
            offset::VIRTIO_MMIO_QUEUE_READY => self.selected().is_some_and(|queue| queue.ready).into(),
            // No shared memory regions: length and base read as all ones.
            offset::VIRTIO_MMIO_SHM_LEN_LOW
            | offset::VIRTIO_MMIO_SHM_LEN_HIGH
            | offset::VIRTIO_MMIO_SHM_BASE_LOW
            | offset::VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    pub(super) fn write(&mut self, register: u32, value: u32, status: u32, memory: &GuestMemory) -> Effect {
        match register {
            offset::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_select = value,
            offset::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_select = value,
            offset::VIRTIO_MMIO_DRIVER_FEATURES => self.write_features(value, status),
            offset::VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            offset::VIRTIO_MMIO_QUEUE_READY => return self.write_ready(value, status, memory),
            offset::VIRTIO_MMIO_STATUS => return self.write_status(value, status),
            _ => self.write_queue(register, value, status),
        }
        Effect::None
    }

    fn write_features(&mut self, value: u32, status: u32) {
        if status & VIRTIO_CONFIG_S_DRIVER == 0 || status & VIRTIO_CONFIG_S_FEATURES_OK != 0 {
            return;
        }
        match self.driver_features_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | u64::from(value),
            1 => self.driver_features = self.driver_features & 0xffff_ffff | u64::from(value) << 32,
            _ => {}
        }
    }

    fn write_queue(&mut self, register: u32, value: u32, status: u32) {
        let setting_up = status & VIRTIO_CONFIG_S_FEATURES_OK != 0 && status & VIRTIO_CONFIG_S_DRIVER_OK == 0;
        let select = self.queue_select as usize;
        let (Some(queue), Some(&max_size)) = (self.queues.get_mut(select), self.max_sizes.get(select)) else { return };
        if !setting_up || queue.ready {
            return;
        }
        match register {
            offset::VIRTIO_MMIO_QUEUE_NUM => {
                if let Ok(size) = u16::try_from(value)
                    && size.is_power_of_two()
                    && size <= max_size
                {
                    queue.size = size;
                }
            }
            offset::VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut queue.descriptors, value),
            offset::VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut queue.descriptors, value),
            offset::VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut queue.available, value),
            offset::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut queue.available, value),
            offset::VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut queue.used, value),
            offset::VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut queue.used, value),
            _ => {}
        }
    }

    fn write_ready(&mut self, value: u32, status: u32, memory: &GuestMemory) -> Effect {
        let event_idx = self.event_idx();
        let select = self.queue_select as usize;
        let (Some(queue), Some(&max_size)) = (self.queues.get_mut(select), self.max_sizes.get(select)) else {
            return Effect::None;
        };
        let setting_up = status & VIRTIO_CONFIG_S_FEATURES_OK != 0 && status & VIRTIO_CONFIG_S_DRIVER_OK == 0;
        if value == 0 && queue.ready {
            *queue = QueueState { size: max_size, ..QueueState::default() };
            return Effect::StopQueue(select);
        }
        if value == 1 && setting_up && !queue.ready {
            queue.ready = true;
            queue.ready = queue.open(max_size, event_idx, memory).is_ok();
        }
        Effect::None
    }

    fn write_status(&self, value: u32, status: u32) -> Effect {
        if value == 0 {
            return Effect::Reset;
        }
        let status = status & !VIRTIO_CONFIG_S_NEEDS_RESET;
        let value = value & !VIRTIO_CONFIG_S_NEEDS_RESET;
        if value & !status & VIRTIO_CONFIG_S_FAILED != 0 {
            return Effect::SetStatus(VIRTIO_CONFIG_S_FAILED);
        }
        // One step at a time; bits that were set stay set whatever is written.
        const FEATURES_WRITTEN: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
        const QUEUES_SET_UP: u32 = FEATURES_WRITTEN | VIRTIO_CONFIG_S_FEATURES_OK;
        match value & !status {
            VIRTIO_CONFIG_S_ACKNOWLEDGE if status == 0 => Effect::SetStatus(VIRTIO_CONFIG_S_ACKNOWLEDGE),
            VIRTIO_CONFIG_S_DRIVER if status == VIRTIO_CONFIG_S_ACKNOWLEDGE => {
                Effect::SetStatus(VIRTIO_CONFIG_S_DRIVER)
            }
            VIRTIO_CONFIG_S_FEATURES_OK if status == FEATURES_WRITTEN && self.features_are_acceptable() => {
                Effect::SetStatus(VIRTIO_CONFIG_S_FEATURES_OK)
            }
            VIRTIO_CONFIG_S_DRIVER_OK if status == QUEUES_SET_UP => Effect::Activate,
            _ => Effect::None,
        }
    }

    fn features_are_acceptable(&self) -> bool {
        self.unknown_features() == 0 && self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn selected(&self) -> Option<&QueueState> {
        self.queues.get(self.queue_select as usize)
    }
}

fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address & !0xffff_ffff | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = *address & 0xffff_ffff | u64::from(value) << 32;
}
