//! What happened, as a stream of server-sent events.

use std::convert::Infallible;
use std::time::Duration;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::sse::{Event as Line, KeepAlive, Sse};
use forkd_node::Listener;
use forkd_types::SandboxId;
use forkd_types::rest::Event;
use futures_util::{Stream, StreamExt, stream};
use serde::Deserialize;

use crate::error::{ApiError, ApiResult};
use crate::extract::Query;
use crate::router::Api;

/// How often a comment is sent when nothing happens, so that whoever is gone is noticed.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// When a client whose connection broke comes again.
const RETRY: Duration = Duration::from_secs(1);

/// Which events are wanted.
#[derive(Deserialize)]
pub(crate) struct EventsQuery {
    /// Only what is about this sandbox.
    sandbox: Option<SandboxId>,
    /// Only what came after this event; the header `Last-Event-ID`, which browsers send, says the same.
    after: Option<u64>,
}

/// `GET /v1/events`: what happens from now on, and what happened since the event that the client saw last. Ends when
/// the daemon stops.
pub(crate) async fn follow(
    State(api): State<Api>,
    Query(query): Query<EventsQuery>,
    headers: HeaderMap,
) -> ApiResult<Sse<impl Stream<Item = Result<Line, Infallible>>>> {
    let after = last_event_id(&headers)?.or(query.after);
    let listener = api.node.listen(after, query.sandbox);
    // The first line goes out at once: a client sees that it is connected, and where it is in the order of events, so
    // that it misses nothing even when its connection breaks before the first.
    let here = listener.last().to_string();
    let hello = stream::once(async { Line::default().comment("forkd events").id(here).retry(RETRY) });
    let lines = hello.chain(told(listener).map(|event| line(&event))).map(Ok);
    Ok(Sse::new(lines).keep_alive(KeepAlive::new().interval(KEEP_ALIVE).text("still here")))
}

/// Everything that `listener` is given.
fn told(listener: Listener) -> impl Stream<Item = Event> {
    let batches = stream::unfold(listener, |mut listener| async move {
        let batch = listener.next().await?;
        Some((stream::iter(batch), listener))
    });
    batches.flatten()
}

fn line(event: &Event) -> Line {
    let data = serde_json::to_string(event).expect("events are plain data with string keys");
    Line::default().id(event.id.to_string()).event(event.event.name()).data(data)
}

/// The event that the client saw last, if it says so.
fn last_event_id(headers: &HeaderMap) -> Result<Option<u64>, ApiError> {
    let Some(value) = headers.get("last-event-id") else { return Ok(None) };
    let parsed = value.to_str().ok().and_then(|text| text.trim().parse().ok());
    match parsed {
        Some(id) => Ok(Some(id)),
        None => {
            let message =
                format!("Last-Event-ID is {value:?}; send the id of an event of this stream, or leave it out");
            Err(ApiError::bad_request("bad_event_id", message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_event_is_a_number_or_nothing() {
        let with = |value: &'static str| {
            HeaderMap::from_iter([("last-event-id".parse().expect("name"), value.parse().expect("value"))])
        };
        assert_eq!(last_event_id(&HeaderMap::new()).expect("none"), None);
        assert_eq!(last_event_id(&with(" 17 ")).expect("a number"), Some(17));
        for bad in ["", "-1", "seventeen", "99999999999999999999999"] {
            assert!(last_event_id(&with(bad)).is_err(), "{bad}");
        }
    }
}
