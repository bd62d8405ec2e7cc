//! The network device: packets between the two queues and the tap.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

use super::parse::{LARGEST_PACKET, NET_HEADER_LEN, is_plausible_length};
use super::state::NetState;
use super::tap;
use crate::config_space::ConfigSpace;
use crate::device::{DeviceState, VirtioDevice};
use crate::queue::{Chain, QueueSet};
use crate::requeue::{DescriptorError, Requeue};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUE_SIZES: &[u16] = &[256, 256];

const TAP: u64 = 0;
const REQUEUE: u64 = 1;

/// Packets delivered before the event loop gets to look at other work.
const PACKETS_PER_CALL: usize = 64;

/// Where the header says over how many buffers the packet goes.
const NUM_BUFFERS_AT: usize = 10;

/// Packets that did not arrive. Counts since the device was made.
#[derive(Debug, Default)]
pub struct NetCounters {
    /// From the guest, and the tap would not have them.
    pub transmit_dropped: AtomicU64,
    /// To the guest, and larger than the buffers it offers.
    pub receive_dropped: AtomicU64,
}

/// A virtio network device over a tap, or one whose cable is not plugged in.
pub struct Net {
    mac: [u8; 6],
    /// Without one the link is down, and what the guest sends is lost.
    tap: Option<OwnedFd>,
    epoll: OwnedFd,
    requeue: Requeue,
    config: Arc<ConfigSpace>,
    counters: Arc<NetCounters>,
    features: Option<u64>,
    /// The tap may have packets; cleared when a read says it has none. The tap is watched
    /// edge-triggered, so a guest without buffers leaves packets in the tap and costs nothing.
    readable: bool,
    /// Room for one packet; allocated with the first.
    packet: Vec<u8>,
    /// Bytes of the packet that waits for buffers of the guest, 0 for none.
    held: usize,
}

impl Net {
    /// A device that no driver has found yet. `tap` is attached with `IFF_TAP | IFF_NO_PI |
    /// IFF_VNET_HDR`.
    ///
    /// # Errors
    /// The tap does not accept the settings, or a descriptor cannot be prepared.
    pub fn new(mac: [u8; 6], tap: OwnedFd) -> Result<Self, DescriptorError> {
        Self::restore(&NetState { mac, features: None }, Some(tap))
    }

    /// A device whose driver goes on where it was, on a tap of its own or, where there are no networks, on none.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn restore(state: &NetState, tap: Option<OwnedFd>) -> Result<Self, DescriptorError> {
        let failed = |action| move |source: io::Error| DescriptorError { device: "network", action, source };
        let epoll =
            epoll::create(CreateFlags::CLOEXEC).map_err(|error| failed("creating the event queue")(error.into()))?;
        if let Some(tap) = &tap {
            rustix::io::ioctl_fionbio(tap, true)
                .map_err(|error| failed("making the tap non-blocking")(error.into()))?;
            tap::set_header_len(tap, NET_HEADER_LEN).map_err(failed("setting the tap's header length"))?;
            tap::set_offloads(tap, state.features.unwrap_or(0)).map_err(failed("setting the tap's offloads"))?;
            epoll::add(&epoll, tap, EventData::new_u64(TAP), EventFlags::IN | EventFlags::ET)
                .map_err(|error| failed("watching the tap")(error.into()))?;
        }
        let requeue = Requeue::new();
        if let Some(fd) = requeue.fd() {
            epoll::add(&epoll, fd, EventData::new_u64(REQUEUE), EventFlags::IN)
                .map_err(|error| failed("watching for left-over work")(error.into()))?;
        }
        let mut config = state.mac.to_vec();
        let status = if tap.is_some() { VIRTIO_NET_S_LINK_UP as u16 } else { 0 };
        config.extend(status.to_le_bytes());
        Ok(Self {
            mac: state.mac,
            readable: tap.is_some(),
            tap,
            epoll,
            requeue,
            config: ConfigSpace::read_only(config),
            counters: Arc::default(),
            features: state.features,
            packet: Vec::new(),
            held: 0,
        })
    }

    /// The counters, to read them later.
    pub fn counters(&self) -> Arc<NetCounters> {
        Arc::clone(&self.counters)
    }

    fn merges_buffers(&self) -> bool {
        self.features.is_some_and(|features| features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0)
    }

    /// From the guest to the tap.
    fn transmit(&mut self, queues: &mut QueueSet<'_>) {
        let (tap, counters) = (&self.tap, &self.counters);
        self.requeue.drain(queues, TRANSMIT, |chain| {
            // A full or lowered interface loses packets, as a wire does.
            let sent = is_plausible_length(chain.readable.len())
                && tap.as_ref().is_some_and(|tap| chain.readable.write_packet(tap).is_ok());
            if !sent {
                counters.transmit_dropped.fetch_add(1, Ordering::Relaxed);
            }
            0
        });
    }

    /// From the tap to the guest, until the tap is empty, the guest has no buffers, or a fair share
    /// is done.
    fn receive(&mut self, queues: &mut QueueSet<'_>) {
        loop {
            for _ in 0..PACKETS_PER_CALL {
                if self.held == 0 && !self.read_packet() {
                    return;
                }
                let seen = queues.available_end(RECEIVE);
                if self.deliver(queues) {
                    self.held = 0;
                } else if queues.rearm_at_end(RECEIVE) == seen {
                    // Some buffers may be there, too few for this packet; it goes on with the next.
                    return;
                }
            }
            if self.requeue.request() {
                return;
            }
        }
    }

    /// Takes a packet from the tap; false if there is none.
    fn read_packet(&mut self) -> bool {
        let Some(tap) = self.tap.as_ref().filter(|_| self.readable) else { return false };
        self.packet.resize(LARGEST_PACKET, 0);
        loop {
            match rustix::io::read(tap, &mut self.packet[..]) {
                Ok(len) if is_plausible_length(len) => {
                    self.held = len;
                    return true;
                }
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                // Also when the interface is down; it makes an edge when it comes up.
                Err(_) => {
                    self.readable = false;
                    return false;
                }
            }
        }
    }

    /// Copies the held packet into buffers of the guest; false if it has too few at the moment.
    fn deliver(&mut self, queues: &mut QueueSet<'_>) -> bool {
        let mut chains: Vec<Chain<'_>> = Vec::new();
        let mut room = 0;
        while room < self.held {
            let Some(chain) = queues.pop(RECEIVE) else {
                chains.iter().for_each(|_| queues.undo_pop(RECEIVE));
                return false;
            };
            room += chain.writable.len();
            chains.push(chain);
            // Without merging a packet takes one buffer. A merged packet of more buffers than the
            // ring has never fits either.
            let fits = room >= self.held;
            if !fits && (!self.merges_buffers() || chains.len() >= usize::from(QUEUE_SIZES[RECEIVE])) {
                chains.iter().for_each(|_| queues.undo_pop(RECEIVE));
                self.counters.receive_dropped.fetch_add(1, Ordering::Relaxed);
                return true;
            }
        }
        let count = (chains.len() as u16).to_le_bytes();
        self.packet[NUM_BUFFERS_AT..NET_HEADER_LEN].copy_from_slice(&count);
        let mut rest = &self.packet[..self.held];
        let mut completions = Vec::with_capacity(chains.len());
        for chain in &chains {
            let copied = chain.writable.copy_from(rest);
            rest = &rest[copied..];
            completions.push((chain.head, copied as u32));
        }
        queues.complete_together(RECEIVE, &completions);
        true
    }
}

impl VirtioDevice for Net {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        [
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
        ]
        .iter()
        .fold(0, |features, feature| features | 1 << feature)
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.config)
    }

    fn activate(&mut self, features: u64) {
        self.features = Some(features);
        // The tap took the same call with no offloads before; without them it makes smaller packets.
        let _ = self.tap.as_ref().map(|tap| tap::set_offloads(tap, features));
    }

    fn reset(&mut self) {
        self.features = None;
        self.held = 0;
        let _ = self.tap.as_ref().map(|tap| tap::set_offloads(tap, 0));
    }

    fn process_queue(&mut self, queue: usize, queues: &mut QueueSet<'_>) {
        if queue == TRANSMIT {
            self.transmit(queues);
        } else {
            self.receive(queues);
        }
    }

    fn poll_fd(&self) -> Option<RawFd> {
        Some(self.epoll.as_raw_fd())
    }

    fn process_host_event(&mut self, queues: &mut QueueSet<'_>) {
        const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut events = [epoll::Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }; 2];
        let count = epoll::wait(&self.epoll, &mut events[..], Some(&NOW)).unwrap_or(0);
        let mut left_over = false;
        for event in &events[..count] {
            match event.data.u64() {
                REQUEUE => left_over = self.requeue.take(),
                _ => self.readable = true,
            }
        }
        if self.features.is_none() {
            return;
        }
        if left_over {
            self.transmit(queues);
        }
        self.receive(queues);
    }

    fn after_restore(&mut self, queues: &mut QueueSet<'_>) {
        if self.features.is_some() {
            self.receive(queues);
        }
    }

    fn save(&self, _queues: &QueueSet<'_>) -> DeviceState {
        DeviceState::Net(NetState { mac: self.mac, features: self.features })
    }
}
