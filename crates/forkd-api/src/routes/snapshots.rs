//! Listing, describing, verifying and removing snapshots.

use axum::Json as Answer;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use forkd_node::Removal;
use forkd_types::rest::{CreateSnapshotRequest, SnapshotDetail, SnapshotInfo};
use serde::Deserialize;
use tokio::sync::mpsc;

use crate::error::{ApiError, ApiResult};
use crate::extract::{Json, Query};
use crate::json_lines;
use crate::router::{Api, Segment};

/// `GET /v1/snapshots`.
pub(crate) async fn list(State(api): State<Api>) -> ApiResult<Answer<Vec<SnapshotInfo>>> {
    Ok(Answer(api.node.snapshots().await?))
}

/// `POST /v1/snapshots`: from a kernel and a root disk on the daemon's host.
pub(crate) async fn create(
    State(api): State<Api>,
    Json(request): Json<CreateSnapshotRequest>,
) -> ApiResult<(StatusCode, Answer<SnapshotInfo>)> {
    Ok((StatusCode::CREATED, Answer(api.node.create_snapshot(request).await?)))
}

#[derive(Deserialize)]
pub(crate) struct RemoveQuery {
    #[serde(default)]
    cascade: bool,
    #[serde(default)]
    force: bool,
}

/// `DELETE /v1/snapshots/:tag`.
pub(crate) async fn remove(
    State(api): State<Api>,
    segment: Segment,
    Query(query): Query<RemoveQuery>,
) -> ApiResult<StatusCode> {
    let tag = segment.tag()?;
    if query.cascade && query.force {
        let message = "cascade and force exclude one another: remove the dependents too, or leave them unusable";
        return Err(ApiError::bad_request("cascade_and_force", message));
    }
    let removal = match (query.cascade, query.force) {
        (true, _) => Removal::Cascade,
        (false, true) => Removal::Forced,
        (false, false) => Removal::Guarded,
    };
    api.node.remove_snapshot(&tag, removal).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// `GET /v1/snapshots/:tag/info`.
pub(crate) async fn info(State(api): State<Api>, segment: Segment) -> ApiResult<Answer<SnapshotDetail>> {
    Ok(Answer(api.node.snapshot(&segment.tag()?).await?))
}

/// `POST /v1/snapshots/:tag/verify`: progress as JSON lines.
pub(crate) async fn verify(State(api): State<Api>, segment: Segment) -> ApiResult<Response> {
    let tag = segment.tag()?;
    api.node.check_snapshot(&tag).await?;
    let (sender, receiver) = mpsc::channel(64);
    let node = api.node;
    tokio::spawn(async move {
        if let Err(error) = node.verify(&tag, sender).await {
            tracing::error!(%tag, %error, "verification ended early");
        }
    });
    Ok(json_lines::stream(receiver))
}
