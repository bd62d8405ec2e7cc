//! What tells about the daemon itself, and the body of every error.

use serde::{Deserialize, Serialize};

/// The version of the API that `GET /version` reports.
pub const API_VERSION: &str = "v1";

/// Body of every error answer.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What went wrong, on which object, and what would be right.
    pub error: String,
    /// Stable machine-readable code, for example `snapshot_not_found`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
}

/// `GET /healthz`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Health {
    /// Always true when the daemon answers at all.
    pub ok: bool,
}

/// `GET /version`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Version {
    /// The daemon's version.
    pub version: String,
    /// [`API_VERSION`].
    pub api: String,
}
