//! Which route is answered by which handler.

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request};
use axum::middleware;
use axum::routing::{get, post, put};
use forkd_node::Node;

use crate::audit::{self, AuditLog};
use crate::auth::{self, Token};
use crate::error::ApiError;
use crate::routes::{agent, bakes, blobs, branching, discovery, packs, sandboxes, snapshots};
use crate::{extract, metrics};

/// What every handler uses.
#[derive(Clone)]
pub struct Api {
    pub(crate) node: Node,
}

impl Api {
    /// The API of `node`.
    pub fn new(node: Node) -> Self {
        metrics::recorder();
        Self { node }
    }
}

/// The largest JSON body.
const BODY_LIMIT: usize = 2 << 20;

/// All routes. Requests need `token`, if there is one, and are written to `audit`, if there is one.
pub fn router(api: Api, token: Option<Token>, audit: Option<AuditLog>) -> Router {
    let uploads = Router::new()
        .route("/v1/blobs/{digest}", put(blobs::put).head(blobs::head))
        .route("/v1/packs", post(packs::unpack))
        .layer(DefaultBodyLimit::disable());
    let mut router = Router::new()
        .route("/healthz", get(discovery::health))
        .route("/version", get(discovery::version))
        .route("/metrics", get(metrics::show))
        .route("/v1/sandboxes", get(sandboxes::list).post(sandboxes::spawn))
        .route("/v1/sandboxes/{id}", get(sandboxes::get).delete(sandboxes::kill))
        .route("/v1/sandboxes/{id}/exec", post(sandboxes::exec))
        .route("/v1/sandboxes/{id}/eval", post(sandboxes::eval))
        .route("/v1/sandboxes/{id}/ping", post(sandboxes::ping))
        .route("/v1/sandboxes/{id}/memory", get(sandboxes::memory))
        .route("/v1/sandboxes/{id}/console", get(sandboxes::console))
        .route("/v1/sandboxes/{id}/agent", get(agent::connect))
        .route("/v1/sandboxes/{id}/fork", post(branching::fork))
        .route("/v1/sandboxes/{id}/branch", post(branching::branch))
        .route("/v1/sandboxes/{id}/checkpoints", get(branching::checkpoints).post(branching::checkpoint))
        .route("/v1/sandboxes/{id}/checkpoints/{name}", axum::routing::delete(branching::remove_checkpoint))
        .route("/v1/sandboxes/{id}/rewind", post(branching::rewind))
        .route("/v1/snapshots", get(snapshots::list))
        .route("/v1/snapshots/{tag}", axum::routing::delete(snapshots::remove))
        .route("/v1/snapshots/{tag}/info", get(snapshots::info))
        .route("/v1/snapshots/{tag}/compact", post(branching::compact))
        .route("/v1/snapshots/{tag}/verify", post(snapshots::verify))
        .route("/v1/snapshots/{tag}/pack", get(packs::pack))
        .route("/v1/bakes", post(bakes::bake))
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .merge(uploads)
        .fallback(unknown_path)
        .method_not_allowed_fallback(wrong_method)
        .with_state(api);
    // The outermost layer comes last: refused requests are audited too.
    if let Some(token) = token {
        router = router.layer(middleware::from_fn_with_state(token, auth::require));
    }
    if let Some(audit) = audit {
        router = router.layer(middleware::from_fn_with_state(audit, audit::record));
    }
    router
}

async fn unknown_path(request: Request) -> ApiError {
    ApiError::unknown_path(request.uri().path())
}

async fn wrong_method() -> ApiError {
    ApiError::wrong_method()
}

/// The path segment of a handler's object.
pub(crate) type Segment = extract::Segment;
