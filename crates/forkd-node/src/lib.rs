//! Every sandbox of this host: zygotes, lifecycle, state database, adoption.
//!
//! The node drives monitor processes (`forkd-vmm`) over their control sockets and speaks with the
//! agents in their guests. It owns which sandboxes exist and what state they are in; it never
//! touches guest memory, knows nothing of HTTP, and holds no KVM descriptor beyond the one it hands
//! to each monitor.
//!
//! | module | owns |
//! |---|---|
//! | [`Node`] | the operations that the API offers |
//! | `control` | the connection to one monitor: commands out, events in |
//! | `process` | one process, held by pidfd and start time |
//! | `launch` | starting a fresh monitor |
//! | `zygotes` | one warm monitor per snapshot and backing |
//! | `spawn` | many children at once, each with its own failure |
//! | `sandbox` | the lifecycle of one child |
//! | `adoption` | finding running sandboxes again after a restart |
//! | `bake` | boot, warm, snapshot |
//! | `birth` | one child, from its fork until its agent answers |
//! | `frozen` | copies of running machines that hold still |
//! | `checkpoints` | frozen copies that a sandbox can be brought back to |
//! | `branch`, `compact` | snapshots of running sandboxes, and of snapshots |
//! | `packs` | snapshots that leave for and come from elsewhere |
//! | `snapshot_writer` | the process that writes a snapshot's files |
//! | `working_set` | which pages a zygote has read ahead |
//! | `guest` | requests to the agent in a guest |
//! | `run_files` | sockets, consoles and scratch files |
//! | `database` | what must outlive this process |

mod adoption;
mod bake;
mod birth;
mod branch;
mod cgroup;
mod checkpoints;
mod claims;
mod compact;
mod config;
mod console;
mod control;
mod cpu;
mod database;
mod error;
mod frozen;
mod guest;
mod host;
mod launch;
mod lineage;
mod memory;
mod node;
mod packs;
mod process;
mod publication;
mod run_files;
mod sandbox;
mod snapshot_writer;
mod snapshots;
mod spawn;
mod working_set;
mod zygotes;

pub use config::{NodeConfig, NodeConfigError};
pub use control::MonitorError;
pub use database::DatabaseError;
pub use error::{NodeError, NodeResult};
pub use forkd_store::pack::{DEFAULT_LEVEL, KeyError, Pack, PackError, PackOptions, UnpackOptions, VerifyingKey};
pub use guest::{GuestConnection, GuestError};
pub use launch::LaunchError;
pub use node::{BlobUpload, Node, NodeGauges};
pub use snapshots::{Removal, SnapshotDetail, VerifyProgress};
