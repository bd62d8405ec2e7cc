//! Errors as clients see them: a status code and `{"error", "code"}`, decided here and nowhere else.

use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use forkd_node::NodeError;
use forkd_types::rest::ErrorBody;

/// A result of a handler.
pub(crate) type ApiResult<T> = Result<T, ApiError>;

/// An answer that says what went wrong.
#[derive(Debug)]
pub(crate) struct ApiError {
    status: StatusCode,
    code: &'static str,
    message: String,
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

    /// The route only makes sense on a connection that changes its protocol.
    pub(crate) fn upgrade_required(protocol: &'static str) -> Response {
        let message = format!("send \"Connection: Upgrade\" and \"Upgrade: {protocol}\"");
        let mut response = Self::new(StatusCode::UPGRADE_REQUIRED, "upgrade_required", message).into_response();
        response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static(protocol));
        response
    }

    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into() }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        if self.status.is_server_error() {
            tracing::error!(status = self.status.as_u16(), code = self.code, "{}", self.message);
        }
        let body = ErrorBody { error: self.message, code: Some(self.code.to_owned()) };
        (self.status, axum::Json(body)).into_response()
    }
}

impl From<NodeError> for ApiError {
    fn from(error: NodeError) -> Self {
        Self::new(status_of(&error), error.code(), error.message())
    }
}

/// The status of a node's error, chosen by its stable code.
fn status_of(error: &NodeError) -> StatusCode {
    match error.code() {
        "bad_tag" | "bad_spawn_count" | "bad_field" | "digest_mismatch" | "bad_pack" | "foreign_pack"
        | "pack_version" | "pack_unsigned" | "pack_bad_signature" => StatusCode::BAD_REQUEST,
        "sandbox_not_found" | "snapshot_not_found" | "blob_not_found" | "blob_missing" | "checkpoint_not_found" => {
            StatusCode::NOT_FOUND
        }
        "sandbox_stopped"
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
        | "references_unknown" => StatusCode::CONFLICT,
        "kvm_unavailable" => StatusCode::SERVICE_UNAVAILABLE,
        "no_space" => StatusCode::INSUFFICIENT_STORAGE,
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
    use super::*;

    #[test]
    fn statuses_are_the_documented_ones() {
        let status = |error: NodeError| status_of(&error).as_u16();
        let id = forkd_types::SandboxId::new(1, 2);
        let tag: forkd_types::Tag = "py".parse().expect("legal tag");
        assert_eq!(status(NodeError::SpawnCount { n: 0 }), 400);
        assert_eq!(status(NodeError::SandboxNotFound { id: id.clone() }), 404);
        assert_eq!(status(NodeError::SandboxStopped { id, reason: String::new() }), 409);
        assert_eq!(status(NodeError::SnapshotNotReady { tag: tag.clone(), reason: String::new() }), 409);
        assert_eq!(status(NodeError::AllFailed { tag, n: 3, first: String::new() }), 500);
    }
}
