//! What a guest wrote to its console.

use axum::body::Body;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;

use crate::error::ApiResult;
use crate::extract::Query;
use crate::router::{Api, Segment};

#[derive(Deserialize)]
pub(crate) struct ConsoleQuery {
    /// Go on with what the guest writes from now on, until its machine ends.
    #[serde(default)]
    follow: bool,
}

/// `GET /v1/sandboxes/:id/console?follow=`.
pub(crate) async fn show(
    State(api): State<Api>,
    segment: Segment,
    Query(query): Query<ConsoleQuery>,
) -> ApiResult<Response> {
    let id = segment.sandbox()?;
    let headers = [(header::CONTENT_TYPE, "text/plain; charset=utf-8")];
    if !query.follow {
        return Ok((headers, api.node.console(&id).await?).into_response());
    }
    let stream = futures_util::stream::try_unfold(api.node.follow_console(&id)?, |mut console| async move {
        Ok::<_, std::io::Error>(console.next().await?.map(|piece| (piece, console)))
    });
    Ok((headers, Body::from_stream(stream)).into_response())
}
