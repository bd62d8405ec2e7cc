//! Kernels, initramfs images and root disks in the store.

use serde::{Deserialize, Serialize};

use crate::Digest;

/// Answer of `PUT /v1/blobs/:digest`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BlobInfo {
    /// Its content's digest.
    pub digest: Digest,
    /// Its size.
    pub bytes: u64,
}
