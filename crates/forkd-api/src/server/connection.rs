//! One connection, from its handshake to its end.

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;

use axum::Router;
use axum::http::{Request, StatusCode};
use axum::response::Response;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tower::Service;

use super::lines::Line;
use super::tls::Tls;
use super::watched::Watched;
use super::{OverTls, Remote, stopped};
use crate::auth::Principal;
use crate::held::hold;

/// The most bytes of a connection that wait to be understood or to be sent, and so the largest header.
const BUFFER_LIMIT: usize = 64 << 10;

/// What a connection needs to be served.
pub(super) struct Serving {
    pub(super) router: Router,
    pub(super) remote: Remote,
    pub(super) line: Arc<Line>,
    pub(super) stop: watch::Receiver<bool>,
}

impl Serving {
    /// Serves requests until the peer or this side ends the connection.
    pub(super) async fn run<S>(self, socket: S, tls: Option<Tls>)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let socket = Watched::new(socket, Arc::clone(&self.line));
        let Some(tls) = tls else { return self.speak(socket, None).await };
        let shaken = tokio::select! {
            shaken = tls.shake_hands(socket) => shaken,
            () = self.line.hung_up() => return,
            () = stopped(self.stop.clone()) => return,
        };
        match shaken {
            Ok(stream) => self.speak(stream, Some(OverTls)).await,
            Err(error) => tracing::debug!(remote = %self.remote, %error, "no TLS connection came about"),
        }
    }

    async fn speak<S>(self, stream: S, over_tls: Option<OverTls>)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let Self { router, remote, line, stop } = self;
        let answering = service_fn(|mut request: Request<Incoming>| {
            request.extensions_mut().insert(remote.clone());
            if let Some(over_tls) = over_tls {
                request.extensions_mut().insert(over_tls);
            }
            answer(router.clone(), Arc::clone(&line), request)
        });
        let connection = http1::Builder::new()
            // The line has limits of its own, which tell a slow header from an idle connection.
            .header_read_timeout(None)
            .max_buf_size(BUFFER_LIMIT)
            .serve_connection(TokioIo::new(stream), answering)
            .with_upgrades();
        let mut connection = pin!(connection);
        let mut hung_up = pin!(line.hung_up());
        let mut stopping = pin!(stopped(stop));
        let mut is_stopping = false;
        let ended = loop {
            tokio::select! {
                ended = connection.as_mut() => break ended,
                () = hung_up.as_mut() => return,
                () = stopping.as_mut(), if !is_stopping => {
                    is_stopping = true;
                    if line.is_at_rest() {
                        return;
                    }
                    connection.as_mut().graceful_shutdown();
                }
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%remote, %error, "a connection broke");
        }
    }
}

async fn answer(mut router: Router, line: Arc<Line>, request: Request<Incoming>) -> Result<Response, Infallible> {
    let mut busy = line.begin();
    let response = router.call(request).await?;
    if response.extensions().get::<Principal>().is_some() {
        busy.is_known();
    }
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        busy.for_good();
        return Ok(response);
    }
    Ok(hold(response, busy))
}
