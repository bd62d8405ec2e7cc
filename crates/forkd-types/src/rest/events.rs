//! What happened on a daemon, as it tells its listeners.

use serde::{Deserialize, Serialize};

use super::limits::EndCode;
use crate::{SandboxId, Tag};

/// What kind of thing happened.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum EventKind {
    /// A sandbox is up and its agent has answered.
    #[serde(rename = "sandbox.created")]
    SandboxCreated,
    /// A sandbox's machine ended by itself; `reason` says how.
    #[serde(rename = "sandbox.stopped")]
    SandboxStopped,
    /// A sandbox is gone; `reason` says why, when nobody asked for it.
    #[serde(rename = "sandbox.ended")]
    SandboxEnded,
    /// A sandbox is the machine of an earlier instant again.
    #[serde(rename = "sandbox.rewound")]
    SandboxRewound,
    /// A sandbox is in a snapshot now, and no longer runs.
    #[serde(rename = "sandbox.suspended")]
    SandboxSuspended,
    /// A sandbox ought to have been suspended and could not; it runs on. `reason` says why.
    #[serde(rename = "sandbox.suspend_failed")]
    SandboxSuspendFailed,
    /// When a sandbox ends by itself was changed.
    #[serde(rename = "sandbox.timeout_changed")]
    SandboxTimeoutChanged,
    /// A snapshot is being written.
    #[serde(rename = "snapshot.writing")]
    SnapshotWriting,
    /// A snapshot can be used.
    #[serde(rename = "snapshot.ready")]
    SnapshotReady,
    /// A snapshot could not be made; `reason` says why.
    #[serde(rename = "snapshot.failed")]
    SnapshotFailed,
    /// A snapshot is gone.
    #[serde(rename = "snapshot.removed")]
    SnapshotRemoved,
    /// A checkpoint was taken.
    #[serde(rename = "checkpoint.created")]
    CheckpointCreated,
    /// A checkpoint went from memory to disk.
    #[serde(rename = "checkpoint.moved")]
    CheckpointMoved,
    /// A checkpoint is gone.
    #[serde(rename = "checkpoint.removed")]
    CheckpointRemoved,
    /// A workspace was made, and runs.
    #[serde(rename = "workspace.created")]
    WorkspaceCreated,
    /// A workspace is on disk.
    #[serde(rename = "workspace.suspended")]
    WorkspaceSuspended,
    /// A workspace runs again.
    #[serde(rename = "workspace.resumed")]
    WorkspaceResumed,
    /// A workspace's sandbox ended without a suspend.
    #[serde(rename = "workspace.stale")]
    WorkspaceStale,
    /// A workspace is gone.
    #[serde(rename = "workspace.deleted")]
    WorkspaceDeleted,
    /// Events before this one were lost to this listener: it was too slow, or away for too long. What it knows
    /// from earlier events may be wrong now.
    #[serde(rename = "events.lost")]
    Lost,
}

impl EventKind {
    /// Its name on the wire, such as `sandbox.created`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::SandboxCreated => "sandbox.created",
            Self::SandboxStopped => "sandbox.stopped",
            Self::SandboxEnded => "sandbox.ended",
            Self::SandboxRewound => "sandbox.rewound",
            Self::SandboxSuspended => "sandbox.suspended",
            Self::SandboxSuspendFailed => "sandbox.suspend_failed",
            Self::SandboxTimeoutChanged => "sandbox.timeout_changed",
            Self::SnapshotWriting => "snapshot.writing",
            Self::SnapshotReady => "snapshot.ready",
            Self::SnapshotFailed => "snapshot.failed",
            Self::SnapshotRemoved => "snapshot.removed",
            Self::CheckpointCreated => "checkpoint.created",
            Self::CheckpointMoved => "checkpoint.moved",
            Self::CheckpointRemoved => "checkpoint.removed",
            Self::WorkspaceCreated => "workspace.created",
            Self::WorkspaceSuspended => "workspace.suspended",
            Self::WorkspaceResumed => "workspace.resumed",
            Self::WorkspaceStale => "workspace.stale",
            Self::WorkspaceDeleted => "workspace.deleted",
            Self::Lost => "events.lost",
        }
    }
}

/// One thing that happened. Absent optional fields are left out.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Event {
    /// Its place in the order of events; rises, also over restarts of the daemon, with gaps.
    pub id: u64,
    /// When it happened.
    pub at_unix: u64,
    /// What happened.
    pub event: EventKind,
    /// The sandbox it happened to, or that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<SandboxId>,
    /// The snapshot it happened to, or that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<Tag>,
    /// The checkpoint it happened to, by its name within the sandbox.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<String>,
    /// The workspace it happened to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workspace: Option<String>,
    /// Why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// How a machine ended, for programs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<EndCode>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_named_alike_in_its_body_and_on_its_line() {
        for kind in [EventKind::SandboxCreated, EventKind::SandboxSuspendFailed, EventKind::Lost] {
            assert_eq!(serde_json::to_value(kind).expect("plain data"), kind.name());
        }
        let event: Event = serde_json::from_str(r#"{"id":7,"at_unix":1,"event":"snapshot.ready","snapshot":"py"}"#)
            .expect("what the daemon writes");
        assert_eq!((event.event, event.sandbox), (EventKind::SnapshotReady, None));
    }
}
