//! How vCPU threads get the event loop's attention.
//!
//! One event descriptor for everything, and a set of the queues that were notified. A
//! descriptor per queue (ioeventfd) would let notifications bypass the vCPU thread, but costs every
//! copy tens of descriptors and registrations on the machine's bus before its guest may run.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use forkd_proto::monitor::StopReason;
use rustix::event::EventfdFlags;

use crate::address_map::{DEVICE_SLOTS, QUEUES_PER_DEVICE};

/// Bits of a word of the set.
const WORD: usize = 64;
const WORDS: usize = (DEVICE_SLOTS * QUEUES_PER_DEVICE).div_ceil(WORD);

/// Shared by all vCPU threads and the event loop.
#[derive(Debug)]
pub struct Wake {
    event: OwnedFd,
    /// Bit `slot × 8 + queue` of all the words is set while that queue waits to be processed. Those of the devices
    /// that every machine has, and of its first disks, are in the first word.
    queues: [AtomicU64; WORDS],
    stop: Mutex<Option<StopReason>>,
}

impl Wake {
    /// A fresh, quiet one.
    pub fn new() -> io::Result<Self> {
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { event, queues: Default::default(), stop: Mutex::new(None) })
    }

    /// Readable when there is something to do.
    pub fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Says that the guest notified `queue` of the device in `slot`.
    pub fn notify(&self, slot: usize, queue: u16) {
        if usize::from(queue) >= QUEUES_PER_DEVICE {
            return;
        }
        let bit = slot * QUEUES_PER_DEVICE + usize::from(queue);
        // Only the first of several notifications that nobody has taken yet needs to wake the loop.
        if self.queues[bit / WORD].fetch_or(1 << (bit % WORD), Ordering::AcqRel) == 0 {
            self.signal();
        }
    }

    /// Takes all notified queues as `(slot, queue)`.
    pub fn take_queues(&self) -> impl Iterator<Item = (usize, u16)> + use<> {
        let words = self.queues.each_ref().map(|word| word.swap(0, Ordering::AcqRel));
        let in_word = |(word, set): (usize, u64)| {
            (0..WORD).filter(move |bit| set & 1 << bit != 0).map(move |bit| word * WORD + bit)
        };
        let bits = words.into_iter().enumerate().filter(|(_, set)| *set != 0).flat_map(in_word);
        bits.map(|bit| (bit / QUEUES_PER_DEVICE, (bit % QUEUES_PER_DEVICE) as u16))
    }

    /// Resets the event descriptor; before the queues are taken, so that nothing is lost.
    pub fn acknowledge(&self) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.event, &mut count);
    }

    /// Says that the machine cannot or will not go on; the first reason is kept.
    pub fn stop(&self, reason: StopReason) {
        self.stop.lock().expect("no thread panics while holding it").get_or_insert(reason);
        self.signal();
    }

    /// Why the machine stopped, if it did.
    pub fn stopped(&self) -> Option<StopReason> {
        self.stop.lock().expect("no thread panics while holding it").clone()
    }

    fn signal(&self) {
        // It cannot block: the counter would have to reach 2⁶⁴ − 1 first.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notified_queues_are_taken_once() {
        let wake = Wake::new().expect("eventfd");
        wake.notify(0, 1);
        wake.notify(7, 7);
        wake.notify(0, 1);
        wake.notify(3, 8);
        wake.notify(28, 7);
        wake.notify(8, 0);
        assert_eq!(wake.take_queues().collect::<Vec<_>>(), [(0, 1), (7, 7), (8, 0), (28, 7)]);
        assert_eq!(wake.take_queues().count(), 0);
    }

    #[test]
    fn the_first_reason_to_stop_is_kept() {
        let wake = Wake::new().expect("eventfd");
        wake.stop(StopReason::Panicked);
        wake.stop(StopReason::PoweredOff);
        assert_eq!(wake.stopped(), Some(StopReason::Panicked));
    }
}
