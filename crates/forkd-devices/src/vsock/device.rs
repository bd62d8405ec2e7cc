//! The vsock device: the three queues, and the order of events after a restore.

use std::os::fd::{OwnedFd, RawFd};
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use super::muxer::{FIRST_HOST_PORT, Muxer};
use super::parse::HEADER_LEN;
use super::state::VsockState;
use crate::config_space::ConfigSpace;
use crate::device::{DeviceState, VirtioDevice};
use crate::queue::QueueSet;
use crate::requeue::DescriptorError;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENT: usize = 2;
const QUEUE_SIZES: &[u16] = &[256, 256, 64];

/// Packets moved in one direction before the event loop gets to look at other work.
const PACKETS_PER_CALL: usize = 256;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`, little endian.
const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// What a restored driver still has to learn or do before connections can be requested.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum ResetEvent {
    /// Nothing: requests flow.
    Done,
    /// The event waits for a buffer; `earlier` events of previous copies are not handled either.
    Owed { earlier: u16 },
    /// `remaining` events were delivered; the driver had added buffers up to ring index `seen`.
    Delivered { remaining: u16, seen: u16 },
}

/// A virtio vsock device with its host side on a unix socket.
pub struct Vsock {
    muxer: Muxer,
    config: Arc<ConfigSpace>,
    active: bool,
    reset_event: ResetEvent,
}

impl Vsock {
    /// A device that no driver has found yet. `listener` is a listening unix stream socket.
    ///
    /// # Errors
    /// A descriptor cannot be prepared.
    pub fn new(guest_cid: u64, listener: OwnedFd) -> Result<Self, DescriptorError> {
        Ok(Self {
            muxer: Muxer::new(guest_cid, listener, FIRST_HOST_PORT)?,
            config: ConfigSpace::read_only(guest_cid.to_le_bytes().to_vec()),
            active: false,
            reset_event: ResetEvent::Done,
        })
    }

    /// A device whose driver goes on where it was, without its connections, under a context id that
    /// may be a new one.
    ///
    /// # Errors
    /// A descriptor cannot be prepared.
    pub fn restore(state: &VsockState, guest_cid: u64, listener: OwnedFd) -> Result<Self, DescriptorError> {
        let reset_event =
            if state.active { ResetEvent::Owed { earlier: state.unhandled_resets } } else { ResetEvent::Done };
        Ok(Self {
            muxer: Muxer::new(guest_cid, listener, state.next_host_port)?,
            config: ConfigSpace::read_only(guest_cid.to_le_bytes().to_vec()),
            active: state.active,
            reset_event,
        })
    }

    /// Delivers the reset event if it is owed and can be, and notes whether the driver handled it.
    fn advance_reset(&mut self, queues: &mut QueueSet<'_>) {
        while let ResetEvent::Owed { earlier } = self.reset_event {
            let Some(chain) = queues.pop(EVENT) else {
                if queues.rearm(EVENT) {
                    continue;
                }
                return;
            };
            let written = chain.writable.copy_from(&TRANSPORT_RESET);
            queues.complete(EVENT, chain.head, written as u32);
            if written == TRANSPORT_RESET.len() {
                // What is in the ring now was added before the event could be handled.
                let seen = queues.rearm_at_end(EVENT).unwrap_or_default();
                self.reset_event = ResetEvent::Delivered { remaining: earlier.saturating_add(1), seen };
            }
        }
        if let ResetEvent::Delivered { remaining, seen } = self.reset_event
            && let Some(end) = queues.rearm_at_end(EVENT)
        {
            self.reset_event = match remaining.saturating_sub(end.wrapping_sub(seen)) {
                0 => ResetEvent::Done,
                remaining => ResetEvent::Delivered { remaining, seen: end },
            };
        }
    }

    /// Moves packets both ways until there is nothing to do, or a fair share is done.
    fn exchange(&mut self, queues: &mut QueueSet<'_>) {
        if self.reset_event != ResetEvent::Done {
            self.advance_reset(queues);
        }
        loop {
            let transmitted_all = self.transmit(queues);
            let received_all = self.receive(queues);
            if transmitted_all && received_all || self.muxer.request_call() {
                return;
            }
        }
    }

    /// From the guest. False if a fair share was done and there may be more.
    fn transmit(&mut self, queues: &mut QueueSet<'_>) -> bool {
        for _ in 0..PACKETS_PER_CALL {
            if !self.muxer.takes_packets() {
                // The receive queue moves first; see `receive`.
                return true;
            }
            match queues.pop(TRANSMIT) {
                Some(chain) => {
                    let head = chain.head;
                    self.muxer.guest_packet(chain);
                    queues.complete(TRANSMIT, head, 0);
                }
                None if queues.rearm(TRANSMIT) => {}
                None => return true,
            }
        }
        false
    }

    /// To the guest. False if a fair share was done and there may be more, or if room for refusals
    /// was made that packets from the guest wait for.
    fn receive(&mut self, queues: &mut QueueSet<'_>) -> bool {
        let held = self.reset_event != ResetEvent::Done;
        let transmit_waits = !self.muxer.takes_packets();
        for _ in 0..PACKETS_PER_CALL {
            if !self.muxer.has_output(held) {
                return !transmit_waits;
            }
            let Some(chain) = queues.pop(RECEIVE) else {
                if queues.rearm(RECEIVE) {
                    continue;
                }
                return !(transmit_waits && self.muxer.takes_packets());
            };
            // A buffer without room for data would read as the end of a stream.
            if chain.writable.len() <= HEADER_LEN {
                queues.complete(RECEIVE, chain.head, 0);
                continue;
            }
            match self.muxer.fill(&chain, held) {
                Some(written) => queues.complete(RECEIVE, chain.head, written),
                None => queues.undo_pop(RECEIVE),
            }
        }
        false
    }
}

impl VirtioDevice for Vsock {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        // Without feature bits a device offers streams, and Linux asks for no bit for them.
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.config)
    }

    fn activate(&mut self, _features: u64) {
        self.active = true;
        self.reset_event = ResetEvent::Done;
    }

    fn reset(&mut self) {
        self.active = false;
        self.reset_event = ResetEvent::Done;
        self.muxer.clear();
    }

    fn process_queue(&mut self, _queue: usize, queues: &mut QueueSet<'_>) {
        self.exchange(queues);
    }

    fn poll_fd(&self) -> Option<RawFd> {
        Some(self.muxer.raw_fd())
    }

    fn process_host_event(&mut self, queues: &mut QueueSet<'_>) {
        self.muxer.host_events(self.active);
        if self.active {
            self.exchange(queues);
        }
    }

    fn after_restore(&mut self, queues: &mut QueueSet<'_>) {
        if self.active {
            self.exchange(queues);
        }
    }

    fn save(&self, queues: &QueueSet<'_>) -> DeviceState {
        let unhandled_resets = match self.reset_event {
            ResetEvent::Done => 0,
            ResetEvent::Owed { earlier } => earlier,
            ResetEvent::Delivered { remaining, seen } => {
                let end = queues.available_end(EVENT).unwrap_or(seen);
                remaining.saturating_sub(end.wrapping_sub(seen))
            }
        };
        DeviceState::Vsock(VsockState {
            active: self.active,
            next_host_port: self.muxer.next_host_port,
            unhandled_resets,
        })
    }
}
