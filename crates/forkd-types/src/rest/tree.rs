//! The family of snapshots, sandboxes and checkpoints.

use serde::{Deserialize, Serialize};

use super::{CheckpointInfo, SandboxInfo, SnapshotInfo};

/// `GET /v1/tree`: everything, each under what it came from.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Family {
    /// What derives from nothing that is still there, snapshots first; then what was cut off a tree for its depth.
    pub roots: Vec<FamilyMember>,
}

/// How many members hang below one another at most. What hangs lower is a root of its own, whose `from` says where it
/// belongs: readers of JSON refuse what is nested deeply, at 128 levels for example, and a member is two of them.
pub const TREE_DEPTH: usize = 48;

/// What a member of the family is.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FamilyKind {
    /// A snapshot.
    Snapshot,
    /// A sandbox.
    Sandbox,
    /// A checkpoint of the sandbox it hangs from.
    Checkpoint,
}

/// One member of the family and what came from it. Of `snapshot`, `sandbox` and `checkpoint` there is the one that
/// `kind` names.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FamilyMember {
    /// What it is.
    pub kind: FamilyKind,
    /// Its tag, id or name.
    pub name: String,
    /// What it came from, where it does not hang from that: it is a root only because its tree would be too deep.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// The snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<Box<SnapshotInfo>>,
    /// The sandbox.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<Box<SandboxInfo>>,
    /// Of a sandbox that runs: pages that only its monitor holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub private_bytes: Option<u64>,
    /// The checkpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<Box<CheckpointInfo>>,
    /// What came from it.
    #[cfg_attr(feature = "openapi", schema(no_recursion))]
    pub children: Vec<FamilyMember>,
}

impl FamilyMember {
    /// A snapshot and what came from it.
    pub fn snapshot(info: SnapshotInfo, children: Vec<Self>) -> Self {
        let (kind, name, snapshot) = (FamilyKind::Snapshot, info.tag.to_string(), Some(Box::new(info)));
        Self { kind, name, from: None, snapshot, sandbox: None, private_bytes: None, checkpoint: None, children }
    }

    /// A sandbox and what came from it.
    pub fn sandbox(info: SandboxInfo, private_bytes: Option<u64>, children: Vec<Self>) -> Self {
        let (kind, name, sandbox) = (FamilyKind::Sandbox, info.id.to_string(), Some(Box::new(info)));
        Self { kind, name, from: None, snapshot: None, sandbox, private_bytes, checkpoint: None, children }
    }

    /// A checkpoint.
    pub fn checkpoint(info: CheckpointInfo) -> Self {
        let (kind, name, checkpoint) = (FamilyKind::Checkpoint, info.name.clone(), Some(Box::new(info)));
        let (snapshot, sandbox, private_bytes, children) = (None, None, None, Vec::new());
        Self { kind, name, from: None, snapshot, sandbox, private_bytes, checkpoint, children }
    }
}
