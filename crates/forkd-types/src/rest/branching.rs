//! Snapshots of running sandboxes.

use serde::{Deserialize, Serialize};

/// How `branch` was once asked to copy memory. The source stands still equally little in all of them.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BranchMode {
    /// The default.
    Full,
    /// Also reports what changed, and may record its parent.
    Diff,
    /// May be answered before the copy is written.
    Live,
}

/// `POST /v1/sandboxes/:id/branch`: a snapshot of a running sandbox.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BranchRequest {
    /// Name of the snapshot; generated when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// How the copy is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<BranchMode>,
    /// The older way to say `mode: diff`.
    #[serde(default)]
    pub diff: bool,
    /// The older way to say `mode: live`.
    #[serde(default)]
    pub live: bool,
    /// Report what changed as `mode: diff` does.
    #[serde(default)]
    pub measure_diff: bool,
    /// Answer only when the snapshot is ready; false needs `mode: live`.
    #[serde(default = "yes")]
    pub wait: bool,
    /// Keep the snapshot as a layer over this one, which must be the sandbox's own snapshot. Without it the
    /// snapshot depends on no other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent_tag: Option<String>,
    /// Flush the guest's file systems first, so that the disk is clean and not only as after a power cut.
    #[serde(default)]
    pub sync: bool,
    /// Replace a snapshot of the same tag, in one step when the new one is whole.
    #[serde(default)]
    pub replace: bool,
}

impl Default for BranchRequest {
    fn default() -> Self {
        let (diff, live, measure_diff, sync, replace) = (false, false, false, false, false);
        Self { tag: None, mode: None, diff, live, measure_diff, wait: true, parent_tag: None, sync, replace }
    }
}

fn yes() -> bool {
    true
}
