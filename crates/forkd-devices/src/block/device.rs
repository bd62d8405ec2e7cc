//! The block device: requests from the queue to the disk and back.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use forkd_types::PAGE_SIZE;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::disk::{BlockDisk, DiskError, SECTOR};
use super::parse::{
    HEADER_LEN, MOST_SECTORS, MOST_SEGMENTS, Request, RequestError, SEGMENT_LEN, parse_header, parse_segments,
};
use super::state::BlockState;
use crate::config_space::ConfigSpace;
use crate::device::{DeviceState, VirtioDevice};
use crate::guest_buffers::GuestBuffers;
use crate::queue::{Chain, QueueSet};
use crate::requeue::Requeue;

const REQUESTS: usize = 0;
const QUEUE_SIZE: u16 = 256;
const QUEUE_SIZES: &[u16] = &[QUEUE_SIZE];
/// Data segments of a request; header and status take a descriptor each.
const MOST_DATA_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
const CONFIG_LEN: usize = 60;

/// A disk that a device and the VMM share: the VMM seals it when it forks the machine.
#[derive(Clone, Debug)]
pub struct SharedDisk(Arc<Mutex<BlockDisk>>);

impl SharedDisk {
    /// Shares `disk`.
    pub fn new(disk: BlockDisk) -> Self {
        Self(Arc::new(Mutex::new(disk)))
    }

    /// Exclusive use; the device waits meanwhile.
    pub fn lock(&self) -> MutexGuard<'_, BlockDisk> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a block device has seen go wrong. Counts since it was made.
#[derive(Debug, Default)]
pub struct BlockCounters {
    /// Requests that the driver got wrong: bad chains, unknown types, ranges off the disk.
    pub refused: AtomicU64,
    /// Requests that failed because a file of the disk could not be read or written.
    pub failed: AtomicU64,
    /// Of those, the ones for which the host had no room, or gave the machine none.
    pub out_of_space: AtomicU64,
}

/// A virtio block device.
pub struct Block {
    disk: SharedDisk,
    serial: String,
    read_only: bool,
    config: Arc<ConfigSpace>,
    counters: Arc<BlockCounters>,
    requeue: Requeue,
}

impl Block {
    /// A device over `disk` that no driver has found yet. `serial` is cut to 20 bytes when a driver
    /// asks for it.
    pub fn new(disk: BlockDisk, serial: &str) -> Self {
        let config = ConfigSpace::read_only(config_bytes(disk.size()));
        Self {
            read_only: disk.is_read_only(),
            disk: SharedDisk::new(disk),
            serial: serial.to_owned(),
            config,
            counters: Arc::default(),
            requeue: Requeue::new(),
        }
    }

    /// A device whose driver goes on where it was; `disk` has the content it had then.
    pub fn restore(state: &BlockState, disk: BlockDisk) -> Self {
        Self::new(disk, &state.serial)
    }

    /// The disk, to seal it later.
    pub fn disk(&self) -> SharedDisk {
        self.disk.clone()
    }

    /// The counters, to read them later.
    pub fn counters(&self) -> Arc<BlockCounters> {
        Arc::clone(&self.counters)
    }
}

/// `struct virtio_blk_config`. Discards are aligned to whole blocks, because smaller ones free
/// nothing; a physical block of 4 KiB keeps guest file systems from writing parts of blocks.
fn config_bytes(size: u64) -> Vec<u8> {
    let mut bytes = vec![0; CONFIG_LEN];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    let sectors_per_block = (PAGE_SIZE / SECTOR) as u32;
    put(0, &(size / SECTOR).to_le_bytes());
    put(12, &MOST_DATA_SEGMENTS.to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    put(24, &[sectors_per_block.trailing_zeros() as u8]);
    put(26, &(sectors_per_block as u16).to_le_bytes());
    put(36, &MOST_SECTORS.to_le_bytes());
    put(40, &(MOST_SEGMENTS as u32).to_le_bytes());
    put(44, &sectors_per_block.to_le_bytes());
    put(48, &MOST_SECTORS.to_le_bytes());
    put(52, &(MOST_SEGMENTS as u32).to_le_bytes());
    put(56, &[1]);
    bytes
}

/// Why a request was answered with an error.
enum Failure {
    Request(RequestError),
    Disk(DiskError),
    Misshapen,
}

impl From<RequestError> for Failure {
    fn from(error: RequestError) -> Self {
        Self::Request(error)
    }
}

impl From<DiskError> for Failure {
    fn from(error: DiskError) -> Self {
        Self::Disk(error)
    }
}

/// Serves one chain: 16 bytes of header, data, one byte of status. Returns the bytes written to it.
fn serve(disk: &mut BlockDisk, serial: &str, counters: &BlockCounters, mut chain: Chain<'_>) -> u32 {
    let Some(data_len) = chain.writable.len().checked_sub(1) else {
        counters.refused.fetch_add(1, Ordering::Relaxed);
        return 0;
    };
    let data = chain.writable.split_front(data_len);
    let status = chain.writable;
    let (code, written) = match perform(disk, serial, chain.readable, &data) {
        Ok(written) => (VIRTIO_BLK_S_OK, written),
        Err(failure) => (refusal(&failure, counters), 0),
    };
    status.copy_from(&[code as u8]);
    written + 1
}

/// Counts a failure; the status byte that reports it.
fn refusal(failure: &Failure, counters: &BlockCounters) -> u32 {
    let count = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
    match failure {
        Failure::Disk(error @ (DiskError::File { .. } | DiskError::OverBudget { .. })) => {
            count(&counters.failed);
            if error.is_out_of_space() {
                count(&counters.out_of_space);
            }
            VIRTIO_BLK_S_IOERR
        }
        Failure::Request(RequestError::Unsupported(_)) => {
            count(&counters.refused);
            VIRTIO_BLK_S_UNSUPP
        }
        _ => {
            count(&counters.refused);
            VIRTIO_BLK_S_IOERR
        }
    }
}

/// Does what the request asks; the number of bytes written to `data`.
fn perform(
    disk: &mut BlockDisk,
    serial: &str,
    mut readable: GuestBuffers<'_>,
    data: &GuestBuffers<'_>,
) -> Result<u32, Failure> {
    let mut header = [0; HEADER_LEN];
    if readable.split_front(HEADER_LEN).copy_to(&mut header) != HEADER_LEN {
        return Err(Failure::Misshapen);
    }
    let whole_sectors = |buffers: &GuestBuffers<'_>| {
        if buffers.len().is_multiple_of(SECTOR as usize) { Ok(()) } else { Err(Failure::Misshapen) }
    };
    match parse_header(&header)? {
        Request::Read(offset) => {
            whole_sectors(data)?;
            disk.read_buffers(offset, data.clone())?;
            Ok(data.len() as u32)
        }
        Request::Write(offset) => {
            whole_sectors(&readable)?;
            disk.write_buffers(offset, &readable)?;
            Ok(0)
        }
        Request::Flush => {
            disk.flush();
            Ok(0)
        }
        Request::GetId => {
            let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
            for (to, from) in id.iter_mut().zip(serial.bytes()) {
                *to = from;
            }
            Ok(data.copy_from(&id) as u32)
        }
        request @ (Request::Discard | Request::WriteZeroes) => {
            let mut list = vec![0; readable.len().min(MOST_SEGMENTS * SEGMENT_LEN + 1)];
            readable.copy_to(&mut list);
            let segments = parse_segments(&list, request == Request::WriteZeroes)?;
            for segment in &segments {
                disk.check(segment.offset, segment.len)?;
            }
            for segment in segments {
                if request == Request::Discard {
                    disk.discard(segment.offset, segment.len)?;
                } else {
                    disk.write_zeroes(segment.offset, segment.len)?;
                }
            }
            Ok(0)
        }
    }
}

impl VirtioDevice for Block {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let every = 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY;
        every
            | match self.read_only {
                true => 1 << VIRTIO_BLK_F_RO,
                false => 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES,
            }
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
        let mut disk = self.disk.lock();
        self.requeue.drain(queues, queue, |chain| serve(&mut disk, &self.serial, &self.counters, chain));
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
        DeviceState::Block(BlockState { serial: self.serial.clone() })
    }
}
