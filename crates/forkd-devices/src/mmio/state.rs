//! What a transport saves, and why a saved state may be refused.

use serde::{Deserialize, Serialize};

use crate::device::DeviceState;
use crate::queue::QueueState;

/// The saved state of one virtio-mmio device: registers, queues, and the device behind them.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TransportState {
    /// The status register.
    pub status: u32,
    /// Interrupt causes that the driver has not acknowledged.
    pub interrupt_status: u32,
    /// Which half of the device features is shown.
    pub device_features_select: u32,
    /// Which half of the driver features is written.
    pub driver_features_select: u32,
    /// What the driver accepted.
    pub driver_features: u64,
    /// Which queue the queue registers concern.
    pub queue_select: u32,
    /// How often the configuration space changed.
    pub config_generation: u32,
    /// The queues, as many as the device has.
    pub queues: Vec<QueueState>,
    /// The device.
    pub device: DeviceState,
}

/// Why a saved state cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The state belongs to a device with other queues.
    #[error("restoring virtio device {device_id}: the state has {saved} queues, the device has {own}")]
    QueueCount {
        /// virtio device number.
        device_id: u32,
        /// Queues in the state.
        saved: usize,
        /// Queues of the device.
        own: usize,
    },
    /// The driver had accepted features that this device does not offer.
    #[error(
        "restoring virtio device {device_id}: its driver uses features {accepted:#x}, of which this device lacks {missing:#x}"
    )]
    Features {
        /// virtio device number.
        device_id: u32,
        /// What the driver accepted.
        accepted: u64,
        /// Those that are not offered.
        missing: u64,
    },
    /// A queue does not lie in guest memory, or its size is not possible.
    #[error("restoring virtio device {device_id}: queue {queue} is not usable with this guest memory: {state:?}")]
    Queue {
        /// virtio device number.
        device_id: u32,
        /// Index of the queue.
        queue: usize,
        /// The state of the queue.
        state: QueueState,
        /// What is wrong with it.
        source: virtio_queue::Error,
    },
    /// The saved state of the serial port is not one.
    #[error("restoring the serial port: {len} bytes wait in its input buffer, which holds 64")]
    SerialInput {
        /// Bytes in the state.
        len: usize,
    },
}
