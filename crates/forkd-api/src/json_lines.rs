//! Answers that are a stream of JSON objects, one a line.

use std::convert::Infallible;

use axum::body::Body;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

/// Sends what arrives on `events` until its senders are gone. When the client goes away the
/// receiver is dropped, which the senders can see.
pub(crate) fn stream<T: Serialize + Send + 'static>(events: mpsc::Receiver<T>) -> Response {
    let lines = ReceiverStream::new(events).map(|event| Ok::<_, Infallible>(line(&event)));
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
}

fn line(event: &impl Serialize) -> Bytes {
    (text(event) + "\n").into()
}

/// An event as JSON.
pub(crate) fn text(event: &impl Serialize) -> String {
    serde_json::to_string(event).expect("events are plain data with string keys")
}
