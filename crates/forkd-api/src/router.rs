//! Which route is answered by which handler.

use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request};
use axum::middleware;
use axum::routing::{any, get, post, put};
use forkd_node::Node;

use crate::audit::{self, AuditLog};
use crate::auth::{self, Guard};
use crate::error::ApiError;
use crate::idempotency::{self, Answers};
use crate::metrics::Survey;
use crate::readiness::{self, Readiness};
use crate::routes::{
    agent, bakes, blobs, branching, console, discovery, events, exec_stream, files, overview, packs, ports, sandboxes,
    snapshots, workspaces,
};
use crate::{extract, limits, metrics, openapi};

/// What every handler uses.
#[derive(Clone)]
pub struct Api {
    pub(crate) node: Node,
    pub(crate) survey: Survey,
    pub(crate) readiness: Readiness,
    domain: Option<Arc<str>>,
    #[cfg(test)]
    pub(crate) stand_in: Option<crate::guests::stand_in::StandIn>,
}

impl Api {
    /// The API of `node`.
    pub fn new(node: Node) -> Self {
        metrics::recorder();
        Self {
            node,
            survey: Survey::default(),
            readiness: Readiness::default(),
            domain: None,
            #[cfg(test)]
            stand_in: None,
        }
    }

    /// Answers requests to `<port>-<sandbox id>.<domain>` by the servers in guests.
    pub fn with_domain(self, domain: &str) -> Self {
        Self { domain: Some(domain.trim_matches('.').to_ascii_lowercase().into()), ..self }
    }
}

/// All routes. Requests must pass `guard`, if there is one, and are written to `audit`, if there is one.
pub fn router(api: Api, guard: Option<Guard>, audit: Option<AuditLog>) -> Router {
    let answers = Answers::of(api.node.clone());
    let uploads = Router::new()
        .route("/v1/blobs/{digest}", put(blobs::put).head(blobs::head))
        .route("/v1/packs", post(packs::unpack))
        .route("/v1/sandboxes/{id}/files", get(files::read).put(files::write).delete(files::remove))
        .route("/v1/sandboxes/{id}/files/archive", get(files::archive).put(files::extract))
        // Bodies of what follows may stand still: they are conversations.
        .layer(middleware::from_fn(limits::steady))
        .route("/v1/sandboxes/{id}/ports/{port}", any(ports::by_path))
        .route("/v1/sandboxes/{id}/ports/{port}/", any(ports::by_path))
        .route("/v1/sandboxes/{id}/ports/{port}/{*path}", any(ports::by_path))
        .layer(DefaultBodyLimit::disable());
    let by_host = api.domain.clone().map(|domain| ports::ByHost { api: api.clone(), domain });
    let mut router = Router::new()
        .route("/healthz", get(discovery::health))
        .route("/readyz", get(readiness::show))
        .route("/openapi.json", get(openapi::json))
        .route("/docs", get(openapi::page))
        .route("/version", get(discovery::version))
        .route("/metrics", get(metrics::show))
        .route("/v1/sandboxes", get(sandboxes::list).post(sandboxes::spawn))
        .route("/v1/sandboxes/{id}", get(sandboxes::get).delete(sandboxes::kill))
        .route("/v1/sandboxes/{id}/exec", post(sandboxes::exec))
        .route("/v1/sandboxes/{id}/exec/stream", get(exec_stream::socket).post(exec_stream::events))
        .route("/v1/sandboxes/{id}/files/list", get(files::list))
        .route("/v1/sandboxes/{id}/files/stat", get(files::stat))
        .route("/v1/sandboxes/{id}/files/mkdir", post(files::make_directory))
        .route("/v1/sandboxes/{id}/files/move", post(files::rename))
        .route("/v1/sandboxes/{id}/files/watch", get(files::watch))
        .route("/v1/sandboxes/{id}/eval", post(sandboxes::eval))
        .route("/v1/sandboxes/{id}/ping", post(sandboxes::ping))
        .route("/v1/sandboxes/{id}/memory", get(sandboxes::memory))
        .route("/v1/sandboxes/{id}/console", get(console::show))
        .route("/v1/sandboxes/{id}/agent", get(agent::connect))
        .route("/v1/sandboxes/{id}/fork", post(branching::fork))
        .route("/v1/sandboxes/{id}/branch", post(branching::branch))
        .route("/v1/sandboxes/{id}/checkpoints", get(branching::checkpoints).post(branching::checkpoint))
        .route("/v1/sandboxes/{id}/checkpoints/{name}", axum::routing::delete(branching::remove_checkpoint))
        .route("/v1/sandboxes/{id}/rewind", post(branching::rewind))
        .route("/v1/sandboxes/{id}/timeout", post(sandboxes::timeout))
        .route("/v1/sandboxes/{id}/suspend", post(sandboxes::suspend))
        .route("/v1/workspaces", get(workspaces::list).post(workspaces::create))
        .route("/v1/workspaces/{name}", get(workspaces::get).delete(workspaces::delete))
        .route("/v1/workspaces/{name}/suspend", post(workspaces::suspend))
        .route("/v1/workspaces/{name}/resume", post(workspaces::resume))
        .route("/v1/events", get(events::follow))
        .route("/v1/tree", get(overview::tree))
        .route("/v1/usage", get(overview::usage))
        .route("/v1/snapshots", get(snapshots::list).post(snapshots::create))
        .route("/v1/snapshots/{tag}", axum::routing::delete(snapshots::remove))
        .route("/v1/snapshots/{tag}/info", get(snapshots::info))
        .route("/v1/snapshots/{tag}/compact", post(branching::compact))
        .route("/v1/snapshots/{tag}/verify", post(snapshots::verify))
        .route("/v1/snapshots/{tag}/pack", get(packs::pack))
        .route("/v1/bakes", post(bakes::bake))
        .layer(DefaultBodyLimit::max(extract::BODY_LIMIT))
        .merge(uploads)
        .fallback(unknown_path)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn_with_state(answers, idempotency::once))
        .with_state(api);
    let to_guests = by_host.clone();
    if let Some(by_host) = by_host {
        router = router.layer(middleware::from_fn_with_state(by_host, ports::by_host));
    }
    // The outermost layer comes last: refused requests are audited too.
    if let Some(guard) = guard {
        router = router.layer(middleware::from_fn_with_state(guard, auth::require));
    }
    router = router.layer(middleware::from_fn(metrics::count));
    if let Some(by_host) = to_guests {
        router = router.layer(middleware::from_fn_with_state(by_host, ports::mark_by_host));
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
