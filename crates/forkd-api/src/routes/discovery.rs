//! Is the daemon there, and which is it?

use axum::Json;
use forkd_types::rest::{API_VERSION, Health, Version};

/// `GET /healthz`.
pub(crate) async fn health() -> Json<Health> {
    Json(Health { ok: true })
}

/// `GET /version`.
pub(crate) async fn version() -> Json<Version> {
    Json(Version { version: env!("CARGO_PKG_VERSION").to_owned(), api: API_VERSION.to_owned() })
}
