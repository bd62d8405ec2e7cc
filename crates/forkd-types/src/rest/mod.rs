//! The JSON bodies of the REST API, `/v1`.
//!
//! Field names, order, presence and defaults are what existing clients rely on. Additions are
//! optional fields, which those clients ignore. Times are Unix seconds; sizes are bytes unless the
//! name says otherwise; durations say their unit in the name.

mod agent;
mod bakes;
mod blobs;
mod branching;
mod checkpoints;
mod discovery;
mod events;
mod exec_stream;
mod files;
mod limits;
mod packs;
mod sandboxes;
mod snapshots;
mod tree;
mod usage;
mod workspaces;

pub use agent::{EvalRequest, EvalResponse, ExecRequest, ExecResponse, PingAnswer};
pub use bakes::{BakeEvent, BakeRequest, BakeVolume, WarmStep};
pub use blobs::BlobInfo;
pub use branching::{BranchMode, BranchRequest};
pub use checkpoints::{CheckpointInfo, CheckpointPlace, CheckpointRequest, RewindRequest};
pub use discovery::{API_VERSION, ErrorBody, Health, Version};
pub use events::{Event, EventKind};
pub use exec_stream::{
    ExecStreamControl, ExecStreamEvent, ExecStreamRequest, PtySize, STDERR_CHANNEL, STDIN_CHANNEL, STDOUT_CHANNEL,
    SignalName,
};
pub use files::{FileEntry, FileEvent, FileEventKind, FileKind, MakeDirectoryRequest, MoveFileRequest, WrittenFile};
pub use limits::{Cpus, EndCode, SandboxLimits};
pub use packs::{UnpackFate, UnpackReport, UnpackedSnapshot};
pub use sandboxes::{
    AutoCheckpoint, ForkRequest, GUEST_ADDR, LIFETIME_LIMIT_SECS, OnTimeout, SPAWN_LIMIT, SandboxInfo, SandboxMemory,
    SpawnFailure, SpawnReport, SpawnRequest, SpawnTimings, TimeoutRequest,
};
pub use snapshots::{
    CompactRequest, CreateSnapshotRequest, SnapshotDetail, SnapshotInfo, SnapshotStatus, VerifyProgress, VolumeInfo,
};
pub use tree::{Family, FamilyKind, FamilyMember, TREE_DEPTH};
pub use usage::SandboxUsage;
pub use workspaces::{
    CreateWorkspaceRequest, SuspendWorkspaceRequest, WORKSPACE_NAME_LIMIT, WorkspaceInfo, WorkspaceStatus,
};
