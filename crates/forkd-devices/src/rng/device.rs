//! The entropy device.

use std::os::fd::RawFd;
use std::sync::Arc;

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::RngState;
use crate::config_space::ConfigSpace;
use crate::device::{DeviceState, VirtioDevice};
use crate::queue::{Chain, QueueSet};
use crate::requeue::Requeue;

const REQUESTS: usize = 0;
const QUEUE_SIZES: &[u16] = &[64];

/// The most bytes one request gets; the driver asks again for more.
const LARGEST_ANSWER: usize = 4096;

/// Serves getrandom(2) to the guest.
pub struct Rng {
    config: Arc<ConfigSpace>,
    requeue: Requeue,
}

impl Rng {
    /// A device that no driver has found yet.
    pub fn new() -> Self {
        Self { config: ConfigSpace::read_only(Vec::new()), requeue: Requeue::new() }
    }

    /// A device whose driver goes on where it was.
    pub fn restore(_state: &RngState) -> Self {
        Self::new()
    }
}

impl Default for Rng {
    fn default() -> Self {
        Self::new()
    }
}

/// Fills the request; the number of bytes written.
fn serve(chain: &Chain<'_>) -> u32 {
    let mut bytes = [0; LARGEST_ANSWER];
    let wanted = chain.writable.len().min(LARGEST_ANSWER);
    // A read of more than 256 bytes may be cut short by a signal; the driver then asks for the rest.
    match getrandom(&mut bytes[..wanted], GetRandomFlags::empty()) {
        Ok(count) => chain.writable.copy_from(&bytes[..count]) as u32,
        Err(_) => 0,
    }
}

impl VirtioDevice for Rng {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.config)
    }

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {}

    fn process_queue(&mut self, queue: usize, queues: &mut QueueSet<'_>) {
        self.requeue.drain(queues, queue, |chain| serve(&chain));
    }

    fn poll_fd(&self) -> Option<RawFd> {
        self.requeue.raw_fd()
    }

    fn process_host_event(&mut self, queues: &mut QueueSet<'_>) {
        if self.requeue.take() {
            self.process_queue(REQUESTS, queues);
        }
    }

    fn save(&self, _queues: &QueueSet<'_>) -> DeviceState {
        DeviceState::Rng(RngState {})
    }
}
