//! Calls whose bodies this program only hands on.

use bytes::Bytes;
use http::Method;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};

use super::exchange::{Body, broken, empty, json};
use super::{Client, ClientError};

/// What a call carries.
pub(crate) enum RawBody {
    /// Nothing.
    Empty,
    /// JSON.
    Json(serde_json::Value),
    /// Bytes as they are.
    Bytes(Vec<u8>),
}

impl Client {
    /// Sends a request and returns the answer's body, which may have `limit` bytes.
    pub(crate) async fn raw(
        &self,
        method: Method,
        path: &str,
        body: RawBody,
        limit: usize,
    ) -> Result<Vec<u8>, ClientError> {
        let body = match body {
            RawBody::Empty => empty(),
            RawBody::Json(value) => json(path, &value)?,
            RawBody::Bytes(bytes) => Body {
                content: Full::new(Bytes::from(bytes)).map_err(|never| match never {}).boxed(),
                content_type: Some("application/octet-stream"),
                content_encoding: None,
            },
        };
        let answer = self.call(method, path, body).await?;
        match Limited::new(answer.into_body(), limit).collect().await {
            Ok(body) => Ok(body.to_bytes().into()),
            Err(error) if error.is::<LengthLimitError>() => {
                Err(ClientError::Failed(format!("the answer to {path} has more than {limit} bytes")))
            }
            Err(error) => match error.downcast::<hyper::Error>() {
                Ok(error) => Err(broken(path, *error)),
                Err(error) => Err(ClientError::Failed(format!("the answer to {path} broke off: {error}"))),
            },
        }
    }
}
