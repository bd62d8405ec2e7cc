//! Requests to the agent in a guest.
//!
//! A connection starts on the sandbox's vsock socket with `CONNECT <port>` and the monitor's
//! `OK <port>`; then it carries one request of [`forkd_proto::agent`].
//!
//! | module | owns |
//! |---|---|
//! | [`connection`](GuestConnection) | one connection, before its request |
//! | `requests` | what the node itself asks of a guest |
//! | `identity` | who a fresh copy is |
//! | [`program`](Program) | a running program's streams |
//! | [`files`](FileContent) | files, trees and their changes |
//! | [`tunnel`](Tunnel) | a TCP port of the guest |
//! | `frames` | frames in, frames out |

mod connection;
mod error;
mod files;
mod frames;
mod identity;
mod program;
mod requests;
mod tunnel;

pub use connection::GuestConnection;
pub use error::GuestError;
pub use files::{ByteRange, Changes, FileContent, Upload};
pub use program::{Program, ProgramEvent, ProgramInput, ProgramOutput};
pub use tunnel::Tunnel;

pub(crate) use identity::fresh_identity;
pub(crate) use requests::Guest;
