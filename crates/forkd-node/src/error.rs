//! What can go wrong in a node, with a stable code for each.

use std::io;
use std::path::PathBuf;

use forkd_proto::agent::FailureCode;
use forkd_store::StoreError;
use forkd_store::pack::PackError;
use forkd_types::rest::{EndCode, SPAWN_LIMIT};
use forkd_types::{Digest, SandboxId, Tag, TagError};

use crate::control::MonitorError;
use crate::database::DatabaseError;
use crate::guest::GuestError;
use crate::launch::LaunchError;

/// A result of the node.
pub type NodeResult<T, E = NodeError> = Result<T, E>;

/// Why the node could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A tag breaks the rule.
    #[error(transparent)]
    BadTag(#[from] TagError),
    /// A spawn of none, or of too many.
    #[error("cannot spawn {n} children; ask for 1 to {SPAWN_LIMIT}")]
    SpawnCount {
        /// What was asked for.
        n: u32,
    },
    /// A field of a request has a value that cannot work.
    #[error("{field} is {value}; {rule}")]
    BadField {
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
        /// What would be right, as a sentence.
        rule: &'static str,
    },
    /// No sandbox of this id.
    #[error("sandbox {id} not found")]
    SandboxNotFound {
        /// The id.
        id: SandboxId,
    },
    /// The sandbox is there but its machine is not running.
    #[error("sandbox {id} is not running: it {reason}")]
    SandboxStopped {
        /// The id.
        id: SandboxId,
        /// How it ended, for programs.
        code: EndCode,
        /// How it ended, as a predicate.
        reason: String,
    },
    /// The sandbox stands still while it is put on disk.
    #[error("sandbox {id} is being suspended; go on with what it becomes when that is done")]
    SandboxSuspending {
        /// The id.
        id: SandboxId,
    },
    /// The host cannot limit sandboxes, or not like this.
    #[error("cannot limit a sandbox: {reason}")]
    LimitsUnavailable {
        /// What is missing, and the mend.
        reason: String,
    },
    /// The host has no room for the children.
    #[error("no room for {n} more: {reason}; end sandboxes, or ask for fewer or smaller ones")]
    NoRoom {
        /// How many were asked for.
        n: u32,
        /// What there is and what they need.
        reason: String,
    },
    /// No workspace of this name.
    #[error("workspace {name} not found; `forkd workspace list` shows those there are")]
    WorkspaceNotFound {
        /// The name.
        name: String,
    },
    /// There is a workspace of this name.
    #[error("a workspace {name} exists already; choose another name or delete it")]
    WorkspaceExists {
        /// The name.
        name: String,
    },
    /// A name that no workspace can have.
    #[error("invalid workspace name {name:?}: {reason}")]
    BadWorkspaceName {
        /// The name.
        name: String,
        /// The rule that it breaks.
        reason: String,
    },
    /// The workspace is not in the state that the request needs.
    #[error("workspace {name} is {is}; {advice}")]
    WorkspaceState {
        /// The name.
        name: String,
        /// The state that it is in.
        is: &'static str,
        /// What can be done.
        advice: &'static str,
    },
    /// A snapshot that a workspace goes on from.
    #[error(
        "snapshot {tag} is the state of workspace {name} and goes with it; `forkd workspace delete {name}` removes both"
    )]
    IsWorkspaceState {
        /// The tag.
        tag: Tag,
        /// The workspace.
        name: String,
    },
    /// A file that a snapshot is to be made of cannot be used.
    #[error("cannot make snapshot {tag}: {reason}")]
    Ingredient {
        /// The tag.
        tag: Tag,
        /// What is wrong with which file.
        reason: String,
    },
    /// The snapshot cannot be forked now.
    #[error("snapshot {tag} is not ready: {reason}")]
    SnapshotNotReady {
        /// The tag.
        tag: Tag,
        /// Why.
        reason: String,
    },
    /// The snapshot's guest saw processor features that this host lacks.
    #[error("snapshot {tag} needs processor features that this host lacks: {missing}; bake it again here")]
    ProcessorLacks {
        /// The tag.
        tag: Tag,
        /// The features, separated by spaces.
        missing: String,
    },
    /// As many branches as may be are under way.
    #[error("{cap} branches are under way, the most that may be at a time; come again when one has ended")]
    BranchesFull {
        /// The most there may be.
        cap: usize,
    },
    /// A snapshot of this tag is being made.
    #[error("a snapshot {tag} is being made already; wait for it or choose another tag")]
    SnapshotInProgress {
        /// The tag.
        tag: Tag,
    },
    /// A blob that a request names was never uploaded.
    #[error("the {what} blob {digest} is not in the store; upload it with PUT /v1/blobs/{digest}")]
    BlobMissing {
        /// What it would be: `kernel`, `initramfs`, `disk`.
        what: &'static str,
        /// Its digest.
        digest: Digest,
    },
    /// A step of a bake failed.
    #[error("bake of {tag} failed while {step}: {reason}")]
    Bake {
        /// The tag.
        tag: Tag,
        /// What was being done.
        step: String,
        /// Why it failed, with the end of the guest's console where that helps.
        reason: String,
    },
    /// A snapshot of a running sandbox could not be made; the sandbox runs on.
    #[error("branch: snapshot {tag} was not made: {reason}")]
    Branch {
        /// The tag.
        tag: Tag,
        /// Why.
        reason: String,
    },
    /// The sandbox has no such checkpoint.
    #[error("sandbox {id} has no checkpoint {wanted}; it has {}", if .have.is_empty() { "none".to_owned() } else { .have.join(", ") })]
    CheckpointNotFound {
        /// The sandbox.
        id: SandboxId,
        /// What was asked for.
        wanted: String,
        /// The names of those there are.
        have: Vec<String>,
    },
    /// The sandbox has a checkpoint of that name.
    #[error("sandbox {id} has a checkpoint {name} already; choose another name or remove it")]
    CheckpointExists {
        /// The sandbox.
        id: SandboxId,
        /// The name.
        name: String,
    },
    /// A snapshot that a sandbox may be brought back to.
    #[error(
        "snapshot {tag} is a checkpoint of sandbox {id} and goes with it; `forkd checkpoints {id} --remove NAME` removes one"
    )]
    IsCheckpoint {
        /// The tag.
        tag: Tag,
        /// The sandbox.
        id: String,
    },
    /// A sandbox could not be brought back to a checkpoint; it is as it was.
    #[error("cannot rewind sandbox {id} to {name}: {reason}")]
    Rewind {
        /// The sandbox.
        id: SandboxId,
        /// The checkpoint.
        name: String,
        /// Why.
        reason: String,
    },
    /// A zygote could not be made ready.
    #[error("cannot hold snapshot {tag} ready to fork: {reason}")]
    Zygote {
        /// The tag.
        tag: Tag,
        /// Why.
        reason: String,
    },
    /// No child of a spawn came up.
    #[error("none of the {n} children of snapshot {tag} came up; the first failed with: {first}")]
    AllFailed {
        /// The tag.
        tag: Tag,
        /// How many there were.
        n: u32,
        /// Why the first failed.
        first: String,
    },
    /// A request to a guest's agent failed.
    #[error("{what}: sandbox {id}: {source}")]
    Guest {
        /// The request: `exec`, `eval`, `ping`.
        what: &'static str,
        /// The sandbox.
        id: SandboxId,
        /// Why.
        source: GuestError,
    },
    /// A request to a sandbox's monitor failed.
    #[error("cannot {what} of sandbox {id}: {source}")]
    Monitor {
        /// What was asked.
        what: &'static str,
        /// The sandbox.
        id: SandboxId,
        /// Why.
        source: MonitorError,
    },
    /// A pack was not written or not taken in.
    #[error(transparent)]
    Pack(PackError),
    /// The snapshot store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A monitor could not be started.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The state database failed.
    #[error(transparent)]
    Database(#[from] DatabaseError),
    /// KVM cannot be used.
    #[error("cannot open {}: {source}; forkd needs hardware virtualisation and the right to use it", path.display())]
    Kvm {
        /// The device.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A system call on a file of the node's own failed.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was attempted, on which object.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A worker thread ended before its work.
    #[error("{what} was interrupted")]
    Interrupted {
        /// The work.
        what: &'static str,
    },
}

impl NodeError {
    /// A stable machine-readable code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::BadTag(_) => "bad_tag",
            Self::SpawnCount { .. } => "bad_spawn_count",
            Self::BadField { .. } => "bad_field",
            Self::SandboxNotFound { .. } => "sandbox_not_found",
            Self::SandboxStopped { code: EndCode::Oom, .. } => "oom",
            Self::SandboxStopped { .. } => "sandbox_stopped",
            Self::LimitsUnavailable { .. } => "limits_unavailable",
            Self::NoRoom { .. } => "no_room",
            Self::SandboxSuspending { .. } => "sandbox_suspending",
            Self::WorkspaceNotFound { .. } => "workspace_not_found",
            Self::WorkspaceExists { .. } => "workspace_exists",
            Self::BadWorkspaceName { .. } => "bad_workspace_name",
            Self::WorkspaceState { .. } => "workspace_state",
            Self::IsWorkspaceState { .. } => "is_workspace_state",
            Self::Ingredient { .. } => "bad_ingredient",
            Self::SnapshotNotReady { .. } => "snapshot_not_ready",
            Self::ProcessorLacks { .. } => "processor_lacks_features",
            Self::BranchesFull { .. } => "branches_full",
            Self::SnapshotInProgress { .. } => "snapshot_in_progress",
            Self::BlobMissing { .. } => "blob_missing",
            Self::Bake { .. } => "bake_failed",
            Self::Branch { .. } => "branch_failed",
            Self::CheckpointNotFound { .. } => "checkpoint_not_found",
            Self::CheckpointExists { .. } => "checkpoint_exists",
            Self::IsCheckpoint { .. } => "is_checkpoint",
            Self::Rewind { .. } => "rewind_failed",
            Self::Zygote { .. } => "zygote_failed",
            Self::AllFailed { .. } => "spawn_failed",
            Self::Guest { source: GuestError::OutputTooLarge { .. }, .. } => "output_too_large",
            Self::Guest { source: GuestError::TimedOut { .. }, .. } => "guest_timed_out",
            Self::Guest { source: GuestError::Refused(failure), .. } => match failure.code {
                FailureCode::NotFound => "guest_not_found",
                FailureCode::Denied => "guest_denied",
                FailureCode::Invalid => "guest_invalid",
                FailureCode::Conflict => "guest_conflict",
                FailureCode::NoSpace => "guest_no_space",
                FailureCode::TimedOut => "guest_timed_out",
                FailureCode::Internal => "guest_failed",
            },
            Self::Guest { .. } => "guest_failed",
            Self::Monitor { .. } => "monitor_failed",
            Self::Pack(error) => error.code(),
            Self::Store(error) => error.code(),
            Self::Launch(_) => "monitor_not_started",
            Self::Database(_) => "state_database",
            Self::Kvm { .. } => "kvm_unavailable",
            Self::Io { .. } => "io",
            Self::Interrupted { .. } => "interrupted",
        }
    }

    /// The text of the error with that of its causes.
    pub fn message(&self) -> String {
        with_causes(self)
    }

    /// For `map_err`: the failure of `what`.
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// The text of an error with that of its causes, for answers that carry no structure. A cause that
/// the text already quotes is not repeated.
pub(crate) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}
