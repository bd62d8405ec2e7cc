//! A Linux machine under QEMU with nested KVM, for hosts without usable KVM.
//!
//! forkd's monitors need a real `/dev/kvm`. Where the host has none, or one that interprets guest code
//! ([`probe`] tells by timing), they run inside a machine: Debian's kernel and a small Debian root under QEMU,
//! with a virtual processor that has SVM. The same programs run there, shared from the host, and the daemon's
//! API is forwarded to a loopback port.
//!
//! [`Machine`] is the whole of it: start, stop, status, exec, remove. A machine that died is noticed on use
//! and started again by [`Machine::ensure_running`]; work that was cut off ends in
//! [`MachineError::MachineDied`] and can be repeated.
//!
//! This crate does not know what the programs in the machine do: to it they are a shared directory, one
//! port and one boot script.

mod agent;
mod assets;
mod boot;
mod console;
mod data_disk;
mod directory;
mod error;
mod exec;
mod health;
pub mod keep_alive;
mod machine;
mod options;
pub mod probe;
mod process;
mod progress;
mod qemu;
mod qmp;
mod ready;
mod record;
mod root_files;
#[cfg(test)]
mod silence;

pub use agent::AgentConnection;
pub use error::MachineError;
pub use exec::Streams;
pub use machine::{Machine, Running, StartOutcome, Status, StopOutcome};
pub use options::{Accel, PROGRAMS, Share, StartOptions};
pub use progress::{Progress, Report};
