//! Snapshots in the store.

use serde::{Deserialize, Serialize};

use crate::{StageTimings, Tag};

/// `POST /v1/snapshots/:tag/compact`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CompactRequest {
    /// Name of the snapshot to make: an equal without a parent, in one layer.
    pub to: String,
}

/// Whether a snapshot can be used.
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
        };
        assert_eq!(
            serde_json::to_string(&info).expect("plain data"),
            r#"{"tag":"py","dir":"/s/py","created_at_unix":7,"status":"ready","bootable":true}"#
        );
    }
}
