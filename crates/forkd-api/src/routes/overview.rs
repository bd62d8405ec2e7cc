//! Everything at once: the family of all there is, and what it costs.

use axum::Json as Answer;
use axum::extract::State;
use forkd_types::rest::{Family, SandboxUsage};

use crate::error::ApiResult;
use crate::router::Api;

/// `GET /v1/tree`.
pub(crate) async fn tree(State(api): State<Api>) -> ApiResult<Answer<Family>> {
    Ok(Answer(api.node.family().await?))
}

/// `GET /v1/usage`.
pub(crate) async fn usage(State(api): State<Api>) -> ApiResult<Answer<Vec<SandboxUsage>>> {
    Ok(Answer(api.node.usage().await?))
}
