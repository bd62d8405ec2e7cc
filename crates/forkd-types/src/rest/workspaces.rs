//! Workspaces: sandboxes with a name, that can be put on disk and brought back.

use serde::{Deserialize, Serialize};

use crate::{SandboxId, Tag};

/// The longest name of a workspace, in bytes: the tag of its state, `ws-<name>-state`, has 9 more.
pub const WORKSPACE_NAME_LIMIT: usize = 55;

/// `POST /v1/workspaces`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CreateWorkspaceRequest {
    /// Its name: 1 to [`WORKSPACE_NAME_LIMIT`] of `A-Z a-z 0-9 _ - .`, not starting with a dot.
    pub name: String,
    /// The snapshot it begins as.
    pub snapshot_tag: String,
    /// Give its sandbox a network namespace of its own.
    #[serde(default)]
    pub per_child_netns: bool,
    /// Memory limit of its sandbox's monitor.
    #[serde(default)]
    pub memory_limit_mib: Option<u64>,
    /// Back its memory with huge pages.
    #[serde(default)]
    pub hugepages: bool,
    /// Suspend it by itself when nothing was run in it for this long; the daemon's default when absent, 0 for never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_suspend_secs: Option<u64>,
}

/// `POST /v1/workspaces/:name/suspend`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct SuspendWorkspaceRequest {
    /// Accepted for existing clients: no more than what changed is ever written.
    #[serde(default)]
    pub diff: bool,
}

/// Where a workspace is in its life.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WorkspaceStatus {
    /// It has a sandbox.
    Running,
    /// It is on disk.
    Suspended,
    /// Its sandbox ended without a suspend; resuming goes back to the state before.
    Stale,
}

/// One workspace. Absent optional fields are left out.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct WorkspaceInfo {
    /// Identity, `ws-…`.
    pub id: String,
    /// Name.
    pub name: String,
    /// The snapshot it began as.
    pub source_snapshot_tag: Tag,
    /// The snapshot of its newest suspend.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub current_state_tag: Option<Tag>,
    /// Where it is in its life.
    pub status: WorkspaceStatus,
    /// Its sandbox, while it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub live_sandbox_id: Option<SandboxId>,
    /// Creation time.
    pub created_at_unix: u64,
    /// When something was last run in it, or it was last suspended or resumed.
    pub last_active_unix: u64,
    /// Memory file of its newest state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_branch_memory_path: Option<String>,
    /// It is suspended by itself when nothing was run in it for this long; left out when it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_suspend_secs: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minimal_request_has_the_documented_defaults() {
        let request: CreateWorkspaceRequest =
            serde_json::from_str(r#"{"name":"w","snapshot_tag":"py"}"#).expect("valid");
        assert_eq!((request.per_child_netns, request.memory_limit_mib, request.idle_suspend_secs), (false, None, None));
        assert!(!serde_json::from_str::<SuspendWorkspaceRequest>("{}").expect("valid").diff);
        assert!(serde_json::from_str::<CreateWorkspaceRequest>(r#"{"name":"w"}"#).is_err());
    }

    #[test]
    fn a_workspace_leaves_out_what_it_does_not_have() {
        let info = WorkspaceInfo {
            id: "ws-sb-7-0000".to_owned(),
            name: "w".to_owned(),
            source_snapshot_tag: "py".parse().expect("legal tag"),
            current_state_tag: None,
            status: WorkspaceStatus::Stale,
            live_sandbox_id: None,
            created_at_unix: 7,
            last_active_unix: 8,
            last_branch_memory_path: None,
            idle_suspend_secs: None,
        };
        assert_eq!(
            serde_json::to_string(&info).expect("plain data"),
            r#"{"id":"ws-sb-7-0000","name":"w","source_snapshot_tag":"py","status":"stale","created_at_unix":7,"last_active_unix":8}"#
        );
    }
}
