//! virtio over MMIO, version 2: the register window of one device.
//!
//! Who runs where: vCPU threads call [`MmioTransport::read`] and [`write`](MmioTransport::write); the
//! event loop calls everything else. Registers and device have separate locks, taken in that order,
//! so a vCPU never waits for I/O, with one exception that the protocol wants: a driver that resets
//! the device or stops a queue frees the queue's memory next, so that write waits until the device
//! has let go of it. The three registers of the fast path (notify, interrupt status, acknowledge)
//! take no lock at all.

mod registers;
mod state;
#[cfg(test)]
mod tests;

use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_NEEDS_RESET};
use virtio_bindings::virtio_mmio as offset;
use virtio_queue::Queue;

use self::registers::{Effect, MAGIC, Registers, VENDOR, VERSION};
pub use self::state::{RestoreError, TransportState};
use crate::GuestMemory;
use crate::config_space::ConfigSpace;
use crate::device::VirtioDevice;
use crate::queue::QueueSet;
use crate::signals::{InterruptLine, Signals};

/// Bytes of the register window; the window starts at a page of its own.
pub const WINDOW_SIZE: u64 = 0x200;

/// One virtio device behind its registers.
pub struct MmioTransport {
    memory: GuestMemory,
    signals: Arc<Signals>,
    config: Arc<ConfigSpace>,
    device_id: u32,
    queue_count: usize,
    poll_fd: Option<RawFd>,
    registers: Mutex<Registers>,
    active: Mutex<ActiveDevice>,
}

/// The device and the queues it works on; queues are present while the driver runs.
struct ActiveDevice {
    device: Box<dyn VirtioDevice>,
    queues: Vec<Option<Queue>>,
}

impl MmioTransport {
    /// A device that no driver has found yet.
    pub fn new(device: Box<dyn VirtioDevice>, memory: GuestMemory, line: Arc<dyn InterruptLine>) -> Self {
        let registers = Registers::new(device.features(), device.queue_sizes());
        let queues = registers.queues.iter().map(|_| None).collect();
        Self::assemble(device, memory, Signals::new(line, 0, 0), registers, queues)
    }

    /// A device whose driver goes on where it was when `state` was saved. `device` was made by its
    /// own `restore` from `state.device`.
    ///
    /// # Errors
    /// The state does not fit the device or the guest memory.
    pub fn restore(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        line: Arc<dyn InterruptLine>,
        state: &TransportState,
    ) -> Result<Self, RestoreError> {
        let device_id = device.device_id();
        let mut registers = Registers::new(device.features(), device.queue_sizes());
        if state.queues.len() != registers.queues.len() {
            return Err(RestoreError::QueueCount { device_id, saved: state.queues.len(), own: registers.queues.len() });
        }
        registers.device_features_select = state.device_features_select;
        registers.driver_features_select = state.driver_features_select;
        registers.driver_features = state.driver_features;
        registers.queue_select = state.queue_select;
        registers.queues.clone_from(&state.queues);
        // Before FEATURES_OK the driver may have written anything; after it, only what was offered.
        let missing = registers.unknown_features();
        if missing != 0 && state.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            return Err(RestoreError::Features { device_id, accepted: state.driver_features, missing });
        }
        let stopped = state.status & VIRTIO_CONFIG_S_DRIVER_OK == 0 || state.status & VIRTIO_CONFIG_S_NEEDS_RESET != 0;
        let queues = if stopped {
            registers.queues.iter().map(|_| None).collect()
        } else {
            open_queues(device_id, &registers, &memory)?
        };
        let signals = Signals::new(line, state.interrupt_status, state.status);
        let transport = Self::assemble(device, memory, signals, registers, queues);
        transport.config.set_generation(state.config_generation);
        Ok(transport)
    }

    fn assemble(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        signals: Signals,
        registers: Registers,
        queues: Vec<Option<Queue>>,
    ) -> Self {
        let signals = Arc::new(signals);
        let config = device.config();
        config.attach(Arc::clone(&signals));
        Self {
            memory,
            config,
            signals,
            device_id: device.device_id(),
            queue_count: registers.queues.len(),
            poll_fd: device.poll_fd(),
            registers: Mutex::new(registers),
            active: Mutex::new(ActiveDevice { device, queues }),
        }
    }

    /// A guest read at `offset` of the window. For vCPU threads.
    ///
    /// Registers answer to aligned reads of four bytes, the configuration space to any; everything
    /// else reads as zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let config = u64::from(offset::VIRTIO_MMIO_CONFIG);
        if (config..WINDOW_SIZE).contains(&offset) {
            return self.config.read((offset - config) as usize, data);
        }
        data.fill(0);
        if let (Ok(data), Some(register)) = (<&mut [u8; 4]>::try_from(data), register_at(offset)) {
            *data = self.read_register(register).to_le_bytes();
        }
    }

    fn read_register(&self, register: u32) -> u32 {
        match register {
            offset::VIRTIO_MMIO_INTERRUPT_STATUS => self.signals.interrupt_status(),
            offset::VIRTIO_MMIO_STATUS => self.signals.device_status(),
            offset::VIRTIO_MMIO_CONFIG_GENERATION => self.config.generation(),
            offset::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            offset::VIRTIO_MMIO_VERSION => VERSION,
            offset::VIRTIO_MMIO_DEVICE_ID => self.device_id,
            offset::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            _ => lock(&self.registers).read(register),
        }
    }

    /// A guest write at `offset` of the window. For vCPU threads.
    ///
    /// `Some(queue)` is a notification: the caller has the event loop call
    /// [`process_queue`](Self::process_queue) with it.
    pub fn write(&self, offset: u64, data: &[u8]) -> Option<u16> {
        let config = u64::from(offset::VIRTIO_MMIO_CONFIG);
        if (config..WINDOW_SIZE).contains(&offset) {
            self.config.driver_write((offset - config) as usize, data);
            return None;
        }
        let (Ok(&data), Some(register)) = (<&[u8; 4]>::try_from(data), register_at(offset)) else { return None };
        let value = u32::from_le_bytes(data);
        match register {
            offset::VIRTIO_MMIO_QUEUE_NOTIFY => {
                return (value < self.queue_count as u32 && self.is_running()).then_some(value as u16);
            }
            offset::VIRTIO_MMIO_INTERRUPT_ACK => self.signals.acknowledge(value),
            _ => self.write_register(register, value),
        }
        None
    }

    fn write_register(&self, register: u32, value: u32) {
        let mut registers = lock(&self.registers);
        match registers.write(register, value, self.signals.device_status(), &self.memory) {
            Effect::None => {}
            Effect::SetStatus(bits) => self.signals.add_device_status(bits),
            Effect::StopQueue(queue) => lock(&self.active).queues[queue] = None,
            Effect::Reset => {
                let mut active = lock(&self.active);
                active.queues.fill_with(|| None);
                active.device.reset();
                registers.clear();
                self.signals.clear();
            }
            Effect::Activate => {
                let Ok(queues) = open_queues(self.device_id, &registers, &self.memory) else {
                    self.signals.needs_reset();
                    return;
                };
                let mut active = lock(&self.active);
                active.queues = queues;
                active.device.activate(registers.driver_features);
                self.signals.add_device_status(VIRTIO_CONFIG_S_DRIVER_OK);
            }
        }
    }

    /// Serves what the driver put into `queue`. For the event loop, after a notification.
    pub fn process_queue(&self, queue: u16) {
        self.with_queues(|device, queues| {
            if queues.is_ready(queue.into()) {
                device.process_queue(queue.into(), queues);
            }
        });
    }

    /// The descriptor to poll for readability, if the device has host events; the same for the whole
    /// life of the transport.
    pub fn poll_fd(&self) -> Option<RawFd> {
        self.poll_fd
    }

    /// Serves host events. For the event loop, after [`poll_fd`](Self::poll_fd) became readable.
    pub fn process_host_event(&self) {
        self.with_queues(|device, queues| device.process_host_event(queues));
    }

    /// Completes a restore; called once, after the interrupt controller was restored and before the
    /// first vCPU runs.
    pub fn after_restore(&self) {
        self.with_queues(|device, queues| device.after_restore(queues));
        self.signals.raise_pending();
    }

    /// The state to restore a copy from. vCPUs stand still and the event loop is not inside a device.
    pub fn save(&self) -> TransportState {
        let registers = lock(&self.registers);
        let mut guard = lock(&self.active);
        let active = &mut *guard;
        let mut queues = registers.queues.clone();
        for (state, queue) in queues.iter_mut().zip(&active.queues) {
            if let Some(queue) = queue {
                state.note_positions(queue);
            }
        }
        let device = active.device.save(&QueueSet::new(&self.memory, &mut active.queues, &self.signals));
        TransportState {
            status: self.signals.device_status(),
            interrupt_status: self.signals.interrupt_status(),
            device_features_select: registers.device_features_select,
            driver_features_select: registers.driver_features_select,
            driver_features: registers.driver_features,
            queue_select: registers.queue_select,
            config_generation: self.config.generation(),
            queues,
            device,
        }
    }

    fn with_queues(&self, work: impl FnOnce(&mut dyn VirtioDevice, &mut QueueSet<'_>)) {
        let mut guard = lock(&self.active);
        let active = &mut *guard;
        let mut queues = QueueSet::new(&self.memory, &mut active.queues, &self.signals);
        work(active.device.as_mut(), &mut queues);
    }

    fn is_running(&self) -> bool {
        let status = self.signals.device_status();
        status & VIRTIO_CONFIG_S_DRIVER_OK != 0 && status & VIRTIO_CONFIG_S_NEEDS_RESET == 0
    }
}

/// Working queues for every queue that the driver made ready.
fn open_queues(
    device_id: u32,
    registers: &Registers,
    memory: &GuestMemory,
) -> Result<Vec<Option<Queue>>, RestoreError> {
    let event_idx = registers.event_idx();
    let open = |(index, (state, &max_size)): (usize, (&crate::QueueState, &u16))| {
        if !state.ready {
            return Ok(None);
        }
        state.open(max_size, event_idx, memory).map(Some).map_err(|source| RestoreError::Queue {
            device_id,
            queue: index,
            state: *state,
            source,
        })
    };
    registers.queues.iter().zip(registers.max_sizes).enumerate().map(open).collect()
}

fn register_at(offset: u64) -> Option<u32> {
    (offset < u64::from(offset::VIRTIO_MMIO_CONFIG) && offset.is_multiple_of(4)).then_some(offset as u32)
}

/// Locks even after a panic elsewhere: a device that panicked serves no more requests of use, and
/// taking the whole machine's registers down with it would hide why.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
