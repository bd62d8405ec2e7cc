//! What the tools need of a daemon: requests to its REST API.

use std::future::Future;
use std::pin::Pin;

use http::Method;
use percent_encoding::{AsciiSet, CONTROLS, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;

/// What must not stand in a query's value as it is.
const QUERY: &AsciiSet = &CONTROLS.add(b' ').add(b'"').add(b'#').add(b'%').add(b'&').add(b'+').add(b'<').add(b'>');

/// What must not stand in a path's segment as it is.
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// A daemon that can be asked.
pub trait Daemon: Send + Sync + 'static {
    /// Sends a request and returns the body of a successful answer. Any other answer is an error whose text is the
    /// daemon's.
    fn call(&self, request: Request) -> Calling<'_>;
}

/// A request under way.
pub type Calling<'a> = Pin<Box<dyn Future<Output = Result<Vec<u8>, CallError>> + Send + 'a>>;

/// A request to the daemon's REST API.
#[derive(Clone, PartialEq, Debug)]
pub struct Request {
    /// Its method.
    pub method: Method,
    /// Its path with the query, percent-encoded.
    pub path: String,
    /// What it carries.
    pub body: Body,
    /// The longest answer that is wanted, in bytes; a longer one is an error.
    pub limit: usize,
}

/// The longest answer that any tool hands on: more than any model reads.
const ANSWER_LIMIT: usize = 64 << 20;

/// What a request carries.
#[derive(Clone, PartialEq, Debug)]
pub enum Body {
    /// Nothing, and no content type.
    Empty,
    /// JSON.
    Json(Value),
    /// Bytes as they are.
    Bytes(Vec<u8>),
}

/// Why a request failed, in words for whoever asked.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct CallError(pub String);

impl Request {
    pub(crate) fn get(path: String) -> Self {
        Self::new(Method::GET, path, Body::Empty)
    }

    pub(crate) fn delete(path: String) -> Self {
        Self::new(Method::DELETE, path, Body::Empty)
    }

    pub(crate) fn post(path: String, body: Body) -> Self {
        Self::new(Method::POST, path, body)
    }

    pub(crate) fn put(path: String, body: Body) -> Self {
        Self::new(Method::PUT, path, body)
    }

    /// The same request, for an answer of at most `limit` bytes.
    pub(crate) fn at_most(self, limit: usize) -> Self {
        Self { limit, ..self }
    }

    fn new(method: Method, path: String, body: Body) -> Self {
        Self { method, path, body, limit: ANSWER_LIMIT }
    }
}

/// The path of a sandbox, or below it.
pub(crate) fn sandbox(id: &str, tail: &str) -> String {
    format!("/v1/sandboxes/{}{tail}", segment(id))
}

/// `text` as one segment of a path. A dot segment would be taken out on the way.
pub(crate) fn segment(text: &str) -> String {
    match text {
        "." | ".." => text.replace('.', "%2E"),
        _ => utf8_percent_encode(text, SEGMENT).to_string(),
    }
}

/// `text` as a value in a query.
pub(crate) fn query(text: &str) -> String {
    utf8_percent_encode(text, QUERY).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_model_writes_stays_within_its_segment() {
        assert_eq!(sandbox("sb-1-0000", "/exec"), "/v1/sandboxes/sb-1-0000/exec");
        assert_eq!(sandbox("../snapshots/x?force=true#", ""), "/v1/sandboxes/..%2Fsnapshots%2Fx%3Fforce%3Dtrue%23");
        assert_eq!(segment(".."), "%2E%2E");
        assert_eq!(query("/a b&c=d"), "/a%20b%26c=d");
    }
}
