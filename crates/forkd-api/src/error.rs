//! Errors as clients see them: a status code and `{"error", "code"}`, decided here and nowhere else.

use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::sse::Event;
use axum::response::{IntoResponse, Response};
use forkd_node::NodeError;
use forkd_types::rest::ErrorBody;

use crate::auth::{Principal, Scope};
use crate::limits::Refusal;
use crate::server::Remote;

/// A result of a handler.
pub(crate) type ApiResult<T> = Result<T, ApiError>;

/// An answer that says what went wrong.
#[derive(Debug)]
pub(crate) struct ApiError {
    status: StatusCode,
    code: &'static str,
    message: String,
    /// In seconds, when the same request may do better.
    retry_after: Option<u64>,
}

impl ApiError {
    /// No route has this path.
    pub(crate) fn unknown_path(path: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, "unknown_path", format!("there is nothing at {path}"))
    }

    /// The path has other methods.
    pub(crate) fn wrong_method() -> Self {
        let message = "this path does not take this method; the allow header lists those it takes";
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
    }

    /// No token was presented.
    pub(crate) fn missing_token() -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "missing_token", "missing bearer token")
    }

    /// Another token was presented.
    pub(crate) fn invalid_token() -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "invalid_token", "invalid bearer token")
    }

    /// The token may do less than the request needs.
    pub(crate) fn forbidden_scope(needed: Scope, principal: &Principal) -> Self {
        let message = format!("this needs a token of scope {needed}; {principal} has scope {}", principal.scope);
        Self::new(StatusCode::FORBIDDEN, "forbidden_scope", message)
    }

    /// The process at the other end of the unix socket may not use it.
    pub(crate) fn forbidden_peer(remote: Option<&Remote>) -> Self {
        let who = remote.map_or_else(|| "a process that cannot be told".to_owned(), ToString::to_string);
        let message =
            format!("{who} may not use this socket; root, the daemon's own user and members of --socket-group may");
        Self::new(StatusCode::FORBIDDEN, "forbidden_peer", message)
    }

    /// A client asks too much at once.
    pub(crate) fn too_many(refusal: &Refusal) -> Self {
        let retry_after = Some(refusal.retry_after.as_secs_f64().ceil().max(1.0) as u64);
        let new = Self::new(StatusCode::TOO_MANY_REQUESTS, refusal.code, refusal.message.clone());
        Self { retry_after, ..new }
    }

    /// The node cannot work.
    pub(crate) fn not_ready(reasons: &[String]) -> Self {
        let message = format!("not ready: {}", reasons.join("; "));
        Self { retry_after: Some(2), ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", message) }
    }

    /// The body came too slowly.
    pub(crate) fn slow_body(limit: std::time::Duration) -> Self {
        let message = format!("the body was not there after {} s; send it at once", limit.as_secs());
        Self::new(StatusCode::REQUEST_TIMEOUT, "slow_body", message)
    }

    /// The body is too large, or ended early.
    pub(crate) fn unreadable_body(error: &axum::Error) -> Self {
        use std::error::Error;
        let too_large = error.source().is_some_and(|cause| cause.is::<http_body_util::LengthLimitError>());
        match too_large {
            true => Self::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", "the body has more than 2 MiB"),
            false => Self::broken_body(format!("the body ended early: {error}")),
        }
    }

    /// An answer of the daemon's own could not be read.
    pub(crate) fn unreadable_answer(error: &axum::Error) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", format!("the answer was lost: {error}"))
    }

    /// A handler ended before its work.
    pub(crate) fn interrupted() -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "interrupted", "the request was interrupted")
    }

    /// A request with this idempotency key has not been answered yet.
    pub(crate) fn key_under_way(key: &str) -> Self {
        let message = format!("a request with Idempotency-Key {key:?} is under way; send it again for its answer");
        Self { retry_after: Some(1), ..Self::new(StatusCode::CONFLICT, "idempotency_key_under_way", message) }
    }

    /// This idempotency key belongs to another request.
    pub(crate) fn key_used_otherwise(key: &str) -> Self {
        let message = format!("Idempotency-Key {key:?} was used for a request with another body; use a new key");
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "idempotency_key_reused", message)
    }

    /// The request asks for things that exclude one another, or has a value that cannot be.
    pub(crate) fn bad_request(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, message)
    }

    /// No sandbox can have the id that the path names.
    pub(crate) fn no_such_sandbox(id: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, "sandbox_not_found", format!("sandbox {id} not found"))
    }

    /// No blob has this digest.
    pub(crate) fn no_such_blob(digest: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, "blob_not_found", format!("there is no blob {digest}"))
    }

    /// The body is encoded in a way that is not understood.
    pub(crate) fn unknown_encoding(encoding: &str) -> Self {
        let message = format!("cannot decode a body of encoding {encoding:?}; send it plain or with zstd");
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_encoding", message)
    }

    /// The body ended early or could not be decoded.
    pub(crate) fn broken_body(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "broken_body", message)
    }

    /// The store's file system is full.
    pub(crate) fn no_space(error: &std::io::Error) -> Self {
        Self::new(StatusCode::INSUFFICIENT_STORAGE, "no_space", format!("the store is out of disk space: {error}"))
    }

    /// A file has no byte of the range that was asked for.
    pub(crate) fn range_not_satisfiable(size: u64) -> Self {
        let message = format!("the file has {size} bytes, none of them in the range that was asked for");
        Self::new(StatusCode::RANGE_NOT_SATISFIABLE, "range_not_satisfiable", message)
    }

    /// A server in a guest is not there or does not answer as it should.
    pub(crate) fn bad_gateway(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_GATEWAY, code, message)
    }

    /// Message and code, for a stream whose status is out already.
    pub(crate) fn into_parts(self) -> (String, &'static str) {
        (self.message, self.code)
    }

    /// The last event of a stream whose status is out already.
    pub(crate) fn into_event(self) -> Event {
        let body = ErrorBody { error: self.message, code: Some(self.code.to_owned()) };
        Event::default().event("error").data(crate::json_lines::text(&body))
    }

    /// The route only makes sense on a connection that changes its protocol.
    pub(crate) fn upgrade_required(protocol: &'static str) -> Response {
        let message = format!("send \"Connection: Upgrade\" and \"Upgrade: {protocol}\"");
        let mut response = Self::new(StatusCode::UPGRADE_REQUIRED, "upgrade_required", message).into_response();
        response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static(protocol));
        response
    }

    /// The stable code.
    pub(crate) fn code(&self) -> &'static str {
        self.code
    }

    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), retry_after: None }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        if self.status.is_server_error() {
            tracing::error!(status = self.status.as_u16(), code = self.code, "{}", self.message);
        }
        let body = ErrorBody { error: self.message, code: Some(self.code.to_owned()) };
        let mut response = (self.status, axum::Json(body)).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        response
    }
}

impl From<NodeError> for ApiError {
    fn from(error: NodeError) -> Self {
        let retry_after = matches!(error, NodeError::BranchesFull { .. } | NodeError::NoRoom { .. }).then_some(1);
        Self { retry_after, ..Self::new(status_of(&error), error.code(), error.message()) }
    }
}

/// The status of a node's error, chosen by its stable code.
fn status_of(error: &NodeError) -> StatusCode {
    match error.code() {
        "bad_workspace_name" | "workspace_state" | "bad_ingredient" => StatusCode::BAD_REQUEST,
        "workspace_not_found" => StatusCode::NOT_FOUND,
        "workspace_exists" | "is_workspace_state" | "sandbox_suspending" => StatusCode::CONFLICT,
        "bad_tag" | "bad_spawn_count" | "guest_invalid" | "bad_field" | "digest_mismatch" | "bad_pack"
        | "foreign_pack" | "pack_version" | "pack_unsigned" | "pack_bad_signature" => StatusCode::BAD_REQUEST,
        "guest_not_found"
        | "sandbox_not_found"
        | "snapshot_not_found"
        | "blob_not_found"
        | "blob_missing"
        | "checkpoint_not_found" => StatusCode::NOT_FOUND,
        "sandbox_stopped"
        | "oom"
        | "snapshot_not_ready"
        | "snapshot_exists"
        | "snapshot_has_children"
        | "snapshot_damaged"
        | "processor_lacks_features"
        | "snapshot_in_progress"
        | "store_changed"
        | "checkpoint_exists"
        | "blob_in_use"
        | "is_checkpoint"
        | "guest_conflict"
        | "references_unknown" => StatusCode::CONFLICT,
        "guest_denied" => StatusCode::FORBIDDEN,
        "kvm_unavailable" | "branches_full" | "no_room" | "limits_unavailable" => StatusCode::SERVICE_UNAVAILABLE,
        "no_space" | "guest_no_space" => StatusCode::INSUFFICIENT_STORAGE,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

impl From<JsonRejection> for ApiError {
    fn from(rejection: JsonRejection) -> Self {
        let code = match rejection.status() {
            StatusCode::UNSUPPORTED_MEDIA_TYPE => "unsupported_media_type",
            StatusCode::UNPROCESSABLE_ENTITY => "bad_body",
            StatusCode::PAYLOAD_TOO_LARGE => "body_too_large",
            _ => "bad_json",
        };
        Self::new(rejection.status(), code, rejection.body_text())
    }
}

impl From<QueryRejection> for ApiError {
    fn from(rejection: QueryRejection) -> Self {
        Self::new(rejection.status(), "bad_query", rejection.body_text())
    }
}

#[cfg(test)]
mod tests {
    use forkd_types::rest::EndCode;

    use super::*;

    #[test]
    fn statuses_are_the_documented_ones() {
        let status = |error: NodeError| status_of(&error).as_u16();
        let id = forkd_types::SandboxId::new(1, 2);
        let tag: forkd_types::Tag = "py".parse().expect("legal tag");
        assert_eq!(status(NodeError::SpawnCount { n: 0 }), 400);
        assert_eq!(status(NodeError::SandboxNotFound { id: id.clone() }), 404);
        for code in [EndCode::Lost, EndCode::Oom] {
            assert_eq!(status(NodeError::SandboxStopped { id: id.clone(), code, reason: String::new() }), 409);
        }
        assert_eq!(status(NodeError::NoRoom { n: 9, reason: String::new() }), 503);
        assert_eq!(status(NodeError::LimitsUnavailable { reason: String::new() }), 503);
        assert_eq!(status(NodeError::SnapshotNotReady { tag: tag.clone(), reason: String::new() }), 409);
        assert_eq!(status(NodeError::BranchesFull { cap: 4 }), 503);
        assert_eq!(status(NodeError::AllFailed { tag, n: 3, first: String::new() }), 500);
    }
}
