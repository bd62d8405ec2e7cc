//! What sandboxes cost their host.

use serde::{Deserialize, Serialize};

use crate::{SandboxId, Tag};

/// One sandbox in `GET /v1/usage`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SandboxUsage {
    /// The sandbox.
    pub id: SandboxId,
    /// The snapshot it was forked from.
    pub snapshot_tag: Tag,
    /// When the sandbox was made.
    pub created_at_unix: u64,
    /// How it ended; left out while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped: Option<String>,
    /// When it ends by itself; left out when it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at_unix: Option<u64>,
    /// Pages that only its monitor holds and that no file holds too; left out when it does not run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub private_bytes: Option<u64>,
    /// Processor time that its monitor has used, guest code included; left out when it does not run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_ms: Option<u64>,
    /// How long its monitor has run: less than its age when it was rewound; left out when it does not run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uptime_secs: Option<u64>,
}
