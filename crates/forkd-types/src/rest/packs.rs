//! Packs of snapshots.

use serde::{Deserialize, Serialize};

use crate::Tag;

/// Answer of `POST /v1/packs`: what came of a pack.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct UnpackReport {
    /// The snapshot that was packed, by the name that it has here.
    pub tag: Tag,
    /// It and all that it derives from, the base first.
    pub snapshots: Vec<UnpackedSnapshot>,
    /// Kernels, initramfs images and root disks that are new.
    pub new_blobs: usize,
    /// Those that were there.
    pub reused_blobs: usize,
    /// What was written, holes not counted.
    pub written_bytes: u64,
    /// Whether a signature was asked for and is good.
    pub verified: bool,
}

/// What came of one snapshot of a pack.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct UnpackedSnapshot {
    /// Its name here.
    pub tag: Tag,
    /// What came of it.
    pub fate: UnpackFate,
}

/// What becomes of a snapshot that comes in a pack.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UnpackFate {
    /// It is new.
    Published,
    /// It was there already.
    Reused,
    /// It took the place of another one of its tag.
    Replaced,
}
