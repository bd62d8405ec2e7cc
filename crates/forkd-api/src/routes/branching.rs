//! Copies, snapshots and checkpoints of running sandboxes.

use std::time::Instant;

use axum::Json as Answer;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use forkd_types::rest::{
    BranchRequest, CheckpointInfo, CheckpointRequest, CompactRequest, ForkRequest, RewindRequest, SnapshotInfo,
    SnapshotStatus,
};

use crate::error::ApiResult;
use crate::extract::{Json, OfSandbox, Query};
use crate::router::{Api, Segment};
use crate::routes::sandboxes::{SpawnQuery, spawned};

/// `POST /v1/sandboxes/:id/fork`: answered as a spawn is.
pub(crate) async fn fork(
    State(api): State<Api>,
    segment: Segment,
    Query(query): Query<SpawnQuery>,
    Json(request): Json<ForkRequest>,
) -> ApiResult<Response> {
    let arrived = Instant::now();
    let id = segment.sandbox()?;
    let tag = api.node.sandbox(&id)?.snapshot_tag;
    let report = api.node.fork(&id, &request, arrived).await?;
    spawned(report, &query, tag, request.n)
}

/// `POST /v1/sandboxes/:id/branch`: 201 with a snapshot that is ready, or 202 with one that is being written.
pub(crate) async fn branch(
    State(api): State<Api>,
    segment: Segment,
    Json(request): Json<BranchRequest>,
) -> ApiResult<(StatusCode, Answer<SnapshotInfo>)> {
    let info = api.node.branch(&segment.sandbox()?, &request).await?;
    let status = if info.status == SnapshotStatus::Ready { StatusCode::CREATED } else { StatusCode::ACCEPTED };
    Ok((status, Answer(info)))
}

/// `POST /v1/snapshots/:tag/compact`.
pub(crate) async fn compact(
    State(api): State<Api>,
    segment: Segment,
    Json(request): Json<CompactRequest>,
) -> ApiResult<Answer<SnapshotInfo>> {
    let to = request.to.parse().map_err(forkd_node::NodeError::from)?;
    Ok(Answer(api.node.compact(&segment.tag()?, &to).await?))
}

/// `POST /v1/sandboxes/:id/checkpoints`.
pub(crate) async fn checkpoint(
    State(api): State<Api>,
    segment: Segment,
    Json(request): Json<CheckpointRequest>,
) -> ApiResult<(StatusCode, Answer<CheckpointInfo>)> {
    Ok((StatusCode::CREATED, Answer(api.node.checkpoint(&segment.sandbox()?, request).await?)))
}

/// `GET /v1/sandboxes/:id/checkpoints`.
pub(crate) async fn checkpoints(State(api): State<Api>, segment: Segment) -> ApiResult<Answer<Vec<CheckpointInfo>>> {
    Ok(Answer(api.node.checkpoints(&segment.sandbox()?).await?))
}

/// `DELETE /v1/sandboxes/:id/checkpoints/:name`.
pub(crate) async fn remove_checkpoint(State(api): State<Api>, of: OfSandbox) -> ApiResult<StatusCode> {
    api.node.remove_checkpoint(&of.sandbox, &of.name)?;
    Ok(StatusCode::NO_CONTENT)
}

/// `POST /v1/sandboxes/:id/rewind`.
pub(crate) async fn rewind(
    State(api): State<Api>,
    segment: Segment,
    Json(request): Json<RewindRequest>,
) -> ApiResult<Answer<CheckpointInfo>> {
    Ok(Answer(api.node.rewind(&segment.sandbox()?, &request).await?))
}
