//! Workspaces: sandboxes with a name, that can be put on disk and brought back.

use axum::Json as Answer;
use axum::extract::State;
use axum::http::StatusCode;
use forkd_types::rest::{CreateWorkspaceRequest, SuspendWorkspaceRequest, WorkspaceInfo};

use crate::error::ApiResult;
use crate::extract::Json;
use crate::router::{Api, Segment};

/// `GET /v1/workspaces`.
pub(crate) async fn list(State(api): State<Api>) -> Answer<Vec<WorkspaceInfo>> {
    Answer(api.node.workspaces())
}

/// `POST /v1/workspaces`.
pub(crate) async fn create(
    State(api): State<Api>,
    Json(request): Json<CreateWorkspaceRequest>,
) -> ApiResult<(StatusCode, Answer<WorkspaceInfo>)> {
    Ok((StatusCode::CREATED, Answer(api.node.create_workspace(request).await?)))
}

/// `GET /v1/workspaces/:name`.
pub(crate) async fn get(State(api): State<Api>, segment: Segment) -> ApiResult<Answer<WorkspaceInfo>> {
    Ok(Answer(api.node.workspace(segment.as_str())?))
}

/// `DELETE /v1/workspaces/:name`.
pub(crate) async fn delete(State(api): State<Api>, segment: Segment) -> ApiResult<StatusCode> {
    api.node.delete_workspace(segment.as_str()).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// `POST /v1/workspaces/:name/suspend`. What changed is all that is written, whatever the body says.
pub(crate) async fn suspend(
    State(api): State<Api>,
    segment: Segment,
    Json(SuspendWorkspaceRequest { diff: _ }): Json<SuspendWorkspaceRequest>,
) -> ApiResult<Answer<WorkspaceInfo>> {
    Ok(Answer(api.node.suspend_workspace(segment.as_str()).await?))
}

/// `POST /v1/workspaces/:name/resume`. Body and content type are ignored.
pub(crate) async fn resume(State(api): State<Api>, segment: Segment) -> ApiResult<Answer<WorkspaceInfo>> {
    Ok(Answer(api.node.resume_workspace(segment.as_str()).await?))
}
