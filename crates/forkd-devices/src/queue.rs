//! Virtqueues as devices use them: chains of checked buffers, completion, and interrupts that are
//! raised once for all that was done.

use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Error as QueueError, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, Permissions};

use crate::GuestMemory;
use crate::guest_buffers::GuestBuffers;
use crate::signals::Signals;

/// How many chains one call of [`QueueSet::drain`] takes before it lets the event loop look at
/// other work. A guest with several vCPUs can refill a queue as fast as it is emptied, and a
/// request to fork must not wait for it.
const DRAIN_LIMIT: usize = 64;

/// The most queues a device here has.
const MOST_QUEUES: usize = 3;

/// Bytes of the rings before their elements, and per element (split virtqueues).
const USED_RING_HEADER: u64 = 4;
const USED_RING_ELEMENT: u64 = 8;
const AVAIL_RING_HEADER: u64 = 4;
const AVAIL_RING_ELEMENT: u64 = 2;

/// One queue as the driver set it up, and how far both sides have come.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct QueueState {
    /// Entries, a power of two.
    pub size: u16,
    /// Whether the driver enabled the queue.
    pub ready: bool,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the available ring.
    pub available: u64,
    /// Guest address of the used ring.
    pub used: u64,
    /// Next entry of the available ring to take.
    pub next_available: u16,
    /// Next entry of the used ring to fill.
    pub next_used: u16,
}

impl QueueState {
    /// A working queue, or why the state does not describe one that fits `memory`.
    pub(crate) fn open(&self, max_size: u16, event_idx: bool, memory: &GuestMemory) -> Result<Queue, QueueError> {
        let queue = Queue::try_from(virtio_queue::QueueState {
            max_size,
            next_avail: self.next_available,
            next_used: self.next_used,
            event_idx_enabled: event_idx,
            size: self.size,
            ready: self.ready,
            desc_table: self.descriptors,
            avail_ring: self.available,
            used_ring: self.used,
        })?;
        // The iterator treats a ring at address zero as not set up.
        if !queue.is_valid(memory) || self.available == 0 {
            return Err(QueueError::QueueNotReady);
        }
        Ok(queue)
    }

    /// Takes over the positions of the working queue.
    pub(crate) fn note_positions(&mut self, queue: &Queue) {
        self.next_available = queue.next_avail();
        self.next_used = queue.next_used();
    }
}

/// One request: the buffers that the driver lets the device read, then those it lets it write.
pub struct Chain<'m> {
    /// What [`QueueSet::complete`] wants back.
    pub head: u16,
    /// From the driver.
    pub readable: GuestBuffers<'m>,
    /// To the driver.
    pub writable: GuestBuffers<'m>,
}

/// Whether a queue was emptied.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Drained {
    /// The queue is empty and the driver will notify when it adds to it.
    Empty,
    /// The limit was reached; call again without waiting for a notification.
    More,
}

/// The queues of an active device, for the time of one call into it.
///
/// When the call ends, every queue that got used entries is signalled if its driver wants that.
pub struct QueueSet<'m> {
    memory: &'m GuestMemory,
    queues: &'m mut [Option<Queue>],
    signals: &'m Signals,
    /// Per queue: the used index before this call added entries to it.
    used_before: [Option<u16>; MOST_QUEUES],
}

impl<'m> QueueSet<'m> {
    pub(crate) fn new(memory: &'m GuestMemory, queues: &'m mut [Option<Queue>], signals: &'m Signals) -> Self {
        Self { memory, queues, signals, used_before: [None; MOST_QUEUES] }
    }

    /// Guest memory.
    pub fn memory(&self) -> &'m GuestMemory {
        self.memory
    }

    /// Takes the next request off `queue`.
    ///
    /// A driver whose request names memory that the guest does not have, or mixes directions, broke
    /// the protocol: the device stops and needs a reset.
    pub fn pop(&mut self, queue: usize) -> Option<Chain<'m>> {
        let (head, descriptors) = self.pop_descriptors(queue)?;
        let chain = collect(self.memory, head, &descriptors);
        if chain.is_none() {
            self.give_up();
        }
        chain
    }

    /// Takes the next request off `queue` as the bare descriptors, whose addresses are not checked.
    pub fn pop_descriptors(&mut self, queue: usize) -> Option<(u16, Vec<Descriptor>)> {
        match self.queues.get_mut(queue)?.as_mut()?.iter(self.memory) {
            Ok(mut iterator) => iterator.next().map(|chain| (chain.head_index(), chain.collect())),
            Err(_) => {
                self.give_up();
                None
            }
        }
    }

    /// The driver broke the protocol: nothing more is done for it until it resets the device.
    fn give_up(&mut self) {
        self.queues.fill_with(|| None);
        self.signals.needs_reset();
    }

    /// Puts the chain that was popped last, and not completed, back. Chains go back in reverse order.
    pub fn undo_pop(&mut self, queue: usize) {
        if let Some(Some(queue)) = self.queues.get_mut(queue) {
            queue.go_to_previous_position();
        }
    }

    /// Gives a request back to the driver with `written` bytes in its writable buffers.
    pub fn complete(&mut self, queue: usize, head: u16, written: u32) {
        self.complete_together(queue, &[(head, written)]);
    }

    /// Gives several requests back, which the driver sees all at once. Drivers expect that of a
    /// packet that goes over several buffers.
    pub fn complete_together(&mut self, queue: usize, requests: &[(u16, u32)]) {
        let Some((last, earlier)) = requests.split_last() else { return };
        let Some(Some(ready)) = self.queues.get_mut(queue) else { return };
        let before = ready.next_used();
        match add_used(ready, self.memory, earlier, *last) {
            Ok(()) => {
                self.used_before[queue].get_or_insert(before);
            }
            Err(_) => self.give_up(),
        }
    }

    /// Asks the driver to notify about the next request it adds to the emptied `queue`; returns
    /// whether some were added meanwhile.
    pub fn rearm(&mut self, queue: usize) -> bool {
        let Some(Some(queue)) = self.queues.get_mut(queue) else { return false };
        queue.enable_notification(self.memory).unwrap_or(false)
    }

    /// Asks the driver to notify about the next request it adds to `queue` although requests are
    /// left in it; returns the ring index that the next addition will get.
    pub fn rearm_at_end(&mut self, queue: usize) -> Option<u16> {
        let queue = self.queues.get_mut(queue)?.as_mut()?;
        loop {
            let end = queue.avail_idx(self.memory, Ordering::Acquire).ok()?.0;
            if !queue.event_idx_enabled() {
                return Some(end);
            }
            let avail_event = queue.used_ring() + USED_RING_HEADER + USED_RING_ELEMENT * u64::from(queue.size());
            self.memory.store(end.to_le(), GuestAddress(avail_event), Ordering::Relaxed).ok()?;
            fence(Ordering::SeqCst);
            let again = queue.avail_idx(self.memory, Ordering::Acquire).ok()?.0;
            if again == end {
                return Some(end);
            }
        }
    }

    /// The ring index that the next request of the driver will get.
    pub fn available_end(&self, queue: usize) -> Option<u16> {
        let queue = self.queues.get(queue)?.as_ref()?;
        Some(queue.avail_idx(self.memory, Ordering::Acquire).ok()?.0)
    }

    /// Whether the driver set `queue` up and it is in order.
    pub fn is_ready(&self, queue: usize) -> bool {
        matches!(self.queues.get(queue), Some(Some(_)))
    }

    /// Serves requests of `queue`, each with `serve`, which returns the bytes it wrote to the chain.
    pub fn drain(&mut self, queue: usize, mut serve: impl FnMut(Chain<'m>) -> u32) -> Drained {
        for _ in 0..DRAIN_LIMIT {
            match self.pop(queue) {
                Some(chain) => {
                    let head = chain.head;
                    let written = serve(chain);
                    self.complete(queue, head, written);
                }
                None if self.rearm(queue) => {}
                None => return Drained::Empty,
            }
        }
        Drained::More
    }

    /// Interrupts the driver if a queue with new used entries asks for it.
    fn signal(&mut self) {
        let mut wanted = false;
        for (slot, before) in self.queues.iter().zip(&mut self.used_before) {
            if let (Some(queue), Some(before)) = (slot, before.take()) {
                wanted |= wants_interrupt(queue, self.memory, before);
            }
        }
        if wanted {
            self.signals.queue_used();
        }
    }
}

impl Drop for QueueSet<'_> {
    fn drop(&mut self) {
        self.signal();
    }
}

/// Fills used entries and publishes them with one store of the index. `Queue::add_used` publishes
/// each; so the earlier entries are put in place first, and it is called for the last one only.
fn add_used(
    queue: &mut Queue,
    memory: &GuestMemory,
    earlier: &[(u16, u32)],
    last: (u16, u32),
) -> Result<(), QueueError> {
    let start = queue.next_used();
    for (index, &(head, written)) in earlier.iter().enumerate() {
        if head >= queue.size() {
            return Err(QueueError::InvalidDescriptorIndex);
        }
        let position = u64::from(start.wrapping_add(index as u16) % queue.size());
        let address = queue.used_ring() + USED_RING_HEADER + USED_RING_ELEMENT * position;
        memory
            .write_obj([u32::from(head).to_le(), written.to_le()], GuestAddress(address))
            .map_err(QueueError::GuestMemory)?;
    }
    queue.set_next_used(start.wrapping_add(earlier.len() as u16));
    queue.add_used(memory, last.0, last.1)
}

/// Whether the driver wants to be interrupted for the entries from `before` on. Drivers that cannot
/// be understood are.
fn wants_interrupt(queue: &Queue, memory: &GuestMemory, before: u16) -> bool {
    // The entries must be visible before the driver's wish is read, or both sides wait.
    fence(Ordering::SeqCst);
    if !queue.event_idx_enabled() {
        let flags = memory.load(GuestAddress(queue.avail_ring()), Ordering::Relaxed).map_or(0, u16::from_le);
        return u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0;
    }
    let used_event = queue.avail_ring() + AVAIL_RING_HEADER + AVAIL_RING_ELEMENT * u64::from(queue.size());
    let Ok(used_event) = memory.load(GuestAddress(used_event), Ordering::Relaxed).map(u16::from_le) else {
        return true;
    };
    let now = queue.next_used();
    now.wrapping_sub(used_event).wrapping_sub(1) < now.wrapping_sub(before)
}

/// Sorts descriptors by direction. The specification asks for all readable ones first.
fn collect<'m>(memory: &'m GuestMemory, head: u16, descriptors: &[Descriptor]) -> Option<Chain<'m>> {
    let mut chain = Chain { head, readable: GuestBuffers::default(), writable: GuestBuffers::default() };
    for descriptor in descriptors {
        let len = descriptor.len() as usize;
        if descriptor.is_write_only() {
            chain.writable.push(memory, descriptor.addr(), len, Permissions::Write).ok()?;
        } else if chain.writable.is_empty() {
            chain.readable.push(memory, descriptor.addr(), len, Permissions::Read).ok()?;
        } else {
            return None;
        }
    }
    Some(chain)
}
