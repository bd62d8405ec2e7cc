//! What a device tells its driver outside the queues: interrupts and the NEEDS_RESET status bit.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};

/// Raises one interrupt (edge) at the guest's interrupt controller. Implemented by the VMM.
pub trait InterruptLine: Send + Sync {
    /// Raises one edge. Called from vCPU threads and from the event loop, never with a lock held
    /// that a vCPU thread needs for longer than a register access.
    fn trigger(&self);
}

/// The interrupt and device status of one transport.
///
/// Both are atomics because a vCPU thread reads and acknowledges them while the event loop works on
/// a queue. A cause bit is set before the line is raised and the guest reads the bits after the
/// interrupt, so no cause is lost; an edge without a cause is possible and harmless.
pub struct Signals {
    interrupt_status: AtomicU32,
    device_status: AtomicU32,
    line: Arc<dyn InterruptLine>,
}

impl Signals {
    pub(crate) fn new(line: Arc<dyn InterruptLine>, interrupt_status: u32, device_status: u32) -> Self {
        Self { interrupt_status: AtomicU32::new(interrupt_status), device_status: AtomicU32::new(device_status), line }
    }

    pub(crate) fn queue_used(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    pub(crate) fn config_changed(&self) {
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    /// Tells the driver that the device stopped because the driver broke the queue protocol.
    pub(crate) fn needs_reset(&self) {
        let before = self.device_status.fetch_or(VIRTIO_CONFIG_S_NEEDS_RESET, Ordering::AcqRel);
        if before & VIRTIO_CONFIG_S_NEEDS_RESET == 0 {
            self.config_changed();
        }
    }

    /// Raises the line again for causes that were pending when the state was saved.
    pub(crate) fn raise_pending(&self) {
        if self.interrupt_status() != 0 {
            self.line.trigger();
        }
    }

    pub(crate) fn interrupt_status(&self) -> u32 {
        self.interrupt_status.load(Ordering::Acquire)
    }

    pub(crate) fn acknowledge(&self, causes: u32) {
        self.interrupt_status.fetch_and(!causes, Ordering::AcqRel);
    }

    pub(crate) fn device_status(&self) -> u32 {
        self.device_status.load(Ordering::Acquire)
    }

    pub(crate) fn add_device_status(&self, bits: u32) {
        self.device_status.fetch_or(bits, Ordering::AcqRel);
    }

    pub(crate) fn clear(&self) {
        self.device_status.store(0, Ordering::Release);
        self.interrupt_status.store(0, Ordering::Release);
    }

    fn raise(&self, cause: u32) {
        self.interrupt_status.fetch_or(cause, Ordering::AcqRel);
        self.line.trigger();
    }
}
