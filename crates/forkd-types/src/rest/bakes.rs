//! Snapshots made from images.

use serde::{Deserialize, Serialize};

use super::SnapshotInfo;
use crate::{MountPoint, StageTimings, VolumePolicy};

/// `POST /v1/bakes`: boot a root disk, warm it, snapshot it. Answered by a stream of [`BakeEvent`],
/// one JSON object a line.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BakeRequest {
    /// Name of the snapshot to make.
    pub tag: String,
    /// Digest of a root disk that was uploaded before (`PUT /v1/blobs/:digest`).
    pub disk: String,
    /// Digest of an uploaded kernel.
    pub kernel: String,
    /// Digest of an uploaded initramfs.
    pub initramfs: String,
    /// vCPUs, 1 to 8.
    #[serde(default = "one")]
    pub vcpus: u32,
    /// Guest memory, 128 to 16384 MiB.
    #[serde(default = "default_memory")]
    pub memory_mib: u64,
    /// Commands run before the snapshot, each must exit 0.
    #[serde(default)]
    pub run: Vec<Vec<String>>,
    /// Source run in a language's warm runtime before the snapshot, each must succeed.
    #[serde(default)]
    pub warm: Vec<WarmStep>,
    /// How long the guest may take to reach its agent.
    #[serde(default = "default_boot_timeout")]
    pub boot_timeout_secs: u64,
    /// Kernel command line added to the built-in one.
    #[serde(default)]
    pub kernel_args: Option<String>,
    /// Disks besides the root disk; the first is the guest's `/dev/vdb`. At most 24.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<BakeVolume>,
    /// Replace a snapshot of the same tag.
    #[serde(default)]
    pub replace: bool,
}

/// A disk besides the root disk.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BakeVolume {
    /// Digest of an uploaded image, a whole number of 512 byte sectors. One of an ext4 file system is mounted.
    pub image: String,
    /// Where: an absolute path, made if it is not there.
    pub path: MountPoint,
    /// What copies of the guest have of it.
    #[serde(default)]
    pub policy: VolumePolicy,
}

fn default_memory() -> u64 {
    512
}

fn default_boot_timeout() -> u64 {
    180
}

/// One statement run in a warm runtime.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct WarmStep {
    /// `python` or `node`.
    pub language: String,
    /// Source text.
    pub code: String,
}

/// Progress of a bake.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum BakeEvent {
    /// A step began.
    Step {
        /// What is being done, for a person.
        message: String,
    },
    /// A piece of the guest's console.
    Console {
        /// Text as it came.
        text: String,
    },
    /// The snapshot is there.
    Done {
        /// The new snapshot.
        snapshot: Box<SnapshotInfo>,
        /// Where the time went.
        stages: StageTimings,
    },
    /// The bake failed; nothing was published.
    Failed {
        /// Why, with the end of the guest's console where that helps.
        error: String,
    },
}

fn one() -> u32 {
    1
}
