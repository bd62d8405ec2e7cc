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
//! | `lifecycle` | which states a sandbox has and what leads from which to which |
//! | `sandbox` | one child from its birth to its end, and the roster of all |
//! | `lifetime` | sandboxes that end by themselves |
//! | `limits`, `allotment` | what a sandbox may take of the host, and what is set aside for it |
//! | `admission` | whether there is room for more |
//! | `suspend` | putting a running sandbox on disk and ending it |
//! | `workspaces` | sandboxes with a name, suspended and resumed |
//! | `activity` | whether a sandbox is in use |
//! | `events` | what happened, for whoever listens |
//! | `family`, `usage` | what there is, and what it costs |
//! | `adoption` | finding running sandboxes again after a restart |
//! | `bake` | boot, warm, snapshot |
//! | `ingredients` | a kernel and a root disk of this host, made ready to bake |
//! | `volumes` | further disks of a bake |
//! | `birth` | one child, from its fork until its agent answers |
//! | `frozen` | copies of running machines that hold still |
//! | `checkpoints` | frozen copies that a sandbox can be brought back to |
//! | `claims` | the life of a snapshot: which are being made, and which failed |
//! | `branch`, `compact` | snapshots of running sandboxes, and of snapshots |
//! | `branch_slots` | how many branches may be under way |
//! | `gauges` | what `/metrics` and `/readyz` tell |
//! | `packs` | snapshots that leave for and come from elsewhere |
//! | `snapshot_writer` | the process that writes a snapshot's files |
//! | `working_set` | which pages a zygote has read ahead |
//! | `guest` | requests to the agent in a guest |
//! | `console`, `console_stream` | what guests write to their consoles |
//! | `networks` | whether sandboxes have networks |
//! | `run_files` | sockets, consoles and scratch files |
//! | `database` | what must outlive this process |

mod activity;
mod admission;
mod adoption;
mod allotment;
mod bake;
mod birth;
mod branch;
mod branch_slots;
mod checkpoints;
mod claims;
mod compact;
mod config;
mod console;
mod console_stream;
mod control;
mod cpu;
mod database;
mod error;
mod events;
mod family;
mod frozen;
mod gauges;
mod guest;
mod host;
mod ingredients;
mod launch;
mod lifecycle;
mod lifetime;
mod limits;
mod lineage;
mod memory;
mod networks;
mod node;
mod packs;
mod process;
mod publication;
mod run_files;
mod sandbox;
mod snapshot_writer;
mod snapshots;
mod spawn;
mod suspend;
mod usage;
mod volumes;
mod working_set;
mod workspaces;
mod zygotes;

pub use activity::InUse;
pub use config::{LimitsMode, NodeConfig, NodeConfigError};
pub use console_stream::ConsoleStream;
pub use control::MonitorError;
pub use database::DatabaseError;
pub use database::answers::RememberedAnswer;
pub use error::{NodeError, NodeResult};
pub use events::Listener;
pub use forkd_store::pack::{DEFAULT_LEVEL, KeyError, Pack, PackError, PackOptions, UnpackOptions, VerifyingKey};
pub use gauges::{NodeGauges, ZygoteGauge};
pub use guest::{
    ByteRange, Changes, FileContent, GuestConnection, GuestError, Program, ProgramEvent, ProgramInput, ProgramOutput,
    Tunnel, Upload,
};
pub use launch::LaunchError;
pub use networks::{NetworkMode, NetworkSettings};
pub use node::ANSWER_GRACE;
pub use node::{BlobUpload, Node};
pub use snapshots::Removal;
