//! Snapshots in the store.

use serde::{Deserialize, Serialize};

use crate::{MountPoint, StageTimings, Tag, VolumePolicy};

/// `POST /v1/snapshots/:tag/compact`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CompactRequest {
    /// Name of the snapshot to make: an equal without a parent, in one layer.
    pub to: String,
}

/// `POST /v1/snapshots`: boot a kernel and a root disk that lie on the daemon's host, and snapshot the machine once
/// its agent answers. Two vCPUs, 512 MiB; `POST /v1/bakes` offers more.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CreateSnapshotRequest {
    /// Name of the snapshot to make.
    pub tag: String,
    /// Path of a `vmlinux` or bzImage on the daemon's host.
    pub kernel: String,
    /// Path of a raw ext4 image on the daemon's host. It is copied and never written.
    pub rootfs: String,
    /// Accepted for existing clients: every child writes to its own copy.
    #[serde(default)]
    pub rw: bool,
    /// Accepted for existing clients: guests need no host interface.
    #[serde(default)]
    pub tap: Option<String>,
    /// At most 60. Accepted for existing clients: the guest's agent tells when it is up.
    #[serde(default = "ten")]
    pub boot_wait_secs: u64,
}

fn ten() -> u64 {
    10
}

/// Whether a snapshot can be used.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SnapshotStatus {
    /// Whole and usable.
    Ready,
    /// Being written.
    Writing,
    /// Not usable; `warning` says why.
    Failed,
}

/// One snapshot. Absent optional fields are left out.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SnapshotInfo {
    /// Name.
    pub tag: Tag,
    /// Directory, on the daemon's host.
    pub dir: String,
    /// Creation time.
    pub created_at_unix: u64,
    /// The sandbox it was branched from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branched_from: Option<String>,
    /// How long its source stood still.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_ms: Option<u64>,
    /// How long finding and writing what changed took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diff_ms: Option<u64>,
    /// What changed, in bytes as stored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diff_physical_bytes: Option<u64>,
    /// Size of the memory in which it was looked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diff_logical_bytes: Option<u64>,
    /// Where the time of its making went; only in the answer to the request that made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stages: Option<StageTimings>,
    /// The snapshot that it is a layer over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent_tag: Option<Tag>,
    /// Why it cannot be used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
    /// Whether it can be used.
    pub status: SnapshotStatus,
    /// `status` is ready.
    pub bootable: bool,
    /// Guest memory size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// What the snapshot occupies on disk, its root disk not counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored_bytes: Option<u64>,
    /// Its disks besides the root disk; the first is the guest's `/dev/vdb`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<VolumeInfo>,
}

/// A disk besides the root disk.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VolumeInfo {
    /// Where the guest has it.
    pub path: MountPoint,
    /// What copies of the guest have of it.
    pub policy: VolumePolicy,
    /// Digest of the image that it began as.
    pub image: String,
    /// Its size as the guest sees it.
    pub bytes: u64,
}

/// `GET /v1/snapshots/:tag/info`. Absent optional fields are left out.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SnapshotDetail {
    /// Name.
    pub tag: Tag,
    /// Directory, on the daemon's host.
    pub dir: String,
    /// Creation time.
    pub created_at_unix: u64,
    /// Size of the guest's memory.
    pub memory_logical_bytes: u64,
    /// What its own memory layers occupy on disk.
    pub memory_physical_bytes: u64,
    /// Size of the CPU and device state.
    pub vmstate_bytes: u64,
    /// The snapshot it derives from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent_tag: Option<Tag>,
    /// Digest of that snapshot's description, and so of its content.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent_content_hash: Option<String>,
    /// How many snapshots it derives from; 0 for a base.
    pub chain_depth: usize,
    /// Snapshots that derive directly from it.
    pub dependents: Vec<Tag>,
    /// Snapshots that it derives from, the base first.
    pub ancestors: Vec<Tag>,
    /// vCPUs.
    pub vcpus: u8,
    /// Release of the guest's kernel.
    pub kernel_release: String,
    /// Version of the agent in the guest.
    pub agent_version: String,
    /// Languages whose runtime is warm.
    pub warm: Vec<String>,
}

/// One line of `POST /v1/snapshots/:tag/verify`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum VerifyProgress {
    /// A file is being looked at.
    Checking {
        /// What it is.
        what: String,
        /// Bytes done.
        done_bytes: u64,
        /// Bytes in all.
        total_bytes: u64,
    },
    /// A file is not what was written.
    Bad {
        /// What it is.
        what: String,
        /// Where it is.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Everything was looked at.
    Done {
        /// Whether every file is what was written.
        good: bool,
        /// How many files there are.
        files: usize,
        /// Their size together.
        total_bytes: u64,
    },
    /// It is not even known which files there should be.
    Failed {
        /// Why.
        error: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_leaves_out_what_it_does_not_know() {
        let info = SnapshotInfo {
            tag: "py".parse().expect("legal tag"),
            dir: "/s/py".to_owned(),
            created_at_unix: 7,
            branched_from: None,
            pause_ms: None,
            diff_ms: None,
            diff_physical_bytes: None,
            diff_logical_bytes: None,
            stages: None,
            parent_tag: None,
            warning: None,
            status: SnapshotStatus::Ready,
            bootable: true,
            memory_bytes: None,
            stored_bytes: None,
            volumes: Vec::new(),
        };
        assert_eq!(
            serde_json::to_string(&info).expect("plain data"),
            r#"{"tag":"py","dir":"/s/py","created_at_unix":7,"status":"ready","bootable":true}"#
        );
    }
}
