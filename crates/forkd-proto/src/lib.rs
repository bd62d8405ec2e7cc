//! What travels between forkd's processes.
//!
//! - [`frame`]: the one framing both protocols use: length, kind, payload.
//! - [`agent`]: messages between a host program and the agent in a guest, over vsock.
//! - [`meter`]: messages between a benchmark and the program that measures in a guest, one JSON object a line.
//! - [`monitor`]: messages between the node and a monitor, over a unix socket that also carries
//!   file descriptors.
//!
//! Messages are JSON, so that a snapshot baked with an older agent keeps answering a newer daemon;
//! bulk bytes (standard streams, file contents) travel as raw frames.

pub mod agent;
pub mod frame;
pub mod meter;
pub mod monitor;
