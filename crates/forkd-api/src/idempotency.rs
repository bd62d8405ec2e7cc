//! Requests that may be sent twice and are done once.
//!
//! ```text
//! POST with a key ──► known ──► same request: the first answer again; another: 422
//!                 ──► under way: 409
//!                 ──► new ──► done to its end, also when the client goes away ──► answer kept for a day
//! ```
//!
//! A key belongs to the path and to whoever presents it: two clients with different credentials cannot see each
//! other's answers. Kept is what says for good what became of a request, in the state database, so that it outlives
//! the daemon; an answer that asks to come again (429, or any of the server's own failures, after which nothing is
//! left of the request) is not. Of a request during which the daemon died, nothing is known.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use forkd_node::{Node, RememberedAnswer};

use crate::auth::Principal;
use crate::error::{ApiError, ApiResult};
use crate::extract::{BODY_LIMIT, BODY_TIME};

/// The header that carries the key.
const KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// On an answer that was given before.
const REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");

/// The longest key, in bytes.
const LONGEST_KEY: usize = 255;

/// The largest answer that is kept; a report on a thousand children has about one MiB.
const ANSWER_LIMIT: usize = 16 << 20;

/// Routes that make something.
const MAKING: [&str; 10] = [
    "/v1/sandboxes",
    "/v1/sandboxes/{id}/fork",
    "/v1/sandboxes/{id}/branch",
    "/v1/sandboxes/{id}/checkpoints",
    "/v1/sandboxes/{id}/suspend",
    "/v1/snapshots",
    "/v1/snapshots/{tag}/compact",
    "/v1/workspaces",
    "/v1/workspaces/{name}/suspend",
    "/v1/workspaces/{name}/resume",
];

/// Digest of what a key means: who presents it, where, and the key itself.
type Name = [u8; 32];

/// Which keys are in use now, and where answers are kept. Clones share it.
#[derive(Clone)]
pub(crate) struct Answers {
    node: Node,
    under_way: Arc<Mutex<HashSet<Name>>>,
}

/// A key that is in use; free again when this is dropped.
struct UnderWay {
    answers: Answers,
    name: Name,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.answers.under_way.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.name);
    }
}

impl Answers {
    /// Those that `node` keeps.
    pub(crate) fn of(node: Node) -> Self {
        Self { node, under_way: Arc::default() }
    }

    fn begin(&self, name: Name) -> Option<UnderWay> {
        let new = self.under_way.lock().unwrap_or_else(PoisonError::into_inner).insert(name);
        new.then(|| UnderWay { answers: self.clone(), name })
    }
}

/// Does a request once for each key.
pub(crate) async fn once(State(answers): State<Answers>, request: Request, next: Next) -> Response {
    match key_of(&request) {
        Ok(Some(key)) => answer(answers, key, request, next).await.unwrap_or_else(IntoResponse::into_response),
        Ok(None) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

/// The key of a request that makes something.
fn key_of(request: &Request) -> ApiResult<Option<String>> {
    let path = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
    let makes = request.method() == Method::POST && path.is_some_and(|path| MAKING.contains(&path));
    let Some(value) = request.headers().get(&KEY).filter(|_| makes) else { return Ok(None) };
    match value.to_str() {
        Ok(key) if (1..=LONGEST_KEY).contains(&key.len()) => Ok(Some(key.to_owned())),
        _ => {
            let message = format!("Idempotency-Key is {value:?}; a key has 1 to {LONGEST_KEY} printable characters");
            Err(ApiError::bad_request("bad_idempotency_key", message))
        }
    }
}

async fn answer(answers: Answers, key: String, request: Request, next: Next) -> ApiResult<Response> {
    let (parts, body) = request.into_parts();
    let reading = tokio::time::timeout(BODY_TIME, to_bytes(body, BODY_LIMIT));
    let body = match reading.await {
        Ok(Ok(body)) => body,
        Ok(Err(error)) => return Err(ApiError::unreadable_body(&error)),
        Err(_) => return Err(ApiError::slow_body(BODY_TIME)),
    };
    let name = name_of(parts.extensions.get(), &parts.headers, parts.uri.path(), &key);
    let asked = digest([parts.uri.query().unwrap_or_default().as_bytes(), &body]);
    let Some(under_way) = answers.begin(name) else { return Err(ApiError::key_under_way(&key)) };
    if let Some(first) = answers.node.remembered_answer(name).await? {
        return if first.request == asked { Ok(again(first)) } else { Err(ApiError::key_used_otherwise(&key)) };
    }
    let request = Request::from_parts(parts, Body::from(body));
    // In a task of its own: what was begun is done and kept also when the client goes away, so that its next try
    // finds out what became of this one.
    let doing = tokio::spawn(async move {
        let response = next.run(request).await;
        let response = keep(&answers.node, name, asked, response).await;
        drop(under_way);
        response
    });
    doing.await.map_err(|_| ApiError::interrupted())
}

/// Keeps an answer, if it says for good what became of the request.
async fn keep(node: &Node, name: Name, request: [u8; 32], response: Response) -> Response {
    let status = response.status();
    if status.is_server_error() || matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::UNAUTHORIZED) {
        return response;
    }
    let (parts, body) = response.into_parts();
    let body = match to_bytes(body, ANSWER_LIMIT).await {
        Ok(body) => body,
        Err(error) => return ApiError::unreadable_answer(&error).into_response(),
    };
    let content_type = parts.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let (content_type, status) = (content_type.map(str::to_owned), status.as_u16());
    let kept = RememberedAnswer { request, status, content_type, body: body.to_vec() };
    if let Err(error) = node.remember_answer(name, kept).await {
        // The request was done all the same, and that is what its client must hear.
        tracing::error!(%error, "cannot keep the answer to a request with an idempotency key");
    }
    Response::from_parts(parts, Body::from(body))
}

/// An answer that was given before.
fn again(first: RememberedAnswer) -> Response {
    let status = StatusCode::from_u16(first.status).unwrap_or(StatusCode::OK);
    let mut response = (status, Bytes::from(first.body)).into_response();
    let headers = response.headers_mut();
    match first.content_type.and_then(|text| HeaderValue::from_str(&text).ok()) {
        Some(content_type) => headers.insert(header::CONTENT_TYPE, content_type),
        None => headers.remove(header::CONTENT_TYPE),
    };
    headers.insert(REPLAYED, HeaderValue::from_static("true"));
    response
}

fn name_of(principal: Option<&Principal>, headers: &HeaderMap, path: &str, key: &str) -> Name {
    // A token's name, where it has one, stays the same when the token is rotated.
    let named = principal.and_then(|principal| principal.token.as_deref());
    let secret = headers.get(header::AUTHORIZATION).filter(|_| named.is_none());
    let secret = secret.map_or(&b""[..], HeaderValue::as_bytes);
    digest([named.unwrap_or_default().as_bytes(), secret, path.as_bytes(), key.as_bytes()])
}

/// Of parts, none of which can pass for a part of its neighbour.
fn digest<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
    }
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::Scope;

    #[test]
    fn a_key_belongs_to_its_client_and_its_path() {
        let secret =
            |token: &'static str| HeaderMap::from_iter([(header::AUTHORIZATION, HeaderValue::from_static(token))]);
        let one = name_of(None, &secret("Bearer a"), "/v1/sandboxes", "k");
        assert_eq!(one, name_of(None, &secret("Bearer a"), "/v1/sandboxes", "k"));
        assert_ne!(one, name_of(None, &secret("Bearer b"), "/v1/sandboxes", "k"));
        assert_ne!(one, name_of(None, &secret("Bearer a"), "/v1/workspaces", "k"));
        assert_ne!(one, name_of(None, &HeaderMap::new(), "/v1/sandboxes", "k"));
        let principal = Principal { token: Some("ci".to_owned()), scope: Scope::Spawn };
        let named = |token| name_of(Some(&principal), &secret(token), "/v1/sandboxes", "k");
        assert_eq!(named("Bearer a"), named("Bearer b"), "a named token was rotated");
        assert_ne!(one, named("Bearer a"));
        assert_ne!(digest([&b"ab"[..], b"c"]), digest([&b"a"[..], b"bc"]));
    }
}
