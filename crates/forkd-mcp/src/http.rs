//! The server on streamable HTTP, at `/mcp`.
//!
//! Every request needs the bearer token, if there is one. Without a token only the loopback is served, and only to
//! clients that ask for it by a loopback name, so that no web page can reach it through a name of its own.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use rmcp::transport::streamable_http_server::session::local::LocalSessionManager;
use rmcp::transport::streamable_http_server::{StreamableHttpServerConfig, StreamableHttpService};
use subtle::ConstantTimeEq;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{Daemon, Server};

/// Where the protocol is spoken.
pub const PATH: &str = "/mcp";

/// Why the server could not be had.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// Anybody in the network could use the sandboxes.
    #[error("{address} can be reached from other hosts, and there is no token; give one, or serve 127.0.0.1")]
    Unguarded {
        /// The address that was asked for.
        address: SocketAddr,
    },
    /// The address cannot be had.
    #[error("could not listen on {address}")]
    Listen {
        /// The address that was asked for.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// Serving broke off.
    #[error("serving {address} broke off")]
    Serve {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
}

/// A server that listens.
#[derive(Debug)]
pub struct HttpServer {
    listener: TcpListener,
    address: SocketAddr,
    token: Option<String>,
}

impl HttpServer {
    /// Listens on `address`; port 0 is any free one.
    pub async fn bind(address: SocketAddr, token: Option<String>) -> Result<Self, HttpError> {
        let token = token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
        if token.is_none() && !address.ip().is_loopback() {
            return Err(HttpError::Unguarded { address });
        }
        let listen = |source| HttpError::Listen { address, source };
        let listener = TcpListener::bind(address).await.map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        Ok(Self { listener, address, token })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `stop` is cancelled.
    ///
    /// Boxed, so that it is compiled here and not again with every program that serves.
    pub fn serve(
        self,
        daemon: Arc<dyn Daemon>,
        stop: CancellationToken,
    ) -> Pin<Box<dyn Future<Output = Result<(), HttpError>> + Send>> {
        Box::pin(self.serve_until(daemon, stop))
    }

    async fn serve_until(self, daemon: Arc<dyn Daemon>, stop: CancellationToken) -> Result<(), HttpError> {
        let mut config = StreamableHttpServerConfig::default();
        config.cancellation_token = stop.clone();
        if self.token.is_some() {
            // The token guards it under whatever name it is reached.
            config.allowed_hosts = Vec::new();
        }
        let tools = move || Ok(Server::new(daemon.clone()));
        let service = StreamableHttpService::new(tools, Arc::new(LocalSessionManager::default()), config);
        let mut router = Router::new().nest_service(PATH, service);
        if let Some(token) = self.token {
            router = router.layer(middleware::from_fn_with_state(Arc::<str>::from(token), require_token));
        }
        let address = self.address;
        axum::serve(self.listener, router)
            .with_graceful_shutdown(stop.cancelled_owned())
            .await
            .map_err(|source| HttpError::Serve { address, source })
    }
}

async fn require_token(State(token): State<Arc<str>>, request: Request, next: Next) -> Response {
    let presented = request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.strip_prefix("Bearer "))
        .unwrap_or_default();
    if bool::from(presented.trim().as_bytes().ct_eq(token.as_bytes())) {
        return next.run(request).await;
    }
    let challenge = [(header::WWW_AUTHENTICATE, "Bearer")];
    (StatusCode::UNAUTHORIZED, challenge, "the bearer token is missing or not the right one\n").into_response()
}
