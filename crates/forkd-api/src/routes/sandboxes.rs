//! Spawning, listing and ending sandboxes, and requests to them.

use std::time::Instant;

use axum::Json as Answer;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use forkd_node::NodeError;
use forkd_types::Tag;
use forkd_types::rest::{
    EvalRequest, EvalResponse, ExecRequest, ExecResponse, PingAnswer, SandboxInfo, SandboxMemory, SnapshotInfo,
    SpawnReport, SpawnRequest, TimeoutRequest,
};
use serde::Deserialize;

use crate::error::ApiResult;
use crate::extract::{Json, Query};
use crate::router::{Api, Segment};

/// How many children of a spawn failed; only on answers of which some did.
const FAILED_HEADER: &str = "forkd-failed";

#[derive(Deserialize)]
pub(crate) struct SpawnQuery {
    #[serde(default)]
    detail: bool,
}

/// `POST /v1/sandboxes`: an array of the children that are up, or with `detail=true` a report on
/// all of them.
pub(crate) async fn spawn(
    State(api): State<Api>,
    Query(query): Query<SpawnQuery>,
    Json(request): Json<SpawnRequest>,
) -> ApiResult<Response> {
    let arrived = Instant::now();
    let report = api.node.spawn(&request, arrived).await?;
    let tag = request.snapshot_tag.parse().map_err(NodeError::from)?;
    spawned(report, &query, tag, request.n)
}

/// The answer to a request for `n` children of `tag`.
pub(crate) fn spawned(report: SpawnReport, query: &SpawnQuery, tag: Tag, n: u32) -> ApiResult<Response> {
    if report.sandboxes.is_empty() {
        let first = report.failures.into_iter().next().map(|failure| failure.error).unwrap_or_default();
        return Err(NodeError::AllFailed { tag, n, first }.into());
    }
    let failed = report.failures.len();
    let mut response = if query.detail {
        (StatusCode::CREATED, Answer(report)).into_response()
    } else {
        (StatusCode::CREATED, Answer(report.sandboxes)).into_response()
    };
    if failed > 0 {
        response.headers_mut().insert(FAILED_HEADER, failed.into());
    }
    Ok(response)
}

/// `GET /v1/sandboxes`.
pub(crate) async fn list(State(api): State<Api>) -> Answer<Vec<SandboxInfo>> {
    Answer(api.node.sandboxes())
}

/// `GET /v1/sandboxes/:id`.
pub(crate) async fn get(State(api): State<Api>, segment: Segment) -> ApiResult<Answer<SandboxInfo>> {
    Ok(Answer(api.node.sandbox(&segment.sandbox()?)?))
}

/// `DELETE /v1/sandboxes/:id`.
pub(crate) async fn kill(State(api): State<Api>, segment: Segment) -> ApiResult<StatusCode> {
    api.node.kill(&segment.sandbox()?)?;
    Ok(StatusCode::NO_CONTENT)
}

/// `POST /v1/sandboxes/:id/timeout`.
pub(crate) async fn timeout(
    State(api): State<Api>,
    segment: Segment,
    Json(request): Json<TimeoutRequest>,
) -> ApiResult<Answer<SandboxInfo>> {
    Ok(Answer(api.node.change_timeout(&segment.sandbox()?, &request).await?))
}

/// `POST /v1/sandboxes/:id/suspend`: the snapshot that the sandbox is in from now on. Body and content type are
/// ignored.
pub(crate) async fn suspend(State(api): State<Api>, segment: Segment) -> ApiResult<Answer<SnapshotInfo>> {
    Ok(Answer(api.node.suspend(&segment.sandbox()?).await?))
}

/// `POST /v1/sandboxes/:id/exec`.
pub(crate) async fn exec(
    State(api): State<Api>,
    segment: Segment,
    Json(request): Json<ExecRequest>,
) -> ApiResult<Answer<ExecResponse>> {
    Ok(Answer(api.node.exec(&segment.sandbox()?, request).await?))
}

/// `POST /v1/sandboxes/:id/eval`.
pub(crate) async fn eval(
    State(api): State<Api>,
    segment: Segment,
    Json(request): Json<EvalRequest>,
) -> ApiResult<Answer<EvalResponse>> {
    Ok(Answer(api.node.eval(&segment.sandbox()?, request).await?))
}

/// `POST /v1/sandboxes/:id/ping`. Body and content type are ignored.
pub(crate) async fn ping(State(api): State<Api>, segment: Segment) -> ApiResult<Answer<PingAnswer>> {
    let asked = Instant::now();
    let pong = api.node.ping(&segment.sandbox()?).await?;
    let round_trip_us = asked.elapsed().as_micros() as u64;
    Ok(Answer(PingAnswer {
        pong: true,
        numpy_version: pong.numpy_version.unwrap_or_else(|| "not-installed".to_owned()),
        pid: 1,
        agent_lang: pong.warm.first().cloned().unwrap_or_else(|| "python".to_owned()),
        warmup_ready: true,
        protocol: pong.protocol,
        agent: pong.agent,
        kernel: pong.kernel,
        warm: pong.warm,
        sandbox_id: pong.sandbox_id,
        uptime_ns: pong.uptime_ns,
        round_trip_us,
    }))
}

/// `GET /v1/sandboxes/:id/memory`.
pub(crate) async fn memory(State(api): State<Api>, segment: Segment) -> ApiResult<Answer<SandboxMemory>> {
    Ok(Answer(api.node.memory(&segment.sandbox()?).await?))
}
