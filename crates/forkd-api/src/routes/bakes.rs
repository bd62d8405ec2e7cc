//! Making snapshots.

use axum::extract::State;
use axum::response::Response;
use forkd_types::rest::BakeRequest;
use tokio::sync::mpsc;

use crate::error::ApiResult;
use crate::extract::Json;
use crate::json_lines;
use crate::router::Api;

/// `POST /v1/bakes`: progress as JSON lines, the last of which tells how it ended. A client that
/// closes the connection abandons the bake.
pub(crate) async fn bake(State(api): State<Api>, Json(request): Json<BakeRequest>) -> ApiResult<Response> {
    let (sender, receiver) = mpsc::channel(256);
    let baking = api.node.bake(request, sender).await?;
    tokio::spawn(baking);
    Ok(json_lines::stream(receiver))
}
