//! What a virtio device owes its transport.
//!
//! ```text
//!              DRIVER_OK                      notify, host fd readable
//! ┌──────────┐ activate  ┌──────────┐ process_queue, process_host_event ─┐
//! │ inactive │──────────►│  active  │◄────────────────────────────────────┘
//! └──────────┘◄──────────└──────────┘
//!              reset (driver wrote status 0, or stopped a queue's device)
//! ```
//!
//! A restored device begins in the state it was saved in; `restore` functions of the devices take
//! the place of `new` and `activate` together.

use std::os::fd::RawFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::balloon::BalloonState;
use crate::block::BlockState;
use crate::config_space::ConfigSpace;
use crate::net::NetState;
use crate::queue::QueueSet;
use crate::rng::RngState;
use crate::vsock::VsockState;

/// A device behind [`MmioTransport`](crate::mmio::MmioTransport).
///
/// All methods but those that only report are called with the transport's device lock held, on the
/// event-loop thread, except `activate` and `reset`, which run on the vCPU thread that wrote the
/// status register. Work is synchronous: when a method returns, nothing is in flight.
pub trait VirtioDevice: Send {
    /// The virtio device number. Constant.
    fn device_id(&self) -> u32;

    /// Features of this device type, without those of the transport and the rings. Constant.
    fn features(&self) -> u64;

    /// The largest size of each queue, powers of two. Constant.
    fn queue_sizes(&self) -> &'static [u16];

    /// The configuration space. The same object every time.
    fn config(&self) -> Arc<ConfigSpace>;

    /// The driver is ready (DRIVER_OK); `features` is what it accepted, a subset of what was
    /// offered. Its queues can be used from the next call on.
    fn activate(&mut self, features: u64);

    /// The driver gave the device up. Owed: forget the driver's requests and connections, keep the
    /// backing files. The queues are gone already.
    fn reset(&mut self);

    /// The driver added requests to queue `queue`. Owed: serve them or keep in mind to, and
    /// [`rearm`](QueueSet::rearm) the queue when it is empty.
    fn process_queue(&mut self, queue: usize, queues: &mut QueueSet<'_>);

    /// A descriptor to poll for readability, for the whole life of the device.
    fn poll_fd(&self) -> Option<RawFd> {
        None
    }

    /// The descriptor became readable. Also called while inactive: host events must be consumed then
    /// too, or the level-triggered poll spins.
    fn process_host_event(&mut self, queues: &mut QueueSet<'_>) {
        let _ = queues;
    }

    /// Called once on a restored device, before the first vCPU runs.
    fn after_restore(&mut self, queues: &mut QueueSet<'_>) {
        let _ = queues;
    }

    /// What `restore` needs beyond the transport's state. vCPUs stand still.
    fn save(&self, queues: &QueueSet<'_>) -> DeviceState;
}

/// The saved state of one device.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum DeviceState {
    /// virtio-blk.
    Block(BlockState),
    /// virtio-vsock.
    Vsock(VsockState),
    /// virtio-rng.
    Rng(RngState),
    /// virtio-balloon.
    Balloon(BalloonState),
    /// virtio-net.
    Net(NetState),
}
