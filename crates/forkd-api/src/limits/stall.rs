//! Uploads that stop arriving.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use tokio::time::{Sleep, sleep};

/// How long nothing of an upload may come. A client may compress much that becomes little.
const STALL: Duration = Duration::from_secs(60);

/// A body that fails when nothing of it comes for too long.
struct Steady {
    body: Body,
    limit: Duration,
    /// Runs only while something is waited for: a reader that takes its time is no fault of the client's.
    patience: Option<Pin<Box<Sleep>>>,
}

impl HttpBody for Steady {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        if polled.is_ready() {
            self.patience = None;
            return polled;
        }
        let limit = self.limit;
        match self.patience.get_or_insert_with(|| Box::pin(sleep(limit))).as_mut().poll(context) {
            Poll::Ready(()) => {
                let text = format!("nothing of the body came for {} s", self.limit.as_secs());
                Poll::Ready(Some(Err(axum::Error::new(std::io::Error::new(std::io::ErrorKind::TimedOut, text)))))
            }
            Poll::Pending => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}

fn steadily(body: Body, limit: Duration) -> Body {
    Body::new(Steady { body, limit, patience: None })
}

/// Ends uploads that stop arriving.
pub(crate) async fn steady(request: Request, next: Next) -> Response {
    next.run(request.map(|body| steadily(body, STALL))).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;

    #[tokio::test(start_paused = true)]
    async fn a_body_may_be_slow_but_not_stand_still() {
        let (sender, receiver) = tokio::sync::mpsc::channel::<Result<Bytes, std::io::Error>>(1);
        let stream = tokio_stream::wrappers::ReceiverStream::new(receiver);
        let mut body = steadily(Body::from_stream(stream), Duration::from_secs(60));
        let feeder = tokio::spawn(async move {
            for _ in 0..5 {
                tokio::time::sleep(Duration::from_secs(59)).await;
                sender.send(Ok(Bytes::from_static(b"x"))).await.expect("read");
            }
            tokio::time::sleep(Duration::from_secs(3600)).await;
        });
        for _ in 0..5 {
            body.frame().await.expect("a frame").expect("in time");
        }
        let error = body.frame().await.expect("an end").expect_err("stalled");
        assert!(error.to_string().contains("60 s"), "{error}");
        feeder.abort();
    }
}
