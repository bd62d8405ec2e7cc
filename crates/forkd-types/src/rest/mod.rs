//! The JSON bodies of the REST API, `/v1`.
//!
//! Field names, order, presence and defaults are what existing clients rely on. Additions are
//! optional fields, which those clients ignore. Times are Unix seconds; sizes are bytes unless the
//! name says otherwise; durations say their unit in the name.

mod agent;
mod bakes;
mod branching;
mod checkpoints;
mod discovery;
mod packs;
mod sandboxes;
mod snapshots;

pub use agent::{EvalRequest, EvalResponse, ExecRequest, ExecResponse};
pub use bakes::{BakeEvent, BakeRequest, WarmStep};
pub use branching::{BranchMode, BranchRequest};
pub use checkpoints::{CheckpointInfo, CheckpointPlace, CheckpointRequest, RewindRequest};
pub use discovery::{API_VERSION, ErrorBody, Health, Version};
pub use packs::{UnpackFate, UnpackReport, UnpackedSnapshot};
pub use sandboxes::{
    AutoCheckpoint, ForkRequest, GUEST_ADDR, SPAWN_LIMIT, SandboxInfo, SandboxMemory, SpawnFailure, SpawnReport,
    SpawnRequest, SpawnTimings,
};
pub use snapshots::{CompactRequest, SnapshotInfo, SnapshotStatus};
