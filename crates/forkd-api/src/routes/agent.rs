//! A raw connection to the agent in a guest.

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use hyper_util::rt::TokioIo;
use serde::Deserialize;

use crate::error::{ApiError, ApiResult};
use crate::extract::Query;
use crate::router::{Api, Segment};
use crate::routes::ports::has_token;

/// The protocol that the connection changes to: frames of one agent request.
const PROTOCOL: &str = "forkd-agent";

/// Bytes on their way in each direction.
const BUFFER: usize = 64 << 10;

/// What a connection is for.
#[derive(Deserialize)]
pub(crate) struct AgentQuery {
    /// A program or an evaluation is going to be asked for.
    #[serde(default)]
    exec: bool,
}

/// `GET /v1/sandboxes/:id/agent` with `Upgrade: forkd-agent`: after 101, the bytes of the connection
/// are those of a connection to the agent. With `?exec=true` the sandbox's automatic checkpoint, if it has such,
/// is taken first.
pub(crate) async fn connect(
    State(api): State<Api>,
    segment: Segment,
    Query(query): Query<AgentQuery>,
    mut request: Request,
) -> ApiResult<Response> {
    let id = segment.sandbox()?;
    api.node.sandbox(&id)?;
    if !wants_upgrade(request.headers()) {
        return Ok(ApiError::upgrade_required(PROTOCOL));
    }
    // Before the answer, so that a guest that cannot be reached is an error and not a dead stream.
    let mut guest = api.node.agent(&id, query.exec).await?.into_stream();
    let upgrading = hyper::upgrade::on(&mut request);
    let in_use = api.node.in_use(&id)?;
    tokio::spawn(async move {
        let _in_use = in_use;
        let client = match upgrading.await {
            Ok(client) => client,
            Err(error) => {
                tracing::debug!(sandbox = %id, %error, "the client did not follow its upgrade");
                return;
            }
        };
        let mut client = TokioIo::new(client);
        // Each direction ends by itself: a half-closed connection still carries the answer.
        if let Err(error) = tokio::io::copy_bidirectional_with_sizes(&mut client, &mut guest, BUFFER, BUFFER).await {
            tracing::debug!(sandbox = %id, %error, "agent connection broke");
        }
    });
    let headers = [
        (header::CONNECTION, HeaderValue::from_static("Upgrade")),
        (header::UPGRADE, HeaderValue::from_static(PROTOCOL)),
    ];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

fn wants_upgrade(headers: &HeaderMap) -> bool {
    has_token(headers, header::CONNECTION, "upgrade") && has_token(headers, header::UPGRADE, PROTOCOL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upgrades_are_asked_for_in_two_headers() {
        let ask = |connection: &str, upgrade: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONNECTION, connection.parse().expect("header"));
            headers.insert(header::UPGRADE, upgrade.parse().expect("header"));
            wants_upgrade(&headers)
        };
        assert!(ask("Upgrade", "forkd-agent"));
        assert!(ask("keep-alive, upgrade", "h2c, Forkd-Agent"));
        assert!(!ask("keep-alive", "forkd-agent"));
        assert!(!ask("Upgrade", "websocket"));
    }
}
