//! virtio-vsock, with the host's side in this process: a listening unix socket stands for all guest
//! ports, so no host module and no host-wide context ids are needed.
//!
//! A client connects to the unix socket and writes `CONNECT <port>\n`. The device opens a connection
//! to that port of the guest; when the guest accepts, the client reads `OK <host port>\n`, and from
//! there on both have a byte stream with half-close in both directions. When the guest refuses, the
//! socket is closed without an answer. Connections that the guest starts are refused.
//!
//! # Restored copies
//!
//! No connection survives into a copy. The device tells the driver so with a TRANSPORT_RESET event,
//! upon which Linux resets every *connected* socket of the guest (listeners stay). The driver handles
//! that event in a work item of its own, in no order with the one that receives packets: a connection
//! that is requested too early would be accepted and then reset along with the old ones. So requests
//! are held back until the driver has *handled* the event. It shows that by giving the event buffer
//! back: Linux's `virtio_transport_event_work` calls the handler first and
//! `virtio_vsock_event_fill_one` after it, then kicks the queue. Waiting for that costs one work item
//! in the guest and no timer.

mod connection;
mod device;
mod muxer;
mod parse;
mod state;
#[cfg(test)]
mod tests;

pub use device::Vsock;
pub use parse::{HEADER_LEN, Operation, PacketHeader, ShutdownFlags, parse_connect};
pub use state::VsockState;
