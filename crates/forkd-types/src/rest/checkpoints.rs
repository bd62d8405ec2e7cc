//! Checkpoints of a sandbox, and rewinding to one.

use serde::{Deserialize, Serialize};

use crate::StageTimings;

/// `POST /v1/sandboxes/:id/checkpoints`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct CheckpointRequest {
    /// Its name; `cp-N` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Put it on disk at once, where it outlives the host's memory.
    #[serde(default)]
    pub disk: bool,
}

/// Where a checkpoint is.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckpointPlace {
    /// In a frozen copy of the machine.
    #[default]
    Memory,
    /// In a snapshot that is not listed.
    Disk,
}

/// One checkpoint of a sandbox.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CheckpointInfo {
    /// Its name, unique within the sandbox.
    pub name: String,
    /// Creation time.
    pub created_at_unix: u64,
    /// How long the sandbox stood still for it.
    pub pause_us: u64,
    /// Where that time went; known while the checkpoint is in memory, by the daemon that took it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stages: Option<StageTimings>,
    /// Where it is.
    #[serde(default)]
    pub place: CheckpointPlace,
    /// Whether it was taken because the sandbox has automatic checkpoints.
    #[serde(default)]
    pub automatic: bool,
    /// In memory: guest memory that it shares with no file, as of now; some of it with the sandbox and other
    /// checkpoints.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub private_bytes: Option<u64>,
    /// On disk: what it takes there and shares with no snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored_bytes: Option<u64>,
}

/// `POST /v1/sandboxes/:id/rewind`: back to a checkpoint, which stays; later ones go.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct RewindRequest {
    /// The checkpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// How many checkpoints back, 1 being the newest. Absent with no name: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub back: Option<u32>,
}
