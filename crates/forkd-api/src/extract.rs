//! Bodies, queries and path segments, with errors in the API's own form.

use std::time::Duration;

use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use forkd_types::{SandboxId, Tag};
use serde::de::DeserializeOwned;

use crate::error::ApiError;

/// The largest JSON body.
pub(crate) const BODY_LIMIT: usize = 2 << 20;

/// How long a JSON body may take to arrive.
pub(crate) const BODY_TIME: Duration = Duration::from_secs(30);

/// A JSON body. Needs a JSON content type.
pub(crate) struct Json<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let reading = axum::Json::from_request(request, state);
        let read = tokio::time::timeout(BODY_TIME, reading).await.map_err(|_| ApiError::slow_body(BODY_TIME))?;
        let axum::Json(value) = read?;
        Ok(Self(value))
    }
}

/// The query part of the path.
pub(crate) struct Query<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let axum::extract::Query(value) = axum::extract::Query::from_request_parts(parts, state).await?;
        Ok(Self(value))
    }
}

/// The one variable segment of the path, decoded.
pub(crate) struct Segment(String);

impl<S: Send + Sync> FromRequestParts<S> for Segment {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let path = parts.uri.path().to_owned();
        match axum::extract::Path::<String>::from_request_parts(parts, state).await {
            Ok(axum::extract::Path(segment)) => Ok(Self(segment)),
            // Only bytes that are not UTF-8 get here; nothing has such a name.
            Err(_) => Err(ApiError::unknown_path(&path)),
        }
    }
}

/// A sandbox and the name of something of its own, from the two variable segments of the path.
pub(crate) struct OfSandbox {
    pub(crate) sandbox: SandboxId,
    pub(crate) name: String,
}

impl<S: Send + Sync> FromRequestParts<S> for OfSandbox {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let path = parts.uri.path().to_owned();
        match axum::extract::Path::<(String, String)>::from_request_parts(parts, state).await {
            Ok(axum::extract::Path((sandbox, name))) => Ok(Self { sandbox: Segment(sandbox).sandbox()?, name }),
            Err(_) => Err(ApiError::unknown_path(&path)),
        }
    }
}

impl Segment {
    /// The segment as it is.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// The sandbox id that it is. What cannot be an id names no sandbox.
    pub(crate) fn sandbox(&self) -> Result<SandboxId, ApiError> {
        self.0.parse().map_err(|_| ApiError::no_such_sandbox(&self.0))
    }

    /// The tag that it is.
    pub(crate) fn tag(&self) -> Result<Tag, ApiError> {
        Ok(self.0.parse::<Tag>().map_err(forkd_node::NodeError::from)?)
    }
}
