//! The balloon device.

use std::os::fd::RawFd;
use std::sync::Arc;

use forkd_types::{PAGE_SIZE, PageRun};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::parse::{PAGE_NUMBER_LEN, parse_page_numbers, whole_pages};
use super::state::BalloonState;
use crate::GuestMemory;
use crate::config_space::ConfigSpace;
use crate::device::{DeviceState, VirtioDevice};
use crate::queue::QueueSet;
use crate::requeue::Requeue;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// The specification gives the reporting queue number 4; drivers number the queues of the features
/// that were accepted without gaps (Linux `vm_find_vqs`), and here that makes it 2.
const REPORTING: usize = 2;
const QUEUE_SIZES: &[u16] = &[128, 128, 32];

const FEATURE_DEFLATE_ON_OOM: u64 = 1 << 2;
const FEATURE_REPORTING: u64 = 1 << 5;

const TARGET_AT: usize = 0;
const ACTUAL_AT: usize = 4;
const CONFIG_LEN: usize = 8;

/// The most page numbers taken from one request; Linux sends 256.
const MOST_PAGE_NUMBERS: usize = 4096;
/// Requests served before the event loop gets to look at other work.
const REQUESTS_PER_CALL: usize = 64;

/// Takes memory back from the guest. Implemented by the VMM.
pub trait PageRelease: Send {
    /// The guest no longer needs what is in `len` bytes at `guest_addr`; it may read anything there
    /// later. Both are multiples of 4 KiB and lie in one region of guest memory.
    fn release(&self, guest_addr: u64, len: u64);
}

/// The size the host wants a balloon to have.
#[derive(Clone)]
pub struct BalloonTarget(Arc<ConfigSpace>);

impl BalloonTarget {
    /// Asks the driver to bring the balloon to `pages` pages of 4 KiB.
    pub fn set(&self, pages: u32) {
        self.0.update(TARGET_AT, &pages.to_le_bytes());
    }

    /// The pages that the driver says are in the balloon.
    pub fn actual_pages(&self) -> u32 {
        self.0.u32_at(ACTUAL_AT)
    }
}

/// A virtio balloon with free page reporting.
pub struct Balloon {
    release: Box<dyn PageRelease>,
    config: Arc<ConfigSpace>,
    requeue: Requeue,
}

impl Balloon {
    /// An empty balloon that no driver has found yet.
    pub fn new(release: Box<dyn PageRelease>) -> Self {
        Self::restore(&BalloonState::default(), release)
    }

    /// A balloon whose driver goes on where it was.
    pub fn restore(state: &BalloonState, release: Box<dyn PageRelease>) -> Self {
        let mut bytes = state.target_pages.to_le_bytes().to_vec();
        bytes.extend(state.actual_pages.to_le_bytes());
        debug_assert_eq!(bytes.len(), CONFIG_LEN);
        Self { release, config: ConfigSpace::with_writable(bytes, ACTUAL_AT..CONFIG_LEN), requeue: Requeue::new() }
    }

    /// A handle to change the balloon's target.
    pub fn target(&self) -> BalloonTarget {
        BalloonTarget(Arc::clone(&self.config))
    }

    /// Pages that the driver put into the balloon, by number.
    fn inflate(&self, memory: &GuestMemory, descriptors: &[Descriptor]) {
        let mut room = MOST_PAGE_NUMBERS * PAGE_NUMBER_LEN;
        for descriptor in descriptors.iter().filter(|descriptor| !descriptor.is_write_only()) {
            let mut list = vec![0; room.min(descriptor.len() as usize)];
            room -= list.len();
            if vm_memory::Bytes::read_slice(memory, &mut list, descriptor.addr()).is_ok() {
                for run in parse_page_numbers(&list) {
                    self.release_run(memory, run);
                }
            }
        }
    }

    /// Free blocks that the driver reports; they are the request's own buffers.
    fn report(&self, memory: &GuestMemory, descriptors: &[Descriptor]) {
        for descriptor in descriptors.iter().filter(|descriptor| descriptor.is_write_only()) {
            if let Some(run) = whole_pages(descriptor.addr().raw_value(), descriptor.len().into()) {
                self.release_run(memory, run);
            }
        }
    }

    /// Releases what of `run` is guest memory, region by region.
    fn release_run(&self, memory: &GuestMemory, run: PageRun) {
        let (start, end) = (run.offset(), run.offset().saturating_add(run.bytes()));
        for region in memory.iter() {
            let region_start = region.start_addr().raw_value();
            let region_end = region_start + region.len();
            let from = start.max(region_start).next_multiple_of(PAGE_SIZE);
            let to = end.min(region_end) / PAGE_SIZE * PAGE_SIZE;
            if from < to && memory.address_in_range(GuestAddress(from)) {
                self.release.release(from, to - from);
            }
        }
    }

    /// Serves a fair share of `queue`; false if there may be more.
    fn serve(&self, queue: usize, queues: &mut QueueSet<'_>) -> bool {
        for _ in 0..REQUESTS_PER_CALL {
            let Some((head, descriptors)) = queues.pop_descriptors(queue) else {
                if queues.rearm(queue) {
                    continue;
                }
                return true;
            };
            let memory = queues.memory();
            match queue {
                INFLATE => self.inflate(memory, &descriptors),
                REPORTING => self.report(memory, &descriptors),
                // Pages taken out of the balloon come back by themselves when they are touched.
                _ => {}
            }
            queues.complete(queue, head, 0);
        }
        false
    }
}

impl VirtioDevice for Balloon {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        FEATURE_DEFLATE_ON_OOM | FEATURE_REPORTING
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
        while !self.serve(queue, queues) {
            if self.requeue.request() {
                break;
            }
        }
    }

    fn poll_fd(&self) -> Option<RawFd> {
        self.requeue.raw_fd()
    }

    fn process_host_event(&mut self, queues: &mut QueueSet<'_>) {
        if self.requeue.take() {
            for queue in [INFLATE, DEFLATE, REPORTING] {
                self.process_queue(queue, queues);
            }
        }
    }

    fn save(&self, _queues: &QueueSet<'_>) -> DeviceState {
        DeviceState::Balloon(BalloonState {
            target_pages: self.config.u32_at(TARGET_AT),
            actual_pages: self.config.u32_at(ACTUAL_AT),
        })
    }
}
