//! Counting and timing requests.

use std::time::Instant;

use axum::extract::{MatchedPath, Request};
use axum::http::Method;
use axum::middleware::Next;
use axum::response::Response;
use metrics::{counter, gauge, histogram};

use crate::auth::ToGuest;

/// What stands for every path that nothing is at: their number must not grow with what clients think up.
const NO_ROUTE: &str = "none";

/// What stands for all requests that name a server in a guest by their host name.
const TO_GUEST: &str = "guest";

struct InFlight;

impl InFlight {
    fn begin() -> Self {
        gauge!("forkd_http_requests_in_flight").increment(1.0);
        Self
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        gauge!("forkd_http_requests_in_flight").decrement(1.0);
    }
}

/// Counts and times a request, by route, method and status.
pub(crate) async fn count(request: Request, next: Next) -> Response {
    let began = Instant::now();
    let in_flight = InFlight::begin();
    let route = match request.extensions().get::<ToGuest>() {
        Some(ToGuest) => TO_GUEST,
        None => request.extensions().get::<MatchedPath>().map_or(NO_ROUTE, MatchedPath::as_str),
    };
    let route = route.to_owned();
    let method = method_label(request.method());
    let response = next.run(request).await;
    drop(in_flight);
    let status = response.status().as_u16().to_string();
    histogram!("forkd_http_request_seconds", "method" => method, "route" => route.clone()).record(began.elapsed());
    counter!("forkd_http_requests_total", "method" => method, "route" => route, "status" => status).increment(1);
    response
}

fn method_label(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_that_clients_think_up_have_one_label() {
        assert_eq!(method_label(&Method::DELETE), "DELETE");
        assert_eq!(method_label(&"BREW".parse().expect("a legal method")), "other");
    }
}
