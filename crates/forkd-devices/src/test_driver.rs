//! The driver's side of a device, for tests: register handshake and split queues in real memory, with
//! notifications suppressed the way Linux suppresses them.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use virtio_bindings::virtio_mmio as offset;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress};

use crate::{DeviceState, GuestMemory, InterruptLine, MmioTransport, RestoreError, TransportState, VirtioDevice};

/// Bytes of guest memory; two regions, so that buffers can span both.
pub(crate) const MEMORY_SIZE: u64 = 8 << 20;
const QUEUES_AT: u64 = 0x1_0000;
const QUEUE_STRIDE: u64 = 0x4000;
/// Memory from here on is free for buffers.
pub(crate) const BUFFERS_AT: u64 = 0x10_0000;

/// Every feature a device offers.
pub(crate) const ALL_FEATURES: u64 = u64::MAX;
/// Every feature but suppression of notifications and interrupts.
pub(crate) const NO_EVENT_IDX: u64 = !(1 << VIRTIO_RING_F_EVENT_IDX);

/// Counts interrupts.
#[derive(Default)]
pub(crate) struct CountingLine(AtomicUsize);

impl CountingLine {
    pub(crate) fn count(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

impl InterruptLine for CountingLine {
    fn trigger(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// A piece of a request: guest address, length, and whether the device writes it.
pub(crate) type Piece = (u64, u32, bool);

#[derive(Clone)]
struct DriverQueue {
    base: u64,
    size: u16,
    free: Vec<u16>,
    /// Descriptors of each outstanding chain, by head.
    chains: std::collections::HashMap<u16, Vec<u16>>,
    available: u16,
    kicked: u16,
    seen_used: u16,
}

impl DriverQueue {
    fn descriptor_at(&self, index: u16) -> GuestAddress {
        GuestAddress(self.base + 16 * u64::from(index))
    }

    fn available_at(&self, field: u64) -> GuestAddress {
        GuestAddress(self.base + 0x1000 + field)
    }

    fn used_at(&self, field: u64) -> GuestAddress {
        GuestAddress(self.base + 0x2000 + field)
    }
}

/// A driver and its device.
pub(crate) struct Driver {
    pub(crate) memory: GuestMemory,
    pub(crate) transport: MmioTransport,
    pub(crate) line: Arc<CountingLine>,
    pub(crate) features: u64,
    queues: Vec<DriverQueue>,
}

pub(crate) fn new_memory() -> GuestMemory {
    GuestMemory::from_ranges(&[
        (GuestAddress(0), (BUFFERS_AT + 0x1_0800) as usize),
        (GuestAddress(BUFFERS_AT + 0x1_0800), (MEMORY_SIZE - BUFFERS_AT - 0x1_0800) as usize),
    ])
    .unwrap()
}

impl Driver {
    /// A device that was found and set up, with the features of `mask` that it offers.
    pub(crate) fn start(device: Box<dyn VirtioDevice>, mask: u64) -> Self {
        let mut driver = Self::probe(device);
        driver.set_up(mask);
        driver
    }

    /// A device that was not touched yet.
    pub(crate) fn probe(device: Box<dyn VirtioDevice>) -> Self {
        let memory = new_memory();
        let line = Arc::new(CountingLine::default());
        let transport = MmioTransport::new(device, memory.clone(), Arc::clone(&line) as Arc<dyn InterruptLine>);
        Self { memory, transport, line, features: 0, queues: Vec::new() }
    }

    /// The steps of a driver's start.
    pub(crate) fn set_up(&mut self, mask: u64) {
        self.queues.clear();
        self.write(offset::VIRTIO_MMIO_STATUS, 0);
        assert_eq!(self.read(offset::VIRTIO_MMIO_STATUS), 0);
        self.write(offset::VIRTIO_MMIO_STATUS, 1);
        self.write(offset::VIRTIO_MMIO_STATUS, 3);
        let mut offered = 0;
        for half in 0..2 {
            self.write(offset::VIRTIO_MMIO_DEVICE_FEATURES_SEL, half);
            offered |= u64::from(self.read(offset::VIRTIO_MMIO_DEVICE_FEATURES)) << (32 * half);
        }
        self.features = offered & mask;
        for half in 0..2 {
            self.write(offset::VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            self.write(offset::VIRTIO_MMIO_DRIVER_FEATURES, (self.features >> (32 * half)) as u32);
        }
        self.write(offset::VIRTIO_MMIO_STATUS, 11);
        assert_eq!(self.read(offset::VIRTIO_MMIO_STATUS), 11, "the features were refused");
        for index in 0.. {
            self.write(offset::VIRTIO_MMIO_QUEUE_SEL, index);
            let size = self.read(offset::VIRTIO_MMIO_QUEUE_NUM_MAX) as u16;
            if size == 0 {
                break;
            }
            self.set_up_queue(index, size);
        }
        self.write(offset::VIRTIO_MMIO_STATUS, 15);
        assert_eq!(self.read(offset::VIRTIO_MMIO_STATUS), 15);
    }

    fn set_up_queue(&mut self, index: u32, size: u16) {
        let queue = DriverQueue {
            base: QUEUES_AT + QUEUE_STRIDE * u64::from(index),
            size,
            free: (0..size).rev().collect(),
            chains: std::collections::HashMap::new(),
            available: 0,
            kicked: 0,
            seen_used: 0,
        };
        self.memory.write_slice(&[0; QUEUE_STRIDE as usize], GuestAddress(queue.base)).unwrap();
        self.write(offset::VIRTIO_MMIO_QUEUE_NUM, size.into());
        for (low, address) in [
            (offset::VIRTIO_MMIO_QUEUE_DESC_LOW, queue.descriptor_at(0)),
            (offset::VIRTIO_MMIO_QUEUE_AVAIL_LOW, queue.available_at(0)),
            (offset::VIRTIO_MMIO_QUEUE_USED_LOW, queue.used_at(0)),
        ] {
            self.write(low, address.0 as u32);
            self.write(low + 4, (address.0 >> 32) as u32);
        }
        self.write(offset::VIRTIO_MMIO_QUEUE_READY, 1);
        assert_eq!(self.read(offset::VIRTIO_MMIO_QUEUE_READY), 1);
        self.queues.push(queue);
    }

    pub(crate) fn read(&self, register: u32) -> u32 {
        let mut bytes = [0xee; 4];
        self.transport.read(register.into(), &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub(crate) fn write(&self, register: u32, value: u32) {
        assert_eq!(self.transport.write(register.into(), &value.to_le_bytes()), None);
    }

    fn event_idx(&self) -> bool {
        self.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0
    }

    /// Offers a request without telling the device; returns its head.
    pub(crate) fn add(&mut self, queue: usize, pieces: &[Piece]) -> u16 {
        let memory = self.memory.clone();
        let queue = &mut self.queues[queue];
        let indices: Vec<u16> = pieces.iter().map(|_| queue.free.pop().expect("the test's queue is full")).collect();
        for (position, (&index, &(address, len, writable))) in indices.iter().zip(pieces).enumerate() {
            let next = indices.get(position + 1).copied();
            let flags = u16::from(next.is_some()) | u16::from(writable) << 1;
            memory.write_obj(address, queue.descriptor_at(index)).unwrap();
            memory.write_obj(len, GuestAddress(queue.descriptor_at(index).0 + 8)).unwrap();
            memory.write_obj(flags, GuestAddress(queue.descriptor_at(index).0 + 12)).unwrap();
            memory.write_obj(next.unwrap_or(0), GuestAddress(queue.descriptor_at(index).0 + 14)).unwrap();
        }
        let head = indices[0];
        let slot = 4 + 2 * u64::from(queue.available % queue.size);
        memory.write_obj(head, queue.available_at(slot)).unwrap();
        queue.available = queue.available.wrapping_add(1);
        memory.store(queue.available, queue.available_at(2), Ordering::SeqCst).unwrap();
        queue.chains.insert(head, indices);
        head
    }

    /// Tells the device about new requests if it asked to be told; returns whether it did.
    pub(crate) fn kick(&mut self, index: usize) -> bool {
        let event_idx = self.event_idx();
        let queue = &mut self.queues[index];
        let old = std::mem::replace(&mut queue.kicked, queue.available);
        let new = queue.available;
        let wanted = if event_idx {
            let avail_event: u16 =
                self.memory.load(queue.used_at(4 + 8 * u64::from(queue.size)), Ordering::SeqCst).unwrap();
            new.wrapping_sub(avail_event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            let flags: u16 = self.memory.load(queue.used_at(0), Ordering::SeqCst).unwrap();
            flags & 1 == 0
        };
        if wanted {
            let notified = self.transport.write(offset::VIRTIO_MMIO_QUEUE_NOTIFY.into(), &(index as u32).to_le_bytes());
            if let Some(queue) = notified {
                assert_eq!(usize::from(queue), index);
                self.transport.process_queue(queue);
            }
        }
        wanted
    }

    /// Takes back finished requests and asks to be interrupted about the next.
    pub(crate) fn take_used(&mut self, index: usize) -> Vec<(u16, u32)> {
        let event_idx = self.event_idx();
        let memory = self.memory.clone();
        let queue = &mut self.queues[index];
        let end: u16 = memory.load(queue.used_at(2), Ordering::SeqCst).unwrap();
        let mut done = Vec::new();
        while queue.seen_used != end {
            let slot = 4 + 8 * u64::from(queue.seen_used % queue.size);
            let id: u32 = memory.read_obj(queue.used_at(slot)).unwrap();
            let len: u32 = memory.read_obj(queue.used_at(slot + 4)).unwrap();
            let chain = queue.chains.remove(&(id as u16)).expect("a request was finished that is not outstanding");
            queue.free.extend(chain.into_iter().rev());
            queue.seen_used = queue.seen_used.wrapping_add(1);
            done.push((id as u16, len));
        }
        if event_idx {
            let used_event = queue.available_at(4 + 2 * u64::from(queue.size));
            memory.store(queue.seen_used, used_event, Ordering::SeqCst).unwrap();
        }
        done
    }

    /// Runs the event loop once if the device has host events.
    pub(crate) fn poll(&self) -> bool {
        let Some(fd) = self.transport.poll_fd() else { return false };
        // The descriptor belongs to the device, which outlives this call.
        let path = format!("/proc/self/fd/{fd}");
        assert!(std::fs::symlink_metadata(path).is_ok(), "the device polls a descriptor that is not open");
        let ready = crate::test_poll::readable(fd);
        if ready {
            self.transport.process_host_event();
        }
        ready
    }

    /// A copy of the machine: own memory with the same content, a device that `restore` makes from the
    /// saved state (after a trip through its on-disk form), and a driver that knows nothing of it.
    pub(crate) fn copy(
        &self,
        restore: impl FnOnce(&DeviceState) -> Box<dyn VirtioDevice>,
    ) -> Result<Self, RestoreError> {
        let bytes = postcard::to_stdvec(&self.transport.save()).unwrap();
        let state: TransportState = postcard::from_bytes(&bytes).unwrap();
        let memory = new_memory();
        let mut content = vec![0; MEMORY_SIZE as usize];
        self.memory.read_slice(&mut content, GuestAddress(0)).unwrap();
        memory.write_slice(&content, GuestAddress(0)).unwrap();
        let line = Arc::new(CountingLine::default());
        let transport = MmioTransport::restore(
            restore(&state.device),
            memory.clone(),
            Arc::clone(&line) as Arc<dyn InterruptLine>,
            &state,
        )?;
        let copy = Self { memory, transport, line, features: self.features, queues: self.queues.clone() };
        copy.transport.after_restore();
        Ok(copy)
    }
}
