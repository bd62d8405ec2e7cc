//! The HTTP client for servers elsewhere, and what its failures are called.
//!
//! Proxies are taken from the environment, certificates from the system. URLs appear in no message with what may
//! be secret in them.

use std::error::Error;
use std::io;
use std::time::Duration;

use http::header::{ACCEPT_ENCODING, RETRY_AFTER};
use reqwest::redirect::{Attempt, Policy};
use reqwest::{RequestBuilder, Response, StatusCode};
use url::Url;

use super::location::shown;

/// How many redirects are followed.
const REDIRECTS: usize = 5;
/// How long a server may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a server may say nothing.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(60);
/// How much of an error's body is quoted.
const QUOTED: usize = 600;

/// Why an exchange with a server failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TransportError {
    /// The client could not be made.
    #[error("could not prepare for HTTP")]
    Setup(#[source] reqwest::Error),
    /// No answer came, or it broke off.
    #[error("the connection to {url} failed")]
    Connection {
        /// Where.
        url: String,
        /// Why.
        source: reqwest::Error,
    },
    /// The server answered with an error.
    #[error("{url} answered {status}{}", said(body))]
    Status {
        /// Where.
        url: String,
        /// The status.
        status: StatusCode,
        /// What it said, shortened.
        body: String,
        /// How long it asks to wait.
        retry_after: Option<Duration>,
    },
    /// The answer is longer than it may be.
    #[error("{url} answered with more than {limit} bytes")]
    TooLong {
        /// Where.
        url: String,
        /// How many it may have.
        limit: u64,
    },
}

fn said(body: &str) -> String {
    if body.is_empty() { String::new() } else { format!(": {body}") }
}

impl TransportError {
    /// Whether the same request may succeed a moment later.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            Self::Setup(_) | Self::TooLong { .. } => false,
            // One that leads nowhere, or from https to http, will do so again; nor does a certificate get better.
            Self::Connection { source, .. } => !source.is_redirect() && !source.is_builder() && !is_of_tls(source),
            Self::Status { status, .. } => {
                status.is_server_error()
                    || matches!(*status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS)
            }
        }
    }

    /// How long the server asks to wait before the next attempt.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// A connection to `url` that failed.
    pub(crate) fn connection(url: &Url, source: reqwest::Error) -> Self {
        Self::Connection { url: shown(url), source: source.without_url() }
    }
}

/// An HTTP client.
#[derive(Clone, Debug)]
pub(crate) struct Transport {
    client: reqwest::Client,
}

impl Transport {
    /// A client with the environment's proxies and the system's certificates.
    pub(crate) fn new() -> Result<Self, TransportError> {
        // Another one that is installed already is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder()
            .user_agent(concat!("forkd/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(SILENCE_TIMEOUT)
            .redirect(Policy::custom(redirect))
            .build();
        client.map(|client| Self { client }).map_err(TransportError::Setup)
    }

    /// A request for what is at `url`, as it is.
    pub(crate) fn get(&self, url: &Url) -> RequestBuilder {
        self.client.get(url.clone()).header(ACCEPT_ENCODING, "identity")
    }

    /// A request that puts something at `url`.
    pub(crate) fn put(&self, url: &Url) -> RequestBuilder {
        self.client.put(url.clone())
    }

    /// Sends a request to `url`; an answer outside 2xx is an error.
    pub(crate) async fn send(&self, url: &Url, request: RequestBuilder) -> Result<Response, TransportError> {
        let mut response = request.send().await.map_err(|source| TransportError::connection(url, source))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let retry_after = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        let mut body = Vec::new();
        while let Ok(Some(piece)) = response.chunk().await {
            body.extend_from_slice(&piece);
            if body.len() > 4 * QUOTED {
                break;
            }
        }
        let words = String::from_utf8_lossy(&body);
        let words: Vec<&str> = words.split(|c: char| c.is_whitespace() || c.is_control()).collect();
        let words = words.into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ");
        Err(TransportError::Status {
            url: shown(url),
            status,
            body: words.chars().take(QUOTED).collect(),
            retry_after: retry_after.map(Duration::from_secs),
        })
    }

    /// Fetches something of at most `limit` bytes.
    pub(crate) async fn get_small(&self, url: &Url, limit: u64) -> Result<Vec<u8>, TransportError> {
        let mut response = self.send(url, self.get(url)).await?;
        let mut content = Vec::new();
        while let Some(piece) = response.chunk().await.map_err(|source| TransportError::connection(url, source))? {
            content.extend_from_slice(&piece);
            if content.len() as u64 > limit {
                return Err(TransportError::TooLong { url: shown(url), limit });
            }
        }
        Ok(content)
    }
}

/// Whether it is TLS that failed, rather than what lies below.
fn is_of_tls(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if error.is::<rustls::Error>() {
            return true;
        }
        // An I/O error that holds another one names that one's source as its own.
        let held = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        next = held.map(|held| held as &(dyn Error + 'static)).or_else(|| error.source());
    }
    false
}

fn redirect(attempt: Attempt<'_>) -> reqwest::redirect::Action {
    let from_https = attempt.previous().last().is_some_and(|url| url.scheme() == "https");
    if from_https && attempt.url().scheme() == "http" {
        return attempt.error("it redirects from https to http");
    }
    if attempt.previous().len() > REDIRECTS {
        return attempt.error(format!("it redirects more than {REDIRECTS} times"));
    }
    attempt.follow()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_does_not_get_better_by_waiting() {
        let tls = || rustls::Error::General("unknown issuer".into());
        for error in [io::Error::other(tls()), io::Error::other(io::Error::other(tls()))] {
            assert!(is_of_tls(&error), "{error:?}");
        }
        for error in
            [io::Error::other("other"), io::ErrorKind::ConnectionReset.into(), io::Error::other(io::Error::other("x"))]
        {
            assert!(!is_of_tls(&error), "{error:?}");
        }
    }
}
